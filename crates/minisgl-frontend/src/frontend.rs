//! The road from a request to the scheduler, and the threads behind it.

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use minisgl_scheduler::engine::{Engine, EngineError, EngineLimits};
use minisgl_scheduler::message::{Command, NewRequest, Output, Refusal, RequestId};
use minisgl_scheduler::{Scheduler, SchedulerOptions, SchedulerStats};
use minisgl_text::TextModel;

use crate::choice::ChoiceText;
use crate::generation::{Generation, Mailbox};
use crate::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarSource, STACK_BYTES};
use crate::request::{GenerateRequest, Prompt, SubmitError};
use crate::stats::FrontendStats;
use crate::text_thread::{Arrivals, TextThread};

/// Commits that may wait for the text thread before the scheduler waits for it.
const COMMITS_WAITING_MAX: usize = 64;

/// How a frontend works.
#[derive(Clone, Default)]
pub struct FrontendOptions {
    /// The scheduler's. `waiting_max` also bounds what is in flight here: the engine's slots and
    /// that many more.
    pub scheduler: SchedulerOptions,
}

/// A running engine that takes text and gives text. Clones are one frontend; dropping the last one
/// aborts what runs and waits for the engine's end, which is not for threads that others wait for.
#[derive(Clone)]
pub struct Frontend(Arc<Inner>);

struct Inner {
    text: Arc<TextModel>,
    limits: EngineLimits,
    in_flight_max: usize,
    /// Made for the first request with a grammar.
    grammars: OnceLock<Result<GrammarCompiler, GrammarError>>,
    next_id: AtomicU64,
    commands: Sender<Command>,
    shared: Arc<Shared>,
    scheduler_stats: Arc<SchedulerStats>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the frontend shares with its threads.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) stats: FrontendStats,
    /// Choices submitted and not ended.
    pub(crate) in_flight: AtomicUsize,
    pub(crate) arrivals: Arrivals,
    /// Why the engine runs no more.
    pub(crate) failure: OnceLock<String>,
}

