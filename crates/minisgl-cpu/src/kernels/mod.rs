//! Products of a tile of weights with panels of activations.
//!
//! An output is a chain of additions along the columns that is the same whatever rows and tiles
//! are computed beside it.

mod blocks;
mod plain;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use minisgl_tensor::DType;

use crate::simd::{Aligned, Isa, LANES, Line, Sums};
use blocks::{
    AHEAD, BlockProduct, Bytes, Min, Nibbles, Offset8, Scale, SuperHalves, SuperMin, UNPACKED,
    UnitProducts,
};
pub use plain::{Element, pairs, plain};
use plain::{PairProduct, PlainProduct};

/// Rows of activations in a panel.
pub const PANEL: usize = 16;

/// 32 columns of a row as 8-bit integers, `x[i] ≈ d · codes[i]`, and all that goes with them: one
/// line of the cache.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Quantized {
    pub codes: [i8; 32],
    pub d: f32,
    /// `d · Σ codes`, what a weight's minimum is multiplied with.
    pub sum: f32,
    /// −128 · Σ codes, of the first 16 columns, the others, and all: see `Simd::byte_start`.
    pub shifted: [i32; 3],
    rest: [i32; 3],
}

/// Parts in bf16 that an f32 is the sum of.
pub const PARTS: usize = 3;

/// 32 columns of sixteen rows of bf16. A row of activations takes three, one behind the other, so
/// that a panel takes `PARTS` of these, and its first five rows are in the first of them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Half(pub [[bf16; 32]; PANEL]);

/// Rows of activations in the forms that products read; an unused one is empty.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub cols: usize,
    /// `[rows, cols]`.
    pub floats: &'a [f32],
    /// Rows of a panel of `blocks`: a row that is alone has a panel of its size.
    pub height: usize,
    /// `[panels, cols / 32, height]`.
    pub blocks: &'a [Quantized],
    /// `[panels, PARTS, ⌈cols / 32⌉]`. Zeros behind the last column.
    pub halves: &'a [Half],
}

impl Rows<'_> {
    /// All from row `first` on, which begins a panel.
    pub fn from(self, first: usize) -> Self {
        let (panel, cols) = (first / PANEL, self.cols);
        fn rest<T>(all: &[T], from: usize) -> &[T] {
            all.get(from..).unwrap_or(&[])
        }
        Self {
            cols,
            height: self.height,
            floats: rest(self.floats, first * cols),
            blocks: rest(self.blocks, panel * (cols / 32) * self.height),
            halves: rest(self.halves, panel * PARTS * cols.div_ceil(32)),
        }
    }
}

/// What a thread keeps for a matrix unit.
pub struct UnitRoom {
    /// Codes in a byte each, on their way to the unit.
    codes: [[Line; 8]; UNPACKED],
    products: UnitProducts,
    sums: Sums,
}

impl UnitRoom {
    /// Empty.
    pub fn new() -> Box<Self> {
        let products = [[Aligned([[0; LANES]; PANEL]); 2]; 2 * AHEAD];
        let (codes, sums) = ([[Line([0; 64]); 8]; UNPACKED], Aligned([[[0.0; LANES]; PANEL]; 3]));
        Box::new(Self { codes, products, sums })
    }
}

/// `out[i] = tile · x[i]`.
pub struct TileProduct<'a> {
    pub dtype: DType,
    pub tile: &'a [u8],
    pub x: Rows<'a>,
    pub room: &'a mut UnitRoom,
    pub out: &'a mut [[f32; LANES]],
}

impl TileProduct<'_> {
    /// Computes it.
    pub fn run_on(self, isa: Isa) {
        match self.dtype {
            DType::F32 => isa.run(PlainProduct::<f32>::new(self)),
            DType::F16 => isa.run(PlainProduct::<f16>::new(self)),
            DType::BF16 => isa.run(PairProduct(self)),
            DType::Q4_0 => isa.run(BlockProduct::<Nibbles, Offset8>::new(self)),
            DType::Q4_1 => isa.run(BlockProduct::<Nibbles, Min>::new(self)),
            DType::Q5_0 | DType::Q8_0 => isa.run(BlockProduct::<Bytes, Scale>::new(self)),
            DType::Q5_1 => isa.run(BlockProduct::<Bytes, Min>::new(self)),
            DType::Q4K => isa.run(BlockProduct::<Nibbles, SuperMin>::new(self)),
            DType::Q5K => isa.run(BlockProduct::<Bytes, SuperMin>::new(self)),
            DType::Q6K => isa.run(BlockProduct::<Bytes, SuperHalves>::new(self)),
            dtype => unreachable!("{dtype} has no tiles"),
        }
    }
}

/// As `by_fours`, and first for runs of eight where `$S` has registers for them.
macro_rules! by_eights {
    ($S:ident, $count:expr, |$from:ident, $R:ident| $run:expr) => {{
        let count = $count;
        let mut $from = 0;
        while $S::ROWS >= 8 && count - $from >= 8 {
            const $R: usize = 8;
            $run;
            $from += 8;
        }
        $crate::kernels::by_fours!($from..count, |$from, $R| $run);
    }};
}
pub(crate) use by_eights;

/// Calls `$run::<R>(from)` for runs of four rows, then for what is left.
macro_rules! by_fours {
    ($rows:expr, |$from:ident, $R:ident| $run:expr) => {{
        let std::ops::Range { start: mut $from, end: count } = $rows;
        while count - $from >= 4 {
            const $R: usize = 4;
            $run;
            $from += 4;
        }
        match count - $from {
            3 => {
                const $R: usize = 3;
                $run;
            }
            2 => {
                const $R: usize = 2;
                $run;
            }
            1 => {
                const $R: usize = 1;
                $run;
            }
            _ => {}
        }
    }};
}
pub(crate) use by_fours;
