//! A workload run through the scheduler, token ids in and token ids out: engine and scheduler
//! without text.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use minisgl_scheduler::engine::Engine;
use minisgl_scheduler::message::{Command, FinishReason, NewRequest, Output, RequestId};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::{Scheduler, SchedulerOptions, SchedulerStats};

use super::Workload;

/// What a run took, and what came out.
#[derive(Clone, Debug, Default)]
pub struct OfflineResult {
    /// From the first submission to the last token.
    pub elapsed: Duration,
    /// Tokens generated.
    pub output_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// Steps of the engine.
    pub steps: u64,
    /// Times that a request had to give its pages up.
    pub preemptions: u64,
    /// From submission to the first token, of each request.
    pub first_tokens: Vec<Duration>,
    /// Ids of each answer, in the order of the prompts.
    pub answers: Vec<Vec<u32>>,
}

impl OfflineResult {
    /// Generated tokens a second over the whole run, prefill and all, as the reference counts.
    pub fn tokens_per_s(&self) -> f64 {
        self.output_tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Runs a workload whose requests are all submitted at once, behind a short one that warms up.
/// `progress` is told how many tokens have come.
///
/// # Errors
/// If a request is refused, or the engine fails.
pub fn run_offline(
    engine: impl Engine + Send,
    options: SchedulerOptions,
    workload: &Workload,
    sampling: &SamplingParams,
    progress: impl FnMut(usize),
) -> Result<OfflineResult> {
    let (commands, commands_received) = channel();
    let (sender, outputs) = channel();
    let sink = move |news: Vec<Output>| {
        // A run that was given up does not listen.
        let _ = sender.send(news);
    };
    let scheduler = Scheduler::new(engine, options, commands_received, sink);
    let mut driver = Driver { commands, outputs, stats: scheduler.stats(), next_id: 0 };
    thread::scope(|scope| {
        let scheduler = scope.spawn(|| scheduler.run());
        let warm_up = Workload { prompts: vec![vec![0; 4]], output_lens: vec![4] };
        let ran = driver
            .run(&warm_up, sampling, |_| {})
            .and_then(|_| driver.run(workload, sampling, progress));
        // Without anybody who could submit, the scheduler ends.
        drop(driver);
        scheduler.join().map_err(|_| anyhow!("the scheduler panicked"))??;
        ran
    })
}

/// The scheduler's client.
struct Driver {
    commands: Sender<Command>,
    outputs: Receiver<Vec<Output>>,
    stats: Arc<SchedulerStats>,
    next_id: u64,
}

impl Driver {
    fn run(
        &mut self,
        workload: &Workload,
        sampling: &SamplingParams,
        mut progress: impl FnMut(usize),
    ) -> Result<OfflineResult> {
        let requests = workload.prompts.len();
        let mut result = OfflineResult {
            first_tokens: vec![Duration::ZERO; requests],
            answers: vec![Vec::new(); requests],
            ..OfflineResult::default()
        };
        let (steps, preemptions) = self.counters();
        let started = Instant::now();
        let first_id = self.next_id;
        for (prompt, &max_tokens) in workload.prompts.iter().zip(&workload.output_lens) {
            let seed = sampling.seed.wrapping_add(self.next_id - first_id);
            let request = NewRequest {
                id: RequestId(self.next_id),
                prompt: prompt.clone(),
                params: SamplingParams { max_tokens, seed, ..sampling.clone() },
                prompt_logprobs: None,
                constraint: None,
            };
            self.next_id += 1;
            // A scheduler that has ended shows below.
            let _ = self.commands.send(Command::Submit(Box::new(request)));
        }
        let mut open = requests;
        while open > 0 {
            let news = self.outputs.recv().context("the scheduler ended")?;
            let elapsed = started.elapsed();
            for output in news {
                let index = (output.id.0 - first_id) as usize;
                open -= usize::from(result.take(index, output, elapsed)?);
            }
            result.elapsed = elapsed;
            progress(result.output_tokens);
        }
        let (steps_now, preemptions_now) = self.counters();
        result.steps = steps_now - steps;
        result.preemptions = preemptions_now - preemptions;
        Ok(result)
    }

    fn counters(&self) -> (u64, u64) {
        (self.stats.steps.load(Relaxed), self.stats.preemptions.load(Relaxed))
    }
}

impl OfflineResult {
    /// Whether it was the request's last output.
    fn take(&mut self, index: usize, output: Output, elapsed: Duration) -> Result<bool> {
        if let Some(token) = output.token {
            if self.answers[index].is_empty() {
                self.first_tokens[index] = elapsed;
            }
            self.answers[index].push(token.id);
            self.output_tokens += 1;
        }
        self.cached_tokens += output.cached_tokens.unwrap_or(0) as usize;
        match output.finish {
            None => Ok(false),
            Some(FinishReason::Length | FinishReason::Stop { .. }) => Ok(true),
            Some(FinishReason::Abort) => bail!("request {index} was aborted"),
            Some(FinishReason::Refused(refusal)) => {
                Err(refusal).with_context(|| format!("request {index}"))
            }
            Some(FinishReason::ConstraintFailed(error) | FinishReason::Error(error)) => {
                bail!("request {index}: {error}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minisgl_scheduler::fake::{FakeEngine, FakeOptions};

    fn workload() -> Workload {
        Workload { prompts: vec![vec![1; 40], vec![2; 3], vec![1; 40]], output_lens: vec![5, 1, 7] }
    }

    fn run(options: FakeOptions) -> Result<OfflineResult> {
        let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
        let engine = FakeEngine::new(options);
        run_offline(engine, SchedulerOptions::default(), &workload(), &sampling, |_| {})
    }

    #[test]
    fn every_answer_has_the_length_that_was_asked_for() {
        let result = run(FakeOptions::default()).unwrap();
        assert_eq!(result.answers.iter().map(Vec::len).collect::<Vec<_>>(), [5, 1, 7]);
        assert_eq!(result.output_tokens, 13);
        assert!(result.steps >= 7 && result.steps < 20, "{} steps", result.steps);
    }

    #[test]
    fn an_engine_that_fails_ends_the_run() {
        let failing = FakeOptions { fail_at: Some(6), ..FakeOptions::default() };
        let error = run(failing).unwrap_err();
        assert!(format!("{error:#}").contains("engine failed"), "{error:#}");
    }
}
