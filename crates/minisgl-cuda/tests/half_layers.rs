//! Half a layer in one kernel against the same operation by operation: the residual stream, and what is
//! in the cache behind it. Skipped, with the reason, where there is no card.

use std::sync::Arc;

use half::bf16;
use minisgl_cuda::{CudaBackend, CudaOptions};
use minisgl_tensor::*;

const PAGE: usize = 16;
const PAGES_A_ROW: usize = 64;

#[derive(Debug)]
struct Case {
    hidden: usize,
    heads: Heads,
    inner: usize,
    /// Tokens to attend over, the new one included.
    lens: &'static [i32],
    bias: bool,
    window: Option<usize>,
    soft_cap: Option<f32>,
}

fn ints(b: &CudaBackend, values: &[i32], shape: &[usize]) -> Tensor {
    let out = b.alloc(DType::I32, shape).unwrap();
    b.upload(bytes_of(values).as_slice(), &out).unwrap();
    out
}

fn bytes_of(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn vector(b: &CudaBackend, values: &[f32]) -> Weight {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = vec![values.len()];
    let name = "test".into();
    b.vector(&[HostTensor { name, dtype: DType::F32, shape, data: data.into(), scale: None }])
        .unwrap()
}

/// Numbers about `center`, the same for a seed.
fn about(center: f32, count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        center + 0.2 * ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5)
    };
    (0..count).map(|_| next()).collect()
}

fn get(b: &CudaBackend, x: &Tensor) -> Vec<f64> {
    let bytes = b.download(x).unwrap().wait().unwrap();
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
}

fn random(b: &CudaBackend, shape: &[usize], seed: u32) -> Tensor {
    let out = b.alloc(DType::BF16, shape).unwrap();
    b.fill_random(&out, seed, 1.0).unwrap();
    out
}

fn close(what: &str, got: &[f64], want: &[f64]) {
    let distance: f64 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
    let size: f64 = want.iter().map(|w| w * w).sum();
    let error = (distance / size).sqrt();
    assert!(error <= 8e-3, "{what}: relative error {error:.2e}");
}

/// Two layers, in a graph or not; the residual stream at the end and the first layer's K and V.
fn run(b: &CudaBackend, case: &Case, fused: bool, in_graph: bool) -> [Vec<f64>; 3] {
    let Case { hidden, heads, inner, lens, .. } = *case;
    let Heads { q, kv, dim } = heads;
    let rows = lens.len();
    let norm = |width: usize, seed: u64| Norm {
        weight: vector(b, &about(1.0, width, seed)),
        eps: 1e-6,
        plus_one: false,
        folded: false,
    };
    let matrix = |rows, cols, seed| b.random_matrix(&[rows, cols], seed, 0.05).unwrap();
    // Slots and pages in an order of their own.
    let slot = |row: usize| rows - 1 - row;
    let page = |row: usize, index: usize| (slot(row) * PAGES_A_ROW + PAGES_A_ROW - index) as i32;
    let mut table = vec![0; rows * PAGES_A_ROW];
    for row in 0..rows {
        for index in 0..PAGES_A_ROW {
            table[slot(row) * PAGES_A_ROW + index] = page(row, index);
        }
    }
    let store_at = |(row, len): (usize, &i32)| match *len as usize {
        0 => -1,
        len => page(row, (len - 1) / PAGE) * PAGE as i32 + ((len - 1) % PAGE) as i32,
    };
    let starts: Vec<i32> = (0..=rows as i32).collect();
    let batch = Batch {
        rows,
        tokens: rows,
        decode_rows: rows,
        slots: ints(b, &(0..rows).map(|row| slot(row) as i32).collect::<Vec<_>>(), &[rows]),
        query_start: ints(b, &starts, &[rows + 1]),
        kv_len: ints(b, lens, &[rows]),
        positions: ints(b, &lens.iter().map(|len| (len - 1).max(0)).collect::<Vec<_>>(), &[rows]),
        store_at: ints(b, &lens.iter().enumerate().map(store_at).collect::<Vec<_>>(), &[rows]),
        page_table: ints(b, &table, &[rows, PAGES_A_ROW]),
        page_size: PAGE,
        host: Some(Arc::new(HostBatch { query_start: starts, kv_len: lens.to_vec() })),
        kv_len_max: PAGES_A_ROW * PAGE,
        extend_len_max: 1,
        shared: None,
    };
    let rope = b.alloc(DType::F32, &[PAGES_A_ROW * PAGE, dim]).unwrap();
    let angles: Vec<u8> = (0..PAGES_A_ROW * PAGE)
        .flat_map(|position| {
            let angle = move |i: usize| {
                position as f32 * 10000f32.powf(-2.0 * (i % (dim / 2)) as f32 / dim as f32)
            };
            (0..dim).map(move |i| if i < dim / 2 { angle(i).cos() } else { angle(i).sin() })
        })
        .flat_map(f32::to_le_bytes)
        .collect();
    b.upload(&angles, &rope).unwrap();
    let cache = |seed| random(b, &[rows * PAGES_A_ROW + 1, kv, PAGE, dim], seed);
    let caches = [1, 2].map(|layer| KvLayer { k: cache(10 * layer), v: cache(10 * layer + 1) });
    let [hidden_norm, q_norm, k_norm] = [norm(hidden, 1), norm(dim, 2), norm(dim, 3)];
    let width = heads.qkv_width();
    let bias = vector(b, &about(0.0, width, 4));
    let weights = [1, 2].map(|layer| {
        let seed = 100 * layer;
        [
            matrix(width, hidden, seed),
            matrix(hidden, q * dim, seed + 1),
            matrix(2 * inner, hidden, seed + 2),
            matrix(hidden, inner, seed + 3),
        ]
    });
    let x = random(b, &[rows, hidden], 7);
    let memory = |width| b.alloc(DType::BF16, &[rows, width]).unwrap();
    let (qkv_memory, attended, mid) = (memory(width), memory(q * dim), memory(inner));
    b.set_fused_layers(fused);
    let before = b.fused_halves();
    let layers = || -> Result<()> {
        for ([qkv, out, gate_up, down], kv) in weights.iter().zip(&caches) {
            let (batch, rope) = (&batch, &rope);
            let (q_norm, k_norm) = (Some(&q_norm), Some(&k_norm));
            let store = RopeStore { batch, heads, q_norm, k_norm, rope, kv };
            let (window, soft_cap) = (case.window, case.soft_cap);
            let attention = Attention { batch, heads, kv, scale: 0.088, window, soft_cap };
            let args = AttentionLayer {
                norm: &hidden_norm,
                qkv,
                qkv_bias: case.bias.then_some(&bias),
                store,
                attention,
                out,
                qkv_memory: &qkv_memory,
                attended: &attended,
            };
            b.attention_layer(&args, &x)?;
            let activation = Activation::Silu;
            let args = Mlp { norm: &hidden_norm, gate_up, activation, down, mid: &mid };
            b.mlp(&args, &x)?;
        }
        Ok(())
    };
    match in_graph {
        false => layers().unwrap(),
        true => b.capture(&mut || layers()).unwrap().expect("CUDA has graphs").launch().unwrap(),
    }
    // Attention's half has no kernel that caps scores.
    let halves = match fused {
        false => 0,
        true if case.soft_cap.is_some() => 2,
        true => 4,
    };
    assert_eq!(b.fused_halves() - before, halves, "half layers in one kernel");
    [get(b, &x), get(b, &caches[0].k), get(b, &caches[0].v)]
}

