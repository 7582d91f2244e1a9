//! How the kernel schedules a thread, and its input and output: asked and told from outside.

use std::io;

use super::check;

/// The kernel's `struct sched_attr` in its first form, which has no utilization clamps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedulingAttributes {
    /// Set by the kernel or for it.
    pub size_bytes: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For the ordinary policies.
    pub nice: i32,
    /// For the real-time policies.
    pub priority: u32,
    /// For SCHED_DEADLINE; for ordinary policies the slice, since Linux 6.12. Nanoseconds.
    pub runtime_ns: u64,
    /// For SCHED_DEADLINE.
    pub deadline_ns: u64,
    /// For SCHED_DEADLINE.
    pub period_ns: u64,
}

const ATTRIBUTES_BYTES: u32 = 48;
const _: () = assert!(size_of::<SchedulingAttributes>() == 48, "SCHED_ATTR_SIZE_VER0");
/// IOPRIO_WHO_PROCESS: one thread.
const ONE_THREAD: libc::c_int = 1;

/// The policy of a thread and what belongs to it.
pub fn get_scheduling(tid: libc::pid_t) -> io::Result<SchedulingAttributes> {
    let mut attributes = SchedulingAttributes::default();
    // SAFETY: the kernel writes at most the size told.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, ATTRIBUTES_BYTES, 0) })?;
    Ok(attributes)
}

/// Sets them.
pub fn set_scheduling(tid: libc::pid_t, attributes: SchedulingAttributes) -> io::Result<()> {
    let attributes = SchedulingAttributes { size_bytes: ATTRIBUTES_BYTES, ..attributes };
    // SAFETY: the kernel reads the size that the structure tells, which is its own.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attributes, 0) }).map(drop)
}

/// Sets nothing but the nice value of a thread.
pub fn set_nice(tid: libc::pid_t, nice: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, tid, nice) }).map(drop)
}

/// The CPUs that a thread may run on, 64 to a word, without the words of zeros at the end.
pub fn get_affinity(tid: libc::pid_t) -> io::Result<Vec<u64>> {
    // More CPUs than any kernel is built for (8192).
    let mut words = [0_u64; 128];
    // SAFETY: the kernel writes at most the size told.
    let n_bytes =
        check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, size_of_val(&words), words.as_mut_ptr()) })?;
    let n_words = usize::try_from(n_bytes).unwrap_or(0).div_ceil(8).min(words.len());
    let used = words[..n_words].iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    Ok(words[..used].to_vec())
}

/// Sets them.
pub fn set_affinity(tid: libc::pid_t, words: &[u64]) -> io::Result<()> {
    // SAFETY: the kernel reads the size told.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, size_of_val(words), words.as_ptr()) }).map(drop)
}

/// The class and level of a thread's input and output.
pub fn get_io_priority(tid: libc::pid_t) -> io::Result<u32> {
    // SAFETY: no pointers.
    let priority = check(unsafe { libc::syscall(libc::SYS_ioprio_get, ONE_THREAD, tid) })?;
    u32::try_from(priority).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Sets it.
pub fn set_io_priority(tid: libc::pid_t, priority: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, ONE_THREAD, tid, priority) }).map(drop)
}
