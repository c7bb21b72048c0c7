//! The engine's edges: graphs, failures, memory, refusals, other ways to store weights.

#[expect(dead_code, reason = "limited memory is for other tests")]
mod reference;
#[expect(dead_code, reason = "not every test file uses all of it")]
mod tiny;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::engine::{Engine, EngineError};
use minisgl_scheduler::plan::*;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_tensor::{Alone, Backend, Precision};
use reference::Reference;
use tiny::Tiny;

fn options() -> EngineOptions {
    EngineOptions {
        precision: Precision::Exact,
        page_size: 16,
        kv_size: KvSize::Pages(16),
        running_requests_max: 4,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max: 4,
        dummy_weights: false,
        note_device_times: false,
    }
}

fn start(
    checkpoint: Checkpoint,
    options: &EngineOptions,
    backend: &Arc<Reference>,
) -> Result<LocalEngine, String> {
    let rank = (Arc::clone(backend) as Arc<dyn Backend>, Arc::new(Alone) as _);
    LocalEngine::new(Arc::new(checkpoint), options, vec![rank])
        .map_err(|error| format!("{error:#}"))
}

fn open(tiny: &Tiny) -> Checkpoint {
    Checkpoint::open(tiny.folder()).unwrap()
}

fn greedy(logprobs: Option<u32>) -> RowOutput {
    let params = SamplingParams { temperature: 0.0, logprobs, ..SamplingParams::default() };
    RowOutput::Sample(Arc::new(params))
}

fn row(slot: u32, cached_len: usize, input: RowInput) -> PlanRow {
    let extend_len = match &input {
        RowInput::Tokens(ids) => ids.len() as u32,
        RowInput::Sampled => 1,
    };
    let cached_len = cached_len as u32;
    PlanRow { slot: Slot(slot), cached_len, extend_len, input, output: greedy(None) }
}

/// Slot s has pages 4s, 4s + 1, …
fn plan(rows: Vec<PlanRow>) -> Arc<StepPlan> {
    let page_updates =
        rows.iter()
            .flat_map(|row| {
                (row.cached_len.div_ceil(16)..row.device_len().div_ceil(16)).map(|index| {
                    PageUpdate { slot: row.slot, index, page: PageId(4 * row.slot.0 + index) }
                })
            })
            .collect();
    Arc::new(StepPlan { step: 0, rows, page_updates, adjustments: None, shared_prefixes: vec![] })
}

fn run(engine: &mut LocalEngine, rows: Vec<PlanRow>) -> Result<StepResult, EngineError> {
    let in_flight = engine.launch(plan(rows))?;
    engine.wait(in_flight)
}

/// The prompt, then decodes until there are `count` tokens.
fn generate(engine: &mut LocalEngine, prompt: &[u32], count: usize) -> Vec<u32> {
    let first = run(engine, vec![row(2, 0, RowInput::Tokens(prompt.to_vec()))]).unwrap();
    let mut tokens = vec![first.tokens[0].unwrap()];
    while tokens.len() < count {
        let decode = row(2, prompt.len() + tokens.len() - 1, RowInput::Sampled);
        tokens.push(run(engine, vec![decode]).unwrap().tokens[0].unwrap());
    }
    tokens
}

#[test]
fn steps_launched_ahead_follow_the_tokens_on_the_device() {
    let tiny = Tiny::load("qwen3");
    let mut engine = start(open(&tiny), &options(), &Arc::default()).unwrap();
    let prompt = RowInput::Tokens(tiny.prompt.clone());
    let mut in_flight = vec![engine.launch(plan(vec![row(0, 0, prompt)])).unwrap()];
    for len in tiny.prompt.len()..tiny.prompt.len() + 31 {
        let decode = plan(vec![row(0, len, RowInput::Sampled)]);
        in_flight.push(engine.launch(decode).unwrap());
    }
    let tokens: Vec<u32> =
        in_flight.into_iter().map(|step| engine.wait(step).unwrap().tokens[0].unwrap()).collect();
    assert_eq!(tokens, tiny.tokens);
}

#[test]
fn the_device_says_when_it_ran_a_step_if_asked() {
    let tiny = Tiny::load("llama");
    let backend = Arc::<Reference>::default();
    let noting = EngineOptions { note_device_times: true, ..options() };
    let mut engine = start(open(&tiny), &noting, &backend).unwrap();
    let mut last_ended = Instant::now();
    let prompt = RowInput::Tokens(tiny.prompt.clone());
    for next in [row(0, 0, prompt), row(0, tiny.prompt.len(), RowInput::Sampled)] {
        let span = run(&mut engine, vec![next]).unwrap().on_device.expect("asked for");
        assert!(span.began >= last_ended && span.took > Duration::ZERO);
        last_ended = span.began + span.took;
        assert!(last_ended <= Instant::now());
    }
    assert_eq!(backend.marks.load(Ordering::SeqCst), 4);

    let backend = Arc::<Reference>::default();
    let mut engine = start(open(&tiny), &options(), &backend).unwrap();
    let prompt = row(0, 0, RowInput::Tokens(tiny.prompt.clone()));
    assert_eq!(run(&mut engine, vec![prompt]).unwrap().on_device, None);
    assert_eq!(backend.marks.load(Ordering::SeqCst), 0, "nobody asked");
}

