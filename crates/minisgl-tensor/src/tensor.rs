//! A typed, shaped window into device memory.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::DType;

/// A piece of device memory. Its owner frees it when the last tensor that points into it is gone.
pub trait Memory: Send + Sync {
    /// The first byte's address, in the device's own address space.
    fn address(&self) -> u64;
    /// How many bytes.
    fn bytes(&self) -> usize;
}

/// A contiguous, row-major window into device memory. Cloning it, or taking a part of it, shares
/// the memory: a tensor is a place, not a value.
///
/// Operations take their output as `&Tensor`, too, as every array library for devices does: the
/// memory behind it changes, the tensor does not. What an operation reads and what it writes must
/// not overlap, unless its documentation says so.
#[derive(Clone)]
pub struct Tensor {
    memory: Arc<dyn Memory>,
    offset: usize,
    dtype: DType,
    shape: Vec<usize>,
}

impl Tensor {
    /// A tensor over the front of `memory`.
    ///
    /// # Panics
    /// If the memory is too small or the elements fill no whole number of blocks.
    pub fn new(memory: Arc<dyn Memory>, dtype: DType, shape: &[usize]) -> Self {
        let tensor = Self { memory, offset: 0, dtype, shape: shape.to_vec() };
        assert!(tensor.bytes() <= tensor.memory.bytes(), "{tensor:?} does not fit its memory");
        tensor
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, slowest dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The size of dimension `index`.
    pub fn dim(&self, index: usize) -> usize {
        self.shape[index]
    }

    /// All elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The size of the last dimension.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes from the first element to behind the last.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes_of(self.elements()).expect("a tensor has whole blocks")
    }

    /// Address of the first element, in the device's address space.
    pub fn address(&self) -> u64 {
        self.memory.address() + self.offset as u64
    }

    /// The part whose first index lies in `range`. Shares the memory.
    ///
    /// # Panics
    /// If the range leaves the first dimension.
    pub fn rows(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.shape[0],
            "rows {range:?} of {self:?}"
        );
        let row: usize = self.shape[1..].iter().product();
        let row_bytes = self.dtype.bytes_of(row).expect("a row has whole blocks");
        let mut part = self.clone();
        part.offset += range.start * row_bytes;
        part.shape[0] = range.len();
        part
    }

    /// The first `count` rows. Shares the memory.
    pub fn first(&self, count: usize) -> Self {
        self.rows(0..count)
    }

    /// The same memory, read with another shape of no more elements.
    ///
    /// # Panics
    /// If the new shape has more elements.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        let mut other = self.clone();
        other.shape = shape.to_vec();
        assert!(other.elements() <= self.elements(), "{self:?} as {shape:?}");
        other
    }

    /// The same memory, read as another type of no more bytes.
    ///
    /// # Panics
    /// If the new view has more bytes.
    pub fn view_as(&self, dtype: DType, shape: &[usize]) -> Self {
        let other = Self {
            memory: Arc::clone(&self.memory),
            offset: self.offset,
            dtype,
            shape: shape.to_vec(),
        };
        assert!(other.bytes() <= self.bytes(), "{self:?} as {other:?}");
        other
    }

    /// Whether both have a byte in common.
    pub fn overlaps(&self, other: &Tensor) -> bool {
        let (a, b) = (self.address(), other.address());
        a < b + other.bytes() as u64 && b < a + self.bytes() as u64
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype, self.shape)
    }
}
