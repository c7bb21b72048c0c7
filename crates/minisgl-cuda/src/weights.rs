//! Weights on the card: in the type of activations, whatever the file has.

use half::{bf16, f16};
use minisgl_tensor::{BackendError, DType, HostTensor, Norm, Result, Tensor, Weight};

use crate::backend::{CudaBackend, norm_args};
use crate::device::{Launch, args, fail};

/// What a `Weight` of this backend holds.
pub(crate) struct DeviceWeight(pub(crate) Tensor);

/// The tensor behind a weight.
pub(crate) fn tensor(weight: &Weight) -> &Tensor {
    &weight.get::<DeviceWeight>().0
}

impl CudaBackend {
    /// Uploads `parts` one behind the other as `dtype`.
    pub(crate) fn load(
        &self,
        parts: &[HostTensor<'_>],
        dtype: DType,
        shape: &[usize],
    ) -> Result<Weight> {
        let memory = self.alloc_tensor(dtype, shape)?;
        let flat = memory.reshape(&[memory.elements()]);
        let mut at = 0;
        for part in parts {
            let count: usize = part.shape.iter().product();
            if at + count > flat.elements() {
                return Err(fail(format!("{} is larger than its place in {shape:?}", part.name)));
            }
            let place = flat.rows(at..at + count);
            if part.dtype == dtype && part.scale.is_none() {
                self.staging.load(&part.data, &place)?;
            } else {
                self.upload_converted(part, &place)?;
            }
            at += count;
        }
        if at != flat.elements() {
            return Err(fail(format!("parts of {shape:?} hold {at} elements")));
        }
        Ok(Weight::new(shape, DeviceWeight(memory)))
    }

    /// As `Backend::fold_norm`.
    pub(crate) fn fold(&self, norm: Norm, matrix: &Weight) -> Result<Norm> {
        let (w, (weight, _, shift)) = (tensor(matrix), norm_args(Some(&norm)));
        let shape = Launch::new(w.elements().div_ceil(256 * 8), 256);
        self.simple("scale_columns", shape, args![w, weight, shift, w.row_len(), w.elements()])?;
        // Kernels read weights before they wait for the ones in front; but none starts before this copy is done.
        self.staging.load(&1f32.to_le_bytes().repeat(w.row_len()), tensor(&norm.weight))?;
        Ok(Norm { plus_one: false, folded: true, ..norm })
    }

    /// Converts piece by piece, so that host memory stays small.
    fn upload_converted(&self, part: &HostTensor<'_>, place: &Tensor) -> Result<()> {
        let cols = part.shape.last().copied().unwrap_or(1);
        let rows = place.elements() / cols.max(1);
        let row_bytes = part.dtype.bytes_of(cols).ok_or_else(|| {
            fail(format!("{}: rows of {cols} are no whole {} blocks", part.name, part.dtype))
        })?;
        if part.data.len() < rows * row_bytes {
            return Err(fail(format!(
                "{}: {} bytes, {} expected",
                part.name,
                part.data.len(),
                rows * row_bytes
            )));
        }
        let piece = (1 << 20) / cols.max(1) + 1;
        let f32s = place.dtype() == DType::F32;
        let convert = |first: usize| {
            let last = (first + piece).min(rows);
            let mut values = Vec::with_capacity((last - first) * cols);
            dequantize(part.dtype, &part.data[first * row_bytes..last * row_bytes], &mut values)
                .map_err(|dtype| {
                    BackendError::Unsupported(
                        format!("{}: no kernel for {dtype} weights on CUDA", part.name).into(),
                    )
                })?;
            if let Some(scale) = &part.scale {
                let across = cols.div_ceil(scale.block[1]);
                for (i, value) in values.iter_mut().enumerate() {
                    let (row, col) = (first + i / cols, i % cols);
                    *value *= scale.values[row / scale.block[0] * across + col / scale.block[1]];
                }
            }
            let to = place.rows(first * cols..last * cols);
            if f32s {
                return self.staging.load(bytemuck::cast_slice(&values), &to);
            }
            let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            self.staging.load(bytemuck::cast_slice(&rounded), &to)
        };
        // A thread a part of the pieces: converting takes longer than the way to the card.
        let starts: Vec<usize> = (0..rows).step_by(piece).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let each = starts.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let converted = |lot: &[usize]| lot.iter().try_for_each(|&first| convert(first));
            let lots: Vec<_> =
                starts.chunks(each).map(|lot| scope.spawn(move || converted(lot))).collect();
            lots.into_iter().try_for_each(|lot| {
                lot.join().unwrap_or_else(|_| Err(fail("a thread that converts panicked")))
            })
        })
    }
}

