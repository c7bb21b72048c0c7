//! Tiles of block types: codes of four or eight bits, and scales.

use std::marker::PhantomData;

use half::f16;

use super::{PANEL, Quantized, TileProduct, UnitRoom, by_eights};
use crate::simd::{Aligned, Kernel, LANES, Line, MatrixUnit, Products, Simd, array};

/// Blocks that are unpacked at a time: with their rows of a panel they fit into the first cache.
pub const UNPACKED: usize = 24;
/// Blocks whose products a matrix unit has made before they are added up.
pub const AHEAD: usize = 2;
/// From how many rows on a matrix unit is worth its while.
const UNIT_ROWS: usize = 3;

/// How a block's codes are kept.
pub trait Codes {
    /// Lines of a block's codes.
    const LINES: usize;
    /// Whether a matrix unit needs them unpacked.
    const PACKED: bool;
    /// `Σ code · x` along `codes`, which are those of a part of a block's columns, the one that
    /// begins at `at`. `shifted` as in `Quantized`, for that part.
    fn dot<S: Simd, const R: usize>(
        s: S,
        codes: &[Line],
        x: [&[i8; 32]; R],
        at: usize,
        shifted: &[i32; R],
    ) -> [S::F32; R];
    /// A block's codes in a byte each.
    fn unpack<S: Simd>(s: S, codes: &[Line], out: &mut [Line; 8]);
}

pub struct Nibbles;

impl Codes for Nibbles {
    const LINES: usize = 4;
    const PACKED: bool = true;

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(
        s: S,
        codes: &[Line],
        x: [&[i8; 32]; R],
        _: usize,
        _: &[i32; R],
    ) -> [S::F32; R] {
        let x =
            array!(R, &[[0; 4]; 8], |r| x[r].as_chunks().0.first_chunk().unwrap_or(&[[0; 4]; 8]));
        let mut sums = [s.nibble_zero(); R];
        // Unrolled, the compiler computes row by row and spills every code on the way.
        let chunks = std::hint::black_box(Self::LINES);
        for (c, chunk) in codes.iter().take(chunks).enumerate() {
            let (low, high) = s.nibbles(s.load_bytes(&chunk.0));
            let (first, second) = (2 * c % 8, (2 * c + 1) % 8);
            for r in 0..R {
                sums[r] = s.nibble_dot(sums[r], low, x[r][first]);
            }
            for r in 0..R {
                sums[r] = s.nibble_dot(sums[r], high, x[r][second]);
            }
        }
        array!(R, s.splat(0.0), |r| s.nibble_total(sums[r]))
    }

    #[inline(always)]
    fn unpack<S: Simd>(s: S, codes: &[Line], out: &mut [Line; 8]) {
        for (chunk, out) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
            let (low, high) = s.nibbles(s.load_bytes(&chunk.0));
            s.store_bytes(low, &mut out[0].0);
            s.store_bytes(high, &mut out[1].0);
        }
    }
}

pub struct Bytes;

impl Codes for Bytes {
    const LINES: usize = 8;
    const PACKED: bool = false;

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(
        s: S,
        codes: &[Line],
        x: [&[i8; 32]; R],
        at: usize,
        shifted: &[i32; R],
    ) -> [S::F32; R] {
        let x = array!(R, &[] as &[[i8; 4]], |r| x[r][at..].as_chunks().0);
        let mut sums = array!(R, s.byte_start(0), |r| s.byte_start(shifted[r]));
        for (c, chunk) in codes.iter().enumerate() {
            let codes = s.load_bytes(&chunk.0);
            for r in 0..R {
                sums[r] = s.byte_dot(sums[r], codes, x[r][c]);
            }
        }
        array!(R, s.splat(0.0), |r| s.byte_total(sums[r]))
    }

    #[inline(always)]
    fn unpack<S: Simd>(_: S, codes: &[Line], out: &mut [Line; 8]) {
        out.copy_from_slice(codes);
    }
}

