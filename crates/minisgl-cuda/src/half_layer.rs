//! Half a decoder layer in one kernel, for decode steps of few rows: `kernels/half_layer.cuh` says how.
//!
//! Such a kernel leaves parts of what it adds to the residual stream, one a cluster, and the next one
//! adds them up as it reads. In between the stream is elsewhere than the engine thinks, so what else reads or
//! writes it settles it first: norms, products, gathers, copies. A new step's `embed` writes it all, what
//! follows a product reads what that has settled, and several ranks do not take half layers.

use minisgl_tensor::{Activation, AttentionLayer, DType, Heads, Mlp, Norm, Result, Tensor};

use crate::attention::page_matrix;
use crate::backend::{CudaBackend, Products, norm_args};
use crate::device::{Launch, address_of, args};
use crate::kernels::{Key, Module};
use crate::weights::tensor;

/// Blocks of a cluster; the warps of a block that multiply; rows. A block has a multiprocessor to itself, and
/// of clusters of 16 a card of 132 holds only 7 at once, of 8 it holds 15.
const CLUSTER: usize = 8;
const WARPS: usize = 8;
const ROWS: usize = 8;
const THREADS: usize = 32 * WARPS;
/// `attend.cu` has a warp more, which fetches tiles.
const ATTEND_THREADS: usize = THREADS + 32;
/// Tokens of a tile of the cache. Tiles on their way: two of each warp, of which one is there from the start.
const TILE: usize = 16;
const STAGES: usize = 2 * WARPS;
/// Parts of what is added, as `PARTS_MAX` in the kernels.
const PARTS_MAX: usize = 8;
/// The MLP's clusters, at most: they find room beside the attention half's 8, so that the weights of each half
/// come while the other runs.
const MLP_CLUSTERS: usize = 7;
/// What a block can have.
const SHARED_BYTES: usize = 227 << 10;
/// Registers in which a thread of the MLP can hold weights.
const HELD_REGISTERS: usize = 144;

/// A residual stream that is to have `parts` times `[rows, width]` added.
pub(crate) struct Pending {
    /// Where the engine looks for it, and where it is.
    hidden: Tensor,
    x: Tensor,
    added: Tensor,
    parts: usize,
}

/// As in `kernels/half_layer.cuh`.
#[repr(C)]
struct Residual {
    x: u64,
    added: u64,
    out: u64,
    norm: u64,
    rows: i32,
    hidden: i32,
    parts: i32,
    eps: f32,
    shift: f32,
}

/// As `Args` in `kernels/attend.cu`.
#[repr(C)]
struct AttendArgs {
    residual: Residual,
    qkv: u64,
    bias: u64,
    out: u64,
    part: u64,
    k_pages: u64,
    v_pages: u64,
    slots: u64,
    kv_len: u64,
    page_table: u64,
    store_at: u64,
    rope: u64,
    q_norm: u64,
    k_norm: u64,
    kv_heads: i32,
    pages_a_row: i32,
    page_shift: i32,
    early: i32,
    q_eps: f32,
    q_shift: f32,
    k_eps: f32,
    k_shift: f32,
    scale: f32,
    soft_cap: f32,
    window: i32,
}

/// As `Args` in `kernels/mlp.cu`.
#[repr(C)]
struct MlpArgs {
    residual: Residual,
    gate_up: u64,
    down: u64,
    part: u64,
    inner_total: i32,
    gelu: i32,
}

/// Bytes between a matrix's rows in shared memory.
fn stride(k: usize) -> usize {
    2 * k + 64
}

/// A block's tiles of 16 rows of the first and of the second matrix, rows of the latter that come late for want of
/// room (attention's), and its shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    first: usize,
    second: usize,
    late: usize,
    shared: usize,
}

