//! What multiplies matrices, not vectors, where a machine has such a thing.

use half::f16;

use crate::kernels::{Half, PANEL, Quantized};
use crate::simd::{Aligned, LANES, Line};

/// What a unit is readied for.
#[derive(Clone, Copy, Debug)]
pub enum Products {
    /// Of 8-bit codes.
    Bytes,
    /// Of bf16. So many rows in all: of a single tile, no more of it are read than these.
    Pairs { rows: usize },
}

/// Products of `Half` rows, sixteen at a time.
pub type Sums = Aligned<[[[f32; LANES]; PANEL]; 3]>;

/// Multiplies sixteen rows of activations at once. Its products of integers are exact, so they are
/// the same bits as those of the vectors.
pub trait MatrixUnit: Copy {
    /// Readies the unit for this thread. To be called before the others.
    fn begin(self, products: Products);
    /// `out[row][lane] = Σ x[row].codes[at + k] · w[k / 4][4 · lane + k % 4]`, codes signed, along all of
    /// `w`: 32 columns from `at` = 0, or 16.
    fn byte_products(
        self,
        x: &[Quantized; PANEL],
        at: usize,
        w: &[Line],
        out: &mut Aligned<[[i32; LANES]; PANEL]>,
    );
    /// Sixteen rows of weights, `w[k / 2][lane][k % 2]`, with up to three times sixteen rows of bf16,
    /// `x[tile][k / 32][row][k % 32]`: `out[tile][row][lane] = Σ x · w`. To the weights is added what
    /// `low` says, which is empty or as long as `w`.
    fn pair_products(self, x: &[Half], w: &[Line], low: &[Line], out: &mut Sums);
    /// Sixteen pairs of f16 as two such pairs of bf16 each, which sum up to them.
    fn split_pairs(self, pairs: &Line, high: &mut Line, low: &mut Line);
    /// The same, of the pairs that `first` and `second` make.
    fn split_rows(
        self,
        first: &[f16; LANES],
        second: &[f16; LANES],
        high: &mut Line,
        low: &mut Line,
    );
}

/// There is none.
#[derive(Clone, Copy, Debug)]
pub enum NoUnit {}

impl MatrixUnit for NoUnit {
    fn begin(self, _: Products) {
        match self {}
    }
    fn byte_products(
        self,
        _: &[Quantized; PANEL],
        _: usize,
        _: &[Line],
        _: &mut Aligned<[[i32; LANES]; PANEL]>,
    ) {
        match self {}
    }
    fn pair_products(self, _: &[Half], _: &[Line], _: &[Line], _: &mut Sums) {
        match self {}
    }
    fn split_pairs(self, _: &Line, _: &mut Line, _: &mut Line) {
        match self {}
    }
    fn split_rows(self, _: &[f16; LANES], _: &[f16; LANES], _: &mut Line, _: &mut Line) {
        match self {}
    }
}
