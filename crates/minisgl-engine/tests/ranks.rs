//! A rank that fails, panics or hangs under the scheduler: every client is told within the time
//! limit of the collective, and the engine ends.

#[expect(dead_code, reason = "the stored logits are for other tests")]
mod tiny;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use minisgl_cpu::{CpuBackend, CpuOptions, shared_memory_group};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::message::{Command, FinishReason, NewRequest, Output, RequestId};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::{Scheduler, SchedulerOptions};
use minisgl_tensor::{Backend, BackendError, Collective, Precision, Result, Tensor};
use tiny::Tiny;

const TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
enum Fault {
    Fails,
    Panics,
    Hangs,
}

/// One end of a group, which does not come to its `at`th meeting.
struct Faulty {
    inner: Arc<dyn Collective>,
    fault: Fault,
    at: usize,
    meetings: AtomicUsize,
    /// A rank that hangs does so until this ends, so that the test leaves nothing running.
    hang: Mutex<Receiver<()>>,
}

impl Faulty {
    fn meet(&self) -> Result<()> {
        if self.meetings.fetch_add(1, Ordering::SeqCst) != self.at {
            return Ok(());
        }
        match self.fault {
            Fault::Fails => Err(BackendError::Device("the test pulled the plug".into())),
            Fault::Panics => panic!("the test made this panic"),
            Fault::Hangs => {
                let _ = self.hang.lock().unwrap().recv();
                Err(BackendError::Device("too late".into()))
            }
        }
    }
}

impl Collective for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<()> {
        self.meet()?;
        self.inner.all_reduce(tensor)
    }

    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<()> {
        self.meet()?;
        self.inner.all_gather_cols(part, out)
    }
}

fn engine(tiny: &Tiny, faulty: usize, fault: Fault, hang: Receiver<()>) -> LocalEngine {
    let options = EngineOptions {
        precision: Precision::Exact,
        page_size: 1,
        kv_size: KvSize::Pages(400),
        running_requests_max: 4,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max: 0,
        dummy_weights: false,
    };
    let cpu = CpuOptions { threads: Some(1), precision: Precision::Exact, ..CpuOptions::default() };
    let mut ends = shared_memory_group(2, TIMEOUT);
    // Two layers have five sums a step, and the head a gathering: this is in the eleventh step.
    let (inner, meetings) = (Arc::clone(&ends[faulty]), AtomicUsize::new(0));
    ends[faulty] = Arc::new(Faulty { inner, fault, at: 62, meetings, hang: Mutex::new(hang) });
    let backend = || Arc::new(CpuBackend::new(cpu.clone()).unwrap()) as Arc<dyn Backend>;
    let ranks = ends.into_iter().map(|end| (backend(), end)).collect();
    LocalEngine::new(Arc::new(Checkpoint::open(tiny.folder()).unwrap()), &options, ranks).unwrap()
}

fn endless(tiny: &Tiny, id: u64) -> Command {
    let params = SamplingParams { max_tokens: 40, ignore_eos: true, ..SamplingParams::default() };
    let prompt = tiny.prompt.clone();
    let id = RequestId(id);
    let request = NewRequest { id, prompt, params, prompt_logprobs: None, constraint: None };
    Command::Submit(Box::new(request))
}

#[test]
fn every_client_of_a_broken_rank_gets_an_error_in_time() {
    let tiny = Tiny::load("qwen3");
    for fault in [Fault::Fails, Fault::Panics, Fault::Hangs] {
        for faulty in [0, 1] {
            let (let_go, hang) = channel();
            let engine = engine(&tiny, faulty, fault, hang);
            let (commands, receiver) = channel();
            // Four run, the others wait.
            (0..7).for_each(|id| commands.send(endless(&tiny, id)).unwrap());
            let ends = Arc::new(Mutex::new(BTreeMap::new()));
            let noted = Arc::clone(&ends);
            let sink = move |outputs: Vec<Output>| {
                for output in outputs {
                    if let Some(reason) = output.finish {
                        noted.lock().unwrap().insert(output.id.0, reason);
                    }
                }
            };
            let started = Instant::now();
            let scheduler = Scheduler::new(engine, SchedulerOptions::default(), receiver, sink);
            let error = scheduler.run().unwrap_err().to_string();
            // The limit, the grace for those that hang, and some for a slow machine.
            assert!(started.elapsed() < TIMEOUT + Duration::from_secs(5), "{fault:?}, {faulty}");
            let said = match fault {
                Fault::Fails => "pulled the plug",
                Fault::Panics => "the test made this panic",
                Fault::Hangs => "gone or late",
            };
            assert!(error.contains(said), "{fault:?}, {faulty}: {error}");
            let ends = ends.lock().unwrap();
            assert_eq!(ends.len(), 7, "{fault:?}, rank {faulty}");
            for reason in ends.values() {
                assert!(matches!(reason, FinishReason::Error(text) if text.contains(said)));
            }
            assert!(commands.send(endless(&tiny, 9)).is_err(), "nobody takes requests any more");
            drop(let_go);
        }
    }
}
