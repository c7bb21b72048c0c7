//! Nobody waits too long for anybody.

mod common;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;

use common::{Hooked, engine, greedy, limits, options, prompt, request, serve, serve_from, submit};
use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::message::Command;
use minisgl_scheduler::plan::{RowInput, StepPlan};
use minisgl_scheduler::{SchedulePolicy, SchedulerOptions};

/// Long prompts keep coming while eight requests generate: each of these has a row in every step.
#[test]
fn running_requests_get_a_token_in_every_step_whatever_arrives() {
    for overlap in [true, false] {
        let limits = EngineLimits { pages: 4096, ..limits() };
        let (sender, receiver) = channel();
        for id in 0..8 {
            sender.send(submit(request(id, prompt(id as u32, 8), greedy(200)))).unwrap();
        }
        let mut arrived = 0;
        let on_launch = move |plan: &StepPlan| {
            assert!(plan.tokens() <= 128);
            if (1..150).contains(&plan.step) {
                let decodes = plan.rows.iter().take_while(|row| row.input == RowInput::Sampled);
                let running: Vec<u32> = decodes.map(|row| row.slot.0).collect();
                assert!((0..8).all(|slot| running.contains(&slot)), "{:?}", plan.step);
            }
            if plan.step % 10 == 3 && arrived < 12 {
                let long = request(100 + arrived, prompt(50 + arrived as u32, 500), greedy(5));
                sender.send(submit(long)).unwrap();
                arrived += 1;
            }
            if arrived == 12 {
                sender.send(Command::Drain).unwrap();
            }
        };
        let engine = Hooked { engine: engine(limits), on_launch, on_wait: |_: &StepPlan| {} };
        let served = serve_from(receiver, engine, SchedulerOptions { overlap, ..options() });
        assert_eq!(served.outcomes.len(), 20);
        assert_eq!(served.stats.preemptions.load(Relaxed), 0);
    }
}

/// Even where memory is short, a request that decodes is either in every step or preempted: it
/// never has to sit a step out.
#[test]
fn nobody_stalls_while_others_are_preempted() {
    let mut stalls = 0;
    let mut steps = 0;
    let mut next_len = HashMap::new();
    let mut last_step = HashMap::new();
    let limits = EngineLimits { page_size: 1, pages: 400, ..limits() };
    let on_launch = |plan: &StepPlan| {
        steps += 1;
        for row in &plan.rows {
            let continues = next_len.insert(row.slot, row.device_len()) == Some(row.cached_len);
            let before = last_step.insert(row.slot, plan.step);
            if row.input == RowInput::Sampled && continues && before != Some(plan.step - 1) {
                stalls += 1;
            }
        }
    };
    let engine = Hooked { engine: engine(limits), on_launch, on_wait: |_: &StepPlan| {} };
    let many = (0..40).map(|id| submit(request(id, prompt(id as u32, 20), greedy(60))));
    let served = serve(engine, options(), many);
    assert!(served.stats.preemptions.load(Relaxed) > 0);
    assert_eq!(stalls, 0, "in {steps} steps");
}

/// A request that does not fit yet lets some small ones pass, and then has its turn.
#[test]
fn a_large_request_neither_starves_nor_is_starved() {
    for overlap in [true, false] {
        let limits = EngineLimits { pages: 100, ..limits() };
        // The first takes 60 pages, and the large one needs 80.
        let first = request(0, prompt(0, 200), greedy(40));
        let large = request(1, prompt(1, 300), greedy(20));
        let small = (2..300).map(|id| request(id, prompt(id as u32, 12), greedy(20)));
        let commands = [first, large].into_iter().chain(small).map(submit);
        let served = serve(engine(limits), SchedulerOptions { overlap, ..options() }, commands);
        let place = |id| served.first_tokens.iter().position(|other| *other == id).unwrap();
        assert_eq!(place(0), 0);
        let passed = place(1) - 1;
        assert!((4..=16).contains(&passed), "{passed} small ones passed the large one");
        assert_eq!(served.first_tokens.len(), 300);
    }
}

/// Requests of the same size begin in the order in which they came.
#[test]
fn equals_are_served_in_order() {
    let many = (0..200).map(|id| submit(request(id, prompt(id as u32, 40), greedy(10))));
    let served = serve(engine(limits()), options(), many);
    assert!(served.first_tokens.is_sorted(), "{:?}", served.first_tokens);
}

