//! A server on an engine without a model, and a client that can misbehave.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use minisgl_frontend::{Frontend, FrontendOptions};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::engine::EngineLimits;
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_server::{ServerOptions, bind, listen, serve};
use minisgl_text::TextModel;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::tiny;

/// A server that ends when it is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub frontend: Frontend,
    signals: mpsc::Sender<()>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

/// What a test chooses about its server.
pub struct Setup {
    pub text: Arc<TextModel>,
    pub engine: FakeOptions,
    pub scheduler: SchedulerOptions,
    pub server: ServerOptions,
}

impl Default for Setup {
    fn default() -> Self {
        let limits = EngineLimits {
            page_size: 4,
            pages: 512,
            slots: 8,
            seq_len_max: 1024,
            step_tokens_max: 64,
            vocab_size: tiny::VOCAB_SIZE,
        };
        let engine = FakeOptions { limits, ..FakeOptions::default() };
        let scheduler = SchedulerOptions { waiting_max: 8, ..SchedulerOptions::default() };
        let server =
            ServerOptions { model_names: vec!["tiny".to_string()], ..ServerOptions::default() };
        Self { text: tiny::text_model(), engine, scheduler, server }
    }
}

impl Setup {
    /// An engine that answers every prompt with this.
    pub fn says(answer: &str) -> Self {
        Self::says_tokens(answer.bytes().map(u32::from).collect())
    }

    /// An engine that answers every prompt with these tokens.
    pub fn says_tokens(answer: Vec<u32>) -> Self {
        let mut setup = Self::default();
        setup.engine.next_token = NextToken::script(answer, tiny::EOS);
        setup
    }

    /// An engine that generates without end, a token a millisecond.
    pub fn slow() -> Self {
        let mut setup = Self::default();
        setup.engine.next_token = NextToken::script(Vec::new(), u32::from(b'a'));
        setup.engine.step_time.0 = Duration::from_millis(1);
        setup
    }

    pub fn start(self) -> Server {
        let frontend = Frontend::start(
            FakeEngine::new(self.engine),
            self.text,
            FrontendOptions { scheduler: self.scheduler },
        )
        .unwrap();
        let (signals, received) = mpsc::channel(2);
        let (address_sender, address) = std::sync::mpsc::channel();
        let served = frontend.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = listen(bind("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
                address_sender.send(listener.local_addr().unwrap()).unwrap();
                serve(served, self.server, listener, received).await
            })
        });
        let address = address.recv().unwrap();
        Server { address, frontend, signals, thread: Some(thread) }
    }
}

impl Server {
    /// As SIGTERM does.
    pub fn signal(&self) {
        self.signals.blocking_send(()).unwrap();
    }

    /// Whether `serve` has returned.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// What `serve` has returned; once.
    pub fn outcome(&mut self) -> anyhow::Result<()> {
        self.thread.take().expect("asked for once").join().unwrap()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends a request and leaves the answer unread.
    pub fn send(&self, path: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(http_post(path, body.as_bytes()).as_slice()).unwrap();
        stream
    }

    pub fn post(&self, path: &str, body: &str) -> Answer {
        Answer::read(&mut BufReader::new(self.send(path, body)))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
    }

    /// Sends these bytes; a server that refuses early may not read them all.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        Answer::read(&mut BufReader::new(stream))
    }

    /// Waits until nothing is in flight and every page is free or cached.
    pub fn settle(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let stats = self.frontend.scheduler_stats();
            let kept = stats.pages_free.load(Relaxed) + stats.pages_cached.load(Relaxed);
            if self.frontend.in_flight() == 0 && kept == stats.pages.load(Relaxed) {
                return;
            }
            assert!(Instant::now() < until, "{} in flight, {stats:?}", self.frontend.in_flight());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until as many choices are in flight.
    pub fn wait_for_in_flight(&self, count: usize) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.frontend.in_flight() != count {
            assert!(Instant::now() < until, "{} in flight", self.frontend.in_flight());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Twice, so that it does not wait for anybody.
        let _ = self.signals.blocking_send(());
        let _ = self.signals.blocking_send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn http_post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    /// 0 if the server closed the connection without an answer.
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn read(stream: &mut impl BufRead) -> Self {
        let mut head = String::new();
        while stream.read_line(&mut head).is_ok_and(|read| read > 2) {}
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let lower = head.to_ascii_lowercase();
        let mut body = Vec::new();
        if lower.contains("transfer-encoding: chunked") {
            while let Some(chunk) = read_chunk(stream) {
                body.extend(chunk);
            }
        } else {
            let _ = stream.read_to_end(&mut body);
        }
        Self { status, head: lower, body: String::from_utf8(body).unwrap() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The `data:` lines, without the last, which must be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> =
            self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{self:?}");
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// The next chunk of a chunked body; `None` behind the last, or when it breaks off.
pub fn read_chunk(stream: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut size = String::new();
    stream.read_line(&mut size).ok()?;
    let size = usize::from_str_radix(size.trim(), 16).ok().filter(|&size| size > 0)?;
    let mut chunk = vec![0; size + 2];
    stream.read_exact(&mut chunk).ok()?;
    chunk.truncate(size);
    Some(chunk)
}
