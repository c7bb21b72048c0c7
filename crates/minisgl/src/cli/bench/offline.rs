//! `minisgl bench offline`

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use minisgl::bench::{OfflineResult, Workload, WorkloadSpec, run_offline};
use minisgl::devices::LoadedEngine;
use minisgl::options::RuntimeOptions;
use minisgl::runtime::scheduler_options;
use minisgl_engine::Checkpoint;
use minisgl_scheduler::engine::Engine;
use minisgl_scheduler::sampling::SamplingParams;
use serde_json::json;

use crate::cli::{out, progress_bar};

/// Ids are drawn up to here, as the reference draws them.
const ID_MAX: u32 = 10_000;

#[derive(Args, Debug)]
pub(super) struct OfflineArgs {
    /// Requests
    #[arg(long, default_value_t = 256, value_name = "REQUESTS")]
    num_seqs: usize,

    /// Prompt lengths, uniform: a number, or LOW..HIGH with both ends in it
    #[arg(long, default_value = "100..1024", value_name = "TOKENS")]
    input_len: LenRange,

    /// Answer lengths, uniform
    #[arg(long, default_value = "100..1024", value_name = "TOKENS")]
    output_len: LenRange,

    /// Of the draw; the same seed draws what the reference's Python does
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// 0 always takes the most likely token
    #[arg(long, default_value_t = 0.6)]
    temperature: f32,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    runtime: RuntimeOptions,
}

impl OfflineArgs {
    pub(super) fn run(self) -> Result<()> {
        let started = Instant::now();
        let checkpoint = Checkpoint::open(self.runtime.locator().locate()?)?;
        let loaded = LoadedEngine::load(checkpoint, &self.runtime)?;
        let ready = started.elapsed();
        let workload = Workload::draw(&WorkloadSpec {
            num_seqs: self.num_seqs,
            input_len: self.input_len.0.clone(),
            output_len: self.output_len.0.clone(),
            id_max: ID_MAX.min(loaded.engine.limits().vocab_size as u32 - 1),
            seed: self.seed,
        });
        let sampling = SamplingParams {
            temperature: self.temperature,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let mut options = scheduler_options(&self.runtime)?;
        options.waiting_max = options.waiting_max.max(self.num_seqs);
        let progress = progress_bar(workload.output_tokens() as u64);
        let result = run_offline(loaded.engine, options, &workload, &sampling, |tokens| {
            progress.set_position(tokens as u64);
        })?;
        progress.finish_and_clear();
        self.print(&loaded.device, ready, &workload, result)
    }

    fn print(
        &self,
        device: &str,
        ready: Duration,
        workload: &Workload,
        mut result: OfflineResult,
    ) -> Result<()> {
        let input_tokens = workload.input_tokens();
        let (seconds, rate) = (result.elapsed.as_secs_f64(), result.tokens_per_s());
        result.first_tokens.sort_unstable();
        let first_ms = |share: f64| {
            let last = result.first_tokens.len().saturating_sub(1);
            let at = (last as f64 * share).round() as usize;
            result.first_tokens.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        let OfflineResult { output_tokens, cached_tokens, steps, preemptions, .. } = result;
        if self.json {
            return out(&format!(
                "{}\n",
                json!({
                    "device": device, "ready_s": ready.as_secs_f64(), "requests": self.num_seqs,
                    "input_tokens": input_tokens, "output_tokens": output_tokens,
                    "cached_tokens": cached_tokens, "seconds": seconds, "tokens_per_s": rate,
                    "first_token_ms": {"p50": first_ms(0.5), "p99": first_ms(0.99)},
                    "steps": steps, "preemptions": preemptions,
                })
            ));
        }
        let requests = self.num_seqs;
        out(&format!(
            "{device}\n\
             ready          {ready:>11.2} s\n\
             requests       {requests:>11}\n\
             tokens in      {input_tokens:>11}    {cached_tokens} from the cache\n\
             tokens out     {output_tokens:>11}\n\
             steps          {steps:>11}    {preemptions} preemptions\n\
             time           {seconds:>11.2} s\n\
             throughput     {rate:>11.0} tokens/s generated\n\
             first token    {p50:>11.0} ms at the median, {p99:.0} ms at the 99th percentile\n",
            ready = ready.as_secs_f64(),
            p50 = first_ms(0.5),
            p99 = first_ms(0.99),
        ))
    }
}

/// A uniform range of lengths.
#[derive(Clone, Debug)]
pub(super) struct LenRange(pub(super) RangeInclusive<u32>);

impl FromStr for LenRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (low, high) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.trim_start_matches('=').parse::<u32>().ok();
        match (number(low), number(high)) {
            (Some(low), Some(high)) if (1..=high).contains(&low) => Ok(Self(low..=high)),
            _ => Err("expected a positive number, or two like 100..1024".to_string()),
        }
    }
}
