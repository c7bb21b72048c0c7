//! Tensor parallelism on cards: ranks that share one, through the kernels that run between cards,
//! and ranks on cards of their own write the stored tokens in f32, with graphs and without. Skipped,
//! with the reason, where there is no card.

#[expect(dead_code, reason = "not every test file uses all of it")]
mod tiny;

use std::sync::Arc;
use std::time::Duration;

use minisgl_cuda::{CudaBackend, CudaOptions, GroupOptions, Transport, group};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::engine::Engine;
use minisgl_scheduler::plan::*;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_tensor::{Alone, Backend, Collective, Precision};
use tiny::Tiny;

const ALL: [&str; 9] = [
    "llama",
    "llama-yarn",
    "llama-linear",
    "mistral",
    "mistral3",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "gemma3",
];

/// A rank on each of `cards`.
fn engine(
    tiny: &Tiny,
    cards: &[usize],
    transport: Transport,
    graph_batch_max: usize,
) -> LocalEngine {
    let precision = Precision::Exact;
    let open = |&device| Arc::new(CudaBackend::new(CudaOptions::new(device, precision)).unwrap());
    let backends: Vec<_> = cards.iter().map(open).collect();
    let ends: Vec<Arc<dyn Collective>> = match cards.len() {
        1 => vec![Arc::new(Alone)],
        _ => {
            let timeout = Duration::from_secs(30);
            group(&backends, GroupOptions { timeout, transport }).unwrap()
        }
    };
    let options = EngineOptions {
        precision,
        page_size: 16,
        kv_size: KvSize::Pages(16),
        running_requests_max: 4,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max,
        dummy_weights: false,
        note_device_times: false,
    };
    let checkpoint = Arc::new(Checkpoint::open(tiny.folder()).unwrap());
    let ranks = backends.into_iter().zip(ends).map(|(b, end)| (b as Arc<dyn Backend>, end));
    LocalEngine::new(checkpoint, &options, ranks.collect()).unwrap()
}

/// The prompt of slot 0 (pages 0 to 3), then decodes, one launched while the last one runs.
fn generate(engine: &mut LocalEngine, prompt: &[u32], count: usize) -> Vec<u32> {
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let step = |cached_len: usize, extend_len: usize, input: RowInput| {
        let page = |index: usize| PageUpdate {
            slot: Slot(0),
            index: index as u32,
            page: PageId(index as u32),
        };
        let pages = cached_len.div_ceil(16)..(cached_len + extend_len).div_ceil(16);
        let row = PlanRow {
            slot: Slot(0),
            cached_len: cached_len as u32,
            extend_len: extend_len as u32,
            input,
            output: RowOutput::Sample(Arc::new(params.clone())),
        };
        let page_updates = pages.map(page).collect();
        Arc::new(StepPlan {
            step: 0,
            rows: vec![row],
            page_updates,
            adjustments: None,
            shared_prefixes: vec![],
        })
    };
    let first = step(0, prompt.len(), RowInput::Tokens(prompt.to_vec()));
    let mut in_flight = engine.launch(first).unwrap();
    let mut tokens = Vec::new();
    for len in prompt.len()..prompt.len() + count - 1 {
        let next = engine.launch(step(len, 1, RowInput::Sampled)).unwrap();
        tokens.extend(engine.wait(in_flight).unwrap().tokens[0]);
        in_flight = next;
    }
    tokens.extend(engine.wait(in_flight).unwrap().tokens[0]);
    tokens
}

fn check(tiny: &Tiny, name: &str, cards: &[usize], transport: Transport, graph_batch_max: usize) {
    let mut engine = engine(tiny, cards, transport, graph_batch_max);
    let tokens = generate(&mut engine, &tiny.prompt, tiny.tokens.len());
    let way = format!("{name} on cards {cards:?}, {transport:?}, graphs up to {graph_batch_max}");
    assert_eq!(tokens, tiny.tokens, "{way}");
    eprintln!("{way}: the stored tokens");
}

#[test]
fn ranks_that_share_a_card_write_the_stored_tokens() {
    if minisgl_cuda::devices().is_empty() {
        return eprintln!("ranks on one card: skipped, no CUDA device on this machine");
    }
    for name in ALL {
        let tiny = Tiny::load(name);
        for cards in [&[0][..], &[0, 0]] {
            for graph_batch_max in [0, 4] {
                check(&tiny, name, cards, Transport::Peers, graph_batch_max);
            }
        }
    }
}

#[test]
fn ranks_on_cards_of_their_own_write_the_stored_tokens() {
    let cards: Vec<usize> = (0..minisgl_cuda::devices().len()).collect();
    if cards.len() < 2 {
        return eprintln!("several cards: skipped, {} CUDA devices on this machine", cards.len());
    }
    for name in ALL {
        let tiny = Tiny::load(name);
        // Four query heads are the most that every one of these checkpoints has.
        for ranks in [2, 4].into_iter().filter(|ranks| *ranks <= cards.len()) {
            for (transport, graph_batch_max) in
                [(Transport::Auto, 0), (Transport::Auto, 4), (Transport::Nccl, 4)]
            {
                check(&tiny, name, &cards[..ranks], transport, graph_batch_max);
            }
        }
    }
}
