//! Looking into other processes: what nix's ptrace lacks, copies of their descriptors, comparison of those.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{check, check_fd};

/// Where a thread's restartable-sequence area lies (the kernel's `struct ptrace_rseq_configuration`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address, 0 if the thread registered none.
    pub address: u64,
    /// Its size.
    pub size_bytes: u32,
    /// The signature before every abort handler.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}

/// The restartable-sequence registration of `thread`, a tracee of this OS thread that is stopped (since Linux 5.13).
pub fn get_rseq_configuration(thread: libc::pid_t) -> io::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    // SAFETY: the kernel writes at most the size told into `configuration`.
    check(unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            libc::PTRACE_GET_RSEQ_CONFIGURATION,
            thread,
            size_of::<RseqConfiguration>(),
            &raw mut configuration,
        )
    })?;
    Ok(configuration)
}

/// A copy of descriptor `number` of the process behind `pidfd`.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// Whether descriptor `a.1` of process `a.0` and `b.1` of `b.0` share one open file description.
pub fn same_description(a: (libc::pid_t, RawFd), b: (libc::pid_t, RawFd)) -> io::Result<bool> {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: no pointers.
    let order = check(unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, a.1, b.1) })?;
    Ok(order == 0)
}

/// Lets a stopped tracee run on, with `signal` (0 for none) in place of the one it stopped for.
///
/// nix's `cont` knows no real-time signals.
pub fn resume(thread: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers: the address is ignored, the data is a number.
    check(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_CONT, thread, 0, libc::c_long::from(signal)) })
        .map(drop)
}

/// The signals that a stopped tracee blocks, bit `n - 1` for signal `n`. In sigsuspend, ppoll, pselect and
/// epoll_pwait the mask that will hold after the call.
pub fn get_signal_mask(thread: libc::pid_t) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes the 8 bytes told.
    check(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_GETSIGMASK, thread, 8, &raw mut mask) })?;
    Ok(mask)
}

/// Sets the signals that a stopped tracee blocks (SIGKILL and SIGSTOP stay unblocked).
pub fn set_signal_mask(thread: libc::pid_t, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads the 8 bytes told.
    check(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_SETSIGMASK, thread, 8, &raw const mask) }).map(drop)
}

/// A stopped tracee's extended registers in the XSAVE standard format; the number of bytes filled.
pub fn get_xstate(thread: libc::pid_t, buffer: &mut [u8]) -> io::Result<usize> {
    const NT_X86_XSTATE: libc::c_long = 0x202;
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the kernel writes at most the buffer's length and sets the iovec's length to what it wrote.
    check(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_GETREGSET, thread, NT_X86_XSTATE, &raw mut part) })?;
    Ok(part.iov_len)
}

/// Sets a stopped tracee's extended registers: what [`get_xstate`] filled.
pub fn set_xstate(thread: libc::pid_t, state: &[u8]) -> io::Result<()> {
    const NT_X86_XSTATE: libc::c_long = 0x202;
    let part = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    // SAFETY: the kernel reads at most as many bytes as the iovec says, and judges them.
    check(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_SETREGSET, thread, NT_X86_XSTATE, &raw const part) })
        .map(drop)
}

/// Address and size of a thread's list of robust futexes.
pub fn get_robust_list(thread: libc::pid_t) -> io::Result<(u64, u64)> {
    let (mut head, mut len_bytes) = (0_u64, 0_u64);
    // SAFETY: the kernel writes one word to each.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, thread, &raw mut head, &raw mut len_bytes) })?;
    Ok((head, len_bytes))
}

/// A `siginfo_t`.
pub const SIGNAL_INFO_BYTES: usize = 128;

/// Which signals that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// For the process: any of its threads may take one.
    OfProcess,
    /// For one thread alone.
    OfThread,
}

/// The signals that wait for a stopped tracee, in their order, each a `siginfo_t`.
pub fn peek_signals(thread: libc::pid_t, pending: Pending) -> io::Result<Vec<Vec<u8>>> {
    const N_AT_ONCE: usize = 32;
    /// The kernel's `struct ptrace_peeksiginfo_args`.
    #[repr(C)]
    struct Args {
        offset: u64,
        flags: u32,
        n: i32,
    }
    let mut found = Vec::new();
    loop {
        let mut buffer = [0_u8; N_AT_ONCE * SIGNAL_INFO_BYTES];
        let flags = match pending {
            Pending::OfProcess => libc::PTRACE_PEEKSIGINFO_SHARED,
            Pending::OfThread => 0,
        };
        let args = Args { offset: found.len() as u64, flags, n: 32 };
        // SAFETY: the kernel writes at most the 32 entries asked for, each of the size told.
        let n = check(unsafe {
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKSIGINFO, thread, &raw const args, buffer.as_mut_ptr())
        })?;
        let n = usize::try_from(n).unwrap_or(0);
        found.extend(buffer.chunks_exact(SIGNAL_INFO_BYTES).take(n).map(<[u8]>::to_vec));
        if n < N_AT_ONCE {
            return Ok(found);
        }
    }
}

