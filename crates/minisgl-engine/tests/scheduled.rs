//! A tiny model on the CPU under the scheduler: the tokens do not depend on how its steps are cut.

#[expect(dead_code, reason = "not every test file uses all of it")]
mod tiny;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use minisgl_cpu::{CpuBackend, CpuOptions};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::cache::CacheType;
use minisgl_scheduler::message::{Command, NewRequest, Output, RequestId};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::{Scheduler, SchedulerOptions, SchedulerStats};
use minisgl_tensor::{Alone, Backend, Precision};
use tiny::Tiny;

/// How to run.
#[derive(Clone, Copy, Debug)]
struct Way {
    overlap: bool,
    cache: CacheType,
    page_size: usize,
    pages: usize,
    step_tokens_max: usize,
    slots: usize,
}

const ROOMY: Way = Way {
    overlap: true,
    cache: CacheType::Radix,
    page_size: 4,
    pages: 200,
    step_tokens_max: 256,
    slots: 16,
};

fn engine(tiny: &Tiny, way: Way) -> LocalEngine {
    let options = EngineOptions {
        precision: Precision::Exact,
        page_size: way.page_size,
        kv_size: KvSize::Pages(way.pages),
        running_requests_max: way.slots,
        seq_len_max: Some(64),
        step_tokens_max: way.step_tokens_max,
        graph_batch_max: 4,
        dummy_weights: false,
        note_device_times: false,
    };
    let precision = Precision::Exact;
    let cpu = CpuOptions { threads: Some(1), precision, ..CpuOptions::default() };
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(cpu).unwrap());
    let checkpoint = Arc::new(Checkpoint::open(tiny.folder()).unwrap());
    LocalEngine::new(checkpoint, &options, vec![(backend, Arc::new(Alone))]).unwrap()
}

/// Greedy, sampled, penalized and scored requests with prefixes in common.
fn requests(tiny: &Tiny) -> Vec<NewRequest> {
    let one = |id: u64| {
        let mut prompt = tiny.prompt.clone();
        prompt.extend((0..id as u32 * 5 % 17).map(|at| (at * 13 + id as u32 / 2) % 120));
        let plain = SamplingParams { max_tokens: 12 + id as u32 % 5, ..SamplingParams::default() };
        let params = match id % 4 {
            0 => SamplingParams { temperature: 0.0, ..plain },
            1 => SamplingParams { seed: id, top_k: 40, top_p: 0.95, ..plain },
            2 => SamplingParams {
                seed: id,
                frequency_penalty: 0.7,
                repetition_penalty: 1.3,
                ..plain
            },
            _ => SamplingParams { temperature: 0.0, min_tokens: 9, ..plain },
        };
        let prompt_logprobs = (id % 5 == 4).then_some(2);
        NewRequest { id: RequestId(id), prompt, params, prompt_logprobs, constraint: None }
    };
    (0..12).map(one).collect()
}

/// Each request's tokens and its prompt's log-probabilities.
type Answers = BTreeMap<u64, (Vec<u32>, Vec<String>)>;

fn run(tiny: &Tiny, way: Way, requests: Vec<NewRequest>) -> (Answers, Arc<SchedulerStats>) {
    let (commands, receiver) = channel();
    for request in requests {
        commands.send(Command::Submit(Box::new(request))).unwrap();
    }
    drop(commands);
    let answers = Arc::new(Mutex::new(Answers::new()));
    let noted = Arc::clone(&answers);
    let sink = move |outputs: Vec<Output>| {
        for output in outputs {
            let mut answers = noted.lock().unwrap();
            let (tokens, scores) = answers.entry(output.id.0).or_default();
            tokens.extend(output.token.map(|token| token.id));
            let logprobs = output.prompt_logprobs.unwrap_or_default();
            scores.extend(logprobs.iter().map(|logprobs| format!("{logprobs:?}")));
        }
    };
    let options = SchedulerOptions {
        cache: way.cache,
        overlap: way.overlap,
        eos_ids: vec![3, 4, 5],
        check_integrity: true,
        ..SchedulerOptions::default()
    };
    let scheduler = Scheduler::new(engine(tiny, way), options, receiver, sink);
    let stats = scheduler.stats();
    scheduler.run().unwrap();
    let answers = std::mem::take(&mut *answers.lock().unwrap());
    (answers, stats)
}

#[test]
fn tokens_do_not_depend_on_how_steps_are_cut() {
    let tiny = Tiny::load("qwen3");
    let alone = |request: NewRequest| run(&tiny, ROOMY, vec![request]).0;
    let expected: Answers = requests(&tiny).into_iter().flat_map(alone).collect();
    assert!(expected.values().all(|(tokens, _)| !tokens.is_empty()));
    assert_eq!(expected.values().filter(|(_, scores)| !scores.is_empty()).count(), 2);
    let tight = Way { pages: 28, ..ROOMY };
    let ways = [
        ROOMY,
        Way { overlap: false, ..ROOMY },
        Way { cache: CacheType::Naive, ..ROOMY },
        Way { page_size: 1, pages: 700, ..ROOMY },
        Way { page_size: 16, pages: 60, step_tokens_max: 7, slots: 5, ..ROOMY },
        Way { step_tokens_max: 16, ..ROOMY },
        tight,
        Way { overlap: false, ..tight },
        Way { cache: CacheType::Naive, step_tokens_max: 16, ..tight },
    ];
    let mut preemptions = 0;
    for way in ways {
        let (answers, stats) = run(&tiny, way, requests(&tiny));
        assert_eq!(answers, expected, "{way:?}");
        preemptions += stats.preemptions.load(Relaxed);
        let cached = stats.cached_tokens.load(Relaxed) > 0;
        assert_eq!(cached, way.cache == CacheType::Radix, "{way:?}");
    }
    assert!(preemptions > 0, "the tight pool is meant to be too small");
}

/// The prompt's pages are taken from the cache the second time, and chunks end anywhere in them.
#[test]
fn every_architecture_gives_its_reference_tokens_from_cached_pages() {
    for name in [
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
    ] {
        let tiny = Tiny::load(name);
        let request = |id| NewRequest {
            id: RequestId(id),
            prompt: tiny.prompt.clone(),
            params: SamplingParams {
                temperature: 0.0,
                ignore_eos: true,
                max_tokens: tiny.tokens.len() as u32,
                ..SamplingParams::default()
            },
            prompt_logprobs: None,
            constraint: None,
        };
        for page_size in [1, 16] {
            // One slot: each request is done before the next begins.
            let way = Way { page_size, pages: 256 / page_size, slots: 1, ..ROOMY };
            for way in [way, Way { step_tokens_max: 7, ..way }] {
                let (answers, stats) = run(&tiny, way, (0..3).map(request).collect());
                for (id, (tokens, _)) in &answers {
                    assert_eq!(*tokens, tiny.tokens, "{name}, request {id}, {way:?}");
                }
                let cached = stats.cached_tokens.load(Relaxed) as usize;
                let whole_pages = (tiny.prompt.len() - 1) / page_size * page_size;
                assert_eq!(cached, 2 * whole_pages, "{name}, {way:?}");
            }
        }
    }
}
