//! Text to tokens and back: tokenizer, chat template, incremental detokenizer, stop strings.
//!
//! [`TextModel`] is what a model says about its text, from a folder in Hugging Face layout or from
//! a GGUF file's metadata. Reading order: `text_model` (the front door), `tokenizer`, `gguf_vocab`
//! (a GGUF vocabulary made into one), `template` and `python` (chat to text), then `detokenizer` and `stop`
//! (tokens to text), `reasoning`, `tool_calls` and `call_object` (what parts of that text are).
#![forbid(unsafe_code)]

mod call_object;
mod detokenizer;
mod gguf_vocab;
mod json_values;
mod python;
mod reasoning;
mod stop;
mod template;
mod text_model;
mod tokenizer;
mod tool_calls;

pub use detokenizer::Detokenizer;
pub use gguf_vocab::{GgufTokenType, GgufVocab};
pub use json_values::{JSON_VALUES_MAX, json_values};
pub use reasoning::{Part, ReasoningSplitter};
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatRequest, ChatTemplate};
pub use text_model::{TextError, TextModel};
pub use tokenizer::{Special, Tokenizer};
pub use tool_calls::{ToolCallParser, ToolFormat, ToolPiece};
