//! From the engine's descriptors to a sandbox: mounts, masks, network, limits, capabilities, filter.
//!
//! The order matters: proc and sysfs can only be made while a full one is in view (before the pivot), sysctls
//! are opened before /proc/sys turns read-only and set after the last mount, and the filter comes last because it
//! forbids the rest.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use deltabox_common::init::Boot;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};

use crate::everyone::Everyone;
use crate::numbers::Numbers;
use crate::sys;
use crate::sys::mount::{self, Clone, attr};

/// A step of the set-up that the kernel refused.
pub(crate) struct Failed {
    pub(crate) step: String,
    pub(crate) source: io::Error,
}

/// Names the step of an error.
trait Step<T> {
    fn step(self, step: &str) -> Result<T, Failed>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &str) -> Result<T, Failed> {
        self.map_err(|error| Failed { step: step.to_owned(), source: error.into() })
    }
}

const PSEUDO: u64 = attr::NOSUID | attr::NODEV | attr::NOEXEC;

/// Kernel files that tell about, or steer, more than the sandbox: covered by /dev/null.
const MASKED_FILES: [&str; 7] = [
    "proc/kcore",
    "proc/keys",
    "proc/sysrq-trigger",
    "proc/timer_list",
    "proc/sched_debug",
    "proc/latency_stats",
    "proc/kallsyms",
];
/// The same for directories: covered by an empty one.
const MASKED_DIRS: [&str; 4] = ["proc/acpi", "proc/scsi", "sys/firmware", "sys/kernel/debug"];
/// Visible, but not to be written by the sandbox's root.
const READ_ONLY: [&str; 4] = ["proc/sys", "proc/bus", "proc/fs", "proc/irq"];

/// What init keeps of the set-up.
pub(crate) struct Booted {
    pub(crate) numbers: Numbers,
    pub(crate) everyone: Everyone,
}

/// Sets the sandbox up. Descriptors as [`deltabox_common::init::ToInit::Boot`] says.
pub(crate) fn boot(boot: &Boot, fds: Vec<OwnedFd>) -> Result<Booted, Failed> {
    let mut fds = fds.into_iter();
    let mut take = |what| fds.next().ok_or(io::Error::from_raw_os_error(libc::EBADF)).step(what);
    let root = take("root mount")?;
    let dev = take("/dev mount")?;
    let host_sys = if boot.host_net { Some(take("/sys mount")?) } else { None };

    // Only now, so that its root is the cgroup that this process was born into.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP).step("new cgroup namespace")?;
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .step("private mounts")?;
    let proc = pseudo(c"proc", PSEUDO, &[]).step("mount proc")?;
    let sysfs = match host_sys {
        Some(mount) => mount,
        None => pseudo(c"sysfs", PSEUDO | attr::RDONLY, &[]).step("mount sysfs")?,
    };
    let pts_options = [(c"ptmxmode", c"0666"), (c"mode", c"620"), (c"gid", c"5"), (c"max", c"512")];
    let pts = pseudo(c"devpts", attr::NOSUID | attr::NOEXEC, &pts_options).step("mount devpts")?;
    let mqueue = pseudo(c"mqueue", PSEUDO, &[]).step("mount mqueue")?;

    let anywhere = open_path(c"/proc").step("open /proc")?;
    mount::move_mount(root.as_fd(), anywhere.as_fd(), c"").step("attach root")?;
    let at = root.as_fd();
    mount::move_mount(proc.as_fd(), at, c"proc").step("attach /proc")?;
    mount::move_mount(sysfs.as_fd(), at, c"sys").step("attach /sys")?;
    mount::move_mount(dev.as_fd(), at, c"dev").step("attach /dev")?;
    mount::move_mount(pts.as_fd(), dev.as_fd(), c"pts").step("attach /dev/pts")?;
    mount::move_mount(mqueue.as_fd(), dev.as_fd(), c"mqueue").step("attach /dev/mqueue")?;
    for path in &boot.binds {
        let bind = take(path)?;
        attach_bind(bind.as_fd(), at, path)?;
    }

    nix::unistd::fchdir(at).step("enter root")?;
    nix::unistd::pivot_root(".", ".").step("pivot_root")?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).step("drop the host's root")?;
    nix::unistd::chdir("/").step("chdir /")?;

    let sysctls = Sysctls::open(boot)?;
    cover()?;
    let numbers = sysctls.set()?;
    nix::unistd::sethostname(&boot.hostname).step("set the hostname")?;
    if !boot.host_net {
        raise_loopback().step("raise loopback")?;
    }
    trim_capabilities(boot.caps)?;
    limit_queues().step("limit queues")?;
    let listener = sys::set_filter(&boot.filter).step("install the system call filter")?;
    Ok(Booted { numbers, everyone: Everyone::new(listener, boot.pid_max) })
}

fn open_path(path: &std::ffi::CStr) -> nix::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
}

