//! A file system of its own for a story: made in a sparse file, gone with the story.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::output;

/// Big enough for every kind (mkfs.xfs wants 300 MB); sparse.
const LEN_BYTES: u64 = 512 << 20;

/// A mounted file system.
#[derive(Debug)]
pub struct Disk {
    dir: TempDir,
}

impl Disk {
    /// Makes one of `kind` (`ext4`, `xfs`, `btrfs`, `tmpfs`); fails the story where that cannot be done.
    pub fn make(kind: &str) -> Self {
        Self::make_with(kind, "size=512M")
    }

    /// The same with options of tmpfs.
    pub fn make_with(kind: &str, options: &str) -> Self {
        let dir = TempDir::with_prefix("deltabox-disk-").expect("a temporary directory");
        let disk = Self { dir };
        std::fs::create_dir(disk.path()).expect("make a mount point");
        let at = disk.path();
        if kind == "tmpfs" {
            run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&at));
            return disk;
        }
        let image = disk.dir.path().join("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(LEN_BYTES)).expect("make an image");
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
        disk
    }

    /// What a power failure leaves: of what was not written to disk, nothing. Nobody may use it any more but those whom
    /// `end_users` ends. Then it is mounted again. (ext4, xfs)
    pub fn lose_power(&self, end_users: impl FnOnce()) {
        // EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN: not even the journal is written.
        let shutdown = r#"open F, "<", $ARGV[0] or die $!; $how = pack "L", 2; ioctl F, 0x8004587d, $how or die $!"#;
        run(Command::new("perl").args(["-e", shutdown]).arg(self.path()));
        end_users();
        let end = Instant::now() + Duration::from_secs(30);
        while !output(Command::new("umount").arg(self.path())).status.success() {
            assert!(Instant::now() < end, "somebody uses {}", self.path().display());
            std::thread::sleep(Duration::from_millis(20));
        }
        run(Command::new("mount").args(["-o", "loop"]).arg(self.dir.path().join("image")).arg(self.path()));
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// A temporary directory on it.
    pub fn dir(&self) -> TempDir {
        TempDir::with_prefix_in("deltabox-test-", self.path()).expect("a temporary directory")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.path());
    }
}

/// Lazily: the last namespace that still has it drops it.
fn unmount(path: &Path) {
    let _ = output(Command::new("umount").arg("-l").arg(path));
}

fn run(command: &mut Command) {
    let done = output(command);
    assert!(done.status.success(), "{command:?}: {done:?} (`cargo xtask setup` brings what is missing)");
}
