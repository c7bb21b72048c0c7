//! Every operation against a plain f64 loop, on fresh random inputs at odd sizes, with the output
//! poisoned before. Skipped, with the reason, where there is no card.

mod attention;
mod linear;
mod logits;

use half::bf16;
use minisgl_cuda::{CudaBackend, CudaOptions};
use minisgl_tensor::*;
use rayon::prelude::*;

struct Rng(u64);
impl Rng {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    }
    fn many(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Whether a race checker watches: `scripts/gpu.py racecheck`. It slows kernels down so much that there are
/// fewer and smaller cases then, and needs kernels that it can follow.
fn race_checked() -> bool {
    std::env::var_os("MINISGL_TEST_RACECHECK").is_some()
}

/// All cases, or the few that a race checker watches.
fn cases<'a, T>(all: &'a [T], race_checked_ones: &'a [T]) -> &'a [T] {
    if race_checked() { race_checked_ones } else { all }
}

fn options(precision: Precision) -> CudaOptions {
    CudaOptions { race_checked: race_checked(), ..CudaOptions::new(0, precision) }
}

struct Rig {
    b: CudaBackend,
    rng: Rng,
}

fn rigs(test: &str) -> Vec<Rig> {
    if minisgl_cuda::devices().is_empty() {
        eprintln!("{test}: skipped, no CUDA device on this machine");
        return Vec::new();
    }
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos()
            as u64;
    cases(&[Precision::Native, Precision::Exact], &[Precision::Native])
        .iter()
        .map(|&precision| {
            eprintln!("{test}: {precision:?}, seed {seed}");
            Rig { b: CudaBackend::new(options(precision)).unwrap(), rng: Rng(seed) }
        })
        .collect()
}

impl Rig {
    fn tolerance(&self) -> f64 {
        if self.b.activation_dtype() == DType::BF16 { 8e-3 } else { 2e-6 }
    }
    fn round(&self, x: f64) -> f64 {
        match self.b.activation_dtype() {
            DType::BF16 => bf16::from_f64(x).to_f64(),
            _ => f64::from(x as f32),
        }
    }
    /// Random activations, already rounded, and their copy on the card.
    fn tensor(&mut self, shape: &[usize]) -> (Vec<f64>, Tensor) {
        let v: Vec<f64> =
            self.rng.many(shape.iter().product()).into_iter().map(|x| self.round(x)).collect();
        let t = self.put(&v, shape);
        (v, t)
    }
    fn put(&self, v: &[f64], shape: &[usize]) -> Tensor {
        self.put_bytes(&bytes_of(self.b.activation_dtype(), v), shape)
    }
    fn put_bytes(&self, bytes: &[u8], shape: &[usize]) -> Tensor {
        let t = self.b.alloc(self.b.activation_dtype(), shape).unwrap();
        self.b.upload(bytes, &t).unwrap();
        t
    }
    fn poison(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let t = self.b.alloc(dtype, shape).unwrap();
        self.b.upload(&vec![0xff; t.bytes()], &t).unwrap();
        t
    }
    fn out(&self, shape: &[usize]) -> Tensor {
        self.poison(self.b.activation_dtype(), shape)
    }
    fn f32s(&self, v: &[f64]) -> Tensor {
        let t = self.b.alloc(DType::F32, &[v.len()]).unwrap();
        self.b
            .upload(&v.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect::<Vec<_>>(), &t)
            .unwrap();
        t
    }
    fn ints(&self, v: &[i32], shape: &[usize]) -> Tensor {
        let t = self.b.alloc(DType::I32, shape).unwrap();
        self.b.upload(&v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>(), &t).unwrap();
        t
    }
    fn get(&self, t: &Tensor) -> Vec<f64> {
        numbers(t.dtype(), &self.b.download(t).unwrap().wait().unwrap())
    }
    fn get_ints(&self, t: &Tensor) -> Vec<i32> {
        let bytes = self.b.download(t).unwrap().wait().unwrap();
        bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
    fn weight(&mut self, rows: usize, cols: usize) -> (Vec<f64>, Weight) {
        let v: Vec<f64> = self.rng.many(rows * cols).into_iter().map(|x| self.round(x)).collect();
        let w = self.b.matrix(&[host(&v, &[rows, cols])], Precision::Native).unwrap();
        (v, w)
    }
    fn vector(&mut self, n: usize) -> (Vec<f64>, Weight) {
        let v: Vec<f64> = self.rng.many(n).into_iter().map(|x| f64::from(x as f32)).collect();
        let w = self.b.vector(&[host(&v, &[n])]).unwrap();
        (v, w)
    }
    fn close(&self, what: &str, got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{what}");
        let (mut d, mut n) = (0.0, 0.0);
        for (g, w) in got.iter().zip(want) {
            assert!(g.is_finite(), "{what}: {g} where {w} was expected");
            d += (g - w).powi(2);
            n += w * w;
        }
        let error = (d / n.max(1e-30)).sqrt();
        assert!(error <= self.tolerance(), "{what}: relative error {error:.2e}");
    }
}

fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        DType::BF16 => {
            bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
        }
        _ => bytes
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
    }
}

