//! `minisgl bench serve`

use std::convert::Infallible;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use minisgl::bench::load::{
    Arrivals, Client, Endpoint, LoadOptions, LoadProgress, LoadRequest, Summary, Synthetic,
    from_lines, html, read_trace, run_load,
};
use serde_json::json;

use super::offline::LenRange;
use crate::cli::{out, progress_bar};

/// Requests a second that a process of arrivals can be drawn for.
const RATES: RangeInclusive<f64> = 1e-3..=1e6;

#[derive(Args, Debug)]
pub(super) struct LoadArgs {
    /// The server; any that speaks OpenAI's protocol over plain HTTP
    #[arg(long, default_value = "http://127.0.0.1:1919", value_name = "URL")]
    base_url: String,

    /// Bearer token to send
    #[arg(long, value_name = "KEY", env = "MINISGL_API_KEY", hide_env_values = true)]
    api_key: Option<String>,

    /// The model's name [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// chat sends messages, a made-up token being a common word; completions sends token ids
    #[arg(long, value_enum, default_value_t)]
    endpoint: EndpointName,

    /// Made-up ids are below this
    #[arg(long, default_value_t = 10_000, value_name = "ID")]
    id_end: u32,

    /// Requests, of a trace at most
    #[arg(long, default_value_t = 256, value_name = "REQUESTS")]
    num_requests: usize,

    /// Closed loop: so many requests at once
    #[arg(long, default_value_t = 16, value_name = "REQUESTS")]
    concurrency: usize,

    /// Open loop: so many requests a second, at the times of a Poisson process
    #[arg(long, value_name = "REQUESTS", conflicts_with = "concurrency")]
    request_rate: Option<f64>,

    /// Prompts, one a line, or JSONL with a field prompt, taken in turn [default: made up]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Tokens of a made-up prompt, uniform: a number, or LOW..HIGH
    #[arg(long, default_value = "200", value_name = "TOKENS")]
    input_len: LenRange,

    /// Tokens of an answer, uniform; of prompts from a file, the upper end
    #[arg(long, default_value = "128", value_name = "TOKENS")]
    output_len: LenRange,

    /// Tokens in front of made-up prompts that they share
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    shared_prefix_len: u32,

    /// How many such beginnings there are
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    shared_prefixes: usize,

    /// Replay a trace: JSONL as Qwen-Bailian or Mooncake publish it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompts", "request_rate", "concurrency"])]
    trace: Option<PathBuf>,

    /// Of the trace's times; 0.5 replays it twice as fast
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    time_scale: f64,

    /// 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,

    /// Let the model end its answers
    #[arg(long)]
    use_eos: bool,

    /// Of made-up prompts and of arrivals
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Write a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum EndpointName {
    #[default]
    Chat,
    Completions,
}

impl LoadArgs {
    pub(super) fn run(self) -> Result<()> {
        let arrivals = self.arrivals()?;
        let requests = self.requests()?;
        ensure!(self.id_end > 0, "--id-end must be positive");
        ensure!(self.time_scale >= 0.0, "--time-scale must not be negative");
        let endpoint = match self.endpoint {
            EndpointName::Chat => Endpoint::Chat,
            EndpointName::Completions => Endpoint::Completions { id_end: self.id_end },
        };
        let client = Arc::new(Client::new(&self.base_url, self.api_key.as_deref())?);
        let threads = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let records = threads.block_on(async {
            let model = match &self.model {
                Some(model) => model.clone(),
                None => client.first_model().await?,
            };
            let options = LoadOptions {
                model,
                endpoint,
                arrivals,
                temperature: self.temperature,
                ignore_eos: !self.use_eos,
                seed: self.seed,
            };
            let progress = Arc::new(LoadProgress::default());
            let bar = progress_bar(requests.len() as u64);
            let records = tokio::select! {
                records = run_load(client, requests, options, Arc::clone(&progress)) => records,
                never = watch(&bar, &progress) => match never {},
            };
            // The table is not to follow it on the same line.
            bar.finish_and_clear();
            records
        })?;
        let summary = Summary::of(&records);
        if let Some(path) = &self.html {
            let page = html(&format!("A load on {}", self.base_url), &summary, &records);
            std::fs::write(path, page).with_context(|| format!("writing {}", path.display()))?;
        }
        out(&if self.json { format!("{}\n", json!(summary)) } else { summary.table() })?;
        if summary.answered == 0 {
            bail!("no request was answered");
        }
        Ok(())
    }

    fn arrivals(&self) -> Result<Arrivals> {
        if self.trace.is_some() {
            return Ok(Arrivals::Trace);
        }
        match self.request_rate {
            Some(rate) if RATES.contains(&rate) => Ok(Arrivals::Poisson(rate)),
            Some(rate) => bail!("--request-rate {rate} must be from {RATES:?}"),
            None if self.concurrency == 0 => bail!("--concurrency must be positive"),
            None => Ok(Arrivals::Closed(self.concurrency)),
        }
    }

    fn requests(&self) -> Result<Vec<LoadRequest>> {
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        };
        let requests = if let Some(path) = &self.trace {
            let trace = read_trace(&read(path)?, self.time_scale);
            let (_, mut requests) = trace.with_context(|| path.display().to_string())?;
            requests.truncate(self.num_requests);
            requests
        } else if let Some(path) = &self.prompts {
            from_lines(&read(path)?, self.num_requests, *self.output_len.0.end())
        } else {
            let ends = |range: &LenRange| (*range.0.start(), *range.0.end());
            let synthetic = Synthetic {
                requests: self.num_requests,
                input_tokens: ends(&self.input_len),
                output_tokens: ends(&self.output_len),
                prefix_tokens: self.shared_prefix_len,
                prefixes: self.shared_prefixes,
                seed: self.seed,
            };
            synthetic.draw()
        };
        ensure!(!requests.is_empty(), "there is nothing to ask");
        Ok(requests)
    }
}

/// Shows how far the load is, until it is dropped.
async fn watch(bar: &ProgressBar, progress: &LoadProgress) -> Infallible {
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let chunks = progress.chunks.load(Relaxed);
        let in_flight = progress.in_flight.load(Relaxed);
        bar.set_position(progress.ended.load(Relaxed) as u64);
        bar.set_message(format!("{in_flight} in flight, {} chunks/s", 2 * (chunks - before)));
        before = chunks;
    }
}
