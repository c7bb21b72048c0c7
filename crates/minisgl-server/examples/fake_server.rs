//! The server without a model, for clients of which only the wire is to be tested: it answers
//! every prompt with the same words.
//!
//! `cargo run --release -p minisgl-server --example fake_server -- [port] [answer]`
//!
//! Port 0 takes a free one; the address is written to standard error. `-` in place of the answer
//! says ASCII characters for ever, at a cost that does not grow with the sequence: for measuring the
//! front end, with prompts of token ids below 128.

#[path = "../../minisgl-frontend/tests/tiny/mod.rs"]
mod tiny;

use anyhow::Result;
use minisgl_frontend::{Frontend, FrontendOptions};
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_server::{ServerOptions, serve};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let port = arguments.next().map_or(Ok(1919), |port| port.parse())?;
    let answer = arguments.next().unwrap_or_else(|| "Hello! How can I help you?".to_string());
    let mut options = FakeOptions::default();
    if answer == "-" {
        options.limits.vocab_size = 128;
        options.next_token = NextToken::Position;
    } else {
        options.limits.vocab_size = tiny::VOCAB_SIZE;
        options.next_token = NextToken::script(answer.bytes().map(u32::from).collect(), tiny::EOS);
    }
    let engine = FakeEngine::new(options);
    let frontend = Frontend::start(engine, tiny::text_model(), FrontendOptions::default())?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    eprintln!("Ready: http://{}", listener.local_addr()?);
    let names = vec!["tiny".to_string()];
    serve(frontend, ServerOptions { model_names: names, ..ServerOptions::default() }, listener)
        .await
}
