//! `/generate`, SGLang's own form.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use minisgl_frontend::{GenerateRequest, Grammar, GrammarSource, Prompt};
use minisgl_scheduler::message::OutputToken;
use minisgl_scheduler::plan::TokenLogprobs;

use crate::app::App;
use crate::body;
use crate::completions::prompts;
use crate::error::ApiError;
use crate::head::random_id;
use crate::logprobs;
use crate::reply::{Choice, Chunks, End, Reply, Stop, push_event};
use crate::validate;
use crate::wire::Prompts;
use crate::wire::native::{
    MetaInfo, NativeAnswer, NativeFinish, NativeLogprob, NativeMatch, NativeOutput, NativeRequest,
    NativeSampling,
};

/// Continues texts.
///
/// # Errors
/// If the request is wrong, or cannot be run.
pub async fn generate(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    app.check_ready()?;
    let (deadline, received_at) = (app.deadline(), Instant::now());
    let received = body::read(request, &app).await?;
    let submit = move |app: &Arc<App>| {
        let request: NativeRequest = body::parse(&received)?;
        let (field, given) = match (request.text, request.input_ids) {
            (Some(text @ (Prompts::Text(_) | Prompts::Texts(_))), None) => ("text", text),
            (None, Some(ids @ (Prompts::Tokens(_) | Prompts::TokenLists(_)))) => ("input_ids", ids),
            (None, None) => return Err(ApiError::invalid("text", "is missing")),
            (Some(_), Some(_)) => {
                return Err(ApiError::invalid("input_ids", "and text exclude each other"));
            }
            (Some(_), None) => return Err(ApiError::invalid("text", "is no text")),
            (None, Some(_)) => return Err(ApiError::invalid("input_ids", "are no ids")),
        };
        let is_list = matches!(given, Prompts::Texts(_) | Prompts::TokenLists(_))
            || request.sampling_params.n.is_some_and(|n| n > 1);
        let controls =
            validate::native_controls(&request.sampling_params, app.frontend.limits().vocab_size)?;
        let grammar = form(app, &request.sampling_params)?;
        let top = validate::top_logprobs("top_logprobs_num", request.top_logprobs_num)?;
        let with_prompt = request.logprob_start_len.is_some_and(|start| start >= 0);
        let mut requests = Vec::new();
        let mut choices = Vec::new();
        let id = request.rid.unwrap_or_else(|| random_id(""));
        for ids in prompts(app, given, field)? {
            let prompt_tokens = ids.len() as u32;
            let mut new: GenerateRequest = controls.request(Prompt::Tokens(ids.clone()));
            new.grammar.clone_from(&grammar);
            if request.return_logprob {
                new.params.logprobs = Some(top);
                new.prompt_logprobs = with_prompt.then_some(top);
            }
            for index in 0..controls.n {
                let scored = if with_prompt && index == 0 { ids.clone() } else { Vec::new() };
                choices.push(Progress { prompt_tokens, prompt_ids: scored, ..Progress::default() });
            }
            requests.push(new);
        }
        let chunks = NativeChunks {
            id,
            choices,
            is_list,
            with_logprobs: request.return_logprob,
            received_at,
        };
        let generation = app.submit(requests, field)?;
        Ok((Reply { generation, deadline, prompt_field: field }, chunks, request.stream))
    };
    let (reply, mut chunks, stream) = app.work(submit).await?;
    if stream {
        return reply.stream(chunks).await;
    }
    let choices = reply.collect().await?;
    Ok(chunks.whole(choices))
}

/// What the answer is bound to.
fn form(app: &App, fields: &NativeSampling) -> Result<Option<Grammar>, ApiError> {
    let renamed = |error: ApiError| error.rename(|param| format!("sampling_params.{param}"));
    let Some(schema) = &fields.json_schema else {
        let (regex, grammar) = (fields.regex.as_deref(), fields.grammar.as_deref());
        return validate::form(app, None, regex, grammar).map_err(renamed);
    };
    const NAME: &str = "sampling_params.json_schema";
    if fields.regex.is_some() || fields.grammar.is_some() {
        return Err(ApiError::invalid(NAME, "and regex or grammar exclude each other"));
    }
    body::check_tree(schema.as_bytes()).map_err(|message| ApiError::invalid(NAME, message))?;
    let schema = serde_json::from_str(schema);
    let schema = schema.map_err(|error| ApiError::invalid(NAME, error.to_string()))?;
    validate::compile(app, NAME, &GrammarSource::JsonSchema(schema)).map(Some)
}

