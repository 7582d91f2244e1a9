//! Makes the entries of a base's tree, whatever the source says, and never anything outside it.
//!
//! Every parent is opened beneath the root through no symbolic link, so a planted link cannot lead out; every object
//! is made with an exclusive call, so nothing existing is ever written through. Owners, modes and attributes are set
//! at once (as root a read-only directory can still be filled), a directory's time at the end, when nothing in it
//! changes any more.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use super::ImportError;
use super::beneath::{self, TreePath, open_beneath, stat_at};
use super::meta::{ACL_ACCESS, ACL_DEFAULT, Meta, Mtime, Note, Notes, shifted_owner, stored_xattr};
use crate::sys;

/// Chosen: far above any image; bounds the time an archive made to hurt can take.
const MAX_ENTRIES: u64 = 10_000_000;
/// Chosen: bounds `dir_mtimes` (about 50 MB when full).
const MAX_DIRS: u64 = 1_000_000;
/// Chosen: large enough that the calls cost nothing beside the copying.
const COPY_BYTES: usize = 256 * 1024;

/// A special file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Fifo,
    Char { dev: libc::dev_t },
    Block { dev: libc::dev_t },
}

/// What a finished tree holds.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) n_entries: u64,
    pub(super) len_bytes: u64,
    pub(super) notes: Vec<String>,
}

/// A tree being written.
pub(super) struct TreeWriter {
    root: OwnedFd,
    notes: Notes,
    /// Names in the tree, its root apart.
    n_entries: u64,
    n_dirs: u64,
    /// Bytes of regular files, one with several names counted once.
    len_bytes: u64,
    /// Entries that the source gave, replaced ones too.
    n_given: u64,
    /// By inode number: exact however often a path changes its meaning, and small.
    dir_mtimes: HashMap<u64, Mtime>,
    /// Whether a directory hands an access control list down to what is made in it.
    has_default_acls: bool,
    buf: Vec<u8>,
}

impl TreeWriter {
    /// Writes into the empty directory `root`.
    pub(super) fn new(root: OwnedFd) -> Self {
        Self {
            root,
            notes: Notes::default(),
            n_entries: 0,
            n_dirs: 0,
            len_bytes: 0,
            n_given: 0,
            dir_mtimes: HashMap::new(),
            has_default_acls: false,
            buf: vec![0; COPY_BYTES],
        }
    }

    pub(super) fn note(&mut self, note: Note, entry: &Path) {
        self.notes.add(note, entry);
    }

    /// A directory; merges into one that exists, replaces anything else.
    pub(super) fn dir(&mut self, path: &TreePath, meta: &Meta) -> Result<(), ImportError> {
        self.admit(path)?;
        let dir = match path.split() {
            None => open_beneath(&self.root, Path::new(""), OFlag::O_RDONLY | OFlag::O_DIRECTORY),
            Some((_, name)) => {
                let parent = self.parent(path)?;
                match stat_at(&parent, name) {
                    Ok(stat) if beneath::is_dir(&stat) => {}
                    _ => {
                        self.place("mkdir", path, &parent, |name| mkdirat(&parent, name, Mode::S_IRWXU))?;
                        self.count_dir(path)?;
                    }
                }
                open_beneath(&parent, Path::new(name), OFlag::O_RDONLY | OFlag::O_DIRECTORY)
            }
        }
        .map_err(ImportError::on("open directory", path))?;
        self.set_meta(dir.as_fd(), path, meta)?;
        let stat = fstat(&dir).map_err(ImportError::on("stat", path))?;
        self.dir_mtimes.insert(stat.st_ino, meta.mtime);
        Ok(())
    }

    /// A regular file, filled by `fill`, which also gets a buffer to copy with.
    pub(super) fn file(
        &mut self,
        path: &TreePath,
        meta: &Meta,
        fill: impl FnOnce(&File, &mut [u8]) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        self.admit(path)?;
        let parent = self.parent(path)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let owner_only = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = self.place("create", path, &parent, |name| openat(&parent, name, flags, owner_only))?;
        let file = File::from(file);
        fill(&file, &mut self.buf)?;
        // Owner and attributes after the content: a write takes set-user-id bits and capabilities away.
        self.set_meta(file.as_fd(), path, meta)?;
        self.set_mtime(file.as_fd(), path, meta)?;
        self.len_bytes += file.metadata().map_err(ImportError::on("stat", path))?.len();
        Ok(())
    }

