//! Weights as tiles, and the product with them.

use std::ops::Range;

use half::{bf16, f16};
use minisgl_tensor::{BackendError, DType, HostTensor, Precision, Result};

use crate::backend::Machine;
use crate::kernels::{Rows, TileProduct};
use crate::memory::{Piece, Shared};
use crate::quant::{block32, decode_row};
use crate::simd::LANES;
use crate::tiles::Layout;

/// Rows of activations that one work item multiplies with a tile: the tile stays in the first
/// cache, the rows in the second.
const PANEL: usize = 64;

/// `[rows, cols]`, packed.
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    tiles: Vec<Tile>,
    pieces: Vec<Piece>,
}

/// Up to sixteen rows.
struct Tile {
    dtype: DType,
    first_row: usize,
    lanes: usize,
    piece: usize,
    offset: usize,
    bytes: usize,
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
        let mut matrix = Self { rows: 0, cols, tiles: Vec::new(), pieces: Vec::new() };
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
        let dtype = kept_as(source.dtype, precision);
        let bytes = match dtype.is_quantized() {
            true => Layout::of(dtype).tile_bytes(self.cols),
            false => self.cols * LANES * dtype.block_bytes(),
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
        for index in 0..count {
            let lanes = LANES.min(rows.len() - index * LANES);
            let (first_row, piece) = (self.rows + index * LANES, self.pieces.len());
            let offset = index * bytes;
            self.tiles.push(Tile { dtype, first_row, lanes, piece, offset, bytes });
        }
        self.rows += rows.len();
        self.pieces.push(piece);
        Ok(())
    }

    fn tile_bytes(&self, tile: &Tile) -> &[u8] {
        &self.pieces[tile.piece].as_bytes()[tile.offset..][..tile.bytes]
    }

    /// Whether products need activations in 8 bits, and in f32.
    pub fn needs(&self) -> Needs {
        let any = |quantized| self.piece_types().any(|dtype| dtype.is_quantized() == quantized);
        Needs { blocks: any(true), floats: any(false) }
    }

    fn piece_types(&self) -> impl Iterator<Item = DType> {
        // One look a piece is enough; a piece's first tile is the one at offset 0.
        self.tiles.iter().filter(|tile| tile.offset == 0).map(|tile| tile.dtype)
    }

    /// Decodes row `index`.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        let found = self.tiles.partition_point(|tile| tile.first_row <= index) - 1;
        let tile = &self.tiles[found];
        let (bytes, lane) = (self.tile_bytes(tile), index - tile.first_row);
        match tile.dtype {
            DType::F32 => column_elements(bytes, lane, out, |x: f32| x),
            DType::F16 => column_elements(bytes, lane, out, f16::to_f32),
            DType::BF16 => column_elements(bytes, lane, out, bf16::to_f32),
            dtype => {
                let layout = Layout::of(dtype);
                for (index, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let block = layout.get(bytes, lane, index);
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = block.element(dtype, i);
                    }
                }
            }
        }
    }

    /// Products with `x[rows[..]]`. Calls `finish(m, first, products)` with the products of
    /// `x[rows[m..]]` and the matrix's rows `first..`, each row of them up to 16 long.
    pub fn multiply(&self, on: &Machine, x: Rows<'_>, rows: &[u32], finish: &Finish<'_>) {
        self.each_item(on, rows, self.tiles.len(), &|part, index, buffer| {
            let tile = &self.tiles[index];
            self.product(on, tile, x, &rows[part.clone()], buffer);
            finish(part.start, tile.first_row, tile.lanes, buffer);
        });
    }

    /// As `multiply` for a gated matrix, the gate's rows first: products are
    /// `combine(gate, up)`. Errors: its parts are not a gate and an equally large rest.
    pub fn multiply_gated(
        &self,
        on: &Machine,
        x: Rows<'_>,
        rows: &[u32],
        combine: &Combine<'_>,
        finish: &Finish<'_>,
    ) -> Result<()> {
        let (gates, ups) = self.tiles.split_at(self.tiles.len() / 2);
        if ups.first().is_none_or(|up| 2 * up.first_row != self.rows) {
            let message = "a gated matrix is one part, or a gate and an equally large rest";
            return Err(BackendError::Unsupported(message.into()));
        }
        self.each_item(on, rows, gates.len(), &|part, index, buffer| {
            let (gate, up) = (&gates[index], &ups[index]);
            let mut factor = [[0.0; LANES]; PANEL];
            let factor = &mut factor[..buffer.len()];
            self.product(on, gate, x, &rows[part.clone()], buffer);
            self.product(on, up, x, &rows[part.clone()], factor);
            combine(buffer, factor);
            finish(part.start, gate.first_row, gate.lanes, buffer);
        });
        Ok(())
    }

    fn product(
        &self,
        on: &Machine,
        tile: &Tile,
        x: Rows<'_>,
        rows: &[u32],
        out: &mut [[f32; LANES]],
    ) {
        let tile_bytes = self.tile_bytes(tile);
        TileProduct { dtype: tile.dtype, tile: tile_bytes, x, rows, out }.run_on(on.isa);
    }

    /// Calls `work(range of rows, tile, buffer)` for all panels of rows and all tiles.
    fn each_item(&self, on: &Machine, rows: &[u32], tiles: usize, work: &Work<'_>) {
        on.pool.run(rows.len().div_ceil(PANEL) * tiles, &|_, item| {
            let (first, tile) = (item / tiles * PANEL, item % tiles);
            let part = first..rows.len().min(first + PANEL);
            if part.len() == 1 {
                // No zeros for a whole panel where there is but one row.
                work(part, tile, &mut [[0.0; LANES]]);
            } else {
                let mut buffer = [[0.0; LANES]; PANEL];
                let count = part.len();
                work(part, tile, &mut buffer[..count]);
            }
        });
    }
}

/// Called with the first row of activations, the first row of the matrix, how many of these there
/// are, and their products.
pub type Finish<'a> = dyn Fn(usize, usize, usize, &[[f32; LANES]]) + Sync + 'a;

/// Makes of the gates' products, with those of what they gate, the result.
type Combine<'a> = dyn Fn(&mut [[f32; LANES]], &[[f32; LANES]]) + Sync + 'a;

/// Called with a range of rows, a tile's number, and room for their products.
type Work<'a> = dyn Fn(Range<usize>, usize, &mut [[f32; LANES]]) + Sync + 'a;

/// In which forms a matrix wants its activations.
#[derive(Clone, Copy)]
pub struct Needs {
    pub blocks: bool,
    pub floats: bool,
}

fn kept_as(dtype: DType, precision: Precision) -> DType {
    match (precision, dtype) {
        (_, DType::F32 | DType::F16 | DType::BF16) => dtype,
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
            let layout = Layout::of(dtype);
            for (lane, row) in rows.enumerate() {
                for index in 0..self.cols / 32 {
                    layout.put(tile, lane, index, &block32(dtype, self.row(row), index));
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
                _ => spread(tile, lane, &floats, bf16::from_f32),
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
