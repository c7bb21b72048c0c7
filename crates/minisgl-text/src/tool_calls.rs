//! The calls that a model writes into its text, each family in its own form.

use serde_json::Value;
use serde_json::value::RawValue;

/// How a model writes a call of a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes and Qwen: `<tool_call>{"name": …, "arguments": …}</tool_call>`, one for each call.
    Hermes,
    /// Llama 3.1: the whole text is `{"name": …, "parameters": …}`, maybe behind
    /// `<|python_tag|>`; several are parted by `;`.
    Llama,
    /// Mistral: `[TOOL_CALLS][{"name": …, "arguments": …}, …]`.
    Mistral,
    /// Mistral since 2025: `[TOOL_CALLS]name[ARGS]{…}`, one for each call.
    MistralArgs,
}

/// A piece of a model's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text for the reader; never empty.
    Content(String),
    /// A call begins.
    Start {
        /// Which call, from 0.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// The arguments of the call that began last: JSON, as the model wrote it.
    Arguments {
        /// Which call, from 0.
        index: usize,
        /// JSON.
        json: String,
    },
}

/// Finds calls in a text that comes in pieces. Content is given out as it comes, a call when it
/// is whole: only then is it certain to be one. What looks like a call and is none is content.
#[derive(Clone, Debug)]
pub struct ToolCallParser {
    format: ToolFormat,
    held: String,
    calls: usize,
    /// Nothing but white space and calls so far: Llama's calls begin only there.
    is_start: bool,
}

/// A call as all formats write it.
#[derive(serde::Deserialize)]
struct Call<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: &'a RawValue,
}

const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const LLAMA_OPEN: &str = "<|python_tag|>";
const MISTRAL_OPEN: &str = "[TOOL_CALLS]";
const MISTRAL_ARGS: &str = "[ARGS]";
/// Between name and arguments in some of these models; what is behind it is of no use.
const MISTRAL_ID: &str = "[CALL_ID]";

impl ToolFormat {
    /// The form that a chat template asks for, if it knows tools.
    pub fn detect(template: &str) -> Option<Self> {
        if template.contains(HERMES_OPEN) {
            Some(Self::Hermes)
        } else if template.contains(MISTRAL_OPEN) {
            let has_args = template.contains(MISTRAL_ARGS);
            Some(if has_args { Self::MistralArgs } else { Self::Mistral })
        } else if template.contains(LLAMA_OPEN) || template.contains("\"parameters\": ") {
            Some(Self::Llama)
        } else {
            None
        }
    }

    /// What stands before a call, or may. A special token in some vocabularies.
    pub fn open(self) -> &'static str {
        match self {
            Self::Hermes => HERMES_OPEN,
            Self::Llama => LLAMA_OPEN,
            Self::Mistral | Self::MistralArgs => MISTRAL_OPEN,
        }
    }
}

impl ToolCallParser {
    /// Looks for calls in this form.
    pub fn new(format: ToolFormat) -> Self {
        Self { format, held: String::new(), calls: 0, is_start: true }
    }

    /// Takes the next piece of the text, and gives `piece` what it is certain about.
    pub fn push(&mut self, text: &str, piece: &mut dyn FnMut(ToolPiece)) {
        self.held.push_str(text);
        if self.is_start && self.format == ToolFormat::Llama {
            // A text that begins like a call is a call or not as a whole.
            let text = self.held.trim_start();
            if text.is_empty() || text.starts_with('{') || starts_alike(text, LLAMA_OPEN) {
                return;
            }
        }
        loop {
            let open = self.format.open();
            let Some(at) = self.held.find(open) else {
                let certain = self.held.len() - beginning_at_end(&self.held, open);
                let rest = self.held.split_off(certain);
                let text = std::mem::replace(&mut self.held, rest);
                self.give_content(text, piece);
                return;
            };
            let rest = self.held.split_off(at);
            let text = std::mem::replace(&mut self.held, rest);
            self.give_content(text, piece);
            // Only Hermes says where a call ends; the others' calls end with the text.
            let end = (self.format == ToolFormat::Hermes).then(|| self.held.find(HERMES_CLOSE));
            let Some(Some(end)) = end else { return };
            let rest = self.held.split_off(end + HERMES_CLOSE.len());
            let call = std::mem::replace(&mut self.held, rest);
            self.give_calls(call, piece);
        }
    }