/// What a block's scales say: `weight = scale · code + min`.
pub trait Scales {
    /// Blocks behind one head, and its bytes.
    const HEAD: (usize, usize) = (1, 0);
    /// Bytes of a block's scales.
    const BYTES: usize = 2 * LANES;
    /// Scales a row and block.
    const PARTS: usize = 1;
    fn scale<S: Simd>(s: S, head: &[u8], scales: &[u8], part: usize) -> S::F32;
    fn min<S: Simd>(s: S, head: &[u8], scales: &[u8]) -> Option<S::F32>;
}

#[inline(always)]
fn halves<S: Simd>(s: S, bytes: &[u8], index: usize) -> S::F32 {
    let halves: &[[f16; LANES]] = bytemuck::cast_slice(&bytes[index * 2 * LANES..][..2 * LANES]);
    s.load_f16(&halves[0])
}

#[inline(always)]
fn small<S: Simd>(s: S, bytes: &[u8], index: usize) -> S::F32 {
    let small: &[[i8; LANES]] = bytemuck::cast_slice(&bytes[index * LANES..][..LANES]);
    s.load_i8(&small[0])
}

pub struct Scale;

impl Scales for Scale {
    #[inline(always)]
    fn scale<S: Simd>(s: S, _: &[u8], scales: &[u8], _: usize) -> S::F32 {
        halves(s, scales, 0)
    }
    #[inline(always)]
    fn min<S: Simd>(_: S, _: &[u8], _: &[u8]) -> Option<S::F32> {
        None
    }
}

/// Q4_0: codes are 8 too large.
pub struct Offset8;

impl Scales for Offset8 {
    #[inline(always)]
    fn scale<S: Simd>(s: S, _: &[u8], scales: &[u8], _: usize) -> S::F32 {
        halves(s, scales, 0)
    }
    #[inline(always)]
    fn min<S: Simd>(s: S, _: &[u8], scales: &[u8]) -> Option<S::F32> {
        Some(s.mul(halves(s, scales, 0), s.splat(-8.0)))
    }
}

pub struct Min;

impl Scales for Min {
    const BYTES: usize = 4 * LANES;

    #[inline(always)]
    fn scale<S: Simd>(s: S, _: &[u8], scales: &[u8], _: usize) -> S::F32 {
        halves(s, scales, 0)
    }
    #[inline(always)]
    fn min<S: Simd>(s: S, _: &[u8], scales: &[u8]) -> Option<S::F32> {
        Some(halves(s, scales, 1))
    }
}

/// Q4_K and Q5_K. Their 6-bit scales and minimums are the same signed and unsigned.
pub struct SuperMin;

impl Scales for SuperMin {
    const HEAD: (usize, usize) = (8, 4 * LANES);

    #[inline(always)]
    fn scale<S: Simd>(s: S, head: &[u8], scales: &[u8], _: usize) -> S::F32 {
        s.mul(halves(s, head, 0), small(s, scales, 0))
    }
    #[inline(always)]
    fn min<S: Simd>(s: S, head: &[u8], scales: &[u8]) -> Option<S::F32> {
        Some(s.mul(halves(s, head, 1), s.mul(small(s, scales, 1), s.splat(-1.0))))
    }
}

/// Q6_K: a scale for either half of a block.
pub struct SuperHalves;

impl Scales for SuperHalves {
    const HEAD: (usize, usize) = (8, 4 * LANES);
    const PARTS: usize = 2;

    #[inline(always)]
    fn scale<S: Simd>(s: S, head: &[u8], scales: &[u8], part: usize) -> S::F32 {
        s.mul(halves(s, head, 0), small(s, scales, part))
    }
    #[inline(always)]
    fn min<S: Simd>(_: S, _: &[u8], _: &[u8]) -> Option<S::F32> {
        None
    }
}

pub struct BlockProduct<'a, C, Z> {
    product: TileProduct<'a>,
    kind: PhantomData<(C, Z)>,
}

