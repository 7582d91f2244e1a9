//! `--base host`: an allow-list of the machine's own root as a base, without copying it.
//!
//! Overlayfs merges whole layers, so the host's root cannot simply be one: everything not hidden would show. Instead a
//! small read-only overlay is made first, and one directory of it is the base:
//! ```text
//!   frame (tmpfs)   box/usr  trusted.overlay.redirect=/usr      box/etc/...  copied      box/bin -> usr/bin
//!   host            idmapped, read-only clone of /              (a file of host root belongs to the sandbox's root)
//!   ------------------------------------------------------------ overlay, redirect_dir=follow
//!   base = box      what the frame does not name does not exist below box
//! ```
//! The frame must not lie on the host's root file system itself (overlayfs refuses overlapping layers), so it is a tmpfs,
//! filled from a copy in the store that is named by its content: a restarted engine mounts the same frame again.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use sha2::{Digest, Sha256};

use super::fixtures::{make_dir, mount_tmpfs, path_of};
use super::layer::open_dir;
use super::overlay::{self, MountError};
use crate::kernel::cgroups::unescape;
use crate::sandbox::idmap::{HOST_ID_BASE, N_IDS};
use crate::sys::{
    self,
    mount::{self, Clone, attr},
};

/// Entries of the host's root that every host base shows, where the machine has them.
const SHOWN: [&str; 8] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt"];
/// Made empty: programs expect them.
const EMPTY: [(&str, u32); 9] = [
    ("root", 0o700),
    ("home", 0o755),
    ("mnt", 0o755),
    ("media", 0o755),
    ("srv", 0o755),
    ("var", 0o755),
    ("var/lib", 0o755),
    ("var/cache", 0o755),
    ("var/log", 0o755),
];
/// Below /etc and readable by everybody, yet the machine's identity rather than its configuration.
const NOT_COPIED: [&str; 4] = ["machine-id", "hostname", "hosts", "mtab"];

/// A host base that can be a layer.
#[derive(Debug)]
pub struct HostBase {
    /// Names the frame's content; a sandbox's manifest records it.
    pub digest: String,
    /// The base's root.
    pub tree: OwnedFd,
    /// Parts of the host that are mounts of their own: path, read-only idmapped clone.
    pub binds: Vec<(String, OwnedFd)>,
    /// Keeps the overlay of `tree` mounted: it dissolves with its last descriptor, and then overlayfs refuses it as a
    /// layer ("failed to clone lowerpath").
    _overlay: OwnedFd,
}

/// Why the host's root cannot be a base.
#[derive(Debug, thiserror::Error)]
pub enum HostBaseError {
    /// A directory asked for cannot be shown.
    #[error("{path}: {why}", path = path.display())]
    BadPath {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file system of a part of the host cannot be idmapped.
    #[error("the mount {path} cannot be idmapped: {source}", path = path.display())]
    NotIdmappable {
        /// The mount point.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// The overlay of frame and host.
    #[error("mount the host base: {0}")]
    Mount(#[from] MountError),
    /// A file operation.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostBaseError {
    move |source| HostBaseError::Io { op, path: path.to_owned(), source }
}

impl HostBase {
    /// Makes the frame of today's host in `frames` (a directory of the store), unless one with the same content is
    /// there, and mounts it. `with` are further directories to show.
    pub fn prepare(frames: &Path, with: &[PathBuf], id_map: &OwnedFd) -> Result<Self, HostBaseError> {
        let shown = shown(with)?;
        let staging = frames.join(".making");
        match fs::remove_dir_all(&staging) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &staging)(error)),
            _ => {}
        }
        fs::create_dir_all(frames).map_err(io_error("create", frames))?;
        make_frame(&staging, &shown).map_err(io_error("make the frame in", &staging))?;
        let digest = digest_tree(&staging).map_err(io_error("read the frame in", &staging))?;
        let frame = frames.join(&digest);
        if frame.is_dir() {
            fs::remove_dir_all(&staging).map_err(io_error("remove", &staging))?;
        } else {
            fs::rename(&staging, &frame).map_err(io_error("rename to", &frame))?;
        }
        Self::mount(frames, &digest, id_map)
    }

