//! Imported bases: read-only root file systems that lie in the store under a name.
//!
//! ```text
//! STORE/bases/NAME/manifest.json     what it is
//! STORE/bases/NAME/tree/             the root file system, owners shifted by 100000
//! STORE/bases/.import-XXXXXX/        an import in progress (locked) or interrupted (not locked)
//! STORE/bases/.removed-NAME-XXXXXX/  a removal in progress or interrupted
//! ```
//!
//! A base exists if and only if its directory was renamed to its name; by then everything in it is on disk. So an
//! import that fails or is killed at any point leaves nothing visible, and a removal hides the base with one rename
//! before it deletes. `docs/bases.md` has the formats and what is kept, changed and dropped.
//!
//! What must hold: nothing outside the staging directory is ever written, whatever the source holds (`writer`,
//! `beneath`); memory does not grow with the source's content. Does not know sandboxes: that a base is in use is for
//! the engine to know before it calls [`ImportedBases::remove`].

mod beneath;
mod compression;
mod directory;
mod error;
mod meta;
mod tar;
#[cfg(test)]
mod tests;
mod writer;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, renameat2};
use nix::unistd::{mkdtemp, syncfs};
use serde::{Deserialize, Serialize};

pub use self::error::ImportError;

use self::beneath::{TreePath, open_beneath};
use self::compression::OpenError;
use self::meta::Meta;
use self::writer::{TreeWriter, Written};
use crate::fault;
use crate::sandbox::spec::parse_name;

/// `--base host` is the machine's own root.
const RESERVED: &str = "host";
const MANIFEST: &str = "manifest.json";
const TREE: &str = "tree";
const LINKS: &str = "links";
const STAGING_PREFIX: &str = ".import-";
const REMOVED_PREFIX: &str = ".removed-";

/// What an imported base is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseManifest {
    /// Its name, that of its directory.
    pub name: String,
    /// Names in its tree, the root apart.
    pub n_entries: u64,
    /// Bytes of its regular files, holes included, a file of several names counted once.
    pub len_bytes: u64,
    /// When it was imported, milliseconds since the Unix epoch.
    pub imported_unix_ms: u64,
    /// The path it was imported from, as given.
    pub source: String,
    /// What could not be kept as it was: a sentence for each kind, with a count and the first entry.
    pub notes: Vec<String>,
}

/// The imported bases of a store. Every call blocks; any number of threads may call.
#[derive(Clone, Debug)]
pub struct ImportedBases {
    dir: PathBuf,
}

impl ImportedBases {
    /// The bases in `store_bases_dir`, which the first import makes.
    pub fn at(store_bases_dir: &Path) -> Self {
        Self { dir: store_bases_dir.to_owned() }
    }

    /// Imports a directory or a tar archive (plain, gzip, zstd or xz) as `name`. Copies everything.
    ///
    /// # Errors
    /// Nothing is visible, and nothing is left, after any error.
    pub fn import(&self, name: &str, source: &Path) -> Result<BaseManifest, ImportError> {
        let name = self.free_name(name)?;
        // Looked at before it is opened: opening a FIFO would wait, opening a device may do something.
        let stat = fs::metadata(source).map_err(ImportError::io("stat", source))?;
        if !stat.is_dir() && !stat.is_file() {
            return Err(refused(source, "neither a directory nor a regular file"));
        }
        let opened = File::open(source).map_err(ImportError::io("open", source))?;
        private_dir(&self.dir).map_err(ImportError::io("make", &self.dir))?;
        if stat.is_dir() {
            self.refuse_overlap(source)?;
        }
        let staging = Staging::make(&self.dir)?;
        let mut writer = staging.writer()?;
        if stat.is_dir() {
            let bases = fs::metadata(&self.dir).map_err(ImportError::io("stat", &self.dir))?;
            let links = staging.open(LINKS)?;
            let forbidden = (bases.dev(), bases.ino());
            directory::write_directory(
                &directory::Source { root: opened.into(), forbidden, links: links.as_fd() },
                &mut writer,
            )?;
        } else {
            let archive = compression::open_archive(opened).map_err(|error| match error {
                OpenError::Unsupported(why) => refused(source, why),
                OpenError::Io(error) => ImportError::io("read", source)(error),
            })?;
            tar::write_archive(archive, &mut writer)?;
        }
        fault::point("import.times").map_err(ImportError::io("write", &staging.path))?;
        let Written { n_entries, len_bytes, notes } = writer.finish()?;
        let imported_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let imported_unix_ms = u64::try_from(imported_unix_ms).unwrap_or(u64::MAX);
        let source = source.display().to_string();
        let manifest = BaseManifest { name, n_entries, len_bytes, imported_unix_ms, source, notes };
        self.commit(staging, &manifest)?;
        Ok(manifest)
    }

