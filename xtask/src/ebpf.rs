//! `build-ebpf`: builds the package that the workspace leaves out.

use crate::workspace::{self, Workspace};

pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let mut command = workspace.cargo("build");
    // A target directory of its own: its flags must not make the workspace's artifacts stale.
    command.args(["--locked", "--manifest-path", "deltabox-ebpf/Cargo.toml", "--target-dir"]);
    command.arg(workspace.target.join("ebpf")).env("RUSTFLAGS", "-Dwarnings");
    workspace::run(&mut command)
}
