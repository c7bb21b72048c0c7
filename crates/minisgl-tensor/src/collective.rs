//! Communication between tensor-parallel ranks.

use crate::{Result, Tensor};

/// One rank's end of a group. All ranks call the same operations in the same order; an operation
/// is ordered with the rank's other device work. A rank that fails or hangs makes the others'
/// calls fail within the group's time limit.
pub trait Collective: Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn size(&self) -> usize;
    /// `tensor = Σ over ranks of tensor`, in place, the same bits on every rank.
    fn all_reduce(&self, tensor: &Tensor) -> Result<()>;
    /// `out[:, rank·n .. (rank+1)·n] = part of rank`, where `part` is `[rows, n]` and `out`
    /// `[rows, size·n]`.
    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<()>;
}

/// The group of one rank: sums and gathers are what they are.
#[derive(Debug, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _tensor: &Tensor) -> Result<()> {
        Ok(())
    }

    fn all_gather_cols(&self, _part: &Tensor, _out: &Tensor) -> Result<()> {
        unreachable!("a group of one has nothing to gather")
    }
}
