//! The minisgl binary.

mod cli;

use std::process::ExitCode;

use minisgl::ranges::NvtxRanges;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, registry};

fn main() -> ExitCode {
    set_up_nccl();
    let cli = cli::Cli::from_args();
    let filter = EnvFilter::try_from_env("MINISGL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    // Complaining about a note that cannot be written would panic where nobody reads the notes.
    let log = fmt::layer().log_internal_errors(false).with_writer(std::io::stderr);
    registry().with(log.with_filter(filter)).with(NvtxRanges::for_profiler()).init();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough, as in `minisgl … | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Sets what NCCL takes from the environment only, unless the user has said something: to leave
/// NVLink multicast (NVLS) alone, since a program that is killed while it uses that can leave the
/// host's GPUs out of service for everybody; and to connect all ranks at once, not in the middle of
/// a graph's capture.
fn set_up_nccl() {
    for (name, value) in [("NCCL_NVLS_ENABLE", "0"), ("NCCL_RUNTIME_CONNECT", "0")] {
        if std::env::var_os(name).is_none() {
            // SAFETY: this is the program's start, nobody else reads the environment yet.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
