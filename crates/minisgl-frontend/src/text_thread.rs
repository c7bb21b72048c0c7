//! The road back: each commit's tokens become text, on a thread of its own.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use minisgl_scheduler::message::{Command, FinishReason, Output, RequestId};
use minisgl_scheduler::stats::StepObserver;

use crate::choice::ChoiceText;
use crate::frontend::Shared;

/// Owns the text of every choice in flight.
pub(crate) struct TextThread {
    outputs: Receiver<Vec<Output>>,
    commands: Sender<Command>,
    shared: Arc<Shared>,
    choices: HashMap<RequestId, ChoiceText>,
    observer: Option<Arc<dyn StepObserver>>,
}

/// Choices on their way to the text thread. Each is here before the scheduler hears of it, so the
/// text thread finds it when its first output comes.
pub(crate) struct Arrivals(Mutex<Option<Vec<(RequestId, ChoiceText)>>>);

impl Default for Arrivals {
    fn default() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }
}

impl Arrivals {
    /// Ends the choice at once if the text thread has ended.
    pub(crate) fn push(&self, id: RequestId, choice: ChoiceText, shared: &Shared) {
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *arrivals {
            Some(arrivals) => arrivals.push((id, choice)),
            None => choice.end_without_scheduler(shared),
        }
    }

    fn take(&self) -> Vec<(RequestId, ChoiceText)> {
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn close(&self) -> Vec<(RequestId, ChoiceText)> {
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.take().unwrap_or_default()
    }
}

impl TextThread {
    pub(crate) fn new(
        outputs: Receiver<Vec<Output>>,
        commands: Sender<Command>,
        shared: Arc<Shared>,
        observer: Option<Arc<dyn StepObserver>>,
    ) -> Self {
        Self { outputs, commands, shared, choices: HashMap::new(), observer }
    }

    /// Works until the scheduler is gone, then answers whoever still waits.
    pub(crate) fn run(mut self) {
        while let Ok(outputs) = self.outputs.recv() {
            let _span = tracing::debug_span!("detokenize").entered();
            let now = Instant::now();
            let tokens = outputs.len();
            self.choices.extend(self.shared.arrivals.take());
            for output in outputs {
                self.take(output, now);
            }
            if let Some(observer) = &self.observer {
                observer.text(now, now.elapsed(), tokens);
            }
        }
        self.choices.extend(self.shared.arrivals.close());
        for (_, choice) in self.choices.drain() {
            choice.end_without_scheduler(&self.shared);
        }
    }

    fn take(&mut self, output: Output, now: Instant) {
        let id = output.id;
        // A choice that a stop string ended may have tokens under way still.
        let Some(choice) = self.choices.get_mut(&id) else { return };
        let ended_by_scheduler = output.finish.is_some();
        let shared = &self.shared;
        // What one request's text does to its detokenizer is that request's affair alone.
        let taken = catch_unwind(AssertUnwindSafe(|| choice.take(output, now, shared)));
        let ended = taken.unwrap_or_else(|_| {
            let reason = FinishReason::Error("its text could not be made".into());
            choice.end("", None, reason, None, shared);
            true
        });
        if ended {
            self.choices.remove(&id);
            if !ended_by_scheduler {
                let _ = self.commands.send(Command::Abort(id));
            }
        }
    }
}
