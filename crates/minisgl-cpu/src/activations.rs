//! Activations on their way into a product: normed, and rounded to 8 bits once for all the
//! matrices that read them.

use half::bf16;
use minisgl_tensor::Norm;

use crate::backend::Machine;
use crate::kernels::{Half, PANEL, PARTS, Quantized, Rows};
use crate::matrix::{Needs, Vector};
use crate::memory::Shared;
use crate::simd::{Kernel, LANES, Simd, array};

/// Where prepared rows lie until the next operation; grows to the largest and stays.
#[derive(Default)]
pub struct Prepared {
    floats: Vec<f32>,
    blocks: Vec<Quantized>,
    halves: Vec<Half>,
}

/// What is to be prepared: rows of `x [.., cols]`, all or those of `order`, where a number beyond
/// the last row leaves a place empty.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub x: &'a [f32],
    pub cols: usize,
    pub norm: Option<&'a Norm>,
    pub order: Option<&'a [u32]>,
}

impl Prepared {
    /// The rows of `input` as `needs` says.
    pub fn prepare<'a>(&'a mut self, on: &Machine, input: Input<'a>, needs: Needs) -> Rows<'a> {
        let Input { x, cols, norm, order } = input;
        let count = order.map_or(x.len() / cols, <[u32]>::len);
        let panels = count.div_ceil(PANEL);
        let height = if count == 1 { 1 } else { PANEL };
        let blocks = if needs.blocks { cols / 32 * height } else { 0 };
        let halves = if needs.halves { PARTS * cols.div_ceil(32) } else { 0 };
        let copied = norm.is_some() || order.is_some();
        if copied && self.floats.len() < count * cols {
            self.floats.resize(count * cols, 0.0);
        }
        if self.blocks.len() < panels * blocks {
            self.blocks.resize(panels * blocks, bytemuck::Zeroable::zeroed());
        }
        if self.halves.len() < panels * halves {
            self.halves.resize(panels * halves, bytemuck::Zeroable::zeroed());
        }
        let floats = Shared::of_slice(&mut self.floats);
        let all_blocks = Shared::of_slice(&mut self.blocks);
        let all_halves = Shared::of_slice(&mut self.halves);
        if copied || needs.blocks || needs.halves {
            on.pool.run(panels, &|_, panel| {
                let rows = panel * PANEL..count.min((panel + 1) * PANEL);
                // SAFETY: each panel is its own item.
                let (blocks, halves) = unsafe {
                    (
                        all_blocks.part(panel * blocks, blocks),
                        all_halves.part(panel * halves, halves),
                    )
                };
                for (lane, place) in rows.enumerate() {
                    let row = order.map_or(place, |order| order[place] as usize);
                    let Some(x) = x.get(row * cols..).and_then(|x| x.get(..cols)) else { continue };
                    // SAFETY: as above.
                    let copy = copied.then(|| unsafe { floats.part(place * cols, cols) });
                    let place = (lane, height);
                    on.isa.run(PrepareRow { x, norm, copy, place, blocks, halves });
                }
            });
        }
        let floats = if copied { &self.floats[..count * cols] } else { x };
        let (blocks, halves) = (panels * blocks, panels * halves);
        let (blocks, halves) = (&self.blocks[..blocks], &self.halves[..halves]);
        Rows { cols, floats, height, blocks, halves }
    }
}

struct PrepareRow<'a> {
    x: &'a [f32],
    norm: Option<&'a Norm>,
    copy: Option<&'a mut [f32]>,
    /// Which of its panel's rows it is, and how many that has.
    place: (usize, usize),
    blocks: &'a mut [Quantized],
    halves: &'a mut [Half],
}

impl Kernel for PrepareRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut x = self.x;
        if let Some(copy) = self.copy {
            copy.copy_from_slice(x);
            if let Some(norm) = self.norm {
                NormRow { x: copy, norm }.run(s);
            }
            x = copy;
        }
        let (lane, height) = self.place;
        for (x, column) in x.as_chunks().0.iter().zip(self.blocks.chunks_exact_mut(height)) {
            quantize(s, x, &mut column[lane]);
        }
        if !self.halves.is_empty() {
            split(x, lane, self.halves);
        }
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

#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32; 32], block: &mut Quantized) {
    let halves = x.as_chunks::<LANES>().0;
    let x = array!(2, s.splat(0.0), |i| s.load(&halves[i]));
    let sizes = array!(2, x[0], |i| s.max(x[i], s.mul(x[i], s.splat(-1.0))));
    let most = s.highest(s.max(sizes[0], sizes[1]));
    let factor = if most > 1e-30 { 127.0 / most } else { 0.0 };
    let codes = array!(2, x[0], |i| s.round(s.mul(x[i], s.splat(factor))));
    for (codes, out) in codes.into_iter().zip(block.codes.as_chunks_mut().0) {
        s.store_i8(codes, out);
    }
    // Sums of so few and small integers are exact.
    let sums = array!(2, 0.0, |i| s.sum(codes[i]));
    let (d, total) = (most / 127.0, sums[0] + sums[1]);
    (block.d, block.sum) = (d, d * total);
    block.shifted = [sums[0], sums[1], total].map(|sum| -128 * sum as i32);
}

/// Puts a row of a panel as three bf16 that sum up to its f32: 8 bits of each, from the highest on.
/// Zeros behind the end of `x`.
#[inline(always)]
pub fn split(x: &[f32], lane: usize, panel: &mut [Half]) {
    let across = panel.len() / PARTS;
    for (column, x) in x.chunks(32).enumerate() {
        let mut left = [0f32; 32];
        left[..x.len()].copy_from_slice(x);
        for row in PARTS * lane..PARTS * (lane + 1) {
            let part = &mut panel[row / PANEL * across + column].0[row % PANEL];
            for (left, part) in left.iter_mut().zip(part) {
                let bits = left.to_bits() & 0xffff_0000;
                *part = bf16::from_bits((bits >> 16) as u16);
                *left -= f32::from_bits(bits);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_parts_lose_nothing() {
        let cols = 37;
        let row = |lane: usize| -> Vec<f32> {
            let number = |i: usize| (lane * cols + i).wrapping_mul(0x9e37_79b9) as u32;
            // Any sign and mantissa, from 2⁻⁴¹ to 2.
            let float = |bits: u32| f32::from_bits(bits & 0x9fff_ffff | 0x2b00_0000);
            (0..cols).map(|i| float(number(i))).collect()
        };
        let mut panel = [Half([[bf16::NAN; 32]; PANEL]); 2 * PARTS];
        (0..PANEL).for_each(|lane| split(&row(lane), lane, &mut panel));
        let part = |row: usize, i: usize| panel[row / PANEL * 2 + i / 32].0[row % PANEL][i % 32];
        for lane in 0..PANEL {
            for (i, x) in row(lane).into_iter().chain([0.0; 64 - 37]).enumerate() {
                let parts = [0, 1, 2].map(|p| f64::from(part(PARTS * lane + p, i).to_f32()));
                assert_eq!(parts.iter().sum::<f64>(), f64::from(x), "{lane}, {i}: {parts:?}");
            }
        }
    }
}
