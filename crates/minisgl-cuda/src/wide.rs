//! Matrix products of few rows with long rows of weights, on Hopper and newer: `kernels/wide.cu`.

use minisgl_tensor::{Activation, DType, Linear, Result, Tensor};

use crate::backend::{CudaBackend, Products};
use crate::device::Launch;
use crate::kernels::{Key, Module};
use crate::linear::{ProductArgs, STREAM_ROW_MAX};
use crate::weights::tensor;

/// With more rows cuBLASLt is faster: at 16 of Qwen3-14B's on an H200 a step took 8.2 ms by it and 11.8 by
/// this kernel.
const ROWS_MAX: usize = 8;
/// As in the kernel: warps that multiply, elements of k in a unit, bytes of a stage (8 rows of w), and
/// tiles whose sums the first block of a cluster has room for.
const WARPS: usize = 8;
const UNIT: usize = 64;
const STAGE_BYTES: usize = 8 * UNIT * 2;
const SLOTS: usize = 4;
/// Stages of a warp's ring, as the kernel is compiled for: with fewer the memory has pauses.
const STAGES: [usize; 4] = [16, 12, 10, 8];
/// As few blocks divide k as leave room for so many stages, if any do: larger clusters leave
/// multiprocessors idle.
const STAGES_WANTED: usize = 10;
const BLOCKS: [usize; 4] = [1, 2, 4, 8];
/// Shared memory of a block, which has a multiprocessor for itself, without what the system takes and the
/// kernel's barriers. Two blocks on one, so that the next product's weights come while this one ends,
/// were slower (h200-operations.md).
const SHARED_BYTES: usize = 226 << 10;

/// How a product is divided.
#[derive(Debug, PartialEq)]
struct Division {
    /// Blocks a cluster, which divide k.
    blocks: usize,
    clusters: usize,
    stages: usize,
    /// Bytes.
    shared: usize,
}

impl Division {
    /// `None` where x fits no cluster.
    fn new(rows: usize, n: usize, k: usize, gated: bool, multiprocessors: usize) -> Option<Self> {
        let (blocks, stages) = Self::ring(rows, k, gated)?;
        // Clusters of more than two do not fill an H200: its multiprocessors come in lots of 16 or 18.
        let most = if blocks > 2 { multiprocessors * 10 / 11 } else { multiprocessors } / blocks;
        let (most, tiles) = (most.max(1), n.div_ceil(8));
        // All clusters walk as many tiles, so that all end at about the same time.
        let clusters = tiles.div_ceil(tiles.div_ceil(most));
        let ring = WARPS * stages * STAGE_BYTES;
        let shared = Self::bytes_without_ring(rows, k, gated, blocks) + ring;
        Some(Self { blocks, clusters, stages, shared })
    }

    /// Blocks that divide k, and stages of a warp's ring; `None` where there is no room for any.
    fn ring(rows: usize, k: usize, gated: bool) -> Option<(usize, usize)> {
        let stages = |&blocks: &usize| {
            let without = Self::bytes_without_ring(rows, k, gated, blocks);
            let left = SHARED_BYTES.checked_sub(without)?;
            let fits = |stages: &&usize| WARPS * **stages * STAGE_BYTES <= left;
            STAGES.iter().find(fits).map(|stages| (blocks, *stages))
        };
        let mut all = BLOCKS.iter().filter_map(stages);
        all.clone().find(|(_, stages)| *stages >= STAGES_WANTED).or_else(|| all.next())
    }

    /// As `Shared` in the kernel.
    fn bytes_without_ring(rows: usize, k: usize, gated: bool, blocks: usize) -> usize {
        let x = rows * (k.div_ceil(UNIT).div_ceil(blocks) * UNIT * 2 + 64);
        let sums = ROWS_MAX * 8 * if gated { 2 } else { 1 };
        let others = (blocks - 1) * (SLOTS * sums + ROWS_MAX);
        x + (WARPS * (sums + ROWS_MAX) + others) * size_of::<f32>()
    }
}

