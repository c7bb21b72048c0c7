//! Times a whole decode step and a prefill step, operation by operation as the engine calls them,
//! of Qwen3-0.6B's, 8B's and 14B's shapes on random weights: `decode_step [0.6b] [8b] [14b]
//! [BATCH ...] [library] [shared:TOKENS] [cascade]`; `library` leaves all products to cuBLASLt; with
//! `shared` the rows' contexts begin with so many tokens in the same pages, and `cascade` reads these
//! once for several rows. Up to 8 rows are timed with half a layer in one kernel, too.
#![expect(clippy::print_stdout, reason = "this program's output is its table")]

use std::sync::Arc;
use std::time::Instant;

use minisgl_cuda::{
    AttentionKernels, CudaBackend, CudaOptions, DecodeKernel, ModelShape, Products,
};
use minisgl_tensor::*;

struct Shape {
    name: &'static str,
    hidden: usize,
    layers: usize,
    heads: Heads,
    inner: usize,
    vocab: usize,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "0.6b",
        hidden: 1024,
        layers: 28,
        heads: Heads { q: 16, kv: 8, dim: 128 },
        inner: 3072,
        vocab: 151_936,
    },
    Shape {
        name: "8b",
        hidden: 4096,
        layers: 36,
        heads: Heads { q: 32, kv: 8, dim: 128 },
        inner: 12288,
        vocab: 151_936,
    },
    Shape {
        name: "14b",
        hidden: 5120,
        layers: 40,
        heads: Heads { q: 40, kv: 8, dim: 128 },
        inner: 17408,
        vocab: 151_936,
    },
];
const PAGE: usize = 16;
const PAGES_A_ROW: usize = 4096 / PAGE;

struct Layer {
    qkv: Weight,
    o: Weight,
    gate_up: Weight,
    down: Weight,
    kv: KvLayer,
}

struct Model<'a> {
    b: &'a CudaBackend,
    shape: &'a Shape,
    table: Weight,
    layers: Vec<Layer>,
    norm: Norm,
    head_norm: Norm,
    rope: Tensor,
    token_table: Tensor,
}

/// Which parts of a step run: to see what each costs.
#[derive(Clone, Copy)]
struct Parts {
    linear: bool,
    attention: bool,
    rest: bool,
}
const ALL: Parts = Parts { linear: true, attention: true, rest: true };

struct Step {
    batch: Batch,
    input_ids: Tensor,
    last: Tensor,
    x: Tensor,
    qkv: Tensor,
    attended: Tensor,
    mid: Tensor,
    rows_x: Tensor,
    logits: Tensor,
    sample: [Tensor; 8],
}

fn main() -> Result<()> {
    let started = Instant::now();
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| wanted.iter().any(|word| word == name);
    let shared = wanted.iter().find_map(|word| word.strip_prefix("shared:")?.parse().ok());
    let shared_pages = shared.unwrap_or(0_usize).min(575) / PAGE;
    let mut batches: Vec<usize> = wanted.iter().filter_map(|w| w.parse().ok()).collect();
    let prefill = batches.is_empty();
    if prefill {
        batches = vec![1, 8, 16, 32, 64, 128, 256];
    }
    let every = SHAPES.iter().all(|s| !asked(s.name));
    for shape in SHAPES.iter().filter(|s| every || asked(s.name)) {
        let decode = if asked("cascade") { DecodeKernel::Cascade } else { DecodeKernel::Auto };
        let kernels = AttentionKernels { decode, ..AttentionKernels::default() };
        let model = ModelShape {
            kernels,
            heads: shape.heads,
            hidden: shape.hidden,
            inner: shape.inner,
            ranks: 1,
            page_size: PAGE,
            soft_cap: false,
        };
        let options = CudaOptions::new(0, Precision::Native);
        let b = CudaBackend::new(CudaOptions { model: Some(model), ..options })?;
        // Operation by operation; half layers are timed beside it.
        b.set_fused_layers(false);
        if asked("library") {
            b.set_products(Products::Library);
        }
        println!("{}: ready {:.2} s after the start", b.name(), started.elapsed().as_secs_f64());
        let model = bench(&b, shape, &batches, shared_pages)?;
        if prefill {
            bench_prefill(&model)?;
        }
    }
    Ok(())
}

