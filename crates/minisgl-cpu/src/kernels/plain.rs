//! Tiles of F32, F16 and BF16.

use std::marker::PhantomData;

use bytemuck::Pod;
use half::f16;

use super::{Half, PANEL, PARTS, TileProduct, by_eights};
use crate::simd::{Kernel, LANES, Line, MatrixUnit, Products, Simd, Sums, array};

/// An element type of tiles that keep column behind column.
pub trait Element: Pod + Send + Sync {
    /// Sixteen of them in f32.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F32 {
        s.load(from)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f16; LANES]) -> S::F32 {
        s.load_f16(from)
    }
}

/// The product of a tile's columns with `R` rows of f32. Meanwhile the tile behind this one is fetched, if it is to be.
#[inline(always)]
pub fn plain<S: Simd, E: Element, const R: usize>(
    s: S,
    columns: &[[E; LANES]],
    x: [&[f32]; R],
    fetches: bool,
) -> [S::F32; R] {
    let x = array!(R, &[] as &[f32], |r| &x[r][..columns.len()]);
    let mut sums = [s.splat(0.0); R];
    for (k, column) in columns.iter().enumerate() {
        if fetches {
            s.will_read(&bytemuck::bytes_of(column)[0], size_of_val(columns));
        }
        let w = E::load(s, column);
        for r in 0..R {
            sums[r] = s.fma(w, s.splat(x[r][k]), sums[r]);
        }
    }
    sums
}

pub struct PlainProduct<'a, E>(TileProduct<'a>, PhantomData<E>);

impl<'a, E> PlainProduct<'a, E> {
    pub fn new(product: TileProduct<'a>) -> Self {
        Self(product, PhantomData)
    }
}

impl<E: Element> Kernel for PlainProduct<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(TileProduct { tile, x, out, .. }, _) = self;
        let columns: &[[E; LANES]] = bytemuck::cast_slice(tile);
        by_eights!(S, out.len(), |from, R| {
            let x = array!(R, &[] as &[f32], |r| &x.floats[(from + r) * x.cols..][..x.cols]);
            let sums = plain::<S, E, R>(s, columns, x, from == 0);
            for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                s.store(sum, out);
            }
        });
    }
}

/// BF16: by a matrix unit, with activations in three parts, or with activations in f32.
pub struct PairProduct<'a>(pub TileProduct<'a>);

impl Kernel for PairProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let TileProduct { tile, x, out, room, .. } = self.0;
        let tile: &[Line] = bytemuck::cast_slice(tile);
        if let Some(unit) = s.unit() {
            unit.begin(Products::Pairs { rows: PARTS * out.len() });
            let panels = x.halves.chunks_exact(PARTS * x.cols.div_ceil(32));
            for (out, panel) in out.chunks_mut(PANEL).zip(panels) {
                pairs(s, unit, panel, (tile, &[]), &mut room.sums, out);
            }
            return;
        }
        by_eights!(S, out.len(), |from, R| {
            let x = array!(R, &[] as &[f32], |r| &x.floats[(from + r) * x.cols..][..x.cols]);
            let sums = widened::<S, R>(s, tile, x, from == 0);
            for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                s.store(sum, out);
            }
        });
    }
}

/// As `plain`, of columns in pairs.
#[inline(always)]
fn widened<S: Simd, const R: usize>(
    s: S,
    pairs: &[Line],
    x: [&[f32]; R],
    fetches: bool,
) -> [S::F32; R] {
    let mut sums = [s.splat(0.0); R];
    let cols = x[0].len();
    let x = array!(R, &[] as &[f32], |r| &x[r][..cols]);
    for (k, pair) in pairs[..cols / 2].iter().enumerate() {
        if fetches {
            s.will_read(&pair.0[0], size_of_val(pairs));
        }
        let (even, odd) = s.widen(s.load_bytes(&pair.0));
        for r in 0..R {
            sums[r] = s.fma(even, s.splat(x[r][2 * k]), sums[r]);
            sums[r] = s.fma(odd, s.splat(x[r][2 * k + 1]), sums[r]);
        }
    }
    if cols % 2 == 1 {
        let (even, _) = s.widen(s.load_bytes(&pairs[cols / 2].0));
        for r in 0..R {
            sums[r] = s.fma(even, s.splat(x[r][cols - 1]), sums[r]);
        }
    }
    sums
}

/// `out[i]` is the product of sixteen rows of weights, in pairs and in one part or two, with row i
/// of a panel.
#[inline(always)]
pub fn pairs<S: Simd>(
    s: S,
    unit: S::Unit,
    panel: &[Half],
    (tile, low): (&[Line], &[Line]),
    sums: &mut Sums,
    out: &mut [[f32; LANES]],
) {
    let used = (PARTS * out.len()).div_ceil(PANEL) * panel.len() / PARTS;
    unit.pair_products(&panel[..used], tile, low, sums);
    let sums = sums.0.as_flattened().as_chunks::<PARTS>().0;
    for (out, [high, middle, low]) in out.iter_mut().zip(sums) {
        s.store(s.add(s.add(s.load(low), s.load(middle)), s.load(high)), out);
    }
}
