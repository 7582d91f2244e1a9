//! The routes of `/v1`: each is registered and documented by one `routes!`, so the two cannot part.

use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::Deserialize;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::engine::{BaseReport, CreateRequest, Error, ExecRequest, SandboxReport, Stdio};
use crate::sandbox::SandboxId;

use super::answer::{Body, Refusal, ask, block};
use super::follow;
use super::relay::{self, Upgrade};
use super::server::Daemon;
use super::types::{
    ErrorBody, ExecList, ImageList, ImageRequest, LogList, PingReport, ProcessList, SandboxList, SignalRequest,
    Started, StatList,
};
use super::{API, STORE_HEADER};

/// Most bytes of a request body. Chosen: far above any argument list the kernel would take.
const MAX_BODY: usize = 8 * 1024 * 1024;

#[derive(OpenApi)]
#[openapi(info(
    title = "deltabox",
    version = "1",
    description = "Sandboxes, their commands and images, over the daemon's Unix socket. `api.md` has the exec sessions."
))]
struct Document;

/// Everything the daemon serves.
pub(super) fn router(daemon: Daemon) -> Router {
    parts()
        .0
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(daemon.clone(), check_store))
        .layer(axum::middleware::from_fn(log))
        .with_state(daemon)
}

/// The OpenAPI document, as `docs/openapi.json` holds it.
fn document() -> String {
    let mut text = parts().1.to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

fn parts() -> (Router<Daemon>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(ping))
        .routes(routes!(openapi))
        .routes(routes!(list, create))
        .routes(routes!(inspect, remove))
        .routes(routes!(kill))
        .routes(routes!(processes))
        .routes(routes!(stats))
        .routes(routes!(sandbox_stats))
        .routes(routes!(execs, exec))
        .routes(routes!(attach))
        .routes(routes!(signal))
        .routes(routes!(logs))
        .routes(routes!(log_bytes))
        .routes(routes!(images, import))
        .routes(routes!(remove_image))
        .merge(super::checkpoint_routes::router())
        .split_for_parts()
}

pub(super) type Answer<T> = Result<Json<T>, Refusal>;

/// Version and place of the daemon.
#[utoipa::path(get, path = "/v1/ping", responses((status = 200, body = PingReport)))]
async fn ping(State(daemon): State<Daemon>) -> Json<PingReport> {
    Json(PingReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: API,
        pid: std::process::id(),
        store: daemon.store().to_owned(),
    })
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, description = "OpenAPI, as JSON")))]
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document()).into_response()
}

/// All sandboxes.
#[utoipa::path(get, path = "/v1/sandboxes",
    responses((status = 200, body = SandboxList), (status = "default", body = ErrorBody)))]
async fn list(State(daemon): State<Daemon>) -> Answer<SandboxList> {
    Ok(Json(SandboxList { sandboxes: daemon.engine()?.list() }))
}

/// Makes a sandbox; answers when it takes commands.
#[utoipa::path(post, path = "/v1/sandboxes", request_body = CreateRequest,
    responses((status = 200, body = SandboxReport), (status = "default", body = ErrorBody)))]
async fn create(State(daemon): State<Daemon>, Body(request): Body<CreateRequest>) -> Answer<SandboxReport> {
    let engine = daemon.engine()?;
    Ok(Json(ask(|reply| engine.create(request, reply)).await?))
}

/// One sandbox.
#[utoipa::path(get, path = "/v1/sandboxes/{id}",
    responses((status = 200, body = SandboxReport), (status = "default", body = ErrorBody)))]
async fn inspect(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<SandboxReport> {
    Ok(Json(daemon.engine()?.inspect(&sandbox_id(&id)?)?))
}

/// Ends and removes a sandbox with everything it left.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}",
    responses((status = 204), (status = "default", body = ErrorBody)))]
