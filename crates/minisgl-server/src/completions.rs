//! `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use minisgl_frontend::{GenerateRequest, Prompt};
use minisgl_scheduler::message::OutputToken;
use minisgl_scheduler::plan::TokenLogprobs;
use serde_json::Value;

use crate::app::App;
use crate::body;
use crate::error::ApiError;
use crate::head::{Head, UsageSum, finish_reason, stop_reason};
use crate::logprobs::CompletionScores;
use crate::reply::{Choice, Chunks, End, Reply, push_event};
use crate::validate;
use crate::wire::completion::{Completion, CompletionChoice, CompletionFields, CompletionLogprobs};
use crate::wire::sampling::Common;
use crate::wire::{Prompts, StreamOptions, Usage};

const PROMPT_FIELD: &str = "prompt";
/// OpenAI's default.
const MAX_TOKENS: i64 = 16;

/// Continues texts.
///
/// # Errors
/// If the request is wrong, or cannot be run.
pub async fn completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    app.check_ready()?;
    let deadline = app.deadline();
    let received = body::read(request, &app).await?;
    let submit = move |app: &Arc<App>| {
        let common: Common = body::parse(&received)?;
        let fields: CompletionFields = body::parse(&received)?;
        app.check_model(common.model.as_deref())?;
        let (form, mut request) = prepare(app, &common, &fields)?;
        let echoes = if fields.echo { echoes(app, &fields.prompt) } else { Vec::new() };
        let prompts = prompts(app, fields.prompt, PROMPT_FIELD)?;
        let mut requests = Vec::with_capacity(prompts.len());
        let mut choices = Vec::new();
        for (index, ids) in prompts.into_iter().enumerate() {
            let mut choice = ChoiceState::default();
            if let Some(text) = echoes.get(index) {
                choice.echo = Some(Echo { text: text.clone(), ids: ids.clone() });
            }
            choices.extend(std::iter::repeat_n(choice, form.n));
            request.prompt = Prompt::Tokens(ids);
            requests.push(request.clone());
        }
        let generation = app.submit(requests, PROMPT_FIELD)?;
        let sum = UsageSum::new(generation.prompt_tokens(), form.n);
        let reply = Reply { generation, deadline, prompt_field: PROMPT_FIELD };
        Ok((reply, CompletionChunks { form, choices, sum }, common.stream))
    };
    let (reply, mut chunks, stream) = app.work(submit).await?;
    if stream {
        return reply.stream(chunks).await;
    }
    let choices = reply.collect().await?;
    Ok(chunks.whole(choices))
}

fn prepare(
    app: &Arc<App>,
    common: &Common,
    fields: &CompletionFields,
) -> Result<(Form, GenerateRequest), ApiError> {
    if fields.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "is not supported"));
    }
    let format = fields.response_format.as_ref();
    let format: Option<Value> =
        format.map(|format| body::parse_tree(format.get().as_bytes())).transpose()?;
    let grammar =
        validate::form(app, format.as_ref(), fields.regex.as_deref(), fields.grammar.as_deref())?;
    let mut common = common.clone();
    if common.max_completion_tokens.is_none() {
        common.max_tokens.get_or_insert(MAX_TOKENS);
    }
    // With `echo`, the prompt and its log-probabilities may be all that is wanted.
    let max_tokens_min = i64::from(!fields.echo);
    let controls = validate::controls(&common, max_tokens_min, app.frontend.limits().vocab_size)?;
    if fields.best_of.is_some_and(|best_of| best_of != i64::from(controls.n)) {
        return Err(ApiError::invalid("best_of", "is not supported but where it is n"));
    }
    let mut request = controls.request(Prompt::Tokens(Vec::new()));
    let top = validate::top_logprobs("logprobs", fields.logprobs)?;
    let logprobs = fields.logprobs.is_some().then_some(top);
    request.grammar = grammar;
    request.params.logprobs = logprobs;
    if fields.echo && logprobs.is_some() {
        if controls.n > 1 {
            return Err(ApiError::invalid("n", "echo with logprobs has one choice a prompt"));
        }
        request.prompt_logprobs = logprobs;
    }
    let form = Form {
        app: Arc::clone(app),
        head: Head::new(app, "cmpl-"),
        with_logprobs: logprobs.is_some(),
        stream_options: common.stream_options,
        n: controls.n as usize,
    };
    Ok((form, request))
}

/// What `echo` puts in front of each prompt's choices.
fn echoes(app: &App, prompts: &Prompts) -> Vec<String> {
    let decode = |ids: &Vec<u32>| app.frontend.text().tokenizer.decode(ids, false);
    match prompts {
        Prompts::Text(text) => vec![text.clone()],
        Prompts::Texts(texts) => texts.clone(),
        Prompts::Tokens(ids) => vec![decode(ids)],
        Prompts::TokenLists(lists) => lists.iter().map(decode).collect(),
    }
}

/// The ids of every prompt.
///
/// # Errors
/// If there is none, or one cannot be encoded.
pub fn prompts(
    app: &App,
    prompts: Prompts,
    field: &'static str,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text| app.frontend.encode(&Prompt::Text(text));
    let encoded = match prompts {
        Prompts::Tokens(ids) => Ok(vec![ids]),
        Prompts::TokenLists(lists) => Ok(lists),
        Prompts::Text(text) => encode(text).map(|ids| vec![ids]),
        Prompts::Texts(texts) => texts.into_iter().map(encode).collect(),
    };
    let prompts = encoded.map_err(|error| ApiError::from_submit(&error, field))?;
    if prompts.is_empty() {
        return Err(ApiError::invalid(field, "an empty list has no continuation"));
    }
    Ok(prompts)
}

