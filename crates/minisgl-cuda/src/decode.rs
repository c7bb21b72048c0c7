//! A decode step's rotation, write and attention in one kernel, on cards with the bulk copy engine.

use std::sync::{Mutex, MutexGuard, PoisonError};

use minisgl_tensor::{Attention, DType, Heads, Result, RopeStore, Tensor};

use crate::attention::page_matrix;
use crate::backend::{CudaBackend, norm_args};
use crate::choice::{Card, DecodeKernel};
use crate::device::{Function, Launch, Start, address_of, fail};
use crate::kernels::{Key, Module};
use crate::tiles::TensorMap;

/// As `Args` in `kernels/decode.cu`.
#[repr(C)]
struct Args {
    qkv: u64,
    k_pages: u64,
    v_pages: u64,
    out: u64,
    slots: u64,
    kv_len: u64,
    page_table: u64,
    store_at: u64,
    rope: u64,
    q_norm: u64,
    k_norm: u64,
    partial: u64,
    arrived: u64,
    plan: u64,
    entries: u64,
    rows: i32,
    pages_a_row: i32,
    page_shift: i32,
    q_heads: i32,
    kv_heads: i32,
    stages: i32,
    window: i32,
    wait: Wait,
    q_eps: f32,
    q_shift: f32,
    k_eps: f32,
    k_shift: f32,
    scale: f32,
    soft_cap: f32,
    ahead: i32,
    /// From here on for lots of rows that share a prefix; the kernel without them takes what is above.
    lots: Lots,
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Lots {
    rows: u64,
    tokens: u64,
    covered: u64,
    halves: u64,
    joined: u64,
    count: i32,
    size: i32,
}

/// As in `kernels/decode_work.cuh`.
#[repr(i32)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    First,
    Fetching,
    Last,
}

/// As in `kernels/decode.cu`.
const TILE: usize = 16;
const ROWS_MAX: usize = 512;
const CASCADE_ROWS_MAX: usize = 256;
const STAGES_MAX: usize = 48;
/// Bytes of an `Entry`, and of a `BlockPlan` with the places that it has for each fetching warp.
const ENTRY_BYTES: usize = 16;
const BLOCK_PLAN_BYTES: usize = 64;
const PLACES_BYTES: usize = 32 * 4;
/// A product has so many rows: a group has no more heads.
const GROUP_MAX: usize = 16;
/// Tiles in shared memory, two for each warp where heads have 128 dimensions, and of these on their way at once: an H200's
/// memory served 64 KiB a multiprocessor 4% faster than 128 (h200-operations.md).
const TILE_BYTES: usize = 128 << 10;
const AHEAD_BYTES: usize = 80 << 10;
/// What a block can have, less what the kernel has of its own.
const SHARED_BYTES: usize = 217 << 10;

/// A block's warps that sum and that fetch, as in `kernels/decode.cu`, and its shared memory.
struct Block {
    warps: usize,
    fetchers: usize,
    stages: usize,
    ahead: usize,
    shared: usize,
}

impl Block {
    /// For units of up to `heads` query heads of `dim`. None where they are too large.
    fn new(heads: usize, dim: usize, capability: (i32, i32)) -> Option<Self> {
        let warps = if dim <= 128 && capability.0 < 10 { 8 } else { 6 };
        let behind = 2 * 8 * halves(heads) * (dim + 8) * 2 + warps * heads * (dim + 4) * 4 + 1024;
        let stage = 2 * TILE * dim * 2;
        let bytes = TILE_BYTES.max(stage * warps).min(SHARED_BYTES.checked_sub(behind)?);
        // A stage is always the same warp's: it knows by itself what became of the tile before.
        let stages = (bytes / stage).min(STAGES_MAX) / warps * warps;
        let fetchers = if capability.0 < 10 { 2 } else { 1 };
        // What a fetching warp waits for is a tile of its own.
        let ahead = (AHEAD_BYTES / stage).min(stages) / fetchers * fetchers;
        let shared = stages * stage + behind;
        (stages > 0).then_some(Self { warps, fetchers, stages, ahead, shared })
    }
}

/// A launch of `decode` behind its plan.
pub(crate) struct PlannedDecode {
    function: Function,
    maps: [TensorMap; 4],
    shape: Launch,
    start: Start,
    args: Args,
}

