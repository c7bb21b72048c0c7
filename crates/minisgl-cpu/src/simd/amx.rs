//! AMX, the matrix unit of Intel's servers since Sapphire Rapids: eight registers of 16 rows × 64
//! bytes, and one instruction that multiplies two of them. Stable Rust has no intrinsics for it.

use std::arch::asm;
use std::arch::x86_64::*;

use half::f16;

use super::unit::{MatrixUnit, Products, Sums};
use super::{Aligned, LANES, Line};
use crate::kernels::{Half, PANEL, Quantized};

/// Proof that this machine has AMX with bytes and bf16, and that the system lets us use it; and
/// AVX-512 F and BW, as all that have AMX do.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

/// What `ldtilecfg` reads.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Registers of these rows, and bytes a row.
    const fn new(shapes: &[(u8, u16)]) -> Self {
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut i = 0;
        while i < shapes.len() {
            (config.rows[i], config.row_bytes[i]) = shapes[i];
            i += 1;
        }
        config
    }
}

/// A sum, then the factors of 32 and of 16 columns.
const BYTES: Config = Config::new(&[(16, 64), (16, 32), (8, 64), (16, 16), (4, 64)]);
/// Three sums, three tiles of activations, two of weights.
const PAIRS: Config = Config::new(&[(16, 64); 8]);

impl Amx {
    /// Asks the processor, then the system.
    pub fn detect() -> Option<Self> {
        const BF16_TILE_BYTES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        const TILE_STATE: u64 = 1 << 17 | 1 << 18;
        #[target_feature(enable = "xsave")]
        fn enabled_state() -> u64 {
            // SAFETY: register 0 is there wherever the instruction is.
            unsafe { _xgetbv(0) }
        }
        let features = __cpuid_count(7, 0).edx;
        let vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        let tiles = features & BF16_TILE_BYTES == BF16_TILE_BYTES;
        if !(is_x86_feature_detected!("xsave") && vectors && tiles) {
            return None;
        }
        // SAFETY: the feature was asked for.
        let enabled = unsafe { enabled_state() };
        (enabled & TILE_STATE == TILE_STATE && permitted()).then_some(Self(()))
    }
}

/// Linux saves the registers' 8 KiB only for processes that asked.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call reads and writes no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Sixteen lines into a register.
macro_rules! load {
    ($register:tt, $lines:expr) => {
        asm!(
            concat!("tileloadd ", $register, ", [{} + {stride}]"),
            in(reg) $lines, stride = in(reg) 64usize, out($register) _, options(nostack, readonly),
        )
    };
}

/// A register into sixteen lines.
macro_rules! store {
    ($register:literal, $lines:expr) => {
        asm!(
            concat!("tilestored [{} + {stride}], ", $register),
            in(reg) $lines, stride = in(reg) 64usize, options(nostack),
        )
    };
}

/// Adds a product of two registers to a third.
macro_rules! add_product {
    ($sum:tt, $x:literal, $w:literal) => {
        asm!(
            concat!("tdpbf16ps ", $sum, ", ", $x, ", ", $w),
            out($sum) _, options(nostack, nomem),
        )
    };
}