/// The unit's products of the next blocks, by part of a block.
pub type UnitProducts = [[Aligned<[[i32; LANES]; PANEL]>; 2]; 2 * AHEAD];

/// Some blocks of a tile and of a panel.
struct UnitStep<'a> {
    scales: &'a [u8],
    codes: &'a [[Line; 8]],
    panel: &'a [[Quantized; PANEL]],
    /// Whether they are the tile's first.
    first: bool,
}

/// A tile's parts: the scales of all blocks, and their codes.
type Parts<'a> = (&'a [u8], &'a [Line]);

impl<'a, C: Codes, Z: Scales> BlockProduct<'a, C, Z> {
    /// Blocks behind one head, and bytes of its group of scales.
    const GROUP: (usize, usize) = (Z::HEAD.0, Z::HEAD.1 + Z::HEAD.0 * Z::BYTES);
    /// Columns and lines of codes of a part of a block, which has scales of its own.
    const PART: (usize, usize) = (32 / Z::PARTS, C::LINES / Z::PARTS);

    pub fn new(product: TileProduct<'a>) -> Self {
        Self { product, kind: PhantomData }
    }

    #[inline(always)]
    fn split(tile: &[u8], blocks: usize) -> Parts<'_> {
        let (scales, codes) = tile.split_at(tile.len() - blocks * C::LINES * size_of::<Line>());
        (&scales[..blocks / Self::GROUP.0 * Self::GROUP.1], bytemuck::cast_slice(codes))
    }

    /// The product with rows `from..from + R` of a panel, whose columns are `height` rows high. Meanwhile the tile behind
    /// this one is fetched, if it is to be.
    #[inline(always)]
    fn sums<S: Simd, const R: usize>(
        s: S,
        (scales, codes): Parts<'_>,
        (panel, height): (&[Quantized], usize),
        from: usize,
        fetches: bool,
    ) -> [S::F32; R] {
        let mut sums = [s.splat(0.0); R];
        let tile_bytes = scales.len().next_multiple_of(64) + size_of_val(codes);
        let mut blocks = panel.chunks_exact(height).zip(codes.chunks_exact(C::LINES));
        for group in scales.chunks_exact(Self::GROUP.1) {
            let (head, scales) = group.split_at(Z::HEAD.1);
            for (scales, (x, codes)) in scales.chunks_exact(Z::BYTES).zip(&mut blocks) {
                if fetches {
                    s.will_read(&scales[0], tile_bytes);
                    for line in codes {
                        s.will_read(&line.0[0], tile_bytes);
                    }
                }
                let x = &x[from..][..R];
                let rows = array!(R, &x[0].codes, |r| &x[r].codes);
                for part in 0..Z::PARTS {
                    let (cols, lines) = Self::PART;
                    let which = if Z::PARTS == 1 { 2 } else { part };
                    let shifted = array!(R, 0, |r| x[r].shifted[which]);
                    let codes = &codes[part * lines..][..lines];
                    let dots = C::dot::<S, R>(s, codes, rows, part * cols, &shifted);
                    let scale = Z::scale(s, head, scales, part);
                    for r in 0..R {
                        sums[r] = s.fma(dots[r], s.mul(scale, s.splat(x[r].d)), sums[r]);
                    }
                }
                if let Some(min) = Z::min(s, head, scales) {
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = s.fma(min, s.splat(x.sum), *sum);
                    }
                }
            }
        }
        sums
    }

    /// The same with a unit that makes the products of sixteen rows: the codes' sums are the same
    /// integers, and what is made of them is the same chain.
    #[inline(always)]
    fn on_unit<S: Simd>(self, s: S, unit: S::Unit) {
        let TileProduct { tile, x, out, room, .. } = self.product;
        unit.begin(Products::Bytes);
        let UnitRoom { codes: unpacked, products, .. } = room;
        let across = x.cols / 32;
        let (scales, codes) = Self::split(tile, across);
        let scales = scales.chunks(UNPACKED / Self::GROUP.0 * Self::GROUP.1);
        let codes = codes.chunks(UNPACKED * C::LINES);
        for (step, (scales, codes)) in scales.zip(codes).enumerate() {
            let bytes = if C::PACKED {
                for (codes, out) in codes.chunks_exact(C::LINES).zip(&mut *unpacked) {
                    C::unpack(s, codes, out);
                }
                &unpacked[..]
            } else {
                codes.as_chunks().0
            };
            let panels = x.blocks.as_chunks::<PANEL>().0.chunks_exact(across);
            let panels = panels.map(|panel| &panel[step * UNPACKED..]);
            for (out, panel) in out.chunks_mut(PANEL).zip(panels) {
                let step = UnitStep { scales, codes: bytes, panel, first: step == 0 };
                match out.len() {
                    1..=4 => Self::panel::<S, 4>(s, unit, step, products, out),
                    5..=8 => Self::panel::<S, 8>(s, unit, step, products, out),
                    _ => Self::panel::<S, PANEL>(s, unit, step, products, out),
                }
            }
        }
    }

    /// A step's products, added to `out` unless they are the first. It has at most `R` rows.
    #[inline(always)]
    fn panel<S: Simd, const R: usize>(
        s: S,
        unit: S::Unit,
        UnitStep { scales, codes, panel, first }: UnitStep<'_>,
        products: &mut UnitProducts,
        out: &mut [[f32; LANES]],
    ) {
        let (zero, before) = (s.splat(0.0), if first { 0 } else { out.len() });
        let mut sums = array!(R, zero, |r| if r < before { s.load(&out[r]) } else { zero });
        // The unit works `AHEAD` blocks ahead, so that nobody waits for its products.
        let products_of = |b: usize, products: &mut UnitProducts| {
            if let (Some(x), Some(codes)) = (panel.get(b), codes.get(b)) {
                for part in 0..Z::PARTS {
                    let lines = &codes[part * 8 / Z::PARTS..][..8 / Z::PARTS];
                    let products = &mut products[b % (2 * AHEAD)][part];
                    unit.byte_products(x, part * Self::PART.0, lines, products);
                }
            }
        };
        for b in 0..AHEAD {
            products_of(b, products);
        }
        let mut blocks = panel.iter().enumerate();
        for group in scales.chunks_exact(Self::GROUP.1) {
            let (head, scales) = group.split_at(Z::HEAD.1);
            for (scales, (b, x)) in scales.chunks_exact(Z::BYTES).zip(&mut blocks) {
                products_of(b + AHEAD, products);
                for part in 0..Z::PARTS {
                    let products = &products[b % (2 * AHEAD)][part];
                    let scale = Z::scale(s, head, scales, part);
                    for (sum, (product, x)) in sums.iter_mut().zip(products.0.iter().zip(x)) {
                        *sum = s.fma(s.convert(product), s.mul(scale, s.splat(x.d)), *sum);
                    }
                }
                if let Some(min) = Z::min(s, head, scales) {
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = s.fma(min, s.splat(x.sum), *sum);
                    }
                }
            }
        }
        for (sum, out) in sums.into_iter().zip(out) {
            s.store(sum, out);
        }
    }
}

impl<C: Codes, Z: Scales> Kernel for BlockProduct<'_, C, Z> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.product.out.len() >= UNIT_ROWS
            && let Some(unit) = s.unit()
        {
            return self.on_unit(s, unit);
        }
        let TileProduct { tile, x, out, .. } = self.product;
        let across = x.cols / 32;
        let parts = Self::split(tile, across);
        let panels = x.blocks.chunks_exact(across * x.height).enumerate();
        for (out, (index, panel)) in out.chunks_mut(PANEL).zip(panels) {
            by_eights!(S, out.len(), |from, R| {
                let is_first = index + from == 0;
                let sums = Self::sums::<S, R>(s, parts, (panel, x.height), from, is_first);
                for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                    s.store(sum, out);
                }
            });
        }
    }
}
