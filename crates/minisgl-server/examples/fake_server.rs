//! The server without a model, for what has to do with the wire alone: it answers every prompt with
//! the same words.
//!
//! `cargo run --release -p minisgl-server --example fake_server -- --help`

#[path = "../../minisgl-frontend/tests/tiny/mod.rs"]
mod tiny;

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use minisgl_frontend::{Frontend, FrontendOptions};
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_server::{ServerOptions, bind, listen, serve, signals};

/// The server on an engine without a model. A token is a byte of text.
#[derive(Parser)]
struct Args {
    /// Port to listen on; 0 takes a free one, and standard error says which
    #[arg(long, default_value_t = 1919)]
    port: u16,

    /// What every prompt is answered with; where that is nothing, with `a` for ever
    #[arg(long, default_value = "Hello! How can I help you?")]
    answer: String,

    /// Say ASCII characters for ever instead, at a cost that does not grow with the sequence; for
    /// prompts of token ids below 128
    #[arg(long)]
    endless: bool,

    /// Chat template, in place of one without tools
    #[arg(long)]
    template: Option<String>,

    /// How long a step of the engine takes
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    step_us: u64,

    /// Requests that run at once
    #[arg(long, default_value_t = 256, value_name = "REQUESTS")]
    max_running_requests: usize,

    /// Requests that wait beside those that run
    #[arg(long, default_value_t = 4096, value_name = "REQUESTS")]
    max_queued_requests: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mut engine = FakeOptions::default();
    engine.limits.slots = args.max_running_requests;
    // So that it is never the pages for want of which a request waits.
    engine.limits.pages = 1 << 16;
    engine.step_time.0 = Duration::from_micros(args.step_us);
    if args.endless {
        engine.limits.vocab_size = 128;
        engine.next_token = NextToken::Position;
    } else {
        engine.limits.vocab_size = tiny::VOCAB_SIZE;
        let answer: Vec<u32> = args.answer.bytes().map(u32::from).collect();
        let end = if answer.is_empty() { u32::from(b'a') } else { tiny::EOS };
        engine.next_token = NextToken::script(answer, end);
    }
    let text = args.template.as_deref().map_or_else(tiny::text_model, tiny::with_template);
    let mut options = FrontendOptions::default();
    options.scheduler.waiting_max = args.max_queued_requests;
    let frontend = Frontend::start(FakeEngine::new(engine), text, options)?;
    let listener = listen(bind((Ipv4Addr::LOCALHOST, args.port).into())?)?;
    let signals = signals()?;
    eprintln!("Ready: http://{}", listener.local_addr()?);
    let names = vec!["tiny".to_string()];
    let options = ServerOptions { model_names: names, ..ServerOptions::default() };
    serve(frontend, options, listener, signals).await
}
