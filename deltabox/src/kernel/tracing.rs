//! Probes of what stops and inspects processes: ptrace, filters, pidfds, descriptors' identity.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::ptrace;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt::TcpRepair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::Ground;
use super::probe::{ALARM_S, Failure, Outcome, ProbeChild, at, unless};
use crate::sys::process::{CloneRequest, pidfd_open};
use crate::sys::ptrace::{get_rseq_configuration, pidfd_getfd, same_description};
use crate::sys::seccomp::{deny_one, notification_sizes};
use crate::sys::steps::Step;

/// Stops a seized child. The wait cannot be polled; the child's alarm bounds it.
fn stop(child: &ProbeChild) -> Result<(), Failure> {
    ptrace::interrupt(child.pid()).map_err(at("PTRACE_INTERRUPT"))?;
    let status = waitpid(child.pid(), Some(WaitPidFlag::__WALL)).map_err(at("wait for the stop"))?;
    match status {
        WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => Ok(()),
        other => Err(Failure::NotProbed(format!("the seized child did not stop: {other:?}"))),
    }
}

/// A denied call of a seized child is let through, and denied again after the detach.
pub(super) fn suspend_seccomp(_: &Ground) -> Outcome {
    let number = u32::try_from(libc::SYS_getpriority).map_err(|error| Failure::NotProbed(error.to_string()))?;
    // An answer that getpriority itself never gives.
    let filter = deny_one(number, libc::EACCES);
    let steps = [
        Step::Alarm(ALARM_S),
        Step::NoNewPrivileges,
        Step::Filter(&filter),
        Step::GetPriority,
        Step::Wait,
        Step::GetPriority,
        Step::Wait,
        Step::GetPriority,
    ];
    let child = ProbeChild::start(CloneRequest::default(), &steps).map_err(at("clone3"))?;
    let denied = |child: &ProbeChild| child.next().is_err_and(|error| error.raw_os_error() == Some(libc::EACCES));
    child.next().map_err(at("alarm"))?;
    child.next().map_err(at("PR_SET_NO_NEW_PRIVS"))?;
    child.next().map_err(at("SECCOMP_SET_MODE_FILTER"))?;
    unless(denied(&child), "the filter does not deny")?;
    ptrace::seize(child.pid(), ptrace::Options::from_bits_retain(libc::PTRACE_O_SUSPEND_SECCOMP))
        .map_err(at("PTRACE_SEIZE with PTRACE_O_SUSPEND_SECCOMP"))?;
    child.go().map_err(at("answer of the seized child"))?;
    child.next().map_err(|error| Failure::Missing(format!("a denied call stays denied under suspension: {error}")))?;
    stop(&child)?;
    ptrace::detach(child.pid(), None).map_err(at("PTRACE_DETACH"))?;
    child.go().map_err(at("answer of the detached child"))?;
    unless(denied(&child), "the filter stays suspended after the detach")?;
    Ok("a denied call passes while suspended, is denied after the detach".to_owned())
}

/// A stopped child's rseq registration can be read.
pub(super) fn rseq_configuration(_: &Ground) -> Outcome {
    let steps = [Step::Alarm(ALARM_S), Step::Wait];
    let child = ProbeChild::start(CloneRequest::default(), &steps).map_err(at("clone3"))?;
    child.next().map_err(at("alarm"))?;
    ptrace::seize(child.pid(), ptrace::Options::empty()).map_err(at("PTRACE_SEIZE"))?;
    stop(&child)?;
    let found = get_rseq_configuration(child.pid().as_raw()).map_err(at("PTRACE_GET_RSEQ_CONFIGURATION"))?;
    Ok(match found.address {
        0 => "read; none is registered".to_owned(),
        _ => format!("read; {} bytes are registered", found.size_bytes),
    })
}

/// Filters can hand calls over to a supervisor.
pub(super) fn user_notification(_: &Ground) -> Outcome {
    let sizes = notification_sizes().map_err(at("SECCOMP_GET_NOTIF_SIZES"))?;
    unless(sizes.iter().all(|size| *size > 0), "SECCOMP_GET_NOTIF_SIZES gave zeroes")?;
    Ok(format!("notifications of {} bytes", sizes[0]))
}