    /// Gives out what was held back, when no more text comes.
    pub fn finish(&mut self, piece: &mut dyn FnMut(ToolPiece)) {
        let held = std::mem::take(&mut self.held);
        self.give_calls(held, piece);
    }

    fn give_content(&mut self, text: String, piece: &mut dyn FnMut(ToolPiece)) {
        let is_blank = text.trim().is_empty();
        self.is_start &= is_blank;
        // The line ends between calls are nobody's.
        if !(text.is_empty() || is_blank && self.calls > 0) {
            piece(ToolPiece::Content(text));
        }
    }

    fn give_calls(&mut self, text: String, piece: &mut dyn FnMut(ToolPiece)) {
        let Some(calls) = parse(self.format, &text) else {
            return self.give_content(text, piece);
        };
        for Call { name, arguments } in calls {
            let index = self.calls;
            self.calls += 1;
            piece(ToolPiece::Start { index, name });
            piece(ToolPiece::Arguments { index, json: arguments.get().to_string() });
        }
    }
}

/// The calls in a text that should hold nothing else; `None` if it holds anything else.
fn parse(format: ToolFormat, text: &str) -> Option<Vec<Call<'_>>> {
    let text = text.trim();
    let calls = match format {
        ToolFormat::Hermes => {
            // A model that stops with the call may leave out the tag that closes.
            let body = text.strip_prefix(HERMES_OPEN)?;
            vec![serde_json::from_str(body.strip_suffix(HERMES_CLOSE).unwrap_or(body)).ok()?]
        }
        // A model of either kind may write what it was trained on, whatever its template says.
        ToolFormat::Mistral | ToolFormat::MistralArgs => {
            let body = text.strip_prefix(MISTRAL_OPEN)?;
            match body.trim_start().starts_with('[') {
                true => serde_json::from_str(body).ok()?,
                false => parse_args(body)?,
            }
        }
        ToolFormat::Llama => {
            let mut rest = text.strip_prefix(LLAMA_OPEN).unwrap_or(text);
            let mut calls = Vec::new();
            loop {
                let mut values = serde_json::Deserializer::from_str(rest).into_iter();
                calls.push(values.next()?.ok()?);
                rest = rest[values.byte_offset()..].trim_start();
                match rest.strip_prefix(';') {
                    Some(more) => rest = more,
                    None if rest.is_empty() => break,
                    None => return None,
                }
            }
            calls
        }
    };
    let is_object = |call: &Call<'_>| {
        !call.name.is_empty()
            && serde_json::from_str::<Value>(call.arguments.get()).is_ok_and(|v| v.is_object())
    };
    (!calls.is_empty() && calls.iter().all(is_object)).then_some(calls)
}

/// `name[ARGS]{…}`, and more of them, each behind another opening.
fn parse_args(mut rest: &str) -> Option<Vec<Call<'_>>> {
    let mut calls = Vec::new();
    loop {
        let (head, body) = rest.split_once(MISTRAL_ARGS)?;
        let name = head.split(MISTRAL_ID).next()?.trim().to_string();
        let mut values = serde_json::Deserializer::from_str(body).into_iter();
        calls.push(Call { name, arguments: values.next()?.ok()? });
        rest = body[values.byte_offset()..].trim_start();
        if rest.is_empty() {
            return Some(calls);
        }
        rest = rest.strip_prefix(MISTRAL_OPEN)?;
    }
}

/// Whether one of the two begins with the other.
fn starts_alike(text: &str, open: &str) -> bool {
    text.starts_with(open) || open.starts_with(text)
}

