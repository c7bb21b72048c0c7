//! All ranks in this process, a thread each, as one engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use minisgl_scheduler::engine::{Engine, EngineError, EngineLimits};
use minisgl_scheduler::plan::{AdjustmentsCell, StepPlan, StepResult};
use minisgl_tensor::{Backend, Collective};

use crate::checkpoint::Checkpoint;
use crate::footprint::ensure_weights_fit;
use crate::kv::KvBudget;
use crate::layers::Attention;
use crate::options::EngineOptions;
use crate::rank::{LoadedRank, Rank, RankDevices};
use crate::sampler::Collected;
use crate::shares::{Blocks, Shares};

/// How often a caller that waits for rank 0 asks whether another rank has failed.
const FAILURE_POLL: Duration = Duration::from_millis(50);

/// How long ranks get to end after one of them has failed.
const END_GRACE: Duration = Duration::from_secs(2);

/// An engine of one or more ranks. All ranks compute the same tokens; rank 0's are reported.
pub struct LocalEngine {
    ranks: Vec<RankThread>,
    limits: EngineLimits,
    failure: Failure,
    launched: u64,
    /// What the ranks' attention takes at once, each of its own heads: what the least of them does.
    prefix_rows_max: usize,
    /// What ranks may be waiting for, to let go of them when the engine ends.
    adjustments: Vec<Weak<AdjustmentsCell>>,
}

/// A launched step.
pub struct InFlight {
    plan: Arc<StepPlan>,
    number: u64,
    collected: Receiver<Collected>,
}

struct RankThread {
    steps: Option<Sender<Step>>,
    thread: Option<JoinHandle<()>>,
}

struct Step {
    plan: Arc<StepPlan>,
    /// How many were launched before it.
    number: u64,
    /// Where rank 0 reports; the others drop what they have sampled.
    collected: Option<SyncSender<Collected>>,
}

/// The first thing that went wrong on any rank, and in which step. Steps before that one are
/// whole: whether a caller asks for them before or after the failure makes no difference.
#[derive(Clone, Default)]
struct Failure(Arc<Mutex<Option<(u64, EngineError)>>>);

impl Failure {
    fn set(&self, step: u64, message: &str) {
        tracing::error!("{message}");
        self.first().get_or_insert_with(|| (step, EngineError(message.into())));
    }

