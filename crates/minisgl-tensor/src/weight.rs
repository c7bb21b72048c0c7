//! Weights: as a file has them, and as a backend keeps them.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::DType;

/// A tensor in host memory as a checkpoint stores it: usually borrowed from a mapped file.
#[derive(Clone, Debug)]
pub struct HostTensor<'a> {
    /// As the checkpoint calls it, for messages.
    pub name: String,
    /// How elements are stored.
    pub dtype: DType,
    /// Sizes, slowest dimension first; quantized blocks run along the last.
    pub shape: Vec<usize>,
    /// Row-major. Not necessarily aligned to its elements.
    pub data: Cow<'a, [u8]>,
    /// For `F8E4M3`: what the stored values are multiplied with.
    pub scale: Option<BlockScale>,
}

/// FP8 scales: one f32 for each `block[0] × block[1]` tile, `[ceil(rows/b0), ceil(cols/b1)]`,
/// row-major.
#[derive(Clone, Debug)]
pub struct BlockScale {
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
    /// The scales.
    pub values: Vec<f32>,
}

impl BlockScale {
    /// The scales of rows `rows` of a matrix with `cols` columns. Where they begin inside a tile,
    /// tiles become as much smaller as it takes.
    pub fn rows(&self, cols: usize, rows: Range<usize>) -> Self {
        let [height, width] = self.block;
        let across = cols.div_ceil(width);
        let fine = common_divisor(height, rows.start);
        let tiles = rows.start / fine..rows.end.div_ceil(fine);
        let row = |tile: usize| &self.values[tile * fine / height * across..][..across];
        Self { block: [fine, width], values: tiles.flat_map(|tile| row(tile).to_vec()).collect() }
    }

    /// The scales of columns `part` of a matrix with `cols` columns; as `rows`.
    pub fn cols(&self, cols: usize, part: Range<usize>) -> Self {
        let [height, width] = self.block;
        let fine = common_divisor(width, part.start);
        let tiles = part.start / fine..part.end.div_ceil(fine);
        let pick = |row: &[f32]| -> Vec<f32> {
            tiles.clone().map(|tile| row[tile * fine / width]).collect()
        };
        let values = self.values.chunks_exact(cols.div_ceil(width)).flat_map(pick);
        Self { block: [height, fine], values: values.collect() }
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// How a weight is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As stored, or as near to it as the backend has kernels for (activations may be quantized
    /// or rounded on the way).
    Native,
    /// Dequantized to f32 and multiplied in f32, sums in f32 or better: the exact mode.
    Exact,
}

/// A matrix `[rows, cols]` (out features, in features), a stack of them, or a vector, prepared by
/// a backend for its own kernels. Only the backend that made it can look inside.
#[derive(Clone)]
pub struct Weight {
    shape: Vec<usize>,
    inner: Arc<dyn Any + Send + Sync>,
}

impl Weight {
    /// Wraps a backend's own representation.
    pub fn new<T: Any + Send + Sync>(shape: &[usize], inner: T) -> Self {
        Self { shape: shape.to_vec(), inner: Arc::new(inner) }
    }

    /// Logical sizes, slowest dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Out features: the size of the dimension before the last.
    pub fn rows(&self) -> usize {
        self.shape[self.shape.len() - 2]
    }

    /// In features: the size of the last dimension.
    pub fn cols(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// The backend's own representation.
    ///
    /// # Panics
    /// If another backend made this weight.
    pub fn get<T: Any>(&self) -> &T {
        self.inner.downcast_ref().expect("a weight is used by the backend that made it")
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weight({:?})", self.shape)
    }
}
