//! What comes out of a submission: events, for whoever waits for them.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::mem;
use std::pin::pin;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use minisgl_scheduler::message::{Command, FinishReason, OutputToken, RequestId};
use minisgl_scheduler::plan::TokenLogprobs;

/// News of one choice. Choices are numbered over all prompts of a submission: with `n` a prompt,
/// the first prompt's are `0..n`, the next one's begin at `n`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Log-probabilities of the prompt, before anything else of the prompt's first choice. The
    /// first entry is `None`.
    Prompt {
        /// Which choice.
        choice: usize,
        /// One for each token of the prompt.
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// More text. What came since the last event is one event: a slow reader gets fewer, longer
    /// ones.
    Text {
        /// Which choice.
        choice: usize,
        /// May lag behind `tokens`: half a character and what may become a stop string are held
        /// back.
        text: String,
        /// The new tokens, the one that ended the choice included.
        tokens: Vec<OutputToken>,
    },
    /// The choice has ended.
    Finished {
        /// Which choice.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// The stop string that ended it, if one did.
        stop: Option<String>,
        /// What it took.
        usage: Usage,
    },
}

/// Tokens of one choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In its prompt.
    pub prompt_tokens: u32,
    /// Of them, found in the prefix cache.
    pub cached_tokens: u32,
    /// Generated, the one that ended it included.
    pub completion_tokens: u32,
}

/// The events of one submission. Dropping it aborts what has not ended.
#[derive(Debug)]
pub struct Generation {
    pub(crate) mailbox: Arc<Mailbox>,
    /// Request ids of the choices, in order.
    pub(crate) ids: Vec<RequestId>,
    /// Tokens in each prompt.
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) commands: Sender<Command>,
}

impl Generation {
    /// Tokens in the prompts together.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens.iter().sum()
    }

    /// Choices over all prompts.
    pub fn choices(&self) -> usize {
        self.ids.len()
    }

    /// The next event; `None` when every choice has ended.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    /// [`Generation::recv`], for threads.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            match pin!(self.recv()).poll(&mut context) {
                Poll::Ready(event) => return event,
                Poll::Pending => thread::park(),
            }
        }
    }

    /// [`Generation::recv`], for streams and futures written by hand.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut letters = self.mailbox.lock();
        match letters.pop() {
            Some(event) => Poll::Ready(Some(event)),
            None if letters.open == 0 => Poll::Ready(None),
            None => {
                letters.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let open: Vec<RequestId> = {
            let letters = self.mailbox.lock();
            let open = self.ids.iter().zip(&letters.choices);
            open.filter(|(_, choice)| !choice.ended).map(|(&id, _)| id).collect()
        };
        for id in open {
            // A scheduler that is gone has nothing left to abort.
            let _ = self.commands.send(Command::Abort(id));
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Between the text thread and one reader. There is one place for each choice, and what is not
/// read yet is joined there, so that a reader who never comes costs no more than the answer itself.
#[derive(Debug)]
pub(crate) struct Mailbox(Mutex<Letters>);

#[derive(Debug)]
pub(crate) struct Letters {
    choices: Vec<Unread>,
    /// Choices with something unread, in the order in which they came.
    news: VecDeque<usize>,
    /// Choices that have not ended.
    open: usize,
    reader: Option<Waker>,
}

/// What one choice's reader has not read.
#[derive(Debug, Default)]
struct Unread {
    prompt: Option<Vec<Option<TokenLogprobs>>>,
    text: String,
    tokens: Vec<OutputToken>,
    finish: Option<Finish>,
    /// Nothing will be added.
    ended: bool,
}

/// The end of a choice.
#[derive(Debug)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    pub(crate) stop: Option<String>,
    pub(crate) usage: Usage,
}

impl Mailbox {
    pub(crate) fn new(choices: usize) -> Self {
        Self(Mutex::new(Letters {
            choices: (0..choices).map(|_| Unread::default()).collect(),
            news: VecDeque::new(),
            open: choices,
            reader: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deliver_prompt(&self, choice: usize, logprobs: Vec<Option<TokenLogprobs>>) {
        self.lock().unread(choice).prompt = Some(logprobs);
    }

    pub(crate) fn deliver(
        &self,
        choice: usize,
        text: &str,
        token: Option<OutputToken>,
        finish: Option<Finish>,
    ) {
        let mut letters = self.lock();
        letters.open -= usize::from(finish.is_some());
        let unread = letters.unread(choice);
        unread.text.push_str(text);
        unread.tokens.extend(token);
        unread.ended |= finish.is_some();
        unread.finish = finish;
        let reader = letters.reader.take();
        drop(letters);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

impl Letters {
    /// The place of a choice that is about to get news.
    fn unread(&mut self, choice: usize) -> &mut Unread {
        let unread = &mut self.choices[choice];
        if unread.is_empty() {
            self.news.push_back(choice);
        }
        unread
    }

    fn pop(&mut self) -> Option<Event> {
        let &choice = self.news.front()?;
        let unread = &mut self.choices[choice];
        let event = if let Some(logprobs) = unread.prompt.take() {
            Event::Prompt { choice, logprobs }
        } else if !unread.tokens.is_empty() || !unread.text.is_empty() {
            let (text, tokens) = (mem::take(&mut unread.text), mem::take(&mut unread.tokens));
            Event::Text { choice, text, tokens }
        } else {
            let Finish { reason, stop, usage } = unread.finish.take()?;
            Event::Finished { choice, reason, stop, usage }
        };
        if unread.is_empty() {
            self.news.pop_front();
        }
        Some(event)
    }
}

impl Unread {
    fn is_empty(&self) -> bool {
        let Unread { prompt, text, tokens, finish, ended: _ } = self;
        prompt.is_none() && text.is_empty() && tokens.is_empty() && finish.is_none()
    }
}
