//! What the front end costs: HTTP, JSON, detokenizing and scheduling, on an engine that answers at
//! once. The load generator is in the same process and on the same cores.
//!
//! `cargo run --release -p minisgl-server --example front_end -- [streams] [tokens a stream]`
#![expect(clippy::print_stdout, reason = "what it measures is for the terminal")]

#[path = "../../minisgl-frontend/tests/tiny/mod.rs"]
mod tiny;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use minisgl_frontend::{Frontend, FrontendOptions};
use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_server::{ServerOptions, serve_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (streams, tokens) = (number(256)?, number(2000)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // A step every 2 ms, so that each token can be a chunk of its own. Memory first, before
        // there is any that was used and given back.
        let paced = start(Duration::from_millis(2), streams).await?;
        memory(&paced, streams).await?;
        print!("with steps of 2 ms: ");
        throughput(&paced, streams, tokens).await?;
        drop(paced);
        let fast = start(Duration::ZERO, streams).await?;
        first_tokens(&fast).await?;
        throughput(&fast, streams, tokens).await?;
        Ok(())
    })
}

struct Server {
    address: SocketAddr,
    frontend: Frontend,
    _signals: mpsc::Sender<()>,
}

async fn start(step_time: Duration, slots: usize) -> Result<Server> {
    let limits = EngineLimits {
        page_size: 16,
        pages: 1 << 16,
        slots,
        seq_len_max: 16_384,
        step_tokens_max: 4096,
        // ASCII, so that each token is one character of text.
        vocab_size: tiny::VOCAB_SIZE.min(128),
    };
    let engine = FakeEngine::new(FakeOptions {
        limits,
        next_token: NextToken::Position,
        step_time: (step_time, Duration::ZERO),
        fail_at: None,
    });
    let frontend = Frontend::start(engine, tiny::text_model(), FrontendOptions::default())?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let (_signals, received) = mpsc::channel(1);
    let options = ServerOptions::default();
    tokio::spawn(serve_until(frontend.clone(), options, listener, received));
    Ok(Server { address, frontend, _signals })
}

fn request(tokens: usize) -> Vec<u8> {
    let body = format!(
        r#"{{"prompt": "hello there", "stream": true, "max_tokens": {tokens}, "ignore_eos": true, "stream_options": {{"include_usage": true}}}}"#
    );
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Reads an answer to its end; when its first text came, how many pieces and how many tokens.
async fn stream(address: SocketAddr, tokens: usize) -> Result<(Duration, usize, usize)> {
    let mut socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    let begun = Instant::now();
    socket.write_all(&request(tokens)).await?;
    let (mut first, mut chunks) = (None, 0);
    let mut buffer = vec![0; 16 << 10];
    let mut tail: Vec<u8> = Vec::new();
    loop {
        let read = socket.read(&mut buffer).await?;
        if read == 0 {
            break;
        }
        let text = &buffer[..read];
        first.get_or_insert_with(|| begun.elapsed());
        chunks += text.windows(8).filter(|window| window == b"\"text\":\"").count();
        tail.extend_from_slice(text);
        tail.drain(..tail.len().saturating_sub(600));
    }
    let tail = String::from_utf8_lossy(&tail);
    ensure!(tail.contains("data: [DONE]"), "a stream broke off: {tail}");
    let usage = tail.split("\"completion_tokens\":").nth(1).context("there is no usage")?;
    let count = usage.split(',').next().unwrap_or_default().parse()?;
    Ok((first.context("an empty answer")?, chunks, count))
}

async fn first_tokens(server: &Server) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..500 {
        times.push(stream(server.address, 1).await?.0);
    }
    times.sort_unstable();
    let at = |share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e3;
    println!("time to first token, one stream: p50 {:.3} ms, p99 {:.3} ms", at(0.5), at(0.99));
    Ok(())
}

async fn throughput(server: &Server, streams: usize, tokens: usize) -> Result<()> {
    let begun = Instant::now();
    let clients: Vec<_> =
        (0..streams).map(|_| tokio::spawn(stream(server.address, tokens))).collect();
    let (mut total, mut pieces) = (0, 0);
    for client in clients {
        let (_, chunks, count) = client.await??;
        ensure!(count == tokens, "{count} tokens of {tokens}");
        total += count;
        pieces += chunks;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{streams} streams: {total} tokens in {seconds:.2} s, {:.0} tokens/s, {:.1} tokens a chunk",
        total as f64 / seconds,
        total as f64 / pieces.max(1) as f64
    );
    Ok(())
}

/// Open streams whose clients do not read, so that only the server's side is in this process.
async fn memory(server: &Server, streams: usize) -> Result<()> {
    stream(server.address, 100).await?;
    let before = resident_bytes()?;
    let mut open = Vec::new();
    for _ in 0..streams {
        let mut socket = TcpStream::connect(server.address).await?;
        socket.write_all(&request(16_000)).await?;
        open.push(socket);
    }
    while server.frontend.in_flight() < streams {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let grown = resident_bytes()?.saturating_sub(before);
    println!(
        "memory: {:.1} kB a stream, over {streams} streams",
        grown as f64 / 1e3 / streams as f64
    );
    Ok(())
}

fn resident_bytes() -> Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.context("no VmRSS")?.trim().trim_end_matches("kB").trim();
    Ok(kib.parse::<usize>()? * 1024)
}
