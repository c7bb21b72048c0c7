//! Matrix products of dozens of rows on Hopper, of small matrices up to 256, by strips of weights: `kernels/strip.cu`, `strip_short.cu` and
//! `strip_tall.cu`.

use std::ops::RangeInclusive;

use minisgl_tensor::{Activation, DType, Linear, Result, Store, Tensor};

use crate::backend::{CudaBackend, Products};
use crate::device::{Launch, address_of};
use crate::kernels::{Key, Module};
use crate::linear::GEMV_ROWS_MAX;
use crate::tiles::Matrix;
use crate::weights::tensor;

/// Rows of x that kernels are compiled for, of which `strip_tall.cu` has the most. Of larger matrices, where these are as
/// many bytes as a strip of w has, cuBLASLt was faster.
const ROWS: [usize; 3] = [32, 64, 128];
/// The smallest matrices and the shortest rows that were measured, Qwen3-8B's o: where others should go is not known.
const ELEMENTS_MIN: usize = 16 << 20;
const ROW_MIN: usize = 4096;
/// What `strip_short.cu` was measured with, Qwen3-0.6B's qkv, and gate and up.
const SHORT_ELEMENTS_MIN: usize = 4 << 20;
const SHORT_ROW: usize = 1024;
const SHORT_UNITS_MAX: usize = 8;
/// What `strip_tall.cu` was measured with, Qwen3-0.6B's o, down and qkv, in up to so many lots of rows; and its gate and
/// up, for more than one lot of which cuBLASLt was faster.
const TALL_ELEMENTS: RangeInclusive<usize> = 2 << 20..=4 << 20;
const LOTS_MAX: usize = 2;
const TALL_GATED_ELEMENTS: RangeInclusive<usize> = 4 << 20..=6 << 20;
const TALL_ROWS: RangeInclusive<usize> = 1024..=3072;
/// Elements of k that a block of a cluster has, or somewhat more: clusters have two blocks or four.
const TALL_STEP: usize = 512;
/// As in the kernel: rows of w in a unit, elements of k in a step, threads that multiply and that gather squares,
/// and the most stages.
const UNIT: usize = 16;
const STEP: usize = 64;
const THREADS: usize = 256;
const GATHERING_THREADS: usize = 128;
const FETCHING_THREADS: usize = 64;
const STAGES_MAX: usize = 16;
/// So many units of a strip that a thread's registers hold their sums.
const UNITS_MAX: usize = 18;
/// The same where warps have x in registers, too, and all units.
const TALL_UNITS_MAX: usize = 8;
/// Blocks of a cluster, which divide k, in the order in which they are tried.
const BLOCKS: [usize; 3] = [1, 2, 4];
/// Shared memory of a block, which has a multiprocessor for itself, without the kernel's barriers and squares.
const SHARED_BYTES: usize = 225 << 10;
/// The same of `strip_short.cu`: beside a block there is room for one of `narrow.cu`, but not for a second of its own,
/// lest another multiprocessor have none.
const SHORT_SHARED_BYTES: usize = 116_000;
/// What a block can have in all, and room for the barriers of `strip_tall.cu`, whose squares take more than `SHARED_BYTES`
/// leaves.
const BLOCK_BYTES: usize = 227 << 10;
const BARRIER_BYTES: usize = 512;
/// Bytes of w on their way to a block. A step of 64 rows of Qwen3-14B took 9.27 ms with so many, 9.34 with
/// 100 KiB, 9.29 with 140 and 9.46 with as many as there is room for, all before L2 was told to let go of them first
/// (h200-operations.md).
const W_BYTES_AHEAD: usize = 120 << 10;

/// As `Args` in the kernel.
#[repr(C)]
struct Args {
    bias: u64,
    out: u64,
    rows: i32,
    n: i32,
    k: i32,
    stages: i32,
    x_bytes: i32,
    add: i32,
    gelu: i32,
    strips: i32,
    lot_rows: i32,
    eps: f32,
    inverse_k: f32,
}

/// How a product is divided: each cluster has a strip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Division {
    /// Rows of x that the kernel is compiled for.
    rows: usize,
    /// Of a strip.
    units: usize,
    /// Blocks a cluster, which divide k.
    blocks: usize,
    clusters: usize,
    /// Of rows of x, each multiplied by all strips.
    lots: usize,
    stages: usize,
    /// Bytes.
    shared: usize,
    module: Module,
}

