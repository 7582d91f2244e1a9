//! The test runner: the user's own, or one in the target directory.

use std::path::PathBuf;

use anyhow::Context;

use super::probe;
use crate::workspace::{self, Workspace};

/// Installed when there is none.
const VERSION: &str = "0.9.143";
/// The oldest that reads our .config/nextest.toml.
const OLDEST: (u32, u32, u32) = (0, 9, 100);

/// The version found.
pub(super) fn check(workspace: &Workspace) -> Result<String, String> {
    let mut why = "not on PATH and not in the target directory".to_owned();
    for program in candidates(workspace) {
        match version_of(&program) {
            Ok(version) => return Ok(version),
            Err(reason) => why = format!("{}: {reason}", program.display()),
        }
    }
    Err(why)
}

/// The program that `check` found.
pub(crate) fn program(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    candidates(workspace)
        .into_iter()
        .find(|program| version_of(program).is_ok())
        .context("no cargo-nextest; run `cargo xtask setup`")
}

/// Compiles it into the target directory.
pub(super) fn install(workspace: &Workspace) -> anyhow::Result<()> {
    let mut command = workspace.cargo("install");
    command.args(["cargo-nextest", "--locked", "--version", VERSION, "--root"]).arg(workspace.target.join("tools"));
    // A runner that only starts tests: its updater and an optimized build would cost minutes and save nothing.
    command.args(["--no-default-features", "--features", "default-no-update"]);
    command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1").env("CARGO_PROFILE_RELEASE_LTO", "off");
    workspace::run(&mut command)
}

fn candidates(workspace: &Workspace) -> Vec<PathBuf> {
    let ours = workspace.target.join("tools/bin/cargo-nextest");
    workspace::find_program("cargo-nextest").into_iter().chain(ours.is_file().then_some(ours)).collect()
}

fn version_of(program: &PathBuf) -> Result<String, String> {
    let line = probe::run(program, &["nextest", "--version"])?;
    match parse_version(&line) {
        Some(version) if version >= OLDEST => Ok(line),
        Some(_) => Err(format!("`{line}` is older than {OLDEST:?}")),
        None => Err(format!("`{line}` is no version")),
    }
}

/// The version in `cargo-nextest 0.9.143 (60fa45f63 2026-08-04)`.
fn parse_version(line: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = line.split_whitespace().nth(1)?.splitn(3, '.').map(|part| {
        let digits = part.split(|c: char| !c.is_ascii_digit()).next().unwrap_or("");
        digits.parse::<u32>().ok()
    });
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_nextests_own_line() {
        assert_eq!(parse_version("cargo-nextest 0.9.143 (60fa45f63 2026-08-04)"), Some((0, 9, 143)));
        assert_eq!(parse_version("cargo-nextest 1.0.0-rc.1"), Some((1, 0, 0)));
        assert_eq!(parse_version("cargo-nextest 0.9"), None);
        assert_eq!(parse_version("nothing"), None);
    }
}
