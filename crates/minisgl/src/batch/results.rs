//! What is written for each line, and the file that it is written to.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::{BatchLine, Label};
use crate::llm::Completion;

/// What came of a line.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Of a prompt.
    Completion(Completion),
    /// Of a request of the API, well or not.
    Api {
        /// As HTTP has it.
        status: u16,
        /// JSON.
        body: Value,
    },
    /// The line is no request, or could not be run.
    Error(String),
}

impl Answer {
    /// Tokens that were generated for it.
    pub fn completion_tokens(&self) -> usize {
        match self {
            Answer::Completion(done) => done.completion_tokens,
            Answer::Api { body, .. } => {
                body["usage"]["completion_tokens"].as_u64().unwrap_or(0) as usize
            }
            Answer::Error(_) => 0,
        }
    }
}

impl BatchLine {
    /// The result's line.
    pub fn record(&self, answer: &Answer) -> Value {
        let mut record = self.label.fields(self.index);
        match (&self.label, answer) {
            (Label::Batch(_), Answer::Error(message)) => {
                record.insert("response".into(), Value::Null);
                let error = json!({"code": "invalid_request", "message": message});
                record.insert("error".into(), error);
            }
            (_, Answer::Error(message)) => {
                record.insert("error".into(), json!({"message": message}));
            }
            (_, Answer::Api { status, body }) => {
                let response = json!({
                    "status_code": status,
                    "request_id": format!("req_{}", self.index),
                    "body": body,
                });
                record.insert("response".into(), response);
                record.insert("error".into(), Value::Null);
            }
            (_, Answer::Completion(done)) => {
                record.insert("text".into(), json!(done.text));
                record.insert("finish_reason".into(), json!(done.finish_reason));
                record.insert("usage".into(), usage(done));
            }
        }
        Value::Object(record)
    }
}

impl Label {
    /// What a result begins with.
    fn fields(&self, index: usize) -> Map<String, Value> {
        let fields = match self {
            Label::Index => vec![("index", json!(index))],
            Label::Id(id) => vec![("id", id.clone())],
            Label::Batch(custom_id) => {
                vec![("id", json!(format!("batch_req_{index}"))), ("custom_id", custom_id.clone())]
            }
        };
        fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }
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
    /// Opens the file, and keeps the whole results that an interrupted run over the same `lines`
    /// has left in it.
    ///
    /// # Errors
    /// If the file cannot be opened, or holds something other than the first of these results;
    /// then it is left as it is.
    pub fn open(path: &Path, lines: &[BatchLine]) -> Result<Self> {
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
        for result in text[..whole].split_inclusive(|&byte| byte == b'\n') {
            if !lines.get(done).is_some_and(|line| line.is_answered_by(result)) {
                let at = done + 1;
                bail!("{name}: line {at} is no result of the input's; name another --output");
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

impl BatchLine {
    fn is_answered_by(&self, result: &[u8]) -> bool {
        let Ok(record) = serde_json::from_slice::<Map<String, Value>>(result) else { return false };
        let label = self.label.fields(self.index);
        label.iter().all(|(field, value)| record.get(field) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::read_lines;
    use crate::llm::GenerateParams;

    fn read(text: &str) -> Vec<BatchLine> {
        read_lines(text.as_bytes(), &GenerateParams::default()).unwrap()
    }

    #[test]
    fn results_have_the_form_of_their_requests() {
        let done = Answer::Completion(Completion {
            text: "ho".to_string(),
            token_ids: vec![1],
            finish_reason: "stop",
            prompt_tokens: 5,
            cached_tokens: 2,
            completion_tokens: 1,
        });
        let failed = Answer::Error("no".to_string());
        let [plain, json, batch] = [
            "hi",
            r#"{"id": "a", "prompt": "hi"}"#,
            r#"{"custom_id": "q", "url": "/v1/completions", "body": {"prompt": "hi"}}"#,
        ]
        .map(|line| read(line).remove(0));
        assert_eq!(plain.record(&done)["index"], 0);
        assert_eq!(plain.record(&done)["text"], "ho");
        assert_eq!(json.record(&done)["id"], "a");
        assert_eq!(json.record(&done)["usage"]["total_tokens"], 6);
        assert_eq!(json.record(&failed), json!({"id": "a", "error": {"message": "no"}}));
        let answered = batch.record(&Answer::Api { status: 400, body: json!({"error": {}}) });
        assert_eq!((&answered["custom_id"], &answered["error"]), (&json!("q"), &Value::Null));
        assert_eq!(answered["response"]["status_code"], 400);
        let failed = batch.record(&failed);
        assert_eq!((&failed["custom_id"], &failed["response"]), (&json!("q"), &Value::Null));
        assert_eq!(failed["error"]["message"], "no");
    }

    #[test]
    fn an_interrupted_file_is_continued_behind_its_last_whole_line() {
        let path = std::env::temp_dir().join(format!("minisgl-results-{}", std::process::id()));
        let lines = read("one\ntwo\nthree\n");
        std::fs::write(&path, "{\"index\":0}\n{\"index\":1}\n{\"ind").unwrap();
        let mut results = ResultFile::open(&path, &lines).unwrap();
        assert_eq!(results.done(), 2);
        results.append(&json!({"index": 2})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"index\":0}\n{\"index\":1}\n{\"index\":2}\n");
        let others = ["my diary\n", "{\"index\":1}\n", "{\"id\":\"a\"}\n{\"index\":1}\n"];
        for other in
            others.map(str::to_owned).into_iter().chain([format!("{text}{{\"index\":3}}\n")])
        {
            std::fs::write(&path, &other).unwrap();
            let error = ResultFile::open(&path, &lines).unwrap_err().to_string();
            assert!(error.contains("--output"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
