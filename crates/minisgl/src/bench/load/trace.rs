//! Recorded loads, a line of JSON each request, in the two forms that are published: Qwen-Bailian
//! (alibaba-edu/qwen-bailian-usagetraces-anon) and Mooncake (kvcache-ai/Mooncake). Both say when a
//! request came, how long it and its answer were, and which blocks of its prompt others have too.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::requests::{LoadPrompt, LoadRequest, Run};

/// The form of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceForm {
    /// Times in seconds, blocks of 16 tokens, and a `chat_id`.
    QwenBailian,
    /// Times in milliseconds, blocks of 512 tokens.
    Mooncake,
}

impl TraceForm {
    fn block_tokens(self) -> u32 {
        match self {
            Self::QwenBailian => 16,
            Self::Mooncake => 512,
        }
    }

    fn seconds(self, timestamp: f64) -> f64 {
        match self {
            Self::QwenBailian => timestamp,
            Self::Mooncake => timestamp / 1e3,
        }
    }
}

/// What is read of a line; the rest does not matter to a replay.
#[derive(Deserialize)]
struct Line {
    chat_id: Option<serde_json::Value>,
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads a trace. The first request comes at once, the others after it as the trace says, in
/// `time_scale` times the time: 0.5 replays twice as fast.
///
/// # Errors
/// If a line is in neither form.
pub fn read_trace(text: &str, time_scale: f64) -> Result<(TraceForm, Vec<LoadRequest>)> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(index, line)| {
        serde_json::from_str::<Line>(line).with_context(|| format!("line {}", index + 1))
    };
    let lines: Vec<Line> = lines.map(parse).collect::<Result<_>>()?;
    let Some(first) = lines.first() else { bail!("it is empty") };
    let form = if first.chat_id.is_some() { TraceForm::QwenBailian } else { TraceForm::Mooncake };
    let start = lines.iter().map(|line| line.timestamp).fold(f64::INFINITY, f64::min);
    let request = |(index, line): (usize, &Line)| {
        let after = form.seconds(line.timestamp - start) * time_scale;
        let at = Duration::try_from_secs_f64(after);
        Ok(LoadRequest {
            prompt: prompt(line, index, form).with_context(|| format!("request {}", index + 1))?,
            output_tokens: line.output_length.max(1),
            at: Some(at.with_context(|| format!("request {}: its timestamp", index + 1))?),
        })
    };
    let mut requests = lines.iter().enumerate().map(request).collect::<Result<Vec<_>>>()?;
    requests.sort_by_key(|request| request.at);
    Ok((form, requests))
}

/// Tokens chosen by the blocks' ids; behind the blocks, or where there are none, the request's own.
fn prompt(line: &Line, index: usize, form: TraceForm) -> Result<LoadPrompt> {
    ensure!(line.input_length > 0, "its input_length is 0");
    let mut left = line.input_length;
    let mut runs = Vec::with_capacity(line.hash_ids.len() + 1);
    for id in &line.hash_ids {
        let tokens = left.min(form.block_tokens());
        // Even seeds are blocks, odd ones a request's own.
        runs.push(Run { seed: id.wrapping_mul(2), tokens });
        left -= tokens;
    }
    runs.push(Run { seed: (index as u64) << 1 | 1, tokens: left });
    runs.retain(|run| run.tokens > 0);
    Ok(LoadPrompt::Runs(runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qwen_bailian_counts_seconds_and_blocks_of_16() {
        let text = concat!(
            r#"{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.0, "input_length": 40,"#,
            r#" "output_length": 12, "type": "text", "turn": 1, "hash_ids": [7, 8, 9]}"#,
            "\n",
            r#"{"chat_id": 160, "parent_chat_id": 159, "timestamp": 63.5, "input_length": 36,"#,
            r#" "output_length": 3, "type": "text", "turn": 2, "hash_ids": [7, 8]}"#,
            "\n",
        );
        let (form, requests) = read_trace(text, 0.5).unwrap();
        assert_eq!(form, TraceForm::QwenBailian);
        assert_eq!(requests[0].at, Some(Duration::ZERO));
        assert_eq!(requests[1].at, Some(Duration::from_millis(1250)));
        let ids: Vec<Vec<u32>> =
            requests.iter().map(|request| request.prompt.ids(10_000).unwrap()).collect();
        assert_eq!(ids.iter().map(Vec::len).collect::<Vec<_>>(), [40, 36]);
        assert_eq!(ids[0][..32], ids[1][..32]);
        assert_ne!(ids[0][32..36], ids[1][32..]);
        assert_eq!(requests.iter().map(|r| r.output_tokens).collect::<Vec<_>>(), [12, 3]);
    }

    #[test]
    fn mooncake_counts_milliseconds_and_blocks_of_512() {
        let text = concat!(
            r#"{"timestamp": 3000, "input_length": 1000, "output_length": 50, "hash_ids": [0, 2]}"#,
            "\n",
            r#"{"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [0, 1]}"#,
        );
        let (form, requests) = read_trace(text, 1.0).unwrap();
        assert_eq!(form, TraceForm::Mooncake);
        // In the order of their times.
        assert_eq!(requests[1].at, Some(Duration::from_secs(3)));
        let ids: Vec<Vec<u32>> =
            requests.iter().map(|request| request.prompt.ids(10_000).unwrap()).collect();
        assert_eq!(ids.iter().map(Vec::len).collect::<Vec<_>>(), [600, 1000]);
        assert_eq!(ids[0][..512], ids[1][..512]);
        assert_ne!(ids[0][512..600], ids[1][512..600]);
    }

    #[test]
    fn what_is_wrong_names_its_line() {
        let good = r#"{"timestamp": 0, "input_length": 5, "output_length": 1}"#;
        for (text, says) in [
            (String::new(), "empty"),
            (format!("{good}\n{{\"timestamp\": 1}}"), "line 2"),
            (good.replace("5", "-5"), "line 1"),
            (good.replace("5", "0"), "input_length"),
            (format!("{good}\n{}", good.replace("0,", "1e300,")), "timestamp"),
        ] {
            let error = format!("{:#}", read_trace(&text, 1.0).unwrap_err());
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
