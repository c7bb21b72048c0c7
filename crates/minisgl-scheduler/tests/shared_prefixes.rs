//! What plans say of prefixes that decodes share. The fake engine checks every one of them, here and in
//! all other tests: the rows have the same pages, and no row of the step writes to these.

mod common;

use std::sync::{Arc, Mutex};

use common::{Hooked, Random, engine, greedy, limits, options, prompt, request, serve, submit};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::cache::CacheType;
use minisgl_scheduler::engine::{Engine, EngineLimits};
use minisgl_scheduler::fake::{FakeEngine, FakeOptions};
use minisgl_scheduler::message::{Command, NewRequest, RequestId};
use minisgl_scheduler::plan::{SharedPrefix, StepPlan};

type Noted = Arc<Mutex<Vec<(usize, Vec<SharedPrefix>)>>>;

/// Notes for each step how many rows decode, and what they share.
fn noting(engine: FakeEngine) -> (Noted, impl Engine) {
    let noted = Noted::default();
    let to = Arc::clone(&noted);
    let on_launch = move |plan: &StepPlan| {
        let decodes = plan.rows.iter().take_while(|row| row.extend_len == 1).count();
        to.lock().unwrap().push((decodes, plan.shared_prefixes.clone()));
    };
    (noted, Hooked { engine, on_launch, on_wait: |_: &StepPlan| {} })
}

/// A question behind `system` tokens that all have, and `document` that the requests of a kind have.
fn question(id: u64, system: usize, kind: u32, document: usize) -> NewRequest {
    let mut tokens = prompt(1, system);
    tokens.extend(prompt(50 + kind, document));
    tokens.extend(prompt(100 + id as u32, 5));
    request(id, tokens, greedy(20))
}

#[test]
fn all_rows_with_the_same_beginning_are_one_group() {
    let (noted, engine) = noting(engine(limits()));
    let questions = (0..6).map(|id| submit(question(id, 102, id as u32, 0)));
    serve(engine, options(), questions.collect::<Vec<Command>>()).result.unwrap();
    let noted = noted.lock().unwrap();
    let full: Vec<_> = noted.iter().filter(|(decodes, _)| *decodes == 6).collect();
    assert!(full.len() > 10);
    for (_, prefixes) in full {
        // Pages of 4: 25 whole ones.
        let expected = SharedPrefix { rows: (0..6).collect(), pages: 25 };
        assert_eq!(*prefixes, [expected]);
    }
}

#[test]
fn rows_are_taken_together_where_that_saves_most() {
    // Nine rows in lots of three. 20 pages of all, then 20 of each three: 6 × 40 pages are saved, and
    // not 6 × 20. Or then 4 of each two: 6 × 20, and not 4 × 24.
    for (document, of, groups) in [(80, 3, 3), (16, 2, 1)] {
        let (noted, engine) = noting(engine(limits()));
        let questions = (0..9).map(|id| submit(question(id, 80, id as u32 / of, document)));
        let options = SchedulerOptions { step_tokens_max: Some(128), ..options() };
        serve(engine, options, questions.collect::<Vec<Command>>()).result.unwrap();
        let noted = noted.lock().unwrap();
        let full: Vec<_> = noted.iter().filter(|(decodes, _)| *decodes == 9).collect();
        assert!(!full.is_empty());
        for (_, prefixes) in full {
            assert_eq!(prefixes.len(), groups, "{prefixes:?}");
            let rows: usize = prefixes.iter().map(|prefix| prefix.rows.len()).sum();
            let pages = if groups == 3 { 40 } else { 20 };
            assert!(rows == 9 && prefixes.iter().all(|prefix| prefix.pages == pages));
        }
    }
}

#[test]
fn nothing_is_said_where_nobody_asks_or_nothing_is_kept() {
    let questions = || (0..6).map(|id| submit(question(id, 102, id as u32, 0)));
    let plain = FakeEngine::new(FakeOptions { limits: limits(), ..FakeOptions::default() });
    let naive = SchedulerOptions { cache: CacheType::Naive, ..options() };
    for (engine, options) in [(plain, options()), (engine(limits()), naive)] {
        let (noted, engine) = noting(engine);
        serve(engine, options, questions().collect::<Vec<Command>>()).result.unwrap();
        assert!(noted.lock().unwrap().iter().all(|(_, prefixes)| prefixes.is_empty()));
    }
}

/// Requests that share system prompts and documents, with aborts between them, under any page size, in
/// pools of any size: the fake engine sees no wrong group, and tokens are as without groups.
#[test]
fn no_traffic_makes_a_wrong_group() {
    let mut random = Random(7);
    let mut groups = 0;
    for round in 0..60 {
        let page_size = [1, 3, 16, 4][round % 4];
        let tokens = [400, 900, 4000][random.below(3)];
        let limits = EngineLimits { page_size, pages: tokens / page_size, ..limits() };
        let mut commands = Vec::new();
        for id in 0..40 {
            let mut new = question(
                id,
                [0, 70, 130][random.below(3)],
                random.below(3) as u32,
                random.below(90),
            );
            new.params = greedy(1 + random.below(60) as u32);
            commands.push(submit(new));
            if random.below(4) == 0 {
                commands.push(Command::Abort(RequestId(random.below(id as usize + 1) as u64)));
            }
            if random.below(10) == 0 {
                let (reply, _) = std::sync::mpsc::sync_channel(1);
                commands.push(Command::FlushCache(reply));
            }
        }
        let options = SchedulerOptions { overlap: random.below(2) == 0, ..options() };
        let (noted, engine) = noting(engine(limits));
        serve(engine, options, commands).result.unwrap();
        groups += noted.lock().unwrap().iter().map(|(_, prefixes)| prefixes.len()).sum::<usize>();
    }
    assert!(groups > 1000, "{groups} groups are too few to say anything");
}
