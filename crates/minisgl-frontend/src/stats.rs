//! Counts and latencies of requests, as a client sees them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use minisgl_scheduler::message::FinishReason;

/// All counters only grow.
#[derive(Debug, Default)]
pub struct FrontendStats {
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between a choice's tokens.
    pub inter_token_latency: Histogram,
    /// From submission to the end, of what ended by itself.
    pub end_to_end_latency: Histogram,
    /// Tokens of submitted prompts, counted once for each choice.
    pub prompt_tokens: AtomicU64,
    /// Of them, found in the prefix cache.
    pub cached_tokens: AtomicU64,
    /// Tokens that reached a client.
    pub generated_tokens: AtomicU64,
    ended: [AtomicU64; Outcome::ALL.len()],
}

/// How a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By EOS, a stop token, a stop string or its grammar.
    Stop,
    /// At its length limit.
    Length,
    /// By its submitter.
    Abort,
    /// It was never run.
    Refused,
    /// It, or the engine, failed.
    Error,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 5] =
        [Outcome::Stop, Outcome::Length, Outcome::Abort, Outcome::Refused, Outcome::Error];

    /// In one word, for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Abort => "abort",
            Outcome::Refused => "refused",
            Outcome::Error => "error",
        }
    }
}

impl From<&FinishReason> for Outcome {
    fn from(reason: &FinishReason) -> Self {
        match reason {
            FinishReason::Stop { .. } => Outcome::Stop,
            FinishReason::Length => Outcome::Length,
            FinishReason::Abort => Outcome::Abort,
            FinishReason::Refused(_) => Outcome::Refused,
            FinishReason::Error(_) => Outcome::Error,
        }
    }
}

impl FrontendStats {
    /// Choices that ended so.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.ended[outcome as usize].load(Relaxed)
    }

    pub(crate) fn count_end(&self, outcome: Outcome) {
        self.ended[outcome as usize].fetch_add(1, Relaxed);
    }
}

/// Upper bounds of the buckets, in seconds; a last bucket takes everything above.
const BUCKETS: [f64; 19] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 120.0,
];

/// A histogram of durations that any thread may add to.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS.len() + 1],
    sum_ns: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKETS.partition_point(|&bound| bound < seconds);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(duration.as_nanos() as u64, Relaxed);
    }

    /// `(upper bound in seconds, how many were at most that)`, the last bound infinite, as
    /// Prometheus has them.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = BUCKETS.into_iter().chain([f64::INFINITY]);
        bounds.zip(&self.counts).scan(0, |total, (bound, count)| {
            *total += count.load(Relaxed);
            Some((bound, *total))
        })
    }

    /// All durations together, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum_ns.load(Relaxed) as f64 * 1e-9
    }
}
