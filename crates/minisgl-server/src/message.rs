//! An assistant's message, taken apart: what it thinks, what it says, what it calls.

use minisgl_text::{
    ChatTemplate, Part, ReasoningSplitter, TextModel, ToolCallParser, ToolFormat, ToolPiece,
};

use crate::head::{finish_reason, random_id};
use crate::reply::End;
use crate::wire::chat::{FunctionCall, ToolCall};

/// As much of a prompt's end as shows whether the template has opened the model's thinking.
const PROMPT_END: usize = 8;
/// Mistral's templates refuse call ids of any other length.
const MISTRAL_ID_LEN: usize = 9;

/// A piece of a message.
#[derive(Debug)]
pub enum Piece<'a> {
    /// More of what it says.
    Content(&'a str),
    /// More of what it thinks.
    Reasoning(&'a str),
    /// A call, or more of its arguments.
    Call(ToolCall),
}

/// Takes one choice's text apart as it comes: thoughts first, then calls out of what is said.
#[derive(Clone, Debug, Default)]
pub struct MessageParser {
    reasoning: Option<ReasoningSplitter>,
    calls: Option<CallParser>,
}

/// Finds calls in what a message says.
#[derive(Clone, Debug)]
struct CallParser {
    format: ToolFormat,
    parser: ToolCallParser,
}

impl MessageParser {
    /// For the answers to a prompt of this model; calls are found in `tool_format`.
    pub fn new(text: &TextModel, prompt: &[u32], tool_format: Option<ToolFormat>) -> Self {
        let thinks = text.template.as_ref().is_some_and(ChatTemplate::thinks);
        let prompt_end = &prompt[prompt.len().saturating_sub(PROMPT_END)..];
        let after = || ReasoningSplitter::after(&text.tokenizer.decode(prompt_end, false));
        Self { reasoning: thinks.then(after), ..Self::of_calls(tool_format) }
    }

    /// For answers without thoughts.
    pub fn of_calls(tool_format: Option<ToolFormat>) -> Self {
        let calls = |format| CallParser { format, parser: ToolCallParser::new(format) };
        Self { reasoning: None, calls: tool_format.map(calls) }
    }

    /// Tells `piece` what this text is.
    pub fn push(&mut self, text: &str, piece: &mut dyn FnMut(Piece<'_>)) {
        let Self { reasoning, calls } = self;
        match reasoning {
            Some(splitter) => splitter.push(text, &mut |part| take_part(calls, part, piece)),
            None => take_part(calls, Part::Content(text), piece),
        }
    }

    /// Tells `piece` what was held back, when no more text comes.
    pub fn finish(&mut self, piece: &mut dyn FnMut(Piece<'_>)) {
        let Self { reasoning, calls } = self;
        if let Some(splitter) = reasoning {
            splitter.finish(&mut |part| take_part(calls, part, piece));
        }
        if let Some(CallParser { format, parser }) = calls {
            parser.finish(&mut |found| give(*format, found, piece));
        }
    }
}

fn take_part(calls: &mut Option<CallParser>, part: Part<'_>, piece: &mut dyn FnMut(Piece<'_>)) {
    match (part, calls) {
        (Part::Reasoning(text), _) => piece(Piece::Reasoning(text)),
        (Part::Content(text), Some(CallParser { format, parser })) => {
            parser.push(text, &mut |found| give(*format, found, piece));
        }
        (Part::Content(""), None) => {}
        (Part::Content(text), None) => piece(Piece::Content(text)),
    }
}

fn give(format: ToolFormat, found: ToolPiece, piece: &mut dyn FnMut(Piece<'_>)) {
    match found {
        ToolPiece::Content(text) => piece(Piece::Content(&text)),
        ToolPiece::Start { index, name } => {
            let function = FunctionCall { name: Some(name), arguments: String::new() };
            let (index, id) = (Some(index), Some(call_id(format)));
            piece(Piece::Call(ToolCall { index, id, r#type: Some("function"), function }));
        }
        ToolPiece::Arguments { index, json } => {
            let function = FunctionCall { name: None, arguments: json };
            piece(Piece::Call(ToolCall { index: Some(index), id: None, r#type: None, function }));
        }
    }
}

fn call_id(format: ToolFormat) -> String {
    match format {
        ToolFormat::Mistral | ToolFormat::MistralArgs => {
            random_id("")[..MISTRAL_ID_LEN].to_string()
        }
        ToolFormat::Hermes | ToolFormat::Llama => random_id("call_"),
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
