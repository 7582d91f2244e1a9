//! What is behind descriptors: read of a stopped program, changed by it, made again and handed to it, confirmed by it.
//!
//! The programs fetch what was made from this process (pidfd_getfd, called by the engine's hand).

mod measured;
#[path = "../stop_inject/target.rs"]
#[expect(dead_code, reason = "some of it is for tests of stops alone")]
mod target;
mod terminals;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use deltabox::deltacr::LastCall;
use deltabox::deltacr::objects::{
    Epoll, Eventfd, Holder, ObjectError, ObjectKind, ObjectRefusal, Owning, Pidfd, Pipe, Settings, Signalfd, Spare,
    Timerfd, kind_of, leads_out,
};
use deltabox::deltacr::stop::Stopped;
use deltabox::sys::process::{pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

use target::Target;

pub(crate) fn tell(target: &mut Target, letter: u8) -> String {
    use std::io::Write;
    target.input.as_mut().expect("an input").write_all(&[letter]).expect("write to the program");
    target.line()
}

/// Puts descriptors under their numbers in a process, then has it make calls.
pub(crate) fn hand_over(stopped: &mut Stopped, pid: libc::pid_t, gifts: &[(BorrowedFd<'_>, i32)], calls: &[LastCall]) {
    let unsigned = |number: i32| i64::from(number).cast_unsigned();
    let mut hand = stopped.hand(pid).expect("a hand");
    let mut call = |name: &str, nr, args: &[u64]| {
        let mut six = [0; 6];
        six[..args.len()].copy_from_slice(args);
        let result = hand.call(nr, six).expect(name);
        assert!(result >= 0, "{name}: {result}");
        result.cast_unsigned()
    };
    let own = u64::from(std::process::id());
    let engine = call("pidfd_open", libc::SYS_pidfd_open, &[own, 0]);
    for (file, number) in gifts {
        let got = call("pidfd_getfd", libc::SYS_pidfd_getfd, &[engine, unsigned(file.as_raw_fd()), 0]);
        call("dup3", libc::SYS_dup3, &[got, unsigned(*number), 0]);
        call("close", libc::SYS_close, &[got]);
    }
    call("close", libc::SYS_close, &[engine]);
    for last in calls {
        let at = hand.scratch().start;
        hand.write(at, &last.bytes).expect("write");
        let mut six = [0; 6];
        six[..last.args.len()].copy_from_slice(&last.args);
        six[last.args.len()] = at;
        let result = hand.call(last.nr, six).expect(last.name);
        assert!(result >= 0, "{}: {result}", last.name);
    }
    hand.close().expect("close");
}

pub(crate) fn copy(pid: libc::pid_t, number: i32) -> OwnedFd {
    pidfd_getfd(pidfd_open(pid).expect("a process").as_fd(), number).expect("a descriptor")
}

fn fdinfo(pid: libc::pid_t, number: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).expect("fdinfo")
}

fn kind(pid: libc::pid_t, number: i32) -> ObjectKind {
    use std::os::unix::ffi::OsStrExt;
    let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).expect("a link");
    kind_of(link.as_os_str().as_bytes(), &fdinfo(pid, number))
}

// As in tests/programs/objects.c.
const R: i32 = 100;
const W: i32 = 101;
const EV: i32 = 102;
const TI: i32 = 103;
const SG: i32 = 104;
const EP: i32 = 105;
const IN: i32 = 106;
const PS: i32 = 107;
const PE: i32 = 108;
const WO: i32 = 109;
const RO: i32 = 110;
const AR: i32 = 111;
const AW: i32 = 112;

/// All that the program has.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Everything {
    settings: BTreeMap<i32, Settings>,
    /// With the numbers of their ends.
    pipes: Vec<(Vec<i32>, Pipe)>,
    count: Eventfd,
    timer: Timerfd,
    signals: Signalfd,
    epolls: Vec<(i32, Epoll)>,
    pidfds: Vec<(i32, Pidfd)>,
}

