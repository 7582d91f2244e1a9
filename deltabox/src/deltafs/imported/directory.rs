//! A directory as the source of a base: walked by descriptor, never out of it by a symbolic link, never into another
//! mount, whoever changes it meanwhile.

use std::cell::RefCell;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, copy_file_range, readlinkat};
use nix::sys::stat::{FileStat, fstat};
use nix::unistd::{Whence, lseek};

use super::ImportError;
use super::beneath::{self, TreePath, open_beneath, stat_at};
use super::meta::{Meta, Mtime, Note, Xattr};
use super::writer::{Node, TreeWriter};
use crate::sys;
use crate::sys::fs::XATTR_MAX_BYTES;

/// A directory to import.
pub(super) struct Source<'a> {
    pub(super) root: OwnedFd,
    /// Device and inode number of a directory that must not be met: the store's own.
    pub(super) forbidden: (u64, u64),
    /// An empty directory beside the tree. It gets one name, `DEV-INODE`, for every file of several names, so that
    /// the next name becomes a link and no table of such files is held in memory.
    pub(super) links: BorrowedFd<'a>,
}

/// Writes everything beneath the source.
pub(super) fn write_directory(source: &Source<'_>, writer: &mut TreeWriter) -> Result<(), ImportError> {
    let mut copier =
        Copier { source, writer, xattr_buf: vec![0; XATTR_MAX_BYTES], names_buf: vec![0; XATTR_MAX_BYTES] };
    beneath::walk(&mut copier, |copier, path| copier.copy_dir(path), |_, _| Ok(()))
}

struct Copier<'a> {
    source: &'a Source<'a>,
    writer: &'a mut TreeWriter,
    xattr_buf: Vec<u8>,
    names_buf: Vec<u8>,
}

impl Copier<'_> {
    /// Copies the directory and what it holds, apart from the directories in it, whose names are returned.
    fn copy_dir(&mut self, path: &Path) -> Result<Vec<OsString>, ImportError> {
        let tree_path = tree_path(path)?;
        let dir = match open_beneath(&self.source.root, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            Err(Errno::EXDEV) => return self.leave_mount_point(&tree_path).map(|()| Vec::new()),
            dir => dir.map_err(ImportError::on("open", path))?,
        };
        let stat = fstat(&dir).map_err(ImportError::on("stat", path))?;
        if (stat.st_dev, stat.st_ino) == self.source.forbidden {
            return Err(ImportError::entry(path, "it is the store itself"));
        }
        let meta = self.read_meta(dir.as_fd(), &tree_path, &stat)?;
        self.writer.dir(&tree_path, &meta)?;

        let subdirs = RefCell::new(Vec::new());
        beneath::for_each_name(&self.source.root, path, |dir, name, is_dir| -> Result<(), Wrapped> {
            if is_dir {
                subdirs.borrow_mut().push(name.to_owned());
                return Ok(());
            }
            Ok(self.copy_object(dir, name, &tree_path_of(path, name)?)?)
        })
        .map_err(|error| match error {
            Wrapped::Import(error) => error,
            Wrapped::Io(error) => ImportError::on("read directory", path)(error),
        })?;
        Ok(subdirs.into_inner())
    }

    /// What a mount hides cannot be seen; what it shows belongs to something else.
    fn leave_mount_point(&mut self, path: &TreePath) -> Result<(), ImportError> {
        self.writer.note(Note::MountPoint, path.as_path());
        let Some((parent, name)) = path.split() else {
            return Err(ImportError::entry(path, "the source changed while it was read"));
        };
        let parent = open_beneath(&self.source.root, parent, OFlag::O_PATH | OFlag::O_DIRECTORY)
            .map_err(ImportError::on("open parent of", path))?;
        let stat = stat_at(parent, name).map_err(ImportError::on("stat", path))?;
        self.writer.dir(path, &meta_without_xattrs(&stat))
    }

    fn copy_object(&mut self, dir: BorrowedFd<'_>, name: &OsStr, path: &TreePath) -> Result<(), ImportError> {
        let object = match open_beneath(dir, Path::new(name), OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Err(Errno::EXDEV) => {
                self.writer.note(Note::MountPoint, path.as_path());
                return Ok(());
            }
            object => object.map_err(ImportError::on("open", path))?,
        };
        let stat = fstat(&object).map_err(ImportError::on("stat", path))?;
        let kind = stat.st_mode & libc::S_IFMT;
        if kind == libc::S_IFSOCK {
            self.writer.note(Note::SocketSkipped, path.as_path());
            return Ok(());
        }
        let link_name = (stat.st_nlink > 1).then(|| OsString::from(format!("{:x}-{:x}", stat.st_dev, stat.st_ino)));
        if let Some(link_name) = &link_name
            && self.writer.link_from(self.source.links, link_name, path)?
        {
            return Ok(());
        }
        let meta = self.read_meta(object.as_fd(), path, &stat)?;
        let is_made = match kind {
            libc::S_IFREG => self.copy_file(&object, path, &meta, &stat).map(|()| true),
            libc::S_IFLNK => {
                let target = readlinkat(&object, c"").map_err(ImportError::on("read link", path))?;
                self.writer.symlink(path, &meta, target.as_bytes()).map(|()| true)
            }
            libc::S_IFIFO => self.writer.node(path, &meta, Node::Fifo).map(|()| true),
            libc::S_IFCHR => {
                self.writer.node(path, &meta, Node::Char { dev: stat.st_rdev }).map(|()| stat.st_rdev != 0)
            }
            libc::S_IFBLK => self.writer.node(path, &meta, Node::Block { dev: stat.st_rdev }).map(|()| true),
            _ => Err(ImportError::entry(path, "a file of unknown type, or the source changed while it was read")),
        }?;
        match link_name {
            Some(link_name) if is_made => self.writer.link_to(path, self.source.links, &link_name),
            _ => Ok(()),
        }
    }

    fn copy_file(
        &mut self,
        object: &OwnedFd,
        path: &TreePath,
        meta: &Meta,
        stat: &FileStat,
    ) -> Result<(), ImportError> {
        let from = reopen_for_reading(object).map_err(ImportError::on("open", path))?;
        let len = stat.st_size;
        self.writer.file(path, meta, |to, buf| {
            copy_segments(&from, to, len, buf).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => ImportError::entry(path, CHANGED),
                _ => ImportError::on("copy", path)(error),
            })?;
            let after = fstat(&from).map_err(ImportError::on("stat", path))?;
            let same = (after.st_size, after.st_mtime, after.st_mtime_nsec) == (len, stat.st_mtime, stat.st_mtime_nsec);
            if same { Ok(()) } else { Err(ImportError::entry(path, CHANGED)) }
        })
    }

    fn read_meta(&mut self, object: BorrowedFd<'_>, path: &TreePath, stat: &FileStat) -> Result<Meta, ImportError> {
        let mut meta = meta_without_xattrs(stat);
        let len = match sys::fs::list_xattrs(object, &mut self.names_buf) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => 0,
            len => len.map_err(ImportError::on("list extended attributes of", path))?,
        };
        for name in self.names_buf[..len].split_inclusive(|byte| *byte == 0) {
            let Ok(c_name) = CStr::from_bytes_with_nul(name) else { continue };
            let len = match sys::fs::get_xattr(object, c_name, &mut self.xattr_buf) {
                // Removed since it was listed, or listed but not to be had (some of security.*).
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => continue,
                len => len.map_err(ImportError::on("read an extended attribute of", path))?,
            };
            let value = self.xattr_buf[..len].to_vec();
            meta.xattrs.push(Xattr { name: c_name.to_bytes().to_vec(), value });
        }
        Ok(meta)
    }
}

