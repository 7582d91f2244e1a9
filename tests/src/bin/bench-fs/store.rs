//! File systems to have the store on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Which file system the store lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum StoreKind {
    /// Whatever the temporary directory is on.
    Default,
    Tmpfs,
    /// With reflink, on a loop device.
    Xfs,
    /// On a loop device.
    Btrfs,
}

impl StoreKind {
    pub(crate) fn all() -> &'static [Self] {
        &[Self::Default, Self::Tmpfs, Self::Xfs, Self::Btrfs]
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Tmpfs => "tmpfs",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

/// Of a loop device's file, which is sparse (chosen: far more than a run writes).
const IMAGE_BYTES: u64 = 4 << 30;

/// Mounts of this namespace stay in it.
pub(crate) fn make_private() -> anyhow::Result<()> {
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).context("make mounts private")
}

/// A directory on such a file system; an error says why there is none.
pub(crate) fn make(kind: StoreKind, dir: &Path) -> anyhow::Result<PathBuf> {
    let at = dir.join(kind.name());
    fs::create_dir(&at).with_context(|| format!("create {}", at.display()))?;
    match kind {
        StoreKind::Default => {}
        StoreKind::Tmpfs => {
            mount(Some("bench"), &at, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mount a tmpfs")?;
        }
        StoreKind::Xfs => on_loop(&at, "mkfs.xfs", &["-q", "-m", "reflink=1"])?,
        StoreKind::Btrfs => on_loop(&at, "mkfs.btrfs", &["-q"])?,
    }
    Ok(at)
}

pub(crate) fn take_down(kind: StoreKind, at: &Path) -> anyhow::Result<()> {
    if kind != StoreKind::Default {
        umount2(at, MntFlags::MNT_DETACH).with_context(|| format!("unmount {}", at.display()))?;
    }
    Ok(())
}

fn on_loop(at: &Path, mkfs: &str, args: &[&str]) -> anyhow::Result<()> {
    let image = at.with_extension("img");
    let file = File::create(&image).with_context(|| format!("create {}", image.display()))?;
    file.set_len(IMAGE_BYTES).with_context(|| format!("enlarge {}", image.display()))?;
    run(Command::new(mkfs).args(args).arg(&image))?;
    // mount(8) sets the loop device up so that it goes with the mount.
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(at))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}: {}", output.status, said.trim());
    Ok(())
}
