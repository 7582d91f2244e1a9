//! The root of a running sandbox: which mount it is, and another in its place.
//!
//! ```text
//!  before                       attach next, move submounts            pivot_root
//!  / old overlay                / old overlay                          / next overlay
//!  +- proc sys dev ...          +- / next overlay                      +- proc sys dev ...
//!                                  +- proc sys dev ...                    +- dev/.deltabox/old  old overlay
//! ```
//! pivot_root takes every process along whose root is the old one, and every working directory that is the old root
//! itself. The old overlay stays in the tree until it is sealed and detached: only there can it be turned read-only.
//! No program reaches it: the directory above belongs to the host's root.
//!
//! Nothing here may run while programs of the sandbox do, but for [`Namespace::detach`] and [`Door`].

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use libc::pid_t;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::MntFlags;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;

use crate::kernel::cgroups::unescape;
use crate::sys::mount::{self, attr};
use crate::sys::reconfigure::drop_caches_of;
use crate::sys::stat::{Stat, stat};

/// Where the old root waits: a directory that every sandbox's `/dev` has.
pub const LANDING: &std::ffi::CStr = c"dev/.deltabox/old";

/// The root directory of a mount.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    look: Stat,
}

impl Root {
    /// What process `pid` has as its root.
    pub fn of(pid: pid_t) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let path = format!("/proc/{pid}/root");
        Self::new(nix::fcntl::open(path.as_str(), flags, Mode::empty())?)
    }

    /// The one that was left and not detached since, seen by process `pid`.
    pub fn left(pid: pid_t) -> io::Result<Option<Self>> {
        let root = Self::of(pid)?;
        let old = root.open(&LANDING.to_owned(), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let around = root.open(&c"dev".to_owned(), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let is_mounted = stat(old.as_fd())?.mount != stat(around.as_fd())?.mount;
        if is_mounted { Self::new(old).map(Some) } else { Ok(None) }
    }

    /// Of a mount, attached or not.
    pub fn new(mount: OwnedFd) -> io::Result<Self> {
        let look = stat(mount.as_fd())?;
        Ok(Self { dir: mount, look })
    }

    /// The number that fdinfo calls `mnt_id`.
    pub fn mount(&self) -> u64 {
        self.look.mount
    }

    /// The kernel's own number of its device, which maps and fdinfo show (MKDEV of include/linux/kdev_t.h).
    pub fn dev(&self) -> u64 {
        u64::from(self.look.dev.0) << 20 | u64::from(self.look.dev.1)
    }

    /// Whether something is this very directory, reached through this mount.
    pub fn is(&self, other: &Stat) -> bool {
        // Files of several layers may share a number, directories do not.
        (other.mount, other.ino, other.kind()) == (self.look.mount, self.look.ino, libc::S_IFDIR)
    }

    /// Tears down what is cached of it and not in use. Programs whose text lies on it keep the rest; without this the
    /// last of them would do all of it when it ends.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn tear_down(&self) -> io::Result<()> {
        drop_caches_of(self.dir.as_fd())
    }

    /// Opens what a program with this root would get at `path`, which has no symbolic links.
    pub fn open(&self, path: &CString, flags: OFlag) -> nix::Result<OwnedFd> {
        let relative = match path.to_bytes().strip_prefix(b"/") {
            Some(b"") => b".",
            Some(rest) => rest,
            None => path.to_bytes(),
        };
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        openat2(&self.dir, relative, how)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// The mount namespace of a sandbox.
#[derive(Debug)]
pub struct Namespace {
    door: Door,
    submounts: Vec<Submount>,
}

/// The way into a mount namespace and back.
#[derive(Debug)]
pub struct Door {
    inside: OwnedFd,
    outside: OwnedFd,
}

impl Door {
    /// To that of process `pid`.
    pub fn of(pid: pid_t) -> io::Result<Self> {
        let inside = fs::File::open(format!("/proc/{pid}/ns/mnt"))?.into();
        let outside = fs::File::open("/proc/thread-self/ns/mnt")?.into();
        Ok(Self { inside, outside })
    }

    /// Runs `work` inside. The calling thread never again shares root and working directory with others.
    pub fn visit<R>(&self, work: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        nix::sched::unshare(CloneFlags::CLONE_FS)?;
        nix::sched::setns(&self.inside, CloneFlags::CLONE_NEWNS)?;
        let result = work();
        nix::sched::setns(&self.outside, CloneFlags::CLONE_NEWNS)?;
        result
    }
}

/// What is mounted directly on the root.
#[derive(Debug)]
struct Submount {
    /// Relative to the root.
    at: CString,
    /// Its root directory; not there: it has been moved already, to a root that was not entered.
    mount: Option<OwnedFd>,
}

impl Namespace {
    /// Of process `pid`, with what is mounted on its root. Programs of a sandbox cannot change that.
    pub fn of(pid: pid_t) -> io::Result<Self> {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        let submounts = parse_submounts(&mounts).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("mountinfo of process {pid} shows no root"))
        })?;
        let root = Root::of(pid)?;
        let open = |at: CString| {
            let mount = root.open(&at, OFlag::O_PATH)?;
            let is_mount = stat(mount.as_fd())?.mount != root.look.mount;
            Ok(Submount { at, mount: is_mount.then_some(mount) })
        };
        let submounts = submounts.into_iter().map(open).collect::<io::Result<_>>()?;
        Ok(Self { door: Door::of(pid)?, submounts })
    }

    /// Looks up where the mounts on the root will sit in a next root, for [`Namespace::pivot`] not to: that takes
    /// longer the deeper its stack is. Programs can neither remove nor change these directories, unlike all others, of
    /// which an overlay must not know anything while one of its lower layers still changes.
    pub fn look_ahead(&self, next: &Root) {
        for Submount { at, .. } in &self.submounts {
            // Whatever is wrong with it shows at the pivot.
            let _ = next.open(at, OFlag::O_PATH);
        }
    }

    /// Puts `to` in the place of `from`, which waits to be detached then. After an error all is as before.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn pivot(&self, from: &Root, to: &Root) -> io::Result<()> {
        self.visit(|| {
            mount::move_mount(to.as_fd(), from.as_fd(), c"")?;
            let moved = self.move_submounts(to).and_then(|()| {
                crate::fault::point("switch.pivot")?;
                nix::unistd::fchdir(to.as_fd())?;
                Ok(nix::unistd::pivot_root(c".", LANDING)?)
            });
            if moved.is_err() {
                // What was moved goes back; what was not is not there to be moved.
                let _ = self.move_submounts(from);
                let _ = detach(to);
            }
            moved
        })
    }

    /// All, whichever fail.
    fn move_submounts(&self, to: &Root) -> io::Result<()> {
        let mut moved = Ok(());
        for Submount { at, mount } in &self.submounts {
            if let Some(mount) = mount {
                moved = moved.and(mount::move_mount(mount.as_fd(), to.as_fd(), at));
            }
        }
        moved
    }

    /// Makes a root that was left read-only, for good. `false`: something can still write to it.
    pub fn seal(&self, root: &Root) -> io::Result<bool> {
        let sealed = || mount::mount_setattr(root.as_fd(), attr::RDONLY, 0, None, mount::Clone::One);
        match self.visit(sealed) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes a next root away that was put on `root` and never entered, and moves back what was moved to it.
    pub fn take_off(&self, root: &Root) -> io::Result<()> {
        self.visit(|| {
            // setns goes up to the topmost mount.
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let top = Root::new(nix::fcntl::open(c"/", flags, Mode::empty())?)?;
            if top.look.mount == root.look.mount {
                return Ok(());
            }
            for Submount { at, .. } in &self.submounts {
                move_submount(&top, root, at)?;
            }
            detach(&top)
        })
    }

    /// Takes a root that was left out of the tree. What still uses it keeps it.
    pub fn detach(&self, root: &Root) -> io::Result<()> {
        self.visit(|| detach(root))
    }

    /// [`Door::visit`].
    pub fn visit<R>(&self, work: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        self.door.visit(work)
    }
}