impl Block {
    /// Of the attention half; `None` where it does not divide evenly or does not fit.
    fn attend(hidden: usize, Heads { q, kv, dim }: Heads) -> Option<Self> {
        let group = q / kv;
        let qkv = (group + 2) * dim;
        let divides = matches!(dim, 64 | 128) && group <= 16 && qkv.is_multiple_of(16 * CLUSTER);
        let (first, second) = (qkv / (16 * CLUSTER), hidden / (16 * CLUSTER));
        let parts = (ROWS + CLUSTER - 1) * group * (dim * 4 + 16);
        let attention = sums(first).max(WARPS * group * (dim + 4) * 4 + parts);
        let (stage, row) = (2 * TILE * dim * 2, stride(group * dim));
        let begin = WARPS * stage + (first * 16 + ROWS) * stride(hidden);
        let behind =
            1024 + ROWS * CLUSTER * 4 + ROWS * qkv * 2 + 8 * group.div_ceil(8) * (dim + 8) * 2;
        // The ring begins with what the second product takes and makes beside its weights.
        let late_max = (STAGES * stage).checked_sub(ROWS * row + sums(second))? / row;
        (0..=late_max.min(second * 16)).filter(|_| divides).find_map(|late| {
            let attend = STAGES * stage + (second * 16 - late) * row + attention;
            let shared = begin.max(attend) + behind;
            // Beside this the kernel has its warps' tops, barriers, and how work is divided.
            Self::new(hidden, Self { first, second, late, shared }, 2048)
        })
    }

    /// Of the MLP half: clusters, and a block with as much as fits in shared memory.
    fn mlp(hidden: usize, inner: usize, most_clusters: usize) -> Option<(usize, Self)> {
        let first = inner.div_ceil(most_clusters.max(1) * 8 * CLUSTER);
        let (in_cluster, second) = (first * 8 * CLUSTER, hidden / (16 * CLUSTER));
        // Of the first matrix a tile, and all of the second.
        let registers = 8 * ((hidden / 32).div_ceil(WARPS) + in_cluster / 32);
        let shared = (first.checked_sub(1)? * 16 * stride(hidden)).max(sums(first))
            + ROWS * (stride(hidden) + stride(in_cluster))
            + ROWS * CLUSTER * 4;
        // Beside this the kernel has barriers.
        let block = Self::new(hidden, Self { first, second, late: 0, shared }, 128)?;
        let fits = inner.is_multiple_of(8) && registers <= HELD_REGISTERS;
        fits.then_some((inner.div_ceil(in_cluster), block))
    }

    fn new(hidden: usize, block: Self, beside: usize) -> Option<Self> {
        let fits = block.shared + beside <= SHARED_BYTES && block.first <= 8 && block.second <= 8;
        (fits && hidden.is_multiple_of(16 * CLUSTER)).then_some(block)
    }

    fn launch(self, clusters: usize, threads: usize) -> Launch {
        let grid = [clusters * CLUSTER, 1, 1];
        Launch { grid, threads, shared: self.shared, cluster: CLUSTER }
    }
}

fn attend_variant(block: Block, heads: Heads) -> Key {
    let group = heads.q / heads.kv;
    let defines = vec![
        ("CLUSTER", CLUSTER as i32),
        ("DIM", heads.dim as i32),
        ("GROUP", group as i32),
        ("HALVES", group.div_ceil(8) as i32),
        ("FIRST", block.first as i32),
        ("SECOND", block.second as i32),
        ("LATE", block.late as i32),
        ("SOFT_CAP", 0),
    ];
    (Module::Attend, defines)
}

fn mlp_variant(block: Block) -> Key {
    let sizes = [CLUSTER, block.first, block.second].map(|size| size as i32);
    (Module::Mlp, ["CLUSTER", "FIRST", "SECOND"].into_iter().zip(sizes).collect())
}

fn mlp_block(hidden: usize, inner: usize, multiprocessors: usize) -> Option<(usize, Block)> {
    Block::mlp(hidden, inner, MLP_CLUSTERS.min(multiprocessors / CLUSTER))
}

