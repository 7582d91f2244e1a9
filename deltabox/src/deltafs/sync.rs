//! Writing a tree to disk for good.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sys::stat::SFlag;

use super::walk::walk;

/// fsync of every file and directory below `dir`, and of itself: its own files, nobody else's (syncfs would wait for
/// all of the file system).
pub fn sync_tree(dir: &Path) -> io::Result<()> {
    walk(dir, |entry| {
        if matches!(entry.kind(), SFlag::S_IFREG | SFlag::S_IFDIR) {
            File::from(entry.open()?).sync_all()?;
        }
        Ok(())
    })?;
    sync_dir(dir)
}

/// fsync of one directory: of the names in it.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
