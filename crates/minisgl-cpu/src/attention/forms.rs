//! The products of attention: keys and values are laid out as tiles of weights, and multiplied as
//! such.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::TILE;
use super::reduce::{GROUPS, ThreadScratch};
use crate::activations::split;
use crate::kernels::{Element, Half, PANEL, PARTS, by_eights, pairs, plain};
use crate::simd::{Aligned, LANES, Line, MatrixUnit, Products, Simd, Sums, array};

/// In what keys, values, queries and weights are multiplied; `E` is what pages hold.
pub trait Form<E> {
    /// Makes room, and takes over the queries.
    fn begin<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: usize);
    /// Lays out sixteen keys, the tile's `group`th. Empty ones are zeros.
    fn turn_keys<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        keys: [&[E]; LANES],
    );
    /// As `turn_keys` for values.
    fn lay_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        values: [&[E]; LANES],
    );
    /// Fills `own.scores` for a panel of queries and the tile's first `groups` groups, an even number.
    fn scores<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        groups: usize,
        queries: Range<usize>,
    );
    /// `span.out = span.out · span.factors + scores · values` for the same. Behind these groups all
    /// weights are 0, and what they are not added to keeps its bits.
    fn add_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        groups: usize,
        queries: Range<usize>,
    );
}

/// f32, from pages of f32 or f16.
pub struct Floats;

#[derive(Default)]
pub struct FloatScratch {
    /// `[TILE / 16][dim][16 keys]`.
    k: Vec<[f32; LANES]>,
    /// `[dim / 16][TILE][16 features]`.
    v: Vec<[f32; LANES]>,
}

impl<E: Element> Form<E> for Floats {
    #[inline(always)]
    fn begin<S: Simd>(_: S, own: &mut ThreadScratch, dim: usize, _: usize) {
        own.floats.k.resize(GROUPS * dim, [0.0; LANES]);
        own.floats.v.resize(dim.div_ceil(LANES) * TILE, [0.0; LANES]);
    }

    #[inline(always)]
    fn turn_keys<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        keys: [&[E]; LANES],
    ) {
        let out = &mut own.floats.k[group * dim..][..dim];
        for (c, out) in out.chunks_mut(LANES).enumerate() {
            let rows = array!(LANES, s.splat(0.0), |i| E::load(s, &part(keys[i], c * LANES)));
            for (out, column) in out.iter_mut().zip(s.transpose(rows)) {
                s.store(column, out);
            }
        }
    }

    #[inline(always)]
    fn lay_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        values: [&[E]; LANES],
    ) {
        for c in 0..dim.div_ceil(LANES) {
            let out = &mut own.floats.v[c * TILE + group * LANES..][..LANES];
            for (out, value) in out.iter_mut().zip(values) {
                s.store(E::load(s, &part(value, c * LANES)), out);
            }
        }
    }

    #[inline(always)]
    fn scores<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        groups: usize,
        queries: Range<usize>,
    ) {
        let ThreadScratch { floats, q, scores, .. } = own;
        by_eights!(S, queries.len(), |from, R| {
            let q = array!(R, &[] as &[f32], |r| &q[(queries.start + from + r) * dim..][..dim]);
            for (keys, scores) in floats.k.chunks_exact(dim).zip(&mut scores.0[..groups]) {
                let products = plain::<S, f32, R>(s, keys, q, false);
                for (r, product) in products.into_iter().enumerate() {
                    s.store(product, &mut scores.0[from + r]);
                }
            }
        });
    }

    #[inline(always)]
    fn add_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        groups: usize,
        queries: Range<usize>,
    ) {
        let ThreadScratch { floats, scores, span, .. } = own;
        let vectors = dim.div_ceil(LANES);
        by_eights!(S, queries.len(), |from, R| {
            let weights = array!(R, [[0.0; LANES]; GROUPS], |r| {
                array!(GROUPS, [0.0; LANES], |g| scores.0[g].0[from + r])
            });
            let keys = groups * LANES;
            let weights = array!(R, &[] as &[f32], |r| &weights[r].as_flattened()[..keys]);
            for c in 0..vectors {
                let products = plain::<S, f32, R>(s, &floats.v[c * TILE..][..keys], weights, false);
                for (r, product) in products.into_iter().enumerate() {
                    let query = queries.start + from + r;
                    let out = &mut span.out[query * vectors + c];
                    let factor = s.splat(span.factors[query]);
                    s.store(s.fma(s.load(out), factor, product), out);
                }
            }
        });
    }
}

/// bf16 in pairs, on a matrix unit, from pages of f16, each of which is the sum of two bf16.
pub struct Pairs;

pub struct PairScratch {
    /// `[TILE / 16][⌈dim / 32⌉ · 16 pairs of features][16 keys]`, and what this leaves.
    k: [Vec<Line>; 2],
    /// `[dim / 16][TILE / 2 pairs of keys][16 features]`, and what this leaves.
    v: [Vec<Line>; 2],
    /// `[queries / 16][PARTS][⌈dim / 32⌉]`.
    q: Vec<Half>,
    /// A panel's weights.
    weights: [Half; PARTS * TILE / 32],
    /// A panel's products, `[dim / 16]`.
    products: Vec<Aligned<[[f32; LANES]; PANEL]>>,
    sums: Sums,
}

