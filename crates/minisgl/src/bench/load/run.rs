//! When each request of a load is sent: so many at once, at random times, or as a trace says.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::client::{Answer, Client};
use super::requests::LoadRequest;
use crate::bench::PythonRandom;

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// So many at once: the next when one has ended.
    Closed(usize),
    /// So many a second, at the times of a Poisson process.
    Poisson(f64),
    /// When the requests themselves say.
    Trace,
}

/// Which of OpenAI's two generating endpoints is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`, a user message each; made-up tokens are common words.
    Chat,
    /// `/v1/completions`; made-up tokens are ids below `id_end`.
    Completions {
        /// One past the largest id.
        id_end: u32,
    },
}

/// How a load is put.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The model's name.
    pub model: String,
    /// What is asked.
    pub endpoint: Endpoint,
    /// When.
    pub arrivals: Arrivals,
    /// 0 always takes the most likely token.
    pub temperature: f64,
    /// Whether answers have the length that was asked for (an extension of OpenAI's fields).
    pub ignore_eos: bool,
    /// Of the arrivals' times.
    pub seed: u64,
}

/// One request as it went.
#[derive(Clone, Debug)]
pub struct Record {
    /// When it was sent, counted from the beginning.
    pub sent: Duration,
    /// The answer, or what went wrong.
    pub outcome: Result<Answer, String>,
}

/// Counters of a load that runs.
#[derive(Debug, Default)]
pub struct LoadProgress {
    /// Requests that have ended.
    pub ended: AtomicUsize,
    /// Requests that were sent and have not ended.
    pub in_flight: AtomicUsize,
    /// Chunks with text, of all answers.
    pub chunks: AtomicUsize,
}

/// Puts a load on a server and waits for its end. Records come in the order of the requests. An
/// open load does not wait for answers before it sends.
///
/// # Errors
/// Never for what a server does: that is in the records.
pub async fn run_load(
    client: Arc<Client>,
    requests: Vec<LoadRequest>,
    options: LoadOptions,
    progress: Arc<LoadProgress>,
) -> Result<Vec<Record>> {
    let load = Arc::new(Load { client, options, progress, begun: Instant::now(), requests });
    let mut tasks = JoinSet::new();
    let mut records: Vec<Option<Record>> = vec![None; load.requests.len()];
    match load.options.arrivals {
        Arrivals::Closed(concurrency) => {
            let next = Arc::new(AtomicUsize::new(0));
            for _ in 0..concurrency.clamp(1, load.requests.len().max(1)) {
                let (load, next) = (Arc::clone(&load), Arc::clone(&next));
                tasks.spawn(async move {
                    let mut mine = Vec::new();
                    loop {
                        let index = next.fetch_add(1, Relaxed);
                        if index >= load.requests.len() {
                            return mine;
                        }
                        mine.push((index, load.one(index).await));
                    }
                });
            }
        }
        Arrivals::Poisson(_) | Arrivals::Trace => {
            for (index, at) in load.times().into_iter().enumerate() {
                tokio::time::sleep_until((load.begun + at).into()).await;
                let load = Arc::clone(&load);
                tasks.spawn(async move { vec![(index, load.one(index).await)] });
            }
        }
    }
    while let Some(done) = tasks.join_next().await {
        for (index, record) in done.context("a client's task")? {
            records[index] = Some(record);
        }
    }
    Ok(records.into_iter().flatten().collect())
}

struct Load {
    client: Arc<Client>,
    options: LoadOptions,
    progress: Arc<LoadProgress>,
    begun: Instant,
    requests: Vec<LoadRequest>,
}

impl Load {
    async fn one(&self, index: usize) -> Record {
        let body = Bytes::from(self.body(&self.requests[index]).to_string());
        let path = match self.options.endpoint {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions { .. } => "/v1/completions",
        };
        let sent = self.begun.elapsed();
        self.progress.in_flight.fetch_add(1, Relaxed);
        let chunk = || {
            self.progress.chunks.fetch_add(1, Relaxed);
        };
        let outcome = self.client.stream(path, body, chunk).await;
        self.progress.in_flight.fetch_sub(1, Relaxed);
        self.progress.ended.fetch_add(1, Relaxed);
        Record { sent, outcome: outcome.map_err(|error| format!("{error:#}")) }
    }

    fn body(&self, request: &LoadRequest) -> Value {
        let mut body = json!({
            "model": self.options.model,
            "stream": true,
            "stream_options": {"include_usage": true},
            "max_tokens": request.output_tokens,
            "temperature": self.options.temperature,
        });
        if self.options.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        match self.options.endpoint {
            Endpoint::Chat => {
                body["messages"] = json!([{"role": "user", "content": request.prompt.text()}]);
            }
            Endpoint::Completions { id_end } => {
                body["prompt"] = match request.prompt.ids(id_end) {
                    Some(ids) => json!(ids),
                    None => json!(request.prompt.text()),
                };
            }
        }
        body
    }

    /// When each request is sent.
    fn times(&self) -> Vec<Duration> {
        let mut random = PythonRandom::new(self.options.seed);
        let mut at = 0.0;
        let time = |request: &LoadRequest| match self.options.arrivals {
            Arrivals::Poisson(rate) => {
                let now = Duration::from_secs_f64(at);
                let uniform = (f64::from(random.randint(0, u32::MAX - 1)) + 0.5) / 2f64.powi(32);
                at -= uniform.ln() / rate;
                now
            }
            _ => request.at.unwrap_or_default(),
        };
        self.requests.iter().map(time).collect()
    }
}
