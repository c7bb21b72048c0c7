//! From a generation's events to a response: all at once, or as a stream of server-sent events.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_core::Stream;
use minisgl_frontend::{Event, Generation, Usage};
use minisgl_scheduler::message::{FinishReason, OutputToken};
use minisgl_scheduler::plan::TokenLogprobs;
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};

use crate::error::ApiError;

/// A chunk of a response is not made longer than this by what else is there already.
const CHUNK_BYTES: usize = 32 << 10;

/// A submitted request, on its way to its client.
pub struct Reply {
    /// Its events.
    pub generation: Generation,
    /// When it must be over.
    pub deadline: Option<Instant>,
    /// The field that its prompt came in.
    pub prompt_field: &'static str,
}

/// All of one choice.
#[derive(Debug)]
pub struct Choice {
    /// Log-probabilities of the prompt, if asked for, for the prompt's first choice.
    pub prompt: Vec<Option<TokenLogprobs>>,
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<OutputToken>,
    /// Why it ended.
    pub end: End,
}

/// How a choice ended, if it ended well.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// At its length limit.
    pub is_length: bool,
    /// The stop string or token that it ended by, where that was not EOS.
    pub stop: Option<Stop>,
    /// What it took.
    pub usage: Usage,
}

/// What a request gave as an end and was met.
#[derive(Clone, Debug)]
pub enum Stop {
    /// A stop string.
    Text(String),
    /// A token.
    Token(u32),
}

/// How an endpoint writes events as chunks of its own form.
pub trait Chunks: Send + Unpin + 'static {
    /// Log-probabilities of a prompt, for its first choice.
    fn prompt(&mut self, choice: usize, logprobs: Vec<Option<TokenLogprobs>>, out: &mut Vec<u8>);
    /// More of a choice.
    fn text(&mut self, choice: usize, text: &str, tokens: &[OutputToken], out: &mut Vec<u8>);
    /// A choice's end.
    fn end(&mut self, choice: usize, end: End, out: &mut Vec<u8>);
    /// What stands before `[DONE]`.
    fn finish(&mut self, out: &mut Vec<u8>);
}

impl Reply {
    /// Waits for all choices, in order.
    ///
    /// # Errors
    /// If any of them fails, or the deadline passes.
    pub async fn collect(mut self) -> Result<Vec<Choice>, ApiError> {
        let mut choices: Vec<Choice> = (0..self.generation.choices())
            .map(|_| Choice {
                prompt: Vec::new(),
                text: String::new(),
                tokens: Vec::new(),
                end: End::default(),
            })
            .collect();
        while let Some(event) = self.next().await? {
            match event {
                Event::Prompt { choice, logprobs } => choices[choice].prompt = logprobs,
                Event::Text { choice, text, mut tokens } => {
                    choices[choice].text.push_str(&text);
                    choices[choice].tokens.append(&mut tokens);
                }
                Event::Finished { choice, reason, stop, usage } => {
                    choices[choice].end = self.end(reason, stop, usage)?;
                }
            }
        }
        Ok(choices)
    }

    /// Streams the events, once the first of them shows that the request runs.
    ///
    /// # Errors
    /// If it does not.
    pub async fn stream(mut self, chunks: impl Chunks) -> Result<Response, ApiError> {
        let first = self.next().await?;
        if let Some(Event::Finished { reason, .. }) = &first
            && let Some(error) = ApiError::from_finish(reason, self.prompt_field)
        {
            return Err(error);
        }
        let timeout = self.deadline.map(|deadline| Box::pin(sleep_until(deadline)));
        let events = EventStream { reply: self, first, chunks, timeout, ended: false };
        let mut response = Response::new(Body::from_stream(events));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies that buffer would turn a stream into one late answer.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        match self.deadline {
            Some(deadline) => {
                timeout_at(deadline, self.generation.recv()).await.map_err(|_| ApiError::timeout())
            }
            None => Ok(self.generation.recv().await),
        }
    }

    fn end(
        &self,
        reason: FinishReason,
        stop: Option<String>,
        usage: Usage,
    ) -> Result<End, ApiError> {
        if let Some(error) = ApiError::from_finish(&reason, self.prompt_field) {
            return Err(error);
        }
        let is_length = reason == FinishReason::Length;
        let stop = match reason {
            FinishReason::Stop { matched: Some(token) } => Some(Stop::Token(token)),
            _ => stop.map(Stop::Text),
        };
        Ok(End { is_length, stop, usage })
    }
}

/// The body of a streamed response.
struct EventStream<C> {
    reply: Reply,
    first: Option<Event>,
    chunks: C,
    timeout: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl<C: Chunks> Stream for EventStream<C> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let stream = &mut *self;
        if stream.ended {
            return Poll::Ready(None);
        }
        let mut out = Vec::new();
        while out.len() < CHUNK_BYTES {
            let event = match stream.first.take() {
                Some(event) => Some(event),
                None => match stream.reply.generation.poll_recv(context) {
                    Poll::Ready(event) => event,
                    Poll::Pending => break,
                },
            };
            let written = match event {
                Some(event) => stream.write(event, &mut out),
                None => {
                    stream.chunks.finish(&mut out);
                    stream.ended = true;
                    break;
                }
            };
            if let Err(error) = written {
                stream.fail(&error, &mut out);
                break;
            }
        }
        if let Some(timeout) = &mut stream.timeout
            && !stream.ended
            && timeout.as_mut().poll(context).is_ready()
        {
            stream.fail(&ApiError::timeout(), &mut out);
        }
        if stream.ended {
            out.extend_from_slice(b"data: [DONE]\n\n");
        }
        if out.is_empty() { Poll::Pending } else { Poll::Ready(Some(Ok(out.into()))) }
    }
}

impl<C: Chunks> EventStream<C> {
    fn write(&mut self, event: Event, out: &mut Vec<u8>) -> Result<(), ApiError> {
        match event {
            Event::Prompt { choice, logprobs } => self.chunks.prompt(choice, logprobs, out),
            Event::Text { choice, text, tokens } => self.chunks.text(choice, &text, &tokens, out),
            Event::Finished { choice, reason, stop, usage } => {
                let end = self.reply.end(reason, stop, usage)?;
                self.chunks.end(choice, end, out);
            }
        }
        Ok(())
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        push_event(out, &error.body());
        self.ended = true;
    }
}

/// Appends `data: {…}` and the empty line behind it.
pub fn push_event(out: &mut Vec<u8>, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, data).expect("plain structs are JSON, and memory takes it");
    out.extend_from_slice(b"\n\n");
}
