//! Errors as OpenAI's API gives them: a status and an object that names what to change.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::engine::{EngineError, TemplateError};

/// What a client gets instead of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// the field of the request that is wrong
    pub(super) param: Option<String>,
    /// for programs
    pub(super) code: Option<&'static str>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A request that makes no sense because of one field.
    pub(super) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    pub(super) fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The object that `error` holds.
    pub(super) fn object(&self) -> serde_json::Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.object())).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Sampling(error) => Self::invalid(error.parameter, message),
            EngineError::NoTemplate => Self::invalid(
                "messages",
                "the model has no chat template: use /v1/completions, or start the server with `--chat-template FILE`",
            ),
            EngineError::Template(TemplateError::Raised(_) | TemplateError::Render(_)) => Self::invalid("messages", message),
            EngineError::Context { .. } => Self::new(StatusCode::BAD_REQUEST, message).code("context_length_exceeded"),
            EngineError::EmptyPrompt | EngineError::Token { .. } => Self::invalid("prompt", message),
            EngineError::Constraint(_) | EngineError::Dense | EngineError::Whole => Self::new(StatusCode::BAD_REQUEST, message),
            EngineError::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full"),
            EngineError::Stopped => Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down"),
            EngineError::Sidecar(_)
            | EngineError::Tokenizer(_)
            | EngineError::Template(_)
            | EngineError::Cache { .. }
            | EngineError::Failed(_)
            | EngineError::Thread(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}
