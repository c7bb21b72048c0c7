//! Files of requests and of results: a line each, in the same order.
//!
//! Three forms of input: a prompt a line; JSONL, each line with `prompt` or `messages` and maybe
//! sampling parameters; and OpenAI's Batch format, where `body` holds the same and the result
//! carries `custom_id`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::llm::{Completion, GenerateParams, Prompt};

/// One line of a batch.
#[derive(Clone, Debug)]
pub struct BatchLine {
    /// From 0.
    pub index: usize,
    /// What the result repeats so that it can be matched with its request.
    label: Label,
    /// The request, or what is wrong with the line.
    pub request: Result<(Prompt, GenerateParams), String>,
}

#[derive(Clone, Debug)]
enum Label {
    /// Plain text, or JSON without an id.
    Index,
    /// JSON with an id of its own.
    Id(Value),
    /// OpenAI's Batch format.
    Batch { custom_id: Value, chat: bool },
}

/// Reads all lines. Empty ones are no requests. The first line decides whether the file is JSON.
///
/// # Errors
/// If reading fails; what is wrong with one line is that line's own affair.
pub fn read_lines(input: impl Read, defaults: &GenerateParams) -> Result<Vec<BatchLine>> {
    let mut reader = BufReader::new(input);
    let mut lines: Vec<BatchLine> = Vec::new();
    let mut is_json = None;
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).context("reading the batch")? == 0 {
            return Ok(lines);
        }
        let index = lines.len();
        let line = match std::str::from_utf8(&bytes) {
            Ok(text) if text.trim().is_empty() => continue,
            Ok(text) => {
                let text = text.trim_end_matches(['\n', '\r']);
                let is_json = *is_json.get_or_insert_with(|| looks_like_json(text));
                if is_json {
                    parse_json(index, text, defaults)
                } else {
                    plain(index, text, defaults)
                }
            }
            Err(error) => {
                let request = Err(format!("the line is not UTF-8: {error}"));
                BatchLine { index, label: Label::Index, request }
            }
        };
        lines.push(line);
    }
}

fn looks_like_json(line: &str) -> bool {
    line.trim_start().starts_with('{') && serde_json::from_str::<Map<String, Value>>(line).is_ok()
}

fn plain(index: usize, text: &str, defaults: &GenerateParams) -> BatchLine {
    let request = Ok((Prompt::Chat(vec![user_message(text)]), defaults.clone()));
    BatchLine { index, label: Label::Index, request }
}