impl Division {
    /// `None` where no kernel takes such a product, or is not known to be faster than cuBLASLt.
    fn new(
        x_rows: usize,
        w_rows: usize,
        k: usize,
        gated: bool,
        multiprocessors: usize,
    ) -> Option<Self> {
        let lots = x_rows.div_ceil(ROWS[2]);
        let rows = ROWS.into_iter().find(|rows| x_rows.div_ceil(lots) <= *rows)?;
        if rows == ROWS[2] {
            let elements = w_rows * k;
            let takes = match gated {
                true => lots == 1 && TALL_GATED_ELEMENTS.contains(&elements),
                false => lots <= LOTS_MAX && TALL_ELEMENTS.contains(&elements),
            } && TALL_ROWS.contains(&k);
            return takes.then(|| Self::tall(lots, w_rows, k, gated, multiprocessors)).flatten();
        }
        let by_clusters = |blocks| Self::by_clusters(blocks, rows, w_rows, multiprocessors);
        if x_rows <= GEMV_ROWS_MAX {
            return None;
        }
        if k == SHORT_ROW {
            let takes = w_rows * k >= SHORT_ELEMENTS_MIN;
            return takes.then(|| Self::short(w_rows, multiprocessors)).flatten();
        }
        if k < ROW_MIN || w_rows * k < ELEMENTS_MIN {
            return None;
        }
        let all = BLOCKS.map(by_clusters);
        // A multiprocessor takes in x beside w: strips shall be half as high again as x, or as high as they can.
        let is_high = |d: &&Self| d.units * UNIT * 2 > d.rows * 3;
        let strips = || all.iter().flatten().filter(|d| d.units * UNIT >= d.rows);
        strips().find(is_high).or(strips().next_back()).copied()
    }

    /// Of so many blocks; `None` where a strip's sums fit no registers, or an eighth of the multiprocessors would
    /// have nothing to read.
    fn by_clusters(
        blocks: usize,
        rows: usize,
        w_rows: usize,
        multiprocessors: usize,
    ) -> Option<Self> {
        let most = Self::clusters_max(blocks, multiprocessors);
        let all = w_rows.div_ceil(UNIT);
        // Two warpgroups have at least one each.
        let units = all.div_ceil(most.max(1)).max(2);
        let clusters = all.div_ceil(units);
        if units > UNITS_MAX || clusters * blocks * 8 < multiprocessors * 7 {
            return None;
        }
        let (w_bytes, x_bytes) = (units * UNIT * STEP * 2, rows * STEP * 2);
        let fitting = (SHARED_BYTES - 1024) / (w_bytes + x_bytes);
        let stages = (W_BYTES_AHEAD / w_bytes).min(fitting).min(STAGES_MAX);
        let sums = left_bytes(rows, units).max(sent_bytes(blocks, units.div_ceil(2)));
        let shared = 1024 + (stages * (w_bytes + x_bytes)).max(sums);
        Some(Self { rows, units, blocks, clusters, lots: 1, stages, shared, module: Module::Strip })
    }

    /// Of short rows, in single blocks, for 64 rows of x.
    fn short(w_rows: usize, multiprocessors: usize) -> Option<Self> {
        let division = Self::by_clusters(1, ROWS[1], w_rows, multiprocessors)
            .filter(|d| d.units <= SHORT_UNITS_MAX)?;
        let step_bytes = (division.units * UNIT + division.rows) * STEP * 2;
        // A stage is always the same warpgroup's: else one might look for a step in it when the other's, which came
        // before, is not there yet.
        let stages = ((SHORT_SHARED_BYTES - 1024) / step_bytes).min(STAGES_MAX) & !1;
        Some(Self { stages, shared: SHORT_SHARED_BYTES, module: Module::StripShort, ..division })
    }