/// With the longest outputs first, those begin in order of length that wait, and equals as they came.
#[test]
fn the_longest_outputs_can_go_first() {
    let max_tokens = |id: u64| 5 + id as u32 * 7 % 20;
    let many =
        (0..200).map(|id| submit(request(id, prompt(id as u32, 40), greedy(max_tokens(id)))));
    let options = SchedulerOptions { policy: SchedulePolicy::Lof, ..options() };
    let served = serve(engine(limits()), options, many);
    let began = served.first_tokens.iter().map(|id| (Reverse(max_tokens(*id)), *id));
    assert!(began.is_sorted(), "{:?}", served.first_tokens);
}

/// Where many requests decode, prompts get what these leave of a smaller step, or a page; where few do, all
/// there is.
#[test]
fn prompts_ride_along_with_many_decodes() {
    for mixed in [0, 1, 24, 1000] {
        let limits = EngineLimits { pages: 4096, ..limits() };
        let (mut largest_mixed, mut largest, mut pages) = (0, 0, 0);
        let on_launch = |plan: &StepPlan| {
            let decodes = plan.rows.iter().filter(|row| row.input == RowInput::Sampled).count();
            let prompts = plan.tokens() - decodes;
            if decodes == 0 || 3 * decodes < mixed {
                largest = largest.max(plan.tokens());
            } else if decodes >= mixed {
                assert!(prompts <= 4, "{prompts} tokens beside {decodes} decodes");
                pages += prompts / 4;
            } else if prompts > 0 {
                largest_mixed = largest_mixed.max(plan.tokens());
            }
        };
        let engine = Hooked { engine: engine(limits), on_launch, on_wait: |_: &StepPlan| {} };
        let many = (0..60).map(|id| submit(request(id, prompt(id as u32, 50), greedy(40))));
        let options = SchedulerOptions { mixed_tokens_max: Some(mixed), ..options() };
        let served = serve(engine, options, many);
        assert_eq!(served.first_tokens.len(), 60);
        assert_eq!(largest, 128);
        assert_eq!(largest_mixed, if mixed == 24 { 24 } else { 0 });
        assert_eq!(pages > 0, mixed < 24, "pages beside so many decodes that nothing is left");
    }
}

/// Who was preempted goes first, whatever others may generate.
#[test]
fn the_longest_outputs_go_behind_those_that_were_preempted() {
    let limits = EngineLimits { page_size: 1, pages: 400, ..limits() };
    let many = |options: SchedulerOptions| {
        let requests = (0..40).map(|id| request(id, prompt(id as u32, 20), greedy(40 + id as u32)));
        serve(engine(limits), options, requests.map(submit))
    };
    let lof = many(SchedulerOptions { policy: SchedulePolicy::Lof, ..options() });
    assert!(lof.stats.preemptions.load(Relaxed) > 0);
    assert_eq!(lof.all_tokens(), many(options()).all_tokens());
}

/// More requests than tokens in a step, or than slots: all get on.
#[test]
fn a_small_budget_is_shared_by_all() {
    let limits = EngineLimits { step_tokens_max: 5, ..limits() };
    let many = |max: u64| (0..max).map(|id| submit(request(id, prompt(id as u32, 30), greedy(10))));
    let served = serve(engine(limits), options(), many(12));
    let roomy = serve(engine(common::limits()), options(), many(12));
    assert_eq!(served.all_tokens(), roomy.all_tokens());
}

/// The pool is too small by far, and yet every request ends with the right number of tokens.
#[test]
fn an_exhausted_pool_serves_everybody() {
    for (pages, slots) in [(30, 64), (13, 64), (64, 2)] {
        let limits = EngineLimits { pages, slots, ..limits() };
        let many = (0..100).map(|id| {
            let len = 1 + (id as usize * 11) % 30;
            submit(request(id, prompt(id as u32, len), greedy(1 + (id as u32 * 7) % 20)))
        });
        let served = serve(engine(limits), options(), many);
        for id in 0..100 {
            assert_eq!(served.tokens(id).len(), 1 + (id as usize * 7) % 20);
        }
    }
}
