//! Weights as tiles, and the product with them.

use std::ops::Range;

use half::{bf16, f16};
use minisgl_tensor::{Activation, BackendError, DType, HostTensor, Precision, Result};

use crate::backend::{Machine, Target};
use crate::kernels::{PANEL, Rows, TileProduct, UnitRoom};
use crate::memory::{Piece, Shared};
use crate::quant::{block32, decode_row};
use crate::simd::{Aligned, Kernel, LANES, Simd, math};
use crate::tiles::Layout;

/// Rows of activations that one work item multiplies with a tile: the tile stays in the first
/// cache, the rows in the second.
const ITEM_ROWS: usize = 4 * PANEL;

/// What a thread computes products in.
pub struct Scratch {
    products: Aligned<[[f32; LANES]; ITEM_ROWS]>,
    /// Products of the other half of a gated matrix.
    factors: Aligned<[[f32; LANES]; ITEM_ROWS]>,
    room: Box<UnitRoom>,
}

impl Default for Scratch {
    fn default() -> Self {
        let zeros = Aligned([[0.0; LANES]; ITEM_ROWS]);
        Self { products: zeros, factors: zeros, room: UnitRoom::new() }
    }
}

/// `[rows, cols]`, packed.
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    /// How many all parts have.
    tiles: usize,
    parts: Vec<Part>,
}

/// Some rows, of one type: tiles of sixteen rows, the last of which may have fewer.
struct Part {
    dtype: DType,
    first_row: usize,
    rows: usize,
    first_tile: usize,
    tile_bytes: usize,
    piece: Piece,
}

/// Up to sixteen rows.
struct Tile<'a> {
    dtype: DType,
    first_row: usize,
    lanes: usize,
    bytes: &'a [u8],
}

/// A vector in f32: norm weights, biases.
pub struct Vector(pub Vec<f32>);

/// The matrices of a layer's experts.
pub struct Experts(pub Vec<Matrix>);

impl Matrix {
    /// Packs `parts`, stacked along the rows, in their own types where `precision` is native.
    /// Errors: a part that is no matrix of `cols` columns, or has not its shape's bytes.
    pub fn pack(parts: &[HostTensor<'_>], precision: Precision, on: &Machine) -> Result<Self> {
        let cols = parts.first().map_or(0, HostTensorExt::cols);
        let mut matrix = Self { rows: 0, cols, tiles: 0, parts: Vec::new() };
        for part in parts {
            let source = Source::new(part, cols)?;
            // A gated matrix in one piece must have tiles that begin with the second half.
            let halves = parts.len() == 1 && source.rows.is_multiple_of(2);
            let middle = if halves { source.rows / 2 } else { source.rows };
            matrix.append(&source, 0..middle, precision, on)?;
            matrix.append(&source, middle..source.rows, precision, on)?;
        }
        Ok(matrix)
    }

    fn append(
        &mut self,
        source: &Source<'_>,
        rows: Range<usize>,
        precision: Precision,
        on: &Machine,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let dtype = kept_as(source.dtype, precision);
        let bytes = match dtype {
            DType::F32 | DType::F16 => self.cols * LANES * dtype.block_bytes(),
            DType::BF16 => self.cols.div_ceil(32) * 16 * size_of::<[Pair; LANES]>(),
            _ => Layout::of(dtype).tile_bytes(self.cols),
        };
        let count = rows.len().div_ceil(LANES);
        let mut piece = on.arena().take(count * bytes)?;
        let target = Shared::of_slice(piece.bytes_mut());
        on.pool.run(count, &|_, index| {
            let first = rows.start + index * LANES;
            // SAFETY: each tile is its own item.
            let tile = unsafe { target.part(index * bytes, bytes) };
            source.pack_tile(first..rows.end.min(first + LANES), dtype, tile);
        });
        self.parts.push(Part {
            dtype,
            first_row: self.rows,
            rows: rows.len(),
            first_tile: self.tiles,
            tile_bytes: bytes,
            piece,
        });
        self.rows += rows.len();
        self.tiles += count;
        Ok(())
    }

    fn tile(&self, index: usize) -> Tile<'_> {
        let found = self.parts.partition_point(|part| part.first_tile <= index) - 1;
        let part = &self.parts[found];
        let at = index - part.first_tile;
        Tile {
            dtype: part.dtype,
            first_row: part.first_row + at * LANES,
            lanes: LANES.min(part.rows - at * LANES),
            bytes: &part.piece.as_bytes()[at * part.tile_bytes..][..part.tile_bytes],
        }
    }

    /// In which forms products need their activations.
    pub fn needs(&self, on: &Machine) -> Needs {
        Needs {
            blocks: self.parts.iter().any(|part| part.dtype.is_quantized()),
            halves: on.isa.has_unit() && self.parts.iter().any(|part| part.dtype == DType::BF16),
        }
    }