fn pseudo(fstype: &std::ffi::CStr, attrs: u64, options: &[(&std::ffi::CStr, &std::ffi::CStr)]) -> io::Result<OwnedFd> {
    let fs = mount::fsopen(fstype)?;
    for (key, value) in options {
        mount::fsconfig_string(fs.as_fd(), key, value)?;
    }
    mount::fsconfig_create(fs.as_fd())?;
    mount::fsmount(fs.as_fd(), attrs)
}

/// `path` is absolute and names a directory that the base has.
fn attach_bind(bind: BorrowedFd<'_>, root: BorrowedFd<'_>, path: &str) -> Result<(), Failed> {
    let relative = CString::new(path.trim_start_matches('/')).map_err(io::Error::from).step(path)?;
    mount::move_mount(bind, root, &relative).step(path)
}

/// Opened while /proc/sys can be written, set once all mounts are made.
struct Sysctls {
    limits: Vec<(String, u32, fs::File)>,
    pid_max: fs::File,
    last_pid: fs::File,
    highest: u32,
}

impl Sysctls {
    fn open(boot: &Boot) -> Result<Self, Failed> {
        // The first two: a second barrier behind the filter, no namespaces can be nested even if a call slipped through.
        // `max_mnt_namespaces` also counts the anonymous namespaces of fsmount and open_tree (ENOSPC, Linux 6.18).
        // Instances of inotify are also charged to the host's root, of whose 128 no single user inside takes all.
        let wanted =
            [("user/max_user_namespaces", 0), ("user/max_mnt_namespaces", 0), ("user/max_inotify_instances", 100)];
        let open = |name: &str| {
            let path = format!("/proc/sys/{name}");
            let file = fs::File::options().read(true).write(true).open(&path).step(&path)?;
            Ok((path, file))
        };
        let limits = wanted.map(|(name, value)| open(name).map(|(path, file)| (path, value, file)));
        let limits = limits.into_iter().collect::<Result<_, _>>()?;
        // pid_max is per PID namespace since Linux 6.14; before, the file is the host's and not ours to write.
        let (_, pid_max) = open("kernel/pid_max")?;
        let (_, last_pid) = open("kernel/ns_last_pid")?;
        Ok(Self { limits, pid_max, last_pid, highest: boot.pid_max })
    }

    fn set(self) -> Result<Numbers, Failed> {
        for (path, value, mut file) in self.limits {
            file.write_all(value.to_string().as_bytes()).step(&path)?;
        }
        Numbers::new(self.pid_max, self.last_pid, self.highest).step("set pid_max")
    }
}

fn cover() -> Result<(), Failed> {
    let cwd = open_path(c"/").step("open /")?;
    let root = cwd.as_fd();
    let empty = pseudo(c"tmpfs", PSEUDO | attr::RDONLY, &[(c"mode", c"555")]).step("mount tmpfs")?;
    for path in MASKED_FILES {
        cover_with(root, path, || mount::open_tree_clone(root, c"dev/null", Clone::One))?;
    }
    for path in MASKED_DIRS {
        cover_with(root, path, || mount::open_tree_clone(empty.as_fd(), c"", Clone::One))?;
    }
    for path in READ_ONLY {
        cover_with(root, path, || {
            let at = CString::new(path)?;
            let copy = mount::open_tree_clone(root, &at, Clone::One)?;
            mount::mount_setattr(copy.as_fd(), attr::RDONLY, 0, None, Clone::One)?;
            Ok(copy)
        })?;
    }
    Ok(())
}

/// Not every kernel has every file: what does not exist needs no cover.
fn cover_with(root: BorrowedFd<'_>, path: &str, cover: impl FnOnce() -> io::Result<OwnedFd>) -> Result<(), Failed> {
    if !fs::exists(format!("/{path}")).step(path)? {
        return Ok(());
    }
    let at = CString::new(path).map_err(io::Error::from).step(path)?;
    let cover = cover().step(path)?;
    mount::move_mount(cover.as_fd(), root, &at).step(path)
}

fn raise_loopback() -> io::Result<()> {
    // Not std's: that brings the resolver, and with it half of the C library, into a program that wants to be small.
    let socket = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::loopback_up(socket.as_fd())
}

/// What the kernel charges to the user who made the namespace, the host's root, beyond this one. Hard limits: nobody
/// inside can raise them.
fn limit_queues() -> io::Result<()> {
    for (resource, most) in [(Resource::RLIMIT_SIGPENDING, 16_384), (Resource::RLIMIT_MSGQUEUE, 409_600)] {
        let (_, hard) = getrlimit(resource)?;
        let limit = hard.min(most);
        setrlimit(resource, limit, limit)?;
    }
    Ok(())
}

/// Only the bounding set shrinks: commands lose the rest at exec. Init itself keeps all, so that no process
/// inside has as many as it and none can trace it or look into it (cap_ptrace_access_check).
fn trim_capabilities((low, high): (u32, u32)) -> Result<(), Failed> {
    let keep = u64::from(low) | u64::from(high) << 32;
    for number in 0..64 {
        if keep & (1 << number) != 0 {
            continue;
        }
        match sys::drop_bounding_capability(number) {
            // The first number that this kernel does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            other => other.step("drop capabilities")?,
        }
    }
    sys::clear_ambient_capabilities().step("clear ambient capabilities")
}
