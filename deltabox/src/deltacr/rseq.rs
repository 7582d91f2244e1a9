//! Restartable sequences, as far as injection must know of them.

use std::io;

use libc::{pid_t, user_regs_struct as Registers};

use super::area::Memory;
use crate::sys::ptrace::get_rseq_configuration;

/// The instruction to go on with: the own one, or the abort handler if that is in a restartable sequence.
///
/// The kernel itself aborts sequences when it returns to a thread that was scheduled out, but it would see the
/// injected code's address, find it outside, and forget the sequence.
pub(super) fn leave_critical_section(memory: &Memory, tid: pid_t, registers: &Registers) -> io::Result<u64> {
    let rip = registers.rip;
    let area = get_rseq_configuration(tid)?.address;
    let mut pointer = [0; 8];
    // An area or a description that cannot be read would kill the thread at its next return; that is its affair.
    if area == 0 || memory.read(area + 8, &mut pointer).is_err() {
        return Ok(rip);
    }
    let mut section = [0; 32];
    let pointer = u64::from_le_bytes(pointer);
    if pointer == 0 || memory.read(pointer, &mut section).is_err() {
        return Ok(rip);
    }
    let word = |at: usize| section[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
    let (start, len_bytes, abort) = (word(8), word(16), word(24));
    Ok(if rip.wrapping_sub(start) < len_bytes { abort } else { rip })
}
