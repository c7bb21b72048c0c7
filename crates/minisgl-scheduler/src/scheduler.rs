//! The loop: take the requests, plan one step, run it, hand out the tokens.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, TryRecvError};
use std::time::Instant;

use tracing::debug_span;

use crate::admission::Admission;
use crate::cache::CacheType;
use crate::engine::{Engine, EngineError, EngineLimits};
use crate::memory::KvMemory;
use crate::message::{Command, FinishReason, Output, OutputSink, OutputToken};
use crate::pages::PageLease;
use crate::plan::{PlanRow, RowAdjustment, Slot, StepPlan, StepResult};
use crate::request::{Adjustment, Request};
use crate::running::{Phase, Running, RunningSet};
use crate::stats::{SchedulerStats, StepObserver, StepTimes, add, set};

/// In which order waiting requests are admitted. Those that had to give their pages up go first in any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchedulePolicy {
    /// As they came.
    #[default]
    Fcfs,
    /// Those that may generate the most tokens first, so that none of these is left over when the others
    /// are done: for work that is all there from the start (longest processing time first; Graham, 1969).
    Lof,
}

/// What can be chosen about a scheduler.
#[derive(Clone)]
pub struct SchedulerOptions {
    /// Which prefix cache.
    pub cache: CacheType,
    /// Who is admitted first.
    pub policy: SchedulePolicy,
    /// Plan step n+1 and hand out the tokens of step n while the engine is busy.
    pub overlap: bool,
    /// Ids that end every request which does not ignore them.
    pub eos_ids: Vec<u32>,
    /// Requests that may wait when none can be admitted; further ones are refused.
    pub waiting_max: usize,
    /// Tokens that one step may compute, where the engine's own limit is not lower.
    pub step_tokens_max: Option<usize>,
    /// Tokens of a step in which a quarter as many requests decode, or more: prompts then ride along with these, as
    /// far as a step costs little more for it (Sarathi-Serve; Agrawal et al., 2024).
    pub mixed_tokens_max: Option<usize>,
    /// Check after every step that every page is in exactly one place; slow.
    pub check_integrity: bool,
    /// Told where the time of each step goes.
    pub observer: Option<Arc<dyn StepObserver>>,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self {
            cache: CacheType::Radix,
            policy: SchedulePolicy::default(),
            overlap: true,
            eos_ids: Vec::new(),
            waiting_max: 4096,
            step_tokens_max: None,
            mixed_tokens_max: None,
            check_integrity: cfg!(debug_assertions),
            observer: None,
        }
    }
}

/// Runs requests on an engine, from commands to outputs, on the thread that calls `run`.
pub struct Scheduler<E: Engine, S: OutputSink> {
    pub(crate) engine: E,
    pub(crate) limits: EngineLimits,
    pub(crate) options: SchedulerOptions,
    commands: Receiver<Command>,
    pub(crate) sink: S,
    pub(crate) waiting: VecDeque<Request>,
    pub(crate) running: RunningSet,
    pub(crate) memory: KvMemory,
    /// Pages replaced by equal ones from the cache, and the number of steps that may read them.
    pub(crate) replaced: VecDeque<(u64, PageLease)>,
    pub(crate) admission: Admission,
    pub(crate) steps_launched: u64,
    pub(crate) steps_committed: u64,
    /// When the tokens of the step before came.
    step_ended_at: Instant,
    /// Set when no new request is taken.
    pub(crate) draining: bool,
    pub(crate) outputs: Vec<Output>,
    pub(crate) stats: Arc<SchedulerStats>,
}

/// A step between launch and commit.
struct Launched<E: Engine> {
    plan: Arc<StepPlan>,
    in_flight: E::InFlight,
    times: StepTimes,
}

impl<E: Engine, S: OutputSink> Scheduler<E, S> {
    /// A scheduler with nothing to do yet.
    pub fn new(engine: E, options: SchedulerOptions, commands: Receiver<Command>, sink: S) -> Self {
        let mut limits = engine.limits();
        let step_tokens_max = options.step_tokens_max.unwrap_or(usize::MAX);
        limits.step_tokens_max = limits.step_tokens_max.min(step_tokens_max).max(1);
        // So that every running request gets its token in every step.
        limits.slots = limits.slots.min(limits.step_tokens_max);
        let stats = Arc::new(SchedulerStats::default());
        set(&stats.pages, limits.pages);
        set(&stats.pages_free, limits.pages);
        Self {
            memory: KvMemory::new(limits.pages, limits.page_size, options.cache),
            running: RunningSet::new(limits.slots),
            waiting: VecDeque::new(),
            replaced: VecDeque::new(),
            admission: Admission::default(),
            steps_launched: 0,
            steps_committed: 0,
            step_ended_at: Instant::now(),
            draining: false,
            outputs: Vec::new(),
            engine,
            limits,
            options,
            commands,
            sink,
            stats,
        }
    }

