//! Terminals of real sessions.

use std::os::fd::AsFd;

use deltabox::deltacr::objects::terminal::{
    Pair, Place, Terminal, bring_forward, lead_session, open_slave, take_terminal,
};
use deltabox::deltacr::stop::Stopped;
use deltabox::sys::tty::{Window, set_window, window};
use libc::pid_t;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::target::Target;
use crate::{copy, hand_over, tell};

const MASTER: i32 = 200;
const SLAVE: i32 = 201;

fn pids(target: &mut Target) -> (pid_t, pid_t) {
    let line = tell(target, b'p');
    let mut pids = line.split(' ').map(|pid| pid.parse().expect("a pid"));
    (pids.next().expect("a child"), pids.next().expect("a job"))
}

fn read(pid: pid_t, child: pid_t) -> Terminal {
    with_pair(pid, child, |pair| Terminal::read(pair, Place::Inside, Some).expect("a terminal"))
}

fn with_pair<R>(pid: pid_t, child: pid_t, work: impl FnOnce(Pair<'_>) -> R) -> R {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let devpts = nix::fcntl::open("/dev/pts", flags, Mode::empty()).expect("/dev/pts");
    let (master, slave) = (copy(pid, MASTER), copy(child, SLAVE));
    work(Pair { devpts: devpts.as_fd(), master: master.as_fd(), slave: Some(slave.as_fd()) })
}

#[test]
fn a_session_does_not_notice_that_its_terminal_was_read() {
    let mut target = Target::start("objects", "terminal");
    let (pid, (child, job)) = (target.pid(), pids(&mut target));
    let first = target.group.stopped(|_| read(pid, child));
    assert_eq!((first.session(), first.foreground()), (Some(child), Some(job)));
    let again = target.group.stopped(|_| read(pid, child));
    assert_eq!(again, first);
    assert_eq!(tell(&mut target, b'c'), "ok");
}

#[test]
fn a_terminal_comes_back_with_what_was_typed_shown_and_in_the_foreground() {
    let mut target = Target::start("objects", "terminal");
    let (pid, (child, job)) = (target.pid(), pids(&mut target));
    let terminal = target.group.stopped(|_| read(pid, child));
    for _ in 0..2 {
        assert_eq!(tell(&mut target, b'm'), "ok");
        assert_ne!(tell(&mut target, b'c'), "ok", "it has not changed");
        target.group.stopped(|stopped| {
            with_pair(pid, child, |pair| terminal.put_back(pair).expect("put back"));
            hand_over(stopped, child, &[], &[bring_forward(SLAVE, job)]);
        });
        assert_eq!(tell(&mut target, b'c'), "ok");
    }
}

#[test]
fn a_session_is_told_of_a_window_outside_that_changed_since() {
    let mut target = Target::start("objects", "terminal");
    let (pid, (child, _)) = (target.pid(), pids(&mut target));
    let other = Window { rows: 50, columns: 132, width: 0, height: 0 };
    let outside = |pair: Pair<'_>| Terminal::read(pair, Place::Outside, Some).expect("a terminal");
    let terminal = target.group.stopped(|_| with_pair(pid, child, outside));
    target.group.stopped(|_| with_pair(pid, child, |pair| set_window(pair.master, other).expect("a size")));
    target.group.stopped(|stopped| {
        with_pair(pid, child, |pair| terminal.put_back(pair).expect("put back"));
        // The job was told, as it was in the foreground.
        assert_eq!(hand_over_and_tell(stopped, pid, child, &terminal), other);
    });
    assert_eq!(tell(&mut target, b'w'), "1");
    target.group.stopped(|_| with_pair(pid, child, |pair| terminal.announce_window(pair.master)).expect("announce"));
    assert_eq!(tell(&mut target, b'w'), "2");
}

/// Brings the session's leader to the foreground; the size that it sees then.
fn hand_over_and_tell(stopped: &mut Stopped, pid: pid_t, child: pid_t, terminal: &Terminal) -> Window {
    hand_over(stopped, child, &[], &[bring_forward(SLAVE, child)]);
    with_pair(pid, child, |pair| {
        terminal.announce_window(pair.master).expect("announce");
        window(pair.master).expect("a size")
    })
}

#[test]
fn a_terminal_made_again_becomes_that_of_a_session_made_again() {
    let mut target = Target::start("objects", "session");
    let (pid, (child, _)) = (target.pid(), pids(&mut target));
    assert_eq!(tell(&mut target, b'c'), "bad a session: Success");
    target.group.stopped(|stopped| {
        let terminal = read(pid, child);
        assert_eq!((terminal.session(), terminal.foreground()), (None, None));
        // It leads nothing yet, and has no terminal.
        hand_over(stopped, child, &[], &[lead_session()]);
        let slave = open_slave(copy(pid, MASTER).as_fd(), libc::O_RDWR).expect("a slave");
        hand_over(stopped, child, &[(slave.as_fd(), SLAVE)], &[take_terminal(SLAVE), bring_forward(SLAVE, child)]);
        let terminal = read(pid, child);
        assert_eq!((terminal.session(), terminal.foreground()), (Some(child), Some(child)));
    });
    assert_eq!(tell(&mut target, b'c'), "ok");
}
