//! `minisgl bench`

mod limits;
mod offline;
mod serve;
mod steps;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Measure how fast a model runs.
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// What this machine can do at best: memory reads and products a second
    Limits(limits::LimitsArgs),
    /// Many requests at once, token ids straight into the scheduler: the reference's benchmark
    Offline(Box<offline::OfflineArgs>),
    /// A load on a server: TTFT, inter-token and end-to-end times, throughput
    Serve(Box<serve::LoadArgs>),
    /// Decode steps of fixed batches and a prefill, on the bare engine
    Steps(Box<steps::StepsArgs>),
}

impl BenchArgs {
    pub(super) fn run(self) -> Result<()> {
        match self.what {
            What::Limits(args) => args.run(),
            What::Offline(args) => args.run(),
            What::Serve(args) => args.run(),
            What::Steps(args) => args.run(),
        }
    }
}
