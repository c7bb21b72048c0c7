//! What changes logits: grammars, penalties, biases, `min_tokens`; and what is reported of them.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use common::{Hooked, Served, engine, greedy, limits, options, prompt, request, serve, submit};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::message::{Constraint, FinishReason, NewRequest};
use minisgl_scheduler::plan::{LogitEdit, StepPlan};
use minisgl_scheduler::sampling::SamplingParams;

/// Allows what the token before plus one divides, and ends after `left` tokens.
struct Ladder {
    last: u32,
    left: u32,
    trouble: Option<(u32, Trouble)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    MaskFails,
    MaskPanics,
    AdvanceFails,
    AdvancePanics,
}

impl Ladder {
    fn strikes(&self, trouble: Trouble) -> bool {
        self.trouble == Some((self.left, trouble))
    }
}

impl Constraint for Ladder {
    fn mask(&mut self) -> Result<Option<Arc<Vec<u32>>>, String> {
        assert!(!self.strikes(Trouble::MaskPanics));
        if self.strikes(Trouble::MaskFails) {
            return Err("no mask".into());
        }
        let mut mask = vec![0_u32; 1000_usize.div_ceil(32)];
        for token in (0..1000).filter(|token| token % (self.last % 50 + 2) == 0) {
            mask[token as usize / 32] |= 1 << (token % 32);
        }
        Ok(Some(Arc::new(mask)))
    }

    fn advance(&mut self, token: u32) -> Result<bool, String> {
        assert!(!self.strikes(Trouble::AdvancePanics));
        if self.strikes(Trouble::AdvanceFails) {
            return Err("no way".into());
        }
        assert_eq!(token % (self.last % 50 + 2), 0, "{token} after {}", self.last);
        self.last = token;
        self.left -= 1;
        Ok(self.left > 0)
    }
}

fn constrained(id: u64, left: u32, trouble: Option<(u32, Trouble)>) -> NewRequest {
    let constraint: Box<dyn Constraint> = Box::new(Ladder { last: 7, left, trouble });
    NewRequest {
        constraint: Some(constraint),
        ..request(id, prompt(id as u32, 10 + id as usize), greedy(60))
    }
}

fn both_ways(limits: EngineLimits, requests: impl Fn() -> Vec<NewRequest>) -> Served {
    let run = |overlap| {
        let options = SchedulerOptions { overlap, ..options() };
        serve(engine(limits), options, requests().into_iter().map(submit))
    };
    let (served, plain) = (run(true), run(false));
    assert_eq!(served.all_tokens(), plain.all_tokens());
    served
}

#[test]
fn tokens_follow_their_grammar_and_end_with_it() {
    let mixed = || {
        let plain = (10..20).map(|id| request(id, prompt(id as u32, 20), greedy(30)));
        (0..10).map(|id| constrained(id, 5 + id as u32, None)).chain(plain).collect()
    };
    let roomy = both_ways(limits(), mixed);
    // The same with preemptions: a grammar keeps its state while its request waits.
    let tight = both_ways(EngineLimits { pages: 40, ..limits() }, mixed);
    assert!(tight.stats.preemptions.load(Relaxed) > 0);
    assert_eq!(roomy.all_tokens(), tight.all_tokens());
    for id in 0..10 {
        let tokens = roomy.tokens(id);
        assert_eq!(tokens.len(), 5 + id as usize);
        let last = tokens.last().copied();
        assert_eq!(*roomy.finish(id), FinishReason::Stop { matched: last });
    }
}

/// Allows everything, and notes behind how many launches and waits it is asked.
#[derive(Clone, Default)]
struct Witness {
    launched: Arc<AtomicUsize>,
    waited: Arc<AtomicUsize>,
    asked: Arc<Mutex<Vec<(usize, usize)>>>,
}

impl Constraint for Witness {
    fn mask(&mut self) -> Result<Option<Arc<Vec<u32>>>, String> {
        self.asked.lock().unwrap().push((self.launched.load(Relaxed), self.waited.load(Relaxed)));
        Ok(None)
    }

    fn advance(&mut self, _: u32) -> Result<bool, String> {
        Ok(true)
    }
}

