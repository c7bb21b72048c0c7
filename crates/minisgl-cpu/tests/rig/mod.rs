//! Random inputs, poisoned outputs and comparisons for the tests of operations.
#![expect(dead_code, reason = "each test file uses a part of it")]

use half::{bf16, f16};
use minisgl_cpu::{CpuBackend, CpuOptions, IsaChoice, quant};
use minisgl_tensor::*;

pub const TYPES: [DType; 11] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
];

pub struct Rig {
    pub b: CpuBackend,
    pub precision: Precision,
    state: u64,
}

/// A rig for each instruction set that is here and each precision.
pub fn rigs(test: &str) -> Vec<Rig> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = now.as_nanos() as u64 | 1;
    let mut rigs = Vec::new();
    for isa in [IsaChoice::Amx, IsaChoice::Avx512, IsaChoice::Avx2, IsaChoice::Portable] {
        for precision in [Precision::Native, Precision::Exact] {
            let options = CpuOptions { threads: Some(3), precision, isa, ..CpuOptions::default() };
            match CpuBackend::new(options) {
                Ok(b) => rigs.push(Rig { b, precision, state: seed }),
                Err(why) => eprintln!("{test}: {isa:?} skipped: {why}"),
            }
        }
    }
    eprintln!("{test}: seed {seed}");
    rigs
}

impl Rig {
    /// How far a product with these types may be from that of unrounded activations, which are
    /// rounded to 8 bits for block types.
    pub fn tolerance(&self, types: &[DType]) -> f64 {
        let native = self.precision == Precision::Native;
        let of = |dtype: &DType| if dtype.is_quantized() && native { 1.5e-2 } else { 2e-6 };
        types.iter().map(of).fold(0.0, f64::max)
    }

    pub fn bits(&mut self) -> u32 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as u32
    }

    /// From −1 to 1.
    pub fn number(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 30) as f32 - 1.0
    }

    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    /// Rows that 8-bit rounding leaves as they are: whole multiples of a power of two, 127 times
    /// it among every 32.
    pub fn rounded(&mut self, count: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(count);
        while out.len() < count {
            let unit = 2f32.powi(-(self.bits() as i32 % 4) - 6);
            out.push(127.0 * unit);
            for _ in 1..32 {
                out.push((self.bits() % 255) as f32 * unit - 127.0 * unit);
            }
        }
        out.truncate(count);
        out
    }

    pub fn put(&self, values: &[f32], shape: &[usize]) -> Tensor {
        self.put_as(DType::F32, bytemuck::cast_slice(values), shape)
    }

    pub fn ints(&self, values: &[i32], shape: &[usize]) -> Tensor {
        self.put_as(DType::I32, bytemuck::cast_slice(values), shape)
    }

    fn put_as(&self, dtype: DType, bytes: &[u8], shape: &[usize]) -> Tensor {
        let tensor = self.b.alloc(dtype, shape).unwrap();
        self.b.upload(bytes, &tensor).unwrap();
        tensor
    }

    /// Full of NaNs.
    pub fn poison(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let bytes = dtype.bytes_of(shape.iter().product()).unwrap();
        self.put_as(dtype, &vec![0xff; bytes], shape)
    }

    pub fn get(&self, tensor: &Tensor) -> Vec<f32> {
        let bytes = self.b.download(tensor).unwrap().wait().unwrap();
        match tensor.dtype() {
            DType::BF16 => bytemuck::allocation::pod_collect_to_vec::<u8, bf16>(&bytes)
                .into_iter()
                .map(bf16::to_f32)
                .collect(),
            DType::F16 => bytemuck::allocation::pod_collect_to_vec::<u8, f16>(&bytes)
                .into_iter()
                .map(f16::to_f32)
                .collect(),
            _ => bytemuck::allocation::pod_collect_to_vec(&bytes),
        }
    }

    pub fn get_ints(&self, tensor: &Tensor) -> Vec<i32> {
        let bytes = self.b.download(tensor).unwrap().wait().unwrap();
        bytemuck::allocation::pod_collect_to_vec(&bytes)
    }

    /// A random part of a matrix as a file has it.
    pub fn part(&mut self, dtype: DType, rows: usize, cols: usize) -> HostTensor<'static> {
        let elements = rows * cols;
        let data: Vec<u8> = match dtype {
            DType::F32 => self.numbers(elements).iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => self
                .numbers(elements)
                .iter()
                .flat_map(|x| f16::from_f32(*x).to_le_bytes())
                .collect(),
            DType::BF16 => self
                .numbers(elements)
                .iter()
                .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
                .collect(),
            _ => {
                let bytes = dtype.bytes_of(elements).unwrap();
                let mut data: Vec<u8> = (0..bytes).map(|_| self.bits() as u8).collect();
                let places: &[usize] = match dtype {
                    DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
                    DType::Q6K => &[208],
                    _ => &[0, 2],
                };
                for block in data.chunks_exact_mut(dtype.block_bytes()) {
                    for &at in places {
                        let scale = f16::from_f32(self.number() / 16.0).to_le_bytes();
                        block[at..at + 2].copy_from_slice(&scale);
                    }
                }
                data
            }
        };
        HostTensor {
            name: format!("random {dtype}"),
            dtype,
            shape: vec![rows, cols],
            data: data.into(),
            scale: None,
        }
    }

    pub fn vector(&mut self, len: usize) -> (Vec<f32>, Weight) {
        let part = self.part(DType::F32, 1, len);
        (decode(&part), self.b.vector(&[HostTensor { shape: vec![len], ..part }]).unwrap())
    }

    pub fn norm(&mut self, len: usize, plus_one: bool) -> (Vec<f32>, Norm) {
        let (values, weight) = self.vector(len);
        let plus = if plus_one { 1.0 } else { 0.0 };
        let values = values.into_iter().map(|w| w + plus).collect();
        (values, Norm { weight, eps: 1e-6, plus_one, folded: false })
    }
}

/// The elements of a matrix's part.
pub fn decode(part: &HostTensor<'_>) -> Vec<f32> {
    let cols = part.shape[1];
    let row_bytes = part.dtype.bytes_of(cols).unwrap();
    let mut out = vec![0.0; part.shape[0] * cols];
    for (row, out) in part.data.chunks_exact(row_bytes).zip(out.chunks_exact_mut(cols)) {
        quant::decode_row(part.dtype, row, out);
    }
    out
}

/// `[m, k] × [n, k]ᵀ` in f64.
pub fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect()
}

pub fn normed(x: &[f32], w: &[f32]) -> Vec<f32> {
    x.chunks(w.len())
        .flat_map(|row| {
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / w.len() as f64;
            let factor = (mean + 1e-6).sqrt().recip();
            row.iter().zip(w).map(move |(v, w)| (f64::from(*v) * factor * f64::from(*w)) as f32)
        })
        .collect()
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Compares by the error's root mean square.
pub fn close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (mut distance, mut size) = (0.0, 0.0);
    for (got, want) in got.iter().zip(want) {
        assert!(got.is_finite(), "{what}: {got} where {want} was expected");
        distance += (f64::from(*got) - want).powi(2);
        size += want * want;
    }
    let error = (distance / size.max(1e-30)).sqrt();
    assert!(error <= tolerance, "{what}: relative error {error:.2e}");
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}