fn bench<'a>(
    b: &'a CudaBackend,
    shape: &'a Shape,
    batches: &[usize],
    shared_pages: usize,
) -> Result<Model<'a>> {
    let started = Instant::now();
    let slots = 256;
    let pages = slots * 640 / PAGE + 1;
    let model = Model::new(b, shape, pages, slots)?;
    b.synchronize()?;
    println!("\n{}: weights made in {:.2} s", shape.name, started.elapsed().as_secs_f64());
    println!(
        "decode, context 576, {} tokens of it shared, in lots of {}, ms a step: whole | linear | \
         attention | rest | first run, capture (s)",
        shared_pages * PAGE,
        b.prefix_rows_max(shape.heads)
    );
    for &rows in batches {
        let rows_spec: Vec<(usize, usize)> = vec![(575, 1); rows];
        let step = Step::new(b, shape, &rows_spec, shared_pages)?;
        let first = Instant::now();
        model.forward(&step, ALL)?;
        b.synchronize()?;
        let first = first.elapsed().as_secs_f64();
        let captured = Instant::now();
        let mut times = vec![];
        for parts in [
            ALL,
            Parts { linear: true, attention: false, rest: false },
            Parts { linear: false, attention: true, rest: false },
            Parts { linear: false, attention: false, rest: true },
        ] {
            let mut step =
                Step { batch: Batch { host: None, ..step.batch.clone() }, ..step.share() };
            step.batch.kv_len_max = 4096;
            let graph = b.capture(&mut || model.forward(&step, parts))?.expect("CUDA has graphs");
            times.push((graph, 0.0));
        }
        let captured = captured.elapsed().as_secs_f64();
        for (graph, time) in &mut times {
            *time = median(b, 30, || graph.launch())?;
        }
        println!(
            "{rows:4} | {:.3} | {:.3} | {:.3} | {:.3} | {first:.2} {captured:.2}",
            times[0].1, times[1].1, times[2].1, times[3].1
        );
        if rows <= 8 {
            b.set_fused_layers(true);
            let mut step =
                Step { batch: Batch { host: None, ..step.batch.clone() }, ..step.share() };
            step.batch.kv_len_max = 4096;
            let before = b.fused_halves();
            model.forward(&step, ALL)?;
            b.synchronize()?;
            if b.fused_halves() > before {
                let graph = b.capture(&mut || model.forward(&step, ALL))?.expect("CUDA has graphs");
                let time = median(b, 30, || graph.launch())?;
                println!("     | {time:.3} with half a layer in one kernel");
            }
            b.set_fused_layers(false);
        }
    }
    Ok(model)
}

fn bench_prefill(model: &Model<'_>) -> Result<()> {
    let b = model.b;
    println!("prefill of 8 x 2048 tokens, tokens/s | ms: whole, linear, attention, rest");
    let step = Step::new(b, model.shape, &[(0, 2048); 8], 0)?;
    model.forward(&step, ALL)?;
    let time = |parts| median(b, 3, || model.forward(&step, parts));
    let whole = time(ALL)?;
    println!(
        "{:.0} | {whole:.1} {:.1} {:.1} {:.1}",
        16384.0 / whole * 1e3,
        time(Parts { linear: true, attention: false, rest: false })?,
        time(Parts { linear: false, attention: true, rest: false })?,
        time(Parts { linear: false, attention: false, rest: true })?
    );
    Ok(())
}