#[test]
fn masks_are_computed_while_their_step_runs() {
    for overlap in [true, false] {
        let witness = Witness::default();
        let (launched, waited) = (Arc::clone(&witness.launched), Arc::clone(&witness.waited));
        let count = |counter: Arc<AtomicUsize>| {
            move |_: &StepPlan| {
                counter.fetch_add(1, Relaxed);
            }
        };
        let engine =
            Hooked { engine: engine(limits()), on_launch: count(launched), on_wait: count(waited) };
        let bound = NewRequest {
            constraint: Some(Box::new(witness.clone())),
            ..request(0, prompt(0, 10), greedy(20))
        };
        // Beside one that has no grammar.
        let commands = [submit(bound), submit(request(1, prompt(1, 10), greedy(20)))];
        serve(engine, SchedulerOptions { overlap, ..options() }, commands);
        let asked = witness.asked.lock().unwrap();
        let between: Vec<_> = (0..20).map(|step| (step + 1, step)).collect();
        assert_eq!(*asked, between, "the step is launched, and nobody has waited for it");
    }
}

#[test]
fn steps_without_a_grammar_have_nothing_to_wait_for() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&seen);
    let on_launch = move |plan: &StepPlan| note.lock().unwrap().push(plan.adjustments.is_some());
    // On an engine with one slot, the one with a grammar comes behind the other one's end.
    let one_slot = engine(EngineLimits { slots: 1, ..limits() });
    let engine = Hooked { engine: one_slot, on_launch, on_wait: |_: &StepPlan| {} };
    let free = submit(request(0, prompt(0, 10), greedy(12)));
    serve(engine, options(), [free, submit(constrained(1, 5, None))]);
    let seen = seen.lock().unwrap();
    let first = seen.iter().position(|adjusted| *adjusted).unwrap();
    assert!(first >= 12 && seen[first..].iter().all(|adjusted| *adjusted), "{seen:?}");
}

#[test]
fn a_broken_grammar_ends_its_request_alone() {
    use Trouble::{AdvanceFails, AdvancePanics, MaskFails, MaskPanics};
    for trouble in [MaskFails, MaskPanics, AdvanceFails, AdvancePanics] {
        for left in [8, 7, 3] {
            let served = both_ways(limits(), || {
                let broken = constrained(0, 8, Some((left, trouble)));
                vec![broken, constrained(1, 12, None), request(2, prompt(2, 9), greedy(12))]
            });
            let expected = match trouble {
                MaskFails => FinishReason::ConstraintFailed("no mask".into()),
                AdvanceFails => FinishReason::ConstraintFailed("no way".into()),
                MaskPanics | AdvancePanics => FinishReason::Error("the constraint panicked".into()),
            };
            assert_eq!(*served.finish(0), expected);
            // The token that a grammar cannot take is delivered with the error.
            let advances = matches!(trouble, AdvanceFails | AdvancePanics);
            assert_eq!(served.tokens(0).len(), (8 - left) as usize + usize::from(advances));
            assert_eq!([served.tokens(1).len(), served.tokens(2).len()], [12, 12]);
        }
    }
}

/// For each step of a lone request: the edits, by token.
fn edits_of(new: NewRequest, overlap: bool) -> (Vec<BTreeMap<u32, LogitEdit>>, Vec<u32>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&seen);
    let on_wait = move |plan: &StepPlan| {
        let cell = plan.adjustments.as_ref().expect("the request asks for it");
        let edits = cell.wait()[0].edits.clone();
        let by_token: BTreeMap<_, _> = edits.iter().map(|edit| (edit.token, *edit)).collect();
        assert_eq!(by_token.len(), edits.len(), "a token is edited once");
        note.lock().unwrap().push(by_token);
    };
    let engine = Hooked { engine: engine(limits()), on_launch: |_: &StepPlan| {}, on_wait };
    let served = serve(engine, SchedulerOptions { overlap, ..options() }, [submit(new)]);
    let edits = std::mem::take(&mut *seen.lock().unwrap());
    (edits, served.tokens(0).to_vec())
}

