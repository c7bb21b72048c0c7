//! What is submitted, and why it may not be.

use minisgl_scheduler::message::Refusal;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_text::{ChatRequest, TextError};

use crate::grammar::Grammar;

/// What is to be continued.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text, continued as it stands.
    Text(String),
    /// A chat, by way of the model's template.
    Chat(Box<ChatRequest>),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

/// A prompt and how it is continued.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// What is to be continued.
    pub prompt: Prompt,
    /// How tokens are chosen, and how many. `params.seed` is overwritten, see `seed`.
    pub params: SamplingParams,
    /// Choice `i` samples with `seed + i`. Drawn at random where it is absent.
    pub seed: Option<u64>,
    /// How many continuations, which share the pages of the prompt; at least 1.
    pub n: u32,
    /// Texts that end a continuation and are not part of it.
    pub stop: Vec<String>,
    /// Whether the text or token that ended a continuation is part of its text after all.
    pub include_stop_str: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Report the prompt's own log-probabilities, with this many alternatives, in
    /// [`Event::Prompt`](crate::Event::Prompt) of the first choice.
    pub prompt_logprobs: Option<u32>,
    /// What the text must conform to; see [`Frontend::compile`](crate::Frontend::compile).
    pub grammar: Option<Grammar>,
}

impl GenerateRequest {
    /// One continuation of `prompt`, with default parameters.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            params: SamplingParams::default(),
            seed: None,
            n: 1,
            stop: Vec::new(),
            include_stop_str: false,
            skip_special_tokens: true,
            prompt_logprobs: None,
            grammar: None,
        }
    }
}

/// Why nothing was submitted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The chat template refuses the messages, or there is none.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The engine could never run it, or takes no more requests now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// More continuations than may ever be in flight.
    #[error("{choices} continuations are asked for, and at most {choices_max} may be in flight")]
    TooManyChoices {
        /// Asked for, over all prompts.
        choices: usize,
        /// May be in flight.
        choices_max: usize,
    },
    /// The engine has failed, or was shut down.
    #[error("the engine does not run: {0}")]
    Unhealthy(String),
}
