//! What the server says of itself, and of texts and tokens.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::or_null;

/// `/v1/models`
#[derive(Debug, Serialize, JsonSchema)]
pub struct ModelList<'a> {
    /// `list`
    pub object: &'static str,
    /// The names of the one model.
    pub data: Vec<ModelCard<'a>>,
}

/// A model.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ModelCard<'a> {
    /// Its name.
    pub id: &'a str,
    /// `model`
    pub object: &'static str,
    /// Seconds since 1970: when the server started.
    pub created: u64,
    /// `minisgl`
    pub owned_by: &'static str,
    /// Where it was read from.
    pub root: &'a str,
    /// Tokens that a request may have in all.
    pub max_model_len: usize,
}

/// `/model_info`
#[derive(Debug, Serialize, JsonSchema)]
pub struct ModelInfo<'a> {
    /// Where the model was read from.
    pub model_path: &'a str,
    /// The same.
    pub tokenizer_path: &'a str,
    /// The name that answers carry.
    pub served_model_name: &'a str,
    /// Always: it is no embedding model.
    pub is_generation: bool,
    /// Tokens that a request may have in all.
    pub max_context_length: usize,
    /// Ids are below this.
    pub vocab_size: usize,
    /// Whether it has a chat template.
    pub has_chat_template: bool,
}

/// `/server_info`
#[derive(Debug, Serialize, JsonSchema)]
pub struct ServerInfo<'a> {
    /// As in `/model_info`.
    #[serde(flatten)]
    pub model: ModelInfo<'a>,
    /// The program's version.
    pub version: &'static str,
    /// `ready`, `draining` or `failed`.
    pub status: &'static str,
    /// Seconds since the server started.
    pub uptime_s: f64,
    /// Tokens that the KV cache holds.
    pub max_total_num_tokens: usize,
    /// Requests that run at once.
    pub max_running_requests: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// Tokens that one step computes.
    pub chunked_prefill_size: usize,
    /// Copies of the model.
    pub dp_size: usize,
}

/// `/get_load`: what there is to do.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Load {
    /// Which copy of the model.
    pub dp_rank: usize,
    /// Requests that run or wait.
    pub num_reqs: u64,
    /// Requests that wait.
    pub num_waiting_reqs: u64,
    /// Tokens in the KV cache that requests hold.
    pub num_tokens: u64,
}

/// `/v1/loads`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Loads {
    /// Seconds since 1970.
    pub timestamp: f64,
    /// The program's version.
    pub version: &'static str,
    /// Copies of the model.
    pub dp_rank_count: usize,
    /// Each copy's.
    pub loads: Vec<RankLoad>,
}

/// What one copy of the model has to do.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct RankLoad {
    /// Which.
    pub dp_rank: usize,
    /// Requests that run.
    pub num_running_reqs: u64,
    /// Requests that wait.
    pub num_waiting_reqs: u64,
    /// Requests that run or wait.
    pub num_total_reqs: u64,
    /// Tokens in the KV cache that requests hold.
    pub num_used_tokens: u64,
    /// Tokens that the KV cache holds.
    pub max_total_num_tokens: u64,
    /// The share of the KV cache that requests hold.
    pub token_usage: f64,
    /// Requests that run at once at most.
    pub max_running_requests: usize,
    /// The share of prompt tokens that were found in the prefix cache.
    pub cache_hit_rate: f64,
}

/// `/version`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Version {
    /// The program's version.
    pub version: &'static str,
}

/// `/tokenize`: a prompt, or messages.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TokenizeRequest {
    /// The model's name.
    pub model: Option<String>,
    /// A text.
    pub prompt: Option<String>,
    /// A chat.
    pub messages: Option<Vec<Map<String, Value>>>,
    /// Functions for the chat template.
    pub tools: Option<Vec<Value>>,
    /// As the model begins a prompt, with its BOS if it has one; the default.
    pub add_special_tokens: Option<bool>,
    /// Begin an answer behind the messages; the default.
    pub add_generation_prompt: Option<bool>,
    /// Report the tokens' texts as well.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub return_token_strs: bool,
}

/// Tokens.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Tokenized {
    /// How many.
    pub count: usize,
    /// Tokens that a request may have in all.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their texts, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// `/detokenize`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct DetokenizeRequest {
    /// Ids.
    pub tokens: Vec<u32>,
    /// Leave special tokens out of the text.
    #[serde(default, deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub skip_special_tokens: bool,
}

/// Text.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
    /// The same, by the name that SGLang has for it.
    pub text: String,
}

/// `/flush_cache`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Flushed {
    /// Always, when this is the answer.
    pub success: bool,
    /// Pages that were given back.
    pub pages: usize,
}
