//! `/v1/completions`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::chat::StopReason;
use super::{Prompts, Usage, or_null};

/// The fields that only text completions have.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct CompletionFields {
    /// What is continued.
    pub prompt: Prompts,
    /// Let the text begin with the prompt; with `logprobs`, score the prompt, too.
    #[serde(default, deserialize_with = "or_null")]
    pub echo: bool,
    /// Report log-probabilities, with this many alternatives, 0 to 20.
    #[serde(default)]
    pub logprobs: Option<i64>,
    /// As `n`, where it is not less: all choices are returned.
    #[serde(default)]
    pub best_of: Option<i64>,
    /// Refused.
    #[serde(default)]
    pub suffix: Option<String>,
    /// The form of the text: `text`, `json_object` or `json_schema`.
    #[serde(default)]
    #[schemars(with = "Option<Value>")]
    pub response_format: Option<Box<RawValue>>,
    /// A regular expression that the whole text matches.
    #[serde(default)]
    pub regex: Option<String>,
    /// A grammar in Lark's notation that the whole text follows.
    #[serde(default)]
    pub grammar: Option<String>,
}

/// The answer, or a piece of it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Completion<'a> {
    /// Names the answer.
    pub id: &'a str,
    /// `text_completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: &'a str,
    /// `n` for each prompt, in the prompts' order.
    pub choices: Vec<CompletionChoice<'a>>,
    /// What they took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One continuation, or a piece of it.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct CompletionChoice<'a> {
    /// From 0.
    pub index: usize,
    /// The text.
    pub text: &'a str,
    /// Of its tokens, if asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null while it goes on.
    pub finish_reason: Option<&'static str>,
    /// The stop string or token that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

/// Log-probabilities as lists, an entry a token.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct CompletionLogprobs {
    /// Texts; `bytes:\xNN…` for what is not UTF-8.
    pub tokens: Vec<String>,
    /// Natural logarithms; null for a prompt's first token.
    pub token_logprobs: Vec<Option<f32>>,
    /// The most likely tokens in each place, with the one that stands there.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token begins, in characters of the text.
    pub text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Adds the tokens that follow.
    pub fn append(&mut self, mut next: Self) {
        self.tokens.append(&mut next.tokens);
        self.token_logprobs.append(&mut next.token_logprobs);
        self.top_logprobs.append(&mut next.top_logprobs);
        self.text_offset.append(&mut next.text_offset);
    }
}
