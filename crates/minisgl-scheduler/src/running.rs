//! Requests that hold pages and a slot, from admission to the end of their last step.

use crate::memory::Holding;
use crate::plan::{PageId, PageUpdate, RowInput, RowOutput, Slot};
use crate::request::Request;

/// Where a running request is in its life.
///
/// ```text
/// (waiting) ─► Prefill ─► Decode ─► Draining ─► (gone)
///     ▲           └───┬──────┘
///     └── Preempting ◄┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Some of its tokens are still to be computed before one can be sampled.
    Prefill,
    /// Its newest token was, or is being, sampled in its slot.
    Decode,
    /// It goes back to wait as soon as no step in flight has it.
    Preempting,
    /// It has ended; it gives its pages back as soon as no step in flight has it.
    Draining,
}

/// A request with its pages and its slot.
pub(crate) struct Running {
    pub request: Request,
    pub slot: Slot,
    pub phase: Phase,
    pub holding: Holding,
    /// What the device's page table does not have yet.
    page_updates: Vec<PageUpdate>,
    /// Tokens whose K and V are in pages once all launched steps have run.
    pub computed_len: usize,
    /// Tokens that steps in flight sample for it.
    pub tokens_in_flight: usize,
    /// The number of steps after which none that was launched has it.
    pub steps_end: u64,
}

impl Running {
    pub fn new(request: Request, slot: Slot, holding: Holding) -> Self {
        Self {
            request,
            slot,
            phase: Phase::Prefill,
            holding,
            page_updates: Vec::new(),
            computed_len: 0,
            tokens_in_flight: 0,
            steps_end: 0,
        }
    }

    /// Tokens that it has, those in flight with them.
    pub fn len(&self) -> usize {
        self.request.tokens.len() + self.tokens_in_flight
    }

    /// Whether it can go into further steps.
    pub fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Prefill | Phase::Decode)
    }

    /// Whether the next step may have it as a decode. False once its last token is in flight.
    pub fn decodes(&self) -> bool {
        self.phase == Phase::Decode && self.len() < self.request.len_max
    }

    /// Tokens that pages are needed for, if it decodes now and once more.
    pub fn decode_len_ahead(&self) -> usize {
        (self.computed_len + 2).min(self.request.len_max - 1)
    }

    /// Notes pages that the device's page table lacks, from `index` on.
    pub fn update_pages(&mut self, index: usize, pages: impl IntoIterator<Item = PageId>) {
        let slot = self.slot;
        let update = |(at, page)| PageUpdate { slot, index: (index + at) as u32, page };
        self.page_updates.extend(pages.into_iter().enumerate().map(update));
    }

    /// Hands over what `update_pages` has noted.
    pub fn take_page_updates(&mut self, into: &mut Vec<PageUpdate>) {
        into.append(&mut self.page_updates);
    }

    /// The ids of the next `extend_len` tokens, and what to do behind them.
    pub fn next_row(&self, extend_len: usize) -> (RowInput, RowOutput) {
        let sample = || RowOutput::Sample(self.request.params.clone());
        if self.phase == Phase::Decode {
            return (RowInput::Sampled, sample());
        }
        let tokens = &self.request.tokens;
        let chunk = self.computed_len..self.computed_len + extend_len;
        let is_last = chunk.end == tokens.len();
        let samples = is_last && tokens.len() < self.request.len_max;
        let output = match &self.request.prompt_scores {
            Some(scores) if self.request.scores_prompt() => RowOutput::Score {
                targets: chunk.clone().map(|position| tokens.get(position + 1)).collect(),
                top: scores.top,
                sample: samples.then(|| self.request.params.clone()),
            },
            _ if samples => sample(),
            _ => RowOutput::None,
        };
        (RowInput::Tokens(tokens.slice(chunk).to_vec()), output)
    }
}

/// All running requests: found by slot, walked through in order of admission.
pub(crate) struct RunningSet {
    slots: Vec<Option<Running>>,
    free: Vec<Slot>,
    order: Vec<Slot>,
}

impl RunningSet {
    pub fn new(slots: usize) -> Self {
        Self {
            slots: (0..slots).map(|_| None).collect(),
            free: (0..slots as u32).rev().map(Slot).collect(),
            order: Vec::with_capacity(slots),
        }
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Oldest first.
    pub fn slots(&self) -> impl DoubleEndedIterator<Item = Slot> + use<> {
        self.order.clone().into_iter()
    }

    /// Oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Running> {
        self.order.iter().map(|slot| self.get(*slot))
    }

    pub fn get(&self, slot: Slot) -> &Running {
        self.slots[slot.0 as usize].as_ref().expect("a slot in use has a request")
    }

    pub fn get_mut(&mut self, slot: Slot) -> &mut Running {
        self.slots[slot.0 as usize].as_mut().expect("a slot in use has a request")
    }

    /// Puts a request into a free slot.
    pub fn insert(&mut self, request: Request, holding: Holding) -> Slot {
        let slot = self.free.pop().expect("somebody looked whether a slot is free");
        self.order.push(slot);
        self.slots[slot.0 as usize] = Some(Running::new(request, slot, holding));
        slot
    }

    pub fn remove(&mut self, slot: Slot) -> Running {
        self.order.retain(|other| *other != slot);
        self.free.push(slot);
        self.slots[slot.0 as usize].take().expect("a slot in use has a request")
    }
}