/// Milliseconds of one call, each measured from an idle device to an idle device.
fn median(b: &CudaBackend, runs: usize, call: impl Fn() -> Result<()>) -> Result<f64> {
    // Several calls are enqueued behind one another, so that the host's share is hidden.
    let together = 5;
    let mut times = vec![];
    for _ in 0..runs {
        b.synchronize()?;
        let start = Instant::now();
        for _ in 0..together {
            call()?;
        }
        b.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e3 / f64::from(together));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[runs / 2])
}

impl<'a> Model<'a> {
    fn new(b: &'a CudaBackend, s: &'a Shape, pages: usize, slots: usize) -> Result<Self> {
        let ones = |n: usize| {
            let data: Vec<u8> = (0..n).flat_map(|_| 1f32.to_le_bytes()).collect();
            let part = HostTensor {
                name: "ones".into(),
                dtype: DType::F32,
                shape: vec![n],
                data: data.into(),
                scale: None,
            };
            Ok::<_, BackendError>(Norm {
                weight: b.vector(&[part])?,
                eps: 1e-6,
                plus_one: false,
                folded: false,
            })
        };
        let matrix = |rows, cols, seed| b.random_matrix(&[rows, cols], seed, 0.02);
        let cache = |seed| -> Result<Tensor> {
            let shape = [pages, s.heads.kv, PAGE, s.heads.dim];
            let pages = b.alloc(DType::BF16, &shape)?;
            // Random K and V: zeros run faster than a real cache does.
            b.fill_random(&pages, seed, 1.0)?;
            Ok(pages)
        };
        let layers = (0..s.layers)
            .map(|i| {
                let seed = 10 * i as u32;
                Ok(Layer {
                    qkv: matrix(s.heads.qkv_width(), s.hidden, seed + 1)?,
                    o: matrix(s.hidden, s.heads.q * s.heads.dim, seed + 2)?,
                    gate_up: matrix(2 * s.inner, s.hidden, seed + 3)?,
                    down: matrix(s.hidden, s.inner, seed + 4)?,
                    kv: KvLayer { k: cache(seed + 5)?, v: cache(seed + 6)? },
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let norm = layers.iter().try_fold(ones(s.hidden)?, |norm, layer: &Layer| {
            b.fold_norm(b.fold_norm(norm, &layer.qkv)?, &layer.gate_up)
        })?;
        Ok(Self {
            b,
            shape: s,
            table: matrix(s.vocab, s.hidden, 9999)?,
            layers,
            norm,
            head_norm: ones(s.heads.dim)?,
            rope: rotation(b, s.heads.dim)?,
            token_table: b.alloc(DType::I32, &[slots])?,
        })
    }

    fn forward(&self, s: &Step, parts: Parts) -> Result<()> {
        let (b, heads) = (self.b, self.shape.heads);
        let linear = |x: &Tensor, norm: Option<&Norm>, weight: &Weight, store, out: &Tensor| {
            if !parts.linear {
                return Ok(());
            }
            b.linear(&Linear { x, norm, weight, bias: None, store }, out)
        };
        if parts.rest {
            let args = Embed {
                input_ids: &s.input_ids,
                token_table: &self.token_table,
                table: &self.table,
                first_id: 0,
                scale: 1.0,
            };
            b.embed(&args, &s.x)?;
        }
        for layer in &self.layers {
            let norm = Some(&self.head_norm);
            let (batch, kv) = (&s.batch, &layer.kv);
            let store =
                RopeStore { batch, heads, q_norm: norm, k_norm: norm, rope: &self.rope, kv };
            if parts.linear && parts.attention {
                let attention =
                    Attention { batch, heads, kv, scale: 0.088, window: None, soft_cap: None };
                let args = AttentionLayer {
                    norm: &self.norm,
                    qkv: &layer.qkv,
                    qkv_bias: None,
                    store,
                    attention,
                    out: &layer.o,
                    qkv_memory: &s.qkv,
                    attended: &s.attended,
                };
                b.attention_layer(&args, &s.x)?;
                let args = Mlp {
                    norm: &self.norm,
                    gate_up: &layer.gate_up,
                    activation: Activation::Silu,
                    down: &layer.down,
                    mid: &s.mid,
                };
                b.mlp(&args, &s.x)?;
                continue;
            }
            linear(&s.x, Some(&self.norm), &layer.qkv, Store::Set, &s.qkv)?;
            if parts.attention {
                let args =
                    Attention { batch, heads, kv, scale: 0.088, window: None, soft_cap: None };
                b.rope_attention(&store, &args, &s.qkv, &s.attended)?;
            }
            linear(&s.attended, None, &layer.o, Store::Add, &s.x)?;
            if parts.linear {
                let args = Linear {
                    x: &s.x,
                    norm: Some(&self.norm),
                    weight: &layer.gate_up,
                    bias: None,
                    store: Store::Set,
                };
                b.gated_linear(&args, Activation::Silu, &s.mid)?;
            }
            linear(&s.mid, None, &layer.down, Store::Add, &s.x)?;
        }
        if parts.rest {
            b.gather(&s.x, &s.last, &s.rows_x)?;
        }
        let [temperature, top_k, top_p, min_p, seed, position, slots, tokens] = &s.sample;
        let mut survey = None;
        if parts.linear {
            let args = Linear {
                x: &s.rows_x,
                norm: Some(&self.norm),
                weight: &self.table,
                bias: None,
                store: Store::Set,
            };
            survey = b.logits(&args, temperature, &s.logits)?;
        }
        if parts.rest {
            let token_table = &self.token_table;
            let args = Sample {
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                position,
                slots,
                all_greedy: false,
                survey: survey.as_ref(),
                last_use: true,
                token_table,
                tokens,
            };
            b.sample(&args, &s.logits)?;
        }
        Ok(())
    }
}

/// Of 4,096 positions, the cosines of half a head's angles and then their sines: without, K and Q are zeros,
/// whose products take less power than a model's.
fn rotation(b: &CudaBackend, dim: usize) -> Result<Tensor> {
    let half = dim / 2;
    let angle =
        |position: usize, i: usize| position as f32 * 1e6_f32.powf(-(i as f32) / half as f32);
    let row = |position: usize| {
        let angles = move || (0..half).map(move |i| angle(position, i));
        angles().map(f32::cos).chain(angles().map(f32::sin)).flat_map(f32::to_le_bytes)
    };
    let table = b.alloc(DType::F32, &[4096, dim])?;
    b.upload(&(0..4096).flat_map(row).collect::<Vec<_>>(), &table)?;
    Ok(table)
}

/// All rows together, as an engine deals them into lots.
fn lots(
    b: &CudaBackend,
    heads: Heads,
    rows: usize,
    shared_pages: usize,
) -> Result<Option<SharedPrefixes>> {
    let (lots, size) = (rows / 2, b.prefix_rows_max(heads));
    // As an engine does whose rows share too little, unless asked for.
    if size < 2 || lots == 0 || !b.prefixes_pay(rows, 0) {
        return Ok(None);
    }
    let ints = |values: Vec<i32>, shape: &[usize]| -> Result<Tensor> {
        let tensor = b.alloc(DType::I32, shape)?;
        b.upload(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>(), &tensor)?;
        Ok(tensor)
    };
    let tokens = (shared_pages * PAGE) as i32;
    let in_lots = if rows % size == 1 { rows - 1 } else { rows };
    let in_lots = if tokens > 0 { in_lots } else { 0 };
    let member = |place: usize| if place < in_lots { place as i32 } else { -1 };
    let of_lot = |lot: usize| if lot * size < in_lots { tokens } else { 0 };
    let covered = |row: usize| if row < in_lots { tokens } else { 0 };
    Ok(Some(SharedPrefixes {
        rows: ints((0..lots * size).map(member).collect(), &[lots, size])?,
        tokens: ints((0..lots).map(of_lot).collect(), &[lots])?,
        covered: ints((0..rows).map(covered).collect(), &[rows])?,
    }))
}

impl Step {
    /// The first `shared_pages` pages of all rows are the first row's.
    fn new(
        b: &CudaBackend,
        s: &Shape,
        rows: &[(usize, usize)],
        shared_pages: usize,
    ) -> Result<Self> {
        let per_row = PAGES_A_ROW;
        let n = rows.len();
        let tokens: usize = rows.iter().map(|r| r.1).sum();
        let ints = |v: Vec<i32>, shape: &[usize]| -> Result<Tensor> {
            let t = b.alloc(DType::I32, shape)?;
            b.upload(&v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>(), &t)?;
            Ok(t)
        };
        let floats = |x: f32| -> Result<Tensor> {
            let t = b.alloc(DType::F32, &[n])?;
            b.upload(&x.to_le_bytes().repeat(n), &t)?;
            Ok(t)
        };
        let longest = rows.iter().map(|r| r.0 + r.1).max().unwrap_or(1);
        let used = longest.div_ceil(PAGE);
        let mut table = vec![0i32; n * per_row];
        for row in 0..n {
            for i in 0..used {
                let owner = if i < shared_pages { 0 } else { row };
                table[row * per_row + i] = (i * n + owner) as i32 + 1;
            }
        }
        let (mut start, mut positions, mut store_at, mut last) =
            (vec![0i32], vec![], vec![], vec![]);
        for (row, &(cached, extend)) in rows.iter().enumerate() {
            for p in cached..cached + extend {
                positions.push(p as i32);
                store_at.push(table[row * per_row + p / PAGE] * PAGE as i32 + (p % PAGE) as i32);
            }
            last.push(positions.len() as i32 - 1);
            start.push(positions.len() as i32);
        }
        let kv_len: Vec<i32> = rows.iter().map(|r| (r.0 + r.1) as i32).collect();
        let act = |width: usize, count: usize| b.alloc(DType::BF16, &[count, width]);
        let own: Vec<i32> = (0..n as i32).collect();
        Ok(Self {
            batch: Batch {
                rows: n,
                tokens,
                decode_rows: rows.iter().take_while(|r| r.1 == 1).count(),
                slots: ints(own.clone(), &[n])?,
                query_start: ints(start.clone(), &[n + 1])?,
                kv_len: ints(kv_len.clone(), &[n])?,
                positions: ints(positions, &[tokens])?,
                store_at: ints(store_at, &[tokens])?,
                page_table: ints(table, &[n, per_row])?,
                page_size: PAGE,
                host: Some(Arc::new(HostBatch { query_start: start, kv_len })),
                kv_len_max: longest,
                extend_len_max: rows.iter().map(|r| r.1).max().unwrap_or(1),
                shared: lots(b, s.heads, n, shared_pages)?,
            },
            input_ids: ints((0..tokens).map(|i| (i * 97 % s.vocab) as i32).collect(), &[tokens])?,
            last: ints(last, &[n])?,
            x: act(s.hidden, tokens)?,
            qkv: act(s.heads.qkv_width(), tokens)?,
            attended: act(s.heads.q * s.heads.dim, tokens)?,
            mid: act(s.inner, tokens)?,
            rows_x: act(s.hidden, n)?,
            logits: b.alloc(DType::F32, &[n, s.vocab])?,
            sample: [
                floats(0.6)?,
                ints(vec![0; n], &[n])?,
                floats(1.0)?,
                floats(0.0)?,
                ints(vec![1; 2 * n], &[n, 2])?,
                ints(own.clone(), &[n])?,
                ints(own, &[n])?,
                ints(vec![0; n], &[n])?,
            ],
        })
    }

    /// Another step over the same memory.
    fn share(&self) -> Self {
        Self {
            batch: self.batch.clone(),
            input_ids: self.input_ids.clone(),
            last: self.last.clone(),
            x: self.x.clone(),
            qkv: self.qkv.clone(),
            attended: self.attended.clone(),
            mid: self.mid.clone(),
            rows_x: self.rows_x.clone(),
            logits: self.logits.clone(),
            sample: self.sample.clone(),
        }
    }
}
