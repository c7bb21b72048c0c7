//! How requests begin and end: refusals, aborts in every state, failures, draining.

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{channel, sync_channel};

use common::{
    Hooked, Random, Served, engine, greedy, limits, options, prompt, request, serve, serve_from,
    submit,
};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_scheduler::message::{Command, FinishReason, NewRequest, Refusal, RequestId};
use minisgl_scheduler::plan::StepPlan;
use minisgl_scheduler::sampling::SamplingParams;

/// Few pages, few slots and short chunks: all states at once.
fn tight() -> EngineLimits {
    EngineLimits { pages: 40, slots: 5, step_tokens_max: 24, ..limits() }
}

fn requests() -> Vec<NewRequest> {
    let len = |id: u64| 10 + (id as usize * 17) % 60;
    (0..8).map(|id| request(id, prompt(id as u32 / 2, len(id)), greedy(20 + id as u32))).collect()
}

/// Where in a step's life a command comes.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Launch,
    Wait,
}

/// Runs `requests`, and sends a command while step `step` is at that moment.
fn interrupted(step: u64, moment: Moment, overlap: bool, command: Command) -> Served {
    let (sender, receiver) = channel();
    requests().into_iter().for_each(|new| sender.send(submit(new)).unwrap());
    sender.send(Command::Drain).unwrap();
    let interrupt = Rc::new(RefCell::new(Some(command)));
    let hook = |at: Moment| {
        let (sender, interrupt) = (sender.clone(), Rc::clone(&interrupt));
        move |plan: &StepPlan| {
            if plan.step == step && std::mem::discriminant(&at) == std::mem::discriminant(&moment) {
                sender.send(interrupt.borrow_mut().take().unwrap()).unwrap();
            }
        }
    };
    let (on_launch, on_wait) = (hook(Moment::Launch), hook(Moment::Wait));
    let engine = Hooked { engine: engine(tight()), on_launch, on_wait };
    let served = serve_from(receiver, engine, SchedulerOptions { overlap, ..options() });
    served.result.as_ref().unwrap();
    served
}

fn undisturbed() -> Served {
    let served = serve(engine(tight()), options(), requests().into_iter().map(submit));
    assert!(served.stats.preemptions.load(Relaxed) > 0, "the pool is meant to be too small");
    served
}

#[test]
fn an_abort_in_any_state_ends_that_request_and_touches_no_other() {
    let expected = undisturbed();
    let steps = expected.stats.steps.load(Relaxed);
    let mut aborted = 0;
    for step in 0..steps {
        for moment in [Moment::Launch, Moment::Wait] {
            for id in 0..8 {
                let overlap = (step + id) % 2 == 0;
                let served = interrupted(step, moment, overlap, Command::Abort(RequestId(id)));
                for other in 0..8 {
                    let tokens = served.tokens(other);
                    let case = format!("step {step} {moment:?}: {id} aborted, {other} seen");
                    if other == id && *served.finish(id) == FinishReason::Abort {
                        assert!(expected.tokens(id).starts_with(tokens), "{case}");
                        aborted += 1;
                    } else {
                        assert_eq!(tokens, expected.tokens(other), "{case}");
                        assert_eq!(*served.finish(other), FinishReason::Length, "{case}");
                    }
                }
            }
        }
    }
    assert!(aborted > steps * 4, "{aborted} aborts in {steps} steps");
}

#[test]
fn a_shutdown_aborts_all_and_ends() {
    let expected = undisturbed();
    for step in 0..20 {
        for overlap in [true, false] {
            let served = interrupted(step, Moment::Wait, overlap, Command::Shutdown);
            assert_eq!(served.outcomes.len(), 8);
            for id in 0..8 {
                assert!(expected.tokens(id).starts_with(served.tokens(id)));
                let reason = served.finish(id);
                assert!(matches!(reason, FinishReason::Abort | FinishReason::Length), "{reason:?}");
            }
            assert!(served.stats.steps.load(Relaxed) <= step + 2);
        }
    }
}