    /// Numbers that stay readable while `run` has the scheduler.
    pub fn stats(&self) -> Arc<SchedulerStats> {
        Arc::clone(&self.stats)
    }

    /// Serves until it is told to end or nobody is left who could submit. Every request that was
    /// submitted before that gets its last output.
    ///
    /// # Errors
    /// If the engine fails. Its requests have ended with `FinishReason::Error` then.
    pub fn run(self) -> Result<(), EngineError> {
        self.run_and_tell(|_| ())
    }

    /// As `run`; `failed` learns of the engine's failure before any request does.
    ///
    /// # Errors
    /// As `run`.
    pub fn run_and_tell(mut self, failed: impl FnOnce(&EngineError)) -> Result<(), EngineError> {
        let served = self.serve();
        if let Err(error) = &served {
            tracing::error!("{error}");
            failed(error);
            self.end_all(&FinishReason::Error(Arc::clone(&error.0)));
        }
        self.draining = true;
        while let Ok(command) = self.commands.try_recv() {
            self.execute(command);
        }
        self.deliver();
        served
    }

    fn serve(&mut self) -> Result<(), EngineError> {
        let mut in_flight = None;
        while self.receive(in_flight.is_none()) {
            let launched = self.launch_next()?; // never waits
            self.commit(in_flight.take())?; // step n, while n+1 runs
            self.adjust(launched.as_ref()); // what n's tokens change in n+1's logits
            in_flight = launched;
            if !self.options.overlap {
                self.commit(in_flight.take())?;
            }
            self.deliver();
        }
        Ok(())
    }

    /// Executes the commands that have come. With nothing else to do it waits for one; false means
    /// that none will come, and that all is done.
    fn receive(&mut self, nothing_in_flight: bool) -> bool {
        loop {
            let idle = nothing_in_flight && self.running.is_empty() && self.waiting.is_empty();
            if idle {
                self.deliver();
            }
            let command = match idle {
                true if self.draining => return false,
                true => self.commands.recv().map_err(|RecvError| TryRecvError::Disconnected),
                false => self.commands.try_recv(),
            };
            match command {
                Ok(command) => self.execute(command),
                Err(_) => return !idle,
            }
        }
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Submit(request) => self.submit(*request),
            Command::Abort(id) => self.abort(id),
            Command::FlushCache(reply) => {
                // Whoever does not listen any more does not want to know.
                let _ = reply.try_send(self.memory.flush());
            }
            Command::Drain => self.draining = true,
            Command::Shutdown => {
                self.draining = true;
                self.end_all(&FinishReason::Abort);
            }
        }
    }
}

impl<E: Engine, S: OutputSink> Scheduler<E, S> {
    /// Plans the next step and starts it, if there is anything to compute.
    fn launch_next(&mut self) -> Result<Option<Launched<E>>, EngineError> {
        let planned_at = Instant::now();
        let plan = debug_span!("plan").in_scope(|| self.plan_step());
        let Some(plan) = plan.map(Arc::new) else { return Ok(None) };
        let launched_at = Instant::now();
        let launch = || self.engine.launch(Arc::clone(&plan));
        let in_flight = debug_span!("launch").in_scope(launch)?;
        let times = StepTimes {
            step: plan.step,
            rows: plan.rows.len(),
            tokens: plan.tokens(),
            planned_at,
            plan: launched_at - planned_at,
            launch: launched_at.elapsed(),
            waited_at: launched_at,
            wait: Default::default(),
            commit: Default::default(),
            on_device: None,
        };
        Ok(Some(Launched { plan, in_flight, times }))
    }

