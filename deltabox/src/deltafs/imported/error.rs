//! Why an import, a look-up or a removal of a base was not carried out.

use std::io;
use std::path::{Path, PathBuf};

use crate::sandbox::spec::BadName;

/// Nothing became visible, and nothing visible changed, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Not a name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The name means something else already.
    #[error("`{name}` is reserved: `--base {name}` is the machine's own root; choose another name")]
    Reserved {
        /// The name.
        name: String,
    },
    /// The name is taken.
    #[error("image `{name}` exists already; choose another name, or remove that image first")]
    Exists {
        /// The name.
        name: String,
    },
    /// No base of this name.
    #[error("no image `{name}`")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The source is neither a directory nor an archive that can be read.
    #[error("{}: {why}", source_path.display())]
    Source {
        /// What was to be imported.
        source_path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The archive is damaged, or holds what this importer does not understand.
    #[error("archive refused at byte {offset}, at or after entry `{}`: {why}", entry.display())]
    Archive {
        /// The entry being read, or the last one before the damage; empty at the first header.
        entry: PathBuf,
        /// Where in the uncompressed archive.
        offset: u64,
        /// What is wrong there.
        why: &'static str,
    },
    /// The compressed stream around the archive is damaged or ends early.
    #[error("archive refused after byte {offset}, at or after entry `{}`: decompress: {source}", entry.display())]
    Compression {
        /// The entry being read, or the last one before the damage.
        entry: PathBuf,
        /// Uncompressed bytes that were still good.
        offset: u64,
        /// The decoder's word.
        source: io::Error,
    },
    /// An entry that would lead out of the base, or that a base cannot hold.
    #[error("entry `{}` refused: {why}", entry.display())]
    Entry {
        /// The entry.
        entry: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// A system call on one entry failed.
    #[error("{op} `{}`: {source}", entry.display())]
    EntryIo {
        /// What was being done.
        op: &'static str,
        /// On which entry.
        entry: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A system call on the store or the source as a whole failed.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// The base's own manifest cannot be read; its tree may be whole.
    #[error("read {}: {source}; remove the image and import it again", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl ImportError {
    pub(super) fn entry(entry: impl AsRef<Path>, why: &'static str) -> Self {
        Self::Entry { entry: entry.as_ref().to_owned(), why }
    }

    /// For `map_err` on a call about one entry.
    pub(super) fn on<E: Into<io::Error>>(op: &'static str, entry: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| Self::EntryIo { op, entry: entry.as_ref().to_owned(), source: source.into() }
    }

    /// For `map_err` on a call about the store or the source.
    pub(super) fn io<E: Into<io::Error>>(op: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { op, path: path.to_owned(), source: source.into() }
    }
}