async fn remove(State(daemon): State<Daemon>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    ask(|reply| engine.remove(&id, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Ends every process of a sandbox; its files stay.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/kill",
    responses((status = 204), (status = "default", body = ErrorBody)))]
async fn kill(State(daemon): State<Daemon>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    ask(|reply| engine.kill(&id, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The processes of a sandbox.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes",
    responses((status = 200, body = ProcessList), (status = "default", body = ErrorBody)))]
async fn processes(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<ProcessList> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(ProcessList { processes: block(move || engine.processes(&id)).await? }))
}

/// Latencies of all operations that this daemon has carried out, by phase.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = StatList), (status = "default", body = ErrorBody)))]
async fn stats(State(daemon): State<Daemon>) -> Answer<StatList> {
    Ok(Json(StatList { stats: daemon.engine()?.stats(None)? }))
}

/// Latencies of one sandbox's operations, by phase.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/stats",
    responses((status = 200, body = StatList), (status = "default", body = ErrorBody)))]
async fn sandbox_stats(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<StatList> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(StatList { stats: engine.stats(Some(&id))? }))
}

/// The commands that a sandbox holds: running ones, and ended ones whose exit nobody has fetched.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/execs",
    responses((status = 200, body = ExecList), (status = "default", body = ErrorBody)))]
async fn execs(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<ExecList> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(ExecList { execs: block(move || engine.execs(&id)).await? }))
}

/// Starts a command. With `Upgrade: deltabox-exec/1` the connection becomes its session (`api.md`);
/// without, only `"stdio": {"kind": "log"}` is possible.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/execs", request_body = ExecRequest,
    responses((status = 101, description = "started; frames follow"), (status = 200, body = Started),
        (status = "default", body = ErrorBody)))]
async fn exec(
    State(daemon): State<Daemon>,
    Path(id): Path<String>,
    upgrade: Option<Upgrade>,
    Body(request): Body<ExecRequest>,
) -> Result<Response, Refusal> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    if upgrade.is_none() && request.stdio != Stdio::Log {
        return Err(relay::upgrade_required());
    }
    let (on_exit, exited) = relay::exit_channel();
    let attachment = ask(|reply| engine.exec(&id, request, on_exit, reply)).await?;
    match upgrade {
        Some(upgrade) => Ok(upgrade.start_session(daemon, id, attachment, exited)),
        None => {
            let started = Started { pid: attachment.pid };
            attachment.detach();
            Ok(Json(started).into_response())
        }
    }
}

/// Attaches to a command that is held; needs `Upgrade: deltabox-exec/1`.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/execs/{pid}/attach",
    responses((status = 101, description = "attached; frames follow"), (status = "default", body = ErrorBody)))]
async fn attach(
    State(daemon): State<Daemon>,
    Path((id, pid)): Path<(String, String)>,
    upgrade: Option<Upgrade>,
) -> Result<Response, Refusal> {
    let (engine, id, pid) = (daemon.engine()?, sandbox_id(&id)?, pid_inside(&pid)?);
    let upgrade = upgrade.ok_or_else(relay::upgrade_required)?;
    let (on_exit, exited) = relay::exit_channel();
    let attachment = ask(|reply| engine.attach(&id, pid, on_exit, reply)).await?;
    Ok(upgrade.start_session(daemon, id, attachment, exited))
}

/// Sends a signal to a command's process group.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/execs/{pid}/signal", request_body = SignalRequest,
    responses((status = 204), (status = "default", body = ErrorBody)))]
async fn signal(
    State(daemon): State<Daemon>,
    Path((id, pid)): Path<(String, String)>,
    Body(request): Body<SignalRequest>,
) -> Result<StatusCode, Refusal> {
    let (engine, id, pid) = (daemon.engine()?, sandbox_id(&id)?, pid_inside(&pid)?);
    if !(1..=64).contains(&request.signal) {
        return Err(Error::Invalid { what: "signal", why: format!("{} is not 1 to 64", request.signal) }.into());
    }
    ask(|reply| engine.signal(&id, pid, request.signal, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The logs of a sandbox's detached commands, oldest first.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/logs",
    responses((status = 200, body = LogList), (status = "default", body = ErrorBody)))]
async fn logs(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<LogList> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(LogList { logs: block(move || engine.logs(&id, None)).await? }))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct LogQuery {
    /// Whether to go on while the command may still write.
    #[serde(default)]
    follow: bool,
}

/// The bytes of one command's log.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/logs/{pid}", params(LogQuery),
    responses((status = 200, description = "bytes", content_type = "application/octet-stream"),
        (status = "default", body = ErrorBody)))]