    /// What keeps step `step` from being run or handed out.
    fn check(&self, step: u64) -> Result<(), EngineError> {
        match &*self.first() {
            Some((failed, error)) if *failed <= step => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Why a rank ended while step `step` was under way.
    fn why(&self, step: u64) -> EngineError {
        self.check(step).err().unwrap_or_else(|| EngineError("a rank has ended".into()))
    }

    fn first(&self) -> MutexGuard<'_, Option<(u64, EngineError)>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl LocalEngine {
    /// Loads the model over the given ranks, all at once, and gets ready to run.
    ///
    /// # Errors
    /// If the model cannot be split over so many ranks, weights are missing or misshapen, or
    /// memory does not suffice; the message says what would do.
    pub fn new(
        checkpoint: Arc<Checkpoint>,
        options: &EngineOptions,
        ranks: Vec<(Arc<dyn Backend>, Arc<dyn Collective>)>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let blocks = Blocks::of(&checkpoint);
        ensure!(
            (1..=256).contains(&options.page_size),
            "--page-size {} is not in 1..=256",
            options.page_size
        );
        ensure!(options.running_requests_max > 0, "--max-running-requests is 0");
        ensure!(options.step_tokens_max > 0, "--max-prefill-length is 0");
        let seq_len_max = options.seq_len_max.unwrap_or(config.max_positions);
        ensure!(seq_len_max > 1, "sequences of {seq_len_max} tokens leave room for no answer");
        let mut limits = EngineLimits {
            page_size: options.page_size,
            pages: 0,
            slots: options.running_requests_max,
            seq_len_max,
            step_tokens_max: options.step_tokens_max,
            vocab_size: config.vocab_size,
        };
        let failure = Failure::default();
        let shares = Shares::all(config, blocks, ranks.len())?;
        for ((backend, _), shares) in ranks.iter().zip(&shares) {
            ensure_weights_fit(config, blocks, shares, backend.as_ref())?;
        }
        let prefix_rows_max = ranks.iter().zip(&shares).map(|((backend, _), shares)| {
            backend.prefix_rows_max(Attention::heads(config, shares))
        });
        let prefix_rows_max = prefix_rows_max.min().unwrap_or(1);
        let starting: Vec<StartingRank> = ranks
            .into_iter()
            .zip(shares)
            .enumerate()
            .map(|(index, ((backend, collective), shares))| {
                ensure!(collective.rank() == index, "ranks are not in order");
                let start = RankStart {
                    checkpoint: Arc::clone(&checkpoint),
                    options: options.clone(),
                    devices: RankDevices { backend, collective },
                    shares,
                    seq_len_max,
                    failure: failure.clone(),
                };
                start.spawn(index)
            })
            .collect::<Result<_>>()?;
        drop(checkpoint);
        let sequence_pages = seq_len_max.div_ceil(options.page_size);
        let mut pages = usize::MAX;
        for rank in &starting {
            let budget =
                rank.budget.recv().map_err(|_| anyhow!("a rank ended while loading"))??;
            pages = pages.min(budget.pages(options.kv_size, sequence_pages)?);
        }
        for rank in &starting {
            rank.pages.send(pages).context("a rank ended while loading")?;
        }
        for rank in &starting {
            rank.ready.recv().map_err(|_| anyhow!("a rank ended while starting"))??;
        }
        limits.pages = pages;
        let ranks = starting.into_iter().map(|rank| rank.thread).collect();
        Ok(Self { ranks, limits, failure, launched: 0, prefix_rows_max, adjustments: Vec::new() })
    }
}

impl Engine for LocalEngine {
    type InFlight = InFlight;

    fn launch(&mut self, plan: Arc<StepPlan>) -> Result<InFlight, EngineError> {
        let number = self.launched;
        self.failure.check(number)?;
        self.launched += 1;
        self.adjustments.retain(|cell| cell.strong_count() > 0);
        self.adjustments.extend(plan.adjustments.as_ref().map(Arc::downgrade));
        let (sender, collected) = sync_channel(1);
        let mut sender = Some(sender);
        for rank in &self.ranks {
            let step = Step { plan: Arc::clone(&plan), number, collected: sender.take() };
            let steps = rank.steps.as_ref().expect("channels are closed only on drop");
            steps.send(step).map_err(|_| self.failure.why(number))?;
        }
        Ok(InFlight { plan, number, collected })
    }

    fn wait(&mut self, in_flight: InFlight) -> Result<StepResult, EngineError> {
        let InFlight { plan, number, collected } = in_flight;
        let collected = self.collect(number, &collected)?;
        let result = collected.wait(&plan).map_err(|error| {
            self.failure.set(number, &error.to_string());
            self.failure.why(number)
        })?;
        // Rank 0 may be done while another has failed in the same step.
        self.failure.check(number)?;
        Ok(result)
    }

    fn limits(&self) -> EngineLimits {
        self.limits
    }

    fn prefix_rows_max(&self) -> usize {
        self.prefix_rows_max
    }
}

impl LocalEngine {
    /// What rank 0 reports of a step. If it hangs it reports nothing, but then the others give up
    /// on it in a collective.
    fn collect(
        &self,
        number: u64,
        collected: &Receiver<Collected>,
    ) -> Result<Collected, EngineError> {
        loop {
            match collected.recv_timeout(FAILURE_POLL) {
                Ok(collected) => return Ok(collected),
                Err(RecvTimeoutError::Disconnected) => return Err(self.failure.why(number)),
                Err(RecvTimeoutError::Timeout) => self.failure.check(number)?,
            }
        }
    }

    /// Waits for the ranks' threads, but not for one that hangs: it ends with the process.
    fn leave_hanging(&mut self) {
        let deadline = Instant::now() + END_GRACE;
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            while rank.is_running() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            if rank.is_running() {
                tracing::error!("rank {index} hangs and is left behind");
                rank.thread = None;
            }
        }
    }
}

impl Drop for LocalEngine {
    fn drop(&mut self) {
        for cell in self.adjustments.iter().filter_map(Weak::upgrade) {
            cell.abandon();
        }
        // All ranks are told before one is waited for: a rank's end may wait for the others'.
        self.ranks.iter_mut().for_each(|rank| drop(rank.steps.take()));
        let failed = self.failure.first().is_some();
        if failed {
            self.leave_hanging();
        }
    }
}

impl RankThread {
    fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        drop(self.steps.take());
        if let Some(thread) = self.thread.take() {
            // A panic was caught and reported inside the thread.
            let _ = thread.join();
        }
    }
}

