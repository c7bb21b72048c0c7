//! Runs a scheduler on a fake engine to its end, and collects what it says of each request.

#![expect(dead_code, reason = "each test file uses a part of this")]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use minisgl_scheduler::engine::{Engine, EngineError, EngineLimits};
use minisgl_scheduler::fake::{FakeEngine, FakeOptions};
use minisgl_scheduler::message::{Command, FinishReason, NewRequest, Output, RequestId};
use minisgl_scheduler::plan::{StepPlan, StepResult, TokenLogprobs};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::{Scheduler, SchedulerOptions, SchedulerStats};

/// All that was said of one request.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<Option<TokenLogprobs>>,
    pub finish: Option<FinishReason>,
    pub cached_tokens: Option<u32>,
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

/// What a scheduler left behind.
pub struct Served {
    pub outcomes: BTreeMap<u64, Outcome>,
    /// Whose first token came when.
    pub first_tokens: Vec<u64>,
    pub stats: Arc<SchedulerStats>,
    pub result: Result<(), EngineError>,
}

impl Served {
    pub fn tokens(&self, id: u64) -> &[u32] {
        &self.outcomes[&id].tokens
    }

    pub fn finish(&self, id: u64) -> &FinishReason {
        self.outcomes[&id].finish.as_ref().unwrap_or_else(|| panic!("request {id} never ended"))
    }

    pub fn all_tokens(&self) -> Vec<Vec<u32>> {
        self.outcomes.values().map(|outcome| outcome.tokens.clone()).collect()
    }
}

/// Options with the integrity check on, whatever the build.
pub fn options() -> SchedulerOptions {
    SchedulerOptions { check_integrity: true, ..SchedulerOptions::default() }
}

pub fn limits() -> EngineLimits {
    EngineLimits {
        page_size: 4,
        pages: 256,
        slots: 64,
        seq_len_max: 512,
        step_tokens_max: 128,
        vocab_size: 1000,
    }
}

/// An engine that checks its plans, and what they say of shared prefixes.
pub fn engine(limits: EngineLimits) -> FakeEngine {
    FakeEngine::new(FakeOptions { limits, prefix_rows_max: 3, ..FakeOptions::default() })
}

pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() }
}

/// `len` tokens that depend on `seed`.
pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|at| (seed.wrapping_mul(7919) + at * 31 + at * at * seed) % 1000).collect()
}

pub fn request(id: u64, prompt: Vec<u32>, params: SamplingParams) -> NewRequest {
    NewRequest { id: RequestId(id), prompt, params, prompt_logprobs: None, constraint: None }
}

pub fn submit(request: NewRequest) -> Command {
    Command::Submit(Box::new(request))
}

/// Runs all commands, then ends.
pub fn serve(
    engine: impl Engine,
    options: SchedulerOptions,
    commands: impl IntoIterator<Item = Command>,
) -> Served {
    let (sender, receiver) = channel();
    for command in commands {
        sender.send(command).unwrap();
    }
    drop(sender);
    serve_from(receiver, engine, options)
}

/// Runs what comes until all senders are gone.
pub fn serve_from(
    commands: std::sync::mpsc::Receiver<Command>,
    engine: impl Engine,
    options: SchedulerOptions,
) -> Served {
    let noted = Arc::new(Mutex::new((BTreeMap::<u64, Outcome>::new(), Vec::new())));
    let sink = {
        let noted = Arc::clone(&noted);
        move |outputs: Vec<Output>| {
            let (outcomes, first_tokens) = &mut *noted.lock().unwrap();
            for output in outputs {
                let said = outcomes.get(&output.id.0).map_or(0, |outcome| outcome.tokens.len());
                if output.token.is_some() && said == 0 {
                    first_tokens.push(output.id.0);
                }
                note(outcomes.entry(output.id.0).or_default(), output);
            }
        }
    };
    let scheduler = Scheduler::new(engine, options, commands, sink);
    let stats = scheduler.stats();
    let result = scheduler.run();
    let (outcomes, first_tokens) = std::mem::take(&mut *noted.lock().unwrap());
    for (id, outcome) in &outcomes {
        assert!(outcome.finish.is_some(), "request {id} never ended: {outcome:?}");
    }
    if result.is_ok() {
        let [all, free, cached] = [&stats.pages, &stats.pages_free, &stats.pages_cached];
        assert_eq!(free.load(Relaxed) + cached.load(Relaxed), all.load(Relaxed), "pages are held");
        assert_eq!(stats.running.load(Relaxed) + stats.waiting.load(Relaxed), 0);
    }
    let (submitted, finished) = (stats.submitted.load(Relaxed), stats.finished.load(Relaxed));
    assert_eq!((submitted, finished), (outcomes.len() as u64, outcomes.len() as u64));
    Served { outcomes, first_tokens, stats, result }
}

fn note(outcome: &mut Outcome, output: Output) {
    assert!(outcome.finish.is_none(), "{output:?} comes after the last one");
    let is_first = outcome.tokens.is_empty();
    assert!(is_first || output.cached_tokens.is_none(), "{output:?}");
    outcome.cached_tokens = outcome.cached_tokens.or(output.cached_tokens);
    outcome.prompt_logprobs = outcome.prompt_logprobs.take().or(output.prompt_logprobs);
    if let Some(token) = output.token {
        outcome.tokens.push(token.id);
        outcome.logprobs.push(token.logprobs);
    }
    outcome.finish = output.finish;
}

/// An engine that calls out before it launches and after it has waited, with the plan.
pub struct Hooked<L, W> {
    pub engine: FakeEngine,
    pub on_launch: L,
    pub on_wait: W,
}

impl<L: FnMut(&StepPlan), W: FnMut(&StepPlan)> Engine for Hooked<L, W> {
    type InFlight = (Arc<StepPlan>, u64);

    fn launch(&mut self, plan: Arc<StepPlan>) -> Result<Self::InFlight, EngineError> {
        (self.on_launch)(&plan);
        let step = self.engine.launch(Arc::clone(&plan))?;
        Ok((plan, step))
    }

    fn wait(&mut self, (plan, step): Self::InFlight) -> Result<StepResult, EngineError> {
        let result = self.engine.wait(step)?;
        (self.on_wait)(&plan);
        Ok(result)
    }

    fn limits(&self) -> EngineLimits {
        self.engine.limits()
    }

    fn prefix_rows_max(&self) -> usize {
        self.engine.prefix_rows_max()
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub struct Random(pub u64);

impl Random {
    /// Below `bound`, or 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as usize % bound.max(1)
    }
}
