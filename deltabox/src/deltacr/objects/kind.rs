//! What a descriptor is, by its link in `/proc/PID/fd` and its fdinfo. Pure.

use serde::{Deserialize, Serialize};

/// What is behind a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    /// A file with a name, or one that had a name: which it is, its mount tells. POSIX message queues look the same.
    File,
    /// A pipe without a name. (A FIFO is a `File`.)
    Pipe,
    /// Any socket.
    Socket,
    /// eventfd(2).
    Eventfd,
    /// timerfd_create(2).
    Timerfd,
    /// signalfd(2).
    Signalfd,
    /// epoll(7).
    Epoll,
    /// memfd_create(2). A file `/memfd:x (deleted)` looks the same; it is on a mount of the sandbox.
    Memfd,
    /// pidfd_open(2).
    Pidfd,
    /// `/dev/ptmx`: the side of a terminal that shows and types.
    TerminalMaster,
    /// `/dev/pts/N`: the side that programs use.
    Terminal,
    /// A terminal opened as `/dev/tty`.
    ControllingTerminal,
    /// A terminal whose master is closed.
    DeadTerminal,
    /// inotify(7).
    Inotify,
    /// fanotify(7).
    Fanotify,
    /// io_uring(7).
    IoUring,
    /// userfaultfd(2).
    Userfaultfd,
    /// perf_event_open(2).
    PerfEvent,
    /// A map, program, link, iterator or type information of bpf(2).
    Bpf,
    /// What a seccomp filter asks (SECCOMP_FILTER_FLAG_NEW_LISTENER).
    SeccompListener,
    /// landlock(7).
    Landlock,
    /// A namespace.
    Namespace,
    /// fsopen(2).
    MountContext,
    /// memfd_secret(2).
    SecretMemory,
    /// `/dev/kvm`, a virtual machine or a part of it.
    Kvm,
    /// `/dev/dri/*`, or another device of a graphics driver.
    Graphics,
    /// A buffer or fence shared between devices.
    DeviceBuffer,
    /// `/dev/fuse`.
    Fuse,
    /// `/dev/net/tun`.
    Tun,
    /// Any other device node.
    Device,
    /// A kind that is not known here.
    Unknown,
}

/// Devices that have no state: opening them again is all.
const PLAIN_DEVICES: [&[u8]; 5] = [b"null", b"zero", b"full", b"random", b"urandom"];

/// By the name between `anon_inode:` and the end. Some have brackets, some have not.
const ANONYMOUS: [(&[u8], ObjectKind); 17] = [
    (b"[eventfd]", ObjectKind::Eventfd),
    (b"[timerfd]", ObjectKind::Timerfd),
    (b"[signalfd]", ObjectKind::Signalfd),
    (b"[eventpoll]", ObjectKind::Epoll),
    (b"[pidfd]", ObjectKind::Pidfd),
    (b"inotify", ObjectKind::Inotify),
    (b"[fanotify]", ObjectKind::Fanotify),
    (b"[io_uring]", ObjectKind::IoUring),
    (b"[userfaultfd]", ObjectKind::Userfaultfd),
    (b"[perf_event]", ObjectKind::PerfEvent),
    (b"bpf", ObjectKind::Bpf),
    (b"btf", ObjectKind::Bpf),
    (b"seccomp notify", ObjectKind::SeccompListener),
    (b"[landlock", ObjectKind::Landlock),
    (b"[fscontext]", ObjectKind::MountContext),
    (b"kvm-", ObjectKind::Kvm),
    (b"[kvm-", ObjectKind::Kvm),
];

/// By the beginning of the link.
const OTHERS: [(&[u8], ObjectKind); 16] = [
    (b"pipe:[", ObjectKind::Pipe),
    (b"socket:[", ObjectKind::Socket),
    // Since Linux 6.9.
    (b"pidfd:[", ObjectKind::Pidfd),
    (b"anon_inode:sync_file", ObjectKind::DeviceBuffer),
    (b"anon_inode:dmabuf", ObjectKind::DeviceBuffer),
    (b"cgroup:[", ObjectKind::Namespace),
    (b"ipc:[", ObjectKind::Namespace),
    (b"mnt:[", ObjectKind::Namespace),
    (b"net:[", ObjectKind::Namespace),
    (b"pid:[", ObjectKind::Namespace),
    (b"pid_for_children:[", ObjectKind::Namespace),
    (b"time:[", ObjectKind::Namespace),
    (b"time_for_children:[", ObjectKind::Namespace),
    (b"user:[", ObjectKind::Namespace),
    (b"uts:[", ObjectKind::Namespace),
    (b"anon_inode:[dmabuf]", ObjectKind::DeviceBuffer),
];

