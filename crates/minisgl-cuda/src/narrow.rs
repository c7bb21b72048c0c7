//! Matrix products of some dozens of rows on Hopper: `kernels/narrow.cu`.

use minisgl_tensor::{Activation, DType, Linear, Result, Store, Tensor};

use crate::backend::{CudaBackend, Products};
use crate::device::{Launch, address_of};
use crate::kernels::Module;
use crate::linear::GEMV_ROWS_MAX;
use crate::tiles::Matrix;
use crate::weights::tensor;

/// Up to this many rows, and this many elements of a matrix, `narrow.cu` is faster than cuBLASLt with
/// the kernels in front and behind: see `docs/benchmarks/h200-operations.md`. Larger products fill the
/// card with large tiles, which need fewer bytes of x a multiprocessor.
const ROWS_MAX: usize = 64;
/// The same with a norm, whose factors are found on the way: measured when its weights came in here, too.
const NORMED_ROWS_MAX: usize = 32;
const ELEMENTS_MAX: usize = 8 << 20;
/// As in the kernel: elements of k in a step, and the most steps of one ring.
const STEP: usize = 64;
const STAGES_MAX: usize = 16;
/// So little shared memory that the next product's blocks find room beside this one's.
const SHARED_BYTES: usize = 112 << 10;

/// As `Args` in the kernel.
#[repr(C)]
struct Args {
    bias: u64,
    out: u64,
    rows: i32,
    n: i32,
    k: i32,
    blocks: i32,
    w_stages: i32,
    x_stages: i32,
    add: i32,
    gelu: i32,
    eps: f32,
}

/// How a product is divided.
struct Division {
    /// Rows of x, rounded up to what the kernel is compiled for.
    rows: usize,
    /// Warpgroups a block: each has 64 rows of w.
    groups: usize,
    /// Blocks a cluster, which divide k.
    blocks: usize,
    clusters: usize,
    w_stages: usize,
    x_stages: usize,
    shared: usize,
}

impl Division {
    fn new(x_rows: usize, w_rows: usize, k: usize, norm: bool, multiprocessors: usize) -> Self {
        let rows = x_rows.next_power_of_two().max(32);
        let steps = k.div_ceil(STEP);
        // Larger tiles read x less often; but all multiprocessors shall have one.
        let groups = if w_rows / 128 * 8 >= multiprocessors { 2 } else { 1 };
        let tiles = w_rows.div_ceil(64 * groups);
        let blocks = (multiprocessors / tiles).clamp(1, 8.min(steps));
        // All blocks walk as many tiles, so that all end at about the same time.
        let clusters = tiles.div_ceil((tiles * blocks).div_ceil(multiprocessors));

        let threads = 128 * groups;
        let share = x_rows.div_ceil(8).div_ceil(blocks);
        let sums = if blocks > 1 { blocks * share * threads * 16 } else { 0 };
        let normed = if norm { (blocks * threads + rows) * 4 } else { 0 };
        let bytes = SHARED_BYTES.saturating_sub(sums + normed + 2048);
        let (w_bytes, x_bytes) = (64 * groups * 128, rows * 128);
        // Of x, what hides the way from the cache; w has the rest.
        let all = steps.div_ceil(blocks) * tiles.div_ceil(clusters);
        let x_stages = (bytes / 3 / x_bytes).clamp(2, STAGES_MAX).min(all);
        let w_stages = (bytes.saturating_sub(x_stages * x_bytes) / w_bytes).clamp(2, STAGES_MAX);
        let w_stages = w_stages.min(all);
        let left = bytes.saturating_sub(w_stages * w_bytes) / x_bytes;
        let x_stages = left.clamp(x_stages, STAGES_MAX).min(all);
        let shared = w_stages * w_bytes + x_stages * x_bytes + sums + normed + 1024;
        Self { rows, groups, blocks, clusters, w_stages, x_stages, shared }
    }
}

impl CudaBackend {
    pub(crate) fn prefers_narrow(&self, a: &Linear<'_>, gated: bool, out: &Tensor) -> bool {
        let (weight, rows) = (tensor(a.weight), a.x.dim(0));
        let rows_max = if gated || a.norm.is_some() { NORMED_ROWS_MAX } else { ROWS_MAX };
        self.card().has_warpgroups()
            && self.products() == Products::Own
            && (GEMV_ROWS_MAX + 1..=rows_max).contains(&rows)
            && weight.elements() <= ELEMENTS_MAX
            && weight.row_len().is_multiple_of(8)
            && out.row_len().is_multiple_of(8)
            && out.dtype() == DType::BF16
    }

    /// As `Backend::linear` and `gated_linear`.
    pub(crate) fn narrow(
        &self,
        a: &Linear<'_>,
        gated: Option<Activation>,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let halves = if gated.is_some() { 2 } else { 1 };
        let (x, norm) = self.normed_or_folded(a)?;
        let d = Division::new(rows, n * halves, k, norm.is_some(), self.device.multiprocessors);
        let w = Matrix {
            address: tensor(a.weight).address(),
            rows: n * halves,
            cols: k,
            box_rows: 64 * d.groups,
        }
        .map_groups(halves)?;
        let x = Matrix { address: x.address(), rows, cols: k, box_rows: rows }.map()?;
        let args = Args {
            bias: a.bias.map_or(0, |b| tensor(b).address()),
            out: out.address(),
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            blocks: d.blocks as i32,
            w_stages: d.w_stages as i32,
            x_stages: d.x_stages as i32,
            add: i32::from(a.store == Store::Add),
            gelu: i32::from(gated == Some(Activation::GeluTanh)),
            eps: norm.map_or(0.0, |norm| norm.eps),
        };
        let defines = variant(d.rows, d.groups, gated.is_some(), norm.is_some());
        let function = self.kernels.get(Module::Narrow, &defines, "narrow")?;
        let shape = Launch {
            grid: [d.clusters * d.blocks, 1, 1],
            threads: 128 * d.groups + 32,
            shared: d.shared,
            cluster: d.blocks,
        };
        let mut words = [address_of(&w), address_of(&x), address_of(&args)];
        // SAFETY: the kernel's parameters in order; the maps cover `w` and `x`, `out` has a row of n
        // for each row of x.
        unsafe { self.device.launch_raw(function, shape, &mut words) }
    }
}

fn variant(rows: usize, groups: usize, gated: bool, norm: bool) -> Vec<(&'static str, i32)> {
    vec![
        ("ROWS", rows as i32),
        ("GROUPS", groups as i32),
        ("GATED", i32::from(gated)),
        ("NORM", i32::from(norm)),
    ]
}

/// Every variant that a decoder can ask for.
pub(crate) fn narrow_variants() -> Vec<(Module, Vec<(&'static str, i32)>)> {
    let kinds = [
        (ROWS_MAX, false, false),
        (NORMED_ROWS_MAX, false, false),
        (NORMED_ROWS_MAX, false, true),
        (NORMED_ROWS_MAX, true, true),
    ];
    [1, 2]
        .into_iter()
        .flat_map(|groups| {
            kinds.map(|(rows, gated, norm)| (Module::Narrow, variant(rows, groups, gated, norm)))
        })
        .collect()
}