impl CudaBackend {
    pub(crate) fn prefers_wide(&self, a: &Linear<'_>) -> bool {
        let (weight, rows) = (tensor(a.weight), a.x.dim(0));
        !self.exact
            && self.device.capability.0 >= 9
            && self.device.shared_max as usize >= SHARED_BYTES
            && self.products() == Products::Own
            && rows <= ROWS_MAX
            && weight.row_len() > STREAM_ROW_MAX
            && weight.row_len().is_multiple_of(8)
            && Division::ring(rows, weight.row_len(), true).is_some()
    }

    /// As `Backend::linear` and `gated_linear`.
    pub(crate) fn wide(
        &self,
        a: &Linear<'_>,
        gated: Option<Activation>,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let multiprocessors = self.device.multiprocessors;
        let Some(d) = Division::new(rows, n, k, gated.is_some(), multiprocessors) else {
            unreachable!("asked for what `prefers_wide` refuses");
        };
        let args = ProductArgs::new(a, gated, out, d.blocks);
        let kind = (gated.is_some(), a.norm.is_some(), out.dtype() == DType::F32);
        let defines = variant(kind, d.stages);
        let function = self.kernels.get(Module::Wide, &defines, "wide")?;
        let shape = Launch {
            grid: [d.clusters * d.blocks, 1, 1],
            threads: 32 * (WARPS + 1),
            shared: d.shared,
            cluster: d.blocks,
        };
        // SAFETY: `ProductArgs` has the kernel's layout; shapes as `Backend::linear` states.
        unsafe { self.device.launch_struct(function, shape, &args) }
    }
}

/// Of a product that is gated or not, normed or not, into f32 or not.
fn variant((gated, norm, out_f32): (bool, bool, bool), stages: usize) -> Vec<(&'static str, i32)> {
    let [gated, norm, out_f32] = [gated, norm, out_f32].map(i32::from);
    vec![("GATED", gated), ("NORM", norm), ("OUT_F32", out_f32), ("STAGES", stages as i32)]
}

/// What a decoder's decode steps ask for, whose residual stream, attention and MLP are so wide.
pub(crate) fn wide_variants(
    hidden: usize,
    attended: usize,
    inner: usize,
) -> impl Iterator<Item = Key> {
    let products = [
        (hidden, (false, true, false)),
        (hidden, (true, true, false)),
        (hidden, (false, true, true)),
        (attended, (false, false, false)),
        (inner, (false, false, false)),
    ];
    products.into_iter().filter(|(k, _)| *k > STREAM_ROW_MAX).flat_map(|(k, kind)| {
        (1..=ROWS_MAX)
            .filter_map(move |rows| Division::ring(rows, k, kind.0))
            .map(move |(_, stages)| (Module::Wide, variant(kind, stages)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    #[test]
    fn all_tiles_and_all_memory_are_there() {
        for rows in 1..=ROWS_MAX {
            for (n, k, gated) in
                [(7168, 5120, false), (17408, 5120, true), (5120, 17408, false), (9, 4104, true)]
            {
                let d = Division::new(rows, n, k, gated, MULTIPROCESSORS).unwrap();
                let without_ring = Division::bytes_without_ring(rows, k, gated, d.blocks);
                assert_eq!(d.shared, without_ring + WARPS * d.stages * STAGE_BYTES);
                assert!(d.shared <= SHARED_BYTES, "{rows} × {n} × {k}: {d:?}");
                assert!(d.clusters * d.blocks <= MULTIPROCESSORS, "{rows} × {n} × {k}: {d:?}");
                let (tiles, rounds) = (n.div_ceil(8), n.div_ceil(8).div_ceil(d.clusters));
                // None walks a tile more than it must.
                assert_eq!(rounds, tiles.div_ceil(if d.blocks > 2 { 120 } else { 132 } / d.blocks));
            }
        }
        assert_eq!(Division::new(8, 8, 1 << 20, false, MULTIPROCESSORS), None);
    }
}