/// What a descriptor is. `fdinfo` may be empty: then masters of terminals are known by their usual path only.
pub fn kind_of(link: &[u8], fdinfo: &str) -> ObjectKind {
    let has = |key: &str| fdinfo.lines().any(|line| line.starts_with(key));
    if link.starts_with(b"/") {
        return match () {
            () if has("tty-index:") => ObjectKind::TerminalMaster,
            () if has("drm-driver:") => ObjectKind::Graphics,
            () => with_path(link),
        };
    }
    if let Some(name) = link.strip_prefix(b"anon_inode:")
        && let Some((_, kind)) = ANONYMOUS.iter().find(|(start, _)| name.starts_with(start))
    {
        return *kind;
    }
    let other = OTHERS.iter().find(|(start, _)| link.starts_with(start));
    other.map_or(ObjectKind::Unknown, |(_, kind)| *kind)
}

fn with_path(link: &[u8]) -> ObjectKind {
    let (path, is_deleted) = match link.strip_suffix(b" (deleted)") {
        Some(path) => (path, true),
        None => (link, false),
    };
    if is_deleted && path.starts_with(b"/memfd:") {
        return ObjectKind::Memfd;
    }
    if is_deleted && path == b"/secretmem" || path == b"/[secretmem]" {
        return ObjectKind::SecretMemory;
    }
    if path.starts_with(b"/dmabuf:") {
        return ObjectKind::DeviceBuffer;
    }
    let Some(device) = path.strip_prefix(b"/dev/") else { return ObjectKind::File };
    let is_number = |digits: &[u8]| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    match device {
        b"ptmx" | b"pts/ptmx" => ObjectKind::TerminalMaster,
        b"tty" => ObjectKind::ControllingTerminal,
        b"kvm" => ObjectKind::Kvm,
        b"fuse" => ObjectKind::Fuse,
        b"net/tun" => ObjectKind::Tun,
        _ if device.strip_prefix(b"pts/").is_some_and(is_number) => {
            if is_deleted {
                ObjectKind::DeadTerminal
            } else {
                ObjectKind::Terminal
            }
        }
        _ if device.starts_with(b"dri/") => ObjectKind::Graphics,
        _ if device.starts_with(b"shm/") || device.starts_with(b"mqueue/") => ObjectKind::File,
        // Directories.
        b"pts" | b"shm" | b"mqueue" => ObjectKind::File,
        _ if PLAIN_DEVICES.contains(&device) => ObjectKind::File,
        _ => ObjectKind::Device,
    }
}