fn read(pid: libc::pid_t) -> Everything {
    let kinds = [
        (R, ObjectKind::Pipe),
        (EV, ObjectKind::Eventfd),
        (TI, ObjectKind::Timerfd),
        (SG, ObjectKind::Signalfd),
        (EP, ObjectKind::Epoll),
        (PE, ObjectKind::Pidfd),
    ];
    for (number, expected) in kinds {
        assert_eq!(kind(pid, number), expected);
    }
    let numbers = R..=AW;
    let copies: BTreeMap<i32, OwnedFd> = numbers.map(|number| (number, copy(pid, number))).collect();
    let inside = |of, number| {
        assert_eq!((of, number), (Owning::Process, pid));
        Some(number)
    };
    let settings = |fd: &OwnedFd| Settings::read(fd.as_fd(), inside).expect("settings");
    let spare = Spare::new().expect("a pipe");
    let pipe = |ends: &[i32]| {
        let fds: Vec<_> = ends.iter().map(|number| copies[number].as_fd()).collect();
        assert!(!leads_out(&fds).expect("poll"));
        (ends.to_vec(), Pipe::read(&fds, &spare).expect("a pipe"))
    };
    let epoll = |number| {
        let holders = [Holder { task: pid, number }];
        (number, Epoll::read(&fdinfo(pid, number), &holders).expect("an epoll instance"))
    };
    let pidfd = |number| (number, Pidfd::parse(&fdinfo(pid, number), 0).expect("a pidfd"));
    Everything {
        settings: copies.iter().map(|(number, fd)| (*number, settings(fd))).collect(),
        pipes: vec![pipe(&[R, W]), pipe(&[WO]), pipe(&[RO]), pipe(&[AR, AW])],
        count: Eventfd::read(copies[&EV].as_fd()).expect("an eventfd"),
        timer: Timerfd::read(copies[&TI].as_fd()).expect("a timer"),
        signals: Signalfd::read(copies[&SG].as_fd()).expect("a signalfd"),
        epolls: vec![epoll(EP), epoll(IN)],
        pidfds: vec![pidfd(PS), pidfd(PE)],
    }
}

fn put_back(stopped: &mut Stopped, pid: libc::pid_t, all: &Everything) {
    let mut made: Vec<(i32, OwnedFd)> = Vec::new();
    for (ends, pipe) in &all.pipes {
        made.extend(ends.iter().copied().zip(pipe.make().expect("a pipe")));
    }
    made.push((EV, all.count.make().expect("an eventfd")));
    made.push((TI, all.timer.make().expect("a timer")));
    made.push((SG, all.signals.make().expect("a signalfd")));
    made.extend(all.epolls.iter().map(|(number, epoll)| (*number, epoll.make().expect("an epoll instance"))));
    for (number, pidfd) in &all.pidfds {
        assert!(pidfd.pid().is_none_or(|found| found == pid));
        made.push((*number, pidfd.make(pidfd.pid()).expect("a pidfd")));
    }
    let mut calls = Vec::new();
    for (number, fd) in &made {
        all.settings[number].set(fd.as_fd()).expect("settings");
        calls.extend(all.settings[number].last_calls(*number));
    }
    calls.extend(all.epolls.iter().flat_map(|(number, epoll)| epoll.last_calls(0, *number)));
    let gifts: Vec<_> = made.iter().map(|(number, fd)| (fd.as_fd(), *number)).collect();
    hand_over(stopped, pid, &gifts, &calls);
}

#[test]
fn a_program_does_not_notice_that_its_descriptors_were_read() {
    let mut target = Target::start("objects", "all");
    let pid = target.pid();
    let first = target.group.stopped(|_| read(pid));
    let again = target.group.stopped(|_| read(pid));
    // Time has passed.
    assert_eq!(Everything { timer: first.timer.clone(), ..again }, first);
    assert_eq!(tell(&mut target, b'c'), "ok");
}

#[test]
fn everything_comes_back_and_goes_on() {
    let mut target = Target::start("objects", "all");
    let pid = target.pid();
    let all = target.group.stopped(|_| read(pid));
    // As beside a checkpoint.
    let written = serde_json::to_string(&all).expect("text");
    let all: Everything = serde_json::from_str(&written).expect("records");
    for letter in [b'm', b'c', b'm'] {
        assert_eq!(tell(&mut target, letter), "ok");
        if letter == b'm' {
            assert_ne!(tell(&mut target, b'c'), "ok", "it has not changed");
        }
        target.group.stopped(|stopped| put_back(stopped, pid, &all));
        let now = target.group.stopped(|_| read(pid));
        assert_eq!(now.settings, all.settings);
        assert_eq!((&now.pipes, &now.pidfds), (&all.pipes, &all.pidfds));
        assert_eq!(tell(&mut target, b'c'), "ok");
        target.group.stopped(|stopped| put_back(stopped, pid, &all));
    }
    assert_eq!(tell(&mut target, b'c'), "ok");
}

#[test]
fn a_target_of_epoll_that_was_closed_is_refused_while_its_file_lives_on() {
    let mut target = Target::start("objects", "all");
    let pid = target.pid();
    // The timer's descriptor goes, its file stays here.
    let _kept = copy(pid, TI);
    let refused = target.group.stopped(|stopped| {
        let close = deltabox::deltacr::inject::Call { nr: libc::SYS_close, args: [103, 0, 0, 0, 0, 0] };
        let mut hand = stopped.hand(pid).expect("a hand");
        assert_eq!(hand.run(&[close]).expect("close"), [0]);
        hand.close().expect("close");
        Epoll::read(&fdinfo(pid, IN), &[Holder { task: pid, number: IN }])
    });
    assert!(matches!(refused, Err(ObjectError::Refused(ObjectRefusal::Target { number: TI }))));
    assert_eq!(tell(&mut target, b'c'), "bad a timer: Bad file descriptor");
}