    /// Decodes row `index`.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        let found = self.parts.partition_point(|part| part.first_row <= index) - 1;
        let part = &self.parts[found];
        let tile = self.tile(part.first_tile + (index - part.first_row) / LANES);
        let (bytes, lane) = (tile.bytes, index - tile.first_row);
        match tile.dtype {
            DType::F32 => column_elements(bytes, lane, out, |x: f32| x),
            DType::F16 => column_elements(bytes, lane, out, f16::to_f32),
            DType::BF16 => {
                let pairs: &[[Pair; LANES]] = bytemuck::cast_slice(bytes);
                for (out, pair) in out.chunks_mut(2).zip(pairs) {
                    for (out, x) in out.iter_mut().zip(pair[lane]) {
                        *out = x.to_f32();
                    }
                }
            }
            dtype => {
                let layout = Layout::of(dtype);
                for (index, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let block = layout.get(bytes, lane, (index, self.cols / 32));
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = block.element(dtype, i);
                    }
                }
            }
        }
    }

    /// Puts the products with the first `rows` rows of `x` into `target`.
    pub fn multiply(&self, on: &Machine, x: Rows<'_>, rows: usize, target: Target<'_>) {
        self.each_item(on, rows, self.tiles, &|part, index, scratch| {
            let tile = self.tile(index);
            let Scratch { products, room, .. } = scratch;
            let products = &mut products.0[..part.len()];
            target.fetch(on.isa, (part.start, tile.first_row), part.len());
            product(on, &tile, x.from(part.start), room, products);
            target.put(on.isa, (part.start, tile.first_row, tile.lanes), products);
        });
    }

    /// As `multiply` for a gated matrix, the gate's rows first: products are
    /// `activation(gate) · up`. Errors: its parts are not a gate and an equally large rest.
    pub fn multiply_gated(
        &self,
        on: &Machine,
        x: Rows<'_>,
        rows: usize,
        activation: Activation,
        target: Target<'_>,
    ) -> Result<()> {
        let gates = self.tiles / 2;
        if gates == 0 || 2 * self.tile(gates).first_row != self.rows {
            let message = "a gated matrix is one part, or a gate and an equally large rest";
            return Err(BackendError::Unsupported(message.into()));
        }
        self.each_item(on, rows, gates, &|part, index, scratch| {
            let (gate, up) = (self.tile(index), self.tile(gates + index));
            let Scratch { products, factors, room } = scratch;
            let (products, factors) = (&mut products.0[..part.len()], &mut factors.0[..part.len()]);
            let x = x.from(part.start);
            target.fetch(on.isa, (part.start, gate.first_row), part.len());
            product(on, &gate, x, room, products);
            product(on, &up, x, room, factors);
            on.isa.run(Gate { activation, gates: products, ups: factors });
            target.put(on.isa, (part.start, gate.first_row, gate.lanes), products);
        });
        Ok(())
    }

    /// Calls `work(range of rows, tile, scratch)` for all runs of rows and all tiles.
    fn each_item(&self, on: &Machine, rows: usize, tiles: usize, work: &Work<'_>) {
        on.pool.run(rows.div_ceil(ITEM_ROWS) * tiles, &|thread, item| {
            let (first, tile) = (item / tiles * ITEM_ROWS, item % tiles);
            // SAFETY: this thread's, and operations run one at a time.
            let scratch = unsafe { on.product.get(thread) };
            work(first..rows.min(first + ITEM_ROWS), tile, scratch);
        });
    }
}

fn product(
    on: &Machine,
    tile: &Tile<'_>,
    x: Rows<'_>,
    room: &mut UnitRoom,
    out: &mut [[f32; LANES]],
) {
    TileProduct { dtype: tile.dtype, tile: tile.bytes, x, room, out }.run_on(on.isa);
}

/// `gates = activation(gates) · ups`.
struct Gate<'a> {
    activation: Activation,
    gates: &'a mut [[f32; LANES]],
    ups: &'a [[f32; LANES]],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (g, u) in self.gates.as_flattened_mut().iter_mut().zip(self.ups.as_flattened()) {
            *g = math::activate(self.activation, *g) * u;
        }
    }
}

/// Called with a range of rows, a tile's number, and the thread's scratch.
type Work<'a> = dyn Fn(Range<usize>, usize, &mut Scratch) + Sync + 'a;

/// In which forms, beside f32, a matrix wants its activations.
#[derive(Clone, Copy)]
pub struct Needs {
    pub blocks: bool,
    pub halves: bool,
}

/// Two columns of a row of BF16.
type Pair = [bf16; 2];

