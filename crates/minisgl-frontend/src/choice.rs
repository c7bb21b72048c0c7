//! One choice in flight: from its tokens to its text.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use minisgl_scheduler::message::{FinishReason, Output, OutputToken, Refusal};
use minisgl_text::{Detokenizer, StopMatcher, StopOutcome, TextModel};

use crate::frontend::Shared;
use crate::generation::{Finish, Mailbox, Usage};
use crate::request::GenerateRequest;
use crate::stats::{FrontendStats, Outcome};

/// What the text thread knows of a choice.
pub(crate) struct ChoiceText {
    mailbox: Arc<Mailbox>,
    /// Its place in the mailbox.
    choice: usize,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    include_stop_str: bool,
    /// Stop strings count behind this many tokens.
    min_tokens: u32,
    usage: Usage,
    submitted_at: Instant,
    last_token_at: Option<Instant>,
}

impl ChoiceText {
    pub(crate) fn new(
        request: &GenerateRequest,
        prompt_tokens: u32,
        text: &TextModel,
        mailbox: Arc<Mailbox>,
        choice: usize,
    ) -> Self {
        Self {
            mailbox,
            choice,
            detokenizer: Detokenizer::new(Arc::clone(&text.tokenizer), request.skip_special_tokens),
            stop: StopMatcher::new(request.stop.clone()),
            include_stop_str: request.include_stop_str,
            min_tokens: request.params.min_tokens,
            usage: Usage { prompt_tokens, ..Usage::default() },
            submitted_at: Instant::now(),
            last_token_at: None,
        }
    }

    /// Turns an output into events; true when the choice has ended by it.
    pub(crate) fn take(&mut self, output: Output, now: Instant, shared: &Shared) -> bool {
        let stats = &shared.stats;
        let Output { id: _, token, cached_tokens, prompt_logprobs, finish } = output;
        if let Some(cached_tokens) = cached_tokens {
            self.usage.cached_tokens = cached_tokens;
            stats.prompt_tokens.fetch_add(u64::from(self.usage.prompt_tokens), Relaxed);
            stats.cached_tokens.fetch_add(u64::from(cached_tokens), Relaxed);
        }
        if let Some(logprobs) = prompt_logprobs {
            self.mailbox.deliver_prompt(self.choice, logprobs);
        }
        let (mut text, mut stop) = (String::new(), None);
        if let Some(token) = &token {
            self.count_token(now, stats);
            let is_stop_token = finish == Some(FinishReason::Stop { matched: Some(token.id) });
            if !is_stop_token || self.include_stop_str {
                let piece = self.detokenizer.push(token.id);
                stop = self.find_stop(&piece, &mut text);
            }
        }
        if finish.is_some() && stop.is_none() {
            let rest = self.detokenizer.finish();
            stop = self.find_stop(&rest, &mut text);
            if stop.is_none() {
                text.push_str(&self.stop.finish());
            }
        }
        let reason = match stop {
            Some(_) => Some(FinishReason::Stop { matched: None }),
            None => finish,
        };
        match reason {
            Some(reason) => self.end(&text, token, reason, stop, shared),
            None => {
                self.mailbox.deliver(self.choice, &text, token, None);
                return false;
            }
        }
        true
    }

    /// Appends to `text` what of `piece` is certain to stay, and returns the stop string that ends
    /// the choice, if one does.
    fn find_stop(&mut self, piece: &str, text: &mut String) -> Option<String> {
        if self.usage.completion_tokens < self.min_tokens {
            text.push_str(piece);
            return None;
        }
        match self.stop.push(piece) {
            StopOutcome::Text(safe) => {
                text.push_str(&safe);
                None
            }
            StopOutcome::Matched { text: before, stop } => {
                text.push_str(&before);
                if self.include_stop_str {
                    text.push_str(&stop);
                }
                Some(stop)
            }
        }
    }

    fn count_token(&mut self, now: Instant, stats: &FrontendStats) {
        self.usage.completion_tokens += 1;
        stats.generated_tokens.fetch_add(1, Relaxed);
        match self.last_token_at.replace(now) {
            Some(last) => stats.inter_token_latency.observe_duration(now - last),
            None => stats.time_to_first_token.observe_duration(now - self.submitted_at),
        }
    }

    /// The choice's last event.
    pub(crate) fn end(
        &self,
        text: &str,
        token: Option<OutputToken>,
        reason: FinishReason,
        stop: Option<String>,
        shared: &Shared,
    ) {
        let stats = &shared.stats;
        // First of all, so that who is told of the end finds the place free.
        shared.in_flight.fetch_sub(1, Relaxed);
        let outcome = Outcome::from(&reason);
        stats.count_end(outcome);
        if matches!(outcome, Outcome::Stop | Outcome::Length) {
            stats.end_to_end_latency.observe_duration(self.submitted_at.elapsed());
        }
        let finish = Finish { reason, stop, usage: self.usage };
        self.mailbox.deliver(self.choice, text, token, Some(finish));
    }

    /// Answers a choice whose scheduler is gone.
    pub(crate) fn end_without_scheduler(&self, shared: &Shared) {
        let reason = match shared.failure.get() {
            Some(failure) => FinishReason::Error(failure.as_str().into()),
            None => FinishReason::Refused(Refusal::ShuttingDown),
        };
        self.end("", None, reason, None, shared);
    }
}