/// The kernels of a model's half layers, as far as there are any.
pub(crate) fn half_layer_variants(
    heads: Heads,
    hidden: usize,
    inner: usize,
    multiprocessors: usize,
) -> Vec<Key> {
    let attend = Block::attend(hidden, heads).map(|block| attend_variant(block, heads));
    let mlp = mlp_block(hidden, inner, multiprocessors).map(|(_, block)| mlp_variant(block));
    attend.into_iter().chain(mlp).collect()
}

/// Bytes of the warps' sums over so many tiles.
fn sums(tiles: usize) -> usize {
    WARPS * ROWS * (tiles * 16 + 4) * 4
}

impl CudaBackend {
    /// Whether `attend.cu` does it.
    pub(crate) fn attend_op(&self, a: &AttentionLayer<'_>, hidden: &Tensor) -> Result<bool> {
        let (batch, heads) = (a.attention.batch, a.attention.heads);
        let clusters = heads.kv;
        let pages = batch.page_size.is_power_of_two() && batch.page_size >= TILE;
        let decodes = batch.decode_rows == batch.tokens;
        let Some(block) = Block::attend(hidden.row_len(), heads) else { return Ok(false) };
        if a.attention.soft_cap.is_some() || !(pages && decodes && self.can_fuse(hidden, clusters))
        {
            return Ok(false);
        }
        let (module, defines) = attend_variant(block, heads);
        let function = self.kernels.get(module, &defines, "attend")?;
        let shape = block.launch(clusters, ATTEND_THREADS);
        if !self.clusters_fit(function, shape)? {
            return Ok(false);
        }
        let (pending, residual) = self.advance("attend parts", hidden, a.norm, clusters)?;
        let (q_norm, q_eps, q_shift) = norm_args(a.store.q_norm);
        let (k_norm, k_eps, k_shift) = norm_args(a.store.k_norm);
        let kv = a.attention.kv;
        let args = AttendArgs {
            residual,
            qkv: tensor(a.qkv).address(),
            bias: a.qkv_bias.map_or(0, |bias| tensor(bias).address()),
            out: tensor(a.out).address(),
            part: pending.added.address(),
            k_pages: kv.k.address(),
            v_pages: kv.v.address(),
            slots: batch.slots.address(),
            kv_len: batch.kv_len.address(),
            page_table: batch.page_table.address(),
            store_at: batch.store_at.address(),
            rope: a.store.rope.address(),
            q_norm,
            k_norm,
            kv_heads: heads.kv as i32,
            pages_a_row: batch.page_table.row_len() as i32,
            page_shift: batch.page_size.ilog2() as i32,
            // Outside of a graph, the kernel that writes the page table may not be done.
            early: i32::from(self.device.is_capturing()?),
            q_eps,
            q_shift,
            k_eps,
            k_shift,
            scale: a.attention.scale,
            soft_cap: 0.0,
            window: a.attention.window.map_or(0, |window| window as i32),
        };
        let map =
            |pages| page_matrix(pages, &a.attention, TILE).map_parts(a.attention.heads.dim / 64);
        let (k, v) = (map(&kv.k)?, map(&kv.v)?);
        let mut words = [address_of(&k), address_of(&v), address_of(&args)];
        // SAFETY: the kernel's parameters in order; the maps cover the cache, the rest is the step's.
        unsafe { self.device.launch_raw(function, shape, &mut words) }?;
        self.set_pending(pending)?;
        Ok(true)
    }

