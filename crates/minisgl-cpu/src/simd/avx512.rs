//! AVX-512 with VNNI (Cascade Lake, Zen 4 and later): a vector of the vocabulary is one
//! register.

use std::arch::x86_64::*;

use half::f16;

use super::amx::Amx;
use super::math::{EXP, LN2_HIGH, LN2_LOW};
use super::{Kernel, Simd, array};

/// Proof that this machine has AVX-512 F, BW, DQ, VL and VNNI, and AMX or not.
#[derive(Clone, Copy, Debug)]
pub struct Avx512 {
    amx: Option<Amx>,
}

impl Avx512 {
    /// Asks the processor.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        found.then_some(Self { amx: None })
    }

    /// The same with tiles, where the machine has them.
    pub fn with_amx(self) -> Option<Self> {
        Some(Self { amx: Some(Amx::detect()?) })
    }

    /// Runs `kernel` compiled with the features.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn with_features<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` proves the features.
        unsafe { with_features(self, kernel) }
    }
}

/// Calls intrinsics that need the features that a value of `Avx512` proves.
macro_rules! with {
    ($e:expr) => {{
        // SAFETY: `self` proves the features; pointers come from references to as many bytes as
        // the instructions move, and these ask for no alignment.
        unsafe { $e }
    }};
}

impl Simd for Avx512 {
    const ROWS: usize = 8;
    type F32 = __m512;
    type Bytes = __m512i;
    type NibbleSum = __m512i;
    type ByteSum = __m512i;

    #[inline(always)]
    fn will_read(self, line: &u8, ahead: usize) {
        let address = std::ptr::from_ref(line).wrapping_add(ahead).cast();
        match self.amx {
            // SAFETY: a fetch cannot fail, whatever the address.
            Some(_) => unsafe { _mm_prefetch::<_MM_HINT_T0>(address) },
            // SAFETY: as above.
            None => unsafe { _mm_prefetch::<_MM_HINT_T1>(address) },
        }
    }
    #[inline(always)]
    fn will_write(self, line: &f32) {
        with!(_mm_prefetch::<_MM_HINT_ET0>(std::ptr::from_ref(line).cast()));
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> __m512 {
        with!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; 16]) {
        with!(_mm512_storeu_ps(to.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> __m512 {
        with!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; 16]) -> __m512 {
        with!({
            let sixteen = _mm_loadu_si128(from.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen))
        })
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        with!(_mm512_roundscale_ps::<0>(x))
    }
    /// The formula of `math::exp`, but 2ⁿ by an instruction that makes 0 where it must.
    #[inline(always)]
    fn exp(self, x: __m512) -> __m512 {
        let x = self.max(x, self.splat(-110.0));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-LN2_HIGH), x);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut p = self.splat(EXP[0]);
        for &c in &EXP[1..] {
            p = self.fma(p, r, self.splat(c));
        }
        let y = self.add(self.fma(self.mul(p, r), r, r), self.splat(1.0));
        with!(_mm512_scalef_ps(y, n))
    }
    #[inline(always)]
    fn highest(self, x: __m512) -> f32 {
        with!(_mm512_reduce_max_ps(x))
    }
    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        with!(_mm512_reduce_add_ps(x))
    }
    #[inline(always)]
    fn transpose(self, x: [__m512; 16]) -> [__m512; 16] {
        // Pairs, then fours of rows inside the quarters of a register, then the quarters.
        with!({
            let pairs = array!(16, x[0], |i| {
                let (a, b) = (x[i / 2 * 2], x[i / 2 * 2 + 1]);
                if i % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) }
            });
            // `fours[4·i + j]`: rows 4i.., columns j, 4 + j, 8 + j, 12 + j.
            let fours = array!(16, x[0], |i| {
                let (a, b) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 {
                    _mm512_shuffle_ps::<0x44>(a, b)
                } else {
                    _mm512_shuffle_ps::<0xee>(a, b)
                }
            });
            // `eights[8·h + 4·c + j]`: rows 8h.., columns j + 8·{0, 1} with c = 0, 4 more with 1.
            let eights = array!(16, x[0], |i| {
                let (a, b) = (fours[i / 8 * 8 + i % 4], fours[i / 8 * 8 + i % 4 + 4]);
                if i % 8 < 4 {
                    _mm512_shuffle_f32x4::<0x88>(a, b)
                } else {
                    _mm512_shuffle_f32x4::<0xdd>(a, b)
                }
            });
            array!(16, x[0], |i| {
                let (a, b) = (eights[i % 8], eights[i % 8 + 8]);
                if i < 8 {
                    _mm512_shuffle_f32x4::<0x88>(a, b)
                } else {
                    _mm512_shuffle_f32x4::<0xdd>(a, b)
                }
            })
        })
    }

    #[inline(always)]
    fn store_i8(self, x: __m512, to: &mut [i8; 16]) {
        with!({
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        });
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> __m512i {
        with!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn nibbles(self, x: __m512i) -> (__m512i, __m512i) {
        with!({
            let mask = _mm512_set1_epi8(15);
            (_mm512_and_si512(x, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask))
        })
    }
    #[inline(always)]
    fn nibble_zero(self) -> __m512i {
        with!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn nibble_dot(self, sum: __m512i, w: __m512i, x: [i8; 4]) -> __m512i {
        with!(_mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(bytemuck::cast(x))))
    }
    #[inline(always)]
    fn nibble_total(self, sum: __m512i) -> __m512 {
        with!(_mm512_cvtepi32_ps(sum))
    }

    #[inline(always)]
    fn byte_start(self, shifted: i32) -> __m512i {
        with!(_mm512_set1_epi32(shifted))
    }
    /// The instruction wants one unsigned factor: w + 128, which `byte_start` takes back.
    #[inline(always)]
    fn byte_dot(self, sum: __m512i, w: __m512i, x: [i8; 4]) -> __m512i {
        with!({
            let unsigned = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
            _mm512_dpbusd_epi32(sum, unsigned, _mm512_set1_epi32(bytemuck::cast(x)))
        })
    }
    #[inline(always)]
    fn byte_total(self, sum: __m512i) -> __m512 {
        with!(_mm512_cvtepi32_ps(sum))
    }

    #[inline(always)]
    fn widen(self, pairs: __m512i) -> (__m512, __m512) {
        with!({
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
        })
    }

    type Unit = Amx;

    #[inline(always)]
    fn unit(self) -> Option<Amx> {
        self.amx
    }
    #[inline(always)]
    fn convert(self, from: &[i32; 16]) -> __m512 {
        with!(_mm512_cvtepi32_ps(_mm512_loadu_si512(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn store_bytes(self, x: __m512i, to: &mut [u8; 64]) {
        with!(_mm512_storeu_si512(to.as_mut_ptr().cast(), x));
    }
}
