//! Activations on their way into a product: normed, and rounded to 8 bits once for all the
//! matrices that read them.

use minisgl_tensor::Norm;

use crate::backend::Machine;
use crate::kernels::{Quantized, Rows};
use crate::matrix::{Needs, Vector};
use crate::memory::Shared;
use crate::simd::{Kernel, LANES, Simd};

/// Where prepared rows lie until the next operation; grows to the largest and stays.
#[derive(Default)]
pub struct Prepared {
    floats: Vec<f32>,
    blocks: Vec<Quantized>,
}

impl Prepared {
    /// The rows of `x [rows, cols]` as `needs` says.
    pub fn prepare<'a>(
        &'a mut self,
        on: &Machine,
        x: &'a [f32],
        cols: usize,
        norm: Option<&Norm>,
        needs: Needs,
    ) -> Rows<'a> {
        let rows = x.len() / cols;
        let across = if needs.blocks { cols / 32 } else { 0 };
        if self.floats.len() < x.len() && norm.is_some() {
            self.floats.resize(x.len(), 0.0);
        }
        if self.blocks.len() < rows * across {
            self.blocks.resize(rows * across, bytemuck::Zeroable::zeroed());
        }
        let floats = Shared::of_slice(&mut self.floats);
        let blocks = Shared::of_slice(&mut self.blocks);
        if norm.is_some() || needs.blocks {
            on.pool.run(rows, &|_, row| {
                let x = &x[row * cols..][..cols];
                // SAFETY: each row is its own item.
                let blocks = unsafe { blocks.part(row * across, across) };
                if let Some(norm) = norm {
                    // SAFETY: as above.
                    let floats = unsafe { floats.part(row * cols, cols) };
                    on.isa.run(PrepareRow { x, norm, floats, blocks });
                } else {
                    on.isa.run(Quantize { x, blocks });
                }
            });
        }
        let floats = if norm.is_some() { &self.floats[..x.len()] } else { x };
        Rows { cols, floats, blocks: &self.blocks[..rows * across] }
    }
}

struct PrepareRow<'a> {
    x: &'a [f32],
    norm: &'a Norm,
    floats: &'a mut [f32],
    blocks: &'a mut [Quantized],
}

impl Kernel for PrepareRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.floats.copy_from_slice(self.x);
        NormRow { x: self.floats, norm: self.norm }.run(s);
        Quantize { x: self.floats, blocks: self.blocks }.run(s);
    }
}

/// Norms one row in place.
pub struct NormRow<'a> {
    pub x: &'a mut [f32],
    pub norm: &'a Norm,
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, norm } = self;
        let (mut sums, (whole, rest)) = ([s.splat(0.0); 2], x.as_chunks::<LANES>());
        for (i, x) in whole.iter().enumerate() {
            sums[i % 2] = s.fma(s.load(x), s.load(x), sums[i % 2]);
        }
        let rest: f32 = rest.iter().map(|x| x * x).sum();
        let mean = (s.sum(s.add(sums[0], sums[1])) + rest) / x.len() as f32;
        let factor = (mean + norm.eps).sqrt().recip();
        let plus = if norm.plus_one { 1.0 } else { 0.0 };
        for (x, w) in x.iter_mut().zip(&norm.weight.get::<Vector>().0) {
            *x = *x * factor * (w + plus);
        }
    }
}

struct Quantize<'a> {
    x: &'a [f32],
    blocks: &'a mut [Quantized],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, block) in self.x.as_chunks::<32>().0.iter().zip(self.blocks) {
            // Lanes first, so that the maximum is one of vectors.
            let mut most = [0f32; 8];
            for x in x.as_chunks::<8>().0 {
                for (most, x) in most.iter_mut().zip(x) {
                    *most = most.max(x.abs());
                }
            }
            let most = most.into_iter().fold(0f32, f32::max);
            let factor = if most > 1e-30 { 127.0 / most } else { 0.0 };
            /// Adding it rounds to the nearest integer, which is then in the low bits.
            const ROUND: f32 = 12_582_912.0;
            let mut codes = [0i32; 32];
            for (code, x) in codes.iter_mut().zip(x) {
                *code = (x * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
            }
            let total: i32 = codes.iter().sum();
            for (out, code) in block.codes.iter_mut().zip(codes) {
                *out = code as i8;
            }
            block.d = most / 127.0;
            block.sum = block.d * total as f32;
        }
    }
}
