//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use minisgl_frontend::{GenerateRequest, Prompt};
use minisgl_scheduler::message::OutputToken;
use minisgl_scheduler::plan::TokenLogprobs;
use minisgl_text::ChatRequest;
use serde_json::{Map, Value};

use crate::app::App;
use crate::body;
use crate::error::ApiError;
use crate::head::{Head, UsageSum, finish_reason, stop_reason};
use crate::logprobs;
use crate::message::{MessageParser, MessageParts, Piece};
use crate::reply::{Choice, Chunks, End, Reply, push_event};
use crate::tools::{self, Tools};
use crate::validate;
use crate::wire::StreamOptions;
use crate::wire::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatCompletion, ChatFields, ChatLogprobs, ChunkChoice,
    Delta,
};
use crate::wire::sampling::Common;

const PROMPT_FIELD: &str = "messages";

/// Answers a chat.
///
/// # Errors
/// If the request is wrong, or cannot be run.
pub async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    app.check_ready()?;
    let deadline = app.deadline();
    let received = body::read(request, &app).await?;
    let submit = move |app: &Arc<App>| {
        let common: Common = body::parse(&received)?;
        let fields: ChatFields = body::parse_tree(&received)?;
        app.check_model(common.model.as_deref())?;
        let mut answer = Answer {
            app: Arc::clone(app),
            head: Head::new(app, "chatcmpl-"),
            with_logprobs: fields.logprobs,
            stream_options: common.stream_options,
            parser: MessageParser::default(),
        };
        let request = generate_request(app, &common, fields, &mut answer)?;
        let generation = app.submit(vec![request], PROMPT_FIELD)?;
        let reply = Reply { generation, deadline, prompt_field: PROMPT_FIELD };
        Ok((reply, answer, common.stream))
    };
    let (reply, answer, stream) = app.work(submit).await?;
    if stream {
        let chunks = ChatChunks::new(answer, &reply);
        return reply.stream(chunks).await;
    }
    let prompt_tokens = reply.generation.prompt_tokens();
    let choices = reply.collect().await?;
    Ok(answer.whole(prompt_tokens, choices))
}

/// Checks and encodes; leaves in `answer` how the model's text is to be taken apart.
fn generate_request(
    app: &App,
    common: &Common,
    fields: ChatFields,
    answer: &mut Answer,
) -> Result<GenerateRequest, ApiError> {
    let controls = validate::controls(common, 1, app.frontend.limits().vocab_size)?;
    let top = validate::top_logprobs("top_logprobs", fields.top_logprobs)?;
    if fields.top_logprobs.is_some() && !fields.logprobs {
        return Err(ApiError::invalid("top_logprobs", "needs logprobs to be true"));
    }
    let grammar = validate::form(
        app,
        fields.response_format.as_ref(),
        fields.regex.as_deref(),
        fields.grammar.as_deref(),
    )?;
    let tools = Tools::parse(fields.tools, fields.tool_choice.as_ref())?;
    let tool_format = tools.format(app.frontend.text());
    let call = tools.grammar(app.frontend.text());
    if call.is_some() && grammar.is_some() {
        return Err(ApiError::invalid("tool_choice", "excludes a form for the answer"));
    }
    let call = call.map(|call| validate::compile(app, "tools", &call)).transpose()?;
    let chat = ChatRequest {
        messages: messages(fields.messages)?,
        tools: tools.list,
        add_generation_prompt: fields
            .add_generation_prompt
            .unwrap_or(!fields.continue_final_message),
        continue_final_message: fields.continue_final_message,
        kwargs: fields.chat_template_kwargs,
    };
    if chat.add_generation_prompt && chat.continue_final_message {
        let message = "cannot be true together with add_generation_prompt";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    let prompt = app.encode(&Prompt::Chat(Box::new(chat)), PROMPT_FIELD)?;
    // An answer that is bound to a form holds no thoughts, and calls only if it must be one.
    answer.parser = match (&call, &grammar) {
        (Some(_), _) => MessageParser::of_calls(tool_format),
        (None, Some(_)) => MessageParser::default(),
        (None, None) => MessageParser::new(app.frontend.text(), &prompt, tool_format),
    };
    let mut request = controls.request(Prompt::Tokens(prompt));
    request.grammar = call.or(grammar);
    request.params.logprobs = fields.logprobs.then_some(top);
    let is_hidden = |format| tools::marks_calls_by_special_token(app.frontend.text(), format);
    request.skip_special_tokens &= !tool_format.is_some_and(is_hidden);
    Ok(request)
}

/// Checks what templates take for granted. What else a message has is the template's affair.
fn messages(messages: Vec<Map<String, Value>>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "an empty list has no answer"));
    }
    let check = |(index, mut message): (usize, Map<String, Value>)| {
        let field = |name: &str| format!("messages[{index}].{name}");
        match message.get("role").and_then(Value::as_str) {
            Some("system" | "user" | "assistant" | "tool") => {}
            // What OpenAI calls the system's role now, and templates do not know.
            Some("developer") => {
                message.insert("role".to_string(), Value::from("system"));
            }
            Some(role) => {
                let message =
                    format!("{role:?} is none of system, developer, user, assistant and tool");
                return Err(ApiError::invalid(field("role"), message));
            }
            None => return Err(ApiError::invalid(field("role"), "is missing or not a string")),
        }
        match message.get("content") {
            Some(Value::String(_) | Value::Array(_) | Value::Null) | None => {
                Ok(Value::Object(message))
            }
            Some(_) => {
                let message = "is neither a string nor a list of parts nor null";
                Err(ApiError::invalid(field("content"), message))
            }
        }
    };
    messages.into_iter().enumerate().map(check).collect()
}

