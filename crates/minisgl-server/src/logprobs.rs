//! Log-probabilities in the forms that each endpoint has for them.

use std::collections::BTreeMap;

use minisgl_scheduler::message::OutputToken;
use minisgl_scheduler::plan::TokenLogprobs;
use minisgl_text::Tokenizer;

use crate::wire::chat::{Candidate, ChatLogprobs, TokenLogprob};
use crate::wire::completion::CompletionLogprobs;
use crate::wire::native::NativeLogprob;

/// What stands for the logarithm of zero, which JSON has no number for.
const LOGPROB_MIN: f32 = -9999.0;

/// As chat completions have them. `top` alternatives are shown of those that were computed.
pub fn chat(tokenizer: &Tokenizer, tokens: &[OutputToken]) -> ChatLogprobs {
    let content = tokens.iter().filter_map(|token| {
        let logprobs = token.logprobs.as_ref()?;
        let top = logprobs.top.iter();
        Some(TokenLogprob {
            token: candidate(tokenizer, token.id, logprobs.logprob),
            top_logprobs: top.map(|&(id, logprob)| candidate(tokenizer, id, logprob)).collect(),
        })
    });
    ChatLogprobs { content: content.collect() }
}

fn candidate(tokenizer: &Tokenizer, id: u32, logprob: f32) -> Candidate {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default().to_vec();
    let token = String::from_utf8_lossy(&bytes).into_owned();
    Candidate { token, logprob: logprob.max(LOGPROB_MIN), bytes }
}

/// As text completions have them, one token at a time.
#[derive(Clone, Debug, Default)]
pub struct CompletionScores {
    /// What was pushed since it was last taken.
    logprobs: CompletionLogprobs,
    /// Characters of all tokens so far.
    offset: usize,
}

impl CompletionScores {
    /// Adds a token. A prompt's first has no log-probability.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, logprobs: Option<&TokenLogprobs>) {
        let text = token_text(tokenizer, id);
        let length = text.chars().count();
        let top = logprobs.map(|logprobs| {
            // The token itself is always among them.
            let all = logprobs.top.iter().copied().chain([(id, logprobs.logprob)]);
            all.map(|(id, logprob)| (token_text(tokenizer, id), logprob.max(LOGPROB_MIN)))
                .collect::<BTreeMap<_, _>>()
        });
        self.logprobs.tokens.push(text);
        self.logprobs.token_logprobs.push(logprobs.map(|score| score.logprob.max(LOGPROB_MIN)));
        self.logprobs.top_logprobs.push(top);
        self.logprobs.text_offset.push(self.offset);
        self.offset += length;
    }
}

impl CompletionScores {
    /// What was pushed since it was last taken.
    pub fn take(&mut self) -> CompletionLogprobs {
        std::mem::take(&mut self.logprobs)
    }
}

/// A token's text, such that different tokens have different ones.
fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => {
            let escaped = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
            format!("bytes:{}", escaped.collect::<String>())
        }
    }
}

/// As SGLang's own form has them.
pub fn native(id: u32, logprobs: Option<&TokenLogprobs>) -> NativeLogprob {
    NativeLogprob(logprobs.map(|score| score.logprob.max(LOGPROB_MIN)), id, ())
}

/// The alternatives, as SGLang's own form has them.
pub fn native_top(logprobs: Option<&TokenLogprobs>) -> Vec<NativeLogprob> {
    let top = logprobs.map(|score| score.top.as_slice()).unwrap_or_default();
    top.iter().map(|&(id, p)| NativeLogprob(Some(p.max(LOGPROB_MIN)), id, ())).collect()
}
