//! AMX, the matrix unit of Intel's servers since Sapphire Rapids: eight registers of 16 rows × 64
//! bytes, and one instruction that multiplies two of them. Stable Rust has no intrinsics for it.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};

use super::unit::MatrixUnit;
use super::{Aligned, LANES, Line};
use crate::kernels::{Half, PANEL};

/// Proof that this machine has AMX with bytes and bf16, and that the system lets us use it.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

/// Rows and bytes of a row for each register: 0 to 2 are whole (a sum, and the factors of a bf16
/// product), then the factors of 32 and of 16 columns of bytes.
const SHAPES: [(u8, u16); 7] = [(16, 64), (16, 64), (16, 64), (16, 32), (8, 64), (16, 16), (4, 64)];

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const CONFIG: Config = {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut i = 0;
    while i < SHAPES.len() {
        (config.rows[i], config.row_bytes[i]) = SHAPES[i];
        i += 1;
    }
    config
};

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
        if !is_x86_feature_detected!("xsave") || features & BF16_TILE_BYTES != BF16_TILE_BYTES {
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

impl MatrixUnit for Amx {
    /// A thread keeps its configuration, so that this is a look at it from the second time on.
    #[inline(always)]
    fn begin(self) {
        let mut now = Config { palette: 0, ..CONFIG };
        // SAFETY: `self` proves the instructions; both move one `Config`. Nobody else in this
        // process has another configuration.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &mut now, options(nostack));
            if now.palette == 0 {
                asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack));
            }
        }
    }

    #[inline(always)]
    fn byte_products(
        self,
        x: &[[i8; 32]; PANEL],
        at: usize,
        w: &[Line],
        out: &mut Aligned<[[i32; LANES]; PANEL]>,
    ) {
        // SAFETY: `self` proves the instructions, `begin` gave the registers the shapes of `SHAPES`,
        // which the references hold: 16 rows of `x`, 8 or 4 rows of `w`, 16 of `out`.
        unsafe {
            match (w.len(), at) {
                (8, 0) => asm!(
                    "tilezero tmm0",
                    "tileloadd tmm3, [{x} + {x_stride}]",
                    "tileloadd tmm4, [{w} + {stride}]",
                    "tdpbssd tmm0, tmm3, tmm4",
                    "tilestored [{out} + {stride}], tmm0",
                    x = in(reg) x, w = in(reg) w.as_ptr(), out = in(reg) out,
                    x_stride = in(reg) 32usize, stride = in(reg) 64usize,
                    out("tmm0") _, out("tmm3") _, out("tmm4") _, options(nostack),
                ),
                (4, 0 | 16) => asm!(
                    "tilezero tmm0",
                    "tileloadd tmm5, [{x} + {x_stride}]",
                    "tileloadd tmm6, [{w} + {stride}]",
                    "tdpbssd tmm0, tmm5, tmm6",
                    "tilestored [{out} + {stride}], tmm0",
                    x = in(reg) x.as_ptr().byte_add(at), w = in(reg) w.as_ptr(), out = in(reg) out,
                    x_stride = in(reg) 32usize, stride = in(reg) 64usize,
                    out("tmm0") _, out("tmm5") _, out("tmm6") _, options(nostack),
                ),
                _ => unreachable!("{} rows of codes from column {at}", w.len()),
            }
        }
    }

    #[inline(always)]
    fn pair_products(self, x: &[Half], w: &[Line], out: &mut [[f32; LANES]; PANEL]) {
        // SAFETY: as above; a step of 32 columns has 16 rows of either factor.
        unsafe {
            asm!("tilezero tmm0", out("tmm0") _, options(nostack));
            for (x, w) in x.iter().zip(w.as_chunks::<16>().0.iter().cycle()) {
                asm!(
                    "tileloadd tmm1, [{x} + {stride}]",
                    "tileloadd tmm2, [{w} + {stride}]",
                    "tdpbf16ps tmm0, tmm1, tmm2",
                    x = in(reg) x, w = in(reg) w, stride = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, options(nostack),
                );
            }
            asm!(
                "tilestored [{out} + {stride}], tmm0",
                out = in(reg) out, stride = in(reg) 64usize, options(nostack),
            );
        }
    }
}
