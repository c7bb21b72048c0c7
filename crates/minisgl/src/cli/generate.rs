//! `minisgl generate`

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use minisgl::batch::user_message;
use minisgl::llm::{Completion, GenerateParams, Llm, Prompt};
use minisgl::options::RuntimeOptions;
use minisgl_frontend::SubmitError;
use minisgl_text::TextError;
use serde_json::json;

use super::sampling::SamplingArgs;
use super::{batch, out};

/// Answer a prompt, or a file of them.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// The prompt; several words need no quotes
    prompt: Vec<String>,

    /// Continue the prompt as it stands, without the model's chat template
    #[arg(long, conflicts_with = "input")]
    raw: bool,

    /// A system message in front of each prompt
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "input"])]
    system: Option<String>,

    /// A file of prompts: one a line, JSONL, or the OpenAI Batch format, whose lines are answered as
    /// the server answers them, whatever sampling flags say; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt", help_heading = "Batch")]
    input: Option<PathBuf>,

    /// Where the results go, a line of JSON each; a second run continues an interrupted one
    /// [default: standard output]
    #[arg(long, value_name = "FILE", requires = "input", help_heading = "Batch")]
    output: Option<PathBuf>,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    runtime: RuntimeOptions,
}

impl GenerateArgs {
    pub(super) fn run(self) -> Result<()> {
        let params = self.sampling.params(0.0);
        params.check().map_err(|message| anyhow!(message))?;
        if let Some(input) = &self.input {
            return batch::run(input, self.output.as_deref(), &params, &self.runtime);
        }
        let prompt = self.prompt.join(" ");
        if prompt.is_empty() {
            bail!("there is no prompt; give one, or a file of them with --input");
        }
        let prompt = if self.raw {
            Prompt::Text(prompt)
        } else {
            let system = self.system.map(|text| json!({"role": "system", "content": text}));
            Prompt::Chat(system.into_iter().chain([user_message(&prompt)]).collect())
        };
        let llm = Llm::builder().options(self.runtime).build()?;
        answer(&llm, prompt, &params)
    }
}

fn answer(llm: &Llm, prompt: Prompt, params: &GenerateParams) -> Result<()> {
    let started = Instant::now();
    let (mut written, mut first) = (Ok(()), None);
    let submitted = llm.submit(prompt, params).map_err(|error| match error.downcast_ref() {
        Some(SubmitError::Text(TextError::NoTemplate)) => {
            error.context("--raw continues the prompt as it stands")
        }
        _ => error,
    })?;
    let completion = Completion::collect(submitted, |text| {
        first.get_or_insert_with(|| started.elapsed());
        if written.is_ok() {
            written = out(text);
        }
    })?;
    written?;
    out("\n")?;
    let Completion { prompt_tokens, completion_tokens, .. } = completion;
    let (first, total) = (first.unwrap_or_default().as_secs_f64(), started.elapsed().as_secs_f64());
    let decoded = completion_tokens.saturating_sub(1) as f64 / (total - first).max(1e-9);
    tracing::info!(
        "{}: {prompt_tokens} tokens in, {completion_tokens} out, first after {:.0} ms, then \
         {decoded:.0} tokens/s",
        llm.device(),
        first * 1e3
    );
    Ok(())
}
