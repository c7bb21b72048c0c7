//! What a client is told when it does not get what it asked for.

use std::borrow::Cow;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use minisgl_frontend::SubmitError;
use minisgl_scheduler::message::{FinishReason, Refusal};
use minisgl_text::TextError;
use schemars::JsonSchema;
use serde::Serialize;

/// A refusal or a failure, on its way to the client in OpenAI's form.
#[derive(Debug)]
pub struct ApiError {
    /// The response's status.
    pub status: StatusCode,
    message: String,
    /// The field that is wrong.
    param: Option<Cow<'static, str>>,
    code: Option<&'static str>,
}

/// The body of every answer that is not a success.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ErrorBody<'a> {
    /// What is wrong.
    pub error: ErrorDetail<'a>,
}

/// What is wrong.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ErrorDetail<'a> {
    /// For people.
    pub message: &'a str,
    /// The kind of error.
    pub r#type: &'a str,
    /// The field that is wrong.
    pub param: Option<&'a str>,
    /// For programs.
    pub code: Option<&'a str>,
}

impl ApiError {
    /// An error without a field or a code.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// 400, for a field. The message is given the field's name in front.
    pub fn invalid(param: impl Into<Cow<'static, str>>, message: impl AsRef<str>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.as_ref());
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 500, for what the client cannot help.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 404, for a model that is not served here.
    pub fn unknown_model(name: &str) -> Self {
        let message = format!("model: {name:?} is not served here");
        let error = Self::new(StatusCode::NOT_FOUND, message).with_code("model_not_found");
        Self { param: Some("model".into()), ..error }
    }

    /// 503: now is not the time.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// 504, at the request's own time limit.
    pub fn timeout() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "the request took longer than the server allows")
    }

    /// Names the error for programs.
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The same under the name that the field has elsewhere.
    pub fn rename(mut self, name: impl FnOnce(&str) -> String) -> Self {
        if let Some(param) = self.param.take() {
            let renamed = name(&param);
            self.message = self.message.replacen(&*param, &renamed, 1);
            self.param = Some(renamed.into());
        }
        self
    }

    /// What a submission failed by; `prompt` is the name of the field that the prompt came in.
    pub fn from_submit(error: &SubmitError, prompt: &'static str) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Text(TextError::TooLong { .. }) => {
                Self::invalid(prompt, message).with_code("context_length_exceeded")
            }
            SubmitError::Text(_) | SubmitError::TooManyChoices { .. } => {
                Self::invalid(prompt, message)
            }
            SubmitError::Refused(refusal) => Self::from_refusal(refusal, prompt),
            SubmitError::Unhealthy(_) => Self::unavailable(message),
        }
    }

    fn from_refusal(refusal: &Refusal, prompt: &'static str) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::EmptyPrompt | Refusal::TokenOutOfVocabulary { .. } => {
                Self::invalid(prompt, message)
            }
            Refusal::PromptTooLong { .. } => {
                Self::invalid(prompt, message).with_code("context_length_exceeded")
            }
            Refusal::QueueFull { .. } => Self::unavailable(message).with_code("overloaded"),
            Refusal::ShuttingDown => Self::unavailable(message),
        }
    }

    /// What a choice ended by, unless it ended well.
    pub fn from_finish(reason: &FinishReason, prompt: &'static str) -> Option<Self> {
        match reason {
            FinishReason::Stop { .. } | FinishReason::Length => None,
            FinishReason::Abort => Some(Self::unavailable("the server is shutting down")),
            FinishReason::Refused(refusal) => Some(Self::from_refusal(refusal, prompt)),
            FinishReason::ConstraintFailed(reason) => {
                let message = format!("the form that the answer is bound to: {reason}");
                Some(Self::new(StatusCode::BAD_REQUEST, message))
            }
            FinishReason::Error(message) => Some(Self::internal(&**message)),
        }
    }

    /// The body of the answer.
    pub fn body(&self) -> ErrorBody<'_> {
        let r#type = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT => "timeout_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let Self { message, param, code, .. } = self;
        ErrorBody { error: ErrorDetail { message, r#type, param: param.as_deref(), code: *code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
