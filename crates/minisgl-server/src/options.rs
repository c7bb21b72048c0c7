//! What can be chosen about a server.

use std::path::PathBuf;
use std::time::Duration;

/// How a server behaves. The defaults suit a machine behind a proxy as well as a bare one.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Names that requests may call the model by; the first is the one that answers carry.
    pub model_names: Vec<String>,
    /// Where the model was read from, for the information endpoints.
    pub model_path: PathBuf,
    /// Asked for as a bearer token by everything but `/health`.
    pub api_key: Option<String>,
    /// Origins whose pages may call the server; `*` for all. None are by default.
    pub cors_origins: Vec<String>,
    /// Longest request body, in bytes.
    pub body_bytes_max: usize,
    /// What bodies above 64 KiB may take together while they come and are parsed; further ones wait
    /// for room, and are told to come back when none is found within `body_timeout`.
    pub bodies_bytes_max: usize,
    /// How long a connection may take over the headers of its next request.
    pub header_timeout: Duration,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// How long a client may leave what was sent to it unread.
    pub write_timeout: Duration,
    /// How long a request may take in all, if there is a limit.
    pub request_timeout: Option<Duration>,
    /// How long requests may go on after the first signal to end.
    pub drain_timeout: Duration,
    /// How long a server whose engine has failed says so on `/health`, before it ends.
    pub failure_shown: Duration,
    /// Connections open at once; further ones wait to be accepted.
    pub connections_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            model_names: vec!["default".to_string()],
            model_path: PathBuf::new(),
            api_key: None,
            cors_origins: Vec::new(),
            body_bytes_max: 16 << 20,
            bodies_bytes_max: 256 << 20,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            request_timeout: None,
            drain_timeout: Duration::from_secs(30),
            failure_shown: Duration::from_secs(5),
            connections_max: 8192,
        }
    }
}
