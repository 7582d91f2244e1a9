//! Filesystem probes: overlays by descriptors, the seal, idmapped mounts, the host base, reflinks.
//!
//! No mount is ever attached: each exists only as a descriptor and goes with it.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
};

use super::Ground;
use super::probe::{Failure, Outcome, Scratch, at, open_directory, unless};
use super::sandboxes::{FIRST_OUTSIDE_ID, mapped_user_namespace};
use crate::sys::fs::{ficlone, set_xattr};
use crate::sys::mount::{
    Clone, attr, fs_log, fsconfig_create, fsconfig_fd, fsconfig_flag, fsconfig_string, fsmount, fsopen, mount_setattr,
    open_tree_clone,
};

/// An overlay's writable part; both directories from one mount.
struct Upper<'a> {
    upper: BorrowedFd<'a>,
    work: BorrowedFd<'a>,
}

/// Mounts an overlay of `lowers`, topmost first, with the options of every overlay in this product.
fn overlay(lowers: &[BorrowedFd<'_>], upper: Option<&Upper<'_>>) -> Result<OwnedFd, Failure> {
    let fs = fsopen(c"overlay").map_err(at("fsopen overlay"))?;
    let said = |op: &str, error: io::Error| {
        // Each message begins with its weight: `e overlay: ...`.
        let log = fs_log(fs.as_fd());
        let log = log.strip_prefix("e ").unwrap_or(&log);
        at(&if log.is_empty() { op.to_owned() } else { format!("{op} ({log})") })(error)
    };
    let options: [(&CStr, &CStr); 5] =
        [(c"index", c"off"), (c"xino", c"on"), (c"metacopy", c"off"), (c"redirect_dir", c"on"), (c"uuid", c"null")];
    for (key, value) in options {
        fsconfig_string(fs.as_fd(), key, value).map_err(|error| said(&format!("overlay option {key:?}"), error))?;
    }
    for lower in lowers {
        fsconfig_fd(fs.as_fd(), c"lowerdir+", *lower)
            .map_err(|error| said("overlay lowerdir+ by descriptor", error))?;
    }
    if let Some(Upper { upper, work }) = upper {
        fsconfig_fd(fs.as_fd(), c"upperdir", *upper).map_err(|error| said("overlay upperdir by descriptor", error))?;
        fsconfig_fd(fs.as_fd(), c"workdir", *work).map_err(|error| said("overlay workdir by descriptor", error))?;
        fsconfig_flag(fs.as_fd(), c"volatile").map_err(|error| said("overlay option volatile", error))?;
    }
    fsconfig_create(fs.as_fd()).map_err(|error| said("create overlay", error))?;
    fsmount(fs.as_fd(), 0).map_err(at("fsmount overlay"))
}

fn create_file(directory: BorrowedFd<'_>, path: &str) -> Result<File, Failure> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    openat(directory, path, flags, Mode::from_bits_retain(0o600)).map(File::from).map_err(at("create a file"))
}

fn make_directory(directory: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    mkdirat(directory, path, Mode::from_bits_retain(0o755)).map_err(at("mkdir"))
}

fn open_in(directory: BorrowedFd<'_>, path: &str) -> nix::Result<OwnedFd> {
    openat(directory, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

fn is_there(directory: BorrowedFd<'_>, path: &str) -> bool {
    fstatat(directory, path, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
}

fn owner(directory: BorrowedFd<'_>, path: &str) -> Result<u32, Failure> {
    let stat = fstatat(directory, path, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(at("stat"))?;
    Ok(stat.st_uid)
}

/// A scratch directory in the store with `lower`, `upper` and `work`, opened.
struct Stack {
    lower: OwnedFd,
    upper: OwnedFd,
    work: OwnedFd,
    scratch: Scratch,
}

impl Stack {
    fn create(ground: &Ground) -> Result<Self, Failure> {
        let scratch = scratch(ground)?;
        let sub = |name| scratch.subdirectory(name).map_err(at("mkdir in the store"));
        Ok(Self { lower: sub("lower")?, upper: sub("upper")?, work: sub("work")?, scratch })
    }

    fn writable(&self) -> Upper<'_> {
        Upper { upper: self.upper.as_fd(), work: self.work.as_fd() }
    }
}

/// A directory in the store. That none can be made there says nothing about the kernel.
fn scratch(ground: &Ground) -> Result<Scratch, Failure> {
    let op = format!("mkdir in {}", ground.store.display());
    Scratch::create(&ground.store).map_err(|error| match at(&op)(error) {
        Failure::Missing(text) => Failure::NotProbed(text),
        other => other,
    })
}

/// The store's directory, or that in which it will be made, can be written.
pub(super) fn store(ground: &Ground) -> Outcome {
    drop(scratch(ground)?);
    Ok(format!("{} ({}) is writable", ground.store.display(), filesystem(&ground.store)))
}

/// An overlay in the store: what lies below shows, what is written lands in the upper directory.
pub(super) fn overlay_by_descriptor(ground: &Ground) -> Outcome {
    let stack = Stack::create(ground)?;
    create_file(stack.lower.as_fd(), "below")?;
    let mount = overlay(&[stack.lower.as_fd()], Some(&stack.writable()))?;
    unless(is_there(mount.as_fd(), "below"), "the overlay does not show its lower layer")?;
    create_file(mount.as_fd(), "written")?;
    unless(is_there(stack.upper.as_fd(), "written"), "what the overlay took is not in its upper directory")?;
    Ok(format!("mounted, read and written on {}", filesystem(&ground.store)))
}

/// Read-only is refused while a writable descriptor is open, taken when there is none.
pub(super) fn seal(ground: &Ground) -> Outcome {
    let stack = Stack::create(ground)?;
    let mount = overlay(&[stack.lower.as_fd()], Some(&stack.writable()))?;
    let open = create_file(mount.as_fd(), "open")?;
    let seal = || mount_setattr(mount.as_fd(), attr::RDONLY, 0, None, Clone::One);
    let busy = seal().err().and_then(|error| error.raw_os_error());
    unless(busy == Some(libc::EBUSY), "read-only was not refused with EBUSY under a writable descriptor")?;
    drop(open);
    seal().map_err(at("mount_setattr(MOUNT_ATTR_RDONLY)"))?;
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let after = openat(mount.as_fd(), "open", flags, Mode::empty()).err();
    unless(after == Some(Errno::EROFS), "a sealed overlay can still be written")?;
    Ok("EBUSY under a writable descriptor, sealed without".to_owned())
}

/// A clone of the mount that `path` lies on, on which the owner 0 shows as a sandbox's root.
fn idmapped(path: &Path) -> Result<OwnedFd, Failure> {
    let directory = open_directory(path).map_err(at(&format!("open {}", path.display())))?;
    let tree = open_tree_clone(directory.as_fd(), c"", Clone::One).map_err(at("open_tree(OPEN_TREE_CLONE)"))?;
    let users = mapped_user_namespace()?;
    mount_setattr(tree.as_fd(), 0, 0, Some(users.as_fd()), Clone::One)
        .map_err(at(&format!("mount_setattr(MOUNT_ATTR_IDMAP) on {}", filesystem(path))))?;
    Ok(tree)
}

/// The machine's root can be mapped to a sandbox's ids.
pub(super) fn idmapped_root(_: &Ground) -> Outcome {
    let root = idmapped(Path::new("/"))?;
    let plain = open_directory(Path::new("/")).map_err(at("open /"))?;
    let mapped = owner(root.as_fd(), "usr")? == owner(plain.as_fd(), "usr")?.saturating_add(FIRST_OUTSIDE_ID);
    unless(mapped, "the owner of /usr did not change by the map")?;
    Ok(format!("/ ({}) with its owners mapped", filesystem(Path::new("/"))))
}

/// A directory of the store, mapped to a sandbox's ids, is the base of an overlay: what an imported image needs.
pub(super) fn idmapped_store(ground: &Ground) -> Outcome {
    let stack = Stack::create(ground)?;
    create_file(stack.lower.as_fd(), "below")?;
    let base = idmapped(&stack.scratch.path().join("lower"))?;
    let mapped = owner(stack.lower.as_fd(), "below")?.saturating_add(FIRST_OUTSIDE_ID);
    unless(owner(base.as_fd(), "below")? == mapped, "the owner of a file did not change by the map")?;
    let mount = overlay(&[base.as_fd()], Some(&stack.writable()))?;
    unless(owner(mount.as_fd(), "below")? == mapped, "the owner of a file is not mapped in the overlay")?;
    openat(mount.as_fd(), "below", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(at("copy up from an idmapped layer"))?;
    unless(owner(stack.upper.as_fd(), "below")? == mapped, "the copy in the upper directory has another owner")?;
    Ok(format!("{} with its owners mapped, as an overlay's base", filesystem(&ground.store)))
}

/// The machine's root is no overlay.
pub(super) fn plain_root(_: &Ground) -> Outcome {
    let root = statfs("/").map_err(at("statfs /"))?;
    unless(root.filesystem_type() != OVERLAYFS_SUPER_MAGIC, "/ is itself an overlay")?;
    Ok(format!("/ is {}", name(root.filesystem_type())))
}

/// The host base: an overlay that shows only listed directories of `/`, under a sandbox's overlay.
///
/// ```text
/// sandbox   [ upper | O1/box ]         shows usr, nothing else
/// O1        [ tmpfs: box/usr redirect=/usr | / idmapped ]
/// ```
pub(super) fn host_base(ground: &Ground) -> Outcome {
    let listed = tmpfs()?;
    make_directory(listed.as_fd(), "box")?;
    make_directory(listed.as_fd(), "box/usr")?;
    let set = |path: &str, key: &CStr, value: &[u8]| {
        let directory = open_in(listed.as_fd(), path).map_err(at("open on tmpfs"))?;
        set_xattr(directory.as_fd(), key, value).map_err(at(&format!("set {key:?} on tmpfs")))
    };
    // A /box of the machine must not show through.
    set("box", c"trusted.overlay.opaque", b"y")?;
    set("box/usr", c"trusted.overlay.redirect", b"/usr")?;
    let root = idmapped(Path::new("/"))?;
    let base = overlay(&[listed.as_fd(), root.as_fd()], None)?;
    let box_directory = open_in(base.as_fd(), "box").map_err(at("open box in the base overlay"))?;

    let stack = Stack::create(ground)?;
    let sandbox = overlay(&[box_directory.as_fd()], Some(&stack.writable()))?;
    let names = entries(sandbox.as_fd())?;
    unless(names == ["usr".to_owned()].into(), "the sandbox's overlay shows other directories than those listed")?;
    unless(!is_there(sandbox.as_fd(), "etc"), "the sandbox's overlay resolves names that are not listed")?;
    unless(is_there(sandbox.as_fd(), "usr/bin"), "the redirected directory shows nothing of the machine's /usr")?;
    unless(owner(sandbox.as_fd(), "usr/bin")? >= FIRST_OUTSIDE_ID, "the owners of the base are not mapped")?;
    create_file(sandbox.as_fd(), "usr/written")?;
    unless(is_there(stack.upper.as_fd(), "usr/written"), "what was written is not in the sandbox's upper directory")?;
    Ok("usr of / shows through two overlays, nothing else does".to_owned())
}

fn tmpfs() -> Result<OwnedFd, Failure> {
    let fs = fsopen(c"tmpfs").map_err(at("fsopen tmpfs"))?;
    fsconfig_create(fs.as_fd()).map_err(at("create tmpfs"))?;
    fsmount(fs.as_fd(), 0).map_err(at("fsmount tmpfs"))
}

fn entries(directory: BorrowedFd<'_>) -> Result<BTreeSet<String>, Failure> {
    let mut opened = Dir::from_fd(open_in(directory, ".").map_err(at("open a directory"))?).map_err(at("list"))?;
    let mut names = BTreeSet::new();
    for entry in opened.iter() {
        let name = entry.map_err(at("list a directory"))?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Two files of the store share blocks.
pub(super) fn reflink(ground: &Ground) -> Outcome {
    let scratch = scratch(ground)?;
    let directory = open_directory(scratch.path()).map_err(at("open in the store"))?;
    let mut from = create_file(directory.as_fd(), "from")?;
    let to = create_file(directory.as_fd(), "to")?;
    io::Write::write_all(&mut from, &[1; 4096]).map_err(at("write in the store"))?;
    let store = filesystem(&ground.store);
    ficlone(from.as_fd(), to.as_fd()).map_err(at(&format!("FICLONE on {store}")))?;
    Ok(format!("{store} shares blocks"))
}

/// The name of the filesystem `path` lies on.
fn filesystem(path: &Path) -> String {
    statfs(path).map_or_else(|error| format!("({error:?})"), |found| name(found.filesystem_type()))
}

fn name(kind: FsType) -> String {
    match kind {
        EXT4_SUPER_MAGIC => "ext4".to_owned(),
        XFS_SUPER_MAGIC => "xfs".to_owned(),
        BTRFS_SUPER_MAGIC => "btrfs".to_owned(),
        TMPFS_MAGIC => "tmpfs".to_owned(),
        OVERLAYFS_SUPER_MAGIC => "overlay".to_owned(),
        FsType(other) => format!("filesystem {other:#x}"),
    }
}