    /// Waits for a step and hands out its tokens.
    fn commit(&mut self, launched: Option<Launched<E>>) -> Result<(), EngineError> {
        let Some(Launched { plan, in_flight, mut times }) = launched else { return Ok(()) };
        times.waited_at = Instant::now();
        let mut result = debug_span!("wait").in_scope(|| self.engine.wait(in_flight))?;
        let _commit = debug_span!("commit").entered();
        let finished_at = Instant::now();
        self.steps_committed = plan.step + 1;
        for (index, row) in plan.rows.iter().enumerate() {
            self.commit_row(index, row, &mut result);
        }
        let is_past = |(steps, _): &(u64, PageLease)| *steps <= plan.step + 1;
        while self.replaced.front().is_some_and(is_past) {
            self.memory.release(self.replaced.pop_front().map(|(_, lease)| lease));
        }
        if self.options.check_integrity {
            self.check_integrity();
        }

        times.on_device = result.on_device;
        times.wait = finished_at - times.waited_at;
        times.commit = finished_at.elapsed();
        add(&self.stats.steps, 1);
        let histograms = &self.stats.step_histograms;
        let begun_at = self.step_ended_at.max(times.planned_at + times.plan);
        histograms.time.observe_duration(finished_at.saturating_duration_since(begun_at));
        histograms.rows.observe(times.rows as f64);
        histograms.tokens.observe(times.tokens as f64);
        self.step_ended_at = finished_at;
        set(&self.stats.batch_rows, times.rows);
        set(&self.stats.batch_tokens, times.tokens);
        if let Some(observer) = &self.options.observer {
            observer.step(&times);
        }
        Ok(())
    }

    fn commit_row(&mut self, index: usize, row: &PlanRow, result: &mut StepResult) {
        let running = self.running.get_mut(row.slot);
        if running.phase == Phase::Draining {
            return self.release(row.slot);
        }
        running.request.take_scores(std::mem::take(&mut result.scores[index]));
        let Some(id) = result.tokens[index] else {
            // Only where nothing but the prompt's log-probabilities is wanted.
            if row.device_len() as usize == running.request.len_max {
                return self.end(row.slot, None, FinishReason::Length);
            }
            return self.release(row.slot);
        };
        running.tokens_in_flight -= 1;
        let finish = running.request.push(id);
        add(&self.stats.generated_tokens, 1);
        let token = OutputToken { id, logprobs: result.logprobs[index].take() };
        if let Some(reason) = finish {
            self.publish(row.slot);
            return self.end(row.slot, Some(token), reason);
        }
        let output = running.request.output(Some(token), None);
        self.report(output);
        self.publish(row.slot);
        self.release(row.slot);
    }

    /// Takes a request that has left off out of its slot, once no step in flight has it.
    pub(crate) fn release(&mut self, slot: Slot) {
        let running = self.running.get(slot);
        if running.is_active() || running.steps_end > self.steps_committed {
            return;
        }
        let Running { mut request, holding, phase, .. } = self.running.remove(slot);
        if phase == Phase::Preempting {
            request.tokens.take_back(|| self.memory.shared_tokens(&holding));
        }
        self.memory.close(holding);
        if phase == Phase::Preempting {
            request.restart();
            // In front of all that have not run, and in order with those that have.
            let is_before = |other: &Request| other.has_run && other.arrival < request.arrival;
            let place = self.waiting.partition_point(is_before);
            self.waiting.insert(place, request);
        }
    }

    /// Tells the engine what the tokens so far change in the logits of a launched step.
    fn adjust(&mut self, launched: Option<&Launched<E>>) {
        let Some(Launched { plan, .. }) = launched else { return };
        let Some(cell) = &plan.adjustments else { return };
        let mut adjustments = Vec::new();
        for (row, plan_row) in plan.rows.iter().enumerate() {
            let running = self.running.get_mut(plan_row.slot);
            let is_sampled = plan_row.output.sampling().is_some();
            if !is_sampled || running.phase == Phase::Draining || !running.request.is_adjusted() {
                continue;
            }
            match running.request.adjustment() {
                Ok(Adjustment { edits, mask }) => {
                    adjustments.push(RowAdjustment { row, edits, mask });
                }
                Err(reason) => self.end(plan_row.slot, None, reason),
            }
        }
        cell.fill(adjustments);
    }

    /// Panics unless every page is in exactly one place.
    fn check_integrity(&self) {
        let holdings = self.running.iter().map(|running| &running.holding);
        self.memory.check_integrity(holdings, self.replaced.iter().map(|(_, lease)| lease));
    }
}