impl MatrixUnit for Amx {
    /// A thread keeps its configuration, so that this is most often no more than a look at it.
    #[inline(always)]
    fn begin(self, products: Products) {
        let wanted = match products {
            Products::Bytes => BYTES,
            Products::Pairs { rows } => {
                let mut few = PAIRS;
                few.rows[..6].fill(rows.min(PANEL) as u8);
                few
            }
        };
        let mut now = Config { palette: 0, ..PAIRS };
        // SAFETY: `self` proves the instructions; both move one `Config`.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &mut now, options(nostack));
            if now != wanted {
                asm!("ldtilecfg [{}]", in(reg) &wanted, options(nostack));
            }
        }
    }

    #[inline(always)]
    fn byte_products(
        self,
        x: &[Quantized; PANEL],
        at: usize,
        w: &[Line],
        out: &mut Aligned<[[i32; LANES]; PANEL]>,
    ) {
        // SAFETY: `self` proves the instructions, `begin` gave the registers the shapes of `BYTES`,
        // which the references hold: 16 rows of `x`, 8 or 4 rows of `w`, 16 of `out`.
        unsafe {
            match (w.len(), at) {
                (8, 0) => asm!(
                    "tilezero tmm0",
                    "tileloadd tmm1, [{x} + {stride}]",
                    "tileloadd tmm2, [{w} + {stride}]",
                    "tdpbssd tmm0, tmm1, tmm2",
                    "tilestored [{out} + {stride}], tmm0",
                    x = in(reg) x, w = in(reg) w.as_ptr(), out = in(reg) out,
                    stride = in(reg) size_of::<Quantized>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, options(nostack),
                ),
                (4, 0 | 16) => asm!(
                    "tilezero tmm0",
                    "tileloadd tmm3, [{x} + {stride}]",
                    "tileloadd tmm4, [{w} + {stride}]",
                    "tdpbssd tmm0, tmm3, tmm4",
                    "tilestored [{out} + {stride}], tmm0",
                    x = in(reg) x.as_ptr().byte_add(at), w = in(reg) w.as_ptr(), out = in(reg) out,
                    stride = in(reg) size_of::<Quantized>(),
                    out("tmm0") _, out("tmm3") _, out("tmm4") _, options(nostack),
                ),
                _ => unreachable!("{} rows of codes from column {at}", w.len()),
            }
        }
    }

    #[inline(always)]
    fn pair_products(self, x: &[Half], w: &[Line], low: &[Line], out: &mut Sums) {
        let (w, low) = (w.as_chunks::<16>().0, low.as_chunks::<16>().0);
        let tiles = x.chunks_exact(w.len()).len();
        let low = (!low.is_empty()).then(|| &low[..w.len()]);
        assert!(tiles <= out.0.len());
        // SAFETY: `self` proves the instructions, and `begin` made registers of at most sixteen
        // lines; every address is that of as many, inside slices whose lengths were looked at. No code but
        // this touches the registers in between.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, options(nostack),
            );
            for (k, w_tile) in w.iter().enumerate() {
                load!("tmm6", w_tile);
                load!("tmm3", &x[k]);
                add_product!("tmm0", "tmm3", "tmm6");
                if tiles > 1 {
                    load!("tmm4", &x[w.len() + k]);
                    add_product!("tmm1", "tmm4", "tmm6");
                }
                if tiles > 2 {
                    load!("tmm5", &x[2 * w.len() + k]);
                    add_product!("tmm2", "tmm5", "tmm6");
                }
                // Only now, so that no product waits for the sum that the one before it makes.
                if let Some(low) = low {
                    load!("tmm7", &low[k]);
                    add_product!("tmm0", "tmm3", "tmm7");
                    if tiles > 1 {
                        add_product!("tmm1", "tmm4", "tmm7");
                    }
                    if tiles > 2 {
                        add_product!("tmm2", "tmm5", "tmm7");
                    }
                }
            }
            store!("tmm0", &mut out.0[0]);
            if tiles > 1 {
                store!("tmm1", &mut out.0[1]);
            }
            if tiles > 2 {
                store!("tmm2", &mut out.0[2]);
            }
        }
    }

    #[inline(always)]
    fn split_pairs(self, pairs: &Line, high: &mut Line, low: &mut Line) {
        // SAFETY: `self` proves the features; a line is a register.
        unsafe {
            let pairs = _mm512_load_si512(pairs.0.as_ptr().cast());
            let second = _mm512_srli_epi32::<16>(pairs);
            let wide = |x| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
            split(wide(pairs), wide(second), high, low);
        }
    }

    #[inline(always)]
    fn split_rows(
        self,
        first: &[f16; LANES],
        second: &[f16; LANES],
        high: &mut Line,
        low: &mut Line,
    ) {
        // SAFETY: `self` proves the features; each load is of sixteen f16.
        unsafe {
            let wide = |x: &[f16; LANES]| _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()));
            split(wide(first), wide(second), high, low);
        }
    }
}

/// Pairs of f32, whose last twelve bits are zeros, as pairs of bf16 and of what these leave.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn split(first: __m512, second: __m512, high: &mut Line, low: &mut Line) {
    // SAFETY: the caller's word; a line is a register.
    unsafe {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let cut = |x| _mm512_and_si512(_mm512_castps_si512(x), upper);
        let join = |first, second| _mm512_or_si512(_mm512_srli_epi32::<16>(first), second);
        let (firsts, seconds) = (cut(first), cut(second));
        let left = |x, cut| _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(cut)));
        let lefts = join(left(first, firsts), left(second, seconds));
        _mm512_store_si512(high.0.as_mut_ptr().cast(), join(firsts, seconds));
        _mm512_store_si512(low.0.as_mut_ptr().cast(), lefts);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_f16_is_two_bf16() {
        let Some(unit) = Amx::detect() else { return eprintln!("skipped: no AMX") };
        let numbers: Vec<f16> =
            (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
        for both in numbers.as_chunks::<{ 2 * LANES }>().0 {
            let (first, second) = both.split_at(LANES);
            let (first, second) = (first.first_chunk().unwrap(), second.first_chunk().unwrap());
            let pairs: [[f16; 2]; LANES] = std::array::from_fn(|i| [first[i], second[i]]);
            let mut parts = [Line([0; 64]); 2];
            let [high, low] = &mut parts;
            unit.split_rows(first, second, high, low);
            let sum = |i: usize| {
                let part = |line: &Line| bytemuck::cast::<_, [[bf16; 2]; LANES]>(line.0)[i];
                let (high, low) = (part(&parts[0]), part(&parts[1]));
                [0, 1].map(|of| high[of].to_f32() + low[of].to_f32())
            };
            for (i, pair) in pairs.iter().enumerate() {
                assert_eq!(sum(i), pair.map(f16::to_f32));
            }
            let from_rows = parts.map(|line| line.0);
            let [high, low] = &mut parts;
            unit.split_pairs(&Line(bytemuck::cast(pairs)), high, low);
            assert_eq!(parts.map(|line| line.0), from_rows);
        }
    }
}