#[test]
fn pages_add_up_in_a_storm_of_disconnects() {
    let (sender, receiver) = channel();
    let mut random = Random(7);
    let one = |id: u64, random: &mut Random| {
        let prompt = prompt(random.below(6) as u32, 1 + random.below(150));
        request(id, prompt, greedy(1 + random.below(60) as u32))
    };
    let mut alive = Vec::new();
    let mut submitted = 0;
    let mut hook = move |_: &StepPlan| {
        for _ in 0..random.below(6) {
            if submitted < 2000 {
                sender.send(submit(one(submitted, &mut random))).unwrap();
                alive.push(submitted);
                submitted += 1;
            }
        }
        if submitted == 2000 {
            sender.send(Command::Drain).unwrap();
        }
        while random.below(3) > 0 && !alive.is_empty() {
            let id = alive.swap_remove(random.below(alive.len()));
            sender.send(Command::Abort(RequestId(id))).unwrap();
        }
    };
    // What comes before the first step.
    let nothing = StepPlan {
        step: 0,
        rows: vec![],
        page_updates: vec![],
        adjustments: None,
        shared_prefixes: vec![],
    };
    (0..5).for_each(|_| hook(&nothing));
    let engine = Hooked { engine: engine(tight()), on_launch: hook, on_wait: |_: &StepPlan| {} };
    let served = serve_from(receiver, engine, options());
    assert_eq!(served.outcomes.len(), 2000);
    assert!(served.stats.preemptions.load(Relaxed) > 0);
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let refusal = |new: NewRequest| {
        let served = serve(engine(limits()), options(), [submit(new)]);
        assert_eq!(served.stats.steps.load(Relaxed), 0);
        match served.finish(0) {
            FinishReason::Refused(refusal) => refusal.clone(),
            reason => panic!("{reason:?}"),
        }
    };
    assert_eq!(refusal(request(0, vec![], greedy(1))), Refusal::EmptyPrompt);
    let too_long = Refusal::PromptTooLong { prompt_len: 512, prompt_len_max: 511 };
    assert_eq!(refusal(request(0, prompt(1, 512), greedy(1))), too_long);
    let unknown = Refusal::TokenOutOfVocabulary { token: 1000, vocab_size: 1000 };
    assert_eq!(refusal(request(0, vec![5, 1000], greedy(1))), unknown);
    let biased = SamplingParams { logit_bias: vec![(1000, 1.0)], ..greedy(1) };
    assert_eq!(refusal(request(0, vec![5], biased)), unknown);
    // More than the pool, though not more than a sequence may have.
    let small = EngineLimits { pages: 20, ..limits() };
    let served = serve(engine(small), options(), [submit(request(0, prompt(1, 81), greedy(1)))]);
    let too_long = Refusal::PromptTooLong { prompt_len: 81, prompt_len_max: 80 };
    assert_eq!(*served.finish(0), FinishReason::Refused(too_long));
}

#[test]
fn a_sequence_ends_where_memory_or_context_does() {
    for (pages, seq_len_max, tokens_max) in [(20, 512, 81), (256, 100, 100)] {
        let limits = EngineLimits { pages, seq_len_max, ..limits() };
        for prompt_len in [1, 60, tokens_max - 1] {
            let new = request(0, prompt(1, prompt_len), greedy(100_000));
            let served = serve(engine(limits), options(), [submit(new)]);
            assert_eq!(served.tokens(0).len(), tokens_max - prompt_len);
            assert_eq!(*served.finish(0), FinishReason::Length);
        }
    }
}

#[test]
fn requests_end_at_eos_and_stop_ids() {
    let options = || SchedulerOptions { eos_ids: vec![7, 8], ..options() };
    let engine = || {
        let next_token = NextToken::script(vec![5, 6, 7, 9, 8], 3);
        FakeEngine::new(FakeOptions { limits: limits(), next_token, ..FakeOptions::default() })
    };
    let run = |params: SamplingParams| {
        let served = serve(engine(), options(), [submit(request(0, vec![1, 2], params))]);
        (served.tokens(0).to_vec(), served.finish(0).clone())
    };
    let stop = |token| FinishReason::Stop { matched: Some(token) };
    assert_eq!(run(greedy(10)), (vec![5, 6, 7], stop(7)));
    let params = SamplingParams { stop_token_ids: vec![6], ..greedy(10) };
    assert_eq!(run(params), (vec![5, 6], stop(6)));
    let params = SamplingParams { ignore_eos: true, ..greedy(6) };
    assert_eq!(run(params), (vec![5, 6, 7, 9, 8, 3], FinishReason::Length));
    let params = SamplingParams { ignore_eos: true, stop_token_ids: vec![8], ..greedy(9) };
    assert_eq!(run(params), (vec![5, 6, 7, 9, 8], stop(8)));
    assert_eq!(run(greedy(0)), (vec![], FinishReason::Length));
    assert_eq!(run(greedy(3)), (vec![5, 6, 7], stop(7)));
}

