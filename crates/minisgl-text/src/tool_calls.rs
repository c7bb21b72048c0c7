//! The calls that a model writes into its text, each family in its own form.

use std::mem;

use crate::call_object::{CallObject, Seen};

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
    /// More of the arguments of the call that began last.
    Arguments {
        /// Which call, from 0.
        index: usize,
        /// A piece of JSON, as the model wrote it.
        json: String,
    },
}

/// Finds calls in a text that comes in pieces, and gives out all of it as it comes. What may become
/// a call is held back until its name is known and its arguments begin: from there on it is one, and
/// stays one where the text breaks off. What looks like a call and is none is content. How the text
/// is cut into pieces makes no difference.
#[derive(Clone, Debug)]
pub struct ToolCallParser {
    format: ToolFormat,
    state: State,
    /// What is not given out yet.
    held: String,
    /// As much of it has been looked at, in all states but `Content` and `Behind`.
    scanned: usize,
    calls: usize,
    /// In Mistral's list of calls.
    is_list: bool,
    /// Nothing but white space and calls so far: Llama's calls begin only there.
    is_start: bool,
    /// Nothing but white space since a call, which is nobody's if another call or the end follows.
    is_after_call: bool,
}

/// Where in the text the next byte is.
#[derive(Clone, Debug)]
enum State {
    /// In text for the reader.
    Content,
    /// Behind `[TOOL_CALLS]`, with either a list or a name to come.
    Opened,
    /// In a name that `[ARGS]` follows.
    Name,
    /// In an object that is a call, or may be; or in arguments behind `[ARGS]`.
    Object(CallObject),
    /// Behind a call, before what parts it from the next.
    Behind,
}

