//! Every architecture against logits and tokens of the Hugging Face implementation, stored by
//! `scripts/make_tiny_checkpoints.py`; whole, in chunks, over pages of other sizes, over ranks; and on a card,
//! where there is one.

#[expect(dead_code, reason = "the switches for failures are for other tests")]
mod reference;
mod tiny;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use minisgl_cpu::{CpuBackend, CpuOptions};
use minisgl_cuda::{CudaBackend, CudaOptions};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::engine::{Engine, EngineError};
use minisgl_scheduler::plan::*;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_tensor::{Alone, Backend, Collective, Precision};
use tiny::Tiny;

const ALL: [&str; 12] = [
    "llama",
    "llama-yarn",
    "llama-linear",
    "llama-dynamic",
    "mistral",
    "mistral3",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-moe",
    "qwen3-moe-sparse",
    "gemma3",
];

/// What computes.
#[derive(Clone, Copy, Debug)]
enum On {
    /// Plain loops.
    Loops,
    /// The backend that users run, in f32.
    Cpu,
    /// The same as it is by default: weights as stored, K and V in half precision.
    CpuNative,
    /// The first card, in f32.
    Card,
    /// The same in bfloat16.
    CardNative,
}

impl On {
    fn precision(self) -> Precision {
        match self {
            Self::CpuNative | Self::CardNative => Precision::Native,
            Self::Loops | Self::Cpu | Self::Card => Precision::Exact,
        }
    }
}

fn ranks(on: On, count: usize) -> Vec<(Arc<dyn Backend>, Arc<dyn Collective>)> {
    let precision = on.precision();
    match on {
        On::Loops => {
            let ranks = reference::group(count).into_iter();
            return ranks.map(|(b, c)| (b as Arc<dyn Backend>, c)).collect();
        }
        On::Card | On::CardNative => {
            assert_eq!(count, 1);
            let card = CudaBackend::new(CudaOptions::new(0, precision)).unwrap();
            return vec![(Arc::new(card), Arc::new(Alone))];
        }
        On::Cpu | On::CpuNative => {}
    }
    let ends = minisgl_cpu::shared_memory_group(count, Duration::from_secs(60));
    let options = CpuOptions { threads: Some(1), precision, ..CpuOptions::default() };
    let backend = || Arc::new(CpuBackend::new(options.clone()).unwrap()) as Arc<dyn Backend>;
    ends.into_iter().map(|end| (backend(), end)).collect()
}

fn engine(tiny: &Tiny, page_size: usize, on: On, count: usize) -> LocalEngine {
    try_engine(tiny, page_size, on, count).unwrap()
}

fn try_engine(tiny: &Tiny, page_size: usize, on: On, count: usize) -> anyhow::Result<LocalEngine> {
    let checkpoint = Arc::new(Checkpoint::open(tiny.folder()).unwrap());
    let options = EngineOptions {
        precision: on.precision(),
        page_size,
        kv_size: KvSize::Pages(160 / page_size),
        running_requests_max: 4,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max: 0,
        dummy_weights: false,
        note_device_times: false,
    };
    LocalEngine::new(checkpoint, &options, ranks(on, count))
}

/// The request's pages are handed out backwards, so that none is where its number suggests.
struct Driver {
    engine: LocalEngine,
    step: u64,
}

impl Driver {
    fn pages(&self, slot: u32, from: usize, to: usize) -> Vec<PageUpdate> {
        let limits = self.engine.limits();
        let each = limits.seq_len_max.div_ceil(limits.page_size);
        (from.div_ceil(limits.page_size)..to.div_ceil(limits.page_size))
            .map(|index| PageUpdate {
                slot: Slot(slot),
                index: index as u32,
                page: PageId((each * (slot as usize + 1) - 1 - index) as u32),
            })
            .collect()
    }

    fn run(&mut self, rows: Vec<PlanRow>) -> StepResult {
        self.try_run(rows).unwrap()
    }