#[test]
fn half_layers_are_the_sum_of_their_parts() {
    if minisgl_cuda::devices().is_empty() {
        return eprintln!("half layers: skipped, no CUDA device on this machine");
    }
    // Set by `scripts/gpu.py racecheck`, under which kernels are slow: then the smallest cases.
    let race_checked = std::env::var_os("MINISGL_TEST_RACECHECK").is_some();
    let options = CudaOptions { race_checked, ..CudaOptions::new(0, Precision::Native) };
    let b = CudaBackend::new(options).unwrap();
    let qwen = Heads { q: 16, kv: 8, dim: 128 };
    let narrow = Heads { q: 4, kv: 2, dim: 64 };
    let wide = Heads { q: 12, kv: 2, dim: 128 };
    let one: &[i32] = &[577];
    let many: &[i32] = &[300, 16, 17, 0, 33, 500, 15, 64];
    let long: &[i32] = &[900, 700, 800, 650, 333, 444, 555, 666];
    let cases = [
        (1024, qwen, 3072, one, false, None),
        (1024, qwen, 3072, many, true, None),
        (1024, qwen, 3072, long, false, None),
        (1024, qwen, 3072, &[1, 40], false, Some(30)),
        (512, narrow, 1024, &[37, 250, 64], true, None),
        (256, wide, 1024, many, false, Some(100)),
    ];
    let smallest = cases.len() - 2;
    let chosen = cases.into_iter().skip(if race_checked { smallest } else { 0 });
    let whole = chosen.map(|(hidden, heads, inner, lens, bias, window)| Case {
        hidden,
        heads,
        inner,
        lens,
        bias,
        window,
        soft_cap: None,
    });
    let capped = Case {
        hidden: 512,
        heads: narrow,
        inner: 1024,
        lens: many,
        bias: false,
        window: None,
        soft_cap: Some(2.0),
    };
    for case in whole.chain([capped]) {
        let what = format!("{case:?}");
        let want = run(&b, &case, false, false);
        for in_graph in [false, true] {
            let got = run(&b, &case, true, in_graph);
            for ((name, got), want) in ["hidden", "k", "v"].iter().zip(&got).zip(&want) {
                close(&format!("{name}, {what}, in a graph: {in_graph}"), got, want);
            }
        }
        eprintln!("{what}: right");
    }
}
