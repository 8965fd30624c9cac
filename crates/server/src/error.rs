//! The one place that turns what went wrong into a status and a body.
//!
//! ```text
//! {"error": {"code": 400, "message": "`top_p`: expected …", "type": "invalid_request_error"}}
//! ```
//!
//! The HTTP status equals `code`; the types are llama-server's. The same object goes into a stream that has begun.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use paceline_engine::{RequestError, SaveError, SubmitError};
use serde_json::{Map, Value, json};

use crate::runner::{Failure, Refusal};

/// The kinds of errors that clients tell apart, with llama-server's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    InvalidRequest,
    ContextExceeded,
    TooLarge,
    Authentication,
    NotFound,
    MethodNotAllowed,
    Server,
    NotSupported,
    Unavailable,
}

impl Kind {
    fn status(self) -> StatusCode {
        match self {
            Kind::InvalidRequest | Kind::ContextExceeded => StatusCode::BAD_REQUEST,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::Authentication => StatusCode::UNAUTHORIZED,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Kind::Server => StatusCode::INTERNAL_SERVER_ERROR,
            Kind::NotSupported => StatusCode::NOT_IMPLEMENTED,
            Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::InvalidRequest | Kind::TooLarge | Kind::MethodNotAllowed => "invalid_request_error",
            Kind::ContextExceeded => "exceed_context_size_error",
            Kind::Authentication => "authentication_error",
            Kind::NotFound => "not_found_error",
            Kind::Server => "server_error",
            Kind::NotSupported => "not_supported_error",
            Kind::Unavailable => "unavailable_error",
        }
    }
}

/// An error as the client will see it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    kind: Kind,
    message: String,
    /// Fields beside code, message and type.
    extra: Map<String, Value>,
    /// Seconds after which another try makes sense.
    retry_after: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> ApiError {
        ApiError { kind, message: message.into(), extra: Map::new(), retry_after: None }
    }

    /// 400: the request itself is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(Kind::InvalidRequest, message)
    }

    /// 400: a field holds something else than it should.
    pub(crate) fn field(name: &str, expected: &str, found: impl std::fmt::Display) -> ApiError {
        ApiError::invalid(format!("`{name}`: expected {expected}, found {found}"))
    }

    /// 501: a feature that this server does not have, or that is switched off.
    pub(crate) fn not_supported(message: impl Into<String>) -> ApiError {
        ApiError::new(Kind::NotSupported, message)
    }

    /// 500: our own fault.
    pub(crate) fn server(message: impl Into<String>) -> ApiError {
        ApiError::new(Kind::Server, message)
    }

    /// The same with the name of what it is about before it.
    pub(crate) fn about(self, name: &str) -> ApiError {
        ApiError { message: format!("{name}: {}", self.message), ..self }
    }

    /// 503: nothing is wrong with the request, only with the moment.
    pub(crate) fn unavailable(message: impl Into<String>, retry_after: u32) -> ApiError {
        ApiError { retry_after: Some(retry_after), ..ApiError::new(Kind::Unavailable, message) }
    }

    /// The body, and the `data:` line of a stream that has begun.
    pub(crate) fn body(&self) -> Value {
        let mut error = Map::new();
        error.insert("code".into(), self.kind.status().as_u16().into());
        error.insert("message".into(), self.message.as_str().into());
        error.insert("type".into(), self.kind.name().into());
        error.extend(self.extra.clone());
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind.status(), axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.kind == Kind::Authentication {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> ApiError {
        let message = error.to_string();
        match error {
            SubmitError::ContextExceeded { n_prompt, n_ctx } => {
                let mut error = ApiError::new(Kind::ContextExceeded, message);
                error.extra.insert("n_prompt_tokens".into(), n_prompt.into());
                error.extra.insert("n_ctx".into(), n_ctx.into());
                error
            }
            SubmitError::QueueFull { .. } => ApiError::unavailable(message, 1),
            SubmitError::EmptyPrompt
            | SubmitError::BadToken { .. }
            | SubmitError::BadSlot { .. }
            | SubmitError::Sampling(_) => ApiError::invalid(message),
        }
    }
}

impl From<SaveError> for ApiError {
    fn from(error: SaveError) -> ApiError {
        match error {
            SaveError::Busy { .. } => ApiError::unavailable(error.to_string(), 1),
            _ => ApiError::invalid(error.to_string()),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        match refusal {
            Refusal::Engine(error) => error.into(),
            Refusal::QueueFull => ApiError::unavailable("too many requests are waiting already", 1),
            Refusal::ShuttingDown => ApiError::unavailable("the server is shutting down", 5),
            Refusal::Down(reason) => ApiError::unavailable(format!("the engine is not running: {reason}"), 5),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        match failure {
            Failure::Engine(error @ RequestError::NoRoom(_)) => ApiError::unavailable(error.to_string(), 1),
            Failure::Engine(error) => ApiError::server(error.to_string()),
            Failure::Panicked(reason) => ApiError::server(format!(
                "the engine failed while it served this request and was restarted: {reason}"
            )),
            Failure::ShuttingDown => Refusal::ShuttingDown.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(error: impl Into<ApiError>, status: u16, kind: &str) -> Value {
        let error = error.into();
        let body = error.body();
        assert_eq!((&body["error"]["code"], &body["error"]["type"]), (&json!(status), &json!(kind)));
        assert_eq!(error.into_response().status().as_u16(), status);
        body
    }

    #[test]
    fn statuses_and_types() {
        check(ApiError::invalid("x"), 400, "invalid_request_error");
        check(ApiError::new(Kind::TooLarge, "x"), 413, "invalid_request_error");
        check(ApiError::new(Kind::Authentication, "x"), 401, "authentication_error");
        check(SubmitError::QueueFull { n_waiting: 3 }, 503, "unavailable_error");
        check(SubmitError::EmptyPrompt, 400, "invalid_request_error");
        check(Failure::Panicked("x".into()), 500, "server_error");
        let body =
            check(SubmitError::ContextExceeded { n_prompt: 70, n_ctx: 64 }, 400, "exceed_context_size_error");
        assert_eq!((&body["error"]["n_prompt_tokens"], &body["error"]["n_ctx"]), (&json!(70), &json!(64)));
    }

    #[test]
    fn what_passes_says_when_to_try_again() {
        let response = ApiError::from(Refusal::QueueFull).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }
}
