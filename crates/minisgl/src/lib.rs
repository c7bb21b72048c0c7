//! Mini-SGLang in Rust: an LLM inference and serving engine.
//!
//! Reading order: `options` (what a user can say), `source` (where models come from), `devices`
//! (backends, and the engine over them), `runtime` (engine and text joined), `llm` (prompts in,
//! completions out), `batch` (files of them), `trace` and `ranges`
//! (timelines), `bench` (measuring).

pub mod batch;
pub mod bench;
pub mod devices;
pub mod llm;
pub mod options;
pub mod ranges;
pub mod runtime;
pub mod source;
pub mod trace;