/// A chat of one message.
pub fn user_message(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn parse_json(index: usize, text: &str, defaults: &GenerateParams) -> BatchLine {
    let mut object: Map<String, Value> = match serde_json::from_str(text) {
        Ok(object) => object,
        Err(error) => {
            let request = Err(format!("the line is no JSON object: {error}"));
            return BatchLine { index, label: Label::Index, request };
        }
    };
    let (label, body) = match object.remove("body") {
        Some(body) => {
            let custom_id = object.remove("custom_id").unwrap_or(Value::Null);
            let url = object.get("url").and_then(Value::as_str).unwrap_or_default();
            let chat = url != "/v1/completions";
            (Label::Batch { custom_id, chat }, body)
        }
        None => {
            let label = object.get("id").cloned().map_or(Label::Index, Label::Id);
            (label, Value::Object(object))
        }
    };
    let request = serde_json::from_value::<Body>(body)
        .map_err(|error| error.to_string())
        .and_then(|body| body.into_request(defaults));
    BatchLine { index, label, request }
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
    fn into_request(self, defaults: &GenerateParams) -> Result<(Prompt, GenerateParams), String> {
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
        Ok((prompt, params))
    }
}

impl BatchLine {
    /// The result as a line, without its newline.
    pub fn result(&self, outcome: &Result<Completion, String>) -> Value {
        match &self.label {
            Label::Batch { custom_id, chat } => {
                let (response, error) = match outcome {
                    Ok(done) => {
                        let body = openai_body(done, *chat);
                        (json!({"status_code": 200, "body": body}), Value::Null)
                    }
                    Err(message) => {
                        let error = json!({"message": message, "type": "invalid_request_error"});
                        (
                            json!({"status_code": 400, "body": {"error": error}}),
                            json!({"code": "invalid_request", "message": message}),
                        )
                    }
                };
                json!({
                    "id": format!("batch_req_{}", self.index),
                    "custom_id": custom_id,
                    "response": response,
                    "error": error,
                })
            }
            label => {
                let mut record = Map::new();
                match label {
                    Label::Id(id) => record.insert("id".to_string(), id.clone()),
                    _ => record.insert("index".to_string(), json!(self.index)),
                };
                match outcome {
                    Ok(done) => {
                        record.insert("text".to_string(), json!(done.text));
                        record.insert("finish_reason".to_string(), json!(done.finish_reason));
                        record.insert("usage".to_string(), usage(done));
                    }
                    Err(message) => {
                        record.insert("error".to_string(), json!({"message": message}));
                    }
                }
                Value::Object(record)
            }
        }
    }
}

fn openai_body(done: &Completion, chat: bool) -> Value {
    let finish_reason = done.finish_reason;
    let (object, choice) = if chat {
        let message = json!({"role": "assistant", "content": done.text});
        let choice = json!({"index": 0, "message": message, "finish_reason": finish_reason});
        ("chat.completion", choice)
    } else {
        let choice = json!({"index": 0, "text": done.text, "finish_reason": finish_reason});
        ("text_completion", choice)
    };
    json!({"object": object, "choices": [choice], "usage": usage(done)})
}

fn usage(done: &Completion) -> Value {
    json!({
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    })
}

/// Results, a line each, in the order of the requests.
#[derive(Debug)]
pub struct ResultFile {
    file: File,
    done: usize,
}

impl ResultFile {
    /// Opens the file, and keeps the whole lines that an interrupted run has left in it.
    ///
    /// # Errors
    /// If the file cannot be opened, or holds something other than results.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("opening {name}"))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).with_context(|| format!("reading {name}"))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let mut done = 0;
        for line in text[..whole].split_inclusive(|&byte| byte == b'\n') {
            if serde_json::from_slice::<Map<String, Value>>(line).is_err() {
                bail!("{name}: line {} is no result; name another --output", done + 1);
            }
            done += 1;
        }
        file.set_len(whole as u64).with_context(|| format!("truncating {name}"))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file, done })
    }

    /// Results that are there already.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Appends a result, in one write so that an interruption leaves at most one broken line.
    ///
    /// # Errors
    /// If writing fails.
    pub fn append(&mut self, record: &Value) -> Result<()> {
        let line = format!("{record}\n");
        self.file.write_all(line.as_bytes()).context("writing a result")?;
        self.done += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: impl AsRef<[u8]>) -> Vec<BatchLine> {
        read_lines(text.as_ref(), &GenerateParams::default()).unwrap()
    }

    #[test]
    fn a_plain_file_has_a_prompt_a_line() {
        let lines = read("one\n\n{two}\r\nthree");
        let prompts: Vec<Prompt> = lines.into_iter().map(|line| line.request.unwrap().0).collect();
        let expected = ["one", "{two}", "three"].map(|text| Prompt::Chat(vec![user_message(text)]));
        assert_eq!(prompts, expected);
    }

    #[test]
    fn json_lines_carry_their_own_parameters() {
        let lines = read(concat!(
            r#"{"id": "a", "prompt": "x", "max_tokens": 3, "stop": "\n", "temperature": 0.5}"#,
            "\n",
            r#"{"prompt": [1, 2], "seed": 7, "ignored": {}}"#,
        ));
        let (prompt, params) = lines[0].request.as_ref().unwrap();
        assert_eq!(*prompt, Prompt::Text("x".to_string()));
        assert_eq!((params.sampling.max_tokens, params.sampling.temperature), (3, 0.5));
        assert_eq!(params.stop, ["\n"]);
        let (prompt, params) = lines[1].request.as_ref().unwrap();
        assert_eq!((prompt, params.seed), (&Prompt::Tokens(vec![1, 2]), Some(7)));
    }

    #[test]
    fn a_bad_line_is_an_error_of_its_own() {
        let mut text = b"{\"prompt\": \"x\"}\nnonsense\n{}\n".to_vec();
        text.extend(
            b"{\"prompt\": \"x\", \"max_tokens\": 0}\n{\"prompt\": \"x\", \"max_tokens\": -1}\n",
        );
        text.extend(b"{\"prompt\": \"\xff\"}\n{\"prompt\": \"x\", \"temperature\": -1}\n");
        text.extend(b"{\"prompt\": \"last\"}\n");
        let lines = read(text);
        let wrong: Vec<usize> =
            lines.iter().filter(|line| line.request.is_err()).map(|line| line.index).collect();
        assert_eq!(wrong, [1, 2, 3, 4, 5, 6]);
        let record = lines[3].result(&Err(lines[3].request.clone().unwrap_err()));
        assert!(record["error"]["message"].as_str().unwrap().starts_with("max_tokens"), "{record}");
    }

    #[test]
    fn batch_results_have_openais_form() {
        let lines = read(
            r#"{"custom_id": "q-1", "method": "POST", "url": "/v1/chat/completions",
               "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}"#
                .replace('\n', " "),
        );
        let done = Completion {
            text: "ho".to_string(),
            token_ids: vec![1],
            finish_reason: "stop",
            prompt_tokens: 5,
            cached_tokens: 2,
            completion_tokens: 1,
        };
        let record = lines[0].result(&Ok(done));
        assert_eq!(record["custom_id"], "q-1");
        assert_eq!(record["error"], Value::Null);
        let body = &record["response"]["body"];
        assert_eq!(body["choices"][0]["message"]["content"], "ho");
        assert_eq!(body["usage"]["total_tokens"], 6);
        let record = lines[0].result(&Err("no".to_string()));
        assert_eq!(record["response"]["status_code"], 400);
    }

    #[test]
    fn an_interrupted_file_is_continued_behind_its_last_whole_line() {
        let path = std::env::temp_dir().join(format!("minisgl-results-{}", std::process::id()));
        std::fs::write(&path, "{\"index\":0}\n{\"index\":1}\n{\"ind").unwrap();
        let mut results = ResultFile::open(&path).unwrap();
        assert_eq!(results.done(), 2);
        results.append(&json!({"index": 2})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"index\":0}\n{\"index\":1}\n{\"index\":2}\n");
        std::fs::write(&path, "my diary\n").unwrap();
        assert!(ResultFile::open(&path).unwrap_err().to_string().contains("line 1"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "my diary\n");
        std::fs::remove_file(&path).unwrap();
    }
}
