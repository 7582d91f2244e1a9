//! Sessions and their terminal: what processes do themselves, in the order of [`super`].
//!
//! A terminal is taken by the leader of a session that has none, and inherited by what the leader makes afterwards; a
//! process made before can never get it. It must not be another session's: the one of the dropped time ends with its
//! leader.

use libc::pid_t;

use crate::deltacr::LastCall;
use crate::deltacr::handover::number as argument;

/// In the leader: it begins a session, without a terminal. It must not lead a process group.
pub fn lead_session() -> LastCall {
    LastCall { name: "setsid", nr: libc::SYS_setsid, args: Vec::new(), bytes: Vec::new() }
}

/// In the leader: the terminal that it has under `number`, open for reading, becomes the session's.
pub fn take_terminal(number: i32) -> LastCall {
    // The last argument would be 1 to take it from another session.
    LastCall { name: "ioctl(TIOCSCTTY)", nr: libc::SYS_ioctl, args: ioctl(number, libc::TIOCSCTTY), bytes: Vec::new() }
}

/// In a process of the session: it joins a process group, or makes one if `group` is its own number. All numbers are
/// those inside.
pub fn join_group(group: pid_t) -> LastCall {
    LastCall { name: "setpgid", nr: libc::SYS_setpgid, args: vec![0, argument(group)], bytes: Vec::new() }
}

/// In the leader: `group`, which is there already, is the one in the foreground. `number` is its terminal's.
pub fn bring_forward(number: i32, group: pid_t) -> LastCall {
    LastCall {
        name: "ioctl(TIOCSPGRP)",
        nr: libc::SYS_ioctl,
        args: ioctl(number, libc::TIOCSPGRP),
        bytes: group.to_ne_bytes().to_vec(),
    }
}

fn ioctl(number: i32, request: libc::Ioctl) -> Vec<u64> {
    vec![argument(number), request]
}
