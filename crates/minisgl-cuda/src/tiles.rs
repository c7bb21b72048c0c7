//! Descriptions of matrices for Hopper's bulk copy engine.

use std::ffi::c_void;

use cudarc::driver::sys;
use minisgl_tensor::Result;

use crate::device::driver;

/// As `TensorMap` in `kernels/hopper.cuh`.
pub(crate) type TensorMap = sys::CUtensorMap;

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
        let mut map = TensorMap { opaque: [0; 16] };
        let sizes = [self.cols as u64, self.rows as u64];
        let stride = self.cols as u64 * 2;
        let (extent, steps) = ([64, self.box_rows as u32], [1, 1]);
        // SAFETY: the arrays outlive the call; the driver checks what they say and only writes `map`.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                self.address as *mut c_void,
                sizes.as_ptr(),
                &raw const stride,
                extent.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|e| driver("cuTensorMapEncodeTiled", e))?;
        Ok(map)
    }
}