const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const LLAMA_OPEN: &str = "<|python_tag|>";
const MISTRAL_OPEN: &str = "[TOOL_CALLS]";
const MISTRAL_ARGS: &str = "[ARGS]";
/// Between name and arguments in some of these models; what is behind it is of no use.
const MISTRAL_ID: &str = "[CALL_ID]";
/// Name and id of a call are shorter; what goes on for longer without `[ARGS]` is text.
const MISTRAL_HEAD_BYTES_MAX: usize = 256;

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
        Self {
            format,
            state: State::Content,
            held: String::new(),
            scanned: 0,
            calls: 0,
            is_list: false,
            is_start: true,
            is_after_call: false,
        }
    }

    /// Takes the next piece of the text, and gives `piece` what it is certain about.
    pub fn push(&mut self, text: &str, piece: &mut dyn FnMut(ToolPiece)) {
        self.held.push_str(text);
        loop {
            let goes_on = match mem::replace(&mut self.state, State::Content) {
                State::Content => self.read_content(piece),
                State::Opened => self.read_opened(),
                State::Name => self.read_name(piece),
                State::Object(object) => self.read_object(object, piece),
                State::Behind => self.read_behind(),
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Gives out what was held back, when no more text comes.
    pub fn finish(&mut self, piece: &mut dyn FnMut(ToolPiece)) {
        let is_call = match &self.state {
            State::Object(object) => object.has_begun(),
            // What is held is white space, or the beginning of a tag that closes.
            State::Behind => true,
            State::Content => self.is_after_call && self.held.trim().is_empty(),
            State::Opened | State::Name => false,
        };
        if !is_call {
            self.give_content(self.held.len(), piece);
        }
    }

    // Each of these reads on in one state, and returns whether to go on without more text. The next
    // state is `Content` where they say nothing.

    fn read_content(&mut self, piece: &mut dyn FnMut(ToolPiece)) -> bool {
        let text = self.held.trim_start();
        let blank = self.held.len() - text.len();
        if self.is_start && self.format == ToolFormat::Llama {
            if text.starts_with('{') {
                return self.open(blank);
            }
            if text.is_empty() {
                return false;
            }
        }
        let open = self.format.open();
        let found = self.held.find(open);
        let certain = found.unwrap_or(self.held.len() - beginning_at_end(&self.held, open));
        let holds_blank = self.is_after_call || self.is_start && self.format == ToolFormat::Llama;
        let given = if certain == blank && holds_blank { 0 } else { certain };
        self.give_content(given, piece);
        found.is_some_and(|at| self.open(at - given + open.len()))
    }

    /// What is held is an opening of so many bytes, with a call to follow.
    fn open(&mut self, len: usize) -> bool {
        self.scanned = len;
        self.state = match self.format {
            ToolFormat::Hermes | ToolFormat::Llama => State::Object(CallObject::new()),
            ToolFormat::Mistral | ToolFormat::MistralArgs => State::Opened,
        };
        true
    }

    /// A model of either kind may write what it was trained on, whatever its template says.
    fn read_opened(&mut self) -> bool {
        let rest = self.held[self.scanned..].trim_start();
        if rest.is_empty() {
            self.state = State::Opened;
            return false;
        }
        self.is_list = rest.starts_with('[');
        self.scanned = self.held.len() - rest.len() + usize::from(self.is_list);
        self.state = if self.is_list { State::Object(CallObject::new()) } else { State::Name };
        true
    }

    fn read_name(&mut self, piece: &mut dyn FnMut(ToolPiece)) -> bool {
        let rest = &self.held[self.scanned..];
        let Some(end) = rest.find(MISTRAL_ARGS).filter(|&end| end <= MISTRAL_HEAD_BYTES_MAX) else {
            if rest.len() < MISTRAL_HEAD_BYTES_MAX + MISTRAL_ARGS.len() {
                self.state = State::Name;
                return false;
            }
            self.give_content(self.scanned, piece);
            return true;
        };
        let name = rest[..end].split(MISTRAL_ID).next().unwrap_or_default().trim().to_string();
        self.scanned += end + MISTRAL_ARGS.len();
        if name.is_empty() {
            self.give_content(self.scanned, piece);
        } else {
            self.state = State::Object(CallObject::named(name));
        }
        true
    }

    fn read_object(&mut self, mut object: CallObject, piece: &mut dyn FnMut(ToolPiece)) -> bool {
        while let Some(&byte) = self.held.as_bytes().get(self.scanned) {
            let seen = object.step(byte);
            self.scanned += usize::from(seen != Seen::Broken);
            match seen {
                Seen::Part => {}
                Seen::Begin(name) => {
                    self.held.drain(..self.scanned - 1);
                    self.scanned = 1;
                    self.give_start(name, piece);
                }
                Seen::ArgumentsEnd => {
                    self.give_arguments(piece);
                    if object.has_ended() {
                        self.state = State::Behind;
                        return true;
                    }
                }
                Seen::End | Seen::Broken => {
                    self.end_object(object, seen, piece);
                    return true;
                }
            }
        }
        if object.is_in_arguments() {
            self.give_arguments(piece);
        }
        self.state = State::Object(object);
        false
    }

    fn end_object(&mut self, object: CallObject, seen: Seen, piece: &mut dyn FnMut(ToolPiece)) {
        if !object.has_begun() {
            let whole = if seen == Seen::End { object.whole() } else { None };
            let Some((name, json)) = whole else {
                return self.give_content(self.scanned, piece);
            };
            let index = self.give_start(name, piece);
            piece(ToolPiece::Arguments { index, json });
        }
        self.held.drain(..mem::take(&mut self.scanned));
        self.state = State::Behind;
    }

    fn read_behind(&mut self) -> bool {
        let rest = self.held.trim_start();
        let blank = self.held.len() - rest.len();
        let (another, close) = match self.format {
            ToolFormat::Hermes => (None, Some(HERMES_CLOSE)),
            ToolFormat::Llama => (Some(';'), None),
            ToolFormat::Mistral | ToolFormat::MistralArgs if self.is_list => (Some(','), Some("]")),
            ToolFormat::Mistral | ToolFormat::MistralArgs => (None, None),
        };
        if rest.is_empty() || close.is_some_and(|close| rest != close && close.starts_with(rest)) {
            self.state = State::Behind;
            return false;
        }
        if another.is_some_and(|another| rest.starts_with(another)) {
            self.scanned = blank + 1;
            self.state = State::Object(CallObject::new());
        } else if let Some(close) = close.filter(|close| rest.starts_with(close)) {
            // It is often left out.
            self.held.drain(..blank + close.len());
        }
        true
    }

    /// Gives out so many bytes of what is held.
    fn give_content(&mut self, len: usize, piece: &mut dyn FnMut(ToolPiece)) {
        let rest = self.held.split_off(len);
        let text = mem::replace(&mut self.held, rest);
        self.scanned = 0;
        if text.is_empty() {
            return;
        }
        let is_blank = text.trim().is_empty();
        self.is_start &= is_blank;
        self.is_after_call &= is_blank;
        piece(ToolPiece::Content(text));
    }

    fn give_start(&mut self, name: String, piece: &mut dyn FnMut(ToolPiece)) -> usize {
        self.is_after_call = true;
        let index = self.calls;
        self.calls += 1;
        piece(ToolPiece::Start { index, name });
        index
    }

    /// Gives out what was scanned.
    fn give_arguments(&mut self, piece: &mut dyn FnMut(ToolPiece)) {
        let json: String = self.held.drain(..mem::take(&mut self.scanned)).collect();
        if !json.is_empty() {
            piece(ToolPiece::Arguments { index: self.calls - 1, json });
        }
    }
}

/// The length of the longest beginning of `open` that `text` ends with.
fn beginning_at_end(text: &str, open: &str) -> usize {
    (1..open.len()).rev().find(|&len| text.ends_with(&open[..len])).unwrap_or(0)
}