/// A descriptor is taken out of a child through a pidfd, and is the same description as ours.
pub(super) fn pidfd(_: &Ground) -> Outcome {
    let ours = anonymous_file(MFdFlags::empty())?;
    let child = ProbeChild::start(CloneRequest::default(), &[Step::Wait]).map_err(at("clone3"))?;
    let pidfd = pidfd_open(child.pid().as_raw()).map_err(at("pidfd_open"))?;
    let taken = pidfd_getfd(pidfd.as_fd(), ours.as_raw_fd()).map_err(at("pidfd_getfd"))?;
    // Told without kcmp, which is a probe of its own: the offset is the description's.
    nix::unistd::lseek(&ours, 42, nix::unistd::Whence::SeekSet).map_err(at("lseek"))?;
    let offset = nix::unistd::lseek(&taken, 0, nix::unistd::Whence::SeekCur).map_err(at("lseek"))?;
    unless(offset == 42, "pidfd_getfd did not give the child's own description")?;
    Ok("pidfd_open, pidfd_getfd of a child's descriptor".to_owned())
}

/// Shared and separate descriptions of a child and ourselves are told apart.
pub(super) fn kcmp(_: &Ground) -> Outcome {
    let (shared, other) = (anonymous_file(MFdFlags::empty())?, anonymous_file(MFdFlags::empty())?);
    let child = ProbeChild::start(CloneRequest::default(), &[Step::Wait]).map_err(at("clone3"))?;
    let us = nix::unistd::getpid().as_raw();
    let compare = |ours: &OwnedFd| {
        same_description((us, ours.as_raw_fd()), (child.pid().as_raw(), shared.as_raw_fd())).map_err(at("kcmp"))
    };
    unless(compare(&shared)?, "kcmp does not know a shared description")?;
    unless(!compare(&other)?, "kcmp takes separate descriptions for one")?;
    Ok("shared and separate descriptions told apart".to_owned())
}

fn anonymous_file(flags: MFdFlags) -> Result<OwnedFd, Failure> {
    memfd_create(c"deltabox-doctor", flags | MFdFlags::MFD_CLOEXEC).map_err(at("memfd_create"))
}

/// A program in a memfd, a tiny one that exits with 42, is executed by descriptor.
#[cfg(target_arch = "x86_64")]
pub(super) fn exec_by_descriptor(_: &Ground) -> Outcome {
    // Without it vm.memfd_noexec may apply. Kernels before 6.3 do not know it and need no asking.
    let executable = MFdFlags::from_bits_retain(libc::MFD_EXEC);
    let file = anonymous_file(executable).or_else(|_| anonymous_file(MFdFlags::empty()))?;
    nix::unistd::write(&file, &tiny_program()).map_err(at("write a memfd"))?;
    let child = ProbeChild::start(CloneRequest::default(), &[Step::Exec(file.as_fd())]).map_err(at("clone3"))?;
    // The channel closes at the exec: an answer is a failure.
    match child.next() {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) && error.raw_os_error() != Some(libc::ECONNRESET) => {
            return Err(at("execveat of a memfd")(error));
        }
        _ => {}
    }
    let status = child.wait().map_err(at("wait for the executed program"))?;
    unless(matches!(status, WaitStatus::Exited(_, 42)), &format!("the executed program ended otherwise: {status:?}"))?;
    Ok("a program in a memfd ran".to_owned())
}

/// On other machines there is no tiny program to try it with.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn exec_by_descriptor(_: &Ground) -> Outcome {
    Err(Failure::NotProbed("only on x86_64".to_owned()))
}

/// A whole ELF file: header, one loadable segment, `exit(42)`.
#[cfg(target_arch = "x86_64")]
fn tiny_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS_BYTES: u64 = 64 + 56;
    // mov edi, 42; mov eax, 60 (exit); syscall
    let code = [0xbf, 42, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    let len_bytes = HEADERS_BYTES + code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    // e_type EXEC, e_machine X86_64, e_version; e_entry, e_phoff, e_shoff; e_flags
    half(&mut elf, 2);
    half(&mut elf, 62);
    word(&mut elf, 1);
    for value in [BASE + HEADERS_BYTES, 64, 0] {
        long(&mut elf, value);
    }
    word(&mut elf, 0);
    // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    for value in [64, 56, 1, 64, 0, 0] {
        half(&mut elf, value);
    }
    // p_type LOAD, p_flags R|X; p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    word(&mut elf, 1);
    word(&mut elf, 5);
    for value in [0, BASE, BASE, len_bytes, len_bytes, 0x1000] {
        long(&mut elf, value);
    }
    elf.extend(code);
    elf
}

/// A TCP socket can be put into repair mode.
pub(super) fn tcp_repair(_: &Ground) -> Outcome {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(at("socket"))?;
    setsockopt(&socket, TcpRepair, &1).map_err(at("setsockopt(TCP_REPAIR)"))?;
    Ok("a socket entered repair mode".to_owned())
}
