//! Tokens to text, one at a time.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// Turns tokens into text as they come, and holds back the bytes of a character until it is whole.
/// Each byte is looked at a bounded number of times, whatever the tokens are.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The start of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Starts a text. `skip_special` leaves special tokens out of it.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, pending: Vec::new() }
    }

    /// The text that this token completes; empty while a character is not whole.
    pub fn push(&mut self, id: u32) -> String {
        if !(self.skip_special && self.tokenizer.is_special(id)) {
            self.pending.extend_from_slice(self.tokenizer.token_bytes(id).unwrap_or_default());
        }
        let mut text = String::with_capacity(self.pending.len());
        let mut rest = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            rest += chunk.valid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            if chunks.peek().is_none() && may_be_completed(chunk.invalid()) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            rest += chunk.invalid().len();
        }
        self.pending.drain(..rest);
        text
    }

    /// What is left when no token follows: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether bytes are the start of a character, rather than never part of one.
fn may_be_completed(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
