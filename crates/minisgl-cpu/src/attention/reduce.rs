//! One item of attention.

use bytemuck::Pod;
use minisgl_tensor::Attention;

use super::forms::Form;
use super::{Item, SPAN, Step, TILE};
use crate::kernels::PANEL;
use crate::memory::{Shared, view};
use crate::simd::{Aligned, Kernel, LANES, Simd, array, math};

/// Vectors of a query's scores with a tile of keys.
pub const GROUPS: usize = TILE / LANES;

/// Scores of a panel of queries with a tile of keys: `[TILE / 16][query][16]`.
pub struct Scores(pub [Aligned<[[f32; LANES]; PANEL]>; GROUPS]);

impl Default for Scores {
    fn default() -> Self {
        Self([Aligned([[0.0; LANES]; PANEL]); GROUPS])
    }
}

/// What one thread computes with.
#[derive(Default)]
pub struct ThreadScratch {
    pub floats: super::forms::FloatScratch,
    pub pairs: super::forms::PairScratch,
    /// `[queries][dim]`, scaled.
    pub q: Vec<f32>,
    pub scores: Scores,
    pub span: State,
    pub total: State,
}

/// Softmax under way: for every query the highest score, the sum of weights, the weighted sum.
#[derive(Default)]
pub struct State {
    pub max: Vec<f32>,
    pub sum: Vec<f32>,
    /// `[queries][dim / 16][16]`.
    pub out: Vec<[f32; LANES]>,
    /// What `out` is yet to be multiplied with, a query each.
    pub factors: Vec<f32>,
}

