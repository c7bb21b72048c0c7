//! What the server says of itself, of its load, and of texts and tokens.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use minisgl_frontend::{GenerateRequest, Prompt};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_text::{ChatRequest, TextError};
use serde_json::Value;

use crate::app::App;
use crate::body;
use crate::error::ApiError;
use crate::reply::Reply;
use crate::wire::info::{
    DetokenizeRequest, Detokenized, Flushed, Load, Loads, ModelCard, ModelInfo, ModelList,
    RankLoad, ServerInfo, TokenizeRequest, Tokenized, Version,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long `/health_generate` waits for its token.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

/// `/health`: whether requests can be run.
pub async fn health(State(app): State<Arc<App>>) -> Result<(), ApiError> {
    app.check_ready()
}

/// `/health_generate`: makes a token.
pub async fn health_generate(State(app): State<Arc<App>>) -> Result<(), ApiError> {
    app.check_ready()?;
    let params = SamplingParams { max_tokens: 1, temperature: 0.0, ..SamplingParams::default() };
    let probe = GenerateRequest { params, ..GenerateRequest::new(Prompt::Tokens(vec![0])) };
    let generation = app.work(|app| app.submit(vec![probe], "prompt")).await?;
    let deadline = Some(tokio::time::Instant::now() + PROBE_TIMEOUT);
    Reply { generation, deadline, prompt_field: "prompt" }.collect().await?;
    Ok(())
}

/// `/v1/models`
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let data = app.options.model_names.iter().map(|name| card(&app, name)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

/// `/v1/models/{name}`
///
/// # Errors
/// If it is not served here.
pub async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(card(&app, &name)).into_response())
}

fn card<'a>(app: &'a App, name: &'a str) -> ModelCard<'a> {
    ModelCard {
        id: name,
        object: "model",
        created: app.started_unix,
        owned_by: "minisgl",
        root: model_path(app),
        max_model_len: app.frontend.len_max(),
    }
}

fn model_path(app: &App) -> &str {
    app.options.model_path.to_str().unwrap_or_default()
}

/// `/model_info`
pub async fn model_info(State(app): State<Arc<App>>) -> Response {
    Json(about_model(&app)).into_response()
}

fn about_model(app: &App) -> ModelInfo<'_> {
    ModelInfo {
        model_path: model_path(app),
        tokenizer_path: model_path(app),
        served_model_name: app.model_name(),
        is_generation: true,
        max_context_length: app.frontend.len_max(),
        vocab_size: app.frontend.limits().vocab_size,
        has_chat_template: app.frontend.text().template.is_some(),
    }
}

/// `/server_info`
pub async fn server_info(State(app): State<Arc<App>>) -> Response {
    let limits = app.frontend.limits();
    Json(ServerInfo {
        model: about_model(&app),
        version: VERSION,
        status: app.status(),
        uptime_s: app.started_at.elapsed().as_secs_f64(),
        max_total_num_tokens: limits.pages * limits.page_size,
        max_running_requests: limits.slots,
        page_size: limits.page_size,
        chunked_prefill_size: limits.step_tokens_max,
        dp_size: 1,
    })
    .into_response()
}

/// `/version`
pub async fn version() -> Json<Version> {
    Json(Version { version: VERSION })
}

/// `/get_load`
pub async fn get_load(State(app): State<Arc<App>>) -> Json<[Load; 1]> {
    let load = load(&app);
    Json([Load {
        dp_rank: load.dp_rank,
        num_reqs: load.num_total_reqs,
        num_waiting_reqs: load.num_waiting_reqs,
        num_tokens: load.num_used_tokens,
    }])
}

/// `/v1/loads`
pub async fn loads(State(app): State<Arc<App>>) -> Json<Loads> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Json(Loads {
        timestamp: now.as_secs_f64(),
        version: VERSION,
        dp_rank_count: 1,
        loads: vec![load(&app)],
    })
}

