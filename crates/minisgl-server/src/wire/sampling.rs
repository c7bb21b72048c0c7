//! The fields that chat and text completions have in common.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{OneOrMany, StreamOptions, or_null};

/// Read from the same body as the endpoint's own fields. Every field may be absent or null, and
/// ranges are checked in `validate`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Common {
    /// The model's name.
    pub model: Option<String>,
    /// Answer in server-sent events.
    #[serde(deserialize_with = "or_null")]
    pub stream: bool,
    /// How a stream reports.
    #[serde(deserialize_with = "or_null")]
    pub stream_options: StreamOptions,
    /// Choices for each prompt.
    pub n: Option<i64>,
    /// Tokens to generate at most.
    pub max_tokens: Option<i64>,
    /// The newer name of `max_tokens`.
    pub max_completion_tokens: Option<i64>,
    /// Tokens to generate at least.
    pub min_tokens: Option<i64>,
    /// Texts that end a choice, at most 64; they are not part of it.
    pub stop: Option<OneOrMany>,
    /// Token ids that end a choice.
    pub stop_token_ids: Option<Vec<i64>>,
    /// Let what ended the choice be part of it.
    #[serde(deserialize_with = "or_null")]
    pub include_stop_str_in_output: bool,
    /// Generate past the end-of-sequence token.
    #[serde(deserialize_with = "or_null")]
    pub ignore_eos: bool,
    /// Leave special tokens out of the text; the default.
    pub skip_special_tokens: Option<bool>,
    /// Makes sampling repeatable; choice `i` uses `seed + i`.
    pub seed: Option<i64>,
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// Sample among the k most likely tokens; 0 and -1 are all.
    pub top_k: Option<i64>,
    /// 0 to 1: drop tokens less likely than this share of the most likely one's probability.
    pub min_p: Option<f64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// 0.01 to 100; 1 is none.
    pub repetition_penalty: Option<f64>,
    /// From token id to a bias of -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// SGLang's notation of grammars; refused, for an answer that ignored it would be wrong.
    #[schemars(skip)]
    pub ebnf: Option<IgnoredAny>,
    /// As `ebnf`: what other servers call their forms.
    #[schemars(skip)]
    pub structural_tag: Option<IgnoredAny>,
    /// As `ebnf`.
    #[schemars(skip)]
    pub structured_outputs: Option<IgnoredAny>,
    /// As `ebnf`.
    #[schemars(skip)]
    pub guided_json: Option<IgnoredAny>,
    /// As `ebnf`.
    #[schemars(skip)]
    pub guided_regex: Option<IgnoredAny>,
    /// As `ebnf`.
    #[schemars(skip)]
    pub guided_choice: Option<IgnoredAny>,
    /// As `ebnf`.
    #[schemars(skip)]
    pub guided_grammar: Option<IgnoredAny>,
}
