//! The scheduler: requests in, tokens out, one step of the engine after another.
//!
//! It plans which tokens of which requests the engine computes next, and in which pages of the KV
//! cache. It knows token ids, lengths and pages; it knows no tensor, no device, no text and no HTTP.
//!
//! ```text
//!  Command ──►  receive ──► plan_step ──► launch ──► commit ──►  Output
//!               waiting     StepPlan      Engine     tokens
//! ```
//!
//! To read it in the order of a request's life:
//!
//! 1. [`message`]: what comes in and what goes out. [`sampling`]: what a request may ask for.
//! 2. [`scheduler`]: **the loop**. `intake`: how requests come in and end. `request`: what one has
//!    and when it ends; `tokens`: its tokens; `edits`: how its penalties and biases change logits.
//! 3. `planning`: what goes into a step: decodes, then chunks of prompts, then new requests.
//!    `admission`: who is next, and on what expectations of memory. `running`: requests that hold
//!    pages and a slot, and the states through which they go.
//! 4. [`memory`]: the KV cache as requests use it, over [`pages`] (who holds which), [`cache`] (what
//!    a prefix cache is), [`radix`] and `naive`.
//! 5. [`plan`] and [`engine`]: the contract with the engine, `StepPlan` in and `StepResult` out.
//! 6. [`stats`], [`histogram`]: what can be seen from outside. [`fake`]: an engine without a model, on which all of
//!    this is tested.
//!
//! What always holds:
//!
//! - Every page is in exactly one place: free, in the cache, or leased to one request.
//! - A request that has ended, or was preempted, keeps its pages and its slot until the last step
//!   that has it is committed.
//! - Every request that is submitted gets exactly one output with a `FinishReason`, its last.
//! - A request's tokens do not depend on overlap, chunks, cache, preemption, or who else is there.
#![forbid(unsafe_code)]

mod admission;
pub mod cache;
mod edits;
pub mod engine;
pub mod fake;
pub mod histogram;
mod intake;
pub mod memory;
pub mod message;
mod naive;
pub mod pages;
pub mod plan;
mod planning;
pub mod radix;
mod request;
mod running;
pub mod sampling;
pub mod scheduler;
pub mod stats;
mod tokens;

pub use scheduler::{SchedulePolicy, Scheduler, SchedulerOptions};
pub use stats::SchedulerStats;
