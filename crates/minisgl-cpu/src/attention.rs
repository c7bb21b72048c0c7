//! Attention over pages: online softmax (Milakov and Gimelshein, 2018) over tiles of 64 keys that
//! begin at fixed positions, so that a token's result does not depend on what is computed beside
//! it, nor on whether it is prefilled or decoded.
//!
//! A work item is a few tokens of a row with all query heads that share a K and V head. Keys are
//! turned on the way in, so that a vector holds a feature of 16 keys; then both products are those
//! of a tile of f32 weights (`kernels::plain`). The context is cut into spans of 256 keys, each
//! reduced by itself and merged in order: long contexts of few requests are split along it.

use half::f16;
use minisgl_tensor::{Attention, DType, Tensor};

use crate::backend::Machine;
use crate::kernels::{Element, by_fours, plain};
use crate::memory::{Shared, view};
use crate::pool::{PerThread, Pool};
use crate::simd::{Kernel, LANES, Simd, array, math};

/// Keys in a tile.
const TILE: usize = 64;
/// Keys that are reduced before they are merged with what came before.
const SPAN: usize = 256;
/// Rows of queries, about, in an item.
const QUERIES: usize = 48;

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

/// What one thread computes with.
#[derive(Default)]
struct ThreadScratch {
    /// `[TILE / 16][dim][16 keys]`.
    k: Vec<[f32; LANES]>,
    /// `[dim / 16][TILE][16 features]`.
    v: Vec<[f32; LANES]>,
    /// `[queries][dim]`, scaled.
    q: Vec<f32>,
    /// `[queries][TILE]`.
    scores: Vec<[f32; LANES]>,
    span: State,
    total: State,
}

