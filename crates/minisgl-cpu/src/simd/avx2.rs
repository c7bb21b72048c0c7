//! AVX2 with FMA and F16C: a vector of the vocabulary is two registers.

use std::arch::x86_64::*;

use half::f16;

use super::unit::NoUnit;
use super::{Kernel, Simd, array};

/// Proof that this machine has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// Asks the processor.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    /// Runs `kernel` compiled with the features.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` proves the features.
        unsafe { with_features(self, kernel) }
    }
}

/// Calls intrinsics that need the features that a value of `Avx2` proves, once for either
/// register: `i` is 0, then 1.
macro_rules! both {
    (|$i:ident| $e:expr) => {{
        // SAFETY: `self` proves the features; pointers come from references to as many bytes as
        // the instructions move, and these ask for no alignment.
        unsafe {
            [
                {
                    let $i = 0;
                    $e
                },
                {
                    let $i = 1;
                    $e
                },
            ]
        }
    }};
}

impl Simd for Avx2 {
    const ROWS: usize = 4;
    type F32 = [__m256; 2];
    type Bytes = [__m256i; 2];
    type NibbleSum = [__m256i; 2];
    type ByteSum = [__m256i; 2];

    #[inline(always)]
    fn will_read(self, line: &u8, ahead: usize) {
        let address = std::ptr::from_ref(line).wrapping_add(ahead);
        // SAFETY: a fetch cannot fail, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[inline(always)]
    fn will_write(self, line: &f32) {
        // SAFETY: a fetch cannot fail.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(std::ptr::from_ref(line).cast()) };
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        both!(|_i| _mm256_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> Self::F32 {
        both!(|i| _mm256_loadu_ps(from.as_ptr().add(8 * i)))
    }
    #[inline(always)]
    fn store(self, x: Self::F32, to: &mut [f32; 16]) {
        both!(|i| _mm256_storeu_ps(to.as_mut_ptr().add(8 * i), x[i]));
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> Self::F32 {
        both!(|i| _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(8 * i).cast())))
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; 16]) -> Self::F32 {
        both!(|i| {
            let eight = _mm_loadl_epi64(from.as_ptr().add(8 * i).cast());
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight))
        })
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(|i| _mm256_add_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(|i| _mm256_mul_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        both!(|i| _mm256_fmadd_ps(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(|i| _mm256_max_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        both!(|i| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x[i]))
    }
    #[inline(always)]
    fn exp(self, x: Self::F32) -> Self::F32 {
        let mut lanes = [0.0; 16];
        self.store(x, &mut lanes);
        lanes.iter_mut().for_each(|x| *x = super::math::exp(*x));
        self.load(&lanes)
    }
    #[inline(always)]
    fn highest(self, x: Self::F32) -> f32 {
        // SAFETY: as in `both`.
        unsafe {
            let eight = _mm256_max_ps(x[0], x[1]);
            let high = _mm256_extractf128_ps::<1>(eight);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), high);
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        // SAFETY: as in `both`.
        unsafe {
            let eight = _mm256_add_ps(x[0], x[1]);
            let high = _mm256_extractf128_ps::<1>(eight);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn transpose(self, x: [Self::F32; 16]) -> [Self::F32; 16] {
        let mut out = [self.splat(0.0); 16];
        for (from, to) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            // A block of eight by eight: rows 8·from.., columns 8·to..
            let block = transpose8(self, array!(8, x[0][0], |i| x[8 * from + i][to]));
            for (i, row) in block.into_iter().enumerate() {
                out[8 * to + i][from] = row;
            }
        }
        out
    }

    #[inline(always)]
    fn store_i8(self, x: Self::F32, to: &mut [i8; 16]) {
        // SAFETY: as in `both`.
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm_packs_epi16(low, high));
        }
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> Self::Bytes {
        both!(|i| _mm256_loadu_si256(from.as_ptr().add(32 * i).cast()))
    }
    #[inline(always)]
    fn nibbles(self, x: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        let low = both!(|i| _mm256_and_si256(x[i], _mm256_set1_epi8(15)));
        let high = both!(|i| _mm256_and_si256(_mm256_srli_epi16::<4>(x[i]), _mm256_set1_epi8(15)));
        (low, high)
    }
    #[inline(always)]
    fn nibble_zero(self) -> Self::NibbleSum {
        both!(|_i| _mm256_setzero_si256())
    }
    /// Two products of 15 · 127 make 3,810; eight of these fit into 16 bits.
    #[inline(always)]
    fn nibble_dot(self, sum: Self::NibbleSum, w: Self::Bytes, x: [i8; 4]) -> Self::NibbleSum {
        let x = bytemuck::cast(x);
        both!(|i| _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(x))))
    }
    #[inline(always)]
    fn nibble_total(self, sum: Self::NibbleSum) -> Self::F32 {
        both!(|i| _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[i], _mm256_set1_epi16(1))))
    }
    #[inline(always)]
    fn byte_start(self, _shifted: i32) -> Self::ByteSum {
        both!(|_i| _mm256_setzero_si256())
    }
    /// The instruction wants one unsigned factor: |w|, and w's sign goes to x. −128 becomes 128,
    /// and two products of 128 · 127 fit into 16 bits.
    #[inline(always)]
    fn byte_dot(self, sum: Self::ByteSum, w: Self::Bytes, x: [i8; 4]) -> Self::ByteSum {
        let x = bytemuck::cast(x);
        both!(|i| {
            let signed = _mm256_sign_epi8(_mm256_set1_epi32(x), w[i]);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), signed);
            _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn byte_total(self, sum: Self::ByteSum) -> Self::F32 {
        both!(|i| _mm256_cvtepi32_ps(sum[i]))
    }

    #[inline(always)]
    fn widen(self, pairs: Self::Bytes) -> (Self::F32, Self::F32) {
        let even = both!(|i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[i])));
        let odd = both!(|i| {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(pairs[i], high))
        });
        (even, odd)
    }

    type Unit = NoUnit;

    #[inline(always)]
    fn unit(self) -> Option<NoUnit> {
        None
    }
    #[inline(always)]
    fn convert(self, from: &[i32; 16]) -> Self::F32 {
        both!(|i| _mm256_cvtepi32_ps(_mm256_loadu_si256(from.as_ptr().add(8 * i).cast())))
    }
    #[inline(always)]
    fn store_bytes(self, x: Self::Bytes, to: &mut [u8; 64]) {
        both!(|i| _mm256_storeu_si256(to.as_mut_ptr().add(32 * i).cast(), x[i]));
    }
}

#[inline(always)]
fn transpose8(_proof: Avx2, x: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the proof; no memory is touched.
    unsafe {
        let pairs = array!(8, x[0], |i| {
            let (a, b) = (x[i / 2 * 2], x[i / 2 * 2 + 1]);
            if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
        });
        let fours = array!(8, x[0], |i| {
            let (a, b) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
            if i % 2 == 0 {
                _mm256_shuffle_ps::<0x44>(a, b)
            } else {
                _mm256_shuffle_ps::<0xee>(a, b)
            }
        });
        array!(8, x[0], |i| {
            let (a, b) = (fours[i % 4], fours[i % 4 + 4]);
            if i < 4 {
                _mm256_permute2f128_ps::<0x20>(a, b)
            } else {
                _mm256_permute2f128_ps::<0x31>(a, b)
            }
        })
    }
}
