//! The contract between scheduler and engine: `StepPlan` in, `StepResult` out, and nothing else.
//!
//! A step computes, for each of its rows, `extend_len` tokens behind `cached_len` tokens whose K
//! and V are already in pages. A decode is an extend of 1, a prefill chunk an extend of many. Both
//! ride in the same step; decodes come first.
//!
//! What an engine must keep to: steps run in the order in which they were launched, and in every
//! layer all rows of a step store their K and V before any row reads. A row may therefore read
//! pages that another row of the same step writes, and does where two requests share a prefix.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::sampling::SamplingParams;

/// A page of the KV cache: `page_size` consecutive token slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// A running request's row in the page table and in the device-side token table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// One engine step, as the scheduler wants it done. Shared by all tensor-parallel ranks.
#[derive(Debug)]
pub struct StepPlan {
    /// Steps are numbered from 0, in the order in which the engine runs them.
    pub step: u64,
    /// Decodes first, then prefill chunks. Never empty.
    pub rows: Vec<PlanRow>,
    /// Page table entries that change with this step, to be written before it runs.
    pub page_updates: Vec<PageUpdate>,
    /// What sampling must wait for, when some row's logits depend on the token before
    /// (grammar masks, penalties). `None` when no row asks for it, and then nobody waits.
    pub adjustments: Option<Arc<AdjustmentsCell>>,
    /// Decodes that had best read their first pages together. Empty unless the engine asks for it
    /// ([`Engine::prefix_rows_max`](crate::engine::Engine::prefix_rows_max)).
    pub shared_prefixes: Vec<SharedPrefix>,
}

/// Rows that begin with the same pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPrefix {
    /// Two or more decodes, by their index in the plan, ascending. No row has two prefixes.
    pub rows: Vec<u32>,
    /// So many first pages are the same in all of these rows' page tables, and older than the step.
    pub pages: u32,
}

impl StepPlan {
    /// Tokens that this step computes.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.extend_len as usize).sum()
    }

    /// Whether every row extends by one token, so that a captured graph may run it.
    pub fn is_decode(&self) -> bool {
        self.rows.iter().all(|row| row.extend_len == 1)
    }
}

/// One request's share of a step.
#[derive(Clone, Debug)]
pub struct PlanRow {
    /// Where the request's pages and its newest token are found on the device.
    pub slot: Slot,
    /// Tokens whose K and V are in pages before this step.
    pub cached_len: u32,
    /// Tokens to compute in this step, at least 1.
    pub extend_len: u32,
    /// Where the input ids come from.
    pub input: RowInput,
    /// What to do with the logits.
    pub output: RowOutput,
}

impl PlanRow {
    /// Tokens whose K and V are in pages after this step.
    pub fn device_len(&self) -> u32 {
        self.cached_len + self.extend_len
    }
}

/// Where a row's input ids come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowInput {
    /// Known to the host: `extend_len` ids.
    Tokens(Vec<u32>),
    /// The token that the row's last step sampled, still (or again) in the token table.
    Sampled,
}

/// What a row's logits are for.
#[derive(Clone, Debug)]
pub enum RowOutput {
    /// A prefill chunk that is not the last: nothing is sampled.
    None,
    /// Sample the token that follows the row's last one. It becomes position
    /// `device_len` of the request and is written to the token table.
    Sample(Arc<SamplingParams>),
    /// As `Sample`, and the log-probabilities of the `extend_len` input ids themselves: entry `i`
    /// scores `targets[i]`, the id that follows input `i`, with this many alternatives.
    /// `sample` is `None` on chunks that are not the last.
    Score {
        /// For each input token, the id whose log-probability is asked for; `None` where the
        /// next id is not known (the prompt's last token).
        targets: Vec<Option<u32>>,
        /// How many of the most likely alternatives to report.
        top: u32,
        /// As in `Sample`.
        sample: Option<Arc<SamplingParams>>,
    },
}

impl RowOutput {
    /// The parameters by which a token is sampled, if one is.
    pub fn sampling(&self) -> Option<&Arc<SamplingParams>> {
        match self {
            RowOutput::None => None,
            RowOutput::Sample(params) => Some(params),
            RowOutput::Score { sample, .. } => sample.as_ref(),
        }
    }
}

/// `page_table[slot][index] = page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageUpdate {
    /// Row of the page table.
    pub slot: Slot,
    /// Which page of the request: token position / page size.
    pub index: u32,
    /// The page.
    pub page: PageId,
}

/// What a finished step gives back: one entry for each row of its plan, in order.
#[derive(Clone, Debug, Default)]
pub struct StepResult {
    /// The sampled token, for rows that sample.
    pub tokens: Vec<Option<u32>>,
    /// Log-probabilities of the sampled token, for rows whose parameters ask for them.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// Log-probabilities of the prompt's tokens, for `RowOutput::Score`; empty elsewhere.
    pub scores: Vec<Vec<Option<TokenLogprobs>>>,
    /// When the device ran the step, where the engine was asked to note that and its device can say.
    pub on_device: Option<DeviceSpan>,
}

/// A time on a device, by the host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSpan {
    /// When the device came to the step.
    pub began: Instant,
    /// Until it had done the last of it.
    pub took: Duration,
}

/// A token's log-probability and the most likely alternatives, natural logarithm, from the
/// logits before temperature (after penalties, bias and mask), as OpenAI reports them.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// Its rank in the vocabulary, from 0.
    pub rank: u32,
    /// `(id, logprob)`, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Changes to one row's logits that depend on what it has generated so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowAdjustment {
    /// Index of the row in the plan.
    pub row: usize,
    /// `logit = (if logit > 0 { logit / scale } else { logit * scale }) + bias`
    pub edits: Vec<LogitEdit>,
    /// Allowed tokens, a bit each, low bit first; every token when absent.
    pub mask: Option<Arc<Vec<u32>>>,
}

/// One token's share of repetition, presence and frequency penalties and of the logit bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitEdit {
    /// The token.
    pub token: u32,
    /// The repetition penalty, 1 where there is none.
    pub scale: f32,
    /// The sum of bias, presence and frequency penalties.
    pub bias: f32,
}

/// A value that the scheduler fills in while the step's forward pass runs, and that every rank
/// waits for just before it samples.
#[derive(Debug, Default)]
pub struct AdjustmentsCell {
    value: Mutex<Option<Arc<Vec<RowAdjustment>>>>,
    filled: Condvar,
}

impl AdjustmentsCell {
    /// Hands the value to every rank that waits. A second call is a bug.
    pub fn fill(&self, value: Vec<RowAdjustment>) {
        let mut slot = self.value.lock().expect("no rank panics while it holds this lock");
        assert!(slot.is_none(), "a step's adjustments are filled once");
        *slot = Some(Arc::new(value));
        self.filled.notify_all();
    }

    /// Lets go of the ranks that wait where the value will never come, because the engine ends.
    /// Does nothing once the cell is filled.
    pub fn abandon(&self) {
        let mut slot = self.value.lock().expect("no rank panics while it holds this lock");
        slot.get_or_insert_default();
        self.filled.notify_all();
    }

    /// Waits until the scheduler has filled the value.
    pub fn wait(&self) -> Arc<Vec<RowAdjustment>> {
        let mut slot = self.value.lock().expect("the scheduler does not panic with this lock");
        loop {
            if let Some(value) = slot.as_ref() {
                return Arc::clone(value);
            }
            slot = self.filled.wait(slot).expect("the scheduler does not panic with this lock");
        }
    }
}
