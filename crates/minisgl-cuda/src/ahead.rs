//! Weights on their way into the L2 cache while the memory would rest.
//!
//! A norm, an activation and the attention of few rows take microseconds in which little is read. What
//! the next product reads does not depend on them, so they send for it: `Next` in `kernels/common.cuh`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use minisgl_tensor::Tensor;

/// Blocks that send for weights, where a kernel has some for that alone.
const BLOCKS: usize = 64;
/// With more rows, products take so long that reading weights is no part of it.
const ROWS_MAX: usize = 256;

/// As in `kernels/common.cuh`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Next {
    pub(crate) weights: u64,
    pub(crate) bytes: usize,
    pub(crate) blocks: usize,
}

/// What is sent for, and how much of it.
#[derive(Default)]
pub(crate) struct Ahead {
    bytes_max: AtomicUsize,
    /// The product behind the coming gate.
    after_gate: Mutex<Option<Tensor>>,
}

impl Ahead {
    /// At most so many bytes of a matrix; 0 for none.
    pub(crate) fn set_bytes_max(&self, bytes: usize) {
        self.bytes_max.store(bytes / 16 * 16, Ordering::Relaxed);
    }

    /// Blocks in front of a kernel of so many rows, for a matrix that is multiplied behind it.
    pub(crate) fn weights(&self, weight: Option<&Tensor>, rows: usize) -> Next {
        let bytes_max = self.bytes_max.load(Ordering::Relaxed);
        match weight {
            Some(weight) if bytes_max > 0 && rows <= ROWS_MAX => {
                let bytes = weight.bytes().min(bytes_max);
                Next { weights: weight.address(), bytes, blocks: BLOCKS }
            }
            _ => Next::default(),
        }
    }

    pub(crate) fn set_after_gate(&self, weight: Option<Tensor>) {
        *self.after_gate.lock().unwrap_or_else(PoisonError::into_inner) = weight;
    }

    pub(crate) fn take_after_gate(&self) -> Option<Tensor> {
        self.after_gate.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
