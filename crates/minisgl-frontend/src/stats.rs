//! Counts and latencies of requests, as a client sees them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use minisgl_scheduler::histogram::Histogram;
use minisgl_scheduler::message::FinishReason;

/// All counters only grow.
#[derive(Debug)]
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
            FinishReason::ConstraintFailed(_) | FinishReason::Error(_) => Outcome::Error,
        }
    }
}

impl Default for FrontendStats {
    fn default() -> Self {
        Self {
            time_to_first_token: Histogram::of_seconds(),
            inter_token_latency: Histogram::of_seconds(),
            end_to_end_latency: Histogram::of_seconds(),
            prompt_tokens: AtomicU64::default(),
            cached_tokens: AtomicU64::default(),
            generated_tokens: AtomicU64::default(),
            ended: Default::default(),
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
