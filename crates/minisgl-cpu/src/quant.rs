//! GGML's block types and the plain ones, decoded one row at a time in plain code.
//!
//! This is what the packed kernels are packed from and tested against. Layouts as in GGML's
//! `ggml-common.h`: f16 scales, two 4-bit codes a byte (element i low, element i + 16 high), fifth
//! bits in a word of their own, K types in superblocks of 256 with 6- or 8-bit scales for 32 or 16.

use half::{bf16, f16};
use minisgl_tensor::DType;

/// A block split into what its elements are computed from:
/// `element[i] = scale(i) · code[i] − min(i)`.
#[derive(Clone, Copy)]
pub struct Block32 {
    /// Unsigned codes for the types with an offset or a minimum; two's complement for Q8_0 and
    /// Q6_K.
    pub codes: [u8; 32],
    /// `d`.
    pub d: f16,
    /// `m` of Q4_1 and Q5_1, `dmin` of Q4_K and Q5_K.
    pub m: f16,
    /// K types: multiplies `d`, for either half of the block.
    pub scale: [i8; 2],
    /// Q4_K and Q5_K: multiplies `dmin`.
    pub min: u8,
}

impl Block32 {
    /// Element `i` as GGML defines it.
    pub fn element(&self, dtype: DType, i: usize) -> f32 {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let unsigned = f32::from(self.codes[i]);
        let signed = f32::from(self.codes[i] as i8);
        match dtype {
            DType::Q4_0 => d * (unsigned - 8.0),
            DType::Q5_0 => d * (unsigned - 16.0),
            DType::Q4_1 | DType::Q5_1 => d * unsigned + m,
            DType::Q8_0 => d * signed,
            DType::Q4K | DType::Q5K => {
                d * f32::from(self.scale[0]) * unsigned - m * f32::from(self.min)
            }
            DType::Q6K => d * f32::from(self.scale[i / 16]) * signed,
            _ => unreachable!("{dtype} has no blocks"),
        }
    }
}

/// The `index`th 32 elements of a row of a block type.
pub fn block32(dtype: DType, row: &[u8], index: usize) -> Block32 {
    let per_block = dtype.block_len() / 32;
    let bytes = dtype.block_bytes();
    let block = &row[index / per_block * bytes..][..bytes];
    let sub = index % per_block;
    let mut out =
        Block32 { codes: [0; 32], d: half_at(block, 0), m: f16::ZERO, scale: [1; 2], min: 0 };
    match dtype {
        DType::Q4_0 => nibbles(&block[2..], &mut out.codes),
        DType::Q4_1 => {
            out.m = half_at(block, 2);
            nibbles(&block[4..], &mut out.codes);
        }
        DType::Q5_0 => {
            nibbles(&block[6..], &mut out.codes);
            fifth_bits(&block[2..6], &mut out.codes);
        }
        DType::Q5_1 => {
            out.m = half_at(block, 2);
            nibbles(&block[8..], &mut out.codes);
            fifth_bits(&block[4..8], &mut out.codes);
        }
        DType::Q8_0 => out.codes.copy_from_slice(&block[2..]),
        DType::Q4K | DType::Q5K => k45(dtype, block, sub, &mut out),
        DType::Q6K => k6(block, sub, &mut out),
        _ => unreachable!("{dtype} has no blocks"),
    }
    out
}

/// Decodes a row of any weight type. `out` has the row's elements.
///
/// # Panics
/// If `row` has not the bytes of `out.len()` elements.
pub fn decode_row(dtype: DType, row: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.bytes_of(out.len()), Some(row.len()), "bytes of a {dtype} row");
    match dtype {
        DType::F32 => {
            for (out, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
                *out = f32::from_le_bytes(bytes);
            }
        }
        DType::F16 => {
            for (out, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
                *out = f16::from_le_bytes(bytes).to_f32();
            }
        }
        DType::BF16 => {
            for (out, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
                *out = bf16::from_le_bytes(bytes).to_f32();
            }
        }
        DType::F8E4M3 => {
            for (out, &byte) in out.iter_mut().zip(row) {
                *out = e4m3(byte);
            }
        }
        DType::I32 | DType::U8 => unreachable!("{dtype} is no weight type"),
        _ => {
            for (index, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let block = block32(dtype, row, index);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = block.element(dtype, i);
                }
            }
        }
    }
}

/// FP8 with 4 exponent bits (bias 7), 3 mantissa bits, no infinities (Micikevicius et al., 2022).
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

fn nibbles(bytes: &[u8], codes: &mut [u8; 32]) {
    for (i, &byte) in bytes.iter().take(16).enumerate() {
        codes[i] = byte & 15;
        codes[i + 16] = byte >> 4;
    }
}

fn fifth_bits(bytes: &[u8], codes: &mut [u8; 32]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Q4_K and Q5_K: `d, dmin, 12 bytes of 6-bit scales and minimums, (fifth bits), nibbles`, where
/// sub-blocks 2j and 2j + 1 share 32 bytes of nibbles.
fn k45(dtype: DType, block: &[u8], sub: usize, out: &mut Block32) {
    let packed = &block[4..16];
    let (scale, min) = if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        (
            (packed[sub + 4] & 15) | (packed[sub - 4] >> 6 << 4),
            (packed[sub + 4] >> 4) | (packed[sub] >> 6 << 4),
        )
    };
    out.m = half_at(block, 2);
    out.scale = [scale as i8; 2];
    out.min = min;
    let low = if dtype == DType::Q5K { &block[48..] } else { &block[16..] };
    let shift = 4 * (sub % 2);
    for (i, code) in out.codes.iter_mut().enumerate() {
        *code = low[sub / 2 * 32 + i] >> shift & 15;
        if dtype == DType::Q5K {
            *code |= (block[16 + i] >> sub & 1) << 4;
        }
    }
}