/// Appends the values of `data` to `out`. Block layouts are GGML's (`ggml-common.h`).
///
/// # Errors
/// The type, where it is none of a weight's.
pub(crate) fn dequantize(dtype: DType, data: &[u8], out: &mut Vec<f32>) -> Result<(), DType> {
    let half = |b: &[u8], at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    for b in data.chunks_exact(dtype.block_bytes()) {
        match dtype {
            DType::F32 => out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            DType::F16 => out.push(half(b, 0)),
            DType::BF16 => out.push(bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            DType::F8E4M3 => out.push(f8e4m3(b[0])),
            DType::Q4_0 => nibbles(&b[2..18], |q, _| (f32::from(q) - 8.0) * half(b, 0), out),
            DType::Q4_1 => nibbles(&b[4..20], |q, _| f32::from(q) * half(b, 0) + half(b, 2), out),
            DType::Q5_0 | DType::Q5_1 => {
                let head = if dtype == DType::Q5_0 { 2 } else { 4 };
                let high = u32::from_le_bytes([b[head], b[head + 1], b[head + 2], b[head + 3]]);
                let value = |q: u8, i: usize| {
                    let q = f32::from(q) + 16.0 * (high >> i & 1) as f32;
                    if head == 2 { (q - 16.0) * half(b, 0) } else { q * half(b, 0) + half(b, 2) }
                };
                nibbles(&b[head + 4..head + 20], value, out);
            }
            DType::Q8_0 => out.extend(b[2..].iter().map(|&q| f32::from(q as i8) * half(b, 0))),
            DType::Q4K | DType::Q5K => {
                five_or_four_bits(b, dtype == DType::Q5K, half(b, 0), half(b, 2), out);
            }
            DType::Q6K => six_bits(b, half(b, 208), out),
            DType::I32 | DType::U8 => return Err(dtype),
        }
    }
    Ok(())
}

/// 32 elements: the low halves of 16 bytes, then the high halves.
fn nibbles(bytes: &[u8], value: impl Fn(u8, usize) -> f32, out: &mut Vec<f32>) {
    out.extend(bytes.iter().enumerate().map(|(i, &q)| value(q & 15, i)));
    out.extend(bytes.iter().enumerate().map(|(i, &q)| value(q >> 4, i + 16)));
}

/// Q4_K and Q5_K: 8 groups of 32 with 6-bit scales and minimums.
fn five_or_four_bits(b: &[u8], five: bool, d: f32, dmin: f32, out: &mut Vec<f32>) {
    let s = &b[4..16];
    let (high, low) = if five { (&b[16..48], &b[48..]) } else { (&b[0..0], &b[16..]) };
    for group in 0..8 {
        let (scale, min) = if group < 4 {
            (s[group] & 63, s[group + 4] & 63)
        } else {
            (s[group + 4] & 15 | s[group - 4] >> 6 << 4, s[group + 4] >> 4 | s[group] >> 6 << 4)
        };
        for i in 0..32 {
            let byte = low[group / 2 * 32 + i];
            let mut q = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            if five {
                q += (high[i] >> group & 1) * 16;
            }
            out.push(d * f32::from(scale) * f32::from(q) - dmin * f32::from(min));
        }
    }
}

/// Q6_K: two halves of 128; 4 low bits, 2 high bits, 16 signed scales.
fn six_bits(b: &[u8], d: f32, out: &mut Vec<f32>) {
    for half in 0..2 {
        let (low, high, scales) = (&b[half * 64..], &b[128 + half * 32..], &b[192 + half * 8..]);
        for quarter in 0..4 {
            for i in 0..32 {
                let byte = low[i + 32 * (quarter % 2)];
                let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
                let q = four | (high[i] >> (2 * quarter) & 3) << 4;
                let scale = scales[i / 16 + 2 * quarter] as i8;
                out.push(d * f32::from(scale) * (f32::from(q) - 32.0));
            }
        }
    }
}

fn f8e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 128 == 0 { size } else { -size }
}
