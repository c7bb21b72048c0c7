//! The products of attention: keys and values are laid out as tiles of weights, and multiplied as
//! such.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use super::TILE;
use super::reduce::{GROUPS, ThreadScratch};
use crate::activations::split;
use crate::kernels::{Element, Half, PANEL, by_fours, pairs, plain};
use crate::simd::{Aligned, LANES, Line, Simd, array};

/// In what keys, values, queries and weights are multiplied; `E` is what pages hold.
pub trait Form<E> {
    /// Makes room, and takes over the queries.
    fn begin(own: &mut ThreadScratch, dim: usize, queries: usize);
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
    /// Fills `own.scores` for a panel of queries.
    fn scores<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: Range<usize>);
    /// `span.out = span.out · span.factors + scores · values` for a panel of queries.
    fn add_values<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: Range<usize>);
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
    fn begin(own: &mut ThreadScratch, dim: usize, _: usize) {
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
    fn scores<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: Range<usize>) {
        let ThreadScratch { floats, q, scores, .. } = own;
        by_fours!(queries.len(), |from, R| {
            let q = array!(R, &[] as &[f32], |r| &q[(queries.start + from + r) * dim..][..dim]);
            for (keys, scores) in floats.k.chunks_exact(dim).zip(&mut scores.0) {
                let products = plain::<S, f32, R>(s, keys, q);
                for (r, product) in products.into_iter().enumerate() {
                    s.store(product, &mut scores.0[from + r]);
                }
            }
        });
    }

    #[inline(always)]
    fn add_values<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: Range<usize>) {
        let ThreadScratch { floats, scores, span, .. } = own;
        let vectors = dim.div_ceil(LANES);
        by_fours!(queries.len(), |from, R| {
            let weights = array!(R, [[0.0; LANES]; GROUPS], |r| {
                array!(GROUPS, [0.0; LANES], |g| scores.0[g].0[from + r])
            });
            let weights = array!(R, &[] as &[f32], |r| weights[r].as_flattened());
            for c in 0..vectors {
                let products = plain::<S, f32, R>(s, &floats.v[c * TILE..][..TILE], weights);
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

/// bf16 in pairs, from pages of bf16.
pub struct Pairs;

pub struct PairScratch {
    /// `[TILE / 16][⌈dim / 32⌉ · 16 pairs of features][16 keys]`.
    k: Vec<Line>,
    /// `[dim / 16][TILE / 2 pairs of keys][16 features]`.
    v: Vec<Line>,
    /// `[queries / 16][2][⌈dim / 32⌉]`.
    q: Vec<Half>,
    /// A panel's weights.
    weights: [Half; 2 * TILE / 32],
    /// A panel's products, `[dim / 16]`.
    products: Vec<Aligned<[[f32; LANES]; PANEL]>>,
}

impl Default for PairScratch {
    fn default() -> Self {
        let weights = [Half([[bf16::ZERO; 32]; PANEL]); 2 * TILE / 32];
        let (k, v, q, products) = Default::default();
        Self { k, v, q, weights, products }
    }
}

impl Form<bf16> for Pairs {
    fn begin(own: &mut ThreadScratch, dim: usize, queries: usize) {
        let (across, zero) = (dim.div_ceil(32), Half([[bf16::ZERO; 32]; PANEL]));
        let pairs = &mut own.pairs;
        pairs.k.resize(GROUPS * across * 16, Line([0; 64]));
        pairs.v.resize(dim.div_ceil(LANES) * TILE / 2, Line([0; 64]));
        pairs.products.resize(dim.div_ceil(LANES), Aligned([[0.0; LANES]; PANEL]));
        pairs.q.clear();
        pairs.q.resize(queries.div_ceil(PANEL) * 2 * across, zero);
        for (query, q) in own.q.chunks_exact(dim).enumerate() {
            let panel = &mut pairs.q[query / PANEL * 2 * across..][..2 * across];
            split(q, query % PANEL, panel);
        }
    }

    #[inline(always)]
    fn turn_keys<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        keys: [&[bf16]; LANES],
    ) {
        let across = dim.div_ceil(32);
        let out = &mut own.pairs.k[group * across * 16..][..across * 16];
        for (c, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            // A pair is moved as the f32 of its bits.
            let rows = array!(LANES, s.splat(0.0), |i| {
                let pairs: [bf16; 32] = part(keys[i], c * 32);
                s.load(&bytemuck::cast(pairs))
            });
            for (out, column) in out.iter_mut().zip(s.transpose(rows)) {
                s.store(column, bytemuck::cast_mut(out));
            }
        }
    }

    #[inline(always)]
    fn lay_values<S: Simd>(
        s: S,
        own: &mut ThreadScratch,
        dim: usize,
        group: usize,
        values: [&[bf16]; LANES],
    ) {
        for c in 0..dim.div_ceil(LANES) {
            let out = &mut own.pairs.v[(c * TILE + group * LANES) / 2..][..LANES / 2];
            for (out, pair) in out.iter_mut().zip(values.as_chunks::<2>().0) {
                let [even, odd] = pair.map(|value| part::<bf16, LANES>(value, c * LANES));
                s.store_bytes(s.interleave(&even, &odd), &mut out.0);
            }
        }
    }

    #[inline(always)]
    fn scores<S: Simd>(s: S, own: &mut ThreadScratch, dim: usize, queries: Range<usize>) {
        let ThreadScratch { pairs: own, scores, .. } = own;
        let across = dim.div_ceil(32);
        let panel = &own.q[queries.start / PANEL * 2 * across..][..2 * across];
        for (keys, scores) in own.k.chunks_exact(across * 16).zip(&mut scores.0) {
            pairs(s, keys, panel, queries.len(), &mut scores.0);
        }
    }

    #[inline(always)]
    fn add_values<S: Simd>(s: S, own: &mut ThreadScratch, _: usize, queries: Range<usize>) {
        let ThreadScratch { pairs: own, scores, span, .. } = own;
        for lane in 0..queries.len() {
            let weights = array!(GROUPS, [0.0; LANES], |g| scores.0[g].0[lane]);
            split(weights.as_flattened(), lane, &mut own.weights);
        }
        let tiles = own.v.chunks_exact(TILE / 2);
        let vectors = tiles.len();
        for (values, products) in tiles.clone().zip(&mut own.products) {
            pairs(s, values, &own.weights, queries.len(), &mut products.0);
        }
        for (lane, query) in queries.enumerate() {
            let factor = s.splat(span.factors[query]);
            let outs = &mut span.out[query * vectors..][..vectors];
            for (out, product) in outs.iter_mut().zip(&own.products) {
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
