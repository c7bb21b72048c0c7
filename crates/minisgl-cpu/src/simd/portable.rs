//! Plain Rust: the oracle of the other instruction sets, and what runs where there is none. The
//! compiler makes of it what the target has at least (SSE2, NEON).

use half::f16;

use super::Simd;
use super::unit::NoUnit;

/// Always there.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

/// Sixteen of something, by index.
#[inline(always)]
fn map<T>(f: impl FnMut(usize) -> T) -> [T; 16] {
    std::array::from_fn(f)
}

#[inline(always)]
fn dot4(sum: [i32; 16], w: impl Fn(usize) -> i32, x: [i8; 4]) -> [i32; 16] {
    map(|i| sum[i] + (0..4).map(|j| w(4 * i + j) * i32::from(x[j])).sum::<i32>())
}

impl Simd for Portable {
    const ROWS: usize = 4;
    type F32 = [f32; 16];
    type Bytes = [u8; 64];
    type NibbleSum = [i32; 16];
    type ByteSum = [i32; 16];

    #[inline(always)]
    fn will_read(self, _: &u8, _: usize) {}
    #[inline(always)]
    fn will_write(self, _: &f32) {}
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [f32; 16] {
        *from
    }
    #[inline(always)]
    fn store(self, x: [f32; 16], to: &mut [f32; 16]) {
        *to = x;
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> [f32; 16] {
        map(|i| from[i].to_f32())
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; 16]) -> [f32; 16] {
        map(|i| f32::from(from[i]))
    }
    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        // Two roundings: without the instruction, one would be a library call a lane.
        map(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, x: [f32; 16]) -> [f32; 16] {
        /// Adding it leaves no room for a fraction.
        const ROUND: f32 = 12_582_912.0;
        map(|i| (x[i] + ROUND) - ROUND)
    }
    #[inline(always)]
    fn exp(self, x: [f32; 16]) -> [f32; 16] {
        map(|i| super::math::exp(x[i]))
    }
    #[inline(always)]
    fn highest(self, x: [f32; 16]) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn sum(self, x: [f32; 16]) -> f32 {
        let mut x = x;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }
    #[inline(always)]
    fn transpose(self, x: [[f32; 16]; 16]) -> [[f32; 16]; 16] {
        map(|i| map(|j| x[j][i]))
    }

    #[inline(always)]
    fn store_i8(self, x: [f32; 16], to: &mut [i8; 16]) {
        *to = x.map(|x| x as i8);
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> [u8; 64] {
        *from
    }
    #[inline(always)]
    fn nibbles(self, x: [u8; 64]) -> ([u8; 64], [u8; 64]) {
        (x.map(|x| x & 15), x.map(|x| x >> 4))
    }
    #[inline(always)]
    fn nibble_zero(self) -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    fn nibble_dot(self, sum: [i32; 16], w: [u8; 64], x: [i8; 4]) -> [i32; 16] {
        dot4(sum, |i| i32::from(w[i]), x)
    }
    #[inline(always)]
    fn nibble_total(self, sum: [i32; 16]) -> [f32; 16] {
        sum.map(|x| x as f32)
    }
    #[inline(always)]
    fn byte_start(self, _shifted: i32) -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    fn byte_dot(self, sum: [i32; 16], w: [u8; 64], x: [i8; 4]) -> [i32; 16] {
        dot4(sum, |i| i32::from(w[i] as i8), x)
    }
    #[inline(always)]
    fn byte_total(self, sum: [i32; 16]) -> [f32; 16] {
        sum.map(|x| x as f32)
    }

    #[inline(always)]
    fn widen(self, pairs: [u8; 64]) -> ([f32; 16], [f32; 16]) {
        let half = |at: usize| f32::from_bits(u32::from_le_bytes([0, 0, pairs[at], pairs[at + 1]]));
        (map(|i| half(4 * i)), map(|i| half(4 * i + 2)))
    }

    type Unit = NoUnit;

    #[inline(always)]
    fn unit(self) -> Option<NoUnit> {
        None
    }
    #[inline(always)]
    fn convert(self, from: &[i32; 16]) -> [f32; 16] {
        from.map(|x| x as f32)
    }
    #[inline(always)]
    fn store_bytes(self, x: [u8; 64], to: &mut [u8; 64]) {
        *to = x;
    }
}
