//! Products of a tile of weights with a few rows of activations.
//!
//! An output is a chain of additions along the columns that is the same whatever rows and tiles
//! are computed beside it.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use minisgl_tensor::DType;

use crate::simd::{Isa, Kernel, LANES, Simd, array};

/// 32 activations as 8-bit integers: `x[i] ≈ d · codes[i]`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Quantized {
    pub d: f32,
    /// `d · Σ codes`, what a weight's minimum is multiplied with.
    pub sum: f32,
    pub codes: [i8; 32],
}

/// Rows of activations in both forms; an unused one is empty.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub cols: usize,
    /// `[rows, cols]`.
    pub floats: &'a [f32],
    /// `[rows, cols / 32]`.
    pub blocks: &'a [Quantized],
}

/// `out[i] = tile · x[rows[i]]`.
pub struct TileProduct<'a> {
    pub dtype: DType,
    pub tile: &'a [u8],
    pub x: Rows<'a>,
    pub rows: &'a [u32],
    pub out: &'a mut [[f32; LANES]],
}

impl TileProduct<'_> {
    /// Computes it.
    pub fn run_on(self, isa: Isa) {
        match self.dtype {
            DType::F32 => isa.run(PlainProduct::<f32>(self, std::marker::PhantomData)),
            DType::F16 => isa.run(PlainProduct::<f16>(self, std::marker::PhantomData)),
            DType::BF16 => isa.run(PlainProduct::<bf16>(self, std::marker::PhantomData)),
            DType::Q4_0 => isa.run(BlockProduct::<Nibbles, Offset8>::new(self)),
            DType::Q4_1 => isa.run(BlockProduct::<Nibbles, Min>::new(self)),
            DType::Q5_0 | DType::Q8_0 => isa.run(BlockProduct::<Bytes, Scale>::new(self)),
            DType::Q5_1 => isa.run(BlockProduct::<Bytes, Min>::new(self)),
            DType::Q4K => isa.run(BlockProduct::<Nibbles, SuperMin>::new(self)),
            DType::Q5K => isa.run(BlockProduct::<Bytes, SuperMin>::new(self)),
            DType::Q6K => isa.run(BlockProduct::<Bytes, SuperHalves>::new(self)),
            dtype => unreachable!("{dtype} has no tiles"),
        }
    }
}

/// Calls `$run::<R>(from)` for runs of four rows, then for what is left.
macro_rules! by_fours {
    ($count:expr, |$from:ident, $R:ident| $run:expr) => {{
        let count = $count;
        let mut $from = 0;
        while count - $from >= 4 {
            const $R: usize = 4;
            $run;
            $from += 4;
        }
        match count - $from {
            3 => {
                const $R: usize = 3;
                $run;
            }
            2 => {
                const $R: usize = 2;
                $run;
            }
            1 => {
                const $R: usize = 1;
                $run;
            }
            _ => {}
        }
    }};
}
pub(crate) use by_fours;

/// An element type of plain weights.
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

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[bf16; LANES]) -> S::F32 {
        s.load_bf16(from)
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

struct PlainProduct<'a, E>(TileProduct<'a>, std::marker::PhantomData<E>);

impl<E: Element> Kernel for PlainProduct<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(TileProduct { tile, x, rows, out, .. }, _) = self;
        let columns: &[[E; LANES]] = bytemuck::cast_slice(tile);
        by_fours!(rows.len(), |from, R| {
            let x = array!(R, &[] as &[f32], |r| &x.floats[rows[from + r] as usize * x.cols..]
                [..x.cols]);
            let sums = plain::<S, E, R>(s, columns, x);
            for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                s.store(sum, out);
            }
        });
    }
}

/// How a block's codes are kept.
trait Codes {
    /// Bytes of a block's codes.
    const BYTES: usize;
    /// `Σ code · x` along `x`, which is a part of a block. `codes` are that part's.
    fn dot<S: Simd, const R: usize>(s: S, codes: &[u8], x: [&[i8]; R]) -> [S::F32; R];
}

struct Nibbles;