/// Softmax under way: for every query the highest score, the sum of weights, the weighted sum.
#[derive(Default)]
struct State {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[queries][dim / 16][16]`.
    out: Vec<[f32; LANES]>,
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
    let f16 = args.kv.k.dtype() == DType::F16;
    on.pool.run(items.len(), &|thread, index| {
        // SAFETY: this thread's, and operations run one at a time.
        let own = unsafe { threads.get(thread) };
        let item = items[index];
        if f16 {
            on.isa.run(Reduce::<f16> { step: &step, item, own, partial, kv: pages(args) });
        } else {
            on.isa.run(Reduce::<f32> { step: &step, item, own, partial, kv: pages(args) });
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

fn pages<'a, E: Element>(args: &'a Attention<'_>) -> (&'a [E], &'a [E]) {
    (view(&args.kv.k), view(&args.kv.v))
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

impl State {
    fn reset(&mut self, queries: usize, vectors: usize) {
        self.max.clear();
        self.max.resize(queries, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(queries, 0.0);
        self.out.clear();
        self.out.resize(queries * vectors, [0.0; LANES]);
    }

    /// Adds what was reduced after it.
    #[inline(always)]
    fn merge(&mut self, later: (&[f32], &[f32], &[[f32; LANES]])) {
        let (max, sum, out) = later;
        let vectors = self.out.len() / self.max.len();
        for query in 0..self.max.len() {
            let top = self.max[query].max(max[query]);
            if top == f32::NEG_INFINITY {
                continue;
            }
            let (ours, theirs) = (math::exp(self.max[query] - top), math::exp(max[query] - top));
            self.max[query] = top;
            self.sum[query] = self.sum[query] * ours + sum[query] * theirs;
            let range = query * vectors..(query + 1) * vectors;
            let (own, other) = (&mut self.out[range.clone()], &out[range]);
            for (own, other) in own.as_flattened_mut().iter_mut().zip(other.as_flattened()) {
                *own = *own * ours + other * theirs;
            }
        }
    }
}

/// Reduces an item's spans.
struct Reduce<'a, E> {
    step: &'a Step<'a>,
    item: Item,
    own: &'a mut ThreadScratch,
    partial: Shared<'a, f32>,
    kv: (&'a [E], &'a [E]),
}

impl<E: Element> Kernel for Reduce<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (item, step) = (self.item, self.step);
        let (queries, vectors) = (item.tokens * step.group(), step.dim_vectors());
        self.load_queries();
        self.own.k.resize(TILE / LANES * step.args.heads.dim, [0.0; LANES]);
        self.own.v.resize(vectors * TILE, [0.0; LANES]);
        self.own.scores.resize(queries * TILE / LANES, [0.0; LANES]);
        self.own.total.reset(queries, vectors);
        for span in item.first_span..item.first_span + item.spans {
            self.own.span.reset(queries, vectors);
            let end = ((span + 1) * SPAN).min(item.position + item.tokens);
            for first in (span * SPAN..end).step_by(TILE) {
                self.load_keys(s, first, end.min(first + TILE));
                self.load_values(s, first, end.min(first + TILE));
                by_fours!(queries, |from, R| self.tile::<S, R>(s, from, first));
            }
            let ThreadScratch { span, total, .. } = &mut *self.own;
            total.merge((&span.max, &span.sum, &span.out));
        }
        match item.partial {
            None => step.finish(&item, &self.own.total),
            Some(at) => {
                // SAFETY: each item has a place of its own.
                let place = unsafe { self.partial.part(at, step.state_width()) };
                let (max, rest) = place.split_at_mut(queries);
                let (sum, out) = rest.split_at_mut(queries);
                max.copy_from_slice(&self.own.total.max);
                sum.copy_from_slice(&self.own.total.sum);
                out.copy_from_slice(self.own.total.out.as_flattened());
            }
        }
    }
}

impl<E: Element> Reduce<'_, E> {
    #[inline(always)]
    fn load_queries(&mut self) {
        let (heads, group) = (self.step.args.heads, self.step.group());
        self.own.q.clear();
        for token in self.item.first_token..self.item.first_token + self.item.tokens {
            let at = token * heads.qkv_width() + self.item.kv_head * group * heads.dim;
            let q = &self.step.qkv[at..][..group * heads.dim];
            self.own.q.extend(q.iter().map(|q| q * self.step.args.scale));
        }
    }

    /// Where position `at` of this row and head begins in the pages.
    #[inline(always)]
    fn place(&self, at: usize) -> usize {
        let (batch, heads) = (self.step.args.batch, self.step.args.heads);
        let slot = self.step.slots[self.item.row] as usize;
        let across = batch.page_table.dim(1);
        let page = self.step.table[slot * across + at / batch.page_size] as usize;
        ((page * heads.kv + self.item.kv_head) * batch.page_size + at % batch.page_size) * heads.dim
    }

    /// Fills `own.k`; keys from `end` on are zeros.
    #[inline(always)]
    fn load_keys<S: Simd>(&mut self, s: S, first: usize, end: usize) {
        let dim = self.step.args.heads.dim;
        for group in 0..TILE / LANES {
            let mut keys: [&[E]; LANES] = [&[]; LANES];
            for (i, key) in keys.iter_mut().enumerate() {
                let at = first + group * LANES + i;
                if at < end {
                    let place = self.place(at);
                    *key = &self.kv.0[place..][..dim];
                }
            }
            let out = &mut self.own.k[group * dim..][..dim];
            for (c, out) in out.chunks_mut(LANES).enumerate() {
                let rows = array!(LANES, s.splat(0.0), |i| load_part(s, keys[i], c * LANES));
                for (out, column) in out.iter_mut().zip(s.transpose(rows)) {
                    s.store(column, out);
                }
            }
        }
    }

    /// Fills `own.v`; values from `end` on are zeros.
    #[inline(always)]
    fn load_values<S: Simd>(&mut self, s: S, first: usize, end: usize) {
        let dim = self.step.args.heads.dim;
        for i in 0..TILE {
            let value: &[E] = match first + i < end {
                true => &self.kv.1[self.place(first + i)..][..dim],
                false => &[],
            };
            for c in 0..self.step.dim_vectors() {
                s.store(load_part(s, value, c * LANES), &mut self.own.v[c * TILE + i]);
            }
        }
    }

    /// One tile of keys from position `first` on, for queries `from..from + R`.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, from: usize, first: usize) {
        let (dim, vectors) = (self.step.args.heads.dim, self.step.dim_vectors());
        let ThreadScratch { k, v, q, scores, span, .. } = &mut *self.own;
        let groups = TILE / LANES;
        let scores = &mut scores[from * groups..][..R * groups];
        let q = array!(R, &[] as &[f32], |r| &q[(from + r) * dim..][..dim]);
        for group in 0..groups {
            let products = plain::<S, f32, R>(s, &k[group * dim..][..dim], q);
            for (r, product) in products.into_iter().enumerate() {
                s.store(product, &mut scores[r * groups + group]);
            }
        }
        let mut factors = [1.0; R];
        for r in 0..R {
            let position = self.item.position + (from + r) / self.step.group();
            let scores = scores[r * groups..][..groups].as_flattened_mut();
            let before = span.max[from + r];
            let top = weigh(self.step.args, scores, first, position, before);
            factors[r] = if top == before { 1.0 } else { math::exp(before - top) };
            span.max[from + r] = top;
            let mut lanes = [0.0; LANES];
            for scores in scores.as_chunks::<LANES>().0 {
                for (lane, score) in lanes.iter_mut().zip(scores) {
                    *lane += score;
                }
            }
            span.sum[from + r] = span.sum[from + r] * factors[r] + s.sum(s.load(&lanes));
        }
        let weights = array!(R, &[] as &[f32], |r| scores[r * groups..][..groups].as_flattened());
        for c in 0..vectors {
            let products = plain::<S, f32, R>(s, &v[c * TILE..][..TILE], weights);
            for (r, product) in products.into_iter().enumerate() {
                let out = &mut span.out[(from + r) * vectors + c];
                s.store(s.fma(s.load(out), s.splat(factors[r]), product), out);
            }
        }
    }
}

/// Sixteen elements of `row` from `at` on, zeros behind its end.
#[inline(always)]
fn load_part<S: Simd, E: Element>(s: S, row: &[E], at: usize) -> S::F32 {
    match row.get(at..at + LANES).and_then(|part| part.first_chunk()) {
        Some(part) => E::load(s, part),
        None => {
            let mut part: [E; LANES] = bytemuck::Zeroable::zeroed();
            let rest = row.get(at..).unwrap_or(&[]);
            part[..rest.len()].copy_from_slice(rest);
            E::load(s, &part)
        }
    }
}

/// Turns scores of the keys from `first` on into weights `e^(score − max)`, where `max` is the
/// highest score so far, and returns that. Keys that `position` does not see weigh 0.
#[inline(always)]
fn weigh(
    args: &Attention<'_>,
    scores: &mut [f32],
    first: usize,
    position: usize,
    before: f32,
) -> f32 {
    if let Some(cap) = args.soft_cap {
        scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
    }
    let oldest = args.window.map_or(0, |window| (position + 1).saturating_sub(window));
    if first < oldest || first + scores.len() > position + 1 {
        for (i, score) in scores.iter_mut().enumerate() {
            if !(oldest..=position).contains(&(first + i)) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    let mut most = [before; LANES];
    for scores in scores.as_chunks::<LANES>().0 {
        for (most, score) in most.iter_mut().zip(scores) {
            *most = most.max(*score);
        }
    }
    let top = most.into_iter().fold(before, f32::max);
    // With nothing to see yet, every weight is to be 0 and not undefined.
    let origin = if top == f32::NEG_INFINITY { 0.0 } else { top };
    for score in scores {
        *score = math::exp(*score - origin);
    }
    top
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