    fn try_run(&mut self, rows: Vec<PlanRow>) -> Result<StepResult, EngineError> {
        let page_updates = rows
            .iter()
            .flat_map(|r| self.pages(r.slot.0, r.cached_len as usize, r.device_len() as usize))
            .collect();
        let plan = StepPlan {
            step: self.step,
            rows,
            page_updates,
            adjustments: None,
            shared_prefixes: vec![],
        };
        self.step += 1;
        let in_flight = self.engine.launch(Arc::new(plan))?;
        self.engine.wait(in_flight)
    }
}

fn greedy() -> Arc<SamplingParams> {
    Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() })
}

/// Log-softmax of every position, teacher-forced in chunks of `chunk`.
fn teacher_forced(tiny: &Tiny, driver: &mut Driver, chunk: usize) -> Vec<Vec<f32>> {
    let ids: Vec<u32> = tiny.prompt.iter().chain(&tiny.tokens).copied().collect();
    let mut all = Vec::new();
    for (lot, part) in ids.chunks(chunk).enumerate() {
        let result = driver.run(vec![PlanRow {
            slot: Slot(0),
            cached_len: (lot * chunk) as u32,
            extend_len: part.len() as u32,
            input: RowInput::Tokens(part.to_vec()),
            output: RowOutput::Score {
                targets: vec![Some(0); part.len()],
                top: tiny.vocab as u32,
                sample: None,
            },
        }]);
        for scored in &result.scores[0] {
            let mut row = vec![f32::NAN; tiny.vocab];
            for (id, logprob) in &scored.as_ref().unwrap().top {
                row[*id as usize] = *logprob;
            }
            all.push(row);
        }
    }
    all
}

/// The largest difference over the largest magnitude.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    assert!(pairs().all(|(a, b)| a.is_finite() && b.is_finite()));
    let largest = pairs().map(|(_, b)| b.abs()).fold(0.0, f32::max);
    pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// 32 tokens, beside a second request that starts in a later step and shares the decode steps.
fn generate(tiny: &Tiny, driver: &mut Driver, chunk: usize) -> Vec<u32> {
    let prefill = |slot: u32, at: usize, part: &[u32], last: bool| PlanRow {
        slot: Slot(slot),
        cached_len: at as u32,
        extend_len: part.len() as u32,
        input: RowInput::Tokens(part.to_vec()),
        output: if last { RowOutput::Sample(greedy()) } else { RowOutput::None },
    };
    let mut tokens = Vec::new();
    let lots = tiny.prompt.len().div_ceil(chunk);
    for (lot, part) in tiny.prompt.chunks(chunk).enumerate() {
        let result = driver.run(vec![prefill(1, lot * chunk, part, lot + 1 == lots)]);
        tokens.extend(result.tokens[0]);
    }
    let mut other = 0;
    while tokens.len() < 32 {
        let decode = |slot: u32, len: usize| PlanRow {
            slot: Slot(slot),
            cached_len: len as u32,
            extend_len: 1,
            input: RowInput::Sampled,
            output: RowOutput::Sample(greedy()),
        };
        let mut rows = vec![decode(1, tiny.prompt.len() + tokens.len() - 1)];
        if tokens.len() > 4 {
            rows.push(match other {
                0 => prefill(0, 0, &tiny.prompt[..7], true),
                n => decode(0, 6 + n),
            });
            other += 1;
        }
        tokens.extend(driver.run(rows).tokens[0]);
    }
    tokens
}

#[test]
fn logits_agree_with_the_stored_reference() {
    for name in ALL {
        let tiny = Tiny::load(name);
        for (on, page_size, chunk) in [
            (On::Loops, 1, 64),
            (On::Loops, 16, 5),
            (On::Cpu, 1, 64),
            (On::Cpu, 16, 64),
            (On::Cpu, 1, 5),
            (On::Cpu, 16, 5),
        ] {
            let mut driver = Driver { engine: engine(&tiny, page_size, on, 1), step: 0 };
            let distance = distance(&teacher_forced(&tiny, &mut driver, chunk), &tiny.logprobs);
            assert!(distance < 1e-4, "{name}, {on:?}, page {page_size}, chunk {chunk}: {distance}");
        }
    }
}