impl ObjectKind {
    /// What a human calls it, with its article.
    pub fn word(self) -> &'static str {
        match self {
            Self::File => "a file",
            Self::Pipe => "a pipe",
            Self::Socket => "a socket",
            Self::Eventfd => "an eventfd",
            Self::Timerfd => "a timer",
            Self::Signalfd => "a signalfd",
            Self::Epoll => "an epoll instance",
            Self::Memfd => "a memfd",
            Self::Pidfd => "a pidfd",
            Self::TerminalMaster => "the master of a terminal",
            Self::Terminal => "a terminal",
            Self::ControllingTerminal => "its controlling terminal",
            Self::DeadTerminal => "a terminal that was hung up",
            Self::Inotify => "an inotify instance",
            Self::Fanotify => "a fanotify group",
            Self::IoUring => "an io_uring instance",
            Self::Userfaultfd => "a userfaultfd",
            Self::PerfEvent => "a performance counter",
            Self::Bpf => "a BPF object",
            Self::SeccompListener => "the listener of a seccomp filter",
            Self::Landlock => "a Landlock rule set",
            Self::Namespace => "a namespace",
            Self::MountContext => "a mount in the making",
            Self::SecretMemory => "secret memory",
            Self::Kvm => "a virtual machine",
            Self::Graphics => "a graphics device",
            Self::DeviceBuffer => "a buffer of a device",
            Self::Fuse => "a FUSE connection",
            Self::Tun => "a network tunnel",
            Self::Device => "a device",
            Self::Unknown => "something unknown",
        }
    }

    /// Whether this module has a record for it.
    pub fn is_object(self) -> bool {
        match self {
            Self::Pipe
            | Self::Eventfd
            | Self::Timerfd
            | Self::Signalfd
            | Self::Epoll
            | Self::Memfd
            | Self::Pidfd
            | Self::TerminalMaster
            | Self::Terminal
            | Self::ControllingTerminal
            | Self::DeadTerminal => true,
            Self::File
            | Self::Socket
            | Self::Inotify
            | Self::Fanotify
            | Self::IoUring
            | Self::Userfaultfd
            | Self::PerfEvent
            | Self::Bpf
            | Self::SeccompListener
            | Self::Landlock
            | Self::Namespace
            | Self::MountContext
            | Self::SecretMemory
            | Self::Kvm
            | Self::Graphics
            | Self::DeviceBuffer
            | Self::Fuse
            | Self::Tun
            | Self::Device
            | Self::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
    use std::os::unix::ffi::OsStrExt;

    use super::*;
    use crate::deltacr::objects::ObjectRefusal;
    use crate::deltacr::objects::own_fdinfo;

    #[test]
    fn every_link_has_its_kind() {
        let table: &[(&[u8], &str, ObjectKind)] = &[
            (b"/etc/passwd", "", ObjectKind::File),
            (b"/memfd", "", ObjectKind::File),
            (b"/memfd:x", "", ObjectKind::File),
            (b"/memfd:x (deleted)", "", ObjectKind::Memfd),
            (b"/memfd: (deleted)", "", ObjectKind::Memfd),
            (b"/memfd:a\nb (deleted) (deleted)", "", ObjectKind::Memfd),
            (b"/secretmem (deleted)", "", ObjectKind::SecretMemory),
            (b"/dev/null", "", ObjectKind::File),
            (b"/dev/shm/x", "", ObjectKind::File),
            (b"/dev/mqueue/x", "", ObjectKind::File),
            (b"/dev/ptmx", "pos:\t0\ntty-index:\t3\n", ObjectKind::TerminalMaster),
            (b"/elsewhere/ptmx", "pos:\t0\ntty-index:\t3\n", ObjectKind::TerminalMaster),
            (b"/elsewhere/ptmx", "pos:\t0\n", ObjectKind::File),
            (b"/dev/pts/ptmx", "", ObjectKind::TerminalMaster),
            (b"/dev/pts/12", "", ObjectKind::Terminal),
            (b"/dev/pts/12 (deleted)", "", ObjectKind::DeadTerminal),
            (b"/dev/pts/", "", ObjectKind::Device),
            (b"/dev/tty", "", ObjectKind::ControllingTerminal),
            (b"/dev/tty1", "", ObjectKind::Device),
            (b"/dev/kvm", "", ObjectKind::Kvm),
            (b"/dev/dri/renderD128", "", ObjectKind::Graphics),
            (b"/dev/nvidia0", "drm-driver:\tnvidia\n", ObjectKind::Graphics),
            (b"/dev/fuse", "", ObjectKind::Fuse),
            (b"/dev/net/tun", "", ObjectKind::Tun),
            (b"/dev/loop0", "", ObjectKind::Device),
            (b"pipe:[17]", "", ObjectKind::Pipe),
            (b"socket:[17]", "", ObjectKind::Socket),
            (b"pidfd:[17]", "", ObjectKind::Pidfd),
            (b"anon_inode:[pidfd]", "", ObjectKind::Pidfd),
            (b"anon_inode:[eventfd]", "", ObjectKind::Eventfd),
            (b"anon_inode:[timerfd]", "", ObjectKind::Timerfd),
            (b"anon_inode:[signalfd]", "", ObjectKind::Signalfd),
            (b"anon_inode:[eventpoll]", "", ObjectKind::Epoll),
            (b"anon_inode:inotify", "", ObjectKind::Inotify),
            (b"anon_inode:[fanotify]", "", ObjectKind::Fanotify),
            (b"anon_inode:[io_uring]", "", ObjectKind::IoUring),
            (b"anon_inode:[userfaultfd]", "", ObjectKind::Userfaultfd),
            (b"anon_inode:[perf_event]", "", ObjectKind::PerfEvent),
            (b"anon_inode:bpf-map", "", ObjectKind::Bpf),
            (b"anon_inode:bpf-prog", "", ObjectKind::Bpf),
            (b"anon_inode:bpf_link", "", ObjectKind::Bpf),
            (b"anon_inode:btf", "", ObjectKind::Bpf),
            (b"anon_inode:seccomp notify", "", ObjectKind::SeccompListener),
            (b"anon_inode:[landlock-ruleset]", "", ObjectKind::Landlock),
            (b"anon_inode:[fscontext]", "", ObjectKind::MountContext),
            (b"anon_inode:kvm-vm", "", ObjectKind::Kvm),
            (b"anon_inode:kvm-vcpu:0", "", ObjectKind::Kvm),
            (b"anon_inode:[kvm-gmem]", "", ObjectKind::Kvm),
            (b"anon_inode:sync_file", "", ObjectKind::DeviceBuffer),
            (b"/dmabuf:", "", ObjectKind::DeviceBuffer),
            (b"net:[4026531840]", "", ObjectKind::Namespace),
            (b"pid_for_children:[4026531836]", "", ObjectKind::Namespace),
            (b"anon_inode:[of tomorrow]", "", ObjectKind::Unknown),
            (b"", "", ObjectKind::Unknown),
        ];
        for (link, fdinfo, kind) in table {
            assert_eq!(kind_of(link, fdinfo), *kind, "{}", String::from_utf8_lossy(link));
        }
    }

    fn asked(fd: BorrowedFd<'_>) -> ObjectKind {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        kind_of(link.as_os_str().as_bytes(), &own_fdinfo(fd).unwrap())
    }

    #[test]
    fn the_running_kernel_calls_things_so() {
        use nix::sys::{epoll, eventfd, inotify, memfd};
        let (read, _write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        assert_eq!(asked(read.as_fd()), ObjectKind::Pipe);
        assert_eq!(asked(eventfd::EventFd::new().unwrap().as_fd()), ObjectKind::Eventfd);
        assert_eq!(asked(crate::sys::timer::create(libc::CLOCK_MONOTONIC).unwrap().as_fd()), ObjectKind::Timerfd);
        assert_eq!(asked(crate::sys::notify::signalfd(0).unwrap().as_fd()), ObjectKind::Signalfd);
        let instance = epoll::Epoll::new(epoll::EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        assert_eq!(asked(instance.0.as_fd()), ObjectKind::Epoll);
        let memory = memfd::memfd_create(c"x y", memfd::MFdFlags::empty()).unwrap();
        assert_eq!(asked(memory.as_fd()), ObjectKind::Memfd);
        let own = crate::sys::process::pidfd_open(nix::unistd::getpid().as_raw()).unwrap();
        assert_eq!(asked(own.as_fd()), ObjectKind::Pidfd);
        let watcher = inotify::Inotify::init(inotify::InitFlags::IN_CLOEXEC).unwrap();
        assert_eq!(asked(OwnedFd::from(watcher).as_fd()), ObjectKind::Inotify);
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(asked(a.as_fd()), ObjectKind::Socket);
        let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        assert_eq!(asked(master.as_fd()), ObjectKind::TerminalMaster);
        assert_eq!(asked(std::fs::File::open("/proc/self/ns/net").unwrap().as_fd()), ObjectKind::Namespace);
        assert_eq!(asked(tempfile::tempfile().unwrap().as_fd()), ObjectKind::File);
    }

    #[test]
    fn a_refusal_says_what_it_is_about() {
        let kind = kind_of(b"anon_inode:[io_uring]", "");
        assert!(!kind.is_object());
        let text = ObjectRefusal::Kind { pid: 7, number: 5, kind }.to_string();
        assert_eq!(text, "process 7 has descriptor 5, an io_uring instance, which cannot be held");
    }
}
