//! `bench NAME`: builds the product and the bench `bench-NAME` of deltabox-tests in release, and runs it.

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use anyhow::{Context, bail};

use crate::setup::criu;
use crate::workspace::{self, Profile, Workspace};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which bench: `sandbox` runs tests/src/bin/bench-sandbox.rs.
    name: String,
    /// Handed to the bench as they are, such as `--json FILE`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<()> {
    let known = list_benches(workspace)?;
    if !known.contains(&args.name) {
        let known = if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
        bail!("no bench `{}` under tests/src/bin; the benches: {known}", args.name);
    }
    let product = workspace.build_binary("deltabox", "deltabox", Profile::Release)?;
    let bench = workspace.build_binary("deltabox-tests", &format!("bench-{}", args.name), Profile::Release)?;
    // Runs where the user stands, so that a relative file name means what it says.
    // The library path is `cargo run`'s: every exec of a measured program would search it first.
    let mut command = Command::new(bench);
    command.args(&args.args).env("DELTABOX_BIN", product).env_remove("LD_LIBRARY_PATH");
    // What `setup --with-criu` has unpacked.
    if let Some(criu) = criu::find(workspace) {
        command.env("DELTABOX_CRIU", criu);
    }
    workspace::run(&mut command)
}

/// Names of the benches, sorted.
fn list_benches(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let dir = workspace.root.join("tests/src/bin");
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        let file = entry?.file_name();
        if let Some(name) = file.to_str().and_then(|f| f.strip_prefix("bench-")?.strip_suffix(".rs")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
