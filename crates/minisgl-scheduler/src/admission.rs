//! Who may run next, and on what expectations of memory.

use crate::engine::Engine;
use crate::memory::KvMemory;
use crate::message::OutputSink;
use crate::plan::Slot;
use crate::request::Request;
use crate::running::{Phase, Running};
use crate::scheduler::Scheduler;
use crate::stats::add;

/// What the expected share is at first.
const OUTPUT_SHARE_START: f32 = 0.4;
/// What it falls to while nobody has to be preempted.
const OUTPUT_SHARE_MIN: f32 = 0.05;
/// By how much it falls with every step.
const OUTPUT_SHARE_DECAY: f32 = 0.998;
/// By how much it rises with every preemption.
const OUTPUT_SHARE_STEP: f32 = 0.1;
/// Nobody's pages are reserved further ahead than for this many tokens.
const OUTPUT_AHEAD_MAX: usize = 2048;
/// So many later requests may be admitted before one that does not fit yet.
const BYPASS_MAX: u32 = 16;
/// How many of the waiting requests are looked at.
const ADMISSION_WINDOW: usize = 8;

/// How much memory requests are expected to need.
///
/// Most requests end long before `max_tokens`, so reserving for all of it would leave most of the
/// pool idle. What is reserved is a share, learned from how often somebody had to be preempted.
pub(crate) struct Admission {
    /// The share of its remaining tokens that a request is expected to generate.
    output_share: f32,
}

impl Default for Admission {
    fn default() -> Self {
        Self { output_share: OUTPUT_SHARE_START }
    }
}

impl Admission {
    /// A step without a preemption allows for a little more.
    pub fn step(&mut self) {
        self.output_share = (self.output_share * OUTPUT_SHARE_DECAY).max(OUTPUT_SHARE_MIN);
    }

    /// Too much was admitted.
    pub fn preempted(&mut self) {
        self.output_share = (self.output_share + OUTPUT_SHARE_STEP).min(1.0);
    }

    /// Pages that a request is expected to have at its end.
    fn expected_pages(&self, request: &Request, computed_len: usize, memory: &KvMemory) -> usize {
        let len = request.tokens.len().max(computed_len);
        let remaining = request.len_max.saturating_sub(len);
        let more = (remaining as f32 * self.output_share).ceil() as usize;
        // The last token's K and V are never needed.
        let more = more.min(OUTPUT_AHEAD_MAX).min(remaining.saturating_sub(1));
        memory.pages_for(len + more)
    }
}

impl<E: Engine, S: OutputSink> Scheduler<E, S> {
    /// Gives a slot to the first waiting request that fits. One that does not fit yet lets a
    /// bounded number of later ones pass, so that neither starves the other.
    pub(crate) fn admit(&mut self) -> Option<Slot> {
        if self.waiting.is_empty() || self.running.free_slots() == 0 {
            return None;
        }
        let reserved = self.reserved_pages();
        for index in 0..self.waiting.len().min(ADMISSION_WINDOW) {
            if let Some(slot) = self.try_admit(index, reserved) {
                for passed in self.waiting.iter_mut().take(index) {
                    passed.bypassed += 1;
                }
                return Some(slot);
            }
            if self.waiting[index].bypassed >= BYPASS_MAX {
                break;
            }
        }
        None
    }

    /// Pages that the running requests are expected to need beside those that they have.
    fn reserved_pages(&self) -> usize {
        let active = self.running.iter().filter(|running| running.is_active());
        let missing = |running: &Running| {
            let computed_len = running.computed_len;
            let pages = self.admission.expected_pages(&running.request, computed_len, &self.memory);
            pages.saturating_sub(running.holding.pages())
        };
        active.map(missing).sum()
    }

    /// Admits a waiting request if the pages that it is expected to need, beside those that are
    /// cached, are neither in use nor reserved.
    fn try_admit(&mut self, index: usize, reserved: usize) -> Option<Slot> {
        let request = &self.waiting[index];
        let mut holding = self.memory.open();
        let cached = self.memory.follow(&mut holding, request.reusable_tokens());
        let pages = self.admission.expected_pages(request, 0, &self.memory);
        if pages - cached.len() + reserved > self.memory.available_pages() {
            self.memory.close(holding);
            return None;
        }
        let mut request = self.waiting.remove(index)?;
        let cached_len = cached.len() * self.memory.page_size();
        if !request.has_run {
            request.has_run = true;
            request.cached_tokens = Some(cached_len as u32);
            add(&self.stats.prompt_tokens, request.prompt_len);
            add(&self.stats.cached_tokens, cached_len);
        }
        let slot = self.running.insert(request, holding);
        let running = self.running.get_mut(slot);
        running.update_pages(0, cached);
        running.computed_len = cached_len;
        Some(slot)
    }

    /// Skips what has come into the cache since the last chunk.
    pub(crate) fn follow(&mut self, slot: Slot) {
        let running = self.running.get_mut(slot);
        let pages = self.memory.follow(&mut running.holding, running.request.reusable_tokens());
        let page_size = self.memory.page_size();
        let cached_len = pages.len() * page_size;
        running.update_pages(running.computed_len / page_size, pages);
        running.computed_len += cached_len;
    }

    /// Leases pages for a request's first `len` tokens; all or, by returning false, none.
    pub(crate) fn grow(&mut self, slot: Slot, len: usize) -> bool {
        let running = self.running.get_mut(slot);
        let held = running.holding.pages();
        let needed = self.memory.pages_for(len);
        if needed <= held {
            return true;
        }
        let grown = self.memory.grow(&mut running.holding, needed);
        if grown {
            let pages: Vec<_> = running.holding.leased_from(held).collect();
            running.update_pages(held, pages);
        }
        grown
    }

    /// Shares a request's whole pages with all others, from the step on that computes them.
    pub(crate) fn publish(&mut self, slot: Slot) {
        let running = self.running.get_mut(slot);
        let computed = running.request.tokens.len().min(running.computed_len);
        let shared = self.memory.shared_len(&running.holding);
        let tokens = running.request.tokens.slice(shared..computed);
        let duplicates = self.memory.publish(&mut running.holding, tokens);
        if running.phase != Phase::Prefill {
            running.request.tokens.leave_out(self.memory.shared_len(&running.holding));
        }
        let Some(duplicates) = duplicates else { return };
        running.update_pages(duplicates.first, duplicates.pages);
        let steps_end = running.steps_end;
        self.replaced.extend(duplicates.replaced.into_iter().map(|lease| (steps_end, lease)));
    }
}
