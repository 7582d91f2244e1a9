//! File handles: names of files that need no path (name_to_handle_at(2)).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// The most bytes that a handle has (MAX_HANDLE_SZ of include/linux/exportfs.h).
const MAX_BYTES: usize = 128;

/// A handle: its type and its bytes.
pub type Handle = (i32, Vec<u8>);

#[repr(C)]
struct Raw {
    len_bytes: u32,
    kind: i32,
    bytes: [u8; MAX_BYTES],
}

/// The handle that inotify's and fanotify's fdinfo show for a file (AT_HANDLE_FID, since Linux 6.5). It need not be one
/// that can be opened.
/// `path` is relative to `dir`; empty for `dir` itself. Symbolic links are not followed.
pub fn identity_at(dir: BorrowedFd<'_>, path: &CStr) -> io::Result<Handle> {
    const AT_HANDLE_FID: i32 = 0x200;
    let mut raw = Raw { len_bytes: 128, kind: 0, bytes: [0; MAX_BYTES] };
    let mut mount = 0_i32;
    // SAFETY: `raw` is a file_handle with room for as many bytes as it says, `path` a C string, for the whole call.
    check(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            path.as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH | AT_HANDLE_FID,
        )
    })?;
    let len = usize::try_from(raw.len_bytes).unwrap_or(MAX_BYTES).min(MAX_BYTES);
    Ok((raw.kind, raw.bytes[..len].to_vec()))
}
