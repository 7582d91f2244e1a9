//! Writing a tree to disk for good.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// fsync of every file and directory below `dir`, and of itself: its own files, nobody else's (syncfs would wait for
/// all of the file system).
pub fn sync_tree(dir: &Path) -> io::Result<()> {
    let mut queue = vec![dir.to_owned()];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                queue.push(entry.path());
            } else if kind.is_file() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        File::open(&dir)?.sync_all()?;
    }
    Ok(())
}