    /// A symbolic link; `target` is stored as it is and never looked at.
    pub(super) fn symlink(&mut self, path: &TreePath, meta: &Meta, target: &[u8]) -> Result<(), ImportError> {
        self.admit(path)?;
        let parent = self.parent(path)?;
        self.place("symlink", path, &parent, |name| symlinkat(target, &parent, name))?;
        self.set_meta_of_new(&parent, path, meta)
    }

    /// A FIFO or device node. Sandboxes mount their roots nodev: a device node is inert there.
    pub(super) fn node(&mut self, path: &TreePath, meta: &Meta, node: Node) -> Result<(), ImportError> {
        let (kind, dev) = match node {
            Node::Fifo => (SFlag::S_IFIFO, 0),
            Node::Char { dev: 0 } => {
                // In a layer it would hide what lies below, or remove it from a merge.
                self.note(Note::WhiteoutNodeSkipped, path.as_path());
                return self.admit(path);
            }
            Node::Char { dev } => (SFlag::S_IFCHR, dev),
            Node::Block { dev } => (SFlag::S_IFBLK, dev),
        };
        self.admit(path)?;
        let parent = self.parent(path)?;
        self.place("mknod", path, &parent, |name| mknodat(&parent, name, kind, Mode::S_IRUSR, dev))?;
        self.set_meta_of_new(&parent, path, meta)
    }

