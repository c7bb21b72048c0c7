//! Attention over pages: online softmax (Milakov and Gimelshein, 2018) over tiles of 64 keys that
//! begin at fixed positions, so that a token's result does not depend on what is computed beside
//! it, nor on whether it is prefilled or decoded.
//!
//! A work item is a few tokens of a row with all query heads that share a K and V head. The context
//! is cut into spans of 256 keys, each reduced by itself and merged in order: long contexts of few
//! requests are split along it. `reduce` computes an item; `forms` has the two kinds of products it
//! can be made of.

mod forms;
mod reduce;

use half::f16;
use minisgl_tensor::{Attention, DType, Tensor};

use crate::backend::Machine;
use crate::memory::{Shared, view};
use crate::pool::{PerThread, Pool};
use crate::simd::{Kernel, LANES, Simd};
use forms::{Floats, Pairs};
use reduce::{Reduce, State, ThreadScratch};

/// Keys in a tile.
const TILE: usize = 64;
/// Keys that are reduced before they are merged with what came before.
const SPAN: usize = 256;
/// Rows of queries, about, in an item.
const QUERIES: usize = 96;

/// Buffers that outlive an operation.
pub struct Scratch {
    threads: PerThread<ThreadScratch>,
    items: Vec<Item>,
    /// The first of each run of items with the same queries.
    firsts: Vec<usize>,
    partial: Vec<f32>,
}

impl Scratch {
    /// For the threads of `pool`.
    pub fn new(pool: &Pool) -> Self {
        let (items, firsts, partial) = Default::default();
        Self { threads: PerThread::new(pool), items, firsts, partial }
    }
}

/// Some tokens of a row, one K and V head, some spans of its keys.
#[derive(Clone, Copy)]
struct Item {
    row: usize,
    kv_head: usize,
    first_token: usize,
    tokens: usize,
    /// Position of `first_token`.
    position: usize,
    /// Spans to reduce.
    first_span: usize,
    spans: usize,
    /// Where the span's state goes if it is not to be finished: in `partial`.
    partial: Option<usize>,
}

struct Step<'a> {
    args: &'a Attention<'a>,
    qkv: &'a [f32],
    slots: &'a [i32],
    table: &'a [i32],
    out: Shared<'a, f32>,
}

/// See `Backend::attention`.
pub fn attention(
    on: &Machine,
    scratch: &mut Scratch,
    args: &Attention<'_>,
    qkv: &Tensor,
    out: &Tensor,
) {
    let step = Step {
        args,
        qkv: view(qkv),
        slots: view(&args.batch.slots),
        table: view(&args.batch.page_table),
        out: Shared::of(out),
    };
    let size = step.plan(on, scratch);
    let Scratch { threads, items, firsts, partial } = scratch;
    partial.resize(size.max(partial.len()), 0.0);
    let partial = Shared::of_slice(partial);
    on.pool.run(items.len(), &|thread, index| {
        // SAFETY: this thread's, and operations run one at a time.
        let own = unsafe { threads.get(thread) };
        let item = items[index];
        let (step, isa) = (&step, on.isa);
        match args.kv.k.dtype() {
            DType::F16 if isa.has_unit() => {
                isa.run(Reduce::<Pairs, f16>::new(step, item, own, partial));
            }
            DType::F16 => isa.run(Reduce::<Floats, f16>::new(step, item, own, partial)),
            _ => isa.run(Reduce::<Floats, f32>::new(step, item, own, partial)),
        }
    });
    if size == 0 {
        return;
    }
    let first = |&i: &usize| {
        items[i].partial.is_some() && (i == 0 || !items[i].same_queries(&items[i - 1]))
    };
    firsts.clear();
    firsts.extend((0..items.len()).filter(first));
    let width = step.state_width();
    on.pool.run(firsts.len(), &|thread, index| {
        // SAFETY: as above.
        let own = unsafe { threads.get(thread) };
        let (first, start) = (firsts[index], items[firsts[index]].partial.unwrap_or(0));
        let count = items[first..].iter().take_while(|i| i.same_queries(&items[first])).count();
        // SAFETY: nobody writes partial states any more.
        let states = unsafe { partial.part(start, count * width) };
        on.isa.run(Merge { step: &step, item: items[first], own, states, width });
    });
}