fn kept_as(dtype: DType, precision: Precision) -> DType {
    match (precision, dtype) {
        (_, DType::F32 | DType::F16) => dtype,
        // Three bits of mantissa and a scale come closest, at half the memory of f32, in bf16.
        (Precision::Native, DType::F8E4M3) => DType::BF16,
        (Precision::Native, _) => dtype,
        (Precision::Exact, _) => DType::F32,
    }
}

fn column_elements<T: bytemuck::Pod>(
    tile: &[u8],
    lane: usize,
    out: &mut [f32],
    convert: impl Fn(T) -> f32,
) {
    let columns: &[[T; LANES]] = bytemuck::cast_slice(tile);
    for (out, column) in out.iter_mut().zip(columns) {
        *out = convert(column[lane]);
    }
}

/// A checked part of a matrix.
struct Source<'a> {
    tensor: &'a HostTensor<'a>,
    dtype: DType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
}

trait HostTensorExt {
    fn cols(&self) -> usize;
}

impl HostTensorExt for HostTensor<'_> {
    fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }
}

impl<'a> Source<'a> {
    fn new(tensor: &'a HostTensor<'a>, cols: usize) -> Result<Self> {
        let (name, dtype, shape) = (&tensor.name, tensor.dtype, &tensor.shape);
        let refuse = |why: &str| {
            BackendError::Unsupported(format!("{name}, {dtype} {shape:?}: {why}").into())
        };
        if cols == 0 || tensor.cols() != cols {
            return Err(refuse("not as wide as its matrix"));
        }
        if matches!(dtype, DType::I32 | DType::U8) {
            return Err(refuse("no weight type"));
        }
        let rows: usize = shape[..shape.len() - 1].iter().product();
        let row_bytes = dtype.bytes_of(cols).ok_or_else(|| refuse("rows are not whole blocks"))?;
        if row_bytes.checked_mul(rows) != Some(tensor.data.len()) {
            return Err(refuse("not the bytes of its shape"));
        }
        if let Some(scale) = &tensor.scale {
            let blocks =
                rows.div_ceil(scale.block[0].max(1)) * cols.div_ceil(scale.block[1].max(1));
            if scale.block.contains(&0) || scale.values.len() != blocks {
                return Err(refuse("not one scale for each of its blocks"));
            }
        }
        Ok(Self { tensor, dtype, rows, cols, row_bytes })
    }

    fn row(&self, index: usize) -> &[u8] {
        &self.tensor.data[index * self.row_bytes..][..self.row_bytes]
    }

    fn decode(&self, index: usize, out: &mut [f32]) {
        decode_row(self.dtype, self.row(index), out);
        if let Some(scale) = &self.tensor.scale {
            let across = self.cols.div_ceil(scale.block[1]);
            let scales = &scale.values[index / scale.block[0] * across..][..across];
            for (x, s) in out.chunks_mut(scale.block[1]).zip(scales) {
                x.iter_mut().for_each(|x| *x *= s);
            }
        }
    }

    fn pack_tile(&self, rows: Range<usize>, dtype: DType, tile: &mut [u8]) {
        if dtype.is_quantized() {
            let (layout, blocks) = (Layout::of(dtype), self.cols / 32);
            for (lane, row) in rows.enumerate() {
                for index in 0..blocks {
                    let block = block32(dtype, self.row(row), index);
                    layout.put(tile, lane, (index, blocks), &block);
                }
            }
            return;
        }
        let mut floats = vec![0.0; self.cols];
        for (lane, row) in rows.enumerate() {
            self.decode(row, &mut floats);
            match dtype {
                DType::F32 => spread(tile, lane, &floats, |x| x),
                DType::F16 => spread(tile, lane, &floats, f16::from_f32),
                _ => {
                    let pairs: &mut [[Pair; LANES]] = bytemuck::cast_slice_mut(tile);
                    for (pair, x) in pairs.iter_mut().zip(floats.chunks(2)) {
                        for (to, &x) in pair[lane].iter_mut().zip(x) {
                            *to = bf16::from_f32(x);
                        }
                    }
                }
            }
        }
    }
}

fn spread<T: bytemuck::Pod>(tile: &mut [u8], lane: usize, row: &[f32], to: impl Fn(f32) -> T) {
    let columns: &mut [[T; LANES]] = bytemuck::cast_slice_mut(tile);
    for (column, &x) in columns.iter_mut().zip(row) {
        column[lane] = to(x);
    }
}

/// The elements of `parts`, one behind the other.
pub fn vector(parts: &[HostTensor<'_>]) -> Result<Vector> {
    let mut out = Vec::new();
    for part in parts {
        let flat = HostTensor { shape: vec![1, part.shape.iter().product()], ..part.clone() };
        let at = out.len();
        out.resize(at + flat.cols(), 0.0);
        if flat.cols() > 0 {
            Source::new(&flat, flat.cols())?.decode(0, &mut out[at..]);
        }
    }
    Ok(Vector(out))
}
