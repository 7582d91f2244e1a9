//! What is said when a request is not carried out, and how the engine's answers reach an async caller.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use crate::engine::{self, Kind, Reply};

use super::types::{ErrorBody, ErrorDetail};

/// An answer that is not a success.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    detail: ErrorDetail,
}

impl Refusal {
    /// One that did not come from the engine.
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>, hint: &str) -> Self {
        let detail = ErrorDetail { code: code.to_owned(), message: message.into(), hint: hint.to_owned() };
        Self { status, detail }
    }

    /// The body alone, for an error frame.
    pub(super) fn into_body(self) -> ErrorBody {
        ErrorBody { error: self.detail }
    }
}

impl From<engine::Error> for Refusal {
    fn from(error: engine::Error) -> Self {
        let status = match error.kind() {
            Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::Refused => StatusCode::UNPROCESSABLE_ENTITY,
            Kind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.code(), error.to_string(), &error.hint())
    }
}

impl IntoResponse for Refusal {
    /// The edge: what the machine did wrong is logged here and nowhere else.
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(code = self.detail.code, error = self.detail.message, "request failed");
        }
        (self.status, Json(self.into_body())).into_response()
    }
}

/// A JSON body, whatever its content type says; what is wrong with it is answered in our own form.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let status = rejection.status();
            let code = if status == StatusCode::PAYLOAD_TOO_LARGE { "too_large" } else { "bad_body" };
            Refusal::new(status, code, rejection.body_text(), "a request body is JSON of at most 8 MiB")
        })?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            let message = format!("request body: {error}");
            Refusal::new(StatusCode::BAD_REQUEST, "bad_json", message, "GET /v1/openapi.json describes the body")
        })
    }
}

/// Puts a request to the engine and awaits what its driver thread answers.
pub(super) async fn ask<T: Send + 'static>(request: impl FnOnce(Reply<T>)) -> Result<T, Refusal> {
    let (sender, receiver) = oneshot::channel();
    // An asker that is gone lets the answer drop, and an `Attachment` in it says so to the engine.
    request(Box::new(move |answer| drop(sender.send(answer))));
    Ok(receiver.await.map_err(|_| engine::Error::ShuttingDown)??)
}

/// Runs a blocking method of the engine away from the async workers.
pub(super) async fn block<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, engine::Error> + Send + 'static,
) -> Result<T, Refusal> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(|_| engine::Error::ShuttingDown)??)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn every_kind_of_engine_error_has_its_status() {
        let table = [
            (engine::Error::Invalid { what: "argv", why: "empty".into() }, 400, "invalid"),
            (engine::Error::NoSandbox { id: "x".into() }, 404, "no_sandbox"),
            (engine::Error::Exists { what: "sandbox", name: "x".into() }, 409, "exists"),
            (engine::Error::Refused { what: "create".into(), why: "no".into(), hint: "do".into() }, 422, "refused"),
            (engine::Error::Io { op: "open", path: "/x".into(), source: io::ErrorKind::NotFound.into() }, 500, "io"),
            (engine::Error::ShuttingDown, 500, "shutting_down"),
        ];
        for (error, status, code) in table {
            let (text, hint) = (error.to_string(), error.hint());
            let refusal = Refusal::from(error);
            assert_eq!((refusal.status.as_u16(), refusal.detail.code.as_str()), (status, code));
            assert_eq!((refusal.detail.message, refusal.detail.hint), (text, hint));
        }
    }
}
