//! Times each matrix product of Qwen3-0.6B's, 8B's and 14B's decoders alone, with the norm in front and
//! what follows it: through cuBLASLt, and by our own kernels where they can take it.
//! `products [0.6b] [8b] [14b] [BATCH ...]`.
#![expect(clippy::print_stdout, reason = "this program's output is its table")]

use std::time::Instant;

use minisgl_cuda::{CudaBackend, CudaOptions, Products};
use minisgl_tensor::*;

/// `[n, k]` of the weights, and what is fused with the product.
struct Product {
    name: &'static str,
    n: usize,
    k: usize,
    normed: bool,
    gated: bool,
    out: DType,
}

const VOCAB: usize = 151_936;

fn products(hidden: usize, inner: usize, q: usize, kv: usize) -> [Product; 5] {
    let of = |name, n, k, normed, gated, out| Product { name, n, k, normed, gated, out };
    [
        of("qkv", q + 2 * kv, hidden, true, false, DType::BF16),
        of("o", hidden, q, false, false, DType::BF16),
        of("gate_up", 2 * inner, hidden, true, true, DType::BF16),
        of("down", hidden, inner, false, false, DType::BF16),
        of("head", VOCAB, hidden, true, false, DType::F32),
    ]
}

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let mut batches: Vec<usize> = wanted.iter().filter_map(|w| w.parse().ok()).collect();
    if batches.is_empty() {
        batches = vec![8, 16, 32, 64, 128, 256];
    }
    let models =
        [("0.6b", 1024, 3072, 2048), ("8b", 4096, 12288, 4096), ("14b", 5120, 17408, 5120)];
    let every = models.iter().all(|m| !wanted.iter().any(|w| w == m.0));
    let b = CudaBackend::new(CudaOptions::new(0, Precision::Native))?;
    println!("{}; a product, microseconds: batch: cuBLASLt, kernels", b.name());
    for (name, hidden, inner, q) in models {
        if every || wanted.iter().any(|w| w == name) {
            for product in products(hidden, inner, q, 1024) {
                println!("{name} {}{}", product.name, line(&b, &product, &batches)?);
            }
        }
    }
    Ok(())
}

fn line(b: &CudaBackend, p: &Product, batches: &[usize]) -> Result<String> {
    // So many layers' weights that the cache holds none of them when its turn comes again.
    let layers = ((1 << 30) / (p.n * p.k * 2)).clamp(2, 28);
    let weights: Vec<Weight> = (0..layers)
        .map(|i| b.random_matrix(&[p.n, p.k], i as u32 + 1, 0.02))
        .collect::<Result<_>>()?;
    let ones: Vec<u8> = 1f32.to_le_bytes().repeat(p.k);
    let part = HostTensor {
        name: "ones".into(),
        dtype: DType::F32,
        shape: vec![p.k],
        data: ones.into(),
        scale: None,
    };
    let mut norm = Norm { weight: b.vector(&[part])?, eps: 1e-6, plus_one: false, folded: false };
    // The head's is the embedding, which nothing is folded into.
    if p.out == DType::BF16 {
        norm = weights.iter().try_fold(norm, |norm, weight| b.fold_norm(norm, weight))?;
    }
    let mut text = String::new();
    for &rows in batches {
        let x = b.alloc(DType::BF16, &[rows, p.k])?;
        b.fill_random(&x, 77, 1.0)?;
        let out = b.alloc(p.out, &[rows, if p.gated { p.n / 2 } else { p.n }])?;
        let temperature = b.alloc(DType::F32, &[rows])?;
        b.upload(&0.6_f32.to_le_bytes().repeat(rows), &temperature)?;
        let run = |weight: &Weight| {
            let (norm, store) =
                if p.normed { (Some(&norm), Store::Set) } else { (None, Store::Add) };
            let a = Linear { x: &x, norm, weight, bias: None, store };
            match p.out {
                DType::F32 => b.logits(&a, &temperature, &out).map(drop),
                _ if p.gated => b.gated_linear(&a, Activation::Silu, &out),
                _ => b.linear(&a, &out),
            }
        };
        let mut times = [0.0; 2];
        for (products, time) in [Products::Library, Products::Own].into_iter().zip(&mut times) {
            b.set_products(products);
            run(&weights[0])?;
            b.synchronize()?;
            let graph = b.capture(&mut || weights.iter().try_for_each(run))?.expect("a graph");
            *time = median(b, 9, || graph.launch())? / layers as f64;
        }
        text += &format!(" | {rows}: {:.2}, {:.2}", times[0], times[1]);
    }
    Ok(text)
}

/// Microseconds of one call, of several behind one another.
fn median(b: &CudaBackend, runs: usize, call: impl Fn() -> Result<()>) -> Result<f64> {
    let together = 4;
    let mut times = vec![];
    for _ in 0..runs {
        b.synchronize()?;
        let start = Instant::now();
        for _ in 0..together {
            call()?;
        }
        b.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(together));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[runs / 2])
}
