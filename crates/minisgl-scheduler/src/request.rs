//! A request: what it has, what it wants, and when it ends.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::edits::LogitEdits;
use crate::engine::EngineLimits;
use crate::message::{
    Constraint, FinishReason, NewRequest, Output, OutputToken, Refusal, RequestId,
};
use crate::plan::{LogitEdit, TokenLogprobs};
use crate::sampling::SamplingParams;
use crate::tokens::Tokens;

/// A request in the scheduler, waiting or running.
pub(crate) struct Request {
    pub id: RequestId,
    /// The prompt, then what was generated.
    pub tokens: Tokens,
    pub prompt_len: usize,
    /// Tokens that it may have in all, the prompt's with them.
    pub len_max: usize,
    pub params: Arc<SamplingParams>,
    pub prompt_scores: Option<PromptScores>,
    /// How many came before it.
    pub arrival: u64,
    /// Whether it has been admitted before.
    pub has_run: bool,
    /// How often a later request was admitted before it.
    pub bypassed: u32,
    stop_ids: Vec<u32>,
    constraint: Option<Box<dyn Constraint>>,
    edits: Option<LogitEdits>,
    /// Prompt tokens found in the cache, reported with the first output.
    pub cached_tokens: Option<u32>,
}

/// The prompt's log-probabilities, as far as they are known.
pub(crate) struct PromptScores {
    /// How many alternatives are asked for.
    pub top: u32,
    logprobs: Vec<Option<TokenLogprobs>>,
}

/// What one row's logits are changed by.
pub(crate) struct Adjustment {
    pub edits: Vec<LogitEdit>,
    pub mask: Option<Arc<Vec<u32>>>,
}

impl PromptScores {
    /// Of the first token, which follows nothing.
    fn new(top: u32) -> Self {
        Self { top, logprobs: vec![None] }
    }
}

impl Request {
    /// Refuses what can never run.
    pub fn new(new: NewRequest, limits: &EngineLimits, eos_ids: &[u32]) -> Result<Self, Refusal> {
        let prompt_len = new.prompt.len();
        // The last token's K and V are never needed.
        let len_max = limits.seq_len_max.min(limits.pages * limits.page_size + 1);
        if prompt_len == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        if prompt_len >= len_max {
            return Err(Refusal::PromptTooLong { prompt_len, prompt_len_max: len_max - 1 });
        }
        let vocab_size = limits.vocab_size;
        let biased = new.params.logit_bias.iter().map(|(token, _)| token);
        if let Some(&token) =
            new.prompt.iter().chain(biased).find(|token| **token as usize >= vocab_size)
        {
            return Err(Refusal::TokenOutOfVocabulary { token, vocab_size });
        }
        let mut stop_ids = new.params.stop_token_ids.clone();
        if !new.params.ignore_eos {
            stop_ids.extend_from_slice(eos_ids);
        }
        stop_ids.retain(|id| (*id as usize) < vocab_size);
        let params = Arc::new(new.params);
        Ok(Self {
            id: new.id,
            prompt_len,
            len_max: len_max.min(prompt_len.saturating_add(params.max_tokens as usize)),
            edits: LogitEdits::new(&params, &new.prompt, &stop_ids),
            prompt_scores: new.prompt_logprobs.map(PromptScores::new),
            params,
            tokens: Tokens::new(new.prompt),
            arrival: 0,
            has_run: false,
            bypassed: 0,
            stop_ids,
            constraint: new.constraint,
            cached_tokens: None,
        })
    }

    /// The most tokens that it may generate.
    pub fn output_max(&self) -> usize {
        self.len_max - self.prompt_len
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether there is nothing to compute for it.
    pub fn wants_nothing(&self) -> bool {
        self.len_max == self.prompt_len && self.prompt_scores.is_none()
    }

    /// Whether prompt tokens must be computed even if their K and V are cached.
    pub fn scores_prompt(&self) -> bool {
        self.prompt_scores.as_ref().is_some_and(|scores| scores.logprobs.len() < self.prompt_len)
    }

    /// The tokens whose cached K and V may be used: not the last, whose logits are wanted, and none
    /// as long as the logits of all are.
    pub fn reusable_tokens(&self) -> &[u32] {
        match self.scores_prompt() {
            true => &[],
            false => self.tokens.slice(0..self.tokens.len() - 1),
        }
    }

    /// Takes what was reported for a chunk of the prompt.
    pub fn take_scores(&mut self, scores: Vec<Option<TokenLogprobs>>) {
        if let Some(prompt) = &mut self.prompt_scores {
            prompt.logprobs.extend(scores);
            prompt.logprobs.truncate(self.prompt_len);
        }
    }

    /// Forgets what was computed, before it waits again.
    pub fn restart(&mut self) {
        if let Some(scores) = &mut self.prompt_scores {
            scores.logprobs.truncate(1);
        }
    }

    /// Whether its logits are changed by something that depends on the token before.
    pub fn is_adjusted(&self) -> bool {
        self.constraint.is_some() || self.edits.is_some()
    }

    /// What changes the logits of its next token. An error ends it.
    pub fn adjustment(&mut self) -> Result<Adjustment, FinishReason> {
        let mask = match &mut self.constraint {
            Some(constraint) => contained(|| constraint.mask())?,
            None => None,
        };
        // Where a grammar leaves nothing but an end, it ends there, `min_tokens` or not.
        let must_stop = mask.as_ref().is_some_and(|mask| self.only_stops(mask));
        let too_early = self.generated() < self.params.min_tokens as usize && !must_stop;
        let edits = self.edits.as_ref().map(|edits| edits.at(too_early)).unwrap_or_default();
        Ok(Adjustment { edits, mask })
    }

    /// Whether every token that a mask allows is one that ends the request.
    fn only_stops(&self, mask: &[u32]) -> bool {
        let stops = |word: usize| {
            let in_word = self.stop_ids.iter().filter(|&&id| id as usize / 32 == word);
            in_word.fold(0, |bits, id| bits | 1 << (id % 32))
        };
        mask.iter().enumerate().all(|(word, &bits)| bits == 0 || bits & !stops(word) == 0)
    }

    /// Takes a new token, and says whether it was the last.
    pub fn push(&mut self, token: u32) -> Option<FinishReason> {
        self.tokens.push(token);
        if let Some(edits) = &mut self.edits {
            edits.push(token);
        }
        let stop = Some(FinishReason::Stop { matched: Some(token) });
        if self.stop_ids.contains(&token) {
            return stop;
        }
        if let Some(constraint) = &mut self.constraint {
            match contained(|| constraint.advance(token)) {
                Ok(true) => {}
                Ok(false) => return stop,
                Err(error) => return Some(error),
            }
        }
        (self.tokens.len() >= self.len_max).then_some(FinishReason::Length)
    }

    /// What to tell of it.
    pub fn output(&mut self, token: Option<OutputToken>, finish: Option<FinishReason>) -> Output {
        let prompt_logprobs = match &self.prompt_scores {
            Some(scores) if scores.logprobs.len() == self.prompt_len => self.prompt_scores.take(),
            _ => None,
        };
        Output {
            id: self.id,
            token,
            cached_tokens: self.cached_tokens.take(),
            prompt_logprobs: prompt_logprobs.map(|scores| scores.logprobs),
            finish,
        }
    }
}

/// Calls foreign code of one request: if it fails or panics, that request ends and no other.
fn contained<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, FinishReason> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| FinishReason::ConstraintFailed(error.into())),
        Err(_) => Err(FinishReason::Error("the constraint panicked".into())),
    }
}
