//! The OpenAI-compatible HTTP server.
//!
//! A request comes through `router` to the handler of its endpoint. There its body is read and
//! parsed (`body`, `wire`), its fields are checked (`validate`), and it is submitted to the
//! [`Frontend`](minisgl_frontend::Frontend). Its events come back as one answer or as a stream
//! (`reply`), in the endpoint's own form.
//!
//! Reading order: `listener` and `serve` (connections), `router`, `chat`, `reply`, then the other endpoints:
//! `completions`, `native` (SGLang's `/generate`), `info`, `metrics`, `openapi`. `in_process` is the
//! same without a network, for files of requests. The server knows no device and no model.
#![forbid(unsafe_code)]

mod app;
mod body;
mod chat;
mod completions;
mod error;
mod head;
mod in_process;
mod info;
mod listener;
mod logprobs;
mod message;
mod metrics;
mod native;
mod openapi;
mod options;
mod reply;
mod router;
mod serve;
mod tools;
mod validate;
mod wire;

pub use app::blocking_threads;
pub use in_process::InProcess;
pub use listener::{bind, listen};
pub use options::ServerOptions;
pub use serve::{serve, signals};
