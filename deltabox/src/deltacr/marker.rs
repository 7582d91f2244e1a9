//! The signal that tells the engine that a batch is done. Pure.

use super::tasks;

/// A signal that has no effect on the process, so that an orphan can receive it, and is not pending for the thread.
pub(super) fn choose_marker(stat: &tasks::Stat) -> Option<i32> {
    const IGNORED_BY_DEFAULT: [i32; 2] = [libc::SIGURG, libc::SIGWINCH];
    // Signals 1 to 31 but those that faults send and that stop, continue or kill, or that say something of children.
    const NEVER: [i32; 14] = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGCONT,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
        libc::SIGCHLD,
        libc::SIGABRT,
    ];
    let is_in = |set: u64, signal: i32| set & (1 << (signal - 1)) != 0;
    let harmless = IGNORED_BY_DEFAULT.into_iter().filter(|signal| !is_in(stat.caught, *signal));
    let ignored = (1..32).filter(|signal| is_in(stat.ignored, *signal) && !NEVER.contains(signal));
    harmless.chain(ignored).find(|signal| !is_in(stat.pending, *signal))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn set(signals: &[i32]) -> u64 {
        let mut set = 0;
        let mut at = 0;
        while at < signals.len() {
            set |= 1 << (signals[at] - 1);
            at += 1;
        }
        set
    }

    fn marker(pending: u64, ignored: u64, caught: u64) -> Option<i32> {
        choose_marker(&tasks::Stat { state: 't', pending, ignored, caught, n_threads: 1, exit_signal: 17, cpu: 0 })
    }

    #[test]
    fn the_marker_is_a_signal_that_the_process_does_not_notice() {
        assert_eq!(marker(0, 0, 0), Some(libc::SIGURG));
        assert_eq!(marker(set(&[libc::SIGURG]), 0, 0), Some(libc::SIGWINCH));
        assert_eq!(marker(0, 0, set(&[libc::SIGURG])), Some(libc::SIGWINCH));
        let both = set(&[libc::SIGURG, libc::SIGWINCH]);
        assert_eq!(marker(0, set(&[libc::SIGPIPE]), both), Some(libc::SIGPIPE));
        assert_eq!(marker(0, set(&[libc::SIGCHLD, libc::SIGTSTP, libc::SIGSEGV]), both), None);
    }
}
