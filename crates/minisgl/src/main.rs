//! The minisgl binary.

mod cli;

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    leave_multicast_off();
    let cli = cli::Cli::from_args();
    let filter = EnvFilter::try_from_env("MINISGL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
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

/// Tells NCCL to leave NVLink multicast (NVLS) alone, unless the user has said something: when a
/// program that uses it is killed, the host's GPUs can be out of service for everybody. NCCL takes
/// this from the environment only.
fn leave_multicast_off() {
    const SWITCH: &str = "NCCL_NVLS_ENABLE";
    if std::env::var_os(SWITCH).is_none() {
        // SAFETY: this is the program's start, nobody else reads the environment yet.
        unsafe { std::env::set_var(SWITCH, "0") };
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