fn move_submount(from: &Root, to: &Root, at: &CString) -> io::Result<()> {
    let mount = from.open(at, OFlag::O_PATH)?;
    // Not a mount (any more): nothing to move.
    if stat(mount.as_fd())?.mount == from.look.mount {
        return Ok(());
    }
    mount::move_mount(mount.as_fd(), to.as_fd(), at)
}

fn detach(root: &Root) -> io::Result<()> {
    nix::unistd::fchdir(root.as_fd())?;
    Ok(nix::mount::umount2(c".", MntFlags::MNT_DETACH)?)
}

/// The mount points of the mounts that sit on the root, relative to it (proc_pid_mountinfo(5)).
fn parse_submounts(mountinfo: &str) -> Option<Vec<CString>> {
    let fields = |line: &'_ str| {
        let fields: Vec<_> = line.split(' ').take(5).map(str::to_owned).collect();
        (fields.len() == 5).then_some(fields)
    };
    let mounts: Vec<_> = mountinfo.lines().filter_map(fields).collect();
    // A pivot that was cut short has left another on the root, and some of what was there on that.
    let roots: Vec<_> = mounts.iter().filter(|mount| mount[4] == "/").map(|mount| &mount[0]).collect();
    let on_root = mounts.iter().filter(|mount| roots.contains(&&mount[1]) && mount[4] != "/");
    if roots.is_empty() {
        return None;
    }
    let relative = |at: &str| unescape(at.trim_start_matches('/').as_bytes()).into_os_string().into_vec();
    on_root.map(|mount| CString::new(relative(&mount[4])).ok()).collect()
}

