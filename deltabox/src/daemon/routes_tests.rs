//! The router without an engine: what it serves, what it refuses, and its document.

use std::collections::BTreeSet;
use std::path::Path as FilePath;

use axum::body::Body as HttpBody;
use http_body_util::BodyExt;
use hyper_util::service::TowerToHyperService;

use super::*;
use crate::daemon::server::daemon_without_engine;

/// Every route of the interface: adding one is a decision, so it is written down twice.
const ROUTES: &[(&str, &str)] = &[
    ("GET", "/v1/ping"),
    ("GET", "/v1/openapi.json"),
    ("GET", "/v1/sandboxes"),
    ("POST", "/v1/sandboxes"),
    ("GET", "/v1/sandboxes/{id}"),
    ("DELETE", "/v1/sandboxes/{id}"),
    ("POST", "/v1/sandboxes/{id}/kill"),
    ("GET", "/v1/sandboxes/{id}/processes"),
    ("GET", "/v1/sandboxes/{id}/stats"),
    ("GET", "/v1/sandboxes/{id}/checkpoints"),
    ("POST", "/v1/sandboxes/{id}/checkpoints"),
    ("DELETE", "/v1/sandboxes/{id}/checkpoints/{checkpoint}"),
    ("POST", "/v1/sandboxes/{id}/rollback"),
    ("GET", "/v1/sandboxes/{id}/disk"),
    ("GET", "/v1/sandboxes/{id}/diff"),
    ("POST", "/v1/gc"),
    ("GET", "/v1/stats"),
    ("GET", "/v1/sandboxes/{id}/execs"),
    ("POST", "/v1/sandboxes/{id}/execs"),
    ("POST", "/v1/sandboxes/{id}/execs/{pid}/attach"),
    ("POST", "/v1/sandboxes/{id}/execs/{pid}/signal"),
    ("GET", "/v1/sandboxes/{id}/logs"),
    ("GET", "/v1/sandboxes/{id}/logs/{pid}"),
    ("GET", "/v1/images"),
    ("POST", "/v1/images"),
    ("DELETE", "/v1/images/{name}"),
];

async fn send(request: Request) -> (u16, serde_json::Value) {
    use hyper::service::Service;
    let service = TowerToHyperService::new(router(daemon_without_engine("/the/store".into())));
    let response = service.call(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

fn request(method: &str, path: &str, body: &str) -> Request {
    Request::builder().method(method).uri(path).body(HttpBody::from(body.to_owned())).unwrap()
}

/// Of every error: the three fields, none of them empty.
fn code(answer: &serde_json::Value) -> &str {
    let error = &answer["error"];
    for field in ["code", "message", "hint"] {
        assert!(error[field].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    }
    error["code"].as_str().unwrap()
}

#[test]
fn the_document_has_exactly_the_routes_of_the_interface() {
    let document = serde_json::to_value(parts().1).unwrap();
    let mut documented = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            documented.insert((method.to_uppercase(), path.clone()));
        }
    }
    let expected: BTreeSet<_> =
        ROUTES.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
    assert_eq!(documented, expected);
}

#[test]
fn no_route_is_registered_without_its_document() {
    // That one is utoipa's router itself, and is looked through too.
    let source = include_str!("routes.rs").replace(".merge(super::checkpoint_routes::router())", "");
    let source = source + include_str!("checkpoint_routes.rs");
    for way in [".route(", ".nest(", ".merge(", ".route_service("] {
        assert!(!source.contains(way), "`{way}` in routes.rs goes past utoipa; use `routes!`");
    }
}

#[test]
fn the_checked_in_document_is_that_of_the_code() {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    if std::env::var_os("DELTABOX_BLESS").is_some() {
        std::fs::write(&path, document()).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap();
    assert!(checked_in == document(), "{} is out of date; DELTABOX_BLESS=1 rewrites it", path.display());
}

#[tokio::test]
async fn every_documented_route_is_served() {
    for (method, path) in ROUTES {
        let path = path.replace("{id}", "a").replace("{pid}", "1").replace("{name}", "a");
        let path = path.replace("{checkpoint}", "c1");
        let (status, answer) = send(request(method, &path, "")).await;
        // Without an engine each says so, unless it fails (or needs nothing) before that.
        let reached = [200, 400, 500].contains(&status);
        assert!(reached, "{method} {path}: {status} {answer}");
        if status == 500 {
            assert_eq!(code(&answer), "shutting_down");
        }
    }
}

#[tokio::test]
async fn ping_tells_version_and_place() {
    let (status, answer) = send(request("GET", "/v1/ping", "")).await;
    assert_eq!(status, 200);
    assert_eq!(answer["api"], 1);
    assert_eq!(answer["pid"], std::process::id());
    assert_eq!(answer["store"], "/the/store");
}

#[tokio::test]
async fn whatever_is_wrong_is_answered_as_json() {
    let long = format!("{{\"name\": \"{}\"}}", "x".repeat(MAX_BODY));
    let table = [
        ("GET", "/", "", 404, "no_route"),
        ("GET", "/v2/ping", "", 404, "no_route"),
        ("PATCH", "/v1/sandboxes", "", 405, "no_method"),
        ("POST", "/v1/sandboxes", "{", 400, "bad_json"),
        ("POST", "/v1/sandboxes", "", 400, "bad_json"),
        ("POST", "/v1/sandboxes", r#"{"name": "Bad Name"}"#, 400, "bad_json"),
        ("POST", "/v1/sandboxes", &long, 413, "too_large"),
        ("GET", "/v1/sandboxes/Bad%20Name", "", 500, "shutting_down"),
        ("GET", "/v1/sandboxes", "", 500, "shutting_down"),
    ];
    for (method, path, body, status, expected) in table {
        let (got, answer) = send(request(method, path, body)).await;
        assert_eq!((got, code(&answer)), (status, expected), "{method} {path}");
    }
}

#[test]
fn a_bad_name_in_a_path_is_an_unknown_sandbox() {
    for bad in ["Bad Name", "..", "a/b", ""] {
        assert!(matches!(sandbox_id(bad), Err(Error::NoSandbox { .. })));
    }
    assert!(pid_inside("12").is_ok() && pid_inside("-1").is_err() && pid_inside("x").is_err());
}

#[tokio::test]
async fn a_diff_with_a_bad_query_says_what_to_write() {
    let table = [("patch=maybe", 400, "invalid"), ("patch=true&from=c1", 500, "shutting_down")];
    for (query, status, word) in table {
        let (got, answer) = send(request("GET", &format!("/v1/sandboxes/a/diff?{query}"), "")).await;
        assert_eq!((got, code(&answer)), (status, word), "{query}");
    }
}

#[tokio::test]
async fn a_client_of_another_store_is_refused() {
    for (store, status) in [("/the/store", 200), ("/another", 409)] {
        let mut request = request("GET", "/v1/ping", "");
        request.headers_mut().insert(STORE_HEADER, store.parse().unwrap());
        let (got, answer) = send(request).await;
        assert_eq!(got, status);
        if status == 409 {
            assert_eq!(code(&answer), "other_store");
        }
    }
}

#[tokio::test]
async fn an_unknown_upgrade_is_refused() {
    let mut request = request("POST", "/v1/sandboxes/a/execs", r#"{"argv": ["true"], "stdio": {"kind": "log"}}"#);
    request.headers_mut().insert("upgrade", "websocket".parse().unwrap());
    let (status, answer) = send(request).await;
    assert_eq!((status, code(&answer)), (426, "upgrade_required"));
}