/// Q6_K: `128 bytes of low nibbles, 64 of high bit pairs, 16 scales, d`; codes minus 32.
fn k6(block: &[u8], sub: usize, out: &mut Block32) {
    let (half, quarter) = (sub / 4, sub % 4);
    out.d = half_at(block, 208);
    out.scale = [block[192 + 2 * sub] as i8, block[193 + 2 * sub] as i8];
    for (i, code) in out.codes.iter_mut().enumerate() {
        let low = block[half * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
        let high = block[128 + half * 32 + i] >> (2 * quarter) & 3;
        *code = (low | high << 4).wrapping_sub(32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_corners() {
        assert_eq!(e4m3(0x7e), 448.0);
        assert_eq!(e4m3(0x01), 2f32.powi(-9));
        assert_eq!(e4m3(0xb8), -1.0);
        assert!(e4m3(0x7f).is_nan());
    }

    /// One hand-made block a type, against values computed by hand from GGML's formulas.
    #[test]
    fn blocks_by_hand() {
        let one = f16::ONE.to_le_bytes();
        let two = f16::from_f32(2.0).to_le_bytes();
        let mut out = [0.0; 32];

        let mut q4 = [one.as_slice(), &[0x9c; 16]].concat();
        decode_row(DType::Q4_0, &q4, &mut out);
        assert_eq!((out[0], out[16]), (4.0, 1.0));
        q4.splice(2..2, two);
        decode_row(DType::Q4_1, &q4, &mut out);
        assert_eq!((out[0], out[16]), (14.0, 11.0));

        let mut q5 = [one.as_slice(), &[1, 0, 2, 0], &[0x9c; 16]].concat();
        decode_row(DType::Q5_0, &q5, &mut out);
        assert_eq!((out[0], out[1], out[16], out[17]), (12.0, -4.0, -7.0, 9.0));
        q5.splice(2..2, two);
        decode_row(DType::Q5_1, &q5, &mut out);
        assert_eq!((out[0], out[1], out[17]), (30.0, 14.0, 27.0));

        let q8 = [two.as_slice(), &[0xff; 32]].concat();
        decode_row(DType::Q8_0, &q8, &mut out);
        assert_eq!(out[31], -2.0);
    }

    #[test]
    fn superblocks_by_hand() {
        let mut out = [0.0; 256];
        let mut block = vec![0u8; 144];
        block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        block[4] = 0b1100_0011; // sub-block 0: scale 3; sub-block 4: high bits 3
        block[8] = 0b0100_0010; // sub-block 0: min 2; sub-block 4: min's high bits 1
        block[12] = 0x21; // sub-block 4: scale 1 + 48, min 2 + 16
        block[16] = 0x07; // element 0: 7
        block[16 + 64] = 0x09; // element 128: 9
        decode_row(DType::Q4K, &block, &mut out);
        assert_eq!((out[0], out[128]), (3.0 * 7.0 - 1.0, 49.0 * 9.0 - 9.0));

        let mut five = [&block[..16], &[0; 32], &block[16..]].concat();
        five[16] = 0b0001_0001; // fifth bits of elements 0 and 128
        decode_row(DType::Q5K, &five, &mut out);
        assert_eq!((out[0], out[128]), (3.0 * 23.0 - 1.0, 49.0 * 25.0 - 9.0));

        let mut six = vec![0u8; 210];
        six[208..].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        six[192..208].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|i| i as u8 + 1));
        six[64 + 32 + 5] = 0xa0; // half 1, quarter 3, element 5: low 10
        six[128 + 32 + 5] = 0b1100_0000; // its high bits: 3
        decode_row(DType::Q6K, &six, &mut out);
        assert_eq!(out[128 + 96 + 5], 0.25 * 15.0 * (10.0 + 48.0 - 32.0));
        assert_eq!(out[20], 0.25 * 2.0 * -32.0);
    }

    /// Random blocks, against what llama.cpp's Python package makes of them
    /// (`scripts/make_block_reference.py`).
    #[test]
    fn blocks_are_what_the_reference_decodes() {
        let bytes = |hex: &str| -> Vec<u8> {
            let digits = hex.as_bytes().chunks(2).map(|two| std::str::from_utf8(two).unwrap());
            digits.map(|two| u8::from_str_radix(two, 16).unwrap()).collect()
        };
        let types = [
            ("Q4_0", DType::Q4_0),
            ("Q4_1", DType::Q4_1),
            ("Q5_0", DType::Q5_0),
            ("Q5_1", DType::Q5_1),
            ("Q8_0", DType::Q8_0),
            ("Q4_K", DType::Q4K),
            ("Q5_K", DType::Q5K),
            ("Q6_K", DType::Q6K),
        ];
        let lines: Vec<&str> = include_str!("../tests/data/blocks.txt").lines().collect();
        assert_eq!(lines.len(), types.len());
        for (line, (name, dtype)) in lines.into_iter().zip(types) {
            let [stored, row, values] = line.split(' ').collect::<Vec<_>>()[..] else { panic!() };
            assert_eq!(stored, name);
            let values = bytes(values);
            let values = values.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value));
            let values: Vec<f32> = values.collect();
            let mut out = vec![f32::NAN; values.len()];
            decode_row(dtype, &bytes(row), &mut out);
            for (at, (ours, theirs)) in out.iter().zip(&values).enumerate() {
                // Both round to f32, though not after the same operations.
                let off = (ours - theirs).abs();
                assert!(off <= 1e-6 * theirs.abs().max(0.1), "{name} {at}: {ours}, {theirs}");
            }
        }
    }
}