/// What a plan depends on: all that `divide` and `find` in `kernels/decode_work.cuh` read.
#[derive(Clone, PartialEq, Eq)]
struct PlanKey {
    heads: Heads,
    window: Option<usize>,
    rows: usize,
    page_size: usize,
    pages_a_row: usize,
    kv_len: u64,
    slots: u64,
    page_table: u64,
    lots: Lots,
}

/// How decode divides its work, planned once in a forward pass for all layers whose heads and window are alike.
#[derive(Default)]
pub(crate) struct Plans(Mutex<PlansState>);

#[derive(Default)]
struct PlansState {
    /// Those of the pass that has begun. None where none has: what a plan depends on may change then.
    made: Option<Vec<PlanKey>>,
    /// Of a pass's first plan, its second, and so on: all of one size. Captured graphs point here.
    memory: Vec<Tensor>,
}

impl Plans {
    /// From here on, lengths and pages stay as they are.
    pub(crate) fn begin_pass(&self) {
        self.state().made = Some(vec![]);
    }

    /// From here on, they may change.
    pub(crate) fn end_pass(&self) {
        self.state().made = None;
    }

    fn state(&self) -> MutexGuard<'_, PlansState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the pass has this plan, and whether it is still to be made.
    fn find(
        &self,
        key: PlanKey,
        allocate: impl FnOnce() -> Result<Tensor>,
    ) -> Result<(Tensor, bool)> {
        let PlansState { made, memory } = &mut *self.state();
        if let Some(i) = made.iter().flatten().position(|made| *made == key) {
            return Ok((memory[i].clone(), false));
        }
        let i = made.as_ref().map_or(0, Vec::len);
        if i == memory.len() {
            memory.push(allocate()?);
        }
        made.iter_mut().for_each(|made| made.push(key.clone()));
        Ok((memory[i].clone(), true))
    }
}

/// Tokens in all, and for each row, that lots must spare a step to make up for rows in two halves. Without
/// lots, what is shared comes from the L2 cache as long as it is short. Measured on an H200: see
/// `docs/benchmarks/h200-engine.md`.
const SPARED_MIN: usize = 48 << 10;
const SPARED_A_ROW_MIN: usize = 800;

fn spares_enough(rows: usize, spared: usize) -> bool {
    spared >= SPARED_MIN && spared >= SPARED_A_ROW_MIN * rows
}

/// Of a product's 16 rows, how many times 8 so many heads take.
fn halves(heads: usize) -> usize {
    heads.div_ceil(8)
}

/// The variant of the kernel: for rows each by itself, or for lots of rows, too.
pub(crate) fn stream_variant(Heads { q, kv, dim }: Heads, soft_cap: bool, cascade: bool) -> Key {
    let halves = if cascade { 2 } else { halves(q / kv) };
    let mut defines =
        vec![("DIM", dim as i32), ("HALVES", halves as i32), ("SOFT_CAP", i32::from(soft_cap))];
    defines.extend(cascade.then_some(("CASCADE", 1)));
    (Module::Decode, defines)
}

impl Card {
    /// Whether `kernels/decode.cu` can take such heads and pages at all.
    pub(crate) fn streams_decode(self, heads: Heads, page_size: usize) -> bool {
        let group = heads.q / heads.kv;
        !self.exact
            // 12.0 has too little shared memory.
            && matches!(self.capability.0, 9 | 10)
            && matches!(heads.dim, 64 | 128 | 256)
            && group <= GROUP_MAX
            && page_size.is_power_of_two()
            && page_size >= TILE
            && Block::new(group, heads.dim, self.capability).is_some()
    }

    /// Whether it can take several rows at once through a prefix that they share.
    pub(crate) fn cascades(self, heads: Heads, page_size: usize) -> bool {
        self.streams_decode(heads, page_size)
            && lot_size(heads) > 1
            && Block::new(GROUP_MAX, heads.dim, self.capability).is_some()
    }
}

/// Rows whose groups fill the 16 rows of a product.
fn lot_size(heads: Heads) -> usize {
    GROUP_MAX / (heads.q / heads.kv)
}

impl CudaBackend {
    /// Whether `kernels/decode.cu` takes a step's decode rows.
    pub(crate) fn takes_decode(&self, a: &Attention<'_>) -> bool {
        self.attention.decode != DecodeKernel::Split
            && self.card().streams_decode(a.heads, a.batch.page_size)
            && a.batch.decode_rows <= ROWS_MAX
    }

