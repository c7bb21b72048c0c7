//! `minisgl bench steps`

use anyhow::Result;
use clap::Args;
use minisgl::bench::StepBench;
use minisgl::devices::LoadedEngine;
use minisgl::options::RuntimeOptions;
use minisgl_engine::Checkpoint;
use serde_json::json;

use crate::cli::out;

#[derive(Args, Debug)]
pub(super) struct StepsArgs {
    /// Batch sizes to decode
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,32,64,128,256",
        value_name = "REQUESTS"
    )]
    batch: Vec<usize>,

    /// Context of each request when measuring begins
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    context: usize,

    /// Of that, what all requests begin with in common: whole pages
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    shared_prefix: usize,

    /// Steps whose mean is reported
    #[arg(long, default_value_t = 128)]
    steps: usize,

    /// Prompts of the prefill; 0 leaves it out
    #[arg(long, default_value_t = 32)]
    prefill_prompts: usize,

    /// Tokens in each of them
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    prefill_len: usize,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    runtime: RuntimeOptions,
}

impl StepsArgs {
    pub(super) fn run(mut self) -> Result<()> {
        let largest = self.batch.iter().copied().max().unwrap_or(1).max(self.prefill_prompts);
        self.runtime.max_running_requests.get_or_insert(largest);
        let checkpoint = Checkpoint::open(self.runtime.locator().locate()?)?;
        let loaded = LoadedEngine::load(checkpoint, &self.runtime)?;
        let mut bench = StepBench::new(loaded.engine);
        bench.share(self.shared_prefix);
        let (mut text, mut decode) = (format!("{}\n", loaded.device), Vec::new());
        for &batch in &self.batch {
            let step_ms = bench.decode(batch, self.context, self.steps)?.as_secs_f64() * 1e3;
            let rate = batch as f64 / step_ms * 1e3;
            text +=
                &format!("decode   batch {batch:>4}  {step_ms:>9.3} ms  {rate:>9.0} tokens/s\n");
            decode.push(json!({"batch": batch, "step_ms": step_ms, "tokens_per_s": rate}));
        }
        let mut prefill = None;
        if self.prefill_prompts > 0 {
            let (prompts, len) = (self.prefill_prompts, self.prefill_len);
            let seconds = bench.prefill(prompts, len)?.as_secs_f64();
            let rate = (prompts * len) as f64 / seconds;
            text += &format!(
                "prefill  {prompts:>3} x {len:<5} {seconds:>8.3} s   {rate:>9.0} tokens/s\n"
            );
            prefill = Some(json!({
                "prompts": prompts, "len": len, "seconds": seconds, "tokens_per_s": rate,
            }));
        }
        if !self.json {
            return out(&text);
        }
        let result = json!({
            "device": loaded.device, "context": self.context,
            "shared_prefix": self.shared_prefix, "steps": self.steps,
            "decode": decode, "prefill": prefill,
        });
        out(&format!("{result}\n"))
    }
}