impl Frontend {
    /// Starts the scheduler's thread, which gets the engine, and the text thread.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(
        engine: impl Engine + Send + 'static,
        text: Arc<TextModel>,
        mut options: FrontendOptions,
    ) -> Result<Self> {
        let eos_ids = &mut options.scheduler.eos_ids;
        if eos_ids.is_empty() {
            eos_ids.clone_from(&text.eos_ids);
        }
        let limits = engine.limits();
        let shared = Arc::new(Shared::default());
        let (commands, commands_received) = mpsc::channel();
        let (sender, outputs) = mpsc::sync_channel(COMMITS_WAITING_MAX);
        let observer = options.scheduler.observer.clone();
        let text_thread = TextThread::new(outputs, commands.clone(), Arc::clone(&shared), observer);

        let in_flight_max = limits.slots.saturating_add(options.scheduler.waiting_max);
        let (stats_sender, stats) = mpsc::channel();
        let failure = Arc::clone(&shared);
        let scheduler_thread = move || {
            // Outlives the scheduler, so that the text thread ends behind the failure's record.
            let until_recorded = sender.clone();
            let ended = catch_unwind(AssertUnwindSafe(|| {
                let sink = move |outputs: Vec<Output>| {
                    // A text thread that is gone has nobody left to tell.
                    let _ = sender.send(outputs);
                };
                let scheduler = Scheduler::new(engine, options.scheduler, commands_received, sink);
                let _ = stats_sender.send(scheduler.stats());
                // Whoever has been told of it finds the engine unhealthy.
                let record = |error: &EngineError| drop(failure.failure.set(error.to_string()));
                scheduler.run_and_tell(record).map_err(|error| error.to_string())
            }));
            let ended = ended.unwrap_or_else(|panic| Err(panic_message(&*panic)));
            if let Err(reason) = ended {
                tracing::error!("the scheduler ended: {reason}");
                let _ = failure.failure.set(reason);
            }
            drop(until_recorded);
        };
        // Masks are computed there, by recursion as forms are compiled.
        let scheduler = thread::Builder::new().name("scheduler".into()).stack_size(STACK_BYTES);
        let threads = vec![
            scheduler.spawn(scheduler_thread)?,
            thread::Builder::new().name("text".into()).spawn(|| text_thread.run())?,
        ];
        Ok(Self(Arc::new(Inner {
            text,
            limits,
            in_flight_max,
            grammars: OnceLock::new(),
            next_id: AtomicU64::new(0),
            commands,
            shared,
            scheduler_stats: stats.recv().context("the scheduler did not start")?,
            threads: Mutex::new(threads),
        })))
    }

    /// Encodes the prompt and submits it. Encoding takes its time on the caller's thread: not for
    /// async threads.
    ///
    /// # Errors
    /// If the request cannot be run, now or ever. What only the scheduler can tell comes as
    /// `FinishReason::Refused`.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        self.submit_all(vec![request])
    }

    /// Submits several prompts whose events come as one stream; all or none.
    ///
    /// # Errors
    /// As [`Frontend::submit`].
    pub fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Generation, SubmitError> {
        let choices = requests.iter().map(|request| request.n as usize).sum();
        let prompts: Vec<Vec<u32>> = requests
            .iter()
            .map(|request| self.encode(&request.prompt))
            .collect::<Result<_, _>>()?;
        // What can never be run is told so even while there is no room.
        for (request, prompt) in requests.iter().zip(&prompts) {
            self.check(request, prompt)?;
        }
        let reservation = self.reserve(choices)?;
        let mut generation = Generation {
            mailbox: Arc::new(Mailbox::new(choices)),
            ids: Vec::with_capacity(choices),
            prompt_tokens: Vec::with_capacity(requests.len()),
            commands: self.0.commands.clone(),
        };
        reservation.keep();
        for (request, prompt) in requests.into_iter().zip(prompts) {
            generation.prompt_tokens.push(prompt.len() as u32);
            self.send(request, prompt, &mut generation);
        }
        Ok(generation)
    }

    /// Compiles a form for answers. Takes its time, the first time most: not for async threads.
    ///
    /// # Errors
    /// If the form is wrong, or too large or complex.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, GrammarError> {
        let Inner { grammars, text, limits, .. } = &*self.0;
        let compiler = grammars.get_or_init(|| GrammarCompiler::new(text, limits.vocab_size));
        compiler.as_ref().map_err(Clone::clone)?.compile(source)
    }

    /// The ids of a prompt as `submit` has them.
    ///
    /// # Errors
    /// If a chat cannot be rendered, or a text is far too long.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, SubmitError> {
        Ok(match prompt {
            Prompt::Text(text) => self.0.text.encode_prompt(text, self.len_max())?,
            Prompt::Chat(chat) => self.0.text.encode_chat(chat, self.len_max())?,
            Prompt::Tokens(ids) => ids.clone(),
        })
    }

    fn reserve(&self, choices: usize) -> Result<Reservation<'_>, SubmitError> {
        let Inner { in_flight_max, ref shared, ref scheduler_stats, .. } = *self.0;
        if let Some(failure) = shared.failure.get() {
            return Err(SubmitError::Unhealthy(failure.clone()));
        }
        if choices > in_flight_max {
            return Err(SubmitError::TooManyChoices { choices, choices_max: in_flight_max });
        }
        let in_flight = shared.in_flight.fetch_add(choices, Relaxed);
        let reservation = Reservation { in_flight: &shared.in_flight, choices };
        if in_flight + choices > in_flight_max {
            let waiting = scheduler_stats.waiting.load(Relaxed) as usize;
            return Err(Refusal::QueueFull { waiting }.into());
        }
        Ok(reservation)
    }

    /// Refuses at once what the scheduler would refuse later.
    fn check(&self, request: &GenerateRequest, prompt: &[u32]) -> Result<(), Refusal> {
        let vocab_size = self.0.limits.vocab_size;
        let (prompt_len, prompt_len_max) = (prompt.len(), self.len_max() - 1);
        if prompt_len == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        if prompt_len > prompt_len_max {
            return Err(Refusal::PromptTooLong { prompt_len, prompt_len_max });
        }
        let biased = request.params.logit_bias.iter().map(|&(token, _)| token);
        match prompt.iter().copied().chain(biased).find(|&token| token as usize >= vocab_size) {
            Some(token) => Err(Refusal::TokenOutOfVocabulary { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// Puts the request's choices on the road. Whatever happens from here on, each is answered.
    fn send(&self, request: GenerateRequest, prompt: Vec<u32>, generation: &mut Generation) {
        let seed = request.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let prompt_len = prompt.len() as u32;
        let first = generation.ids.len();
        let n = request.n as usize;
        let first_id = self.0.next_id.fetch_add(n as u64, Relaxed);
        let mut prompts = std::iter::repeat_n(prompt, n);
        for index in 0..n {
            let id = RequestId(first_id + index as u64);
            generation.ids.push(id);
            let mut params = request.params.clone();
            params.seed = seed.wrapping_add(index as u64);
            let new = NewRequest {
                id,
                prompt: prompts.next().expect("there are n"),
                params,
                prompt_logprobs: request.prompt_logprobs.filter(|_| index == 0),
                constraint: request.grammar.as_ref().map(Grammar::constraint),
            };
            let mailbox = Arc::clone(&generation.mailbox);
            let choice =
                ChoiceText::new(&request, prompt_len, &self.0.text, mailbox, first + index);
            self.0.shared.arrivals.push(id, choice, &self.0.shared);
            // A scheduler that is gone leaves it to the text thread to say so.
            let _ = self.0.commands.send(Command::Submit(Box::new(new)));
        }
    }
}

/// Choices counted as in flight, until it turns out that they are not.
struct Reservation<'a> {
    in_flight: &'a AtomicUsize,
    choices: usize,
}

impl Reservation<'_> {
    /// Leaves the counting down to the text thread.
    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(self.choices, Relaxed);
    }
}

