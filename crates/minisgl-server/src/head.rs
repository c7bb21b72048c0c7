//! What all pieces of an answer have in common, and what the answer took.

use std::hash::{BuildHasher, RandomState};

use minisgl_frontend::Usage as ChoiceUsage;

use crate::app::{App, unix_seconds};
use crate::reply::{End, Stop};
use crate::wire::Usage;
use crate::wire::chat::StopReason;

/// What all pieces of an answer have in common.
#[derive(Clone, Debug)]
pub struct Head {
    /// Names the answer.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
}

impl Head {
    /// A new answer's. Its id begins with `prefix`.
    pub fn new(app: &App, prefix: &str) -> Self {
        let model = app.model_name().to_string();
        Self { id: random_id(prefix), created: unix_seconds(), model }
    }
}

/// An id that was never given before.
pub fn random_id(prefix: &str) -> String {
    let word = || RandomState::new().hash_one(prefix);
    format!("{prefix}{:016x}{:016x}", word(), word())
}

/// The usage of several choices. A prompt counts once, however many choices share it.
#[derive(Clone, Debug)]
pub struct UsageSum {
    prompt_tokens: u32,
    completion_tokens: u32,
    cached_tokens: u32,
    /// Choices for each prompt.
    n: usize,
}

impl UsageSum {
    /// Of prompts with so many tokens together, and `n` choices each.
    pub fn new(prompt_tokens: u32, n: usize) -> Self {
        Self { prompt_tokens, completion_tokens: 0, cached_tokens: 0, n }
    }

    /// Counts generated tokens as they come.
    pub fn add_tokens(&mut self, tokens: usize) {
        self.completion_tokens += tokens as u32;
    }

    /// Counts what is known when a choice has ended, beside its tokens.
    pub fn add_end(&mut self, choice: usize, usage: &ChoiceUsage) {
        if choice.is_multiple_of(self.n) {
            self.cached_tokens += usage.cached_tokens;
        }
    }

    /// What was counted so far.
    pub fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
    }
}

/// `stop` or `length`.
pub fn finish_reason(end: &End) -> &'static str {
    if end.is_length { "length" } else { "stop" }
}

/// What ended a choice, where it was not EOS.
pub fn stop_reason(app: &App, stop: Option<Stop>) -> Option<StopReason> {
    match stop? {
        Stop::Text(text) => Some(StopReason::Text(text)),
        Stop::Token(id) if app.frontend.text().eos_ids.contains(&id) => None,
        Stop::Token(id) => Some(StopReason::Token(id)),
    }
}
