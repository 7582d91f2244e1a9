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

/// The libc crate lacks it.
const IO_PGETEVENTS: libc::c_long = 333;

/// How long a call waits at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timeout {
    /// For ever.
    None,
    /// Milliseconds, for ever if negative.
    Milliseconds(i32),
    /// A `timespec` there, for ever if null.
    Timespec(u64),
    /// A `timeval` there, for ever if null.
    Timeval(u64),
    /// The receive timeout of a socket.
    Receive(u64),
    /// The send timeout of a socket.
    Send(u64),
    /// The same, of a socket that is being connected.
    Connect(u64),
    /// The receive timeout of the one or the send timeout of the other, whichever is a socket.
    Transfer(u64, u64),
}

/// The timeout of a call that answers a wake-up without a signal with plain `EINTR` and has done nothing then
/// (signal(7); sockets with a timeout; `select` and `ppoll` with a timeout that they cannot write back). `None`: it is
/// no such call. Not `close`: it has closed.
fn plain_timeout(registers: &Registers) -> Option<Timeout> {
    let Registers { rdi, rdx, r10, r8, .. } = *registers;
    Some(match registers.orig_rax.cast_signed() {
        // An int: the upper half is not looked at.
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => {
            let [a, b, c, d, ..] = r10.to_le_bytes();
            Timeout::Milliseconds(i32::from_le_bytes([a, b, c, d]))
        }
        libc::SYS_semop => Timeout::None,
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => Timeout::Timespec(r10),
        libc::SYS_rt_sigtimedwait | libc::SYS_ppoll => Timeout::Timespec(rdx),
        libc::SYS_io_getevents | IO_PGETEVENTS | libc::SYS_pselect6 => Timeout::Timespec(r8),
        libc::SYS_select => Timeout::Timeval(r8),
        libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_preadv2 => Timeout::Receive(rdi),
        libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_pwritev2
        | libc::SYS_sendfile => Timeout::Send(rdi),
        libc::SYS_connect => Timeout::Connect(rdi),
        libc::SYS_splice => Timeout::Transfer(rdi, rdx),
        _ => return None,
    })
}

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

/// The selector of 64-bit code (__USER_CS); system calls of 32-bit code have other numbers.
pub(super) const CODE_64: u64 = 0x33;

/// Registers in which a call that answered the stop with `EINTR` is one that the kernel makes again unless a handler
/// runs, and its timeout, which then begins anew. `None`: there is nothing to change.
pub(super) fn hide_interruption(registers: &Registers) -> Option<(Registers, Timeout)> {
    // This one hides it itself, and its timeout begins anew all the same.
    let hides = registers.orig_rax == IO_PGETEVENTS.cast_unsigned();
    if !is_interrupted(registers) || registers.rax != INTERRUPTED && !hides {
        return None;
    }
    let timeout = plain_timeout(registers)?;
    Some((Registers { rax: RESTART_NO_HANDLER, ..*registers }, timeout))
}

/// Whether a call was interrupted, be it hidden or not.
pub(super) fn is_interrupted(registers: &Registers) -> bool {
    in_call(registers) && registers.cs == CODE_64 && matches!(registers.rax, INTERRUPTED | RESTART_NO_HANDLER)
}

/// Registers in which an interrupted call has ended with `EINTR`; `None` if there is none to be made again.
pub(super) fn given_up(registers: &Registers) -> Option<Registers> {
    let again = matches!(registers.rax, RESTART_SYS | RESTART_NO_INTERRUPT | RESTART_NO_HANDLER | RESTART_BLOCK);
    (in_call(registers) && again).then_some(Registers { rax: INTERRUPTED, orig_rax: u64::MAX, ..*registers })
}

/// Registers that can be put back at another time: what the kernel keeps of a call that knows its time left is that of
/// a later one then, so the call is made again from its beginning.
pub(super) fn without_time_left(registers: &Registers) -> Registers {
    if knows_time_left(registers) {
        return Registers { rax: RESTART_NO_HANDLER, ..*registers };
    }
    *registers
}

/// Whether a call was interrupted of which the kernel keeps the time that is left.
pub(super) fn knows_time_left(registers: &Registers) -> bool {
    in_call(registers) && registers.rax == RESTART_BLOCK
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
        Registers { orig_rax: code(call), rax: code(rax), rip: 0x1002, cs: CODE_64, ..zero_registers() }
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
    fn a_call_put_back_later_begins_anew() {
        let own = without_time_left(&stopped(libc::SYS_nanosleep, -516));
        assert_eq!((own.rax, own.rip, own.orig_rax), (code(-514), 0x1002, libc::SYS_nanosleep.cast_unsigned()));
        assert_eq!(without_time_left(&stopped(0, 17)).rax, 17);
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
        let (hidden, _) = hide_interruption(&stopped(libc::SYS_epoll_wait, -4)).expect("hidden");
        assert_eq!((hidden.rax, hidden.orig_rax), (code(-514), libc::SYS_epoll_wait.cast_unsigned()));
        assert!(hide_interruption(&stopped(libc::SYS_close, -4)).is_none());
        assert!(hide_interruption(&stopped(libc::SYS_restart_syscall, -4)).is_none());
        assert!(hide_interruption(&stopped(libc::SYS_epoll_wait, 1)).is_none());
        assert!(hide_interruption(&stopped(-1, -4)).is_none());
        let foreign = Registers { cs: 0x23, ..stopped(libc::SYS_epoll_wait, -4) };
        assert!(hide_interruption(&foreign).is_none(), "other numbers in 32-bit code");
    }

    #[test]
    fn a_timeout_is_where_the_call_has_it() {
        let timeout = |call, change: fn(&mut Registers)| {
            let mut registers = stopped(call, -4);
            change(&mut registers);
            hide_interruption(&registers).expect("hidden").1
        };
        let upper_half = timeout(libc::SYS_epoll_wait, |registers| registers.r10 = 0xffff_ffff_0000_0064);
        assert_eq!(upper_half, Timeout::Milliseconds(100));
        let forever = timeout(libc::SYS_epoll_pwait, |registers| registers.r10 = 0xffff_ffff);
        assert_eq!(forever, Timeout::Milliseconds(-1));
        assert_eq!(timeout(libc::SYS_rt_sigtimedwait, |registers| registers.rdx = 9), Timeout::Timespec(9));
        assert_eq!(timeout(libc::SYS_recvfrom, |registers| registers.rdi = 4), Timeout::Receive(4));
        assert_eq!(timeout(libc::SYS_semop, |registers| registers.r10 = 4), Timeout::None);
    }
}