    /// Another name, `path`, for what an earlier entry made at `target`.
    pub(super) fn hard_link(&mut self, path: &TreePath, target: &TreePath) -> Result<(), ImportError> {
        const MISSING: &str = "a hard link to something that no earlier entry made";
        let Some((dir, name)) = target.split() else {
            return Err(ImportError::entry(path, "a hard link to a directory"));
        };
        let dir = open_beneath(&self.root, dir, OFlag::O_PATH | OFlag::O_DIRECTORY)
            .map_err(|errno| refused_parent(path, errno, MISSING))?;
        match stat_at(&dir, name) {
            Ok(stat) if beneath::is_dir(&stat) => Err(ImportError::entry(path, "a hard link to a directory")),
            Ok(_) if path == target => self.admit(path),
            Ok(_) if self.link_from(&dir, name, path)? => Ok(()),
            Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG) => Err(ImportError::entry(path, MISSING)),
            Err(errno) => Err(ImportError::on("stat link target of", path)(errno)),
        }
    }

    /// Another name for `name` in `dir`, itself even if it is a symbolic link. False if there is no such name.
    pub(super) fn link_from(&mut self, dir: impl AsFd, name: &OsStr, path: &TreePath) -> Result<bool, ImportError> {
        self.admit(path)?;
        let parent = self.parent(path)?;
        match self.place("link", path, &parent, |new| linkat(&dir, name, &parent, new, AtFlags::empty())) {
            Err(ImportError::EntryIo { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            linked => linked.map(|()| true),
        }
    }

    /// `path` as a name in `dir` too, outside the tree: the other half of [`Self::link_from`].
    pub(super) fn link_to(&mut self, path: &TreePath, dir: impl AsFd, name: &OsStr) -> Result<(), ImportError> {
        let Some((_, own_name)) = path.split() else { return Ok(()) };
        let parent = self.parent(path)?;
        linkat(parent, own_name, dir, name, AtFlags::empty()).map_err(ImportError::on("link", path))
    }

    /// Removes what earlier entries made at `path`, if anything.
    pub(super) fn whiteout(&mut self, path: &TreePath) -> Result<(), ImportError> {
        self.admit(path)?;
        let Some((dir, name)) = path.split() else { return Ok(()) };
        match open_beneath(&self.root, dir, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(refused_parent(path, errno, "")),
            Ok(parent) => self.clear(path, &parent, name),
        }
    }

    /// Removes what earlier entries made in the directory that holds `marker`, if there is one.
    pub(super) fn opaque(&mut self, marker: &TreePath) -> Result<(), ImportError> {
        self.admit(marker)?;
        let Some((dir, _)) = marker.split() else { return Ok(()) };
        match open_beneath(&self.root, dir, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(refused_parent(marker, errno, "")),
            Ok(dir) => {
                let emptied = beneath::empty_dir(&dir, |stat| self.forget(stat));
                emptied.map_err(ImportError::on("empty directory of", marker))
            }
        }
    }

    /// Sets the directories' times; the tree is complete.
    pub(super) fn finish(mut self) -> Result<Written, ImportError> {
        let root = self.root.as_fd();
        let enter = |mtimes: &mut HashMap<u64, Mtime>, path: &Path| -> io::Result<_> {
            let dir = open_beneath(root, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            if let Some(mtime) = mtimes.get(&fstat(&dir)?.st_ino) {
                sys::fs::set_mtime(dir.as_fd(), mtime.secs, mtime.nanos)?;
            }
            let mut subdirs = Vec::new();
            beneath::for_each_name(root, path, |_, name, is_dir| {
                if is_dir {
                    subdirs.push(name.to_owned());
                }
                Ok::<_, io::Error>(())
            })?;
            Ok(subdirs)
        };
        beneath::walk(
            &mut self.dir_mtimes,
            |mtimes, path| enter(mtimes, path).map_err(ImportError::on("set time of directory", path)),
            |_, _| Ok(()),
        )?;
        Ok(Written { n_entries: self.n_entries, len_bytes: self.len_bytes, notes: self.notes.sentences() })
    }

    fn admit(&mut self, path: &TreePath) -> Result<(), ImportError> {
        self.n_given += 1;
        if self.n_given > MAX_ENTRIES {
            return Err(ImportError::entry(path, "more than 10 million entries"));
        }
        Ok(())
    }

    fn count_dir(&mut self, path: &TreePath) -> Result<(), ImportError> {
        self.n_dirs += 1;
        if self.n_dirs > MAX_DIRS {
            return Err(ImportError::entry(path, "more than 1 million directories"));
        }
        Ok(())
    }

    /// The directory that `path` is to be in, made with its own parents where no entry has made them.
    fn parent(&mut self, path: &TreePath) -> Result<OwnedFd, ImportError> {
        let Some((parent, _)) = path.split() else {
            return Err(ImportError::entry(path, "the root of the tree can only be a directory"));
        };
        match open_beneath(&self.root, parent, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(dir) => return Ok(dir),
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(refused_parent(path, errno, "")),
        }
        let mut dir = self.root.try_clone().map_err(ImportError::on("open parent of", path))?;
        for name in parent {
            let name = Path::new(name);
            dir = match open_beneath(&dir, name, OFlag::O_PATH | OFlag::O_DIRECTORY) {
                Err(Errno::ENOENT) => {
                    let in_parent = |errno| ImportError::on("make parent of", path)(errno);
                    mkdirat(&dir, name, Mode::S_IRWXU).map_err(in_parent)?;
                    self.n_entries += 1;
                    self.count_dir(path)?;
                    let new = open_beneath(&dir, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY).map_err(in_parent)?;
                    self.set_meta(new.as_fd(), path, &Meta { mode: 0o755, ..Meta::default() })?;
                    new
                }
                opened => opened.map_err(|errno| refused_parent(path, errno, ""))?,
            };
        }
        Ok(dir)
    }

    /// Makes an object by an exclusive call; what an earlier entry left at its place goes first.
    fn place<T>(
        &mut self,
        op: &'static str,
        path: &TreePath,
        parent: &OwnedFd,
        make: impl Fn(&OsStr) -> nix::Result<T>,
    ) -> Result<T, ImportError> {
        let name = path.as_path().file_name().unwrap_or_default();
        let made = match make(name) {
            Err(Errno::EEXIST) => {
                self.clear(path, parent, name)?;
                make(name)
            }
            made => made,
        };
        self.n_entries += u64::from(made.is_ok());
        made.map_err(ImportError::on(op, path))
    }

    fn clear(&mut self, path: &TreePath, parent: &OwnedFd, name: &OsStr) -> Result<(), ImportError> {
        beneath::delete(parent, name, |stat| self.forget(stat)).map_err(ImportError::on("remove earlier", path))
    }

    /// Takes an object that is about to be removed off the books.
    fn forget(&mut self, stat: &FileStat) {
        self.n_entries -= 1;
        if beneath::is_dir(stat) {
            self.n_dirs -= 1;
            self.dir_mtimes.remove(&stat.st_ino);
        } else if stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_nlink == 1 {
            self.len_bytes -= stat.st_size.unsigned_abs();
        }
    }

    fn set_meta_of_new(&mut self, parent: &OwnedFd, path: &TreePath, meta: &Meta) -> Result<(), ImportError> {
        let name = path.as_path().file_name().unwrap_or_default();
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let object = openat(parent, name, flags, Mode::empty()).map_err(ImportError::on("open", path))?;
        self.set_meta(object.as_fd(), path, meta)?;
        self.set_mtime(object.as_fd(), path, meta)
    }

    fn set_mtime(&self, object: BorrowedFd<'_>, path: &TreePath, meta: &Meta) -> Result<(), ImportError> {
        sys::fs::set_mtime(object, meta.mtime.secs, meta.mtime.nanos).map_err(ImportError::on("set time of", path))
    }

    /// Sets everything but the time. The order matters: chown clears set-user-id bits and capabilities.
    fn set_meta(&mut self, object: BorrowedFd<'_>, path: &TreePath, meta: &Meta) -> Result<(), ImportError> {
        let (uid, gid) = shifted_owner(meta, path.as_path(), &mut self.notes);
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        fchownat(object, c"", uid, gid, AtFlags::AT_EMPTY_PATH).map_err(ImportError::on("chown", path))?;
        let stat = fstat(object).map_err(ImportError::on("stat", path))?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFLNK {
            return self.set_xattrs(object, path, meta);
        }
        if self.has_default_acls {
            for inherited in [ACL_ACCESS, ACL_DEFAULT] {
                match sys::fs::remove_xattr(object, inherited) {
                    Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => {}
                    removed => removed.map_err(ImportError::on("remove inherited access list of", path))?,
                }
            }
        }
        sys::fs::chmod(object, meta.mode & 0o7777).map_err(ImportError::on("chmod", path))?;
        self.set_xattrs(object, path, meta)
    }

    fn set_xattrs(&mut self, object: BorrowedFd<'_>, path: &TreePath, meta: &Meta) -> Result<(), ImportError> {
        for xattr in &meta.xattrs {
            let (name, value) = match stored_xattr(xattr) {
                Ok(stored) => stored,
                Err(note) => {
                    self.note(note, path.as_path());
                    continue;
                }
            };
            match sys::fs::set_xattr(object, &name, &value) {
                // EPERM: user.* on a symbolic link or special file. EACCES: a default list on a file.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM | libc::EACCES)) => {
                    self.note(Note::XattrUnsupported, path.as_path());
                }
                set => set.map_err(ImportError::on("set an extended attribute of", path))?,
            }
            self.has_default_acls |= name.as_c_str() == ACL_DEFAULT;
        }
        Ok(())
    }
}

/// What it means that the parent of `path` could not be opened beneath the root.
fn refused_parent(path: &TreePath, errno: Errno, missing: &'static str) -> ImportError {
    match errno {
        Errno::ELOOP => ImportError::entry(path, "it leads through a symbolic link"),
        Errno::ENOTDIR => ImportError::entry(path, "it leads through something that is not a directory"),
        Errno::EXDEV => ImportError::entry(path, "it leads out of the tree"),
        Errno::ENOENT if !missing.is_empty() => ImportError::entry(path, missing),
        errno => ImportError::on("open parent of", path)(errno),
    }
}