/// The length of the longest beginning of `open` that `text` ends with.
fn beginning_at_end(text: &str, open: &str) -> usize {
    (1..open.len()).rev().find(|&len| text.ends_with(&open[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Content, and name and arguments of each call, of a text that comes in `pieces`.
    fn split(format: ToolFormat, pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let mut parser = ToolCallParser::new(format);
        let (mut content, mut calls) = (String::new(), Vec::new());
        let mut take = |piece: ToolPiece| match piece {
            ToolPiece::Content(text) => {
                assert!(!text.is_empty());
                content.push_str(&text);
            }
            ToolPiece::Start { index, name } => {
                assert_eq!(index, calls.len());
                calls.push((name, String::new()));
            }
            ToolPiece::Arguments { index, json } => calls[index].1.push_str(&json),
        };
        for piece in pieces {
            parser.push(piece, &mut take);
        }
        parser.finish(&mut take);
        (content, calls)
    }

    /// A text in a format, its content, and the names and arguments of its calls.
    type Case<'a> = (ToolFormat, &'a str, &'a str, &'a [(&'a str, &'a str)]);

    #[test]
    fn texts_are_parsed_the_same_however_they_are_cut() {
        use ToolFormat::{Hermes, Llama, Mistral, MistralArgs};
        let one = r#"{"a": "é<b>"}"#;
        let table: [Case<'_>; 19] = [
            (
                Hermes,
                "Let me look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"é<b>\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
                "Let me look.\n",
                &[("f", one), ("g", "{}")],
            ),
            (Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {}}", "", &[("f", "{}")]),
            (Hermes, "<tool_call>{oops}</tool_call> x", "<tool_call>{oops}</tool_call> x", &[]),
            (Hermes, "<tool_call>{\"name\": \"f\"", "<tool_call>{\"name\": \"f\"", &[]),
            (Hermes, "1 < 2 <tool", "1 < 2 <tool", &[]),
            (Llama, r#"{"name": "f", "parameters": {"a": "é<b>"}}"#, "", &[("f", one)]),
            (
                Llama,
                r#"<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}"#,
                "",
                &[("f", "{}"), ("g", "{}")],
            ),
            (Llama, r#"{"answer": 42}"#, r#"{"answer": 42}"#, &[]),
            (Llama, "<|py is é", "<|py is é", &[]),
            (Llama, "Say {\"name\": 1}", "Say {\"name\": 1}", &[]),
            (
                Mistral,
                r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é<b>"}}, {"name": "g", "arguments": {}}]"#,
                "",
                &[("f", one), ("g", "{}")],
            ),
            (Mistral, "a [TOOL_CALLS] [{", "a [TOOL_CALLS] [{", &[]),
            (Mistral, "[TOOL_CALLS][]", "[TOOL_CALLS][]", &[]),
            (
                Mistral,
                r#"[TOOL_CALLS][{"name": "f", "arguments": "x"}]"#,
                r#"[TOOL_CALLS][{"name": "f", "arguments": "x"}]"#,
                &[],
            ),
            (
                MistralArgs,
                r#"So: [TOOL_CALLS]f[ARGS]{"a": "é<b>"}[TOOL_CALLS]g[CALL_ID]1a2[ARGS]{}"#,
                "So: ",
                &[("f", one), ("g", "{}")],
            ),
            (MistralArgs, r#"[TOOL_CALLS][{"name": "f", "arguments": {}}]"#, "", &[("f", "{}")]),
            (MistralArgs, "[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]f[ARGS]{", &[]),
            (MistralArgs, "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS][ARGS]{}", &[]),
            (MistralArgs, "[TOOL_CALLS]f[ARGS]{} so", "[TOOL_CALLS]f[ARGS]{} so", &[]),
        ];
        for (format, text, content, calls) in table {
            let calls = calls.iter().map(|&(n, a)| (n.to_string(), a.to_string())).collect();
            let expected = (content.to_string(), calls);
            let cuts: Vec<usize> =
                (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
            for &first in &cuts {
                for &second in cuts.iter().filter(|&&second| second >= first) {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    assert_eq!(split(format, &pieces), expected, "{pieces:?}");
                }
            }
            let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
            assert_eq!(split(format, &pieces), expected, "{text:?} by characters");
        }
    }

    #[test]
    fn content_is_given_out_as_it_comes() {
        let mut parser = ToolCallParser::new(ToolFormat::Hermes);
        let mut given = Vec::new();
        for text in ["Hi", " there <", "b> <tool_call>"] {
            parser.push(text, &mut |piece| given.push(piece));
        }
        let content = ["Hi", " there ", "<b> "].map(|text| ToolPiece::Content(text.to_string()));
        assert_eq!(given, content);
    }

    #[test]
    fn templates_say_their_format() {
        assert_eq!(ToolFormat::detect("within <tool_call></tool_call>"), Some(ToolFormat::Hermes));
        assert_eq!(ToolFormat::detect("{{ '[TOOL_CALLS]' }}"), Some(ToolFormat::Mistral));
        let newer = "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}";
        assert_eq!(ToolFormat::detect(newer), Some(ToolFormat::MistralArgs));
        assert_eq!(ToolFormat::detect("{{ \"<|python_tag|>\" }}"), Some(ToolFormat::Llama));
        assert_eq!(ToolFormat::detect("{{ messages }}"), None);
    }
}
