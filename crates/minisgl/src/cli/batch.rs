//! `minisgl generate --input`: a file of requests, all in flight at once, results in their order.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;

use anyhow::{Context, Result};
use minisgl::batch::{BatchLine, ResultFile, read_lines};
use minisgl::llm::{Completion, GenerateParams, Llm};
use minisgl::options::RuntimeOptions;
use minisgl_frontend::Generation;
use serde_json::Value;

use super::{out, progress_bar};

pub(super) fn run(
    input: &Path,
    output: Option<&Path>,
    params: &GenerateParams,
    options: RuntimeOptions,
) -> Result<()> {
    let reader: Box<dyn Read> = if input.as_os_str() == "-" {
        Box::new(stdin())
    } else {
        Box::new(File::open(input).with_context(|| format!("opening {}", input.display()))?)
    };
    let mut lines: VecDeque<BatchLine> = read_lines(reader, params)?.into();
    let mut results = match output {
        Some(path) => Results::File(ResultFile::open(path)?),
        None => Results::Stdout,
    };
    let done = results.done().min(lines.len());
    lines.drain(..done);
    let progress = progress_bar((done + lines.len()) as u64).with_position(done as u64);
    if lines.is_empty() {
        progress.finish();
        return Ok(());
    }
    let llm = Llm::builder().options(options).build()?;
    let mut batch = Batch { llm: &llm, lines, in_flight: VecDeque::new() };
    let mut tokens = 0;
    while let Some((line, outcome)) = batch.next() {
        tokens += outcome.as_ref().map_or(0, |completion| completion.completion_tokens);
        results.append(&line.result(&outcome))?;
        let rate = tokens as f64 / progress.elapsed().as_secs_f64().max(1e-3);
        progress.set_message(format!("{rate:.0} tokens/s"));
        progress.inc(1);
    }
    progress.finish();
    match llm.frontend().failure() {
        Some(failure) => anyhow::bail!("the engine failed: {failure}"),
        None => Ok(()),
    }
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
struct Batch<'a> {
    llm: &'a Llm,
    lines: VecDeque<BatchLine>,
    in_flight: VecDeque<(BatchLine, Result<Generation, String>)>,
}

impl Batch<'_> {
    /// The next line with its outcome, after as many behind it as the engine takes were submitted.
    fn next(&mut self) -> Option<(BatchLine, Result<Completion, String>)> {
        let in_flight_max = 4 * self.llm.frontend().limits().slots;
        while self.in_flight.len() < in_flight_max
            && let Some(line) = self.lines.pop_front()
        {
            let submitted = line.request.clone().and_then(|(prompt, params)| {
                self.llm.submit(prompt, &params).map_err(|error| error.to_string())
            });
            self.in_flight.push_back((line, submitted));
        }
        let (line, submitted) = self.in_flight.pop_front()?;
        let outcome = submitted.and_then(|generation| {
            Completion::collect(generation, |_| {}).map_err(|error| error.to_string())
        });
        Some((line, outcome))
    }
}