/// A rank on its way up: it reports what memory it has, is told its pages, and reports again.
struct StartingRank {
    budget: Receiver<Result<KvBudget>>,
    pages: Sender<usize>,
    ready: Receiver<Result<()>>,
    thread: RankThread,
}

struct RankStart {
    checkpoint: Arc<Checkpoint>,
    options: EngineOptions,
    devices: RankDevices,
    shares: Shares,
    seq_len_max: usize,
    failure: Failure,
}

/// The rank's side of `StartingRank`.
struct Reports {
    budget: Sender<Result<KvBudget>>,
    pages: Receiver<usize>,
    ready: Sender<Result<()>>,
    steps: Receiver<Step>,
}

impl RankStart {
    fn spawn(self, index: usize) -> Result<StartingRank> {
        let (budget_sender, budget) = channel();
        let (pages, pages_receiver) = channel();
        let (ready_sender, ready) = channel();
        let (steps, steps_receiver) = channel();
        let reports = Reports {
            budget: budget_sender,
            pages: pages_receiver,
            ready: ready_sender,
            steps: steps_receiver,
        };
        let failure = self.failure.clone();
        let thread = std::thread::Builder::new()
            .name(format!("rank-{index}"))
            .spawn(move || {
                let run = catch_unwind(AssertUnwindSafe(|| self.run(reports)));
                if let Err(panic) = run {
                    failure.set(0, &format!("rank {index} panicked: {}", panic_message(&*panic)));
                }
            })
            .context("cannot start a thread")?;
        let thread = RankThread { steps: Some(steps), thread: Some(thread) };
        Ok(StartingRank { budget, pages, ready, thread })
    }

    fn run(self, reports: Reports) {
        let Self { checkpoint, options, devices, shares, seq_len_max, failure } = self;
        let index = devices.collective.rank();
        let bound = devices.backend.bind_thread().map_err(anyhow::Error::from);
        let loaded = bound
            .and_then(|()| LoadedRank::load(&checkpoint, &options, devices, shares, seq_len_max));
        drop(checkpoint);
        let budget = loaded.as_ref().map_err(|error| anyhow!("{error:#}"));
        let budget = budget.and_then(LoadedRank::kv_budget);
        // Whoever does not listen any more has given up on starting.
        let _ = reports.budget.send(budget);
        let (Ok(loaded), Ok(pages)) = (loaded, reports.pages.recv()) else { return };
        match loaded.finish(pages) {
            Err(error) => {
                let _ = reports.ready.send(Err(error));
            }
            Ok(rank) => {
                let _ = reports.ready.send(Ok(()));
                serve(rank, index, &reports.steps, &failure);
            }
        }
    }
}

/// Runs steps until there are no more or one fails. Ending drops what waits in the channel, and
/// with it the senders for which callers wait.
fn serve(mut rank: Rank, index: usize, steps: &Receiver<Step>, failure: &Failure) {
    while let Ok(step) = steps.recv() {
        if failure.check(step.number).is_err() {
            return;
        }
        // Set before `step` goes, so that a caller that is let go finds out why.
        let run = || tracing::debug_span!("enqueue").in_scope(|| rank.run(&step.plan));
        let run = catch_unwind(AssertUnwindSafe(run));
        match run {
            Ok(Ok(collected)) => {
                if let Some(sender) = &step.collected {
                    // The caller may have dropped its `InFlight`.
                    let _ = sender.send(collected);
                }
            }
            Ok(Err(error)) => return failure.set(step.number, &format!("rank {index}: {error}")),
            Err(panic) => {
                let message = panic_message(&*panic);
                return failure.set(step.number, &format!("rank {index} panicked: {message}"));
            }
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
