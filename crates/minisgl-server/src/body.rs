//! Request bodies: bounded in size and time, each and all together; JSON, with the field named that
//! is wrong.

use std::ops::Deref;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use minisgl_text::{JSON_VALUES_MAX, json_values};
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use crate::app::App;
use crate::error::ApiError;

/// A body that is not longer needs no room of its own: as many as there are connections fit.
const SMALL_BYTES: usize = 64 << 10;

/// A body, and its room in what all bodies together may take.
#[derive(Default)]
pub struct Received {
    bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads a whole body that says it is JSON.
///
/// # Errors
/// 413, 415, 408 where it does not come in time, or 503 where too many large ones come at once.
pub async fn read(request: Request, app: &App) -> Result<Received, ApiError> {
    check_content_type(request.headers())?;
    let limit = app.options.body_bytes_max;
    // Not from the header, which counts for nothing where the body comes in chunks.
    let length = request.body().size_hint().upper().map(|length| length as usize);
    let length_max = length.unwrap_or(limit);
    if length_max > limit {
        return Err(too_large(limit));
    }
    let late = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time");
    let deadline = || Instant::now() + app.options.body_timeout;
    let (mut until, mut body) = (deadline(), request.into_body());
    let mut received = Received::default();
    while let Some(data) = timeout_at(until, next(&mut body)).await.map_err(late)?? {
        let come = received.bytes.len() + data.len();
        if come > limit {
            return Err(too_large(limit));
        }
        // Only now: what is announced and does not come takes nobody's room.
        if come > SMALL_BYTES && received.room.is_none() {
            let busy = |_| {
                ApiError::unavailable("too many large requests come at once")
                    .with_code("overloaded")
            };
            received.room = timeout_at(until, app.body_room(length_max)).await.map_err(busy)?;
            received.bytes.reserve_exact(length_max - received.bytes.len());
            until = deadline();
        }
        received.bytes.extend_from_slice(&data);
    }
    Ok(received)
}

/// The next piece of a body; `None` behind the last.
async fn next(body: &mut Body) -> Result<Option<axum::body::Bytes>, ApiError> {
    while let Some(frame) = body.frame().await {
        let broken = |error: axum::Error| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("the body breaks off: {error}"))
        };
        // Trailers say nothing here.
        if let Ok(data) = frame.map_err(broken)?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body has more than {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}

/// Parses JSON. Fields that `T` does not have are passed over.
///
/// # Errors
/// 400 with the field's path as `param`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let mut path = error.path().to_string();
        let message = error.into_inner().to_string();
        // A field that is missing, or there twice, is named by the message alone.
        if let (".", Some(field)) = (path.as_str(), message.split('`').nth(1)) {
            path = field.to_string();
        }
        match path.as_str() {
            "." | "?" => ApiError::new(StatusCode::BAD_REQUEST, format!("the body: {message}")),
            _ => ApiError::invalid(path, message),
        }
    })?;
    json.end().map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.to_string()))?;
    Ok(parsed)
}

/// [`parse`], for what keeps values of any kind.
///
/// # Errors
/// 400, as `parse`, or where there are too many.
pub fn parse_tree<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    check_tree(bytes).map_err(|message| ApiError::new(StatusCode::BAD_REQUEST, message))?;
    parse(bytes)
}

/// Refuses text that would be too large a tree of values, if it is JSON.
///
/// # Errors
/// Says so.
pub fn check_tree(text: &[u8]) -> Result<(), String> {
    match json_values(text) {
        ..=JSON_VALUES_MAX => Ok(()),
        values => Err(format!("{values} JSON values are too many; {JSON_VALUES_MAX} may be")),
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    let essence = essence.trim().to_ascii_lowercase();
    if essence == "application/json" || essence.ends_with("+json") {
        return Ok(());
    }
    let message = format!("the body is {essence:?}, and only application/json is understood");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}