    /// Of short rows, for lots of 128 rows of x.
    fn tall(
        lots: usize,
        w_rows: usize,
        k: usize,
        gated: bool,
        multiprocessors: usize,
    ) -> Option<Self> {
        // A cluster's exchange takes longer than a single block takes to read more of x where strips are high.
        let blocks = match k / TALL_STEP {
            ..3 if gated || lots > 1 => 1,
            ..4 => 2,
            _ => 4,
        };
        let most = Self::clusters_max(blocks, multiprocessors) / lots;
        let units = w_rows.div_ceil(UNIT).div_ceil(most.max(1)).max(2);
        if units > TALL_UNITS_MAX {
            return None;
        }
        let received = sent_bytes(blocks, units);
        let step_bytes = (units * UNIT + ROWS[2]) * STEP * 2;
        let squares = blocks * ROWS[2] * 4;
        let room = BLOCK_BYTES - BARRIER_BYTES - squares - 1024 - received;
        let stages = (room / step_bytes).min(STAGES_MAX);
        Some(Self {
            rows: ROWS[2],
            units,
            blocks,
            clusters: w_rows.div_ceil(UNIT).div_ceil(units) * lots,
            lots,
            stages,
            shared: 1024 + stages * step_bytes + received,
            module: Module::StripTall,
        })
    }

    /// Clusters that are on a card at once. Of more than two blocks they do not fill an H200, whose multiprocessors come in
    /// lots of 16 or 18.
    fn clusters_max(blocks: usize, multiprocessors: usize) -> usize {
        if blocks > 2 { multiprocessors * 10 / 11 / blocks } else { multiprocessors / blocks }
    }
}

/// Of the sums that a single block leaves in shared memory, and of those that come from a cluster's, of which a
/// warp has so many units.
fn left_bytes(rows: usize, units: usize) -> usize {
    rows * (units * UNIT + 8) * 4
}
fn sent_bytes(blocks: usize, units: usize) -> usize {
    if blocks == 1 { 0 } else { blocks * units.div_ceil(blocks) * 2 * THREADS * 16 }
}

impl CudaBackend {
    /// How `strip` divides a product, where it is to take it. The head's are `head.cu`'s, or cuBLASLt's.
    pub(crate) fn strips(&self, a: &Linear<'_>, out: &Tensor) -> Option<Division> {
        let (weight, rows) = (tensor(a.weight), a.x.dim(0));
        let (w_rows, k) = (weight.elements() / weight.row_len(), weight.row_len());
        let can = self.card().has_warpgroups()
            && self.products() == Products::Own
            && k.is_multiple_of(8)
            && out.row_len().is_multiple_of(8)
            && out.dtype() == DType::BF16;
        let gated = out.row_len() < w_rows;
        can.then(|| Division::new(rows, w_rows, k, gated, self.device.multiprocessors)).flatten()
    }

    /// As `Backend::linear` and `gated_linear`.
    pub(crate) fn strip(
        &self,
        d: &Division,
        a: &Linear<'_>,
        gated: Option<Activation>,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let halves = if gated.is_some() { 2 } else { 1 };
        let (x, norm) = self.normed_or_folded(a)?;
        let address = tensor(a.weight).address();
        let box_rows = d.units * UNIT;
        let w = Matrix { address, rows: n * halves, cols: k, box_rows }.map_groups(halves)?;
        let lot_rows = rows.div_ceil(d.lots);
        let x = Matrix { address: x.address(), rows, cols: k, box_rows: lot_rows }.map()?;
        let args = Args {
            bias: a.bias.map_or(0, |b| tensor(b).address()),
            out: out.address(),
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            stages: d.stages as i32,
            x_bytes: (lot_rows * STEP * 2) as i32,
            add: i32::from(a.store == Store::Add),
            gelu: i32::from(gated == Some(Activation::GeluTanh)),
            strips: (d.clusters / d.lots) as i32,
            lot_rows: lot_rows as i32,
            eps: norm.map_or(0.0, |norm| norm.eps),
            inverse_k: 1.0 / k as f32,
        };
        let variant = variant(d, gated.is_some(), norm.is_some());
        let (name, threads) = match d.module {
            Module::StripShort => ("strip_short", THREADS),
            Module::StripTall => ("strip_tall", THREADS),
            _ if norm.is_some() => ("strip", THREADS + GATHERING_THREADS),
            _ => ("strip", THREADS),
        };
        let function = self.kernels.get(d.module, &variant, name)?;
        let shape = Launch {
            grid: [d.clusters * d.blocks, 1, 1],
            threads: threads + FETCHING_THREADS,
            shared: d.shared,
            cluster: d.blocks,
        };
        let mut words = [address_of(&w), address_of(&x), address_of(&args)];
        // SAFETY: the kernel's parameters in order; the maps cover `w` and `x`, `out` has a row of n
        // for each row of x.
        unsafe { self.device.launch_raw(function, shape, &mut words) }
    }
}