/// What all choices' texts have in common.
struct Form {
    app: Arc<App>,
    head: Head,
    with_logprobs: bool,
    stream_options: StreamOptions,
    /// Choices for each prompt.
    n: usize,
}

/// The answer, in chunks or whole.
struct CompletionChunks {
    form: Form,
    choices: Vec<ChoiceState>,
    sum: UsageSum,
}

/// What a choice still has in front of it, and its scores.
#[derive(Clone, Debug, Default)]
struct ChoiceState {
    echo: Option<Echo>,
    prompt: Vec<Option<TokenLogprobs>>,
    scores: CompletionScores,
}

/// A prompt to be repeated.
#[derive(Clone, Debug)]
struct Echo {
    text: String,
    ids: Vec<u32>,
}

impl CompletionChunks {
    fn whole(&mut self, choices: Vec<Choice>) -> Response {
        let mut texts = Vec::with_capacity(choices.len());
        let mut ends = Vec::with_capacity(choices.len());
        for (index, choice) in choices.into_iter().enumerate() {
            self.choices[index].prompt = choice.prompt;
            let (mut text, mut logprobs) = self.echo(index).unwrap_or_default();
            text.push_str(&choice.text);
            self.sum.add_tokens(choice.tokens.len());
            self.sum.add_end(index, &choice.end.usage);
            if let Some(new) = self.score(index, &choice.tokens) {
                match &mut logprobs {
                    Some(logprobs) => logprobs.append(new),
                    None => logprobs = Some(new),
                }
            }
            texts.push(text);
            ends.push((logprobs, choice.end));
        }
        let written = texts.iter().zip(ends).enumerate().map(|(index, (text, (logprobs, end)))| {
            CompletionChoice {
                index,
                text,
                logprobs,
                finish_reason: Some(finish_reason(&end)),
                stop_reason: stop_reason(&self.form.app, end.stop),
            }
        });
        Json(self.completion(written.collect(), Some(self.sum.usage()))).into_response()
    }

    /// The repeated prompt with its scores; only once for each choice.
    fn echo(&mut self, index: usize) -> Option<(String, Option<CompletionLogprobs>)> {
        let choice = &mut self.choices[index];
        let Echo { text, ids } = choice.echo.take()?;
        let tokenizer = &self.form.app.frontend.text().tokenizer;
        let logprobs = self.form.with_logprobs.then(|| {
            for (index, &id) in ids.iter().enumerate() {
                let logprobs = choice.prompt.get(index).and_then(Option::as_ref);
                choice.scores.push(tokenizer, id, logprobs);
            }
            choice.scores.take()
        });
        choice.prompt = Vec::new();
        Some((text, logprobs))
    }

    fn score(&mut self, index: usize, tokens: &[OutputToken]) -> Option<CompletionLogprobs> {
        if !self.form.with_logprobs {
            return None;
        }
        let tokenizer = &self.form.app.frontend.text().tokenizer;
        let scores = &mut self.choices[index].scores;
        for token in tokens {
            scores.push(tokenizer, token.id, token.logprobs.as_ref());
        }
        Some(scores.take())
    }

    fn begin(&mut self, index: usize, out: &mut Vec<u8>) {
        if let Some((text, logprobs)) = self.echo(index) {
            let text = text.as_str();
            self.push(CompletionChoice { index, text, logprobs, ..Default::default() }, out);
        }
    }

    fn push(&self, choice: CompletionChoice<'_>, out: &mut Vec<u8>) {
        let usage = self.form.stream_options.continuous_usage_stats.then(|| self.sum.usage());
        push_event(out, &self.completion(vec![choice], usage));
    }

    fn completion<'a>(
        &'a self,
        choices: Vec<CompletionChoice<'a>>,
        usage: Option<Usage>,
    ) -> Completion<'a> {
        let Head { id, created, model } = &self.form.head;
        Completion { id, object: "text_completion", created: *created, model, choices, usage }
    }
}

impl Chunks for CompletionChunks {
    fn prompt(&mut self, index: usize, logprobs: Vec<Option<TokenLogprobs>>, _: &mut Vec<u8>) {
        self.choices[index].prompt = logprobs;
    }

    fn text(&mut self, index: usize, text: &str, tokens: &[OutputToken], out: &mut Vec<u8>) {
        self.begin(index, out);
        self.sum.add_tokens(tokens.len());
        let logprobs = self.score(index, tokens);
        if !text.is_empty() || logprobs.is_some() {
            self.push(CompletionChoice { index, text, logprobs, ..Default::default() }, out);
        }
    }

    fn end(&mut self, index: usize, end: End, out: &mut Vec<u8>) {
        self.begin(index, out);
        self.sum.add_end(index, &end.usage);
        let choice = CompletionChoice {
            index,
            finish_reason: Some(finish_reason(&end)),
            stop_reason: stop_reason(&self.form.app, end.stop),
            ..Default::default()
        };
        self.push(choice, out);
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        if self.form.stream_options.include_usage {
            push_event(out, &self.completion(Vec::new(), Some(self.sum.usage())));
        }
    }
}