impl Default for PairScratch {
    fn default() -> Self {
        let weights = [Half::zeroed(); PARTS * TILE / 32];
        let sums = Aligned([[[0.0; LANES]; PANEL]; 3]);
        let (k, v, q, products) = Default::default();
        Self { k, v, q, weights, products, sums }
    }
}

/// The unit of those that compute in `Pairs`.
#[inline(always)]
fn unit<S: Simd>(s: S) -> S::Unit {
    s.unit().expect("pairs are for those who have a unit")
}

impl Form<f16> for Pairs {
    #[inline(always)]
    fn begin<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: usize) {
        unit(s).begin(Products::Pairs { rows: PARTS * queries });
        let across = dim.div_ceil(32);
        let ThreadScratch { pairs, q, .. } = own;
        for part in 0..2 {
            pairs.k[part].resize(GROUPS * across * 16, Line([0; 64]));
            pairs.v[part].resize(dim.div_ceil(LANES) * TILE / 2, Line([0; 64]));
        }
        pairs.products.resize(dim.div_ceil(LANES), Aligned([[0.0; LANES]; PANEL]));
        pairs.q.resize(queries.div_ceil(PANEL) * PARTS * across, Half::zeroed());
        for (query, q) in q.chunks_exact(dim).enumerate() {
            let panel = &mut pairs.q[query / PANEL * PARTS * across..][..PARTS * across];
            split(q, query % PANEL, panel);
        }
    }

    #[inline(always)]
    fn turn_keys<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        keys: [&[f16]; LANES],
    ) {
        let (unit, across) = (unit(s), dim.div_ceil(32));
        let [high, low] = &mut own.pairs.k;
        let range = group * across * 16..(group + 1) * across * 16;
        let high = high[range.clone()].as_chunks_mut::<LANES>().0;
        let low = low[range].as_chunks_mut::<LANES>().0;
        for (c, (high, low)) in high.iter_mut().zip(low).enumerate() {
            // A pair is moved as the f32 of its bits.
            let rows = array!(LANES, s.splat(0.0), |i| {
                let pairs: [f16; 32] = part(keys[i], c * 32);
                s.load(&bytemuck::cast(pairs))
            });
            for (column, (high, low)) in s.transpose(rows).into_iter().zip(high.iter_mut().zip(low))
            {
                let mut pairs = Line([0; 64]);
                s.store(column, bytemuck::cast_mut(&mut pairs));
                unit.split_pairs(&pairs, high, low);
            }
        }
    }

    #[inline(always)]
    fn lay_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        values: [&[f16]; LANES],
    ) {
        let [high, low] = &mut own.pairs.v;
        for c in 0..dim.div_ceil(LANES) {
            let range = (c * TILE + group * LANES) / 2..(c * TILE + (group + 1) * LANES) / 2;
            let outs = high[range.clone()].iter_mut().zip(&mut low[range]);
            for ((high, low), pair) in outs.zip(values.as_chunks::<2>().0) {
                let [first, second] = pair.map(|value| part::<f16, LANES>(value, c * LANES));
                unit(s).split_rows(&first, &second, high, low);
            }
        }
    }

    #[inline(always)]
    fn scores<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        groups: usize,
        queries: Range<usize>,
    ) {
        let ThreadScratch { pairs: PairScratch { k: [high, low], q, sums, .. }, scores, .. } = own;
        let across = dim.div_ceil(32);
        let panel = &q[queries.start / PANEL * PARTS * across..][..PARTS * across];
        let keys = high.chunks_exact(across * 16).zip(low.chunks_exact(across * 16));
        for (keys, scores) in keys.zip(&mut scores.0[..groups]) {
            pairs(s, unit(s), panel, keys, sums, &mut scores.0[..queries.len()]);
        }
    }

    #[inline(always)]
    fn add_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        _: usize,
        groups: usize,
        queries: Range<usize>,
    ) {
        let ThreadScratch { pairs: own, scores, span, .. } = own;
        let PairScratch { v: [high, low], weights, products, sums, .. } = own;
        let weights = &mut weights[..PARTS * groups / 2];
        for lane in 0..queries.len() {
            let row = array!(GROUPS, [0.0; LANES], |g| scores.0[g].0[lane]);
            split(&row.as_flattened()[..groups * LANES], lane, weights);
        }
        let values = high.chunks_exact(TILE / 2).zip(low.chunks_exact(TILE / 2));
        let (vectors, lines) = (values.len(), groups * LANES / 2);
        for ((high, low), products) in values.zip(&mut *products) {
            let values = (&high[..lines], &low[..lines]);
            pairs(s, unit(s), weights, values, sums, &mut products.0[..queries.len()]);
        }
        for (lane, query) in queries.enumerate() {
            let factor = s.splat(span.factors[query]);
            let outs = &mut span.out[query * vectors..][..vectors];
            for (out, product) in outs.iter_mut().zip(&*products) {
                s.store(s.fma(s.load(out), factor, s.load(&product.0[lane])), out);
            }
        }
    }
}

/// `N` elements of `row` from `at` on, zeros behind its end.
#[inline(always)]
fn part<E: Pod, const N: usize>(row: &[E], at: usize) -> [E; N] {
    match row.get(at..at + N).and_then(|part| part.first_chunk()) {
        Some(part) => *part,
        None => {
            let mut part = [E::zeroed(); N];
            let rest = row.get(at..).unwrap_or(&[]);
            part[..rest.len().min(N)].copy_from_slice(&rest[..rest.len().min(N)]);
            part
        }
    }
}