fn variant(d: &Division, gated: bool, norm: bool) -> Vec<(&'static str, i32)> {
    vec![
        ("X_ROWS", d.rows as i32),
        ("UNITS", d.units as i32),
        ("BLOCKS", d.blocks as i32),
        ("GATED", i32::from(gated)),
        ("NORM", i32::from(norm)),
    ]
}

/// What a decoder's products ask for, each of a matrix of so many rows of so many elements, gated or not, with a norm
/// (whose weights are in the matrix, as all are in front of these) or not.
pub(crate) fn strip_variants(
    products: &[(usize, usize, bool, bool)],
    multiprocessors: usize,
) -> impl Iterator<Item = Key> {
    products.iter().flat_map(move |&(w_rows, k, gated, norm)| {
        let division = move |rows| Division::new(rows, w_rows, k, gated, multiprocessors);
        let key = move |d: Division| (d.module, variant(&d, gated, norm));
        ROWS.into_iter().chain([LOTS_MAX * ROWS[2]]).filter_map(division).map(key)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    #[test]
    fn all_units_and_all_memory_are_there() {
        for x_rows in [17, 32, 33, 64] {
            for (w_rows, k) in [
                (7168, 5120),
                (34816, 5120),
                (5120, 17408),
                (28672, 8192),
                (5128, 8200),
                (4096, 4096),
            ] {
                let d = Division::new(x_rows, w_rows, k, false, MULTIPROCESSORS).unwrap();
                let what = format!("{x_rows} × {w_rows} × {k}: {d:?}");
                assert!(d.rows >= x_rows && (2..=UNITS_MAX).contains(&d.units), "{what}");
                assert!(d.stages >= 3 && d.shared <= SHARED_BYTES, "{what}");
                assert!((116..=MULTIPROCESSORS).contains(&(d.blocks * d.clusters)), "{what}");
                assert_eq!(d.clusters, w_rows.div_ceil(d.units * UNIT), "{what}");
            }
        }
    }

    #[test]
    fn short_rows_have_stages_for_both_warpgroups_and_room_for_their_sums() {
        for (x_rows, w_rows) in [(17, 4096), (64, 6144), (40, 4104), (64, 16384)] {
            let d = Division::new(x_rows, w_rows, SHORT_ROW, false, MULTIPROCESSORS).unwrap();
            assert_eq!((d.module, d.rows, d.blocks), (Module::StripShort, 64, 1), "{d:?}");
            // Each warpgroup waits for its next step before it leaves the one that it has.
            assert!(d.stages >= 4 && d.stages.is_multiple_of(2), "{d:?}");
            assert!(d.clusters <= MULTIPROCESSORS && d.clusters * d.units * UNIT >= w_rows);
            assert!(1024 + 2 * left_bytes(64, d.units) <= d.shared, "{d:?}");
        }
        assert_eq!(Division::new(64, 20000, SHORT_ROW, false, MULTIPROCESSORS), None);
    }

    #[test]
    fn strips_are_as_high_as_they_must_be() {
        let of = |x_rows, w_rows, k| {
            let d = Division::new(x_rows, w_rows, k, false, MULTIPROCESSORS)?;
            Some((d.units, d.blocks, d.clusters))
        };
        // Qwen3-14B's gate and up, qkv, down.
        assert_eq!(of(64, 34816, 5120), Some((17, 1, 128)));
        assert_eq!(of(64, 7168, 5120), Some((7, 2, 64)));
        assert_eq!(of(64, 5120, 17408), Some((11, 4, 30)));
        assert_eq!(of(32, 5120, 17408), Some((5, 2, 64)));
        // Single blocks of four units would leave 20 multiprocessors with nothing.
        assert_eq!(of(32, 7168, 5120), Some((7, 2, 64)));
        // Llama 3 70B's gate and up, and down, over two cards and over four.
        assert_eq!(of(64, 28672, 8192), Some((14, 1, 128)));
        assert_eq!(of(64, 8192, 14336), Some((8, 2, 64)));
        assert_eq!(of(64, 14336, 8192), Some((7, 1, 128)));
        assert_eq!(of(64, 8192, 7168), Some((8, 2, 64)));
        // Qwen3-8B's gate and up, and o.
        assert_eq!(of(64, 24576, 4096), Some((12, 1, 128)));
        assert_eq!(of(64, 4096, 4096), Some((9, 4, 29)));
        // Of Qwen3-0.6B's qkv, and its gate and up, blocks read all of x.
        assert_eq!(of(64, 4096, 1024), Some((2, 1, 128)));
        assert_eq!(of(64, 6144, 1024), Some((3, 1, 128)));
        // Of more rows clusters divide k: its qkv, o and down.
        assert_eq!(of(65, 4096, 1024), Some((4, 2, 64)));
        assert_eq!(of(128, 1024, 2048), Some((3, 4, 22)));
        assert_eq!(of(128, 1024, 3072), Some((3, 4, 22)));
        // Of more than 128, two lots have clusters of their own.
        assert_eq!(of(129, 4096, 1024), Some((4, 1, 128)));
        assert_eq!(of(256, 1024, 2048), Some((5, 4, 26)));
        assert_eq!(of(256, 1024, 3072), Some((5, 4, 26)));
        assert_eq!(of(257, 1024, 3072), None);
    }

    #[test]
    fn tall_ones_have_room_for_their_sums() {
        let shapes = [(4096, 1024), (2048, 1024), (1024, 3072), (1032, 2056), (1536, 2048)];
        let all = |x_rows| shapes.map(|(w_rows, k)| (x_rows, w_rows, k, false));
        for (x_rows, w_rows, k, gated) in
            [all(100), all(200)].concat().into_iter().chain([(100, 6144, 1024, true)])
        {
            let d = Division::new(x_rows, w_rows, k, gated, MULTIPROCESSORS).unwrap();
            assert_eq!((d.module, d.rows), (Module::StripTall, 128), "{d:?}");
            // Each warpgroup waits for its next step before it leaves the one that it has; each block has such a step.
            assert!(d.stages >= 2 && k / STEP / d.blocks >= 2, "{d:?}");
            let rings = 1024 + d.stages * (d.units * UNIT + d.rows) * STEP * 2;
            let sums = d.blocks * d.units.div_ceil(d.blocks) * UNIT * d.rows * 4;
            match d.blocks {
                1 => assert!(1024 + left_bytes(d.rows, d.units) <= rings && rings <= d.shared),
                _ => assert!(rings + sums <= d.shared, "{d:?}"),
            }
            // Beside the kernel's own barriers and squares.
            let own = (2 * STAGES_MAX + 1) * 8 + d.blocks * d.rows * 4;
            assert!(d.shared + own <= 227 << 10, "{d:?}");
            assert!(d.clusters * d.blocks <= MULTIPROCESSORS, "{d:?}");
            assert_eq!(d.lots, x_rows.div_ceil(128), "{d:?}");
            assert!(d.clusters / d.lots * d.units * UNIT >= w_rows, "{d:?}");
        }
    }

    #[test]
    fn some_gated_products_of_more_rows_are_left_to_cublaslt() {
        let takes = |x_rows, w_rows| {
            Division::new(x_rows, w_rows, 1024, true, MULTIPROCESSORS).map(|d| d.module)
        };
        // Qwen3-0.6B's gate and up, and those over two ranks.
        assert_eq!([32, 64].map(|x_rows| takes(x_rows, 6144)), [Some(Module::StripShort); 2]);
        assert_eq!([65, 128].map(|x_rows| takes(x_rows, 6144)), [Some(Module::StripTall); 2]);
        assert_eq!([takes(129, 6144), takes(100, 3072)], [None; 2]);
    }

    #[test]
    fn other_products_are_left_to_other_kernels() {
        for (x_rows, w_rows, k) in [
            (16, 34816, 5120),
            (65, 34816, 5120),
            (65, 6144, 1024),
            (257, 4096, 1024),
            // Qwen3-0.6B's down; Qwen3-1.7B's qkv, gate and up.
            (64, 1024, 3072),
            (32, 12288, 2048),
            (64, 4096, 2048),
            (64, 12288, 2048),
            // Llama 3.2 1B's down, of which strips would be lower than x.
            (64, 2048, 8192),
            // So few rows that strips would be few, and so many that they would be too high.
            (64, 1024, 32768),
            (64, 51200, 5120),
        ] {
            assert_eq!(Division::new(x_rows, w_rows, k, false, MULTIPROCESSORS), None);
        }
    }
}
