//! Mini-SGLang in Rust: an LLM inference and serving engine.
//!
//! Reading order: `options` (what a user can say), `source` (where models come from), `llm`
//! (prompts in, completions out), `batch` (files of them), `bench` (workloads for measuring).

pub mod batch;
pub mod bench;
pub mod llm;
pub mod options;
pub mod source;
