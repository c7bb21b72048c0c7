//! What goes into the next step: decodes, then chunks of prompts, then newly admitted requests.

use std::sync::Arc;

use crate::engine::Engine;
use crate::message::OutputSink;
use crate::plan::{PageUpdate, PlanRow, SharedPrefix, Slot, StepPlan};
use crate::running::Phase;
use crate::scheduler::Scheduler;
use crate::stats::add;

/// A plan that is being made.
struct Draft {
    rows: Vec<PlanRow>,
    page_updates: Vec<PageUpdate>,
    /// Tokens that still fit into the step.
    budget: usize,
    adjusted: bool,
}

impl<E: Engine, S: OutputSink> Scheduler<E, S> {
    /// The next step, if there is anything to compute.
    pub(crate) fn plan_step(&mut self) -> Option<StepPlan> {
        let mut draft = Draft {
            rows: Vec::with_capacity(self.running.len() + 1),
            page_updates: Vec::new(),
            budget: self.limits.step_tokens_max,
            adjusted: false,
        };
        self.admission.step();
        let has_room_ahead = self.make_room();
        for slot in self.running.slots() {
            self.plan_decode(slot, has_room_ahead, &mut draft);
        }
        draft.budget = draft.budget.min(self.room_beside(draft.rows.len()));
        let shared_prefixes = self.shared_prefixes(&draft);
        for slot in self.running.slots() {
            self.plan_chunk(slot, &mut draft);
        }
        while draft.budget > 0
            && let Some(slot) = self.admit()
        {
            self.plan_chunk(slot, &mut draft);
        }
        if draft.rows.is_empty() {
            let is_done = self.running.is_empty() && self.waiting.is_empty();
            // Everything else would be to wait for ever.
            assert!(is_done || self.steps_launched > self.steps_committed, "nobody can go on");
            return None;
        }
        let step = self.steps_launched;
        self.steps_launched += 1;
        Some(StepPlan {
            step,
            rows: draft.rows,
            page_updates: draft.page_updates,
            adjustments: draft.adjusted.then(Arc::default),
            shared_prefixes,
        })
    }

    /// How many tokens of prompts so many decodes have beside them: a page's always, so that nobody waits for ever.
    fn room_beside(&self, decodes: usize) -> usize {
        match self.options.mixed_tokens_max {
            Some(mixed) if decodes > 0 && 4 * decodes >= mixed => {
                mixed.saturating_sub(decodes).max(self.memory.page_size())
            }
            _ => usize::MAX,
        }
    }

    /// What the decodes have in common. All of that is in pages before the step: what the cache has of a
    /// request's tokens is computed, and its newest is not.
    fn shared_prefixes(&mut self, decodes: &Draft) -> Vec<SharedPrefix> {
        let lot = self.engine.prefix_rows_max();
        if lot < 2 || decodes.rows.len() < 2 {
            return Vec::new();
        }
        let running = &self.running;
        let holdings = decodes.rows.iter().map(|row| &running.get(row.slot).holding);
        self.memory.shared_prefixes(holdings, lot)
    }

    /// Preempts the newest requests until every decode has, or is about to get, the pages for this
    /// step and the next: a step ahead, so that nobody waits while a step in flight still uses the
    /// pages that are given up. Returns whether all of these pages can be leased now.
    fn make_room(&mut self) -> bool {
        loop {
            let (mut needed, mut coming) = (0, 0);
            for running in self.running.iter() {
                let held = running.holding.pages();
                if running.decodes() {
                    let pages = self.memory.pages_for(running.decode_len_ahead());
                    needed += pages.saturating_sub(held);
                } else if !running.is_active() {
                    coming += running.holding.own_pages();
                }
            }
            let available = self.memory.available_pages();
            if needed <= available + coming {
                return needed <= available;
            }
            let active = self.running.iter().rev().filter(|running| running.is_active());
            let newest: Vec<Slot> = active.map(|running| running.slot).take(2).collect();
            let [newest, _older] = newest[..] else { return false };
            self.preempt(newest);
        }
    }

    /// Takes a request's pages away. It waits again, in front of those that have not run, and
    /// then computes its tokens anew as if they were a prompt.
    fn preempt(&mut self, slot: Slot) {
        let running = self.running.get_mut(slot);
        tracing::debug!(request = running.request.id.0, "preempted");
        running.phase = Phase::Preempting;
        self.admission.preempted();
        add(&self.stats.preemptions, 1);
        self.release(slot);
    }

    fn plan_decode(&mut self, slot: Slot, has_room_ahead: bool, draft: &mut Draft) {
        let running = self.running.get(slot);
        if draft.budget == 0 || !running.decodes() {
            return;
        }
        let len = running.computed_len + 1;
        let len = if has_room_ahead { running.decode_len_ahead().max(len) } else { len };
        if self.grow(slot, len) {
            self.push_row(slot, 1, draft);
        }
    }

    fn plan_chunk(&mut self, slot: Slot, draft: &mut Draft) {
        if draft.budget == 0 || self.running.get(slot).phase != Phase::Prefill {
            return;
        }
        self.follow(slot);
        let running = self.running.get(slot);
        let page_size = self.memory.page_size();
        let start = running.computed_len;
        let end = running.request.tokens.len().min(start + draft.budget);
        let room = (running.holding.pages() + self.memory.available_pages()) * page_size;
        let mut end = end.min(room);
        if end < running.request.tokens.len() {
            // Whole pages, where that leaves anything: pages in part cannot be shared.
            let whole = end / page_size * page_size;
            end = if whole > start { whole } else { end };
        }
        if end > start && self.grow(slot, end) {
            self.push_row(slot, end - start, draft);
            self.publish(slot);
        }
    }

    fn push_row(&mut self, slot: Slot, extend_len: usize, draft: &mut Draft) {
        let running = self.running.get_mut(slot);
        let (input, output) = running.next_row(extend_len);
        running.take_page_updates(&mut draft.page_updates);
        let cached_len = running.computed_len as u32;
        running.computed_len += extend_len;
        if running.computed_len == running.len() {
            running.phase = Phase::Decode;
        }
        running.steps_end = self.steps_launched + 1;
        if output.sampling().is_some() {
            running.tokens_in_flight += 1;
            draft.adjusted |= running.request.is_adjusted();
        }
        draft.budget -= extend_len;
        draft.rows.push(PlanRow { slot, cached_len, extend_len: extend_len as u32, input, output });
    }
}