/// The upper directory of the overlay that is the root of process `pid`.
pub fn upper_of(pid: pid_t) -> io::Result<PathBuf> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let upper = parse_upper(&mounts);
    upper.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("process {pid} has no overlay as its root")))
}

fn parse_upper(mountinfo: &str) -> Option<PathBuf> {
    let root = mountinfo.lines().find(|line| line.split(' ').nth(4) == Some("/"))?;
    let options = root.rsplit(' ').next()?;
    let upper = options.split(',').find_map(|option| option.strip_prefix("upperdir="))?;
    Some(unescape(upper.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        90 89 0:40 / / rw,nodev - overlay overlay rw\n\
        91 90 0:41 / /proc rw - proc proc rw\n\
        92 91 0:41 /sys /proc/sys ro - proc proc rw\n\
        93 90 0:42 / /dev ro - tmpfs tmpfs rw\n\
        94 93 0:43 / /dev/pts rw - devpts devpts rw\n\
        95 90 0:44 / /opt/a\\040b ro - ext4 /dev/x rw\n";

    #[test]
    fn mounts_on_the_root_are_found_and_those_below_are_not() {
        let found = parse_submounts(MOUNTS).expect("a root");
        assert_eq!(found, [c"proc", c"dev", c"opt/a b"].map(CString::from));
    }

    #[test]
    fn what_a_pivot_that_was_cut_short_has_moved_is_found_too() {
        let mounts = MOUNTS.replace("93 90 0:42 / /dev", "99 90 0:50 / / rw - overlay overlay rw\n93 99 0:42 / /dev");
        assert_eq!(parse_submounts(&mounts).expect("a root"), [c"proc", c"dev", c"opt/a b"].map(CString::from));
    }

    #[test]
    fn the_upper_directory_is_an_option_of_the_root() {
        let mounts = MOUNTS.replace(
            "overlay overlay rw",
            "overlay overlay rw,lowerdir+=/a,upperdir=/s/la\\040yers/7/upper,workdir=/w",
        );
        assert_eq!(parse_upper(&mounts), Some(PathBuf::from("/s/la yers/7/upper")));
        assert_eq!(parse_upper(MOUNTS), None);
    }

    #[test]
    fn a_namespace_without_a_root_is_no_namespace() {
        assert_eq!(parse_submounts(""), None);
        assert_eq!(parse_submounts("nonsense\n\n1 2 3"), None);
    }
}
