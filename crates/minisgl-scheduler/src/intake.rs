//! How requests come in, and how they end.

use std::sync::atomic::Ordering::Relaxed;

use crate::engine::Engine;
use crate::message::{
    FinishReason, NewRequest, Output, OutputSink, OutputToken, Refusal, RequestId,
};
use crate::plan::Slot;
use crate::request::Request;
use crate::running::Phase;
use crate::scheduler::{SchedulePolicy, Scheduler};
use crate::stats::{add, set};

impl<E: Engine, S: OutputSink> Scheduler<E, S> {
    pub(crate) fn submit(&mut self, new: NewRequest) {
        add(&self.stats.submitted, 1);
        let id = new.id;
        let mut request = match self.check(new) {
            Ok(request) => request,
            Err(refusal) => {
                tracing::debug!(request = id.0, %refusal, "refused");
                return self.report(refused(id, refusal));
            }
        };
        request.arrival = self.stats.submitted.load(Relaxed);
        if request.wants_nothing() {
            let output = request.output(None, Some(FinishReason::Length));
            return self.report(output);
        }
        let place = match self.options.policy {
            SchedulePolicy::Fcfs => self.waiting.len(),
            SchedulePolicy::Lof => {
                let output_max = request.output_max();
                let is_before = |other: &Request| other.has_run || other.output_max() >= output_max;
                self.waiting.partition_point(is_before)
            }
        };
        self.waiting.insert(place, request);
    }

    fn check(&self, new: NewRequest) -> Result<Request, Refusal> {
        let waiting = self.waiting.len();
        if self.draining {
            return Err(Refusal::ShuttingDown);
        }
        if waiting >= self.options.waiting_max.saturating_add(self.running.free_slots()) {
            return Err(Refusal::QueueFull { waiting });
        }
        Request::new(new, &self.limits, &self.options.eos_ids)
    }

    pub(crate) fn abort(&mut self, id: RequestId) {
        if let Some(index) = self.waiting.iter().position(|request| request.id == id) {
            let mut request = self.waiting.remove(index).expect("it was just found");
            let output = request.output(None, Some(FinishReason::Abort));
            return self.report(output);
        }
        let found = self.running.iter().find(|running| running.request.id == id);
        if let Some(slot) = found.map(|running| running.slot) {
            self.end(slot, None, FinishReason::Abort);
        }
    }

    /// Ends everything that waits or runs.
    pub(crate) fn end_all(&mut self, reason: &FinishReason) {
        for slot in self.running.slots() {
            self.end(slot, None, reason.clone());
        }
        for mut request in std::mem::take(&mut self.waiting) {
            self.report(request.output(None, Some(reason.clone())));
        }
    }

    /// Gives a running request its last output, with which it begins to drain.
    pub(crate) fn end(&mut self, slot: Slot, token: Option<OutputToken>, reason: FinishReason) {
        let running = self.running.get_mut(slot);
        if running.phase == Phase::Draining {
            return;
        }
        running.phase = Phase::Draining;
        let output = running.request.output(token, Some(reason));
        self.report(output);
        self.release(slot);
    }

    pub(crate) fn report(&mut self, output: Output) {
        if output.finish.is_some() {
            add(&self.stats.finished, 1);
        }
        self.outputs.push(output);
    }

    pub(crate) fn deliver(&mut self) {
        set(&self.stats.running, self.running.len());
        set(&self.stats.waiting, self.waiting.len());
        set(&self.stats.pages_free, self.memory.free_pages());
        set(&self.stats.pages_cached, self.memory.available_pages() - self.memory.free_pages());
        if !self.outputs.is_empty() {
            self.sink.deliver(std::mem::take(&mut self.outputs));
        }
    }
}

fn refused(id: RequestId, refusal: Refusal) -> Output {
    Output {
        id,
        token: None,
        cached_tokens: None,
        prompt_logprobs: None,
        finish: Some(FinishReason::Refused(refusal)),
    }
}
