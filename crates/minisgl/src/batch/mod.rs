//! Files of requests and of results: a line each, in the same order.
//!
//! Three forms of input: a prompt a line; JSONL, each line with `prompt` or `messages` and maybe
//! sampling parameters; and OpenAI's Batch format, whose lines carry a whole request of the API
//! and are answered as the server answers it. What most lines are decides what a file is, so that
//! one bad line is an error of its own wherever it stands.

mod results;

use std::io::{BufRead, BufReader, Read};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::llm::{GenerateParams, Prompt};

pub use results::{Answer, ResultFile};

/// One line of a batch.
#[derive(Clone, Debug)]
pub struct BatchLine {
    /// From 0.
    pub index: usize,
    /// What the result repeats so that it can be matched with its request.
    label: Label,
    /// The request, or what is wrong with the line.
    pub request: Result<Request, String>,
}

/// What a line asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// A prompt, with the parameters that the line or the command line gave.
    Prompt(Prompt, GenerateParams),
    /// A request of the API.
    Api {
        /// Which endpoint.
        path: &'static str,
        /// Its body, JSON.
        body: String,
    },
}

#[derive(Clone, Debug)]
enum Label {
    /// Plain text, or JSON without an id.
    Index,
    /// JSON with an id of its own.
    Id(Value),
    /// OpenAI's Batch format; the `custom_id` of a line that is no JSON is null.
    Batch(Value),
}

/// What a file is.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain,
    Json,
    Batch,
}

/// Reads all lines. Empty ones are no requests.
///
/// # Errors
/// If reading fails; what is wrong with one line is that line's own affair.
pub fn read_lines(input: impl Read, defaults: &GenerateParams) -> Result<Vec<BatchLine>> {
    let lines: Vec<Vec<u8>> = BufReader::new(input)
        .split(b'\n')
        .filter(|line| !line.as_ref().is_ok_and(|line| line.trim_ascii().is_empty()))
        .collect::<Result<_, _>>()
        .context("reading the batch")?;
    let form = form_of(&lines);
    Ok(lines
        .iter()
        .enumerate()
        .map(|(index, line)| read_line(index, line, form, defaults))
        .collect())
}

fn form_of(lines: &[Vec<u8>]) -> Form {
    let parse = |line: &Vec<u8>| serde_json::from_slice::<Map<String, Value>>(line).ok();
    let objects: Vec<_> = lines.iter().filter_map(parse).collect();
    let with_body = objects.iter().filter(|object| object.contains_key("body")).count();
    match () {
        () if objects.is_empty() || 2 * objects.len() < lines.len() => Form::Plain,
        () if 2 * with_body >= objects.len() => Form::Batch,
        () => Form::Json,
    }
}

fn read_line(index: usize, line: &[u8], form: Form, defaults: &GenerateParams) -> BatchLine {
    let broken = |message: String| {
        let label = if form == Form::Batch { Label::Batch(Value::Null) } else { Label::Index };
        BatchLine { index, label, request: Err(message) }
    };
    let text = match std::str::from_utf8(line) {
        Ok(text) => text.trim_end_matches('\r'),
        Err(error) => return broken(format!("the line is not UTF-8: {error}")),
    };
    if form == Form::Plain {
        let request = Ok(Request::Prompt(Prompt::Chat(vec![user_message(text)]), defaults.clone()));
        return BatchLine { index, label: Label::Index, request };
    }
    let object: Map<String, Value> = match serde_json::from_str(text) {
        Ok(object) => object,
        Err(error) => return broken(format!("the line is no JSON object: {error}")),
    };
    let (label, request) = match form {
        Form::Batch => {
            let custom_id = object.get("custom_id").cloned().unwrap_or_default();
            (Label::Batch(custom_id), api_request(object))
        }
        _ => {
            let label = object.get("id").cloned().map_or(Label::Index, Label::Id);
            (label, prompt_request(object, defaults))
        }
    };
    BatchLine { index, label, request }
}

/// A chat of one message.
pub fn user_message(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

/// What a line of the Batch format asks for. Whatever model it names, this one answers; and it
/// answers at once, for a file is no place for a stream.
fn api_request(mut line: Map<String, Value>) -> Result<Request, String> {
    const PATHS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];
    let url = line.get("url").and_then(Value::as_str).unwrap_or(PATHS[0]);
    let path = PATHS.into_iter().find(|path| *path == url);
    let path = path.ok_or_else(|| format!("url: {url:?} is none of {}", PATHS.join(", ")))?;
    let Some(Value::Object(mut body)) = line.remove("body") else {
        return Err("body: there is none, or it is no object".to_string());
    };
    body.retain(|field, _| !["model", "stream", "stream_options"].contains(&field.as_str()));
    Ok(Request::Api { path, body: Value::Object(body).to_string() })
}

fn prompt_request(line: Map<String, Value>, defaults: &GenerateParams) -> Result<Request, String> {
    /// What would make the answer another one, and what only the API knows.
    const API_ONLY: [&str; 9] = [
        "best_of",
        "echo",
        "logit_bias",
        "logprobs",
        "n",
        "response_format",
        "suffix",
        "tool_choice",
        "tools",
    ];
    if let Some(field) =
        API_ONLY.iter().find(|field| line.get(**field).is_some_and(|v| !v.is_null()))
    {
        return Err(format!("{field}: write the line in the OpenAI Batch format, which has it"));
    }
    let body: Body = serde_json::from_value(Value::Object(line)).map_err(|e| e.to_string())?;
    body.into_request(defaults)
}

