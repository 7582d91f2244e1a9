//! Which calls know the time they have left.
//!
//! Once the kernel has made such a call again (`restart_syscall`), registers no longer show which one it was; only the
//! kernel knows. A rollback has to make it anew, so its number is remembered from the first stop that met it.

use libc::{pid_t, user_regs_struct as Registers};

use super::interrupted;

/// The calls in which threads of a sandbox wait.
#[derive(Debug, Default)]
pub(super) struct TimedCalls {
    known: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    tid: pid_t,
    rip: u64,
    rsp: u64,
    call: u64,
}

impl TimedCalls {
    /// Notes what a halted thread waits in.
    pub(super) fn see(&mut self, tid: pid_t, registers: &Registers) {
        if interrupted::knows_time_left(registers) && registers.orig_rax == RESTART {
            return;
        }
        self.known.retain(|known| known.tid != tid);
        if interrupted::knows_time_left(registers) {
            let Registers { rip, rsp, orig_rax, .. } = *registers;
            self.known.push(Known { tid, rip, rsp, call: orig_rax });
        }
    }

    /// Registers that can be put back at another time: the call is made again from its beginning. One that is not
    /// known, for an engine that is gone met it first, answers `EINTR`.
    pub(super) fn without_time_left(&self, tid: pid_t, registers: &Registers) -> Registers {
        let own = interrupted::without_time_left(registers);
        if !interrupted::knows_time_left(registers) || registers.orig_rax != RESTART {
            return own;
        }
        let is_it = |known: &&Known| known.tid == tid && known.rip == registers.rip && known.rsp == registers.rsp;
        match self.known.iter().find(is_it) {
            Some(known) => Registers { orig_rax: known.call, ..own },
            None => interrupted::given_up(registers).unwrap_or(own),
        }
    }
}

const RESTART: u64 = libc::SYS_restart_syscall.cast_unsigned();

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltacr::frame::zero_registers;

    #[test]
    fn a_call_is_known_by_its_first_number_as_long_as_it_lasts() {
        let again = (-514_i64).cast_unsigned();
        let waits = |call: i64| Registers {
            orig_rax: call.cast_unsigned(),
            rax: (-516_i64).cast_unsigned(),
            rip: 0x1002,
            cs: interrupted::CODE_64,
            ..zero_registers()
        };
        let mut calls = TimedCalls::default();
        let restarted = waits(libc::SYS_restart_syscall);
        assert_eq!(calls.without_time_left(7, &restarted).rax, (-4_i64).cast_unsigned(), "not known");
        calls.see(7, &waits(libc::SYS_nanosleep));
        calls.see(7, &restarted);
        let own = calls.without_time_left(7, &restarted);
        assert_eq!((own.orig_rax, own.rax), (libc::SYS_nanosleep.cast_unsigned(), again));
        assert_eq!(calls.without_time_left(8, &restarted).rax, (-4_i64).cast_unsigned(), "another thread");
        calls.see(7, &zero_registers());
        assert_eq!(calls.without_time_left(7, &restarted).rax, (-4_i64).cast_unsigned(), "it is over");
    }
}