    /// All bases, sorted by name.
    ///
    /// # Errors
    /// One manifest that cannot be read fails the whole list; the error names it.
    pub fn list(&self) -> Result<Vec<BaseManifest>, ImportError> {
        let mut bases = Vec::new();
        for name in self.names()? {
            let Some(name) = name.to_str().filter(|name| parse_name(name).is_ok()) else { continue };
            match self.read_manifest(name) {
                // Removed since the directory was read.
                Err(ImportError::NotFound { .. }) => {}
                manifest => bases.push(manifest?),
            }
        }
        bases.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(bases)
    }

    /// Removes a base that no sandbox uses. It is gone as soon as it was renamed; deleting its files walks its tree.
    ///
    /// # Errors
    /// After a failed deletion the base is gone all the same; [`Self::clean`] deletes the rest.
    pub fn remove(&self, name: &str) -> Result<(), ImportError> {
        let name = parse_name(name)?;
        let dir = self.open_dir()?;
        // Made by mkdtemp for a name nobody has; the rename replaces it, being empty.
        let grave = self.dir.join(format!("{REMOVED_PREFIX}{name}-XXXXXX"));
        let grave = mkdtemp(&grave).map_err(ImportError::io("make", &grave))?;
        let away = fs::rename(self.dir.join(&name), &grave);
        if let Err(error) = away {
            let _ = fs::remove_dir(&grave);
            return Err(match error.kind() {
                io::ErrorKind::NotFound => ImportError::NotFound { name },
                _ => ImportError::io("rename away", &self.dir.join(&name))(error),
            });
        }
        let in_grave = |error| ImportError::io("delete", &grave)(error);
        dir.sync_all().map_err(in_grave)?;
        fault::point("base_remove.delete").map_err(in_grave)?;
        beneath::delete(&dir, grave.file_name().unwrap_or_default(), |_| {}).map_err(in_grave)
    }

