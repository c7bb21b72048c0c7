//! Requests in flight as text: tokenize, submit, detokenize, find stop strings, abort on drop.
//!
//! The server, the shell and offline batches all stand on [`Frontend`]. It knows neither HTTP nor
//! devices. Two threads work behind it: the scheduler's, and one that turns each commit's tokens
//! into text.
//!
//! ```text
//! submit ── encode ── Command::Submit ──> scheduler thread
//!                                              │ one Vec<Output> a commit
//! Generation <── mailbox <── text thread <─────┘
//! ```
//!
//! Reading order: `request` and `grammar` (what goes in), `frontend` (the road there), `text_thread` and
//! `choice` (the road back), `generation` (what comes out), `stats` (how long it took).
#![forbid(unsafe_code)]

mod choice;
mod frontend;
mod generation;
mod grammar;
mod request;
mod stats;
mod text_thread;

pub use frontend::{Frontend, FrontendOptions};
pub use generation::{Event, Generation, Usage};
pub use grammar::{Grammar, GrammarError, GrammarSource};
pub use request::{GenerateRequest, Prompt, SubmitError};
pub use stats::{FrontendStats, Outcome};
