//! What goes into the scheduler thread, and what comes out of it.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use crate::plan::TokenLogprobs;
use crate::sampling::SamplingParams;

/// Names a request from its submission to its last output; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A request as it is submitted.
pub struct NewRequest {
    /// Chosen by the submitter.
    pub id: RequestId,
    /// Never empty; ids below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// How tokens are chosen, and how many.
    pub params: SamplingParams,
    /// Report the prompt's own log-probabilities with this many alternatives. Such a request
    /// reads nothing from the prefix cache, because a cached token has no logits.
    pub prompt_logprobs: Option<u32>,
    /// What the generated tokens must conform to.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// A grammar as the scheduler sees it: it says which tokens may come next, and is told which did.
pub trait Constraint: Send {
    /// The allowed next tokens, a bit each, low bit first; `None` allows all. An error ends the
    /// request with `FinishReason::ConstraintFailed`.
    fn mask(&mut self) -> Result<Option<Arc<Vec<u32>>>, String>;
    /// Takes the token that was sampled; false when it ends what the grammar describes.
    fn advance(&mut self, token: u32) -> Result<bool, String>;
}

/// What the scheduler thread is told.
pub enum Command {
    /// A new request. Answered by outputs, the last of which carries a `FinishReason`.
    Submit(Box<NewRequest>),
    /// Ends a request wherever it is; answered by `FinishReason::Abort` unless it has ended.
    Abort(RequestId),
    /// Empties the prefix cache of everything that no request uses; answers how many pages.
    FlushCache(SyncSender<usize>),
    /// Finishes what runs and what waits, then ends the loop. Later submissions are refused.
    Drain,
    /// Aborts what runs and what waits, then ends the loop.
    Shutdown,
}

/// Takes the outputs of each commit, in one call. Must not block for long: the loop waits for it.
pub trait OutputSink: Send {
    /// All outputs of one commit, in plan order.
    fn deliver(&mut self, outputs: Vec<Output>);
}

impl<F: FnMut(Vec<Output>) + Send> OutputSink for F {
    fn deliver(&mut self, outputs: Vec<Output>) {
        self(outputs);
    }
}

/// News of one request.
#[derive(Clone, Debug)]
pub struct Output {
    /// Whose.
    pub id: RequestId,
    /// A new token, unless this output only says that the request ended.
    pub token: Option<OutputToken>,
    /// With the first output of a request that was admitted: prompt tokens found in the cache.
    pub cached_tokens: Option<u32>,
    /// With the first token: the prompt's log-probabilities, if they were asked for; the first
    /// entry is `None`.
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// Set on a request's last output.
    pub finish: Option<FinishReason>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// Its id. An EOS or stop token that ends the request is delivered, too.
    pub id: u32,
    /// If the parameters ask for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An EOS id, a stop token id, or the end of its constraint. The token that did it is
    /// `matched`.
    Stop {
        /// The token that ended it, if a token did.
        matched: Option<u32>,
    },
    /// `max_tokens` reached, or the longest sequence that the engine can hold.
    Length,
    /// By its submitter.
    Abort,
    /// It was never run: it cannot fit, or the scheduler takes no more.
    Refused(Refusal),
    /// Its constraint cannot go on, and says why.
    ConstraintFailed(Arc<str>),
    /// It, or the engine, failed.
    Error(Arc<str>),
}

/// Why a request was not run at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No token to begin with.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error("the prompt has {prompt_len} tokens, and at most {prompt_len_max} fit")]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_len: usize,
        /// Tokens that would fit.
        prompt_len_max: usize,
    },
    /// An id outside the vocabulary.
    #[error("token id {token} is not in the vocabulary of {vocab_size}")]
    TokenOutOfVocabulary {
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// The queue is full.
    #[error("{waiting} requests wait already")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
    },
    /// The scheduler is draining.
    #[error("the engine is shutting down")]
    ShuttingDown,
}
