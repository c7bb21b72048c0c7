//! Matrix products of dozens of rows with large matrices of long rows, on Hopper: `kernels/resident.cu`.

use minisgl_tensor::{Activation, DType, Linear, Result, Tensor};

use crate::backend::{CudaBackend, Products, norm_args};
use crate::device::{Launch, address_of};
use crate::kernels::{Key, Module};
use crate::linear::{Output, STREAM_ROW_MAX};
use crate::narrow::ELEMENTS_MAX;
use crate::tiles::Matrix;
use crate::weights::tensor;
use crate::wide::decode_products;

/// Fewer are `wide.cu`'s.
const ROWS_MIN: usize = 9;
/// Rows of x that the kernel is compiled for.
const ROWS: [usize; 3] = [16, 32, 64];
/// As in the kernel: blocks of a cluster, which divide k; rows of w in a tile; elements of k in a step;
/// the most steps of a block; bytes of a stage of w; and the most of these.
const BLOCKS: usize = 8;
const TILE: usize = 64;
const STEP: usize = 64;
const STEPS_MAX: usize = 64;
const STAGE_BYTES: usize = TILE * STEP * 2;
const STAGES_MAX: usize = 24;
/// With fewer stages of w under way memory would rest.
const STAGES_MIN: usize = 8;
/// Threads that multiply, and tiles whose sums a block has room for, of 16 bytes a thread of each block.
const TEAM: usize = 128;
const SLOTS: usize = 2;
const SLOT_BYTES: usize = BLOCKS * TEAM * 16;
/// Of 8 rows, from each block.
const SQUARES_BYTES: usize = BLOCKS * 8 * size_of::<f32>();
/// Two for a step, a stage and a slot each.
const BARRIER_BYTES: usize = 2 * (STEPS_MAX + STAGES_MAX + SLOTS) * size_of::<u64>();
/// Shared memory of a block, which has a multiprocessor for itself.
const SHARED_BYTES: usize = 227 << 10;

/// As `Args` in the kernel.
#[repr(C)]
struct Args {
    output: Output,
    norm: u64,
    k: i32,
    stages: i32,
    eps: f32,
    shift: f32,
}

/// How a product is divided.
#[derive(Debug, PartialEq)]
struct Division {
    /// Rows of x that the kernel is compiled for.
    rows: usize,
    clusters: usize,
    stages: usize,
    /// Bytes.
    shared: usize,
}

impl Division {
    /// Of up to 64 rows of x; `None` where they leave no room for weights.
    fn new(x_rows: usize, w_rows: usize, k: usize, multiprocessors: usize) -> Option<Self> {
        let (rows, stages) = Self::ring(x_rows, k)?;
        // Clusters do not fill an H200: its multiprocessors come in lots of 16 or 18.
        let (most, tiles) = ((multiprocessors * 10 / 11 / BLOCKS).max(1), w_rows.div_ceil(TILE));
        // All clusters walk as many tiles, so that all end at about the same time.
        let clusters = tiles.div_ceil(tiles.div_ceil(most));
        let shared = Self::bytes_without_ring(rows, k) + stages * STAGE_BYTES;
        Some(Self { rows, clusters, stages, shared })
    }

    /// Rows of x that the kernel is compiled for, and stages of w.
    fn ring(x_rows: usize, k: usize) -> Option<(usize, usize)> {
        let rows = ROWS.into_iter().find(|rows| x_rows <= *rows)?;
        let left = SHARED_BYTES.checked_sub(Self::bytes_without_ring(rows, k))?;
        let stages = (left / STAGE_BYTES).min(STAGES_MAX);
        let steps = k.div_ceil(STEP);
        let fits = (BLOCKS..=BLOCKS * STEPS_MAX).contains(&steps) && stages >= STAGES_MIN;
        fits.then_some((rows, stages))
    }

    /// As `Shared` in the kernel; 1,024: x begins at a multiple of it.
    fn bytes_without_ring(rows: usize, k: usize) -> usize {
        let x = k.div_ceil(STEP).div_ceil(BLOCKS) * rows * STEP * 2;
        1024 + x + SLOTS * SLOT_BYTES + SQUARES_BYTES + BARRIER_BYTES
    }
}