    /// Whether `mlp.cu` does it.
    pub(crate) fn fused_mlp_op(&self, a: &Mlp<'_>, hidden: &Tensor) -> Result<bool> {
        let inner_total = a.down.cols();
        let block = mlp_block(hidden.row_len(), inner_total, self.device.multiprocessors);
        let Some((clusters, block)) = block else { return Ok(false) };
        if !self.can_fuse(hidden, clusters) {
            return Ok(false);
        }
        let (module, defines) = mlp_variant(block);
        let function = self.kernels.get(module, &defines, "mlp")?;
        let shape = block.launch(clusters, THREADS);
        if !self.clusters_fit(function, shape)? {
            return Ok(false);
        }
        let (pending, residual) = self.advance("mlp parts", hidden, a.norm, clusters)?;
        let args = MlpArgs {
            residual,
            gate_up: tensor(a.gate_up).address(),
            down: tensor(a.down).address(),
            part: pending.added.address(),
            inner_total: inner_total as i32,
            gelu: i32::from(a.activation == Activation::GeluTanh),
        };
        // SAFETY: `MlpArgs` has the kernel's layout; shapes as `Backend::mlp` states.
        unsafe { self.device.launch_struct(function, shape, &args) }?;
        self.set_pending(pending)?;
        Ok(true)
    }

    /// Makes the residual stream what the engine thinks it is.
    pub(crate) fn settle(&self) -> Result<()> {
        let Some(p) = self.pending()?.take() else { return Ok(()) };
        let count = p.hidden.elements();
        let shape = Launch::new(count.div_ceil(512), 256);
        self.simple("add_parts", shape, args![&p.x, &p.added, p.parts, count, &p.hidden])
    }

    fn can_fuse(&self, hidden: &Tensor, clusters: usize) -> bool {
        self.fuses()
            && self.card().fuses_layers()
            && self.products() == Products::Own
            && hidden.dim(0) <= ROWS
            && clusters <= PARTS_MAX
            && clusters * CLUSTER <= self.device.multiprocessors
    }

    /// The stream as the next kernel finds it, and as that kernel leaves it.
    fn advance(
        &self,
        parts_name: &'static str,
        hidden: &Tensor,
        norm: &Norm,
        parts: usize,
    ) -> Result<(Pending, Residual)> {
        let (rows, width) = (hidden.dim(0), hidden.row_len());
        let mine = |p: &Pending| p.hidden.address() == hidden.address() && p.hidden.dim(0) == rows;
        if !self.pending()?.as_ref().is_some_and(mine) {
            self.settle()?;
        }
        let before = self.pending()?.take();
        let x = before.as_ref().map_or(hidden, |p| &p.x);
        let added = self.scratch(parts_name, DType::F32, &[PARTS_MAX, ROWS, width])?;
        // Blocks still read the stream while others write it: it goes to and fro between two places.
        let spare = self.scratch("residual", self.dtype(), &[ROWS, width])?.first(rows);
        let out = if x.address() == hidden.address() { spare } else { hidden.clone() };
        let (norm, eps, shift) = norm_args(Some(norm));
        let residual = Residual {
            x: x.address(),
            // The kernel reads here even where nothing is to be added.
            added: before.as_ref().map_or(&added, |p| &p.added).address(),
            out: out.address(),
            norm,
            rows: rows as i32,
            hidden: width as i32,
            parts: before.as_ref().map_or(0, |p| p.parts) as i32,
            eps,
            shift,
        };
        Ok((Pending { hidden: hidden.clone(), x: out, added, parts }, residual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_layers_of_small_models_fit() {
        // Qwen3-0.6B.
        let heads = Heads { q: 16, kv: 8, dim: 128 };
        let attend = Block::attend(1024, heads).unwrap();
        let (clusters, mlp) = Block::mlp(1024, 3072, 7).unwrap();
        assert_eq!((attend.first, attend.second, attend.late), (4, 8, 18));
        assert_eq!((clusters, mlp.first, mlp.second), (7, 7, 8));
        // What finds room in shared memory.
        let (clusters, mlp) = Block::mlp(512, 1024, 7).unwrap();
        assert_eq!((clusters, mlp.first, mlp.second), (6, 3, 4));
        // Qwen3-1.7B's MLP, SmolLM2's width, heads that do not divide.
        assert_eq!(Block::mlp(2048, 6144, 7), None);
        assert_eq!(Block::mlp(576, 1536, 7), None);
        assert_eq!(Block::attend(1024, Heads { q: 8, kv: 8, dim: 64 }), None);
    }
}
