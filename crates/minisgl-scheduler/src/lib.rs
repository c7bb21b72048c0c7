//! Requests, the scheduling loop, prefix cache and page allocator.
#![forbid(unsafe_code)]

pub mod engine;
pub mod message;
pub mod plan;
pub mod sampling;
