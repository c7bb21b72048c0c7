//! Chat templates: conversations to text, as Hugging Face's `apply_chat_template` renders them.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value as JinjaValue};
use serde_json::{Map, Value, json};

use crate::python;
use crate::text_model::TextError;
use crate::tool_calls::ToolFormat;

/// Instructions that a template may run; a conversation of 1,000 messages needs about 100,000.
const FUEL: u64 = 20_000_000;
/// Bytes that a template may write.
const OUTPUT_MAX: usize = 16 << 20;

/// A chat as it is to be rendered.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    /// Messages in OpenAI's form: objects with `role` and `content`.
    pub messages: Vec<Value>,
    /// Tools in OpenAI's form.
    pub tools: Option<Vec<Value>>,
    /// End with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the answer continues it.
    pub continue_final_message: bool,
    /// Further variables for the template, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
}

impl ChatRequest {
    /// A chat that asks for an answer.
    pub fn new(messages: Vec<Value>) -> Self {
        Self { messages, ..Self::default() }
    }
}

impl Default for ChatRequest {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: Map::new(),
        }
    }
}

/// A model's chat template, compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Map<String, Value>,
    takes_parts: bool,
    tool_format: Option<ToolFormat>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ChatTemplate").field(&self.source).finish()
    }
}

const CHAT: &str = "chat";
/// What a template that knows tools apart is called where a model ships several.
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are its variables `bos_token`, `eos_token`, ….
    ///
    /// # Errors
    /// If the template's syntax is wrong; the message names the line.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        // Syntax before settings: they apply to templates that are added after them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| template_error(&error))?);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(python::formatter);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", python::string);
        let tool_format = ToolFormat::detect(source);
        let source = source.to_string();
        let mut template =
            Self { environment, source, special_tokens, takes_parts: false, tool_format };
        template.add(CHAT, &template.source.clone())?;
        template.takes_parts = template.finds_text_in_parts();
        Ok(template)
    }

    /// Adds the template that is used where a request brings tools.
    ///
    /// # Errors
    /// If the template's syntax is wrong.
    pub fn with_tool_use(mut self, source: &str) -> Result<Self, TextError> {
        self.add(TOOL_USE, source)?;
        self.tool_format = ToolFormat::detect(source);
        Ok(self)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TextError> {
        let source = without_generation_tags(source);
        self.environment.add_template_owned(name, source).map_err(|error| template_error(&error))
    }

    /// Templates differ in whether a content may be a list of parts; trying it tells.
    fn finds_text_in_parts(&self) -> bool {
        let parts = json!([{"type": "text", "text": "a part's text"}]);
        let request = ChatRequest::new(vec![json!({"role": "user", "content": parts})]);
        self.render(&request)
            .is_ok_and(|text| text.contains("a part's text") && !text.contains("type"))
    }

    /// How the model is told to write its calls, if the template knows tools.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// Whether the model thinks between `<think>` and `</think>` before it answers.
    pub fn thinks(&self) -> bool {
        self.source.contains("</think>") || self.source.contains("<think>")
    }

    /// Whether a message's content may be a list of parts, rather than a text.
    pub fn takes_parts(&self) -> bool {
        self.takes_parts
    }

    /// As the model ships it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a chat.
    ///
    /// # Errors
    /// If the template fails or raises an exception, runs too long, or writes too much.
    pub fn render(&self, request: &ChatRequest) -> Result<String, TextError> {
        let mut messages = request.messages.clone();
        let continued = request.continue_final_message;
        if continued {
            mark_end(messages.last_mut())?;
        }
        let mut context = self.special_tokens.clone();
        context.extend(request.kwargs.clone());
        context.insert("messages".into(), messages.into());
        // Templates ask `is not none` or `is defined`; Hugging Face always defines it.
        context.insert("tools".into(), request.tools.clone().map_or(Value::Null, Value::from));
        context.entry("documents").or_insert(Value::Null);
        let add_generation_prompt = request.add_generation_prompt && !continued;
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let named =
            self.environment.get_template(TOOL_USE).ok().filter(|_| request.tools.is_some());
        let template = match named {
            Some(template) => template,
            None => self.environment.get_template(CHAT).map_err(|error| template_error(&error))?,
        };
        let mut output = LimitedOutput(Vec::new());
        template
            .render_captured_to(Serde(&context), &mut output)
            .map_err(|error| template_error(&error))?;
        let text = String::from_utf8_lossy(&output.0).into_owned();
        if continued { cut_at_mark(text) } else { Ok(text) }
    }
}

/// Follows the last message's content, so that its end is found in the rendered text. The space
/// tells whether the template strips contents.
const END_MARK: &str = "\u{FDD1} ";

fn mark_end(message: Option<&mut Value>) -> Result<(), TextError> {
    let content = message.and_then(|message| message.get_mut("content"));
    match content {
        Some(Value::String(text)) => {
            text.push_str(END_MARK);
            Ok(())
        }
        _ => Err(TextError::Chat(
            "continue_final_message needs a last message with text as its content".into(),
        )),
    }
}

fn cut_at_mark(mut text: String) -> Result<String, TextError> {
    let mark = END_MARK.trim_end();
    let Some(at) = text.rfind(mark) else {
        return Err(TextError::Chat(
            "continue_final_message: the chat template leaves the last message out".into(),
        ));
    };
    let is_stripped = !text[at..].starts_with(END_MARK);
    text.truncate(at);
    if is_stripped {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// `{% generation %}` tells training which tokens are the assistant's; here it is nothing.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (tag, after) = (&rest[start + 2..start + length], &rest[start + length..]);
        text.push_str(&rest[..start + 2]);
        match tag.trim_matches(['-', '+']).trim() {
            "generation" => text.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => text.push_str(&tag.replace("endgeneration", "endif")),
            _ => text.push_str(tag),
        }
        rest = after;
    }
    text + rest
}

struct LimitedOutput(Vec<u8>);

impl std::io::Write for LimitedOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_MAX {
            return Err(std::io::Error::other("the chat template writes too much"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn template_error(error: &Error) -> TextError {
    let raised = error.detail().and_then(|detail| detail.strip_prefix(RAISED));
    TextError::Template(match (error.kind(), raised) {
        (ErrorKind::OutOfFuel | ErrorKind::WriteFailure, _) => {
            "it runs too long, or writes too much".to_string()
        }
        (_, Some(message)) => message.to_string(),
        _ => error.to_string(),
    })
}

/// Tells what a template says itself from what is said about it.
const RAISED: &str = "\u{FDD1}";

fn raise_exception(message: String) -> Result<JinjaValue, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn strftime_now(format: String) -> Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::ZonedDateTime::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}
