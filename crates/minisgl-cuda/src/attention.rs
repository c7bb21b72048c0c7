//! Paged attention: decode rows split along their context, the others in tiles of queries.

use minisgl_tensor::{Attention, DType, Heads, Result, RopeStore, Tensor};

use crate::backend::{CudaBackend, norm_args};
use crate::choice::{Card, PrefillKernel, check_heads};
use crate::device::{Launch, address_of};
use crate::kernels::{Key, Module};
use crate::tiles::Matrix;

/// As `Args` in `kernels/attention.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    qkv: u64,
    k_pages: u64,
    v_pages: u64,
    out: u64,
    slots: u64,
    query_start: u64,
    kv_len: u64,
    page_table: u64,
    partial: u64,
    arrived: u64,
    first_row: i32,
    pages_a_row: i32,
    page_size: i32,
    q_heads: i32,
    kv_heads: i32,
    splits: i32,
    splits_wanted: i32,
    page_shift: i32,
    window: i32,
    scale: f32,
    soft_cap: f32,
}

impl CudaBackend {
    /// The decode rows in one kernel where the card can, the others one operation after the other.
    pub(crate) fn rope_attention_op(
        &self,
        store: &RopeStore<'_>,
        a: &Attention<'_>,
        qkv: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let decode_rows = if self.takes_decode(a) { a.batch.decode_rows } else { 0 };
        // Where one kernel takes all other rows, it rotates their Q as it fetches it.
        let rotates_q = decode_rows < a.batch.rows && self.prefills_from(decode_rows, a);
        let planned = (decode_rows > 0)
            .then(|| self.plan_decode(store, a, qkv, out, rotates_q))
            .transpose()?;
        let decode = || planned.iter().try_for_each(|planned| self.decode(planned));
        if !rotates_q {
            decode()?;
        }
        let first_head = if rotates_q { a.heads.q } else { 0 };
        self.rope_store_op(store, decode_rows, first_head, qkv)?;
        self.attention_from(decode_rows, a, rotates_q.then_some(store), qkv, out)?;
        // Prompts that only fill a step up keep few multiprocessors busy, and compute where decodes read memory.
        if rotates_q { decode() } else { Ok(()) }
    }

    /// Attention of the rows from `first_row` on. Their Q is rotated already, or `kernels/prefill.cu` takes
    /// them all and rotates it as `store` says.
    pub(crate) fn attention_from(
        &self,
        first_row: usize,
        a: &Attention<'_>,
        store: Option<&RopeStore<'_>>,
        qkv: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let (batch, heads) = (a.batch, a.heads);
        if first_row == batch.rows {
            return Ok(());
        }
        let group = heads.q / heads.kv;
        check_heads(heads)?;
        let mut args = Args {
            qkv: qkv.address(),
            k_pages: a.kv.k.address(),
            v_pages: a.kv.v.address(),
            out: out.address(),
            slots: batch.slots.address(),
            query_start: batch.query_start.address(),
            kv_len: batch.kv_len.address(),
            page_table: batch.page_table.address(),
            partial: 0,
            arrived: 0,
            first_row: 0,
            pages_a_row: batch.page_table.row_len() as i32,
            page_size: batch.page_size as i32,
            q_heads: heads.q as i32,
            kv_heads: heads.kv as i32,
            splits: 1,
            splits_wanted: 1,
            page_shift: if batch.page_size.is_power_of_two() {
                batch.page_size.ilog2() as i32
            } else {
                -1
            },
            window: a.window.map_or(0, |w| w as i32),
            scale: a.scale,
            soft_cap: a.soft_cap.unwrap_or(0.0),
        };
        let decode_rows = self.split_rows(a);
        if decode_rows > first_row {
            self.split_decode(&mut args, decode_rows, heads)?;
        }
        let first_row = first_row.max(decode_rows);
        let rows = batch.rows - first_row;
        if rows == 0 {
            return Ok(());
        }
        args.first_row = first_row as i32;
        if self.prefills_from(first_row, a) {
            return self.prefill(a, &args, &Rotation::of_q(store), rows);
        }
        let longest = batch.extend_len_max.max(1);
        let (module, defines) = tiled_variant(heads);
        let function = self.kernels.get(module, &defines, "attention")?;
        let blocks = if self.exact {
            (longest * heads.q).div_ceil(4)
        } else {
            (longest * group).div_ceil(64) * heads.kv
        };
        let shape = Launch { grid: [blocks, 1, rows], threads: 128, shared: 0, cluster: 1 };
        // SAFETY: `Args` has the kernel's layout; its addresses are the step's tensors.
        unsafe { self.device.launch_struct(function, shape, &args) }
    }

    /// The decode rows that go another way than those of many tokens.
    fn split_rows(&self, a: &Attention<'_>) -> usize {
        if decodes_as_prefill(self.card(), a.heads) { 0 } else { a.batch.decode_rows }
    }

    /// Whether `kernels/prefill.cu` takes all rows from `first_row` on.
    fn prefills_from(&self, first_row: usize, a: &Attention<'_>) -> bool {
        first_row >= self.split_rows(a)
            && self.attention.prefill != PrefillKernel::Mma
            && self.card().prefills_by_warpgroups(a.heads, a.batch.page_size)
    }

