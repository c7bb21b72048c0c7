//! The same tokens, however the steps were cut and whatever else was running.

mod common;

use std::sync::atomic::Ordering::Relaxed;

use common::{Served, engine, greedy, limits, options, prompt, request, serve, submit};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::cache::CacheType;
use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::message::{Command, NewRequest};
use minisgl_scheduler::sampling::SamplingParams;

/// Requests that share prefixes, differ in length, and sample or do not.
fn crowd() -> Vec<NewRequest> {
    let one = |id: u64| {
        let mut tokens = prompt(id as u32 % 4, 37 + 5 * (id as usize % 3));
        tokens.extend(prompt(100 + id as u32, 3 + id as usize * 7 % 90));
        let params = match id % 3 {
            0 => greedy(40),
            _ => SamplingParams { seed: 1000 + id, ..SamplingParams::default() },
        };
        let max_tokens = 10 + (id as u32 * 13) % 50;
        request(id, tokens, SamplingParams { max_tokens, ..params })
    };
    (0..33).map(one).collect()
}

fn run(limits: EngineLimits, options: SchedulerOptions) -> Served {
    let served = serve(engine(limits), options, crowd().into_iter().map(submit));
    served.result.as_ref().unwrap();
    served
}

/// Each request alone in an engine of its own.
fn expected() -> Vec<Vec<u32>> {
    let alone = |new: NewRequest| {
        let options = SchedulerOptions { overlap: false, cache: CacheType::Naive, ..options() };
        let id = new.id.0;
        serve(engine(limits()), options, [submit(new)]).tokens(id).to_vec()
    };
    crowd().into_iter().map(alone).collect()
}

#[test]
fn a_crowd_gets_what_each_gets_alone() {
    let expected = expected();
    for overlap in [true, false] {
        for cache in [CacheType::Radix, CacheType::Naive] {
            for page_size in [1, 16, 64] {
                for step_tokens_max in [32, 100_000] {
                    let pages = 8192 / page_size;
                    let limits = EngineLimits { page_size, pages, step_tokens_max, ..limits() };
                    let served = run(limits, SchedulerOptions { overlap, cache, ..options() });
                    let case = format!("{overlap} {cache:?} {page_size} {step_tokens_max}");
                    assert_eq!(served.all_tokens(), expected, "{case}");
                    assert_eq!(served.stats.preemptions.load(Relaxed), 0, "{case}");
                    let cached = served.stats.cached_tokens.load(Relaxed);
                    assert_eq!(cached > 0, cache == CacheType::Radix && page_size < 64, "{case}");
                }
            }
        }
    }
}

#[test]
fn a_preempted_crowd_gets_what_each_gets_alone() {
    let expected = expected();
    for overlap in [true, false] {
        for cache in [CacheType::Radix, CacheType::Naive] {
            for (page_size, pages) in [(1, 210), (4, 56), (16, 16)] {
                let limits = EngineLimits { page_size, pages, ..limits() };
                let served = run(limits, SchedulerOptions { overlap, cache, ..options() });
                let case = format!("{overlap} {cache:?} {page_size}");
                assert_eq!(served.all_tokens(), expected, "{case}");
                assert!(served.stats.preemptions.load(Relaxed) > 0, "{case}");
            }
        }
    }
}

#[test]
fn a_second_turn_finds_the_first_one_with_its_answer() {
    let first = prompt(1, 50);
    let served =
        serve(engine(limits()), options(), [submit(request(0, first.clone(), greedy(30)))]);
    let mut second = first.clone();
    second.extend(served.tokens(0));
    second.extend(prompt(2, 20));
    let turns = [request(0, first, greedy(30)), request(1, second.clone(), greedy(30))];
    let mut commands = turns.into_iter().map(submit);
    let options = SchedulerOptions { waiting_max: 2, ..options() };
    // One slot: the second runs when the first has ended.
    let one = EngineLimits { slots: 1, ..limits() };
    let both = serve(engine(one), options, [commands.next().unwrap(), commands.next().unwrap()]);
    assert_eq!(both.tokens(0), served.tokens(0));
    // Of 79 tokens with K and V, whole pages of 4.
    assert_eq!(both.outcomes[&1].cached_tokens, Some(76));
    let alone =
        serve(engine(limits()), common::options(), [submit(request(1, second, greedy(30)))]);
    assert_eq!(both.tokens(1), alone.tokens(1));
}

#[test]
fn a_prefix_is_shared_as_soon_as_its_chunk_is_planned() {
    let many = |id| submit(request(id, prompt(3, 100), greedy(8)));
    let served = serve(engine(limits()), options(), (0..8).map(many).collect::<Vec<Command>>());
    let cached: Vec<_> = served.outcomes.values().map(|outcome| outcome.cached_tokens).collect();
    assert_eq!(cached[0], Some(0));
    assert!(cached[1..].iter().all(|cached| *cached == Some(96)), "{cached:?}");
}