#[test]
fn an_engine_that_fails_ends_every_request() {
    for overlap in [true, false] {
        let options = || SchedulerOptions { overlap, ..options() };
        let whole = serve(engine(tight()), options(), requests().into_iter().map(submit));
        for fail_at in 0..whole.stats.steps.load(Relaxed) {
            let fake =
                FakeOptions { limits: tight(), fail_at: Some(fail_at), ..Default::default() };
            let commands = requests().into_iter().map(submit);
            let served = serve(FakeEngine::new(fake), options(), commands);
            let error = served.result.as_ref().unwrap_err();
            assert_eq!(served.outcomes.len(), 8);
            let ended = |reason: &FinishReason| *reason == FinishReason::Error(error.0.clone());
            assert!((0..8).any(|id| ended(served.finish(id))));
            for id in 0..8 {
                let reason = served.finish(id);
                assert!(ended(reason) || *reason == FinishReason::Length, "{reason:?}");
            }
        }
    }
}

#[test]
fn a_drain_finishes_what_is_there_and_refuses_what_comes() {
    let late = || submit(request(8, prompt(1, 5), greedy(5)));
    let commands = requests().into_iter().map(submit).chain([Command::Drain, late()]);
    let served = serve(engine(tight()), options(), commands);
    assert_eq!(served.all_tokens()[..8], undisturbed().all_tokens());
    assert_eq!(*served.finish(8), FinishReason::Refused(Refusal::ShuttingDown));
}

#[test]
fn a_full_queue_refuses() {
    let many = (0..20).map(|id| submit(request(id, prompt(1, 5), greedy(5))));
    let options = SchedulerOptions { waiting_max: 6, ..options() };
    let served = serve(engine(tight()), options, many);
    let refused = FinishReason::Refused(Refusal::QueueFull { waiting: 11 });
    for id in 0..20 {
        // Five slots are free, and six may wait.
        assert_eq!(*served.finish(id) == refused, id >= 11, "{id}: {:?}", served.finish(id));
    }
}

#[test]
fn a_flush_empties_the_cache() {
    let (reply, flushed) = sync_channel(1);
    let (reply_again, flushed_again) = sync_channel(1);
    let (sender, receiver) = channel();
    let mut sender = Some(sender);
    sender.as_ref().unwrap().send(submit(request(0, prompt(1, 40), greedy(3)))).unwrap();
    let mut flush = Some((reply, reply_again));
    let on_wait = move |plan: &StepPlan| {
        // The request's last step: it holds its pages until that is committed.
        if plan.step == 2 {
            let (sender, (reply, again)) = (sender.take().unwrap(), flush.take().unwrap());
            sender.send(submit(request(1, prompt(1, 40), greedy(1)))).unwrap();
            sender.send(Command::FlushCache(reply)).unwrap();
            sender.send(submit(request(2, prompt(1, 40), greedy(1)))).unwrap();
            sender.send(Command::FlushCache(again)).unwrap();
        }
    };
    let engine = Hooked { engine: engine(limits()), on_launch: |_: &StepPlan| {}, on_wait };
    let served = serve_from(receiver, engine, SchedulerOptions { overlap: false, ..options() });
    // Of 42 tokens with K and V, whole pages of 4.
    assert_eq!(flushed.recv(), Ok(10));
    assert_eq!(flushed_again.recv(), Ok(0));
    assert_eq!(served.outcomes[&1].cached_tokens, Some(0));
}