    fn split_decode(&self, args: &mut Args, rows: usize, heads: Heads) -> Result<()> {
        let (kv_heads, dim) = (heads.kv, heads.dim);
        let units = rows * kv_heads;
        // Two blocks a multiprocessor are resident. Long rows may use up to `splits`; what a shorter
        // one does not need of the grid ends at once.
        let wanted = (self.device.multiprocessors * 2 / units).clamp(1, 64);
        let splits = wanted.clamp(8, 64);
        args.splits = splits as i32;
        args.splits_wanted = wanted as i32;
        args.partial =
            self.scratch("attention", DType::F32, &[units * splits * 16 * (dim + 2)])?.address();
        args.arrived = self.scratch("attention arrivals", DType::I32, &[units])?.address();
        let (module, defines) = split_variant(heads);
        let function = self.kernels.get(module, &defines, "attention")?;
        let shape = Launch { grid: [kv_heads, splits, rows], threads: 128, shared: 0, cluster: 1 };
        // SAFETY: as in `attention_from`.
        unsafe { self.device.launch_struct(function, shape, args) }
    }

    fn prefill(
        &self,
        a: &Attention<'_>,
        args: &Args,
        rotation: &Rotation,
        rows: usize,
    ) -> Result<()> {
        let heads = a.heads;
        let cache_rows = a.kv.k.elements() / heads.dim;
        let (k, v) = (page_matrix(&a.kv.k, a, 128).map()?, page_matrix(&a.kv.v, a, 128).map()?);
        let pairs = a.batch.extend_len_max.max(1) * (heads.q / heads.kv);
        let items = pairs.div_ceil(PAIRS) * rows * heads.kv;
        let row_bytes = a.batch.kv_len_max.max(1) * heads.kv * heads.dim * 2 * size_of::<u16>();
        let section = (SECTION_BYTES / row_bytes).clamp(1, rows);
        let shared_out = Items { count: items as i32, rows: rows as i32, section: section as i32 };
        let nowhere = cache_rows as i32;
        // The kernel leaves it at zero.
        let asked = self.scratch("prefill items", DType::I32, &[1])?;
        let args = Args { arrived: asked.address(), ..*args };
        let (module, defines) = prefill_variant(heads, a.soft_cap.is_some());
        let function = self.kernels.get(module, &defines, "prefill")?;
        let shape = Launch {
            grid: [items.min(self.device.multiprocessors), 1, 1],
            threads: 384,
            // Two items' Q, two tiles of K and three of V, and room to align them.
            shared: 7 * PAIRS * heads.dim * 2 + 1024,
            cluster: 1,
        };
        let mut words = [
            address_of(&k),
            address_of(&v),
            address_of(&args),
            address_of(rotation),
            address_of(&shared_out),
            address_of(&nowhere),
        ];
        // SAFETY: the kernel's parameters in order; the maps cover the cache, the rest is the step's.
        unsafe { self.device.launch_raw(function, shape, &mut words) }
    }
}

/// Whether rows of one token go the way of those of many: the decode kernels hold one token's whole
/// group in a tile of 16.
pub(crate) fn decodes_as_prefill(card: Card, heads: Heads) -> bool {
    card.exact || heads.q / heads.kv > 16
}

/// The variants of `kernels/attention.cu` for rows of many tokens, and of one.
pub(crate) fn tiled_variant(heads: Heads) -> Key {
    (Module::Attention, vec![("DIM", heads.dim as i32), ("DECODE", 0)])
}

pub(crate) fn split_variant(heads: Heads) -> Key {
    let halves = if heads.q / heads.kv <= 8 { 1 } else { 2 };
    (Module::Attention, vec![("DIM", heads.dim as i32), ("DECODE", 1), ("HALVES", halves)])
}

/// The variant of `kernels/prefill.cu`.
pub(crate) fn prefill_variant(heads: Heads, soft_cap: bool) -> Key {
    let (dim, group) = (heads.dim as i32, (heads.q / heads.kv) as i32);
    let defines = vec![("DIM", dim), ("GROUP", group), ("SOFT_CAP", i32::from(soft_cap))];
    (Module::Prefill, defines)
}

/// K or V as the bulk copy engine sees it: boxes of a page, or of so many of its rows.
pub(crate) fn page_matrix(pages: &Tensor, a: &Attention<'_>, box_rows_max: usize) -> Matrix {
    Matrix {
        address: pages.address(),
        rows: pages.elements() / a.heads.dim,
        cols: a.heads.dim,
        box_rows: a.batch.page_size.min(box_rows_max),
    }
}

/// As `Rotation` in `kernels/prefill.cu`.
#[repr(C)]
#[derive(Default)]
struct Rotation {
    angles: u64,
    weight: u64,
    eps: f32,
    shift: f32,
}

impl Rotation {
    /// None: Q is rotated already.
    fn of_q(store: Option<&RopeStore<'_>>) -> Self {
        let Some(store) = store else { return Self::default() };
        let (weight, eps, shift) = norm_args(store.q_norm);
        Self { angles: store.rope.address(), weight, eps, shift }
    }
}

/// As `Items` in `kernels/prefill.cu`.
#[repr(C)]
struct Items {
    count: i32,
    rows: i32,
    section: i32,
}

/// K and V that `kernels/prefill.cu` works on at a time: what an H200's L2 cache of 50 MB keeps beside the rest.
const SECTION_BYTES: usize = 32 << 20;

/// (token, head of the group) pairs that `kernels/prefill.cu` takes at once.
const PAIRS: usize = 128;

/// Whether K and V can be fetched in whole boxes of swizzled rows.
pub(crate) fn takes_tiles(heads: Heads, page_size: usize) -> bool {
    matches!(heads.dim, 64 | 128) && page_size.is_power_of_two() && page_size >= 8
}
