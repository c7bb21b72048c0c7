//! What can be seen of a scheduler from outside while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::histogram::Histogram;
use crate::plan::DeviceSpan;

/// Gauges and counters, written by the scheduler's thread alone and read by anybody.
#[derive(Debug, Default)]
pub struct SchedulerStats {
    /// Gauge: requests that hold a slot.
    pub running: AtomicU64,
    /// Gauge: requests that wait for one.
    pub waiting: AtomicU64,
    /// Pages in the pool.
    pub pages: AtomicU64,
    /// Gauge: pages that hold nothing.
    pub pages_free: AtomicU64,
    /// Gauge: pages that the prefix cache could give back at once.
    pub pages_cached: AtomicU64,
    /// Gauge: rows of the last step.
    pub batch_rows: AtomicU64,
    /// Gauge: tokens computed by the last step.
    pub batch_tokens: AtomicU64,
    /// Counter: steps finished.
    pub steps: AtomicU64,
    /// Counter: prompt tokens of admitted requests.
    pub prompt_tokens: AtomicU64,
    /// Counter: of these, found in the prefix cache.
    pub cached_tokens: AtomicU64,
    /// Counter: tokens generated.
    pub generated_tokens: AtomicU64,
    /// Counter: requests taken in.
    pub submitted: AtomicU64,
    /// Counter: requests that ended in any way, refusals with them.
    pub finished: AtomicU64,
    /// Counter: times that a running request had to give its pages up.
    pub preemptions: AtomicU64,
    /// All steps so far.
    pub step_histograms: StepHistograms,
}

/// How large steps were, and how long they took.
#[derive(Debug)]
pub struct StepHistograms {
    /// From a step's launch, or the end of the step before if that is later, to its tokens.
    pub time: Histogram,
    /// Requests in a step.
    pub rows: Histogram,
    /// Tokens that a step computed.
    pub tokens: Histogram,
}

impl Default for StepHistograms {
    fn default() -> Self {
        Self {
            time: Histogram::of_seconds(),
            rows: Histogram::of_counts(),
            tokens: Histogram::of_counts(),
        }
    }
}

/// Sets a gauge.
pub(crate) fn set(gauge: &AtomicU64, value: usize) {
    gauge.store(value as u64, Ordering::Relaxed);
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, value: usize) {
    counter.fetch_add(value as u64, Ordering::Relaxed);
}

/// Where the time of one step went on the scheduler's thread, and when the device ran it.
#[derive(Clone, Copy, Debug)]
pub struct StepTimes {
    /// As in the plan.
    pub step: u64,
    /// Requests in it.
    pub rows: usize,
    /// Tokens that it computed.
    pub tokens: usize,
    /// When planning began.
    pub planned_at: Instant,
    /// Choosing requests and pages.
    pub plan: Duration,
    /// Handing the plan to the engine.
    pub launch: Duration,
    /// When the scheduler began to wait for its tokens.
    pub waited_at: Instant,
    /// Waiting for its tokens.
    pub wait: Duration,
    /// Handing out its tokens.
    pub commit: Duration,
    /// When the device ran it, as in the step's result.
    pub on_device: Option<DeviceSpan>,
}

/// Told of what threads spend their time on: traces and histograms. Must not block.
pub trait StepObserver: Send + Sync {
    /// One step's times, behind its commit, on the scheduler's thread.
    fn step(&self, times: &StepTimes);
    /// `tokens` tokens of one commit became text from `began` on in `took`, on the text thread.
    fn text(&self, began: Instant, took: Duration, tokens: usize);
}
