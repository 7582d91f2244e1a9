//! The routes of checkpoints.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Body, Refusal, ask, block};
use super::routes::{Answer, sandbox_id};
use super::server::Daemon;
use super::types::ErrorBody;
use crate::engine::{
    CheckpointReport, CheckpointRequest, DiffReport, DiffRequest, DiskReport, GcReport, RollbackReport,
    RollbackRequest, TreeReport,
};

pub(super) fn router() -> OpenApiRouter<Daemon> {
    OpenApiRouter::new()
        .routes(routes!(tree, checkpoint))
        .routes(routes!(remove))
        .routes(routes!(rollback))
        .routes(routes!(disk))
        .routes(routes!(diff))
        .routes(routes!(gc))
}

/// The checkpoints of a sandbox.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/checkpoints",
    responses((status = 200, body = TreeReport), (status = "default", body = ErrorBody)))]
async fn tree(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<TreeReport> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    let outlooks = ask(|reply| engine.outlooks(&id, reply)).await?;
    Ok(Json(block(move || engine.tree(&id, outlooks)).await?))
}

/// Makes a checkpoint; answers when it exists.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/checkpoints", request_body = CheckpointRequest,
    responses((status = 200, body = CheckpointReport), (status = "default", body = ErrorBody)))]
async fn checkpoint(
    State(daemon): State<Daemon>,
    Path(id): Path<String>,
    Body(request): Body<CheckpointRequest>,
) -> Answer<CheckpointReport> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(ask(|reply| engine.checkpoint(&id, request, reply)).await?))
}

/// Removes a checkpoint, named by id or name; its children get its parent.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}/checkpoints/{checkpoint}",
    responses((status = 204), (status = "default", body = ErrorBody)))]
async fn remove(
    State(daemon): State<Daemon>,
    Path((id, checkpoint)): Path<(String, String)>,
) -> Result<StatusCode, Refusal> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    ask(|reply| engine.remove_checkpoint(&id, checkpoint, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a sandbox back to a checkpoint; answers when its programs run on.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/rollback", request_body = RollbackRequest,
    responses((status = 200, body = RollbackReport), (status = "default", body = ErrorBody)))]
async fn rollback(
    State(daemon): State<Daemon>,
    Path(id): Path<String>,
    Body(request): Body<RollbackRequest>,
) -> Answer<RollbackReport> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(ask(|reply| engine.rollback(&id, request, reply)).await?))
}

/// What the files of a sandbox take on disk.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/disk",
    responses((status = 200, body = DiskReport), (status = "default", body = ErrorBody)))]
async fn disk(State(daemon): State<Daemon>, Path(id): Path<String>) -> Answer<DiskReport> {
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(block(move || engine.disk(&id)).await?))
}

/// What differs between two states of a sandbox's files. Answers when all of it is compared.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/diff", params(DiffRequest),
    responses((status = 200, body = DiffReport), (status = "default", body = ErrorBody)))]
async fn diff(
    State(daemon): State<Daemon>,
    Path(id): Path<String>,
    query: Result<Query<DiffRequest>, QueryRejection>,
) -> Answer<DiffReport> {
    let Query(request) = query.map_err(|rejection| {
        let hint = "use ?from=CHECKPOINT&to=CHECKPOINT&patch=true&contents=true, each of which may be left out";
        Refusal::new(StatusCode::BAD_REQUEST, "invalid", rejection.body_text(), hint)
    })?;
    let (engine, id) = (daemon.engine()?, sandbox_id(&id)?);
    Ok(Json(block(move || engine.diff(&id, &request)).await?))
}

/// Removes all layers that nobody needs.
#[utoipa::path(post, path = "/v1/gc", responses((status = 200, body = GcReport), (status = "default", body = ErrorBody)))]
async fn gc(State(daemon): State<Daemon>) -> Answer<GcReport> {
    let engine = daemon.engine()?;
    Ok(Json(ask(|reply| engine.gc(reply)).await?))
}