    /// As `Backend::prefix_rows_max`.
    pub(crate) fn lot_size(&self, heads: Heads) -> usize {
        // That the pages are what it takes was made sure of at the start.
        let can = self.card().cascades(heads, TILE);
        let wanted = matches!(self.attention.decode, DecodeKernel::Auto | DecodeKernel::Cascade);
        if wanted && can { lot_size(heads) } else { 1 }
    }

    /// As `Backend::prefixes_pay`.
    pub(crate) fn lots_pay(&self, rows: usize, spared: usize) -> bool {
        self.attention.decode != DecodeKernel::Auto || spares_enough(rows, spared)
    }

    /// What the step's rows share, where its attention is to make use of that.
    fn lots(&self, a: &Attention<'_>) -> Result<Option<Lots>> {
        let (Heads { q, dim, .. }, rows) = (a.heads, a.batch.decode_rows);
        let Some(shared) = &a.batch.shared else { return Ok(None) };
        let size = shared.rows.row_len();
        // A window leaves out most of what is shared.
        if rows > CASCADE_ROWS_MAX || a.window.is_some() || size != self.lot_size(a.heads) {
            return Ok(None);
        }
        let halves = self.scratch("cascade halves", DType::F32, &[rows * q * 2 * (dim + 4)])?;
        let joined = self.scratch("cascade joins", DType::I32, &[rows * q])?;
        Ok(Some(Lots {
            rows: shared.rows.address(),
            tokens: shared.tokens.address(),
            covered: shared.covered.address(),
            halves: halves.address(),
            joined: joined.address(),
            count: shared.tokens.elements() as i32,
            size: size as i32,
        }))
    }

    /// The first `decode_rows` rows of a step, each of one token: plans how they are divided, where that is still to be
    /// done. With `beside_prefill`, `kernels/prefill.cu` is enqueued in between.
    pub(crate) fn plan_decode(
        &self,
        store: &RopeStore<'_>,
        a: &Attention<'_>,
        qkv: &Tensor,
        out: &Tensor,
        beside_prefill: bool,
    ) -> Result<PlannedDecode> {
        let (batch, Heads { q, kv, dim }) = (a.batch, a.heads);
        let (rows, blocks) = (batch.decode_rows, self.device.multiprocessors);
        let lots = self.lots(a)?;
        let (module, defines) = stream_variant(a.heads, a.soft_cap.is_some(), lots.is_some());
        let unit_heads = if lots.is_some() { GROUP_MAX } else { q / kv };
        let lots = lots.unwrap_or_default();
        let units = (rows + lots.count as usize) * kv;
        let Block { warps, fetchers, stages, ahead, shared } =
            Block::new(unit_heads, dim, self.device.capability)
                .ok_or_else(|| fail(format!("{:?} do not fit the decode kernel", a.heads)))?;
        let key = PlanKey {
            heads: a.heads,
            window: a.window,
            rows,
            page_size: batch.page_size,
            pages_a_row: batch.page_table.row_len(),
            kv_len: batch.kv_len.address(),
            slots: batch.slots.address(),
            page_table: batch.page_table.address(),
            lots,
        };
        let block_plans = blocks * (BLOCK_PLAN_BYTES + fetchers * PLACES_BYTES);
        let plan_bytes = block_plans + (ROWS_MAX + 1) * ENTRY_BYTES;
        let (plan, is_new) =
            self.plans.find(key, || self.alloc_tensor(DType::U8, &[plan_bytes]))?;
        let (q_norm, q_eps, q_shift) = norm_args(store.q_norm);
        let (k_norm, k_eps, k_shift) = norm_args(store.k_norm);
        let args = Args {
            qkv: qkv.address(),
            k_pages: a.kv.k.address(),
            v_pages: a.kv.v.address(),
            out: out.address(),
            slots: batch.slots.address(),
            kv_len: batch.kv_len.address(),
            page_table: batch.page_table.address(),
            store_at: batch.store_at.address(),
            rope: store.rope.address(),
            q_norm,
            k_norm,
            partial: self.scratch("decode", DType::F32, &[blocks * 2 * 16 * (dim + 4)])?.address(),
            arrived: self.scratch("decode arrivals", DType::I32, &[units * GROUP_MAX])?.address(),
            plan: plan.address(),
            entries: plan.address() + block_plans as u64,
            rows: rows as i32,
            pages_a_row: batch.page_table.row_len() as i32,
            page_shift: batch.page_size.ilog2() as i32,
            q_heads: q as i32,
            kv_heads: kv as i32,
            stages: stages as i32,
            window: a.window.map_or(0, |w| w as i32),
            wait: match self.device.is_capturing()? {
                _ if beside_prefill => Wait::Last,
                true => Wait::Fetching,
                false => Wait::First,
            },
            q_eps,
            q_shift,
            k_eps,
            k_shift,
            scale: a.scale,
            soft_cap: a.soft_cap.unwrap_or(0.0),
            ahead: ahead as i32,
            lots,
        };
        if is_new {
            let function = self.kernels.get(module, &defines, "plan")?;
            let shape = Launch::new(blocks, 32 * fetchers);
            // SAFETY: `Args` has the kernel's layout; its addresses are the step's tensors.
            unsafe { self.device.launch_struct(function, shape, &args) }?;
        }
        let tiles = |pages| page_matrix(pages, a, TILE).map_parts(dim / 64);
        let halves = |pages| page_matrix(pages, a, TILE / 2).map_parts(1);
        Ok(PlannedDecode {
            function: self.kernels.get(module, &defines, "decode")?,
            maps: [tiles(&a.kv.k)?, tiles(&a.kv.v)?, halves(&a.kv.k)?, halves(&a.kv.v)?],
            shape: Launch {
                grid: [blocks, 1, 1],
                threads: 32 * (warps + fetchers + 1),
                shared,
                cluster: 1,
            },
            // In a graph, decode reads its plan before it waits for what is in front.
            start: if is_new && !beside_prefill { Start::Behind } else { Start::Early },
            args,
        })
    }