async fn log_bytes(
    State(daemon): State<Daemon>,
    Path((id, pid)): Path<(String, String)>,
    query: Result<Query<LogQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refusal> {
    let (engine, id, pid) = (daemon.engine()?, sandbox_id(&id)?, pid_inside(&pid)?);
    let Query(query) = query.map_err(|rejection| {
        Refusal::new(StatusCode::BAD_REQUEST, "invalid", rejection.body_text(), "use ?follow=true or ?follow=false")
    })?;
    let log = follow::open(daemon, engine, id, pid).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], log.into_body(query.follow)).into_response())
}

/// The imported bases.
#[utoipa::path(get, path = "/v1/images",
    responses((status = 200, body = ImageList), (status = "default", body = ErrorBody)))]
async fn images(State(daemon): State<Daemon>) -> Answer<ImageList> {
    let engine = daemon.engine()?;
    Ok(Json(ImageList { images: block(move || engine.bases()).await? }))
}

/// Imports a directory or tar archive of the daemon's host as a base; answers when it is done.
#[utoipa::path(post, path = "/v1/images", request_body = ImageRequest,
    responses((status = 200, body = BaseReport), (status = "default", body = ErrorBody)))]
async fn import(State(daemon): State<Daemon>, Body(request): Body<ImageRequest>) -> Answer<BaseReport> {
    let engine = daemon.engine()?;
    Ok(Json(block(move || engine.import_base(&request.name, &request.path)).await?))
}

/// Removes an imported base that no sandbox uses.
#[utoipa::path(delete, path = "/v1/images/{name}",
    responses((status = 204), (status = "default", body = ErrorBody)))]
async fn remove_image(State(daemon): State<Daemon>, Path(name): Path<String>) -> Result<StatusCode, Refusal> {
    let engine = daemon.engine()?;
    block(move || engine.remove_base(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A text that is no name at all cannot be one of a sandbox either.
pub(super) fn sandbox_id(text: &str) -> Result<SandboxId, Error> {
    text.parse().map_err(|_| Error::NoSandbox { id: text.to_owned() })
}

fn pid_inside(text: &str) -> Result<u32, Error> {
    text.parse().map_err(|_| Error::Invalid { what: "pid", why: format!("`{text}` is not a number") })
}

async fn unknown_route(request: Request) -> Refusal {
    let message = format!("no route {} {}", request.method(), request.uri().path());
    Refusal::new(StatusCode::NOT_FOUND, "no_route", message, "GET /v1/openapi.json lists the routes")
}

async fn unknown_method(request: Request) -> Refusal {
    let message = format!("{} is not possible on {}", request.method(), request.uri().path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "no_method", message, "GET /v1/openapi.json lists the routes")
}

/// A client that was told a store must not be served by the daemon of another.
async fn check_store(State(daemon): State<Daemon>, request: Request, next: Next) -> Response {
    use std::os::unix::ffi::OsStrExt;
    let asked = request.headers().get(STORE_HEADER);
    match asked.filter(|asked| asked.as_bytes() != daemon.store().as_os_str().as_bytes()) {
        None => next.run(request).await,
        Some(asked) => {
            let (ours, asked) = (daemon.store().display(), String::from_utf8_lossy(asked.as_bytes()));
            let message = format!("this daemon (pid {}) works on store {ours}, not {asked}", std::process::id());
            let hint = "name another socket with --socket or DELTABOX_SOCKET; each store has its own daemon";
            Refusal::new(StatusCode::CONFLICT, "other_store", message, hint).into_response()
        }
    }
}

async fn log(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let start = std::time::Instant::now();
    let response = next.run(request).await;
    let took_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    tracing::debug!(%method, path, status = response.status().as_u16(), took_us, "request");
    response
}

#[cfg(test)]
#[path = "routes_tests.rs"]
mod tests;
