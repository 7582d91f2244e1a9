//! Which CRIU is there, if any.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::poll::PollFlags;
use nix::unistd::{AccessFlags, access};

use super::Ground;
use super::probe::{Failure, Outcome, PATIENCE, at, wait_for};
use crate::sys::process::pidfd_open;

/// The first that works on this kernel; 3.17 fails on the size of the vDSO.
const WANTED: Version = (4, 1, 1);

type Version = (u32, u32, u32);

/// A CRIU that is new enough, from `DELTABOX_CRIU` or PATH.
pub(super) fn criu(_: &Ground) -> Outcome {
    let named = std::env::var_os("DELTABOX_CRIU").filter(|name| !name.is_empty());
    let program = match named {
        Some(name) => PathBuf::from(name),
        None => search(&std::env::var_os("PATH").unwrap_or_default())
            .ok_or_else(|| Failure::Missing("no criu on PATH, DELTABOX_CRIU is not set".to_owned()))?,
    };
    let said = ask_version(&program).map_err(at(&format!("run {} --version", program.display())))?;
    let (major, minor, patch) = parse_version(&said)
        .ok_or_else(|| Failure::NotProbed(format!("{} --version told no version", program.display())))?;
    let text = format!("{} is {major}.{minor}.{patch}", program.display());
    if (major, minor, patch) >= WANTED { Ok(text) } else { Err(Failure::Missing(text)) }
}

fn search(path: &OsStr) -> Option<PathBuf> {
    let candidates = std::env::split_paths(path).map(|directory| directory.join("criu"));
    candidates.into_iter().find(|file| file.is_file() && access(file, AccessFlags::X_OK).is_ok())
}

/// What it prints, which must fit into a pipe. Killed if it takes too long.
fn ask_version(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let ended = libc::pid_t::try_from(child.id())
        .map_err(io::Error::other)
        .and_then(pidfd_open)
        .and_then(|pidfd| wait_for(pidfd.as_fd(), PollFlags::POLLIN, Instant::now() + PATIENCE));
    if ended.is_err() {
        child.kill()?;
    }
    child.wait()?;
    ended?;
    let mut bytes = [0; 4096];
    let n = child.stdout.as_mut().map_or(Ok(0), |stdout| stdout.read(&mut bytes))?;
    Ok(String::from_utf8_lossy(&bytes[..n]).into_owned())
}

/// The numbers after `Version:`; parts not given are 0.
fn parse_version(text: &str) -> Option<Version> {
    let line = text.lines().find_map(|line| line.strip_prefix("Version:"))?;
    let mut parts = line.trim().split(['.', '-']).map_while(|part| part.parse().ok());
    Some((parts.next()?, parts.next().unwrap_or(0), parts.next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_what_criu_prints() {
        assert_eq!(parse_version("Version: 4.1.1\nGitID: v4.1.1\n"), Some((4, 1, 1)));
        assert_eq!(parse_version("Version: 4.2\n"), Some((4, 2, 0)));
        assert_eq!(parse_version("Version: 3.17.1-2\n"), Some((3, 17, 1)));
        assert_eq!(parse_version("criu: not found\n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        assert!((3, 17, 1) < WANTED);
        assert!((4, 2, 0) > WANTED);
    }

    #[test]
    fn only_an_executable_file_on_the_path_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(search(directory.path().as_os_str()), None);
        std::fs::write(directory.path().join("criu"), "").unwrap();
        assert_eq!(search(directory.path().as_os_str()), None);
    }
}