    pub(crate) fn decode(&self, planned: &PlannedDecode) -> Result<()> {
        let PlannedDecode { function, maps: [k, v, half_k, half_v], shape, start, args } = planned;
        let [k, v, half_k, half_v] = [k, v, half_k, half_v].map(address_of);
        let mut words = [k, v, half_k, half_v, address_of(args)];
        // SAFETY: the kernel's parameters in order; the maps cover the cache, the rest is the step's.
        unsafe { self.device.launch_when(*start, *function, *shape, &mut words) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use minisgl_tensor::Memory;

    use super::*;

    struct Somewhere(u64);

    impl Memory for Somewhere {
        fn address(&self) -> u64 {
            self.0
        }
        fn bytes(&self) -> usize {
            16
        }
    }

    #[test]
    fn a_pass_makes_each_plan_once() {
        let plans = Plans::default();
        let key = PlanKey {
            heads: Heads { q: 16, kv: 8, dim: 128 },
            window: None,
            rows: 64,
            page_size: 16,
            pages_a_row: 40,
            kv_len: 1,
            slots: 2,
            page_table: 3,
            lots: Lots::default(),
        };
        let windowed = PlanKey { window: Some(1024), ..key.clone() };
        let mut allocated = 0;
        let mut find = |key: &PlanKey| {
            let allocate = || {
                allocated += 1;
                Ok(Tensor::new(Arc::new(Somewhere(allocated)), DType::U8, &[16]))
            };
            let (plan, is_new) = plans.find(key.clone(), allocate).unwrap();
            (plan.address(), is_new)
        };
        assert_eq!([find(&key), find(&key)], [(1, true), (1, true)], "outside of a pass");
        for _ in 0..2 {
            plans.begin_pass();
            assert_eq!([find(&key), find(&windowed)], [(1, true), (2, true)]);
            assert_eq!([find(&key), find(&windowed)], [(1, false), (2, false)]);
        }
        plans.end_pass();
        assert_eq!(find(&key), (1, true));
    }

    /// Of Qwen3-0.6B's, in lots of eight rows: where `cascade` was faster than `stream` on an H200.
    #[test]
    fn rows_are_read_together_where_that_was_faster() {
        for (rows, shared, faster) in [
            (16, 1024, false),
            (16, 2048, false),
            (16, 4000, true),
            (64, 512, false),
            (64, 1024, true),
            (64, 2048, true),
            (64, 4000, true),
            (256, 512, false),
            (256, 1024, true),
            (256, 4000, true),
        ] {
            assert_eq!(spares_enough(rows, rows / 8 * 7 * shared), faster, "{rows} of {shared}");
        }
    }
}
