//! What the reference computes with: values of stored numbers, norms, products, activations.

use minisgl_tensor::*;

use super::Matrix;

pub fn dequantize(t: &HostTensor<'_>) -> Vec<f32> {
    match t.dtype {
        DType::F32 => bytemuck::allocation::pod_collect_to_vec(&t.data),
        DType::BF16 => {
            t.data.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        DType::F16 => {
            t.data.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        // d, then 32 signed bytes (ggml's block_q8_0).
        DType::Q8_0 => t
            .data
            .chunks(34)
            .flat_map(|b| {
                let d = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                b[2..].iter().map(move |q| d * f32::from(*q as i8)).collect::<Vec<_>>()
            })
            .collect(),
        // d and m, then low and high nibbles (ggml's block_q4_1).
        DType::Q4_1 => t
            .data
            .chunks(20)
            .flat_map(|b| {
                let d = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                let m = half::f16::from_le_bytes([b[2], b[3]]).to_f32();
                let low = b[4..].iter().map(move |q| d * f32::from(q & 15) + m);
                low.chain(b[4..].iter().map(move |q| d * f32::from(q >> 4) + m)).collect::<Vec<_>>()
            })
            .collect(),
        DType::F8E4M3 => {
            let scale = t.scale.as_ref().expect("scaled");
            let (cols, [br, bc]) = (t.shape[1], scale.block);
            let across = cols.div_ceil(bc);
            t.data
                .iter()
                .enumerate()
                .map(|(i, b)| f8(*b) * scale.values[i / cols / br * across + i % cols / bc])
                .collect()
        }
        other => panic!("the reference knows no {other}"),
    }
}

fn f8(b: u8) -> f32 {
    let (e, m) = (i32::from(b >> 3 & 15), f32::from(b & 7));
    let v = if e == 0 { m / 8.0 * 2f32.powi(-6) } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) };
    if b & 128 != 0 { -v } else { v }
}

pub fn normed(x: &[f32], norm: &Norm) -> Vec<f32> {
    let w = norm.weight.get::<Matrix>();
    let n = w.len();
    x.chunks(n)
        .flat_map(|row| {
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            let r = (mean + f64::from(norm.eps)).sqrt().recip();
            let plus = if norm.plus_one { 1.0 } else { 0.0 };
            row.iter().zip(w).map(move |(v, w)| (f64::from(*v) * r * (f64::from(*w) + plus)) as f32)
        })
        .collect()
}

/// `[rows, in] × [out, in]ᵀ`.
pub fn matmul(x: &[f32], w: &[f32], inner: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
    };
    x.chunks(inner).flat_map(|row| w.chunks(inner).map(move |w| dot(row, w))).collect()
}

fn act(a: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let y = match a {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (c * (x + 0.044_715 * x * x * x)).tanh())
        }
    };
    y as f32
}

pub fn gated(x: &[f32], a: Activation) -> Vec<f32> {
    let n = x.len() / 2;
    (0..n).map(|i| act(a, x[i]) * x[n + i]).collect()
}
