//! Who keeps a root from being sealed although all its descriptors have moved.
//!
//! A private mapping keeps the description that it was made with. If that was open for writing, so is the mount
//! (`file_get_write_access` of fs/internal.h, Linux 6.18), though nothing can be written through it. To map the same
//! read-only would lose the pages that are the process's own.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use super::{Place, RebaseRefusal, Stopped};
use crate::deltacr::template::read_maps;
use crate::sandbox::root::Root;

/// The first private mapping of a file on `root` that was opened for writing.
pub fn find_private_writer(stopped: &Stopped, root: &Root) -> Option<RebaseRefusal> {
    for process in stopped.processes() {
        let pid = process.pid;
        // Whoever ended meanwhile keeps nothing.
        let Ok(mappings) = read_maps(pid) else { continue };
        for mapping in mappings.iter().filter(|mapping| !mapping.shared && mapping.has_file()) {
            let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
            let is_written = fs::symlink_metadata(&link).is_ok_and(|look| look.permissions().mode() & 0o200 != 0);
            let Some(link) = CString::new(link).ok().filter(|_| is_written) else { continue };
            if let Ok(Some(place)) = Place::behind(root, root.as_fd(), &link) {
                let name = place.path.to_string_lossy().into_owned();
                return Some(RebaseRefusal::PrivateWriter { pid, start: mapping.start, name });
            }
        }
    }
    None
}
