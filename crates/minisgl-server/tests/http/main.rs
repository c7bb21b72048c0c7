//! The server over HTTP, on an engine without a model and a tokenizer of bytes.

mod bad_input;
mod faults;
mod grammars;
mod harness;
mod messages;
#[path = "../../../minisgl-frontend/tests/tiny/mod.rs"]
mod tiny;
mod wire;