impl CudaBackend {
    pub(crate) fn prefers_resident(&self, a: &Linear<'_>, out: &Tensor) -> bool {
        let (weight, rows) = (tensor(a.weight), a.x.dim(0));
        self.card().has_warpgroups()
            && self.device.shared_max as usize >= SHARED_BYTES
            && self.products() == Products::Own
            && rows >= ROWS_MIN
            && weight.row_len() > STREAM_ROW_MAX
            && weight.elements() > ELEMENTS_MAX
            && weight.row_len().is_multiple_of(8)
            && out.row_len().is_multiple_of(8)
            && Division::ring(rows, weight.row_len()).is_some()
    }

    /// As `Backend::linear` and `gated_linear`.
    pub(crate) fn resident(
        &self,
        a: &Linear<'_>,
        gated: Option<Activation>,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let halves = if gated.is_some() { 2 } else { 1 };
        let Some(d) = Division::new(rows, n * halves, k, self.device.multiprocessors) else {
            unreachable!("asked for what `prefers_resident` refuses");
        };
        let address = tensor(a.weight).address();
        let w = Matrix { address, rows: n * halves, cols: k, box_rows: TILE }.map_groups(halves)?;
        let x = Matrix { address: a.x.address(), rows, cols: k, box_rows: d.rows }.map()?;
        let (norm, eps, shift) = norm_args(a.norm);
        let args = Args {
            output: Output::new(a, gated, out),
            norm,
            k: k as i32,
            stages: d.stages as i32,
            eps,
            shift,
        };
        let kind = (gated.is_some(), a.norm.is_some(), out.dtype() == DType::F32);
        let function = self.kernels.get(Module::Resident, &variant(d.rows, kind), "resident")?;
        let shape = Launch {
            grid: [d.clusters * BLOCKS, 1, 1],
            threads: 2 * TEAM + 32,
            shared: d.shared,
            cluster: BLOCKS,
        };
        let mut words = [address_of(&w), address_of(&x), address_of(&args)];
        // SAFETY: the kernel's parameters in order; the maps cover `w` and `x`, `out` has a row of n
        // for each row of x.
        unsafe { self.device.launch_raw(function, shape, &mut words) }
    }
}

/// Of a product that is gated or not, normed or not, into f32 or not.
fn variant(rows: usize, (gated, norm, out_f32): (bool, bool, bool)) -> Vec<(&'static str, i32)> {
    let [gated, norm, out_f32] = [gated, norm, out_f32].map(i32::from);
    let slots = SLOTS as i32;
    vec![
        ("ROWS", rows as i32),
        ("GATED", gated),
        ("NORM", norm),
        ("OUT_F32", out_f32),
        ("SLOTS", slots),
    ]
}

/// What a decoder's decode steps ask for, whose residual stream, attention and MLP are so wide.
pub(crate) fn resident_variants(hidden: usize, attended: usize, inner: usize) -> Vec<Key> {
    let mut all = Vec::new();
    let products = decode_products(hidden, attended, inner);
    for (k, kind) in products.into_iter().filter(|(k, _)| *k > STREAM_ROW_MAX) {
        for rows in ROWS.into_iter().filter(|rows| Division::ring(*rows, k).is_some()) {
            let key = (Module::Resident, variant(rows, kind));
            if !all.contains(&key) {
                all.push(key);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    #[test]
    fn all_tiles_and_all_memory_are_there() {
        for (x_rows, compiled) in [(9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)] {
            for (w_rows, k) in [(7168, 5120), (34816, 5120), (5120, 5120), (1032, 8192)] {
                let d = Division::new(x_rows, w_rows, k, MULTIPROCESSORS).unwrap();
                assert_eq!(d.rows, compiled);
                assert!((STAGES_MIN..=STAGES_MAX).contains(&d.stages), "{d:?}");
                // What is left is no stage more.
                let fuller = d.shared + STAGE_BYTES > SHARED_BYTES || d.stages == STAGES_MAX;
                assert!(d.shared <= SHARED_BYTES && fuller, "{d:?}");
                assert!(d.clusters <= 15, "{d:?}");
                // None walks a tile more than it must.
                let tiles = w_rows.div_ceil(TILE);
                assert_eq!(tiles.div_ceil(d.clusters), tiles.div_ceil(15), "{d:?}");
            }
        }
        let takes = |x_rows, k| Division::new(x_rows, 5120, k, MULTIPROCESSORS).is_some();
        assert!(takes(16, 17408) && !takes(17, 17408), "x leaves no room for weights");
        assert!(!takes(65, 5120) && !takes(16, 1 << 16), "nothing is compiled for it");
        assert!(!takes(16, 448), "a block without k");
    }
}
