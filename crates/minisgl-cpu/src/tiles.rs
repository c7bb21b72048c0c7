//! How weights lie in memory: tiles of 16 rows, made for one vector to hold a column's 16 rows.
//!
//! A tile of a plain type is its columns, one behind the other, 16 elements each. A tile of a block
//! type is the scales of its blocks of 32 columns, one behind the other, then, from a multiple of 64
//! bytes on, their codes:
//!
//! ```text
//! head      K types, before every 8 blocks' scales: 16 × f16 d, 16 × f16 dmin
//! scales    16 × f16 d, then (Q4_1, Q5_1) 16 × f16 m; K types: 2 × 16 bytes of scales, minimums
//! codes     4 bits: 4 chunks of 64 bytes, chunk c holding of each row columns 8c..8c+4 in the low
//!           and 8c+4..8c+8 in the high halves of four bytes; 8 bits: 8 chunks of 4 columns
//! ```
//!
//! Five- and six-bit codes take a byte. Nothing is rounded: a block comes out as it went in.

use half::f16;
use minisgl_tensor::DType;

use crate::quant::Block32;
use crate::simd::LANES;

/// Sizes of the parts of a block type's tile.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    dtype: DType,
    /// Whether codes take four bits, not eight.
    nibbles: bool,
    /// Blocks behind one head.
    blocks: usize,
    head: usize,
    scales: usize,
}

impl Layout {
    /// Of a block type.
    pub fn of(dtype: DType) -> Self {
        let (nibbles, scales) = match dtype {
            DType::Q4_0 => (true, 2 * LANES),
            DType::Q4_1 => (true, 4 * LANES),
            DType::Q5_0 | DType::Q8_0 => (false, 2 * LANES),
            DType::Q5_1 => (false, 4 * LANES),
            DType::Q4K => (true, 2 * LANES),
            DType::Q5K | DType::Q6K => (false, 2 * LANES),
            _ => unreachable!("{dtype} has no blocks"),
        };
        let blocks = dtype.block_len() / 32;
        let head = if blocks > 1 { 4 * LANES } else { 0 };
        Self { dtype, nibbles, blocks, head, scales }
    }

    fn code_bytes(&self) -> usize {
        if self.nibbles { 16 * LANES } else { 32 * LANES }
    }

    /// Where the codes of a tile with `blocks` blocks begin.
    fn codes(&self, blocks: usize) -> usize {
        (blocks / self.blocks * self.head + blocks * self.scales).next_multiple_of(64)
    }

    /// Bytes of a tile with `cols` columns.
    pub fn tile_bytes(&self, cols: usize) -> usize {
        self.codes(cols / 32) + cols / 32 * self.code_bytes()
    }

    /// Where block `index` of a tile of `blocks` has its head, its scales and its codes.
    fn place(&self, blocks: usize, index: usize) -> (usize, usize, usize) {
        let (group, inside) = (index / self.blocks, index % self.blocks);
        let head = group * (self.head + self.blocks * self.scales);
        let codes = self.codes(blocks) + index * self.code_bytes();
        (head, head + self.head + inside * self.scales, codes)
    }

    /// Where the code of column `i` of a block lies in its row's part of the codes, and its shift.
    fn code_at(&self, row: usize, i: usize) -> (usize, u8) {
        if self.nibbles {
            (i / 8 * 64 + 4 * row + i % 4, (i % 8 / 4 * 4) as u8)
        } else {
            (i / 4 * 64 + 4 * row + i % 4, 0)
        }
    }

    /// What is subtracted from a code that is kept signed.
    fn offset(&self) -> u8 {
        if self.dtype == DType::Q5_0 { 16 } else { 0 }
    }

    /// Writes block `index` of `blocks` of a row into a zeroed tile.
    pub fn put(
        &self,
        tile: &mut [u8],
        row: usize,
        (index, blocks): (usize, usize),
        block: &Block32,
    ) {
        let (head, scales, codes) = self.place(blocks, index);
        let halves = if self.head > 0 { head } else { scales };
        tile[halves + 2 * row..][..2].copy_from_slice(&block.d.to_le_bytes());
        if self.head > 0 || self.scales == 4 * LANES {
            tile[halves + 2 * LANES + 2 * row..][..2].copy_from_slice(&block.m.to_le_bytes());
        }
        if self.head > 0 {
            tile[scales + row] = block.scale[0] as u8;
            tile[scales + LANES + row] =
                if self.dtype == DType::Q6K { block.scale[1] as u8 } else { block.min };
        }
        let codes = &mut tile[codes..];
        for (i, code) in block.codes.iter().enumerate() {
            let (at, shift) = self.code_at(row, i);
            codes[at] |= code.wrapping_sub(self.offset()) << shift;
        }
    }

    /// What `put` wrote.
    pub fn get(&self, tile: &[u8], row: usize, (index, blocks): (usize, usize)) -> Block32 {
        let (head, scales, codes) = self.place(blocks, index);
        let halves = if self.head > 0 { head } else { scales };
        let half = |at: usize| f16::from_le_bytes([tile[at], tile[at + 1]]);
        let both = self.head > 0 || self.scales == 4 * LANES;
        let mut block = Block32 {
            codes: [0; 32],
            d: half(halves + 2 * row),
            m: if both { half(halves + 2 * LANES + 2 * row) } else { f16::ZERO },
            scale: [1; 2],
            min: 0,
        };
        if self.head > 0 {
            let (first, second) = (tile[scales + row], tile[scales + LANES + row]);
            block.scale = if self.dtype == DType::Q6K { [first, second] } else { [first; 2] }
                .map(|byte| byte as i8);
            block.min = second;
        }
        let codes = &tile[codes..];
        for (i, code) in block.codes.iter_mut().enumerate() {
            let (at, shift) = self.code_at(row, i);
            let stored = codes[at] >> shift & if self.nibbles { 15 } else { 255 };
            *code = stored.wrapping_add(self.offset());
        }
        block
    }
}