/// How a chat's answer is written.
struct Answer {
    app: Arc<App>,
    head: Head,
    with_logprobs: bool,
    stream_options: StreamOptions,
    /// As each choice begins.
    parser: MessageParser,
}

impl Answer {
    /// The answer in one piece.
    fn whole(&self, prompt_tokens: u32, choices: Vec<Choice>) -> Response {
        let mut sum = UsageSum::new(prompt_tokens, choices.len());
        let mut written = Vec::with_capacity(choices.len());
        for (index, choice) in choices.into_iter().enumerate() {
            sum.add_tokens(choice.tokens.len());
            sum.add_end(index, &choice.end.usage);
            written.push(self.whole_choice(index, choice));
        }
        let Head { id, created, model } = &self.head;
        let usage = sum.usage();
        let object = "chat.completion";
        Json(ChatCompletion { id, object, created: *created, model, choices: written, usage })
            .into_response()
    }

    fn whole_choice(&self, index: usize, choice: Choice) -> ChatChoice {
        let mut message = MessageParts::default();
        let mut parser = self.parser.clone();
        parser.push(&choice.text, &mut |piece| message.add(piece));
        parser.finish(&mut |piece| message.add(piece));
        let finish_reason = message.finish_reason(&choice.end);
        let MessageParts { content, reasoning, calls } = message;
        let is_silent = content.is_empty() && !calls.is_empty();
        let message = AssistantMessage {
            role: "assistant",
            content: (!is_silent).then_some(content),
            reasoning_content: (!reasoning.is_empty()).then_some(reasoning),
            tool_calls: calls,
        };
        ChatChoice {
            index,
            message,
            logprobs: self.logprobs(&choice.tokens),
            finish_reason,
            stop_reason: stop_reason(&self.app, choice.end.stop),
        }
    }

    fn logprobs(&self, tokens: &[OutputToken]) -> Option<ChatLogprobs> {
        self.with_logprobs.then(|| logprobs::chat(&self.app.frontend.text().tokenizer, tokens))
    }
}

/// A chat's answer as chunks.
struct ChatChunks {
    answer: Answer,
    choices: Vec<ChoiceState>,
    sum: UsageSum,
}

/// What was written of a choice.
struct ChoiceState {
    parser: MessageParser,
    has_role: bool,
    has_calls: bool,
}