#[test]
fn adjustments_are_waited_for_and_logprobs_see_them() {
    let tiny = Tiny::load("llama");
    let mut engine = start(open(&tiny), &options(), &Arc::default()).unwrap();
    let cell = Arc::new(AdjustmentsCell::default());
    let mut first = row(1, 0, RowInput::Tokens(tiny.prompt.clone()));
    first.output = greedy(Some(3));
    let plan = StepPlan {
        adjustments: Some(Arc::clone(&cell)),
        ..Arc::into_inner(plan(vec![first])).unwrap()
    };
    let in_flight = engine.launch(Arc::new(plan)).unwrap();
    // Only tokens 33 and 40 are allowed, and 40 is made the likelier one.
    let mut mask = vec![0; 4];
    mask[1] = 1 << 1 | 1 << 8;
    let edits = vec![LogitEdit { token: 40, scale: 1.0, bias: 100.0 }];
    cell.fill(vec![RowAdjustment { row: 0, edits, mask: Some(Arc::new(mask)) }]);
    let result = engine.wait(in_flight).unwrap();
    assert_eq!(result.tokens, [Some(40)]);
    let logprobs = result.logprobs[0].as_ref().unwrap();
    assert_eq!((logprobs.rank, logprobs.top.len(), logprobs.top[1].0), (0, 3, 33));
}

#[test]
fn a_failing_or_panicking_rank_ends_the_engine_in_order() {
    let tiny = Tiny::load("llama-linear");
    for panics in [false, true] {
        let backend = Arc::<Reference>::default();
        // Each step embeds once: the prompt, one decode, one more, and then the fourth.
        let mut engine = start(open(&tiny), &options(), &backend).unwrap();
        assert_eq!(generate(&mut engine, &tiny.prompt, 2), tiny.tokens[..2]);
        let switch = if panics { &backend.panic_at } else { &backend.fail_at };
        switch.store(4, Ordering::SeqCst);
        let step = |len| vec![row(2, len, RowInput::Sampled)];
        let at = tiny.prompt.len() + 1;
        let third = engine.launch(plan(step(at))).unwrap();
        let fourth = engine.launch(plan(step(at + 1))).unwrap();
        let fifth = engine.launch(plan(step(at + 2)));
        // A whole step is handed out, even when the next has failed by the time it is asked for.
        assert_eq!(engine.wait(third).unwrap().tokens, [Some(tiny.tokens[2])]);
        let error = engine.wait(fourth).unwrap_err().to_string();
        let said = if panics { "the test made this panic" } else { "pulled the plug" };
        assert!(error.contains("rank 0") && error.contains(said), "{error}");
        // The fifth was refused if the fourth had failed already; if not, it fails now.
        assert!(fifth.and_then(|step| engine.wait(step)).is_err());
        assert!(run(&mut engine, step(at + 3)).is_err());
    }
}

#[test]
fn an_engine_that_is_dropped_lets_go_of_ranks_that_wait() {
    let tiny = Tiny::load("llama-linear");
    let mut engine = start(open(&tiny), &options(), &Arc::default()).unwrap();
    let (done, finished) = std::sync::mpsc::channel();
    let prompt = tiny.prompt.clone();
    std::thread::spawn(move || {
        let plan = StepPlan {
            adjustments: Some(Arc::default()),
            ..Arc::into_inner(plan(vec![row(0, 0, RowInput::Tokens(prompt))])).unwrap()
        };
        let in_flight = engine.launch(Arc::new(plan)).unwrap();
        drop(engine);
        drop(in_flight);
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(30)).expect("the engine ended");
}

#[test]
fn more_ranks_than_heads_are_refused_with_those_that_would_do() {
    let tiny = Tiny::load("qwen3-moe");
    let ranks = reference::group(17).into_iter().map(|(b, c)| (b as Arc<dyn Backend>, c)).collect();
    let error = LocalEngine::new(Arc::new(open(&tiny)), &options(), ranks).err().unwrap();
    let error = error.to_string();
    assert!(error.contains("--tp 17") && error.contains("query heads"), "{error}");
    assert!(error.contains("would do"), "{error}");
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let tiny = Tiny::load("llama");
    let path = tiny.folder().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("\"vocab_size\": 120", "\"vocab_size\": 121")).unwrap();
    let error = start(open(&tiny), &options(), &Arc::default()).err().unwrap();
    for part in ["model.embed_tokens.weight", "[120, 64]", "[121, 64]"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn dummy_weights_need_only_a_config_and_are_the_same_each_time() {
    let tiny = Tiny::load("qwen3-moe");
    std::fs::remove_file(tiny.folder().join("model.safetensors")).unwrap();
    let error = start(open(&tiny), &options(), &Arc::default()).err().unwrap();
    assert!(error.contains("holds no weights"), "{error}");
    let options = EngineOptions { dummy_weights: true, ..options() };
    let answers: Vec<Vec<u32>> = (0..2)
        .map(|_| {
            let mut engine = start(open(&tiny), &options, &Arc::default()).unwrap();
            generate(&mut engine, &tiny.prompt, 4)
        })
        .collect();
    assert_eq!(answers[0], answers[1]);
}

/// The real model on the reference backend: slow, so on request only.
/// `MINISGL_SMOLLM2=… cargo test --release -p minisgl-engine --test engine -- --ignored --nocapture`
#[test]
#[ignore = "needs the 94 MB model file named by MINISGL_SMOLLM2"]
fn smollm2_says_what_follows() {
    let path = std::env::var("MINISGL_SMOLLM2").expect("MINISGL_SMOLLM2 names the GGUF file");
    let checkpoint = Checkpoint::open(path).unwrap();
    let vocabulary = checkpoint.gguf().unwrap().strings("tokenizer.ggml.tokens").unwrap().to_vec();
    let id = |token: &str| vocabulary.iter().position(|t| t == token).unwrap() as u32;
    let prompt: Vec<u32> = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"].map(id).to_vec();
    let mut engine = start(checkpoint, &options(), &Arc::default()).unwrap();
    let tokens = generate(&mut engine, &prompt, 6);
    let text: String = tokens.iter().map(|t| vocabulary[*t as usize].as_str()).collect();
    assert!(text.contains("ĠParis"), "{text}");
}
