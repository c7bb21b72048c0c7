//! Prints what one decode step costs the scheduler's own thread, beside the engine:
//! `cargo run --release -p minisgl-scheduler --example plan_time`.

#![expect(clippy::print_stdout, reason = "it is what the program is for")]

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_scheduler::message::{Command, NewRequest, Output, RequestId};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::stats::{StepObserver, StepTimes};
use minisgl_scheduler::{Scheduler, SchedulerOptions};

const ROWS: usize = 256;

/// Planning and committing times of full decode steps.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Duration, Duration)>>);

impl StepObserver for Recorder {
    fn step(&self, times: &StepTimes) {
        if times.rows == ROWS && times.tokens == ROWS {
            self.0.lock().expect("nobody panics with this lock").push((times.plan, times.commit));
        }
    }

    fn text(&self, _: Instant, _: Duration, _: usize) {}
}

/// `prefix_rows_max` is what the engine asks for, and then requests begin with the same `shared` tokens.
fn measure(page_size: usize, prefix_rows_max: usize, shared: u32) -> Vec<(Duration, Duration)> {
    let limits = EngineLimits {
        page_size,
        pages: 2048 * ROWS / page_size,
        slots: ROWS,
        seq_len_max: 2048,
        step_tokens_max: 8192,
        vocab_size: 32_000,
    };
    let (commands, receiver) = channel();
    for id in 0..ROWS as u64 {
        let request = NewRequest {
            id: RequestId(id),
            prompt: (0..shared)
                .chain((0..100).map(|at| (id as u32 * 31 + at * 7) % 32_000))
                .collect(),
            params: SamplingParams { max_tokens: 800, ..SamplingParams::default() },
            prompt_logprobs: None,
            constraint: None,
        };
        commands.send(Command::Submit(Box::new(request))).expect("the scheduler has the receiver");
    }
    drop(commands);
    let engine = FakeEngine::new(FakeOptions {
        limits,
        next_token: NextToken::Position,
        prefix_rows_max,
        ..FakeOptions::default()
    });
    let recorder = Arc::new(Recorder::default());
    let options = SchedulerOptions { observer: Some(recorder.clone()), ..Default::default() };
    let scheduler = Scheduler::new(engine, options, receiver, |_: Vec<Output>| {});
    scheduler.run().expect("the fake engine does not fail");
    std::mem::take(&mut *recorder.0.lock().expect("nobody panics with this lock"))
}

fn main() {
    println!("{ROWS} decodes a step, microseconds (median, 99th percentile)");
    for page_size in [1, 16, 64] {
        for (name, prefix_rows_max, shared) in
            [("", 1, 0), ("shared prefix", 1, 512), ("shared prefix, told", 8, 512)]
        {
            let times = measure(page_size, prefix_rows_max, shared);
            let percentile = |share: f64, of: fn(&(Duration, Duration)) -> Duration| {
                let mut sorted: Vec<_> = times.iter().map(of).collect();
                sorted.sort_unstable();
                sorted[((sorted.len() - 1) as f64 * share) as usize].as_nanos() as f64 / 1000.0
            };
            let row = |what, of| {
                let (median, high) = (percentile(0.5, of), percentile(0.99, of));
                println!("  page size {page_size:>2}  {what}  {median:>6.1}  {high:>6.1}  {name}");
            };
            row("plan  ", |times| times.0);
            row("commit", |times| times.1);
            row("both  ", |times| times.0 + times.1);
        }
    }
}