#[test]
fn greedy_tokens_are_the_stored_ones() {
    for name in ALL {
        let tiny = Tiny::load(name);
        let different: BTreeSet<&u32> = tiny.tokens.iter().collect();
        assert!(different.len() > 4, "{name}: tokens that repeat themselves show little");
        for (on, page_size, chunk) in
            [(On::Loops, 16, 6), (On::Cpu, 1, 64), (On::Cpu, 16, 64), (On::Cpu, 16, 6)]
        {
            let mut driver = Driver { engine: engine(&tiny, page_size, on, 1), step: 0 };
            let tokens = generate(&tiny, &mut driver, chunk);
            assert_eq!(tokens, tiny.tokens, "{name}, {on:?}, page {page_size}, chunk {chunk}");
        }
    }
}

/// Weights rounded to bfloat16 and everything as users run it: no further from float32 than the
/// reference itself in bfloat16.
#[test]
fn bf16_stays_within_the_noise_of_the_reference() {
    for name in ALL {
        let tiny = Tiny::load(name);
        tiny.round_to_bf16();
        let mut driver = Driver { engine: engine(&tiny, 16, On::CpuNative, 1), step: 0 };
        let distance = distance(&teacher_forced(&tiny, &mut driver, 64), &tiny.logprobs);
        assert!(distance <= tiny.bf16_noise, "{name}: {distance}, noise {}", tiny.bf16_noise);
        assert!(distance > 0.0, "{name}: nothing was rounded");
    }
}

/// What no kernel of a card's takes, which wants multiples of 8.
const HEADS_OF_12: &str = "qwen2-window";

#[test]
fn a_card_agrees_with_the_stored_reference() {
    if minisgl_cuda::devices().is_empty() {
        return eprintln!("tiny checkpoints: skipped, no CUDA device on this machine");
    }
    for name in ALL.into_iter().filter(|name| *name != HEADS_OF_12) {
        let tiny = Tiny::load(name);
        for (page_size, chunk) in [(1, 64), (16, 64), (16, 5)] {
            let mut driver = Driver { engine: engine(&tiny, page_size, On::Card, 1), step: 0 };
            let distance = distance(&teacher_forced(&tiny, &mut driver, chunk), &tiny.logprobs);
            assert!(distance < 1e-4, "{name}, page {page_size}, chunk {chunk}: {distance}");
            let tokens = generate(&tiny, &mut driver, chunk);
            assert_eq!(tokens, tiny.tokens, "{name}, page {page_size}, chunk {chunk}");
        }
        // Activations are rounded to bfloat16 as the reference's are, but not in the same places.
        tiny.round_to_bf16();
        for chunk in [64, 5] {
            let mut driver = Driver { engine: engine(&tiny, 16, On::CardNative, 1), step: 0 };
            let distance = distance(&teacher_forced(&tiny, &mut driver, chunk), &tiny.logprobs);
            let most = 2.0 * tiny.bf16_noise;
            assert!(distance <= most, "{name}, bf16, chunk {chunk}: {distance}, at most {most}");
            eprintln!(
                "{name}, bf16, chunk {chunk}: {:.2} of the noise",
                distance / tiny.bf16_noise
            );
        }
    }
    let error =
        format!("{:#}", try_engine(&Tiny::load(HEADS_OF_12), 16, On::CardNative, 1).err().unwrap());
    assert!(error.contains("heads of 12 on CUDA"), "{error}");
}

#[test]
fn ranks_compute_what_one_computes() {
    for name in ALL {
        let tiny = Tiny::load(name);
        for (on, counts) in [(On::Loops, &[3][..]), (On::Cpu, &[2, 3, 4])] {
            let mut alone = Driver { engine: engine(&tiny, 16, on, 1), step: 0 };
            let expected = teacher_forced(&tiny, &mut alone, 64);
            for count in counts {
                let mut driver = Driver { engine: engine(&tiny, 16, on, *count), step: 0 };
                let distance = distance(&teacher_forced(&tiny, &mut driver, 64), &expected);
                assert!(distance < 1e-5, "{name}, {on:?} over {count} ranks: {distance}");
                let tokens = generate(&tiny, &mut driver, 6);
                assert_eq!(tokens, tiny.tokens, "{name}, {on:?}, {count} ranks");
            }
        }
    }
}