impl Frontend {
    /// Tokenizer and chat template.
    pub fn text(&self) -> &Arc<TextModel> {
        &self.0.text
    }

    /// What the engine can hold.
    pub fn limits(&self) -> &EngineLimits {
        &self.0.limits
    }

    /// Tokens that a request may have in all, its prompt's with them: what the model and the KV
    /// pool allow.
    pub fn len_max(&self) -> usize {
        let EngineLimits { page_size, pages, seq_len_max, .. } = self.0.limits;
        // The last token's K and V are never needed.
        seq_len_max.min(pages.saturating_mul(page_size) + 1)
    }

    /// Choices in flight: waiting, running, or on their way.
    pub fn in_flight(&self) -> usize {
        self.0.shared.in_flight.load(Relaxed)
    }

    /// Counts and latencies of requests.
    pub fn stats(&self) -> &FrontendStats {
        &self.0.shared.stats
    }

    /// The scheduler's gauges and counters.
    pub fn scheduler_stats(&self) -> &SchedulerStats {
        &self.0.scheduler_stats
    }

    /// Whether the engine has not failed.
    pub fn is_healthy(&self) -> bool {
        self.failure().is_none()
    }

    /// Why the engine runs no more.
    pub fn failure(&self) -> Option<&str> {
        self.0.shared.failure.get().map(String::as_str)
    }

    /// Empties the prefix cache of what no request uses; waits for it. Pages freed, or `None` if
    /// the scheduler has ended.
    pub fn flush_cache(&self) -> Option<usize> {
        let (reply, pages) = mpsc::sync_channel(1);
        self.0.commands.send(Command::FlushCache(reply)).ok()?;
        pages.recv().ok()
    }

    /// Lets what was submitted finish, and refuses what comes now. Does not wait; `join` does.
    pub fn drain(&self) {
        let _ = self.0.commands.send(Command::Drain);
    }

    /// Aborts what was submitted, and refuses what comes now. Does not wait; `join` does.
    pub fn shutdown(&self) {
        let _ = self.0.commands.send(Command::Shutdown);
    }

    /// Waits until the engine has ended, after `drain`, `shutdown` or a failure.
    pub fn join(&self) {
        self.0.join();
    }
}

impl Inner {
    fn join(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // What panicked there was said there.
            let _ = thread.join();
        }
    }
}

impl Drop for Inner {
    /// Waits for the engine's end: a process that ended meanwhile would take the driver's library down
    /// under it.
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Shutdown);
        self.join();
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("without a message"))
}
