//! Tiles of F32, F16 and BF16.

use std::marker::PhantomData;

use bytemuck::Pod;
use half::{bf16, f16};

use super::{Half, PANEL, TileProduct, by_fours};
use crate::simd::{Kernel, LANES, Line, MatrixUnit, Simd, array};

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

/// The product of a tile's columns with `R` rows of f32.
#[inline(always)]
pub fn plain<S: Simd, E: Element, const R: usize>(
    s: S,
    columns: &[[E; LANES]],
    x: [&[f32]; R],
) -> [S::F32; R] {
    let x = array!(R, &[] as &[f32], |r| &x[r][..columns.len()]);
    let mut sums = [s.splat(0.0); R];
    for (k, column) in columns.iter().enumerate() {
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
        by_fours!(out.len(), |from, R| {
            let x = array!(R, &[] as &[f32], |r| &x.floats[(from + r) * x.cols..][..x.cols]);
            let sums = plain::<S, E, R>(s, columns, x);
            for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                s.store(sum, out);
            }
        });
    }
}

/// BF16 with activations in f32: what machines without products of bf16 do.
pub struct WidenedProduct<'a>(pub TileProduct<'a>);

impl Kernel for WidenedProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let TileProduct { tile, x, out, .. } = self.0;
        let pairs: &[Line] = bytemuck::cast_slice(tile);
        by_fours!(out.len(), |from, R| {
            let x = array!(R, &[] as &[f32], |r| &x.floats[(from + r) * x.cols..][..x.cols]);
            let sums = widened::<S, R>(s, pairs, x);
            for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                s.store(sum, out);
            }
        });
    }
}

#[inline(always)]
fn widened<S: Simd, const R: usize>(s: S, pairs: &[Line], x: [&[f32]; R]) -> [S::F32; R] {
    let mut sums = [s.splat(0.0); R];
    let cols = x[0].len();
    let x = array!(R, &[] as &[f32], |r| &x[r][..cols]);
    for (k, pair) in pairs[..cols / 2].iter().enumerate() {
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

/// BF16 with activations split into two bf16. All rows go one way: unit and vectors round differently.
pub struct PairProduct<'a>(pub TileProduct<'a>);

impl Kernel for PairProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let TileProduct { tile, x, out, room, .. } = self.0;
        begin(s);
        let (tile, across): (&[Line], _) = (bytemuck::cast_slice(tile), 2 * x.cols.div_ceil(32));
        for (out, panel) in out.chunks_mut(PANEL).zip(x.halves.chunks_exact(across)) {
            if let Ok(out) = <&mut [_; PANEL]>::try_from(&mut *out) {
                pairs(s, tile, panel, PANEL, out);
            } else {
                pairs(s, tile, panel, out.len(), &mut room.panel.0);
                out.copy_from_slice(&room.panel.0[..out.len()]);
            }
        }
    }
}

/// To be called by a thread before `pairs`.
#[inline(always)]
pub fn begin<S: Simd>(s: S) {
    if let Some(unit) = s.unit() {
        unit.begin();
    }
}

/// `out[i]` is the product of a tile of pairs with row i of a panel, for `rows` rows at least.
#[inline(always)]
pub fn pairs<S: Simd>(
    s: S,
    tile: &[Line],
    panel: &[Half],
    rows: usize,
    out: &mut [[f32; LANES]; PANEL],
) {
    if let Some(unit) = s.unit() {
        return unit.pair_products(panel, tile, out);
    }
    by_fours!(rows, |from, R| {
        let mut sums = [s.splat(0.0); R];
        for (x, w) in panel.iter().zip(tile.as_chunks::<16>().0.iter().cycle()) {
            let x = array!(R, &[] as &[[bf16; 2]], |r| x.0[from + r].as_chunks().0);
            for (k, w) in w.iter().enumerate() {
                let w = s.load_bytes(&w.0);
                for r in 0..R {
                    sums[r] = s.pair_dot(sums[r], w, x[r][k]);
                }
            }
        }
        for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
            s.store(sum, out);
        }
    });
}
