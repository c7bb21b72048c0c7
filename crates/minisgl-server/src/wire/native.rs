//! `/generate`, SGLang's own form.

use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{OneOrMany, Prompts, or_null};

/// A request: `text` or `input_ids`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct NativeRequest {
    /// What is continued, as text.
    pub text: Option<Prompts>,
    /// What is continued, as token ids.
    pub input_ids: Option<Prompts>,
    /// How.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<NativeSampling>")]
    pub sampling_params: NativeSampling,
    /// Answer in server-sent events, each with all of the text so far.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub stream: bool,
    /// Report log-probabilities of the generated tokens.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub return_logprob: bool,
    /// Report the prompt's as well, from this token on; -1 for none.
    pub logprob_start_len: Option<i64>,
    /// Alternatives to report for each token.
    pub top_logprobs_num: Option<i64>,
    /// Names the request; drawn if absent.
    pub rid: Option<String>,
}

/// How tokens are chosen.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct NativeSampling {
    /// Tokens to generate at most; 128.
    pub max_new_tokens: Option<i64>,
    /// Tokens to generate at least.
    pub min_new_tokens: Option<i64>,
    /// Texts that end a choice.
    pub stop: Option<OneOrMany>,
    /// Token ids that end a choice.
    pub stop_token_ids: Option<Vec<i64>>,
    /// Let what ended the choice be part of it.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub no_stop_trim: bool,
    /// Generate past the end-of-sequence token.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub ignore_eos: bool,
    /// Leave special tokens out of the text; the default.
    pub skip_special_tokens: Option<bool>,
    /// Choices for each prompt.
    pub n: Option<i64>,
    /// Makes sampling repeatable.
    pub sampling_seed: Option<i64>,
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// Sample among the k most likely tokens; 0 and -1 are all.
    pub top_k: Option<i64>,
    /// 0 to 1.
    pub min_p: Option<f64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// 0.01 to 100; 1 is none.
    pub repetition_penalty: Option<f64>,
    /// A regular expression that the whole text matches.
    pub regex: Option<String>,
    /// A JSON schema, as text, that the whole text satisfies.
    pub json_schema: Option<String>,
    /// A grammar in Lark's notation that the whole text follows.
    pub grammar: Option<String>,
    /// Another notation of grammars; refused.
    #[schemars(skip)]
    pub ebnf: Option<IgnoredAny>,
    /// As `ebnf`.
    #[schemars(skip)]
    pub structural_tag: Option<IgnoredAny>,
}

/// The whole answer.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum NativeAnswer<'a> {
    /// To one prompt that was not given as a list, with one choice.
    One(NativeOutput<'a>),
    /// All choices, in the prompts' order.
    Many(Vec<NativeOutput<'a>>),
}

/// One choice, or the state that it has reached.
#[derive(Debug, Serialize, JsonSchema)]
pub struct NativeOutput<'a> {
    /// All of its text so far.
    pub text: &'a str,
    /// All of its tokens so far.
    pub output_ids: &'a [u32],
    /// More about it.
    pub meta_info: MetaInfo<'a>,
    /// Which choice, in a stream of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
}

/// More about a choice.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MetaInfo<'a> {
    /// Names the request.
    pub id: &'a str,
    /// Null while it goes on.
    pub finish_reason: Option<NativeFinish<'a>>,
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Of the prompt's, found in the prefix cache.
    pub cached_tokens: u32,
    /// Seconds since the request came.
    pub e2e_latency: f64,
    /// `[logprob, id, text]` for each token of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_token_logprobs: Option<&'a [NativeLogprob]>,
    /// `[logprob, id, text]` for each generated token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_token_logprobs: Option<&'a [NativeLogprob]>,
    /// The alternatives in each generated token's place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_top_logprobs: Option<&'a [Vec<NativeLogprob>]>,
}

/// `[logprob, id, text]`; the text is always null.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct NativeLogprob(pub Option<f32>, pub u32, pub ());

/// Why a choice ended.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum NativeFinish<'a> {
    /// By EOS, a stop token or a stop string.
    Stop {
        /// Which.
        matched: Option<NativeMatch<'a>>,
    },
    /// At its length limit.
    Length {
        /// The limit.
        length: u32,
    },
}

/// What ended a choice.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum NativeMatch<'a> {
    /// A stop string.
    Text(&'a str),
    /// A token's id.
    Token(u32),
}