#[test]
fn penalties_count_every_token_before() {
    for overlap in [true, false] {
        let params = SamplingParams {
            presence_penalty: 0.5,
            frequency_penalty: 6.0,
            repetition_penalty: 2.0,
            logit_bias: vec![(3, 25.0), (500, -5.0)],
            ..greedy(12)
        };
        let (steps, tokens) = edits_of(request(0, vec![5, 9, 5], params), overlap);
        assert_eq!(steps.len(), 12);
        for (generated, edits) in steps.iter().enumerate() {
            let said = &tokens[..generated];
            let mut expected = BTreeMap::new();
            for token in [3, 5, 9, 500].iter().chain(said) {
                let count = said.iter().filter(|other| *other == token).count() as f32;
                let scale = if count > 0.0 || [5, 9].contains(token) { 2.0 } else { 1.0 };
                let bias = if *token == 3 { 25.0 } else { 0.0 };
                let bias = bias - if *token == 500 { 5.0 } else { 0.0 };
                let bias = bias - 6.0 * count - if count > 0.0 { 0.5 } else { 0.0 };
                expected.insert(*token, LogitEdit { token: *token, scale, bias });
            }
            assert_eq!(*edits, expected, "after {generated} tokens");
        }
        // Pushed by its bias, token 3 wins until its own count is against it.
        assert_eq!(tokens[..3], [3, 3, 3]);
        assert!(tokens.iter().filter(|token| **token == 3).count() <= 5, "{tokens:?}");
    }
}

#[test]
fn nothing_ends_before_min_tokens() {
    let eos_ids: Vec<u32> = (0..700).collect();
    let run = |min_tokens| {
        let params = SamplingParams { min_tokens, ..greedy(40) };
        let many = (0..8).map(|id| submit(request(id, prompt(id as u32, 20), params.clone())));
        serve(engine(limits()), SchedulerOptions { eos_ids: eos_ids.clone(), ..options() }, many)
    };
    let (free, held) = (run(0), run(10));
    assert!((0..8).any(|id| free.tokens(id).len() < 5), "EOS is meant to be likely");
    for id in 0..8 {
        let tokens = held.tokens(id);
        assert!(tokens.len() > 10 && tokens[..10].iter().all(|token| *token >= 700));
        assert_eq!(*held.finish(id), FinishReason::Stop { matched: tokens.last().copied() });
    }
}

#[test]
fn prompt_logprobs_do_not_depend_on_chunks_cache_or_preemption() {
    let scored = |id: u64, max_tokens| NewRequest {
        prompt_logprobs: Some(2),
        ..request(id, prompt(id as u32 % 2, 45 + id as usize), greedy(max_tokens))
    };
    let run = |limits| {
        let plain = |id: u64| request(id, prompt(id as u32 % 2, 30), greedy(90));
        both_ways(limits, || (0..4).map(plain).chain((4..9).map(|id| scored(id, 9))).collect())
    };
    let whole = run(limits());
    let cut = run(EngineLimits { step_tokens_max: 16, ..limits() });
    let tight = run(EngineLimits { pages: 48, step_tokens_max: 16, ..limits() });
    assert!(tight.stats.preemptions.load(Relaxed) > 0);
    for id in 4..9 {
        let logprobs = whole.outcomes[&id].prompt_logprobs.as_ref().unwrap();
        assert_eq!(logprobs.len(), 45 + id as usize);
        assert!(logprobs[0].is_none());
        assert!(logprobs[1..].iter().all(|one| one.as_ref().is_some_and(|one| one.top.len() == 2)));
        for other in [&cut, &tight] {
            assert_eq!(other.outcomes[&id].prompt_logprobs.as_ref().unwrap(), logprobs);
            assert_eq!(other.tokens(id), whole.tokens(id));
            assert_eq!(other.outcomes[&id].cached_tokens, Some(0));
        }
    }
    // The prompt alone, and nothing generated.
    let alone = both_ways(limits(), || vec![scored(4, 0)]);
    assert_eq!(alone.tokens(4).len(), 0);
    assert_eq!(*alone.finish(4), FinishReason::Length);
    assert_eq!(alone.outcomes[&4].prompt_logprobs, whole.outcomes[&4].prompt_logprobs);
}

#[test]
fn logprobs_come_with_the_tokens_of_those_who_ask() {
    let asks = SamplingParams { logprobs: Some(3), ..greedy(10) };
    let two = [request(0, prompt(1, 20), asks), request(1, prompt(1, 20), greedy(10))];
    let served = serve(engine(limits()), options(), two.map(submit));
    let tops = |id: u64| {
        let logprobs = served.outcomes[&id].logprobs.iter();
        logprobs.map(|one| one.as_ref().map(|one| one.top.len())).collect::<Vec<_>>()
    };
    assert_eq!(tops(0), [Some(3); 10]);
    assert_eq!(tops(1), [None; 10]);
}
