//! `/v1/chat/completions`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Usage, or_null};

/// The fields that only chat completions have.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct ChatFields {
    /// The conversation, in OpenAI's form: roles system, developer, user, assistant and tool;
    /// content as a string, a list of text parts, or null.
    pub messages: Vec<Map<String, Value>>,
    /// Functions that the model may call.
    #[serde(default)]
    pub tools: Option<Vec<Value>>,
    /// `auto`, `none`, `required`, or a function that must be called.
    #[serde(default)]
    pub tool_choice: Option<Value>,
    /// The form of the answer: `text`, `json_object` or `json_schema`.
    #[serde(default)]
    pub response_format: Option<Value>,
    /// A regular expression that the whole text matches.
    #[serde(default)]
    pub regex: Option<String>,
    /// A grammar in Lark's notation that the whole text follows.
    #[serde(default)]
    pub grammar: Option<String>,
    /// Report log-probabilities.
    #[serde(default, deserialize_with = "or_null")]
    pub logprobs: bool,
    /// Alternatives to report for each token, 0 to 20.
    #[serde(default)]
    pub top_logprobs: Option<i64>,
    /// Begin an answer behind the messages; the default.
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
    /// Continue the last message, which is the assistant's, instead.
    #[serde(default, deserialize_with = "or_null")]
    pub continue_final_message: bool,
    /// Further variables for the chat template.
    #[serde(default, deserialize_with = "or_null")]
    pub chat_template_kwargs: Map<String, Value>,
}

/// The whole answer.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatCompletion<'a> {
    /// Names the answer.
    pub id: &'a str,
    /// `chat.completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: &'a str,
    /// The answers.
    pub choices: Vec<ChatChoice>,
    /// What they took.
    pub usage: Usage,
}

/// One answer.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatChoice {
    /// From 0.
    pub index: usize,
    /// The answer.
    pub message: AssistantMessage,
    /// Of its tokens, if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: &'static str,
    /// The stop string or token that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

/// The assistant's message.
#[derive(Debug, Serialize, JsonSchema)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    /// What it says; null where it only calls functions.
    pub content: Option<String>,
    /// What it thought first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The functions it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// A call of a function.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ToolCall {
    /// Which of the message's calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// Names the call; in a stream, only in its first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    /// What is called.
    pub function: FunctionCall,
}

/// A function's name and arguments.
#[derive(Debug, Serialize, JsonSchema)]
pub struct FunctionCall {
    /// In a stream, only in the call's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// JSON, as the model wrote it; in a stream, a piece of it.
    pub arguments: String,
}

/// A piece of a streamed answer.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatChunk<'a> {
    /// The same in all pieces.
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: &'a str,
    /// One, or none in the chunk that reports usage.
    pub choices: Vec<ChunkChoice<'a>>,
    /// If `stream_options` asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A piece of one choice.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct ChunkChoice<'a> {
    /// Which choice.
    pub index: usize,
    /// What is new.
    pub delta: Delta<'a>,
    /// Of the new tokens, if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Set in the choice's last chunk.
    pub finish_reason: Option<&'static str>,
    /// The stop string or token that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

/// What a piece adds.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct Delta<'a> {
    /// `assistant`, in the choice's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    /// More of what it thinks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    /// More of its calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// What ended a choice, where it was not the end-of-sequence token.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// A stop token's id.
    Token(u32),
}

/// Log-probabilities of a message's tokens.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct ChatLogprobs {
    /// One for each token.
    pub content: Vec<TokenLogprob>,
}

/// A token, with its alternatives.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TokenLogprob {
    /// The token itself.
    #[serde(flatten)]
    pub token: Candidate,
    /// The most likely tokens in its place.
    pub top_logprobs: Vec<Candidate>,
}

/// A token and how likely it is.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Candidate {
    /// Its text, with U+FFFD for what is not UTF-8.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}
