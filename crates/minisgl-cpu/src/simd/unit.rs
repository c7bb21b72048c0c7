//! What multiplies matrices, not vectors, where a machine has such a thing.

use crate::kernels::{Half, PANEL};
use crate::simd::{Aligned, LANES, Line};

/// Multiplies sixteen rows of activations at once. Its products of integers are exact, so they are
/// the same bits as those of the vectors.
pub trait MatrixUnit: Copy {
    /// Readies the unit for this thread. To be called before the others.
    fn begin(self);
    /// `out[row][lane] = Σ x[row][at + k] · w[k / 4][4 · lane + k % 4]`, codes signed, along all of
    /// `w`: 32 columns from `at` = 0, or 16.
    fn byte_products(
        self,
        x: &[[i8; 32]; PANEL],
        at: usize,
        w: &[Line],
        out: &mut Aligned<[[i32; LANES]; PANEL]>,
    );
    /// `out[row][lane] = Σ x[k / 32][row][k % 32] · w[k / 2][lane][k % 2]` along all of `x`, which may
    /// be longer than `w`: then `w` begins again.
    fn pair_products(self, x: &[Half], w: &[Line], out: &mut [[f32; LANES]; PANEL]);
}

/// There is none.
#[derive(Clone, Copy, Debug)]
pub enum NoUnit {}

impl MatrixUnit for NoUnit {
    fn begin(self) {
        match self {}
    }
    fn byte_products(
        self,
        _: &[[i8; 32]; PANEL],
        _: usize,
        _: &[Line],
        _: &mut Aligned<[[i32; LANES]; PANEL]>,
    ) {
        match self {}
    }
    fn pair_products(self, _: &[Half], _: &[Line], _: &mut [[f32; LANES]; PANEL]) {
        match self {}
    }
}
