//! What does not fit is refused, with what would.

mod reference;
#[expect(dead_code, reason = "the stored logits are for other tests")]
mod tiny;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::engine::Engine;
use minisgl_tensor::{Backend, Precision};
use reference::Reference;
use serde_json::Value;
use tiny::Tiny;

/// Every way of laying out weights: tied heads and others, biases, experts in all layers and in some.
const ALL: [&str; 8] =
    ["llama", "mistral", "mistral3", "qwen2", "qwen3", "qwen3-moe", "qwen3-moe-sparse", "gemma3"];

/// A page of `qwen3`: 16 tokens, a head of 128, K and V in f32, 2 layers.
const PAGE: usize = 32 << 10;

fn options() -> EngineOptions {
    EngineOptions {
        precision: Precision::Exact,
        page_size: 16,
        kv_size: KvSize::Pages(16),
        running_requests_max: 4,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max: 0,
        dummy_weights: false,
        note_device_times: false,
    }
}

/// A rank on each device.
fn start(
    tiny: &Tiny,
    options: &EngineOptions,
    devices: &[Arc<Reference>],
) -> Result<LocalEngine, String> {
    let ends = reference::group(devices.len()).into_iter().map(|(_, end)| end);
    let devices = devices.iter().map(|device| Arc::clone(device) as Arc<dyn Backend>);
    let checkpoint = Arc::new(Checkpoint::open(tiny.folder()).unwrap());
    LocalEngine::new(checkpoint, options, devices.zip(ends).collect())
        .map_err(|error| format!("{error:#}"))
}

fn with_capacities(capacities: &[usize]) -> Vec<Arc<Reference>> {
    capacities.iter().map(|&bytes| Arc::new(Reference::with_capacity(bytes))).collect()
}

/// Why a start fails on devices of so many bytes.
fn refusal(tiny: &Tiny, options: &EngineOptions, capacities: &[usize]) -> String {
    start(tiny, options, &with_capacities(capacities)).err().expect("refused")
}

/// What each of `ranks` ranks' matrices take once loaded; none where the model does not split so.
fn loaded_bytes(tiny: &Tiny, ranks: usize) -> Option<Vec<usize>> {
    let devices = with_capacities(&vec![0; ranks]);
    match start(tiny, &options(), &devices) {
        Err(error) if error.contains("does not fit this model") => return None,
        outcome => drop(outcome.unwrap()),
    }
    let bytes = |device: &Arc<Reference>| device.matrix_bytes.load(Ordering::SeqCst);
    Some(devices.iter().map(bytes).collect())
}

#[test]
fn weights_are_refused_before_they_are_read_where_a_byte_is_missing_and_not_before() {
    for name in ALL {
        let tiny = Tiny::load(name);
        // Seven do not divide the vocabulary: the last rank's part is padded.
        for ranks in 1..=7 {
            let Some(loaded) = loaded_bytes(&tiny, ranks) else { continue };
            // All matrices are let in; it is the rest that does not fit.
            let error = refusal(&tiny, &options(), &loaded);
            let left_out = "out of device memory";
            assert!(error.starts_with("loading ") && error.contains(left_out), "{name}: {error}");
            for rank in 0..ranks {
                let mut capacities = loaded.clone();
                capacities[rank] -= 1;
                let devices = with_capacities(&capacities);
                let error = start(&tiny, &options(), &devices).err().unwrap();
                let whose = if ranks == 1 { String::new() } else { format!(" of rank {rank}") };
                let expected = format!("the weights{whose} do not fit on reference");
                assert!(error.starts_with(&expected), "{name}: {error}");
                let untouched = |device: &Arc<Reference>| device.taken.load(Ordering::SeqCst) == 0;
                assert!(devices.iter().all(untouched), "{name}: something was loaded");
            }
        }
        assert!(loaded_bytes(&tiny, 2).is_some(), "{name} was not split");
    }
}

#[test]
fn a_refusal_names_the_fewest_cards_that_would_do() {
    let tiny = Tiny::load("qwen3");
    let largest = |ranks| *loaded_bytes(&tiny, ranks).unwrap().iter().max().unwrap();
    let (two, three) = (largest(2), largest(3));
    assert!(three < two && two < largest(1));
    for (capacity, expected) in
        [(two, "--tp 2 would"), (two - 1, "--tp 3 would"), (three, "--tp 3 would")]
    {
        let error = refusal(&tiny, &options(), &[capacity]);
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("as float32") && error.contains("--dtype bfloat16"), "{error}");
    }
    // And so it is: on three such cards it is something else that does not fit.
    let error = refusal(&tiny, &options(), &[three; 3]);
    assert!(!error.contains("do not fit"), "{error}");
    let error = refusal(&tiny, &options(), &[1000]);
    assert!(error.contains("no --tp up to"), "{error}");
}

#[test]
fn a_config_of_absurd_sizes_is_refused_like_another() {
    let tiny = Tiny::load("qwen3-moe");
    let path = tiny.folder().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (field, value) in [
        ("hidden_size", 1 << 20),
        ("num_hidden_layers", 1 << 12),
        ("num_experts", 1 << 14),
        ("moe_intermediate_size", 1 << 22),
    ] {
        config[field] = value.into();
    }
    std::fs::write(&path, config.to_string()).unwrap();
    let options = EngineOptions { dummy_weights: true, ..options() };
    let error = refusal(&tiny, &options, &[1 << 40]);
    assert!(error.contains("do not fit on") && error.contains("no --tp up to"), "{error}");
}

#[test]
fn steps_without_room_name_the_options_that_size_them() {
    let tiny = Tiny::load("qwen3");
    let error = refusal(
        &tiny,
        &EngineOptions { step_tokens_max: 1 << 20, ..options() },
        &[loaded_bytes(&tiny, 1).unwrap()[0] + (1 << 20)],
    );
    for part in ["steps of 1048576 tokens", "--max-prefill-length", "out of device memory"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_kv_pool_that_does_not_fit_is_refused_with_the_pages_that_would() {
    let tiny = Tiny::load("qwen3");
    let device = Arc::new(Reference::default());
    let engine = start(&tiny, &options(), &[Arc::clone(&device)]).unwrap();
    assert_eq!(engine.limits().pages, 16);
    let loaded = device.taken.load(Ordering::SeqCst) - 16 * PAGE;
    let room = [loaded + 10 * PAGE];
    let with = |kv_size| EngineOptions { kv_size, ..options() };
    let error = refusal(&tiny, &with(KvSize::Pages(11)), &room);
    assert!(error.contains("11 KV pages of 32 KB") && error.contains("10 would"), "{error}");
    let error = refusal(&tiny, &with(KvSize::FreeShare(0.05)), &room);
    assert!(error.contains("no room"), "{error}");
    let error = refusal(&tiny, &EngineOptions { page_size: 0, ..options() }, &room);
    assert!(error.contains("--page-size 0"), "{error}");
    let engine = start(&tiny, &with(KvSize::FreeShare(0.5)), &with_capacities(&room)).unwrap();
    assert_eq!(engine.limits().pages, 5);
}
