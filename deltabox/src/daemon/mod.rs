//! The daemon: HTTP/JSON over a Unix socket in front of the engine, and the client that talks to it.
//!
//! ```text
//!   cli --Client--> SOCKET --listen--> server --routes--> Engine
//!                     |                          |
//!                     '---- exec session: frames '--relay--> pipes or terminal of the command
//! ```
//! This is the only async code. Nothing here waits inside the engine: its answers come from driver
//! threads through [`crate::engine::Reply`] and are awaited; its blocking methods run on tokio's
//! blocking threads. The daemon holds no state of its own: sandboxes and their commands live on when
//! it ends, and the next one finds them. `docs/api.md` has the interface.

mod answer;
mod checkpoint_routes;
pub mod client;
mod follow;
pub mod frame;
mod listen;
mod relay;
mod routes;
mod server;
pub mod types;
mod watch;

use std::ffi::OsString;
use std::path::PathBuf;

pub use listen::ListenError;
pub use server::{ServeError, ServeRequest, serve};

/// Version of the HTTP interface: the `1` of `/v1`.
pub const API: u32 = 1;

/// Header in which a client that was told a store says which, so that it never works on another by accident.
pub(crate) const STORE_HEADER: &str = "deltabox-store";

/// Where daemon and client meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The Unix socket.
    pub socket: PathBuf,
    /// The store directory.
    pub store: PathBuf,
    /// Whether the store was named by the user, not taken by default.
    pub store_given: bool,
}

impl Place {
    /// What the user said, else `DELTABOX_SOCKET` and `DELTABOX_STORE`, else the system's places. Absolute.
    pub fn find(socket: Option<PathBuf>, store: Option<PathBuf>) -> Self {
        Self::choose(socket, store, |name| std::env::var_os(name).filter(|text| !text.is_empty()))
    }

    fn choose(socket: Option<PathBuf>, store: Option<PathBuf>, env: impl Fn(&str) -> Option<OsString>) -> Self {
        let socket = socket.or_else(|| env("DELTABOX_SOCKET").map(PathBuf::from));
        let store = store.or_else(|| env("DELTABOX_STORE").map(PathBuf::from));
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Self {
            store_given: store.is_some(),
            socket: absolute(socket.unwrap_or_else(|| PathBuf::from("/run/deltabox/deltabox.sock"))),
            store: absolute(store.unwrap_or_else(|| PathBuf::from("/var/lib/deltabox"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_wins_over_the_environment_and_that_over_the_default() {
        let none = |_: &str| None;
        let some = |name: &str| Some(OsString::from(if name == "DELTABOX_STORE" { "/e/store" } else { "/e/sock" }));
        let place = Place::choose(None, None, none);
        assert_eq!(place.socket, PathBuf::from("/run/deltabox/deltabox.sock"));
        assert_eq!(place.store, PathBuf::from("/var/lib/deltabox"));
        assert!(!place.store_given);
        let place = Place::choose(Some("/o/sock".into()), None, some);
        assert_eq!(place, Place { socket: "/o/sock".into(), store: "/e/store".into(), store_given: true });
    }
}