impl ChatChunks {
    fn new(answer: Answer, reply: &Reply) -> Self {
        let choices = reply.generation.choices();
        let state =
            || ChoiceState { parser: answer.parser.clone(), has_role: false, has_calls: false };
        let states = (0..choices).map(|_| state()).collect();
        let sum = UsageSum::new(reply.generation.prompt_tokens(), choices);
        Self { answer, choices: states, sum }
    }

    /// The chunk that begins a choice.
    fn begin(&mut self, index: usize, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.choices[index].has_role, true) {
            let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
            self.push(ChunkChoice { index, delta, ..ChunkChoice::default() }, out);
        }
    }

    fn push(&self, choice: ChunkChoice<'_>, out: &mut Vec<u8>) {
        let usage = self.answer.stream_options.continuous_usage_stats.then(|| self.sum.usage());
        self.push_chunk([choice], usage, out);
    }

    fn push_chunk<'a>(
        &'a self,
        choices: impl Into<Vec<ChunkChoice<'a>>>,
        usage: Option<crate::wire::Usage>,
        out: &mut Vec<u8>,
    ) {
        let Head { id, created, model } = &self.answer.head;
        let object = "chat.completion.chunk";
        let choices = choices.into();
        push_event(out, &ChatChunk { id, object, created: *created, model, choices, usage });
    }

    /// Writes what a parser makes of a choice's text; log-probabilities go with the first piece.
    fn push_pieces(
        &mut self,
        index: usize,
        mut logprobs: Option<ChatLogprobs>,
        out: &mut Vec<u8>,
        parse: impl FnOnce(&mut MessageParser, &mut dyn FnMut(Piece<'_>)),
    ) {
        let mut parser = std::mem::take(&mut self.choices[index].parser);
        let mut has_calls = false;
        parse(&mut parser, &mut |piece| {
            let delta = match piece {
                Piece::Content(text) => Delta { content: Some(text), ..Delta::default() },
                Piece::Reasoning(text) => {
                    Delta { reasoning_content: Some(text), ..Delta::default() }
                }
                Piece::Call(call) => {
                    has_calls = true;
                    Delta { tool_calls: vec![call], ..Delta::default() }
                }
            };
            let logprobs = logprobs.take();
            self.push(ChunkChoice { index, delta, logprobs, ..ChunkChoice::default() }, out);
        });
        if let Some(logprobs) = logprobs.filter(|logprobs| !logprobs.content.is_empty()) {
            let delta = Delta { content: Some(""), ..Delta::default() };
            let logprobs = Some(logprobs);
            self.push(ChunkChoice { index, delta, logprobs, ..ChunkChoice::default() }, out);
        }
        self.choices[index].parser = parser;
        self.choices[index].has_calls |= has_calls;
    }
}

impl Chunks for ChatChunks {
    fn prompt(&mut self, _: usize, _: Vec<Option<TokenLogprobs>>, _: &mut Vec<u8>) {}

    fn text(&mut self, index: usize, text: &str, tokens: &[OutputToken], out: &mut Vec<u8>) {
        self.begin(index, out);
        self.sum.add_tokens(tokens.len());
        let logprobs = self.answer.logprobs(tokens);
        self.push_pieces(index, logprobs, out, |parser, piece| parser.push(text, piece));
    }

    fn end(&mut self, index: usize, end: End, out: &mut Vec<u8>) {
        self.begin(index, out);
        self.sum.add_end(index, &end.usage);
        self.push_pieces(index, None, out, MessageParser::finish);
        let is_call = self.choices[index].has_calls && !end.is_length;
        let choice = ChunkChoice {
            index,
            finish_reason: Some(if is_call { "tool_calls" } else { finish_reason(&end) }),
            stop_reason: stop_reason(&self.answer.app, end.stop),
            ..ChunkChoice::default()
        };
        self.push(choice, out);
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        if self.answer.stream_options.include_usage {
            self.push_chunk([], Some(self.sum.usage()), out);
        }
    }
}