    /// Mounts a frame made before.
    pub fn mount(frames: &Path, digest: &str, id_map: &OwnedFd) -> Result<Self, HostBaseError> {
        let frame = frames.join(digest);
        let tmpfs = mount_tmpfs(attr::NODEV).map_err(io_error("mount a tmpfs for", &frame))?;
        let copy = path_of(&tmpfs).join("frame");
        copy_tree(&frame, &copy).map_err(io_error("copy", &frame))?;
        let upper = open_dir(&copy).map_err(io_error("open", &copy))?;
        let root = idmapped(Path::new("/"), id_map)?;
        let overlay = overlay::mount_stack(&[upper.as_fd(), root.as_fd()], None)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let tree = nix::fcntl::openat(&overlay, "box", flags, Mode::empty())
            .map_err(|errno| io_error("open the base in", &frame)(errno.into()))?;
        let binds = read_binds(&frame).map_err(io_error("read", &frame))?;
        let binds = binds
            .into_iter()
            .map(|path| idmapped(Path::new(&path), id_map).map(|mount| (path, mount)))
            .collect::<Result<_, _>>()?;
        Ok(Self { digest: digest.to_owned(), tree, binds, _overlay: overlay })
    }
}

/// A directory of the host as a base: as it is, idmapped.
pub fn directory(path: &Path, id_map: &OwnedFd) -> Result<OwnedFd, HostBaseError> {
    if !path.is_absolute() || !path.is_dir() {
        return Err(HostBaseError::BadPath { path: path.to_owned(), why: "not a directory (give an absolute path)" });
    }
    idmapped(path, id_map)
}

/// A read-only clone of the one mount at `path`, mapped to the sandbox's ids.
fn idmapped(path: &Path, id_map: &OwnedFd) -> Result<OwnedFd, HostBaseError> {
    let dir = open_dir(path).map_err(io_error("open", path))?;
    let copy = mount::open_tree_clone(dir.as_fd(), c"", Clone::One).map_err(io_error("clone the mount of", path))?;
    mount::mount_setattr(copy.as_fd(), attr::RDONLY | attr::NODEV, 0, Some(id_map.as_fd()), Clone::One)
        .map_err(|source| HostBaseError::NotIdmappable { path: path.to_owned(), source })?;
    Ok(copy)
}

/// What of the host a frame shows.
struct Shown {
    /// Directories of the root file system, by redirect.
    redirects: BTreeSet<PathBuf>,
    /// Symbolic links at the root.
    links: Vec<(PathBuf, PathBuf)>,
    /// Mounts of their own at or below what is shown.
    binds: BTreeSet<PathBuf>,
}

fn shown(with: &[PathBuf]) -> Result<Shown, HostBaseError> {
    let mut shown = Shown { redirects: BTreeSet::new(), links: Vec::new(), binds: BTreeSet::new() };
    for path in SHOWN.map(PathBuf::from) {
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_symlink() => {
                let target = fs::read_link(&path).map_err(io_error("read", &path))?;
                shown.links.push((path, target));
            }
            Ok(meta) if meta.is_dir() => _ = shown.redirects.insert(path),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("stat", &path)(error)),
        }
    }
    for path in with {
        check_with(path)?;
        if !shown.redirects.iter().any(|other| path.starts_with(other)) {
            shown.redirects.insert(path.clone());
        }
    }
    let mounts = mount_points().map_err(io_error("read", Path::new("/proc/self/mountinfo")))?;
    for mount in mounts {
        if shown.redirects.iter().any(|dir| mount.starts_with(dir)) {
            shown.binds.insert(mount);
        }
    }
    // A shown directory on another file system than the root cannot be reached by redirect: bind its mount, too.
    let root_dev = fs::metadata("/").map_err(io_error("stat", Path::new("/")))?.dev();
    for dir in shown.redirects.clone() {
        if fs::metadata(&dir).map_err(io_error("stat", &dir))?.dev() != root_dev {
            shown.redirects.remove(&dir);
            shown.binds.insert(dir);
        }
    }
    Ok(shown)
}

