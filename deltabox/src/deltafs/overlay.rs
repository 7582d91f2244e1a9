//! Mounting a stack: one overlay of the live layer over frozen layers over the base, all by descriptor.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys::mount::{self, attr};

/// An overlay that the kernel refused, with its own words where it left some.
#[derive(Debug, thiserror::Error)]
#[error("{op}: {source}{log}")]
pub struct MountError {
    /// The step: `lowerdir+ 2`, `create`, ...
    op: String,
    source: io::Error,
    /// `; ` and the kernel's message, or nothing.
    log: String,
}

/// The writable top of a stack: two directories of one file system, reached through one mount.
#[derive(Clone, Copy, Debug)]
pub struct Top<'a> {
    /// Receives every change.
    pub upper: BorrowedFd<'a>,
    /// Overlayfs's own; must be empty.
    pub work: BorrowedFd<'a>,
}

/// Mounts `lowers` (topmost first) under `top`, detached. Without `top` the result is read-only and follows
/// redirects of its lower layers.
///
/// The options and why (facts: filesystem): `index=off` because an index refuses a layer that another mount still
/// holds; `xino=on` so that no two directories have the same number, in this mount or another of the same layers (without
/// it they are counted anew in each mount, and `rm -r` across two of them sees a circle), but off without `top`, or a
/// base's numbers would have no room left for it; `uuid=null` as layers of any file system go together; `metacopy=off` so
/// that a frozen layer holds whole files; `volatile` because the live layer's durability is the checkpoint's business, not
/// fsync's.
pub fn mount_stack(lowers: &[BorrowedFd<'_>], top: Option<Top<'_>>) -> Result<OwnedFd, MountError> {
    let failed = |op: &str, source| MountError { op: op.to_owned(), source, log: String::new() };
    let fs = mount::fsopen(c"overlay").map_err(|error| failed("fsopen overlay", error))?;
    let explained = |op: String, source| {
        let log = mount::fs_log(fs.as_fd());
        MountError { op, source, log: if log.is_empty() { log } else { format!("; the kernel says: {log}") } }
    };
    for (i, lower) in lowers.iter().enumerate() {
        mount::fsconfig_fd(fs.as_fd(), c"lowerdir+", *lower)
            .map_err(|error| explained(format!("lowerdir+ {i}"), error))?;
    }
    if let Some(top) = top {
        for (key, fd) in [(c"upperdir", top.upper), (c"workdir", top.work)] {
            mount::fsconfig_fd(fs.as_fd(), key, fd).map_err(|error| explained(name(key), error))?;
        }
        mount::fsconfig_flag(fs.as_fd(), c"volatile").map_err(|error| explained(name(c"volatile"), error))?;
    }
    let (redirect, xino) = if top.is_some() { (c"on", c"on") } else { (c"follow", c"off") };
    let options =
        [(c"index", c"off"), (c"xino", xino), (c"metacopy", c"off"), (c"uuid", c"null"), (c"redirect_dir", redirect)];
    for (key, value) in options {
        mount::fsconfig_string(fs.as_fd(), key, value).map_err(|error| explained(name(key), error))?;
    }
    mount::fsconfig_create(fs.as_fd()).map_err(|error| explained("create".to_owned(), error))?;
    // Device nodes in a base or an archive must not reach the host's devices; /dev is a mount of its own.
    let attrs = if top.is_some() { attr::NODEV } else { attr::NODEV | attr::RDONLY };
    mount::fsmount(fs.as_fd(), attrs).map_err(|error| explained("fsmount".to_owned(), error))
}

fn name(key: &CStr) -> String {
    key.to_string_lossy().into_owned()
}
