//! `minisgl serve`

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use minisgl::options::RuntimeOptions;
use minisgl::runtime::{Runtime, scheduler_options};
use minisgl_server::{ServerOptions, serve};
use tokio::net::TcpSocket;

use super::shell::{self, ShellArgs};

/// Serve a model over HTTP.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Address to listen on; 0.0.0.0 listens on every network
    #[arg(long, default_value = "127.0.0.1", help_heading = "Server")]
    host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 1919, help_heading = "Server")]
    port: u16,

    /// Bearer token that clients must send; /health stays open
    #[arg(
        long,
        value_name = "KEY",
        env = "MINISGL_API_KEY",
        hide_env_values = true,
        help_heading = "Server"
    )]
    api_key: Option<String>,

    /// Name that clients call the model by; may be given several times [default: --model]
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    served_model_name: Vec<String>,

    /// Origin whose pages may call the server, * for all; may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    cors_origin: Vec<String>,

    /// Requests that wait beside those that run; further ones get 503
    #[arg(long, default_value_t = 4096, value_name = "REQUESTS", help_heading = "Server")]
    max_queued_requests: usize,

    /// Largest request body in bytes
    #[arg(long, default_value_t = 16 << 20, value_name = "BYTES", help_heading = "Server")]
    max_body_bytes: usize,

    /// Seconds that a request may take in all [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Server")]
    request_timeout: Option<Duration>,

    /// Seconds that running requests get to finish after SIGTERM
    #[arg(
        long,
        default_value = "30",
        value_name = "SECONDS",
        value_parser = seconds,
        help_heading = "Server"
    )]
    drain_timeout: Duration,

    /// Chat on this terminal in place of serving, as `minisgl shell` does
    #[arg(long, visible_alias = "shell-mode", help_heading = "Server")]
    shell: bool,

    #[command(flatten)]
    runtime: RuntimeOptions,
}

impl ServeArgs {
    pub(super) fn run(self) -> Result<()> {
        if self.shell {
            return ShellArgs::with(self.runtime).run();
        }
        let started = Instant::now();
        allow_files();
        // A port in use shows before the model is loaded; nobody can connect until it is.
        let socket = self.bind()?;
        let mut scheduler = scheduler_options(&self.runtime)?;
        scheduler.waiting_max = self.max_queued_requests;
        let model = Runtime::start_with(&self.runtime, scheduler)?;
        let threads = tokio::runtime::Builder::new_multi_thread()
            .max_blocking_threads(minisgl_server::blocking_threads())
            .enable_all()
            .build()
            .context("starting the server's threads")?;
        let served = threads.block_on(async {
            let listener = minisgl_server::listen(socket).context("listening")?;
            let address = listener.local_addr().context("listening")?;
            // Before anybody is told that it runs: a signal must not find it half started.
            let signals = minisgl_server::signals().context("listening to signals")?;
            eprintln!(
                "{}\nReady after {:.2} s: http://{address} (documentation at /docs)",
                shell::banner(&model),
                started.elapsed().as_secs_f64()
            );
            let options = self.server_options(&model);
            serve(model.frontend, options, listener, signals).await
        });
        // What still parses or encodes has nobody left to answer.
        threads.shutdown_background();
        served
    }

    fn bind(&self) -> Result<TcpSocket> {
        let named = format!("--host {} --port {}", self.host, self.port);
        let addresses = (self.host.as_str(), self.port).to_socket_addrs();
        let addresses: Vec<SocketAddr> = addresses.with_context(|| named.clone())?.collect();
        let mut failure = anyhow!("there is no such address");
        for address in addresses {
            match minisgl_server::bind(address) {
                Ok(socket) => return Ok(socket),
                Err(error) => failure = anyhow!(error),
            }
        }
        Err(failure.context(named))
    }

    fn server_options(self, model: &Runtime) -> ServerOptions {
        let mut model_names = self.served_model_name;
        if model_names.is_empty() {
            model_names.push(model.model.clone());
        }
        ServerOptions {
            model_names,
            model_path: model.path.clone(),
            api_key: self.api_key.filter(|key| !key.is_empty()),
            cors_origins: self.cors_origin,
            body_bytes_max: self.max_body_bytes,
            request_timeout: self.request_timeout,
            drain_timeout: self.drain_timeout,
            ..ServerOptions::default()
        }
    }
}

/// A connection is a file, and shells allow few of them for want of knowing better.
fn allow_files() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        // Where that is not granted, connections wait for their turn sooner.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| "expected a number of seconds".to_string())
}