fn check_with(path: &Path) -> Result<(), HostBaseError> {
    let bad = |why| Err(HostBaseError::BadPath { path: path.to_owned(), why });
    let plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
    if !path.is_absolute() || path == Path::new("/") || !plain || path.to_str().is_none() {
        return bad("give an absolute directory below /, without `..`");
    }
    for reserved in ["/proc", "/sys", "/dev", "/etc", "/tmp", "/run"] {
        if path.starts_with(reserved) {
            return bad("this directory is the sandbox's own and cannot be shown from the host");
        }
    }
    if fs::canonicalize(path).map_err(io_error("resolve", path))? != path {
        return bad("it leads through a symbolic link; give the directory that it leads to");
    }
    if !path.is_dir() {
        return bad("not a directory");
    }
    Ok(())
}

/// Mount points of this mount namespace other than `/`.
fn mount_points() -> io::Result<BTreeSet<PathBuf>> {
    let text = fs::read("/proc/self/mountinfo")?;
    let points = text.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    Ok(points.filter(|point| *point != b"/").map(unescape).collect())
}

/// Overlayfs's attribute of a directory that is to be merged with another path of the layers below.
const REDIRECT: &CStr = c"trusted.overlay.redirect";

const BINDS_FILE: &str = "binds";

fn make_frame(frame: &Path, shown: &Shown) -> io::Result<()> {
    make_dir(frame, 0o755)?;
    let top = frame.join("box");
    make_dir(&top, 0o755)?;
    for (name, mode) in EMPTY {
        make_dir(&top.join(name), mode)?;
    }
    for (path, target) in &shown.links {
        let link = inside(&top, path);
        symlink(target, &link)?;
        lchown(&link, Some(HOST_ID_BASE), Some(HOST_ID_BASE))?;
    }
    for dir in &shown.redirects {
        let at = make_dirs(&top, dir)?;
        set_redirect(&at, dir)?;
    }
    for dir in shown.binds.iter().filter(|bind| !shown.redirects.iter().any(|dir| bind.starts_with(dir))) {
        make_dirs(&top, dir)?;
    }
    copy_etc(&top.join("etc"))?;
    let lines: Vec<&str> = shown.binds.iter().filter_map(|path| path.to_str()).collect();
    fs::write(frame.join(BINDS_FILE), lines.join("\n"))
}

fn read_binds(frame: &Path) -> io::Result<Vec<String>> {
    Ok(fs::read_to_string(frame.join(BINDS_FILE))?.lines().map(str::to_owned).collect())
}

fn inside(top: &Path, path: &Path) -> PathBuf {
    top.join(path.strip_prefix("/").unwrap_or(path))
}

/// `path` below `top`, each directory on the way like the host's, without content.
fn make_dirs(top: &Path, path: &Path) -> io::Result<PathBuf> {
    let (mut host, mut at) = (PathBuf::from("/"), top.to_owned());
    for part in path.components().skip(1) {
        host.push(part);
        at.push(part);
        if !fs::exists(&at)? {
            fs::create_dir(&at)?;
        }
        take_owner_and_mode(&at, &fs::metadata(&host)?)?;
    }
    Ok(at)
}

fn take_owner_and_mode(at: &Path, host: &Metadata) -> io::Result<()> {
    let shift = |id: u32| Some(HOST_ID_BASE + if id < N_IDS { id } else { N_IDS - 2 });
    lchown(at, shift(host.uid()), shift(host.gid()))?;
    fs::set_permissions(at, fs::Permissions::from_mode(host.mode() & 0o7777))
}

