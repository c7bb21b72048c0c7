//! Descriptions of matrices for Hopper's bulk copy engine.

use std::ffi::c_void;

use cudarc::driver::sys;
use cudarc::driver::sys::CUtensorMapL2promotion as P;
use minisgl_tensor::Result;

use crate::device::driver;

/// As `TensorMap` in `kernels/hopper.cuh`.
pub(crate) type TensorMap = sys::CUtensorMap;

/// Bytes that L2 reads at least, where a box is asked for.
const L2_PROMOTION: P = P::CU_TENSOR_MAP_L2_PROMOTION_L2_256B;

/// A matrix of bf16 that is read in boxes of 64 columns.
pub(crate) struct Matrix {
    pub(crate) address: u64,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) box_rows: usize,
}

impl Matrix {
    /// Boxes land in shared memory as rows of 128 bytes in the 128-byte swizzle.
    pub(crate) fn map(&self) -> Result<TensorMap> {
        self.encode(&[self.cols, self.rows], &[self.cols * 2], &[64, self.box_rows], L2_PROMOTION)
    }

    /// Columns in parts of 64: a box is so many parts of its rows behind one another, each as `map`'s. L2 reads no more
    /// than it is asked for: decode attention of 64 rows took 4% longer where it read 256 bytes at once
    /// (h200-operations.md).
    pub(crate) fn map_parts(&self, box_parts: usize) -> Result<TensorMap> {
        let sizes = [64, self.rows, self.cols / 64];
        let extent = [64, self.box_rows, box_parts];
        self.encode(&sizes, &[self.cols * 2, 128], &extent, P::CU_TENSOR_MAP_L2_PROMOTION_NONE)
    }

    /// Of `halves` matrices of as many rows, one above the other: a box takes 8 rows of each in turn,
    /// and so on until it has `box_rows`.
    pub(crate) fn map_groups(&self, halves: usize) -> Result<TensorMap> {
        let (row, half) = (self.cols * 2, self.rows / halves);
        self.encode(
            &[self.cols, 8, halves, half / 8],
            &[row, half * row, 8 * row],
            &[64, 8, halves, self.box_rows / 8 / halves],
            L2_PROMOTION,
        )
    }

    /// Strides in bytes, of all dimensions but the first.
    fn encode(
        &self,
        sizes: &[usize],
        strides: &[usize],
        extent: &[usize],
        promotion: P,
    ) -> Result<TensorMap> {
        let mut map = TensorMap { opaque: [0; 16] };
        let wide = |values: &[usize]| values.iter().map(|x| *x as u64).collect::<Vec<_>>();
        let (sizes, strides) = (wide(sizes), wide(strides));
        let extent: Vec<u32> = extent.iter().map(|x| *x as u32).collect();
        // SAFETY: the arrays outlive the call; the driver checks what they say and only writes `map`.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                sizes.len() as u32,
                self.address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                extent.as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                promotion,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|e| driver("cuTensorMapEncodeTiled", e))?;
        Ok(map)
    }
}
