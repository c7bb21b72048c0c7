//! Connections: accepting them, bounding them, and letting them end.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use minisgl_frontend::Frontend;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Sleep, sleep};

use crate::app::App;
use crate::options::ServerOptions;
use crate::router::router;

/// Longest head of a request; a longer one is answered by 431.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// How long the loop waits when the process has no more file handles.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often the engine's health is looked at.
const HEALTH_POLL: Duration = Duration::from_millis(100);
/// How long clients may take over the last bytes when the server ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves until something comes from `signals`: then requests that run may finish within
/// `options.drain_timeout`, and new ones get 503. A second signal ends at once. If the engine fails,
/// serves errors for `options.failure_shown`, so that whoever watches `/health` sees why, and ends.
///
/// # Errors
/// If the engine fails.
pub async fn serve(
    frontend: Frontend,
    options: ServerOptions,
    listener: TcpListener,
    mut signals: mpsc::Receiver<()>,
) -> Result<()> {
    let (drain_timeout, failure_shown) = (options.drain_timeout, options.failure_shown);
    let app = App::new(frontend.clone(), options);
    let (draining, drained) = watch::channel(false);
    // Every connection holds a clone; when the last one is gone, all have ended.
    let (open, mut all_closed) = mpsc::channel::<()>(1);
    {
        let mut accepting = pin!(accept_all(&app, &listener, drained, open));
        tokio::select! {
            () = &mut accepting => {}
            () = signal(&mut signals) => {}
            () = failed(&frontend, failure_shown) => {}
        }
        tracing::info!("draining: {} choices in flight", frontend.in_flight());
        app.drain();
        frontend.drain();
        let idle = async {
            while frontend.in_flight() > 0 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = &mut accepting => {}
            () = idle => {}
            () = signal(&mut signals) => tracing::warn!("ending now"),
            () = sleep(drain_timeout) => tracing::warn!("ending what did not finish in time"),
        }
    }
    drop(listener);
    frontend.shutdown();
    let _ = draining.send(true);
    // Whoever still reads gets a moment for the last bytes.
    let _ = tokio::time::timeout(LAST_WORDS, all_closed.recv()).await;
    let ended = tokio::task::spawn_blocking({
        let frontend = frontend.clone();
        move || frontend.join()
    });
    ended.await.context("the engine's threads")?;
    match frontend.failure() {
        Some(failure) => anyhow::bail!("the engine has failed: {failure}"),
        None => Ok(()),
    }
}

/// A signal, or never when none can come any more.
async fn signal(signals: &mut mpsc::Receiver<()>) {
    if signals.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

/// Until the engine has failed, and `shown` behind that.
async fn failed(frontend: &Frontend, shown: Duration) {
    while frontend.is_healthy() {
        sleep(HEALTH_POLL).await;
    }
    sleep(shown).await;
}

async fn accept_all(
    app: &Arc<App>,
    listener: &TcpListener,
    draining: watch::Receiver<bool>,
    open: mpsc::Sender<()>,
) {
    let places = Arc::new(Semaphore::new(app.options.connections_max));
    let service = TowerToHyperService::new(router(Arc::clone(app)));
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection =
            serve_connection(stream, service.clone(), Arc::clone(app), draining.clone());
        let open = open.clone();
        tokio::spawn(async move {
            connection.await;
            drop((place, open));
        });
    }
}

async fn serve_connection(
    stream: TcpStream,
    service: TowerToHyperService<axum::Router>,
    app: Arc<App>,
    mut ending: watch::Receiver<bool>,
) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(WriteTimeout::new(stream, app.options.write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.options.header_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = ending.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
}

/// A connection that ends when its client reads nothing for so long.
struct WriteTimeout {
    stream: TcpStream,
    timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl WriteTimeout {
    fn new(stream: TcpStream, timeout: Duration) -> Self {
        Self { stream, timeout, stalled: None }
    }

    fn written(
        &mut self,
        written: Poll<io::Result<usize>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let timeout = self.timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout)));
        stalled.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for WriteTimeout {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for WriteTimeout {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Something comes for each SIGTERM and SIGINT from now on, which end the process no more. Within a
/// Tokio runtime.
///
/// # Errors
/// If the system refuses.
pub fn signals() -> io::Result<mpsc::Receiver<()>> {
    let (sender, signals) = mpsc::channel(2);
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
            let (mut stream, sender) = (signal(kind)?, sender.clone());
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(()).await.is_ok() {}
            });
        }
    }
    #[cfg(not(unix))]
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() && sender.send(()).await.is_ok() {}
    });
    Ok(signals)
}