fn bytes_of(dtype: DType, numbers: &[f64]) -> Vec<u8> {
    match dtype {
        DType::BF16 => numbers.iter().flat_map(|&x| bf16::from_f64(x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
    }
}

fn host(v: &[f64], shape: &[usize]) -> HostTensor<'static> {
    let data: Vec<u8> = v.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect();
    HostTensor {
        name: "test".into(),
        dtype: DType::F32,
        shape: shape.to_vec(),
        data: data.into(),
        scale: None,
    }
}

fn matmul(x: &[f64], w: &[f64], m: usize, n: usize, k: usize) -> Vec<f64> {
    let sum = |i: usize| dot(&x[i / n * k..][..k], &w[i % n * k..][..k]);
    (0..m * n).into_par_iter().map(sum).collect()
}

/// By eight sums at once, which a core adds up together.
fn dot(x: &[f64], w: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (x, w) = (x.chunks(8), w.chunks(8));
    for (x, w) in x.zip(w) {
        sums.iter_mut().zip(x).zip(w).for_each(|((sum, x), w)| *sum += x * w);
    }
    sums.iter().sum()
}

fn normed(x: &[f64], w: &[f64], width: usize, eps: f64) -> Vec<f64> {
    x.chunks(width)
        .flat_map(|row| {
            let scale = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / width as f64 + eps).sqrt();
            row.iter().zip(w).map(move |(v, w)| v * scale * w).collect::<Vec<_>>()
        })
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn norms_of_many_rows() {
    const ROWS: usize = 3000;
    for mut r in rigs("norm") {
        for width in [64, 1000, 1024, 5120] {
            let (x, xt) = r.tensor(&[ROWS, width]);
            let (w, weight) = r.vector(width);
            let out = r.out(&[ROWS, width]);
            r.b.rms_norm(&xt, &Norm { weight, eps: 1e-6, plus_one: false, folded: false }, &out)
                .unwrap();
            r.close(&format!("norm of {width}"), &r.get(&out), &normed(&x, &w, width, 1e-6));
        }
    }
}

#[test]
fn large_uploads_arrive_whole() {
    for r in rigs("upload") {
        // Beyond what one thread uploads, and no multiple of a part.
        for bytes in [1 << 20, (16 << 20) + 4, (75 << 20) + 12] {
            let words: Vec<u8> = (0..bytes as u32 / 4)
                .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
                .collect();
            let to = r.b.alloc(DType::U8, &[bytes]).unwrap();
            r.b.upload(&words, &to).unwrap();
            assert!(r.b.download(&to).unwrap().wait().unwrap() == words, "{bytes} bytes");
        }
    }
}

#[test]
fn embedding_gather_and_scatter() {
    for mut r in rigs("embed") {
        let (w, wt) = r.weight(50, 72);
        let ids = r.ints(&[3, -1, 60, -2, 10], &[5]);
        let table = r.ints(&[59, 12], &[2]);
        let out = r.out(&[5, 72]);
        r.b.embed(
            &Embed { input_ids: &ids, token_table: &table, table: &wt, first_id: 10, scale: 2.0 },
            &out,
        )
        .unwrap();
        let want: Vec<f64> = [-1i32, 49, -1, 2, 0]
            .iter()
            .flat_map(|&i| {
                (0..72)
                    .map(|c| if i < 0 { 0.0 } else { 2.0 * w[i as usize * 72 + c] })
                    .collect::<Vec<_>>()
            })
            .collect();
        r.close("embed", &r.get(&out), &want);
        let (x, xt) = r.tensor(&[7, 33]);
        let out = r.out(&[2, 33]);
        r.b.gather(&xt, &r.ints(&[6, 0], &[2]), &out).unwrap();
        r.close("gather", &r.get(&out), &[&x[6 * 33..], &x[..33]].concat());
        let flat = r.ints(&[1, 2, 3, 4], &[2, 2]);
        r.b.scatter(&r.ints(&[3, -1, 0], &[3]), &r.ints(&[9, 8, 7], &[3]), &flat).unwrap();
        assert_eq!(r.get_ints(&flat), [7, 2, 3, 9]);
    }
}

#[test]
fn mixture_of_experts() {
    for mut r in rigs("moe") {
        let (tokens, hidden, experts, inner, top_k) = (5, 64, 7, 40, 3);
        let (x, xt) = r.tensor(&[tokens, hidden]);
        let (nw, nt) = r.vector(hidden);
        let (router, router_t) = r.weight(experts, hidden);
        let mut gu = vec![];
        let mut down = vec![];
        for _ in 0..experts {
            gu.push(
                (0..2 * inner * hidden)
                    .map(|_| {
                        let x = r.rng.next();
                        r.round(x)
                    })
                    .collect::<Vec<_>>(),
            );
            down.push(
                (0..inner * hidden)
                    .map(|_| {
                        let x = r.rng.next();
                        r.round(x)
                    })
                    .collect::<Vec<_>>(),
            );
        }
        let gate_up =
            r.b.expert_matrices(
                &gu.iter()
                    .map(|g| {
                        vec![
                            host(&g[..inner * hidden], &[inner, hidden]),
                            host(&g[inner * hidden..], &[inner, hidden]),
                        ]
                    })
                    .collect::<Vec<_>>(),
                Precision::Native,
            )
            .unwrap();
        let down_t =
            r.b.expert_matrices(
                &down.iter().map(|d| vec![host(d, &[hidden, inner])]).collect::<Vec<_>>(),
                Precision::Native,
            )
            .unwrap();
        assert_eq!(
            (gate_up.shape(), down_t.shape()),
            (&[experts, 2 * inner, hidden][..], &[experts, hidden, inner][..])
        );
        let norm = Norm { weight: nt, eps: 1e-6, plus_one: false, folded: false };
        let xn: Vec<f64> = normed(&x, &nw, hidden, 1e-6).into_iter().map(|v| r.round(v)).collect();
        for renormalize in [false, true] {
            let out = r.out(&[tokens, hidden]);
            r.b.moe(
                &Moe {
                    x: &xt,
                    norm: &norm,
                    router: &router_t,
                    gate_up: &gate_up,
                    down: &down_t,
                    top_k,
                    renormalize,
                    store: Store::Set,
                },
                &out,
            )
            .unwrap();
            let mut want = vec![0.0; tokens * hidden];
            for t in 0..tokens {
                let row = &xn[t * hidden..][..hidden];
                let logits = matmul(row, &router, 1, experts, hidden);
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let all: f64 = logits.iter().map(|l| (l - top).exp()).sum();
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                let kept: f64 = order[..top_k].iter().map(|&e| (logits[e] - top).exp() / all).sum();
                for &e in &order[..top_k] {
                    let both = matmul(row, &gu[e], 1, 2 * inner, hidden);
                    let mid: Vec<f64> =
                        (0..inner).map(|i| silu(both[i]) * both[inner + i]).collect();
                    let weight =
                        (logits[e] - top).exp() / all / if renormalize { kept } else { 1.0 };
                    for (o, d) in want[t * hidden..][..hidden]
                        .iter_mut()
                        .zip(matmul(&mid, &down[e], 1, hidden, inner))
                    {
                        *o += weight * d;
                    }
                }
            }
            r.close("moe", &r.get(&out), &want);
        }
    }
}

#[test]
fn sampling() {
    for mut r in rigs("sampling") {
        let (rows, vocab) = if race_checked() { (20, 2003) } else { (600, 5003) };
        let row: Vec<f64> = (0..vocab).map(|_| f64::from((r.rng.next() * 6.0) as f32)).collect();
        let logits = r
            .f32s(&row.iter().copied().cycle().take(rows * vocab).collect::<Vec<_>>())
            .reshape(&[rows, vocab]);
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let no_numbers = r.f32s(&vec![f64::NAN; rows * vocab]).reshape(&[rows, vocab]);
        let table = r.ints(&vec![-1; rows], &[rows]);
        for (t, k, p, m) in [
            (0.0, 0, 1.0, 0.0),
            (0.7, 0, 1.0, 0.0),
            (1.0, 5, 1.0, 0.0),
            (0.8, 0, 0.3, 0.0),
            (1.0, 20, 0.6, 0.0),
            (1.0, 0, 1.0, 0.4),
        ] {
            let probs: Vec<f64> = order
                .iter()
                .map(|&i| ((row[i] - row[order[0]]) / if t > 0.0 { t } else { 1e-9 }).exp())
                .collect();
            let mut keep = if k > 0 { k as usize } else { vocab };
            let sum: f64 = probs[..keep].iter().sum();
            let mut run = 0.0;
            keep = probs[..keep]
                .iter()
                .take_while(|x| {
                    let take = run < p * sum;
                    run += **x;
                    take
                })
                .count();
            keep = probs[..keep].iter().take_while(|x| **x >= m).count();
            let tokens = r.poison(DType::I32, &[rows]);
            let positions: Vec<i32> = (0..rows as i32).collect();
            let args = Sample {
                temperature: &r.f32s(&vec![t; rows]),
                top_k: &r.ints(&vec![k; rows], &[rows]),
                top_p: &r.f32s(&vec![p; rows]),
                min_p: &r.f32s(&vec![m; rows]),
                seed: &r.ints(&[77, 3].repeat(rows), &[rows, 2]),
                position: &r.ints(&positions, &[rows]),
                slots: &r.ints(&positions, &[rows]),
                all_greedy: t == 0.0,
                survey: None,
                last_use: false,
                token_table: &table,
                tokens: &tokens,
            };
            r.b.sample(&args, &logits).unwrap();
            let got = r.get_ints(&tokens);
            assert_eq!(got, r.get_ints(&table));
            let allowed = &order[..if t == 0.0 { 1 } else { keep }];
            for token in &got {
                assert!(
                    allowed.contains(&(*token as usize)),
                    "t {t} k {k} p {p} m {m}: {token} is not among {}",
                    allowed.len()
                );
            }
            // The mean of the drawn tokens' probabilities against its expectation.
            let total: f64 = probs[..allowed.len()].iter().sum();
            let place = |i: i32| order.iter().position(|&o| o == i as usize).unwrap();
            let mean = got.iter().map(|&i| probs[place(i)] / total).sum::<f64>() / rows as f64;
            let expected: f64 = probs[..allowed.len()].iter().map(|x| (x / total).powi(2)).sum();
            let spread: f64 =
                (probs[..allowed.len()].iter().map(|x| (x / total).powi(3)).sum::<f64>()
                    - expected * expected)
                    .max(0.0);
            let distance = (mean - expected).abs();
            assert!(
                distance <= 5.0 * (spread / rows as f64).sqrt() + 1e-6,
                "t {t} k {k} p {p} m {m}: {mean} for {expected}"
            );
            // Some token, where there is none to be drawn.
            r.b.sample(&args, &no_numbers).unwrap();
            let got = r.get_ints(&tokens);
            assert!(got.iter().all(|&i| (0..vocab as i32).contains(&i)), "t {t} k {k} p {p} m {m}");
        }
        // Log-probabilities.
        let top = 4;
        let (logprob, rank) = (r.poison(DType::F32, &[2]), r.poison(DType::I32, &[2]));
        let (ids, lps) = (r.poison(DType::I32, &[2, top]), r.poison(DType::F32, &[2, top]));
        let targets = r.ints(&[order[0] as i32, order[99] as i32], &[2]);
        r.b.logprobs(
            &Logprobs {
                targets: &targets,
                logprob: &logprob,
                rank: &rank,
                top_ids: &ids,
                top_logprobs: &lps,
            },
            &logits.first(2),
        )
        .unwrap();
        let norm = row[order[0]] + row.iter().map(|x| (x - row[order[0]]).exp()).sum::<f64>().ln();
        assert_eq!(r.get_ints(&rank), [1, 100]);
        assert_eq!(
            r.get_ints(&ids),
            order[..top].iter().chain(&order[..top]).map(|&x| x as i32).collect::<Vec<_>>()
        );
        for (got, want) in r.get(&logprob).iter().zip([row[order[0]] - norm, row[order[99]] - norm])
        {
            assert!((got - want).abs() < 1e-4, "{got} {want}");
        }
        // Edits and masks.
        let small = r.f32s(&[1.0, -2.0, 3.0, 4.0]).reshape(&[1, 4]);
        r.b.adjust(
            &Adjust { edits: &[(0, 0, 2.0, 1.0), (0, 1, 2.0, 0.5)], masks: &[(0, &[0b0111])] },
            &small,
        )
        .unwrap();
        assert_eq!(r.get(&small), [1.5, -3.5, 3.0, f64::NEG_INFINITY]);
        r.b.soft_cap(&small.view_as(DType::F32, &[1, 3]), 2.0).unwrap();
        assert!((r.get(&small)[2] - 2.0 * (1.5f64).tanh()).abs() < 1e-6);
    }
}

#[test]
fn graphs_replay() {
    for mut r in rigs("graphs") {
        let (x, xt) = r.tensor(&[4, 64]);
        let (d, dt) = r.tensor(&[4, 64]);
        let graph = r.b.capture(&mut || r.b.add(&xt, &dt)).unwrap().unwrap();
        r.close("captured, not run", &r.get(&xt), &x);
        graph.launch().unwrap();
        let want: Vec<f64> = x.iter().zip(&d).map(|(a, b)| a + b).collect();
        r.close("launched", &r.get(&xt), &want);
    }
}