const CHANGED: &str = "it changed while it was copied; import a directory that nobody writes to";

/// An error from within a listing: the listing's own or the import's.
enum Wrapped {
    Io(io::Error),
    Import(ImportError),
}

impl From<io::Error> for Wrapped {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<ImportError> for Wrapped {
    fn from(error: ImportError) -> Self {
        Self::Import(error)
    }
}

fn tree_path(path: &Path) -> Result<TreePath, ImportError> {
    TreePath::parse(path.as_os_str().as_bytes()).map_err(|why| ImportError::entry(path, why))
}

fn tree_path_of(dir: &Path, name: &OsStr) -> Result<TreePath, ImportError> {
    tree_path(&dir.join(name))
}

fn meta_without_xattrs(stat: &FileStat) -> Meta {
    Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid.into(),
        gid: stat.st_gid.into(),
        mtime: Mtime { secs: stat.st_mtime, nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) },
        xattrs: Vec::new(),
    }
}

/// The very file that was looked at, not what its name means by now: opening a FIFO or device has effects.
fn reopen_for_reading(object: &OwnedFd) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/thread-self/fd/{}", object.as_raw_fd()))
}

/// Copies the data of a file of `len` bytes; holes stay holes. `UnexpectedEof` if there is less.
fn copy_segments(from: &File, to: &File, len: i64, buf: &mut [u8]) -> io::Result<()> {
    let mut offset = 0;
    while offset < len {
        let start = match lseek(from, offset, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            start => start?,
        };
        let end = lseek(from, start, Whence::SeekHole)?.min(len);
        if end > start {
            copy_range(from, to, start, end, buf)?;
        }
        offset = end.max(start);
    }
    to.set_len(len.unsigned_abs())
}

/// Copies in the kernel, by reference where the file systems can, else through `buf`.
fn copy_range(from: &File, to: &File, start: i64, end: i64, buf: &mut [u8]) -> io::Result<()> {
    let mut at = start;
    while at < end {
        // Chosen: 1 GiB at a time keeps a signal's answer within seconds and fits every usize.
        let want = usize::try_from((end - at).min(1 << 30)).unwrap_or(1 << 30);
        let (mut at_from, mut at_to) = (at, at);
        match copy_file_range(from, Some(&mut at_from), to, Some(&mut at_to), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => at = at_from,
            Err(Errno::EINTR) => {}
            Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    while at < end {
        let want = usize::try_from(end - at).map_or(buf.len(), |left| left.min(buf.len()));
        let n = match from.read_at(&mut buf[..want], at.unsigned_abs()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            n => n?,
        };
        to.write_all_at(&buf[..n], at.unsigned_abs())?;
        at += i64::try_from(n).map_err(io::Error::other)?;
    }
    Ok(())
}