/// What there is to do now.
pub fn load(app: &App) -> RankLoad {
    let stats = app.frontend.scheduler_stats();
    let limits = app.frontend.limits();
    let page_size = limits.page_size as u64;
    let running = stats.running.load(Relaxed);
    // What is submitted and on its way to the scheduler waits, too.
    let waiting = (app.frontend.in_flight() as u64).saturating_sub(running);
    let idle = stats.pages_free.load(Relaxed) + stats.pages_cached.load(Relaxed);
    let used = (limits.pages as u64).saturating_sub(idle);
    let prompt_tokens = stats.prompt_tokens.load(Relaxed).max(1);
    RankLoad {
        dp_rank: 0,
        num_running_reqs: running,
        num_waiting_reqs: waiting,
        num_total_reqs: running + waiting,
        num_used_tokens: used * page_size,
        max_total_num_tokens: limits.pages as u64 * page_size,
        token_usage: used as f64 / limits.pages.max(1) as f64,
        max_running_requests: limits.slots,
        cache_hit_rate: stats.cached_tokens.load(Relaxed) as f64 / prompt_tokens as f64,
    }
}

/// `/flush_cache`: gives back what the prefix cache holds and no request uses.
///
/// # Errors
/// If the engine runs no more.
pub async fn flush_cache(State(app): State<Arc<App>>) -> Result<Json<Flushed>, ApiError> {
    let flush = |app: &Arc<App>| app.frontend.flush_cache().ok_or_else(|| ended(app));
    Ok(Json(Flushed { success: true, pages: app.work(flush).await? }))
}

fn ended(app: &App) -> ApiError {
    app.check_ready().err().unwrap_or_else(|| ApiError::unavailable("the engine has ended"))
}

/// `/tokenize`
///
/// # Errors
/// If there is nothing to encode, or a chat cannot be rendered.
pub async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Tokenized>, ApiError> {
    let received = body::read(request, &app).await?;
    let encode = move |app: &Arc<App>| {
        let request: TokenizeRequest = body::parse_tree(&received)?;
        app.check_model(request.model.as_deref())?;
        let with_strings = request.return_token_strs;
        let (field, prompt) = match (request.prompt, request.messages) {
            (Some(text), None) if request.add_special_tokens == Some(false) => {
                let ids = app.frontend.text().encode_text(&text, app.frontend.len_max());
                let too_long = |error: TextError| ApiError::from_submit(&error.into(), "prompt");
                ("prompt", Prompt::Tokens(ids.map_err(too_long)?))
            }
            (Some(text), None) => ("prompt", Prompt::Text(text)),
            (None, Some(messages)) => {
                let chat = ChatRequest {
                    messages: messages.into_iter().map(Value::Object).collect(),
                    tools: request.tools,
                    add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
                    ..ChatRequest::default()
                };
                ("messages", Prompt::Chat(Box::new(chat)))
            }
            _ => return Err(ApiError::invalid("prompt", "either it or messages is needed")),
        };
        let tokens = app.frontend.encode(&prompt);
        let tokens = tokens.map_err(|error| ApiError::from_submit(&error, field))?;
        let tokenizer = &app.frontend.text().tokenizer;
        let token_strs =
            with_strings.then(|| tokens.iter().map(|&id| tokenizer.decode(&[id], false)).collect());
        let max_model_len = app.frontend.len_max();
        Ok(Tokenized { count: tokens.len(), max_model_len, tokens, token_strs })
    };
    app.work(encode).await.map(Json)
}

/// `/detokenize`
///
/// # Errors
/// If an id is not in the vocabulary.
pub async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Detokenized>, ApiError> {
    let received = body::read(request, &app).await?;
    let decode = move |app: &Arc<App>| {
        let request: DetokenizeRequest = body::parse(&received)?;
        let vocab_size = app.frontend.limits().vocab_size;
        if let Some(id) = request.tokens.iter().find(|&&id| id as usize >= vocab_size) {
            let message = format!("{id} is not in the vocabulary of {vocab_size}");
            return Err(ApiError::invalid("tokens", message));
        }
        let tokenizer = &app.frontend.text().tokenizer;
        let text = tokenizer.decode(&request.tokens, request.skip_special_tokens);
        Ok(Detokenized { prompt: text.clone(), text })
    };
    app.work(decode).await.map(Json)
}
