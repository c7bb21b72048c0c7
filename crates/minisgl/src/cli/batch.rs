//! `minisgl generate --input`: a file of requests, all in flight at once, results in their order.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use minisgl::batch::{Answer, BatchLine, Request, ResultFile, read_lines};
use minisgl::llm::{Completion, GenerateParams, Prompt, request};
use minisgl::options::RuntimeOptions;
use minisgl::runtime::Runtime;
use minisgl_frontend::Frontend;
use minisgl_server::{InProcess, ServerOptions};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{out, progress_bar};

pub(super) fn run(
    input: &Path,
    output: Option<&Path>,
    params: &GenerateParams,
    options: &RuntimeOptions,
) -> Result<()> {
    let reader: Box<dyn Read> = if input.as_os_str() == "-" {
        Box::new(stdin())
    } else {
        Box::new(File::open(input).with_context(|| format!("opening {}", input.display()))?)
    };
    let mut lines: VecDeque<BatchLine> = read_lines(reader, params)?.into();
    let mut results = match output {
        Some(path) => Results::File(ResultFile::open(path, lines.make_contiguous())?),
        None => Results::Stdout,
    };
    let done = results.done();
    lines.drain(..done);
    let progress = progress_bar((done + lines.len()) as u64).with_position(done as u64);
    if !lines.is_empty() {
        let mut batch = Batch::start(lines, options)?;
        let threads = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        threads.block_on(batch.run(&mut results, &progress))?;
    }
    progress.finish();
    Ok(())
}

enum Results {
    File(ResultFile),
    Stdout,
}

impl Results {
    fn done(&self) -> usize {
        match self {
            Results::File(file) => file.done(),
            Results::Stdout => 0,
        }
    }

    fn append(&mut self, record: &Value) -> Result<()> {
        match self {
            Results::File(file) => file.append(record),
            Results::Stdout => out(&format!("{record}\n")),
        }
    }
}

/// Requests on their way, in order.
struct Batch {
    model: Runtime,
    api: InProcess,
    lines: VecDeque<BatchLine>,
    in_flight: VecDeque<(BatchLine, JoinHandle<Answer>)>,
}

impl Batch {
    fn start(lines: VecDeque<BatchLine>, options: &RuntimeOptions) -> Result<Self> {
        let model = Runtime::start(options)?;
        let api = InProcess::new(
            model.frontend.clone(),
            ServerOptions {
                model_names: vec![model.model.clone()],
                body_bytes_max: usize::MAX,
                ..ServerOptions::default()
            },
        );
        Ok(Self { model, api, lines, in_flight: VecDeque::new() })
    }

    async fn run(&mut self, results: &mut Results, progress: &ProgressBar) -> Result<()> {
        loop {
            self.fill();
            let Some((line, task)) = self.in_flight.pop_front() else { return Ok(()) };
            let answer = self.watch(task, progress).await?;
            // What only failed with the engine is not written: the next run answers it.
            if let Some(failure) = self.model.frontend.failure() {
                bail!("the engine failed: {failure}");
            }
            results.append(&line.record(&answer))?;
            progress.inc(1);
        }
    }

    /// Keeps as many requests in flight as can run, and as many again to take their places.
    fn fill(&mut self) {
        let in_flight_max = 2 * self.model.frontend.limits().slots;
        while self.in_flight.len() < in_flight_max
            && let Some(line) = self.lines.pop_front()
        {
            let (api, frontend) = (self.api.clone(), self.model.frontend.clone());
            let request = line.request.clone();
            let task = tokio::spawn(async move {
                match request {
                    Ok(Request::Api { path, body }) => call(&api, path, body).await,
                    Ok(Request::Prompt(prompt, params)) => {
                        let completion = complete(frontend, prompt, params).await;
                        completion
                            .map_or_else(|e| Answer::Error(format!("{e:#}")), Answer::Completion)
                    }
                    Err(message) => Answer::Error(message),
                }
            });
            self.in_flight.push_back((line, task));
        }
    }

    /// Waits for an answer, and tells meanwhile how fast all of them come.
    async fn watch(&self, mut task: JoinHandle<Answer>, progress: &ProgressBar) -> Result<Answer> {
        let stats = self.model.frontend.scheduler_stats();
        loop {
            let answer = tokio::time::timeout(Duration::from_millis(500), &mut task).await;
            let tokens = stats.generated_tokens.load(Relaxed);
            let rate = tokens as f64 / progress.elapsed().as_secs_f64().max(1e-3);
            progress.set_message(format!("{rate:.0} tokens/s"));
            if let Ok(answer) = answer {
                return answer.context("a request panicked");
            }
        }
    }
}

/// Encoding takes a while, which is no work for an async thread.
async fn complete(
    frontend: Frontend,
    prompt: Prompt,
    params: GenerateParams,
) -> Result<Completion> {
    let submit = move || frontend.submit(request(prompt, &params));
    let generation = tokio::task::spawn_blocking(submit).await.context("a request panicked")??;
    Completion::read(generation).await
}

async fn call(api: &InProcess, path: &str, body: String) -> Answer {
    let (status, body) = api.post(path, body).await;
    let text = || json!(String::from_utf8_lossy(&body));
    let body = serde_json::from_slice(&body).unwrap_or_else(|_| text());
    Answer::Api { status, body }
}
