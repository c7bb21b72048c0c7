//! Request bodies: bounded in size and time, JSON, with the field named that is wrong.

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;

use crate::error::ApiError;
use crate::options::ServerOptions;

/// Reads a whole body that says it is JSON.
///
/// # Errors
/// 413, 415, or 408 where it does not come in time.
pub async fn read(request: Request, options: &ServerOptions) -> Result<Bytes, ApiError> {
    check_content_type(request.headers())?;
    let limit = options.body_bytes_max;
    let too_large = || {
        let message = format!("the body has more than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let body: Body = request.into_body();
    match tokio::time::timeout(options.body_timeout, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length_limit(&error) => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::new(StatusCode::BAD_REQUEST, error.to_string())),
        Err(_) => {
            let message = "the body did not arrive in time";
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
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

fn is_length_limit(error: &axum::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.to_string().contains("length limit") {
            return true;
        }
        source = error.source();
    }
    false
}
