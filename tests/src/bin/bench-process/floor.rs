//! Floors: what the kernel alone asks for the same. Fork of the same process, its copy's end, a copy of the written pages.
//!
//! ```text
//! seize, interrupt    the process's first thread
//! clone               its registers point at `syscall` in the vdso; a stop tells when the copy is there    <- clock
//! kill, wait          the copy                                                                             <- clock
//! wait4               by the process itself: nothing is left; registers as they were; detach
//! ```

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::libc;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// One fork of a process, and the end of what it made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Forked {
    pub(crate) fork: Duration,
    pub(crate) kill: Duration,
}

/// Measures them; the process goes on as if nothing had happened.
pub(crate) fn fork(pid: i32) -> anyhow::Result<Forked> {
    // A thread of its own: it takes a CPU, and its end lets everything go, whatever failed.
    let measured = std::thread::spawn(move || fork_here(Pid::from_raw(pid))).join();
    measured.unwrap_or_else(|_| bail!("measuring a fork panicked"))
}

fn fork_here(pid: Pid) -> anyhow::Result<Forked> {
    let gadget = find_syscall(pid)?;
    // A stop across CPUs is most of what would be measured.
    let mut cpus = CpuSet::new();
    cpus.set(cpu_of(pid)?)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("go to the process's CPU")?;
    ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACECLONE).context("seize")?;
    ptrace::interrupt(pid)?;
    await_stop(pid)?;
    let saved = ptrace::getregs(pid)?;
    let mut regs = saved;
    (regs.rip, regs.orig_rax) = (gadget, u64::MAX);
    // No flags, no signal at its end: a copy that nobody in there learns of.
    (regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8) = (56, 0, 0, 0, 0, 0);
    ptrace::setregs(pid, regs)?;
    let begun = Instant::now();
    ptrace::cont(pid, None)?;
    let status = await_stop(pid)?;
    let forked = begun.elapsed();
    ensure!(matches!(status, WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_CLONE)), "clone: {status:?}");
    let copy = Pid::from_raw(i32::try_from(ptrace::getevent(pid)?)?);
    await_stop(copy)?;
    let begun = Instant::now();
    kill(copy, Signal::SIGKILL)?;
    while !matches!(waitpid(copy, Some(WaitPidFlag::__WALL))?, WaitStatus::Signaled(..)) {}
    let killed = begun.elapsed();
    // The end of clone, then wait4 of the copy.
    ptrace::step(pid, None)?;
    await_stop(pid)?;
    let inside = ptrace::getregs(pid)?.rax;
    (regs.rax, regs.rdi, regs.rsi, regs.rdx) = (61, inside, 0, libc::__WALL.cast_unsigned().into());
    ptrace::setregs(pid, regs)?;
    ptrace::step(pid, None)?;
    await_stop(pid)?;
    let reaped = ptrace::getregs(pid)?.rax;
    ptrace::setregs(pid, saved)?;
    ptrace::detach(pid, None)?;
    ensure!(reaped == inside, "wait4({inside}) gave {reaped:#x}");
    Ok(Forked { fork: forked, kill: killed })
}

fn await_stop(pid: Pid) -> anyhow::Result<WaitStatus> {
    Ok(waitpid(pid, Some(WaitPidFlag::__WALL))?)
}

/// An instruction `syscall` in the vdso.
fn find_syscall(pid: Pid) -> anyhow::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).context("it has no vdso")?;
    let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).context("a range")?;
    let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
    let mut code = vec![0; usize::try_from(end - start)?];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut code, start)?;
    let at = code.windows(2).position(|pair| pair == [0x0f, 0x05]).context("no syscall in its vdso")?;
    Ok(start + at as u64)
}

/// Where it ran last.
fn cpu_of(pid: Pid) -> anyhow::Result<usize> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(')').context("a name")?.1;
    // Field 39 of proc_pid_stat(5); the third is the first here.
    Ok(rest.split_whitespace().nth(36).context("39 fields")?.parse()?)
}

/// Memory for copies of as many pages as are written, there already.
pub(crate) struct Copy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copy {
    pub(crate) fn of(n_pages: u64) -> anyhow::Result<Self> {
        let len = usize::try_from(n_pages * 4096)?;
        Ok(Self { from: vec![1; len], to: vec![2; len] })
    }

    pub(crate) fn measure(&mut self) -> Duration {
        let begun = Instant::now();
        self.to.copy_from_slice(std::hint::black_box(&self.from));
        std::hint::black_box(&self.to);
        begun.elapsed()
    }
}
