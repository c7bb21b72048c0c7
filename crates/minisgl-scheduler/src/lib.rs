//! Requests, the scheduling loop, prefix cache and page allocator.
#![forbid(unsafe_code)]

mod admission;
pub mod cache;
mod edits;
pub mod engine;
pub mod fake;
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

pub use scheduler::{Scheduler, SchedulerOptions};
pub use stats::SchedulerStats;
