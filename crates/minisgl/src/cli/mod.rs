//! The command line.

mod batch;
pub mod bench;
pub mod generate;
pub mod inspect;
pub mod models;
mod sampling;
pub mod serve;
pub mod shell;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

/// A small, fast LLM serving engine: an OpenAI-compatible server, a chat shell and offline
/// batches, on the CPU or on NVIDIA GPUs.
#[derive(Parser, Debug)]
#[command(
    name = "minisgl",
    version,
    after_help = "MINISGL_LOG sets the log level (error, warn, info, debug)."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a model over HTTP, as OpenAI's API; what runs where no command is named
    Serve(Box<serve::ServeArgs>),
    /// Chat with a model on this terminal
    Shell(Box<shell::ShellArgs>),
    /// Answer a prompt, or a file of them
    Generate(Box<generate::GenerateArgs>),
    /// Measure how fast a model runs
    Bench(bench::BenchArgs),
    /// List the architectures that run, and the models that are in the cache
    Models(models::ModelsArgs),
    /// Show what a model is: configuration, tensors, chat template, memory need
    Inspect(inspect::InspectArgs),
}

impl Cli {
    /// Reads the program's arguments. Flags without a command are those of `serve`, as the
    /// reference is started.
    pub fn from_args() -> Self {
        let mut args: Vec<OsString> = std::env::args_os().collect();
        let own = ["--help", "--version"].map(OsStr::new);
        let is_flag = |arg: &OsString| {
            arg.to_str().is_some_and(|arg| arg.starts_with("--")) && !own.contains(&arg.as_os_str())
        };
        if args.get(1).is_some_and(is_flag) {
            args.insert(1, "serve".into());
        }
        Self::parse_from(args)
    }

    /// Does what the command line asks for.
    ///
    /// # Errors
    /// Whatever ended the command.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Serve(args) => args.run(),
            Command::Shell(args) => args.run(),
            Command::Generate(args) => args.run(),
            Command::Bench(args) => args.run(),
            Command::Models(args) => args.run(),
            Command::Inspect(args) => args.run(),
        }
    }
}

/// Writes to standard output, where a closed pipe is an error like any other and no panic.
fn out(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// How far something has come, for people who watch; nothing where nobody does.
fn progress_bar(len: u64) -> ProgressBar {
    let bar = ProgressBar::new(len);
    let style = "{bar:30} {pos}/{len}  {msg}  {eta} left";
    bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