/// Waits for a tracee or child of this OS thread to stop or end; its raw status. Fails with EINTR at a signal, with
/// ECHILD if there is no such tracee (any more).
pub fn wait_thread(thread: libc::pid_t, flags: libc::c_int) -> io::Result<Option<libc::c_int>> {
    let mut status = 0;
    let flags = flags | libc::__WALL | libc::__WNOTHREAD;
    // SAFETY: `status` outlives the call.
    let found = check(unsafe { libc::waitpid(thread, &raw mut status, flags) }.into())?;
    Ok((found != 0).then_some(status))
}

/// Queues `signal` with `value` for one thread, as sigqueue(3) does for a process.
pub fn queue_signal(process: libc::pid_t, thread: libc::pid_t, signal: libc::c_int, value: u32) -> io::Result<()> {
    /// The kernel's `siginfo_t` as far as SI_QUEUE uses it.
    #[repr(C)]
    struct Queued {
        signo: libc::c_int,
        errno: libc::c_int,
        code: libc::c_int,
        pad: libc::c_int,
        pid: libc::pid_t,
        uid: libc::uid_t,
        value: u64,
        rest: [u64; 12],
    }
    const _: () = assert!(size_of::<Queued>() == 128, "siginfo_t has 128 bytes");
    let info = Queued {
        signo: signal,
        errno: 0,
        code: libc::SI_QUEUE,
        pad: 0,
        pid: 0,
        uid: 0,
        value: value.into(),
        rest: [0; 12],
    };
    // SAFETY: `info` is a whole siginfo_t.
    check(unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, signal, &raw const info) }).map(drop)
}

/// Gives `signal` a handler that only interrupts a blocking call of the thread it is sent to. PTRACE_SEIZE too fails with
/// EINTR then, which the kernel would make again for ever (ERESTARTNOINTR) while the thread to be seized belongs to a
/// process that executes a program and waits for the end of threads that are traced.
#[cfg(target_arch = "x86_64")]
pub fn handle_by_interruption(signal: nix::sys::signal::Signal) -> io::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        const SYSCALL: [u8; 2] = [0x0f, 0x05];
        // REG_RDI, REG_RAX and REG_RIP of ucontext.h.
        const RDI: usize = 8;
        const RAX: usize = 13;
        const RIP: usize = 16;
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel passes a ucontext_t to a handler with SA_SIGINFO; it is this handler's alone.
        let registers = unsafe { &mut (*context).uc_mcontext.gregs };
        if registers[RAX] != libc::SYS_ptrace || registers[RDI] != i64::from(libc::PTRACE_SEIZE) {
            return;
        }
        let Ok(rip) = usize::try_from(registers[RIP]) else { return };
        let code = std::ptr::with_exposed_provenance::<[u8; 2]>(rip);
        // SAFETY: the thread is about to execute what lies there. With a number of a system call in rax it is one, or the
        // two bytes are those of another instruction of the C library's code, which goes on behind them.
        let code = unsafe { code.read_unaligned() };
        if code == SYSCALL {
            registers[RIP] += 2;
            registers[RAX] = -i64::from(libc::EINTR);
        }
    }
    let action = SigAction::new(SigHandler::SigAction(interrupt), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler reads and writes only what the kernel put on its stack, and reads code.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// Reaps a tracee of this OS thread if it has ended; a stop stays to be waited for.
pub fn reap_if_ended(thread: libc::pid_t) {
    let Ok(id) = libc::id_t::try_from(thread) else { return };
    let flags = libc::WEXITED | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
    // Stops of tracees are told though nobody asks for them, and would be taken without WNOWAIT.
    for flags in [flags | libc::WNOWAIT, flags] {
        // SAFETY: all zeros are a siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` outlives the call.
        let done = unsafe { libc::waitid(libc::P_PID, id, &raw mut info, flags) };
        if done < 0 || !matches!(info.si_code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
            return;
        }
    }
}