/// What a JSON line says of its request; further fields are ignored.
#[derive(Deserialize)]
struct Body {
    prompt: Option<BodyPrompt>,
    messages: Option<Vec<Value>>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    seed: Option<u64>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    ignore_eos: Option<bool>,
    stop: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum BodyPrompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Body {
    fn into_request(self, defaults: &GenerateParams) -> Result<Request, String> {
        let prompt = match (self.prompt, self.messages) {
            (Some(BodyPrompt::Text(text)), None) => Prompt::Text(text),
            (Some(BodyPrompt::Tokens(ids)), None) => Prompt::Tokens(ids),
            (None, Some(messages)) => Prompt::Chat(messages),
            (None, None) => return Err("neither prompt nor messages".to_string()),
            (Some(_), Some(_)) => return Err("both prompt and messages".to_string()),
        };
        let mut params = defaults.clone();
        let sampling = &mut params.sampling;
        if let Some(max_tokens) = self.max_completion_tokens.or(self.max_tokens) {
            sampling.max_tokens = u32::try_from(max_tokens)
                .ok()
                .filter(|&max_tokens| max_tokens > 0)
                .ok_or_else(|| format!("max_tokens: {max_tokens} is not a positive number"))?;
        }
        let set = |to: &mut f32, value: Option<f32>| *to = value.unwrap_or(*to);
        set(&mut sampling.temperature, self.temperature);
        set(&mut sampling.top_p, self.top_p);
        set(&mut sampling.min_p, self.min_p);
        set(&mut sampling.presence_penalty, self.presence_penalty);
        set(&mut sampling.frequency_penalty, self.frequency_penalty);
        set(&mut sampling.repetition_penalty, self.repetition_penalty);
        sampling.top_k = self.top_k.unwrap_or(sampling.top_k);
        sampling.ignore_eos = self.ignore_eos.unwrap_or(sampling.ignore_eos);
        params.seed = self.seed.or(params.seed);
        match self.stop {
            Some(OneOrMany::One(stop)) => params.stop = vec![stop],
            Some(OneOrMany::Many(stop)) => params.stop = stop,
            None => {}
        }
        params.check()?;
        Ok(Request::Prompt(prompt, params))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: impl AsRef<[u8]>) -> Vec<BatchLine> {
        read_lines(text.as_ref(), &GenerateParams::default()).unwrap()
    }

    fn prompt(line: &BatchLine) -> (&Prompt, &GenerateParams) {
        match &line.request {
            Ok(Request::Prompt(prompt, params)) => (prompt, params),
            other => panic!("{other:?}"),
        }
    }

    fn wrong(lines: &[BatchLine]) -> Vec<usize> {
        lines.iter().filter(|line| line.request.is_err()).map(|line| line.index).collect()
    }

    #[test]
    fn a_plain_file_has_a_prompt_a_line() {
        let lines = read("one\n\n{two}\r\n{\"three\": 3}");
        let prompts: Vec<&Prompt> = lines.iter().map(|line| prompt(line).0).collect();
        let expected = ["one", "{two}", "{\"three\": 3}"];
        let expected = expected.map(|text| Prompt::Chat(vec![user_message(text)]));
        assert_eq!(prompts, expected.iter().collect::<Vec<_>>());
    }

    #[test]
    fn json_lines_carry_their_own_parameters() {
        let lines = read(concat!(
            r#"{"id": "a", "prompt": "x", "max_tokens": 3, "stop": "\n", "temperature": 0.5}"#,
            "\n",
            r#"{"prompt": [1, 2], "seed": 7, "ignored": {}}"#,
        ));
        let (text, params) = prompt(&lines[0]);
        assert_eq!(*text, Prompt::Text("x".to_string()));
        assert_eq!((params.sampling.max_tokens, params.sampling.temperature), (3, 0.5));
        assert_eq!(params.stop, ["\n"]);
        let (ids, params) = prompt(&lines[1]);
        assert_eq!((ids, params.seed), (&Prompt::Tokens(vec![1, 2]), Some(7)));
    }

    #[test]
    fn a_bad_line_is_an_error_of_its_own() {
        let mut text = b"nonsense\n{\"prompt\": \"x\"}\n{}\n".to_vec();
        text.extend(
            b"{\"prompt\": \"x\", \"max_tokens\": 0}\n{\"prompt\": \"x\", \"max_tokens\": -1}\n",
        );
        text.extend(b"{\"prompt\": \"\xff\"}\n{\"prompt\": \"x\", \"temperature\": -1}\n");
        text.extend(b"{\"prompt\": \"x\", \"n\": 2}\n{\"prompt\": \"last\", \"n\": null}\n");
        let lines = read(text);
        assert_eq!(wrong(&lines), [0, 2, 3, 4, 5, 6, 7]);
        let said = |line: usize| lines[line].request.clone().unwrap_err();
        assert!(said(3).starts_with("max_tokens"), "{}", said(3));
        assert!(said(7).starts_with("n:"), "{}", said(7));
    }

    #[test]
    fn the_batch_format_is_a_request_of_the_api() {
        let lines = read(concat!(
            r#"{"custom_id": "a", "body": {"model": "m", "stream": true, "messages": []}}"#,
            "\nnonsense\n",
            r#"{"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "hi", "n": 2}}"#,
            "\n",
            r#"{"custom_id": "d", "url": "/flush_cache", "body": {}}"#,
            "\n",
            r#"{"custom_id": "e", "url": "/v1/completions", "body": 7}"#,
        ));
        let api = |path, body: Value| Ok(Request::Api { path, body: body.to_string() });
        assert_eq!(lines[0].request, api("/v1/chat/completions", json!({"messages": []})));
        assert_eq!(lines[2].request, api("/v1/completions", json!({"prompt": "hi", "n": 2})));
        assert_eq!(wrong(&lines), [1, 3, 4]);
    }
}
