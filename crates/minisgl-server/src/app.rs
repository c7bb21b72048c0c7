//! What every handler has: the engine, the options, and a place for work that takes time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use minisgl_frontend::{Frontend, GenerateRequest, Generation, Prompt, SubmitError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;
use crate::options::ServerOptions;
use crate::validate;

/// One for all connections.
pub struct App {
    /// The engine, as text.
    pub frontend: Frontend,
    /// As the server was started.
    pub options: ServerOptions,
    /// When that was.
    pub started_at: Instant,
    /// The same, in seconds since 1970.
    pub started_unix: u64,
    /// Set at the first signal to end.
    draining: AtomicBool,
    /// As many as there are cores: more threads that parse and encode would not be faster.
    workers: Arc<Semaphore>,
    /// In KiB, what large bodies may still take.
    body_room: Arc<Semaphore>,
}

impl App {
    /// An app that serves until it is told to drain.
    pub fn new(frontend: Frontend, options: ServerOptions) -> Arc<Self> {
        let room_kib = (options.bodies_bytes_max >> 10).clamp(1, Semaphore::MAX_PERMITS);
        Arc::new(Self {
            frontend,
            options,
            body_room: Arc::new(Semaphore::new(room_kib)),
            started_at: Instant::now(),
            started_unix: unix_seconds(),
            draining: AtomicBool::new(false),
            workers: Arc::new(Semaphore::new(cores())),
        })
    }

    /// Refuses requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Whether new requests can be run.
    ///
    /// # Errors
    /// 503 that says why not.
    pub fn check_ready(&self) -> Result<(), ApiError> {
        if let Some(failure) = self.frontend.failure() {
            return Err(ApiError::unavailable(format!("the engine has failed: {failure}")));
        }
        if self.draining.load(Relaxed) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        Ok(())
    }

    /// `ready`, `draining` or `failed`.
    pub fn status(&self) -> &'static str {
        match (self.frontend.is_healthy(), self.draining.load(Relaxed)) {
            (false, _) => "failed",
            (true, true) => "draining",
            (true, false) => "ready",
        }
    }

    /// Runs what takes time (parsing, templates, encoding) off the async threads. What it panics
    /// of is this request's failure alone.
    ///
    /// # Errors
    /// What `work` returns, or 500.
    pub async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<App>) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let app = Arc::clone(self);
        let worker = Arc::clone(&self.workers).acquire_owned().await;
        let run = move || {
            let _worker = worker;
            work(&app)
        };
        let panicked = |_| ApiError::internal("the request made the server panic");
        tokio::task::spawn_blocking(run).await.map_err(panicked)?
    }

    /// Waits for room for a large body of this many bytes; one that is larger than all there is
    /// waits for all of it.
    pub async fn body_room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let all = (self.options.bodies_bytes_max >> 10).clamp(1, u32::MAX as usize);
        let kib = bytes.div_ceil(1 << 10).min(all) as u32;
        Arc::clone(&self.body_room).acquire_many_owned(kib).await.ok()
    }

    /// When a request that comes now must be over.
    pub fn deadline(&self) -> Option<tokio::time::Instant> {
        let timeout = self.options.request_timeout?;
        tokio::time::Instant::now().checked_add(timeout)
    }

    /// The ids of a prompt. Not for async threads.
    ///
    /// # Errors
    /// If it cannot be encoded. `field` names the field that it came in.
    pub fn encode(&self, prompt: &Prompt, field: &'static str) -> Result<Vec<u32>, ApiError> {
        self.frontend.encode(prompt).map_err(|error| ApiError::from_submit(&error, field))
    }

    /// Encodes and submits prompts whose events come as one stream. Not for async threads.
    ///
    /// # Errors
    /// If one is too long, or cannot be run. `prompt` names the field that they came in.
    pub fn submit(
        &self,
        mut requests: Vec<GenerateRequest>,
        prompt: &'static str,
    ) -> Result<Generation, ApiError> {
        for request in &mut requests {
            let ids = self.encode(&request.prompt, prompt)?;
            validate::length(ids.len(), &request.params, self.frontend.len_max(), prompt)?;
            request.prompt = Prompt::Tokens(ids);
        }
        // Whichever field asks for several choices may ask for too many.
        let several = if requests.iter().any(|request| request.n > 1) { "n" } else { prompt };
        self.frontend.submit_all(requests).map_err(|error| match error {
            SubmitError::TooManyChoices { .. } => ApiError::invalid(several, error.to_string()),
            error => ApiError::from_submit(&error, prompt),
        })
    }

    /// The name that answers carry.
    pub fn model_name(&self) -> &str {
        self.options.model_names.first().map_or("default", String::as_str)
    }

    /// Whether a request that names a model means this one.
    ///
    /// # Errors
    /// 404.
    pub fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        let name = name.unwrap_or_default();
        let is_known = ["", "default"].contains(&name)
            || self.options.model_names.iter().any(|known| known == name);
        if is_known { Ok(()) } else { Err(ApiError::unknown_model(name)) }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Threads for blocking work that a server's Tokio runtime needs: one a core to parse and encode, one
/// to wait for the engine's end. With more, each leaves memory behind that the allocator keeps for it.
pub fn blocking_threads() -> usize {
    cores() + 1
}

/// Now, in whole seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
