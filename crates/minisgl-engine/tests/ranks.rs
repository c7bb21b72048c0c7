//! A rank that fails, panics or hangs: every client is told within the time limit of the collective,
//! the engine ends, and who comes later is refused.

#[expect(dead_code, reason = "the stored logits are for other tests")]
mod tiny;
#[expect(dead_code, reason = "its ids are for other tests")]
#[path = "../../minisgl-frontend/tests/tiny/mod.rs"]
mod tiny_text;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use minisgl_cpu::{CpuBackend, CpuOptions, shared_memory_group};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_frontend::{
    Event, Frontend, FrontendOptions, GenerateRequest, Generation, Prompt, SubmitError,
};
use minisgl_scheduler::message::FinishReason;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_tensor::{Backend, BackendError, Collective, Precision, Tensor};
use tiny::Tiny;

const TIMEOUT: Duration = Duration::from_secs(1);

/// What a slow machine may take longer.
const SLACK: Duration = Duration::from_secs(3);

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
    fn meet(&self) -> Result<(), BackendError> {
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

    fn all_reduce(&self, tensor: &Tensor) -> Result<(), BackendError> {
        self.meet()?;
        self.inner.all_reduce(tensor)
    }

    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<(), BackendError> {
        self.meet()?;
        self.inner.all_gather_cols(part, out)
    }
}

fn engine(
    tiny: &Tiny,
    wrap: impl Fn(usize, Arc<dyn Collective>) -> Arc<dyn Collective>,
) -> LocalEngine {
    let options = EngineOptions {
        precision: Precision::Exact,
        page_size: 1,
        kv_size: KvSize::Pages(400),
        running_requests_max: 4,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max: 0,
        dummy_weights: false,
        note_device_times: false,
    };
    let cpu = CpuOptions { threads: Some(1), precision: Precision::Exact, ..CpuOptions::default() };
    let ends = shared_memory_group(2, TIMEOUT).into_iter().enumerate();
    let ends = ends.map(|(rank, end)| wrap(rank, end));
    let backend = || Arc::new(CpuBackend::new(cpu.clone()).unwrap()) as Arc<dyn Backend>;
    let ranks = ends.map(|end| (backend(), end)).collect();
    LocalEngine::new(Arc::new(Checkpoint::open(tiny.folder()).unwrap()), &options, ranks).unwrap()
}

fn submit(frontend: &Frontend, tiny: &Tiny) -> Result<Generation, SubmitError> {
    let params = SamplingParams { max_tokens: 40, ignore_eos: true, ..SamplingParams::default() };
    frontend.submit(GenerateRequest {
        params,
        ..GenerateRequest::new(Prompt::Tokens(tiny.prompt.clone()))
    })
}

/// Why a request ended, after everything else that came of it.
fn end(mut generation: Generation) -> FinishReason {
    loop {
        match generation.blocking_recv().expect("every request is told its end") {
            Event::Finished { reason, .. } => return reason,
            _ => continue,
        }
    }
}

#[test]
fn every_client_of_a_broken_rank_gets_an_error_in_time() {
    let tiny = Tiny::load("qwen3");
    for fault in [Fault::Fails, Fault::Panics, Fault::Hangs] {
        for faulty in [0, 1] {
            let (let_go, hang) = channel();
            let hang = Mutex::new(Some(hang));
            // Two layers have five sums a step, and the head a gathering: this is in the eleventh step.
            let engine = engine(&tiny, |rank, inner| match rank == faulty {
                false => inner,
                true => {
                    let hang = Mutex::new(hang.lock().unwrap().take().unwrap());
                    let meetings = AtomicUsize::new(0);
                    Arc::new(Faulty { inner, fault, at: 62, meetings, hang })
                }
            });
            let options = FrontendOptions::default();
            let started = Instant::now();
            let frontend = Frontend::start(engine, tiny_text::text_model(), options).unwrap();
            // Four run, the others wait.
            let clients: Vec<_> = (0..7).map(|_| submit(&frontend, &tiny).unwrap()).collect();
            let ends: Vec<FinishReason> = clients.into_iter().map(end).collect();
            // The limit, and some for a slow machine.
            assert!(started.elapsed() < TIMEOUT + SLACK, "{fault:?}, rank {faulty}");
            let said = match fault {
                Fault::Fails => "pulled the plug",
                Fault::Panics => "the test made this panic",
                Fault::Hangs => "gone or late",
            };
            for reason in ends {
                assert!(matches!(&reason, FinishReason::Error(text) if text.contains(said)));
            }
            // The engine ends, though one of its ranks may not.
            frontend.join();
            assert!(started.elapsed() < TIMEOUT + 2 * SLACK, "{fault:?}, rank {faulty}");
            assert!(!frontend.is_healthy());
            assert!(frontend.failure().unwrap().contains(said), "{:?}", frontend.failure());
            assert!(matches!(submit(&frontend, &tiny), Err(SubmitError::Unhealthy(_))));
            drop(let_go);
        }
    }
}

/// One end of a group that ends only when the others do, as NCCL's may.
struct EndsTogether {
    inner: Arc<dyn Collective>,
    ending: Arc<(Mutex<usize>, Condvar)>,
    alone: Arc<AtomicUsize>,
}

impl Collective for EndsTogether {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<(), BackendError> {
        self.inner.all_reduce(tensor)
    }

    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<(), BackendError> {
        self.inner.all_gather_cols(part, out)
    }
}

impl Drop for EndsTogether {
    fn drop(&mut self) {
        let (count, changed) = &*self.ending;
        let mut count = count.lock().unwrap();
        *count += 1;
        changed.notify_all();
        let waited = changed.wait_timeout_while(count, SLACK, |count| *count < 2).unwrap().1;
        self.alone.fetch_add(usize::from(waited.timed_out()), Ordering::SeqCst);
    }
}

#[test]
fn ranks_may_wait_for_each_others_end() {
    let tiny = Tiny::load("qwen3");
    let (ending, alone) =
        (Arc::new((Mutex::new(0), Condvar::new())), Arc::new(AtomicUsize::new(0)));
    let engine = engine(&tiny, |_, inner| {
        Arc::new(EndsTogether { inner, ending: Arc::clone(&ending), alone: Arc::clone(&alone) })
    });
    drop(engine);
    assert_eq!((*ending.0.lock().unwrap(), alone.load(Ordering::SeqCst)), (2, 0));
}
