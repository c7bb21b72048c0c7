//! An assistant's message, taken apart: what it thinks, what it says, what it calls.

use crate::head::finish_reason;
use crate::reply::End;
use crate::wire::chat::ToolCall;

/// A piece of a message.
#[derive(Debug)]
#[expect(dead_code, reason = "the parser does not yet tell thoughts and calls from content")]
pub enum Piece<'a> {
    /// More of what it says.
    Content(&'a str),
    /// More of what it thinks.
    Reasoning(&'a str),
    /// A call, or more of its arguments.
    Call(ToolCall),
}

/// Takes one choice's text apart as it comes.
#[derive(Clone, Debug, Default)]
pub struct MessageParser {}

impl MessageParser {
    /// Tells `piece` what this text is.
    pub fn push(&mut self, text: &str, piece: &mut dyn FnMut(Piece<'_>)) {
        if !text.is_empty() {
            piece(Piece::Content(text));
        }
    }

    /// Tells `piece` what was held back, when no more text comes.
    pub fn finish(&mut self, piece: &mut dyn FnMut(Piece<'_>)) {
        let _ = piece;
    }
}

/// A whole message, gathered from its pieces.
#[derive(Debug, Default)]
pub struct MessageParts {
    /// What it says.
    pub content: String,
    /// What it thinks.
    pub reasoning: String,
    /// What it calls.
    pub calls: Vec<ToolCall>,
}

impl MessageParts {
    /// Adds a piece.
    pub fn add(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Content(text) => self.content.push_str(text),
            Piece::Reasoning(text) => self.reasoning.push_str(text),
            Piece::Call(call) => {
                let index = call.index.unwrap_or_default();
                match self.calls.get_mut(index) {
                    Some(begun) => begun.function.arguments.push_str(&call.function.arguments),
                    // Outside a stream, a call's place in the list is its index.
                    None => self.calls.push(ToolCall { index: None, ..call }),
                }
            }
        }
    }

    /// `stop`, `length` or `tool_calls`.
    pub fn finish_reason(&self, end: &End) -> &'static str {
        if !self.calls.is_empty() && !end.is_length { "tool_calls" } else { finish_reason(end) }
    }
}
