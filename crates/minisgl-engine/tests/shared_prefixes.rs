//! From the radix tree to attention: what plans say of shared prefixes arrives as lots of rows, and a
//! device that reads a lot's prefix where its first row has it writes the same tokens.

#[expect(dead_code, reason = "not every test file uses all of it")]
mod reference;
#[expect(dead_code, reason = "not every test file uses all of it")]
mod tiny;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::message::{Command, NewRequest, Output, RequestId};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::{Scheduler, SchedulerOptions};
use minisgl_tensor::{Backend, Precision};
use tiny::Tiny;

/// Five requests behind 70 tokens, two of which share 20 more, and one that shares nothing.
fn requests() -> Vec<NewRequest> {
    let run = |seed: u32, len: u32| (0..len).map(move |at| (seed + at * 7 + at * at * 3) % 120);
    let one = |id: u64| {
        let mut prompt: Vec<u32> = if id < 5 { run(1, 70).collect() } else { Vec::new() };
        if id < 2 {
            prompt.extend(run(2, 20));
        }
        prompt.extend(run(10 + id as u32, 3 + id as u32));
        let params = SamplingParams {
            temperature: 0.0,
            ignore_eos: true,
            max_tokens: 5 + id as u32,
            ..SamplingParams::default()
        };
        NewRequest { id: RequestId(id), prompt, params, prompt_logprobs: None, constraint: None }
    };
    (0..6).map(one).collect()
}

/// The tokens, and how often a row of a rank was taken through a prefix with others. `sharing`:
/// `Backend::prefix_rows_max`, and the tokens a row that must be spared.
fn serve(
    ranks: usize,
    sharing: (usize, usize),
    page_size: usize,
) -> (BTreeMap<u64, Vec<u32>>, Vec<usize>) {
    let tiny = Tiny::load("qwen2");
    let options = EngineOptions {
        precision: Precision::Exact,
        page_size,
        kv_size: KvSize::Pages(800 / page_size),
        running_requests_max: 8,
        seq_len_max: Some(160),
        step_tokens_max: 64,
        graph_batch_max: 0,
        dummy_weights: false,
        note_device_times: false,
    };
    let group = reference::group(ranks);
    let backends: Vec<_> = group.iter().map(|(backend, _)| Arc::clone(backend)).collect();
    for backend in &backends {
        backend.prefix_rows_max.store(sharing.0, SeqCst);
        backend.spared_min.store(sharing.1, SeqCst);
    }
    let ranks = group.into_iter().map(|(backend, end)| (backend as Arc<dyn Backend>, end));
    let checkpoint = Arc::new(Checkpoint::open(tiny.folder()).unwrap());
    let engine = LocalEngine::new(checkpoint, &options, ranks.collect()).unwrap();

    let (commands, receiver) = channel();
    for request in requests() {
        commands.send(Command::Submit(Box::new(request))).unwrap();
    }
    drop(commands);
    let answers = Arc::new(Mutex::new(BTreeMap::<u64, Vec<u32>>::new()));
    let noted = Arc::clone(&answers);
    let sink = move |outputs: Vec<Output>| {
        for output in outputs {
            let token = output.token.map(|token| token.id);
            noted.lock().unwrap().entry(output.id.0).or_default().extend(token);
        }
    };
    Scheduler::new(engine, SchedulerOptions::default(), receiver, sink).run().unwrap();
    let answers = std::mem::take(&mut *answers.lock().unwrap());
    (answers, backends.iter().map(|backend| backend.shared_rows.load(SeqCst)).collect())
}

#[test]
fn a_prefix_read_where_the_first_row_has_it_gives_the_same_tokens() {
    for page_size in [4, 16] {
        let (expected, shared) = serve(1, (1, 0), page_size);
        assert_eq!((expected.len(), shared), (6, vec![0]));
        for lot in [2, 3, 8] {
            let (answers, shared) = serve(1, (lot, 0), page_size);
            assert_eq!(answers, expected, "lots of {lot}, pages of {page_size}");
            assert!(shared[0] > 0, "lots of {lot}, pages of {page_size}");
        }
        let (answers, shared) = serve(2, (3, 0), page_size);
        assert_eq!(answers, expected, "two ranks");
        assert!(shared[0] > 0 && shared[0] == shared[1], "both ranks have the same lots");
    }
}

#[test]
fn prefixes_are_left_to_each_row_in_steps_that_they_would_spare_little() {
    let (expected, always) = serve(1, (8, 0), 4);
    let (answers, sometimes) = serve(1, (8, 30), 4);
    assert_eq!(answers, expected);
    assert!(0 < sometimes[0] && sometimes[0] < always[0], "{sometimes:?} of {always:?}");
    assert_eq!(serve(1, (8, 1000), 4), (expected, vec![0]));
}
