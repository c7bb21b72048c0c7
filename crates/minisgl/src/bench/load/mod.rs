//! A load on an OpenAI server, and what it found.
//!
//! Reading order: `requests` and `trace` (what is asked), `client` (one answer), `run` (when each
//! is asked), `summary` (figures), `report` (a page of plots).

mod client;
mod report;
mod requests;
mod run;
mod summary;
mod trace;

pub use client::{Answer, Client, Usage};
pub use report::html;
pub use requests::{LoadPrompt, LoadRequest, Run, Synthetic, from_lines};
pub use run::{Arrivals, Endpoint, LoadOptions, LoadProgress, Record, run_load};
pub use summary::{Percentiles, Summary};
pub use trace::{TraceForm, read_trace};
