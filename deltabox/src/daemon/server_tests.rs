//! Connections, without an engine: who is served, and that everything ends.

use std::io::{Read, Write};

use super::*;

/// What a client of the user `peer_uid` reads when the daemon runs as `own_uid`.
async fn answer_to(peer_uid_differs: bool) -> String {
    let (mut client, server) = std::os::unix::net::UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    let server = UnixStream::from_std(server).unwrap();
    let euid = nix::unistd::geteuid().as_raw();
    let router = routes::router(daemon_without_engine("/the/store".into()));
    let task = tokio::spawn(connection_of(server, router, if peer_uid_differs { euid + 1 } else { euid }, euid));
    let text = tokio::task::spawn_blocking(move || {
        client.write_all(b"GET /v1/ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    });
    let text = text.await.unwrap();
    task.await.unwrap();
    text
}

#[tokio::test]
async fn the_daemons_own_user_is_served() {
    let text = answer_to(false).await;
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("/the/store"), "{text}");
}

#[tokio::test]
async fn another_user_gets_a_403_and_nothing_else() {
    if !nix::unistd::geteuid().is_root() {
        panic!("this test needs root: another user than the daemon's would be root");
    }
    let text = answer_to(true).await;
    assert!(text.starts_with("HTTP/1.1 403") && text.contains("\"forbidden\""), "{text}");
    assert!(!text.contains("/the/store"), "{text}");
}

#[tokio::test]
async fn an_ending_daemon_waits_for_its_sessions_and_no_longer() {
    let (daemon, ender) = daemon(None, "/the/store".into());
    // Without an engine there are no sessions: nothing to wait for.
    let start = std::time::Instant::now();
    end(&daemon, ender).await;
    daemon.ending().await;
    assert!(start.elapsed() < SHUTDOWN_PATIENCE);
    assert!(matches!(daemon.engine(), Err(engine::Error::ShuttingDown)));
}
