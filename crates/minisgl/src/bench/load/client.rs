//! A client that streams answers and keeps their times. It looks only as far into a chunk of a
//! stream as it must, so that it is not itself what limits a load.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

/// An OpenAI server.
pub struct Client {
    host: String,
    address: String,
    /// In front of `/v1`.
    path: String,
    authorization: Option<String>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// How one answer went.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// From sending to the first text.
    pub first: Option<Duration>,
    /// From sending to the end.
    pub total: Duration,
    /// Between a chunk with text and the next.
    pub gaps: Vec<Duration>,
    /// As the server counted.
    pub usage: Option<Usage>,
}

/// What a server says it has read and written.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Usage {
    /// Tokens read.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub completion_tokens: usize,
    #[serde(default)]
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct PromptDetails {
    cached_tokens: Option<usize>,
}

impl Usage {
    /// Tokens of the prompt that the server did not have to compute.
    pub fn cached_tokens(&self) -> usize {
        self.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0)
    }
}

impl Client {
    /// A client of `http://host[:port][/path]`; a `/v1` at the end may be there or not.
    ///
    /// # Errors
    /// If it is no such address.
    pub fn new(base_url: &str, api_key: Option<&str>) -> Result<Self> {
        let uri: Uri = base_url.parse().with_context(|| format!("--base-url {base_url}"))?;
        ensure!(uri.scheme_str() == Some("http"), "--base-url {base_url}: only http:// is spoken");
        let host = uri.authority().with_context(|| format!("--base-url {base_url}: no host"))?;
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            host: host.to_string(),
            address: format!("{}:{}", host.host(), host.port_u16().unwrap_or(80)),
            path: path.strip_suffix("/v1").unwrap_or(path).to_string(),
            authorization: api_key.map(|key| format!("Bearer {key}")),
            idle: Mutex::new(Vec::new()),
        })
    }

    /// The first model that the server has.
    ///
    /// # Errors
    /// If it cannot be reached or lists none.
    pub async fn first_model(&self) -> Result<String> {
        let (_, response) = self.send(self.request("GET", "/v1/models", Bytes::new())?).await?;
        let status = response.status();
        let body = response.into_body().collect().await.context("reading /v1/models")?.to_bytes();
        ensure!(status == StatusCode::OK, "/v1/models: {status}: {}", excerpt(&body));
        let list: serde_json::Value = serde_json::from_slice(&body).context("/v1/models")?;
        let first = list["data"][0]["id"].as_str().context("/v1/models lists no model")?;
        Ok(first.to_string())
    }

    /// Sends a request that asks for a stream and for its usage, and reads the answer to its end.
    ///
    /// # Errors
    /// If the server refuses, breaks off, or reports an error in the stream.
    pub async fn stream(&self, path: &str, body: Bytes, chunk: impl Fn()) -> Result<Answer> {
        let request = self.request("POST", path, body)?;
        let begun = Instant::now();
        let (connection, mut response) = self.send(request).await?;
        if response.status() != StatusCode::OK {
            let status = response.status();
            let body = response.into_body().collect().await.context("reading an error")?;
            bail!("{status}: {}", excerpt(&body.to_bytes()));
        }
        let mut reader = StreamReader::default();
        let (mut answer, mut last) = (Answer::default(), None);
        while let Some(frame) = response.frame().await {
            let frame = frame.context("the stream broke off")?;
            let Some(data) = frame.data_ref() else { continue };
            let now = Instant::now();
            for _ in 0..reader.push(data)? {
                match last.replace(now) {
                    None => answer.first = Some(now - begun),
                    Some(before) => answer.gaps.push(now - before),
                }
                chunk();
            }
        }
        answer.total = begun.elapsed();
        ensure!(reader.done, "the stream ended without [DONE]");
        answer.usage = reader.usage;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(answer)
    }

    fn request(&self, method: &str, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.path))
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.body(Full::new(body)).context("making a request")
    }

    /// Over a connection that is open already, or a new one.
    async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(SendRequest<Full<Bytes>>, Response<Incoming>)> {
        let mut connection = loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut connection) = idle else { break self.connect().await? };
            if connection.ready().await.is_ok() {
                break connection;
            }
        };
        let response = connection.send_request(request).await.context("sending")?;
        Ok((connection, response))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(&self.address).await;
        let stream = stream.with_context(|| format!("connecting to {}", self.address))?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        // What goes wrong with it shows in the requests that it carries.
        tokio::spawn(connection);
        sender.ready().await?;
        Ok(sender)
    }
}

fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(body).chars().take(300).collect()
}

/// Finds in a stream of server-sent events the chunks with text, the usage and the end.
#[derive(Default)]
struct StreamReader {
    /// The beginning of a line whose end has not come.
    partial: Vec<u8>,
    usage: Option<Usage>,
    done: bool,
}

impl StreamReader {
    /// How many chunks with text have come to their end.
    fn push(&mut self, data: &[u8]) -> Result<usize> {
        let mut texts = 0;
        for piece in data.split_inclusive(|&byte| byte == b'\n') {
            if piece.last() != Some(&b'\n') {
                self.partial.extend_from_slice(piece);
            } else if self.partial.is_empty() {
                texts += usize::from(self.line(piece)?);
            } else {
                let mut line = std::mem::take(&mut self.partial);
                line.extend_from_slice(piece);
                texts += usize::from(self.line(&line)?);
            }
        }
        Ok(texts)
    }

    /// Whether it carries text.
    fn line(&mut self, line: &[u8]) -> Result<bool> {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else {
            return Ok(false);
        };
        if data == b"[DONE]" {
            self.done = true;
            return Ok(false);
        }
        if data.starts_with(b"{\"error\"") {
            return Err(anyhow!("an error in the stream: {}", excerpt(data)));
        }
        let text = ["\"content\":", "\"text\":", "\"reasoning_content\":"];
        let has_text = text.iter().any(|field| value(data, field).is_some_and(is_full_string));
        // Usage stands in one chunk behind all text, or in each; only a whole one counts.
        if value(data, "\"usage\":").is_some_and(|value| value.starts_with(b"{")) {
            #[derive(Deserialize)]
            struct Chunk {
                usage: Usage,
            }
            let chunk = serde_json::from_slice::<Chunk>(data).context("a chunk with usage")?;
            self.usage = Some(chunk.usage);
        }
        Ok(has_text)
    }
}

/// What stands behind the first `field`.
fn value<'a>(data: &'a [u8], field: &str) -> Option<&'a [u8]> {
    let at = data.windows(field.len()).position(|window| window == field.as_bytes())?;
    Some(data[at + field.len()..].trim_ascii_start())
}

fn is_full_string(value: &[u8]) -> bool {
    value.starts_with(b"\"") && !value.starts_with(b"\"\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null}\r\n\r\n",
        ": a comment\n\n",
        "data: {\"choices\": [{\"delta\": {\"content\": \"b\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,",
        "\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n",
        "data: [DONE]\n\n",
    );

    #[test]
    fn a_stream_is_read_the_same_wherever_it_is_cut() {
        for size in [1, 7, 64, STREAM.len()] {
            let mut reader = StreamReader::default();
            let pieces = STREAM.as_bytes().chunks(size);
            let texts: usize = pieces.map(|piece| reader.push(piece).unwrap()).sum();
            assert_eq!((texts, reader.done), (2, true), "pieces of {size}");
            let usage = reader.usage.unwrap();
            assert_eq!((usage.prompt_tokens, usage.completion_tokens), (5, 2));
            assert_eq!(usage.cached_tokens(), 4);
        }
    }

    #[test]
    fn an_error_in_the_stream_is_one() {
        let error = StreamReader::default().push(b"data: {\"error\":{\"message\":\"no\"}}\n\n");
        assert!(error.unwrap_err().to_string().contains("\"no\""));
    }

    #[test]
    fn base_urls_with_and_without_v1() {
        for (url, address, path) in [
            ("http://localhost:1919", "localhost:1919", ""),
            ("http://localhost:1919/v1/", "localhost:1919", ""),
            ("http://a/b/v1", "a:80", "/b"),
        ] {
            let client = Client::new(url, None).unwrap();
            assert_eq!((client.address.as_str(), client.path.as_str()), (address, path), "{url}");
        }
        for url in ["localhost:1919", "https://a", "", "http://"] {
            assert!(Client::new(url, None).is_err(), "{url}");
        }
    }
}
