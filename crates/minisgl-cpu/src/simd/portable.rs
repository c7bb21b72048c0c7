//! Plain Rust, eight lanes: the oracle of the other instruction sets, and what runs where there is
//! none. The compiler makes of it what the target has at least (SSE2, NEON).

use super::Simd;

/// Always there.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

const N: usize = 8;

#[inline(always)]
fn map(mut f: impl FnMut(usize) -> f32) -> [f32; N] {
    std::array::from_fn(&mut f)
}

impl Simd for Portable {
    const LANES: usize = N;
    type F32 = [f32; N];
    type Floats = [f32; N];

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    fn load(self, from: &[f32; N]) -> [f32; N] {
        *from
    }
    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn fma(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        // Two roundings: without the instruction, one would be a library call a lane.
        map(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn sum(self, x: [f32; N]) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }
}
