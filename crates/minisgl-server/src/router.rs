//! Which path leads where, and what all of them have in common.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use subtle::ConstantTimeEq;

use crate::app::App;
use crate::chat::chat;
use crate::completions::completions;
use crate::error::ApiError;
use crate::info;
use crate::metrics::metrics;
use crate::native::generate;
use crate::openapi;

/// All endpoints of an app.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/generate", post(generate))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/tokenize", post(info::tokenize))
        .route("/detokenize", post(info::detokenize))
        .route("/health", get(info::health))
        .route("/health_generate", get(info::health_generate))
        .route("/metrics", get(metrics))
        .route("/server_info", get(info::server_info))
        .route("/get_server_info", get(info::server_info))
        .route("/model_info", get(info::model_info))
        .route("/get_model_info", get(info::model_info))
        .route("/get_load", get(info::get_load))
        .route("/v1/loads", get(info::loads))
        .route("/flush_cache", post(info::flush_cache).get(info::flush_cache))
        .route("/version", get(info::version))
        .route("/openapi.json", get(openapi::document))
        .route("/docs", get(openapi::page))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

async fn not_found(request: Request) -> ApiError {
    let message = format!("there is nothing at {}", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn method_not_allowed(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{path} does not understand {method}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// Around every request: CORS, the key, and what it may panic of.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let origin = allowed_origin(&app.options.cors_origins, request.headers());
    if let Some(origin) = &origin
        && request.method() == Method::OPTIONS
    {
        return with_cors(StatusCode::NO_CONTENT.into_response(), origin);
    }
    let is_open = request.uri().path() == "/health";
    let mut response = if is_open || has_key(app.options.api_key.as_deref(), request.headers()) {
        let mut answered = Box::pin(next.run(request));
        let answered = poll_fn(|context| {
            let poll = catch_unwind(AssertUnwindSafe(|| answered.as_mut().poll(context)));
            poll.map_or_else(|_| std::task::Poll::Ready(Err(())), |poll| poll.map(Ok))
        });
        let panicked = |()| ApiError::internal("the request made the server panic");
        answered.await.map_err(panicked).into_response()
    } else {
        let message = "the Authorization header does not carry the server's key";
        ApiError::new(StatusCode::UNAUTHORIZED, message)
            .with_code("invalid_api_key")
            .into_response()
    };
    if let Some(origin) = &origin {
        response = with_cors(response, origin);
    }
    response
}

/// Whether the request carries the key, in a time that tells at most how long the key is.
fn has_key(key: Option<&str>, headers: &HeaderMap) -> bool {
    let Some(key) = key else { return true };
    let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
    let (scheme, given) = given.split_at_checked("Bearer ".len()).unwrap_or_default();
    scheme.eq_ignore_ascii_case(b"Bearer ") && bool::from(given.ct_eq(key.as_bytes()))
}

/// The request's origin, if it may call the server.
fn allowed_origin(origins: &[String], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let is_allowed =
        origins.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes());
    is_allowed.then(|| origin.clone())
}

fn with_cors(mut response: Response, origin: &HeaderValue) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    let methods = HeaderValue::from_static("GET, POST, OPTIONS");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    let allowed = HeaderValue::from_static("Authorization, Content-Type");
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    response
}