fn set_redirect(dir: &Path, target: &Path) -> io::Result<()> {
    sys::fs::set_xattr(open_dir(dir)?.as_fd(), REDIRECT, target.as_os_str().as_bytes())
}

/// Where a directory leads, if it has a redirect.
fn redirect(dir: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; sys::fs::XATTR_MAX_BYTES];
    match sys::fs::get_xattr(open_dir(dir)?.as_fd(), REDIRECT, &mut value) {
        Ok(n) => {
            value.truncate(n);
            Ok(Some(value))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What everybody on the host may read: that leaves shadow, private keys and the like behind.
fn copy_etc(to: &Path) -> io::Result<()> {
    make_dir(to, 0o755)?;
    copy_readable(Path::new("/etc"), to)?;
    for (name, text) in [("hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost\n"), ("mtab", "")] {
        let path = to.join(name);
        if name == "mtab" {
            symlink("/proc/self/mounts", &path)?;
        } else {
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        }
        lchown(&path, Some(HOST_ID_BASE), Some(HOST_ID_BASE))?;
    }
    Ok(())
}

fn copy_readable(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if from == Path::new("/etc") && NOT_COPIED.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let meta = entry.metadata()?;
        if meta.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
            lchown(&target, Some(HOST_ID_BASE), Some(HOST_ID_BASE))?;
        } else if meta.is_dir() && meta.mode() & 0o005 == 0o005 {
            fs::create_dir(&target)?;
            copy_readable(&source, &target)?;
            take_owner_and_mode(&target, &meta)?;
        } else if meta.is_file() && meta.mode() & 0o004 != 0 {
            fs::copy(&source, &target)?;
            take_owner_and_mode(&target, &meta)?;
        }
    }
    Ok(())
}

/// Entries of a directory in a fixed order.
fn sorted(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Names a tree by everything in it but times.
fn digest_tree(root: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    digest_into(root, root, &mut hash)?;
    let bytes = hash.finalize();
    Ok(bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

fn digest_into(root: &Path, dir: &Path, hash: &mut Sha256) -> io::Result<()> {
    for path in sorted(dir)? {
        let meta = fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes();
        let content = if meta.is_symlink() {
            fs::read_link(&path)?.into_os_string().as_bytes().to_vec()
        } else if meta.is_file() {
            fs::read(&path)?
        } else {
            redirect(&path)?.unwrap_or_default()
        };
        for part in [name, &content] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        for number in [meta.mode(), meta.uid(), meta.gid()] {
            hash.update(number.to_le_bytes());
        }
        if meta.is_dir() {
            digest_into(root, &path, hash)?;
        }
    }
    Ok(())
}

/// Copies a frame as it is: owners, modes, redirects, modification times.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(from)?;
    if meta.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        return lchown(to, Some(meta.uid()), Some(meta.gid()));
    }
    if meta.is_dir() {
        fs::create_dir(to)?;
        for path in sorted(from)? {
            copy_tree(&path, &to.join(path.file_name().unwrap_or_default()))?;
        }
        if let Some(target) = redirect(from)? {
            set_redirect(to, Path::new(OsStr::from_bytes(&target)))?;
        }
    } else {
        fs::copy(from, to)?;
    }
    lchown(to, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    let times = fs::FileTimes::new().set_modified(meta.modified()?);
    fs::File::open(to)?.set_times(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(br"/mnt/a\040b\134c"), Path::new(r"/mnt/a b\c"));
        assert_eq!(unescape(br"/x\04"), Path::new(r"/x\04"));
    }

    #[test]
    fn a_directory_of_the_sandboxs_own_cannot_be_shown_from_the_host() {
        for bad in ["/", "relative", "/usr/../etc", "/proc/1", "/etc/ssl", "/dev", "/bin"] {
            assert!(check_with(Path::new(bad)).is_err(), "{bad} was taken");
        }
        assert!(check_with(Path::new("/usr/share")).is_ok());
    }
}