impl Codes for Nibbles {
    const BYTES: usize = 16 * LANES;

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(s: S, codes: &[u8], x: [&[i8]; R]) -> [S::F32; R] {
        let x =
            array!(R, &[[0; 4]; 8], |r| x[r].as_chunks().0.first_chunk().unwrap_or(&[[0; 4]; 8]));
        let mut sums = [s.nibble_zero(); R];
        // Unrolled, the compiler computes row by row and spills every code on the way.
        let chunks = std::hint::black_box(Self::BYTES / 64);
        for (c, chunk) in codes.as_chunks::<64>().0.iter().take(chunks).enumerate() {
            let (low, high) = s.nibbles(s.load_bytes(chunk));
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
}

struct Bytes;

impl Codes for Bytes {
    const BYTES: usize = 32 * LANES;

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(s: S, codes: &[u8], x: [&[i8]; R]) -> [S::F32; R] {
        let x = array!(R, &[] as &[[i8; 4]], |r| x[r].as_chunks().0);
        let mut sums = [s.byte_zero(); R];
        for (c, chunk) in codes.as_chunks::<64>().0.iter().enumerate() {
            let codes = s.load_bytes(chunk);
            for r in 0..R {
                sums[r] = s.byte_dot(sums[r], codes, x[r][c]);
            }
        }
        array!(R, s.splat(0.0), |r| s.byte_total(sums[r]))
    }
}

/// What a block's scales say: `weight = scale · code + min`.
trait Scales {
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

struct Scale;

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
struct Offset8;

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

struct Min;

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
struct SuperMin;

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
struct SuperHalves;

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

struct BlockProduct<'a, C, Z> {
    product: TileProduct<'a>,
    kind: std::marker::PhantomData<(C, Z)>,
}

impl<'a, C: Codes, Z: Scales> BlockProduct<'a, C, Z> {
    fn new(product: TileProduct<'a>) -> Self {
        Self { product, kind: std::marker::PhantomData }
    }

    #[inline(always)]
    fn sums<S: Simd, const R: usize>(s: S, tile: &[u8], x: [&[Quantized]; R]) -> [S::F32; R] {
        let (blocks, head_bytes) = Z::HEAD;
        let block_bytes = Z::BYTES + C::BYTES;
        let mut sums = [s.splat(0.0); R];
        for (g, group) in tile.chunks_exact(head_bytes + blocks * block_bytes).enumerate() {
            let (head, group) = group.split_at(head_bytes);
            let x = array!(R, &[] as &[Quantized], |r| &x[r][g * blocks..][..blocks]);
            for (b, block) in group.chunks_exact(block_bytes).take(blocks).enumerate() {
                let (scales, codes) = block.split_at(Z::BYTES);
                for part in 0..Z::PARTS {
                    let (of_codes, of_x) = (C::BYTES / Z::PARTS, 32 / Z::PARTS);
                    let codes = &codes[part * of_codes..][..of_codes];
                    let part_x = array!(R, &[] as &[i8], |r| &x[r][b].codes[part * of_x..][..of_x]);
                    let dots = C::dot::<S, R>(s, codes, part_x);
                    let scale = Z::scale(s, head, scales, part);
                    for r in 0..R {
                        sums[r] = s.fma(dots[r], s.mul(scale, s.splat(x[r][b].d)), sums[r]);
                    }
                }
                if let Some(min) = Z::min(s, head, scales) {
                    for r in 0..R {
                        sums[r] = s.fma(min, s.splat(x[r][b].sum), sums[r]);
                    }
                }
            }
        }
        sums
    }
}

impl<C: Codes, Z: Scales> Kernel for BlockProduct<'_, C, Z> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let TileProduct { tile, x, rows, out, .. } = self.product;
        let across = x.cols / 32;
        by_fours!(rows.len(), |from, R| {
            let x = array!(R, &[] as &[Quantized], |r| &x.blocks
                [rows[from + r] as usize * across..][..across]);
            let sums = Self::sums::<S, R>(s, tile, x);
            for (sum, out) in sums.into_iter().zip(&mut out[from..]) {
                s.store(sum, out);
            }
        });
    }
}
