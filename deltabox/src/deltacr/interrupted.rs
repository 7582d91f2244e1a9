//! System calls that the stop itself interrupted, as registers show them. Pure.
//!
//! A blocking call that is woken leaves a code in rax which never reaches the program: on the way back to it, if no
//! handler runs, the kernel makes the call again.
//!
//! | rax | name | without a handler | with one |
//! |---|---|---|---|
//! | -512 | `ERESTARTSYS` | again | again if `SA_RESTART`, else `EINTR` |
//! | -513 | `ERESTARTNOINTR` | again | again |
//! | -514 | `ERESTARTNOHAND` | again | `EINTR` |
//! | -516 | `ERESTART_RESTARTBLOCK` | `restart_syscall`, which knows the time left | `EINTR` |
//! | -4 | `EINTR` | the program sees it, though nothing happened | `EINTR` |

use libc::user_regs_struct as Registers;

const fn code(value: i64) -> u64 {
    value.cast_unsigned()
}
const INTERRUPTED: u64 = code(-4);
const RESTART_SYS: u64 = code(-512);
const RESTART_NO_INTERRUPT: u64 = code(-513);
const RESTART_NO_HANDLER: u64 = code(-514);
const RESTART_BLOCK: u64 = code(-516);

/// Calls that answer a wake-up without a signal with plain `EINTR`, and that have done nothing when they do
/// (signal(7), and sockets with a timeout). Not `close`: it has closed.
const PLAIN_EINTR: [libc::c_long; 19] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
];

/// How an orphan goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GoOn {
    /// By rt_sigreturn: registers and mask in one go.
    SignalReturn,
    /// By loading registers: rt_sigreturn would forget the time that the interrupted call has left.
    Plain,
}

/// Whether the thread was stopped in a system call.
pub(super) fn in_call(registers: &Registers) -> bool {
    registers.orig_rax.cast_signed() >= 0
}

/// Registers in which a call that answered the stop with `EINTR` is one that the kernel makes again unless a handler
/// runs. `None`: there is nothing to change.
pub(super) fn hide_interruption(registers: &Registers) -> Option<Registers> {
    let plain =
        registers.rax == INTERRUPTED && PLAIN_EINTR.iter().any(|number| number.cast_unsigned() == registers.orig_rax);
    plain.then_some(Registers { rax: RESTART_NO_HANDLER, ..*registers })
}

/// What the kernel would do on the way back to the program, written into the registers: for a program that goes on
/// without passing there in this state.
pub(super) fn restarted(registers: &Registers) -> (Registers, GoOn) {
    let mut own = *registers;
    own.orig_rax = u64::MAX;
    if !in_call(registers) {
        return (own, GoOn::SignalReturn);
    }
    match registers.rax {
        RESTART_SYS | RESTART_NO_INTERRUPT | RESTART_NO_HANDLER => {
            own.rax = registers.orig_rax;
            own.rip = registers.rip.wrapping_sub(2);
            (own, GoOn::SignalReturn)
        }
        RESTART_BLOCK => {
            own.rax = libc::SYS_restart_syscall.cast_unsigned();
            own.rip = registers.rip.wrapping_sub(2);
            (own, GoOn::Plain)
        }
        _ => (own, GoOn::SignalReturn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltacr::frame::zero_registers;

    fn stopped(call: i64, rax: i64) -> Registers {
        Registers { orig_rax: code(call), rax: code(rax), rip: 0x1002, ..zero_registers() }
    }

    #[test]
    fn an_interrupted_call_is_made_again() {
        for rax in [-512, -513, -514] {
            let (own, how) = restarted(&stopped(0, rax));
            assert_eq!((own.rax, own.rip, own.orig_rax), (0, 0x1000, u64::MAX), "{rax}");
            assert_eq!(how, GoOn::SignalReturn);
        }
    }

    #[test]
    fn a_call_that_knows_its_time_left_goes_on_with_it() {
        let (own, how) = restarted(&stopped(libc::SYS_nanosleep, -516));
        assert_eq!((own.rax, own.rip), (219, 0x1000));
        assert_eq!(how, GoOn::Plain);
    }

    #[test]
    fn finished_calls_and_running_code_are_left_alone() {
        for registers in [stopped(0, 17), stopped(0, -4), stopped(-1, -512)] {
            let (own, how) = restarted(&registers);
            assert_eq!((own.rax, own.rip), (registers.rax, registers.rip));
            assert_eq!(how, GoOn::SignalReturn);
        }
    }

    #[test]
    fn a_plain_eintr_is_hidden_only_where_the_call_has_done_nothing() {
        let hidden = hide_interruption(&stopped(libc::SYS_epoll_wait, -4)).expect("hidden");
        assert_eq!((hidden.rax, hidden.orig_rax), (code(-514), libc::SYS_epoll_wait.cast_unsigned()));
        assert!(hide_interruption(&stopped(libc::SYS_close, -4)).is_none());
        assert!(hide_interruption(&stopped(libc::SYS_restart_syscall, -4)).is_none());
        assert!(hide_interruption(&stopped(libc::SYS_epoll_wait, 1)).is_none());
        assert!(hide_interruption(&stopped(-1, -4)).is_none());
    }
}