/// The answer, in chunks or whole.
struct NativeChunks {
    id: String,
    choices: Vec<Progress>,
    is_list: bool,
    with_logprobs: bool,
    received_at: Instant,
}

/// All of a choice so far, which is what every chunk of this form repeats.
#[derive(Default)]
struct Progress {
    text: String,
    ids: Vec<u32>,
    prompt_tokens: u32,
    /// Where the prompt is to be scored.
    prompt_ids: Vec<u32>,
    prompt: Vec<NativeLogprob>,
    logprobs: Vec<NativeLogprob>,
    top: Vec<Vec<NativeLogprob>>,
    end: Option<End>,
}

impl Progress {
    fn score_prompt(&mut self, scores: &[Option<TokenLogprobs>]) {
        let scored = self.prompt_ids.iter().zip(scores);
        self.prompt = scored.map(|(&id, score)| logprobs::native(id, score.as_ref())).collect();
    }

    fn add(&mut self, text: &str, tokens: &[OutputToken], with_logprobs: bool) {
        self.text.push_str(text);
        self.ids.extend(tokens.iter().map(|token| token.id));
        if with_logprobs {
            for token in tokens {
                let score = token.logprobs.as_ref();
                self.logprobs.push(logprobs::native(token.id, score));
                self.top.push(logprobs::native_top(score));
            }
        }
    }

    fn finish_reason(&self) -> Option<NativeFinish<'_>> {
        let end = self.end.as_ref()?;
        Some(match &end.stop {
            _ if end.is_length => NativeFinish::Length { length: end.usage.completion_tokens },
            Some(Stop::Text(text)) => NativeFinish::Stop { matched: Some(NativeMatch::Text(text)) },
            Some(Stop::Token(id)) => NativeFinish::Stop { matched: Some(NativeMatch::Token(*id)) },
            None => NativeFinish::Stop { matched: None },
        })
    }
}

impl NativeChunks {
    fn whole(&mut self, choices: Vec<Choice>) -> Response {
        for (progress, choice) in self.choices.iter_mut().zip(choices) {
            progress.score_prompt(&choice.prompt);
            progress.add(&choice.text, &choice.tokens, self.with_logprobs);
            progress.end = Some(choice.end);
        }
        let answer = if self.is_list {
            NativeAnswer::Many((0..self.choices.len()).map(|index| self.output(index)).collect())
        } else {
            NativeAnswer::One(self.output(0))
        };
        Json(answer).into_response()
    }

    /// The state that a choice has reached.
    fn output(&self, index: usize) -> NativeOutput<'_> {
        let progress = &self.choices[index];
        let usage = progress.end.as_ref().map(|end| end.usage).unwrap_or_default();
        let has_scores = self.with_logprobs && !progress.prompt.is_empty();
        NativeOutput {
            text: &progress.text,
            output_ids: &progress.ids,
            meta_info: MetaInfo {
                id: &self.id,
                finish_reason: progress.finish_reason(),
                prompt_tokens: progress.prompt_tokens,
                completion_tokens: progress.ids.len() as u32,
                cached_tokens: usage.cached_tokens,
                e2e_latency: self.received_at.elapsed().as_secs_f64(),
                input_token_logprobs: has_scores.then_some(&progress.prompt),
                output_token_logprobs: self.with_logprobs.then_some(&progress.logprobs),
                output_top_logprobs: self.with_logprobs.then_some(&progress.top),
            },
            index: self.is_list.then_some(index),
        }
    }
}

impl Chunks for NativeChunks {
    fn prompt(&mut self, index: usize, scores: Vec<Option<TokenLogprobs>>, _: &mut Vec<u8>) {
        self.choices[index].score_prompt(&scores);
    }

    fn text(&mut self, index: usize, text: &str, tokens: &[OutputToken], out: &mut Vec<u8>) {
        self.choices[index].add(text, tokens, self.with_logprobs);
        push_event(out, &self.output(index));
    }

    fn end(&mut self, index: usize, end: End, out: &mut Vec<u8>) {
        self.choices[index].end = Some(end);
        push_event(out, &self.output(index));
    }

    fn finish(&mut self, _: &mut Vec<u8>) {}
}