    /// The root of a base's tree, as an `O_PATH` descriptor.
    pub fn tree(&self, name: &str) -> Result<OwnedFd, ImportError> {
        let name = parse_name(name)?;
        let path = Path::new(&name).join(TREE);
        match open_beneath(self.open_dir()?, &path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT) => Err(ImportError::NotFound { name }),
            tree => tree.map_err(ImportError::io("open", &self.dir.join(path))),
        }
    }

    /// Deletes what interrupted imports and removals left; returns how many of them. For the daemon's start; an
    /// import that is running, in whatever process, is left alone.
    pub fn clean(&self) -> io::Result<usize> {
        let names = match self.names() {
            Ok(names) => names,
            Err(ImportError::Io { source, .. }) => return Err(source),
            Err(error) => return Err(io::Error::other(error)),
        };
        let mut n_cleaned = 0;
        for name in names {
            let bytes = name.as_encoded_bytes();
            if bytes.starts_with(STAGING_PREFIX.as_bytes()) {
                match File::open(self.dir.join(&name))?.try_lock() {
                    Ok(()) => {}
                    Err(fs::TryLockError::WouldBlock) => continue,
                    Err(fs::TryLockError::Error(error)) => return Err(error),
                }
            } else if !bytes.starts_with(REMOVED_PREFIX.as_bytes()) {
                continue;
            }
            beneath::delete(File::open(&self.dir)?, &name, |_| {})?;
            n_cleaned += 1;
        }
        Ok(n_cleaned)
    }

    /// The names in the directory of bases; none if it does not exist yet.
    fn names(&self) -> Result<Vec<std::ffi::OsString>, ImportError> {
        let in_dir = |error| ImportError::io("read", &self.dir)(error);
        match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries
                .map_err(in_dir)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<io::Result<_>>()
                .map_err(in_dir),
        }
    }

    fn free_name(&self, name: &str) -> Result<String, ImportError> {
        let name = parse_name(name)?;
        if name == RESERVED {
            return Err(ImportError::Reserved { name });
        }
        // The rename is what decides; this saves copying everything first.
        if self.dir.join(&name).symlink_metadata().is_ok() {
            return Err(ImportError::Exists { name });
        }
        Ok(name)
    }

    /// A source within the store would copy other sandboxes' files; one around it would copy its own copy.
    fn refuse_overlap(&self, source: &Path) -> Result<(), ImportError> {
        let bases = fs::canonicalize(&self.dir).map_err(ImportError::io("resolve", &self.dir))?;
        let store = bases.parent().unwrap_or(&bases);
        let real = fs::canonicalize(source).map_err(ImportError::io("resolve", source))?;
        if real.starts_with(store) {
            return Err(refused(source, "it lies within the store"));
        }
        if store.starts_with(&real) {
            return Err(refused(source, "it contains the store"));
        }
        Ok(())
    }

    /// Makes the staged tree the base. The rename is the commit: before it everything is on disk.
    fn commit(&self, staging: Staging, manifest: &BaseManifest) -> Result<(), ImportError> {
        let in_staging = |error| ImportError::io("write", &staging.path)(error);
        beneath::delete(&staging.dir, OsStr::new(LINKS), |_| {}).map_err(in_staging)?;
        fault::point("import.manifest").map_err(in_staging)?;
        let mut file = File::create_new(staging.path.join(MANIFEST)).map_err(in_staging)?;
        let json = serde_json::to_vec_pretty(manifest).map_err(io::Error::other).map_err(in_staging)?;
        file.write_all(&json).map_err(in_staging)?;
        file.sync_all().map_err(in_staging)?;
        staging.dir.sync_all().map_err(in_staging)?;
        syncfs(&staging.dir).map_err(ImportError::io("sync the file system of", &staging.path))?;

        fault::point("import.rename").map_err(in_staging)?;
        let dir = self.open_dir()?;
        let name = manifest.name.as_str();
        match renameat2(&dir, staging.name(), &dir, name, RenameFlags::RENAME_NOREPLACE) {
            Err(Errno::EEXIST) => return Err(ImportError::Exists { name: name.to_owned() }),
            renamed => renamed.map_err(ImportError::io("rename into place", &staging.path))?,
        }
        staging.keep();
        let synced = fault::point("import.sync_parent").and_then(|()| dir.sync_all());
        if let Err(error) = synced {
            // Nobody was told that it exists: undo, so that the answer is true.
            let _ = self.remove(name);
            return Err(ImportError::io("sync", &self.dir)(error));
        }
        Ok(())
    }

    fn read_manifest(&self, name: &str) -> Result<BaseManifest, ImportError> {
        let path = self.dir.join(name).join(MANIFEST);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.dir.join(name).exists() => {
                return Err(ImportError::NotFound { name: name.to_owned() });
            }
            text => text.map_err(ImportError::io("read", &path))?,
        };
        serde_json::from_slice(&text).map_err(|source| ImportError::Manifest { path, source })
    }

    /// The directory of bases, made if this is the first call.
    fn open_dir(&self) -> Result<File, ImportError> {
        private_dir(&self.dir).and_then(|()| File::open(&self.dir)).map_err(ImportError::io("open", &self.dir))
    }
}

/// A staging directory, locked; deleted when dropped.
struct Staging {
    path: PathBuf,
    bases: File,
    dir: File,
    is_kept: bool,
}

impl Staging {
    fn make(bases: &Path) -> Result<Self, ImportError> {
        let template = bases.join(format!("{STAGING_PREFIX}XXXXXX"));
        let path = mkdtemp(&template).map_err(ImportError::io("make", &template))?;
        let in_staging = |error| ImportError::io("open", &path)(error);
        let staging = Self {
            bases: File::open(bases).map_err(in_staging)?,
            dir: File::open(&path).map_err(in_staging)?,
            path: path.clone(),
            is_kept: false,
        };
        staging.dir.lock().map_err(in_staging)?;
        for name in [TREE, LINKS] {
            DirBuilder::new().mode(0o700).create(path.join(name)).map_err(in_staging)?;
        }
        Ok(staging)
    }

    /// Writes into the tree, whose root is an ordinary directory unless the source has an entry for it.
    fn writer(&self) -> Result<TreeWriter, ImportError> {
        let mut writer = TreeWriter::new(self.open(TREE)?);
        let root = TreePath::parse(b"").map_err(|why| ImportError::entry("", why))?;
        writer.dir(&root, &Meta { mode: 0o755, ..Meta::default() })?;
        Ok(writer)
    }

    fn open(&self, name: &str) -> Result<OwnedFd, ImportError> {
        open_beneath(&self.dir, Path::new(name), OFlag::O_RDONLY | OFlag::O_DIRECTORY)
            .map_err(ImportError::io("open", &self.path))
    }

    fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    /// It was renamed: it is a base now.
    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = beneath::delete(&self.bases, self.path.file_name().unwrap_or_default(), |_| {})
        {
            tracing::warn!(path = %self.path.display(), %error, "staging left behind; the next start deletes it");
        }
    }
}

fn refused(source: &Path, why: &'static str) -> ImportError {
    ImportError::Source { source_path: source.to_owned(), why }
}

fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(path)
}