impl Item {
    fn same_queries(&self, other: &Item) -> bool {
        (self.row, self.kv_head, self.first_token) == (other.row, other.kv_head, other.first_token)
    }
}

impl Step<'_> {
    fn group(&self) -> usize {
        self.args.heads.q / self.args.heads.kv
    }

    fn dim_vectors(&self) -> usize {
        self.args.heads.dim.div_ceil(LANES)
    }

    /// Floats of a partial state: maximums, sums, outputs.
    fn state_width(&self) -> usize {
        self.group() * (2 + self.dim_vectors() * LANES)
    }

    /// Lists the items; returns the floats that partial states take.
    fn plan(&self, on: &Machine, scratch: &mut Scratch) -> usize {
        let batch = self.args.batch;
        let starts = view::<i32>(&batch.query_start);
        let lens = view::<i32>(&batch.kv_len);
        let tokens_max = (QUERIES / self.group()).max(1);
        scratch.items.clear();
        for row in (0..batch.rows).filter(|&row| lens[row] > 0) {
            let (start, end) = (starts[row] as usize, starts[row + 1] as usize);
            let base = (lens[row] as usize).saturating_sub(end - start);
            // Later tokens have more keys: first come the longest.
            for first_token in (start..end).step_by(tokens_max).rev() {
                let tokens = tokens_max.min(end - first_token);
                let position = base + first_token - start;
                let first_key =
                    self.args.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let first_span = first_key / SPAN;
                let spans = (position + tokens).div_ceil(SPAN) - first_span;
                scratch.items.extend((0..self.args.heads.kv).map(|kv_head| Item {
                    row,
                    kv_head,
                    first_token,
                    tokens,
                    position,
                    first_span,
                    spans,
                    partial: None,
                }));
            }
        }
        if on.pool.threads() == 1 || scratch.items.len() >= 4 * on.pool.threads() {
            return 0;
        }
        // Few items: a span each, for those of a single token.
        let whole = std::mem::take(&mut scratch.items);
        let mut size = 0;
        for item in whole {
            if item.tokens > 1 || item.spans == 1 {
                scratch.items.push(item);
                continue;
            }
            for span in item.first_span..item.first_span + item.spans {
                scratch.items.push(Item {
                    first_span: span,
                    spans: 1,
                    partial: Some(size),
                    ..item
                });
                size += self.state_width();
            }
        }
        size
    }

    fn finish(&self, item: &Item, state: &State) {
        let (dim, group) = (self.args.heads.dim, self.group());
        for query in 0..item.tokens * group {
            let token = item.first_token + query / group;
            let head = item.kv_head * group + query % group;
            // SAFETY: each token's head belongs to one item.
            let out = unsafe { self.out.part((token * self.args.heads.q + head) * dim, dim) };
            let vectors = self.dim_vectors();
            let sums = state.out[query * vectors..][..vectors].as_flattened();
            let factor = state.sum[query].recip();
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * factor;
            }
        }
    }
}

/// Merges the states of a query's spans.
struct Merge<'a> {
    step: &'a Step<'a>,
    item: Item,
    own: &'a mut ThreadScratch,
    states: &'a [f32],
    width: usize,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let queries = self.step.group();
        self.own.total.reset(queries, self.step.dim_vectors());
        for state in self.states.chunks_exact(self.width) {
            let (max, rest) = state.split_at(queries);
            let (sum, out) = rest.split_at(queries);
            self.own.total.merge((max, sum, out.as_chunks().0));
        }
        self.step.finish(&self.item, &self.own.total);
    }
}