impl State {
    pub fn reset(&mut self, queries: usize, vectors: usize) {
        self.max.clear();
        self.max.resize(queries, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(queries, 0.0);
        self.out.clear();
        self.out.resize(queries * vectors, [0.0; LANES]);
        self.factors.resize(queries, 1.0);
    }

    /// Adds what was reduced after it.
    #[inline(always)]
    pub fn merge(&mut self, later: (&[f32], &[f32], &[[f32; LANES]])) {
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

/// Where a tile's keys, and its values, begin in their pages.
struct Places {
    at: [usize; TILE],
    keys: usize,
}

impl Places {
    /// Groups of sixteen keys, with those that are empty beside others: values are multiplied by pairs
    /// of groups.
    fn groups(&self) -> usize {
        self.keys.div_ceil(2 * LANES) * 2
    }

    fn of(&self, group: usize) -> &[usize] {
        let end = self.keys.min((group + 1) * LANES);
        self.at.get(group * LANES..end).unwrap_or(&[])
    }
}

/// Reduces an item's spans, with products of the form `F` and pages of `E`.
pub struct Reduce<'a, F, E> {
    pub step: &'a Step<'a>,
    pub item: Item,
    pub own: &'a mut ThreadScratch,
    partial: Shared<'a, f32>,
    keys: &'a [E],
    values: &'a [E],
    form: std::marker::PhantomData<F>,
}

impl<'a, F: Form<E>, E: Pod> Reduce<'a, F, E> {
    pub fn new(
        step: &'a Step<'a>,
        item: Item,
        own: &'a mut ThreadScratch,
        partial: Shared<'a, f32>,
    ) -> Self {
        let (keys, values) = (view(&step.args.kv.k), view(&step.args.kv.v));
        Self { step, item, own, partial, keys, values, form: std::marker::PhantomData }
    }

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

    /// Where the tile of keys from position `first` on lies; from position `end` on there are none.
    #[inline(always)]
    fn places(&self, first: usize, end: usize) -> Places {
        let (batch, heads) = (self.step.args.batch, self.step.args.heads);
        let slot = self.step.slots[self.item.row] as usize;
        let table = &self.step.table[slot * batch.page_table.dim(1)..];
        let size = batch.page_size;
        let mut places = Places { at: [0; TILE], keys: TILE.min(end.saturating_sub(first)) };
        let (mut index, mut offset) = (first / size, first % size);
        for at in &mut places.at[..places.keys] {
            let page = table[index] as usize * heads.kv + self.item.kv_head;
            *at = (page * size + offset) * heads.dim;
            offset += 1;
            if offset == size {
                (index, offset) = (index + 1, 0);
            }
        }
        places
    }

    /// A group's rows of `pages`. Those behind the last key are empty.
    #[inline(always)]
    fn rows(&self, pages: &'a [E], places: &Places, group: usize) -> [&'a [E]; LANES] {
        let mut rows: [&[E]; LANES] = [&[]; LANES];
        for (row, &at) in rows.iter_mut().zip(places.of(group)) {
            *row = &pages[at..][..self.step.args.heads.dim];
        }
        rows
    }

    /// Fetches what a group is made of. Its rows lie in pieces too short for the processor to foresee.
    #[inline(always)]
    fn fetch<S: Simd>(&self, s: S, places: &Places, group: usize) {
        for &at in places.of(group) {
            for pages in [self.keys, self.values] {
                let row = &pages[at..][..self.step.args.heads.dim];
                for line in bytemuck::cast_slice::<E, u8>(row).chunks(64) {
                    s.will_read(&line[0], 0);
                }
            }
        }
    }

    /// The tile of keys from position `first` on, for all queries. Meanwhile `next` is fetched, a group
    /// at a time, as only so many lines can be on their way at once.
    #[inline(always)]
    fn tile<S: Simd>(&mut self, s: S, first: usize, places: &Places, next: &Places) {
        let dim = self.step.args.heads.dim;
        for group in 0..places.groups() {
            self.fetch(s, next, group);
            F::turn_keys(s, self.own, dim, group, self.rows(self.keys, places, group));
            F::lay_values(s, self.own, dim, group, self.rows(self.values, places, group));
        }
        // Whole tiles have code of their own, whose loops are of known lengths.
        match places.groups() {
            GROUPS => self.products(s, first, GROUPS),
            few => self.products(s, first, few),
        }
    }

    /// The products of all queries with the `groups` groups that are laid out.
    #[inline(always)]
    fn products<S: Simd>(&mut self, s: S, first: usize, groups: usize) {
        let (dim, queries) = (self.step.args.heads.dim, self.item.tokens * self.step.group());
        for panel in (0..queries).step_by(PANEL) {
            let queries = panel..queries.min(panel + PANEL);
            F::scores(s, self.own, dim, groups, queries.clone());
            for query in queries.clone() {
                let position = self.item.position + query / self.step.group();
                let ThreadScratch { scores, span, .. } = &mut *self.own;
                let before = span.max[query];
                let at = (first, position);
                let (top, sum) = weigh(s, self.step.args, scores, query - panel, at, before);
                let factor = if top == before { 1.0 } else { math::exp(before - top) };
                span.max[query] = top;
                span.factors[query] = factor;
                span.sum[query] = span.sum[query] * factor + sum;
            }
            F::add_values(s, self.own, dim, groups, queries);
        }
    }
}

impl<F: Form<E>, E: Pod> Kernel for Reduce<'_, F, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (item, step) = (self.item, self.step);
        let (queries, vectors) = (item.tokens * step.group(), step.dim_vectors());
        self.load_queries();
        F::begin(s, self.own, step.args.heads.dim, queries);
        self.own.total.reset(queries, vectors);
        let last = ((item.first_span + item.spans) * SPAN).min(item.position + item.tokens);
        let mut next = self.places(item.first_span * SPAN, last);
        (0..next.groups()).for_each(|group| self.fetch(s, &next, group));
        for span in item.first_span..item.first_span + item.spans {
            self.own.span.reset(queries, vectors);
            let end = ((span + 1) * SPAN).min(item.position + item.tokens);
            for first in (span * SPAN..end).step_by(TILE) {
                let places = std::mem::replace(&mut next, self.places(first + TILE, last));
                self.tile(s, first, &places, &next);
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

/// Turns a query's scores of the keys from `first` on into weights `e^(score − max)`, where `max` is
/// the highest score so far. Returns that and the sum of the weights. Keys that `position` does not
/// see weigh 0.
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    args: &Attention<'_>,
    scores: &mut Scores,
    query: usize,
    (first, position): (usize, usize),
    before: f32,
) -> (f32, f32) {
    if let Some(cap) = args.soft_cap {
        for group in &mut scores.0 {
            group.0[query].iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
        }
    }
    let oldest = args.window.map_or(0, |window| (position + 1).saturating_sub(window));
    if first < oldest || first + TILE > position + 1 {
        for (g, group) in scores.0.iter_mut().enumerate() {
            for (i, score) in group.0[query].iter_mut().enumerate() {
                let at = first + g * LANES + i;
                *score = if at < oldest || at > position { f32::NEG_INFINITY } else { *score };
            }
        }
    }
    let loaded = array!(GROUPS, s.splat(0.0), |g| s.load(&scores.0[g].0[query]));
    let mut most = loaded[0];
    for scores in loaded {
        most = s.max(most, scores);
    }
    let top = before.max(s.highest(most));
    // With nothing to see yet, every weight is to be 0 and not undefined.
    let origin = s.splat(if top == f32::NEG_INFINITY { 0.0 } else { -top });
    let mut sum = s.splat(0.0);
    for (group, loaded) in scores.0.iter_mut().zip(loaded) {
        let weights = s.exp(s.add(loaded, origin));
        s.store(weights, &mut group.0[query]);
        sum = s.add(sum, weights);
    }
    (top, s.sum(sum))
}
