//! Programs that have ended are made again by their templates, as often as one likes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::{Request as Stop, Stopped, while_stopped};
use deltabox::deltacr::template::{
    Freezer, Memory, Past, Source, Template, TemplateError, TemplateRefusal, Threads, restore_by_fork,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::restored::Point;
use crate::{PATIENCE, Subject, reap, remove};

const LEADS: [(&str, &str); 1] = [("LEADS", "1")];

/// What is said with a program that got its descriptors from the test.
struct Voice {
    stream: BufReader<UnixStream>,
}

impl Voice {
    fn ask(&mut self, letter: u8) -> String {
        self.stream.get_mut().write_all(&[letter]).expect("write to the program");
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("read from the program");
        line.trim().to_owned()
    }

    fn tell(&mut self, letter: u8) {
        assert_eq!(self.ask(letter), "ok", "after '{}'", char::from(letter));
    }
}

/// Has a process without descriptors speak on an abstract socket.
fn connect(stopped: &mut Stopped, pid: libc::pid_t, name: &str) {
    let mut hand = stopped.hand(pid).expect("a hand");
    let at = hand.scratch().start;
    let family = u16::try_from(libc::AF_UNIX).expect("a family").to_ne_bytes();
    let address = [&family, &[0][..], name.as_bytes()].concat();
    hand.write(at, &address).expect("write");
    let call = |nr, args: &[u64]| {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        Call { nr, args: all }
    };
    let calls = [
        call(libc::SYS_socket, &[1, 1, 0]),
        call(libc::SYS_connect, &[0, at, address.len() as u64]),
        call(libc::SYS_dup2, &[0, 1]),
    ];
    assert_eq!(hand.run(&calls).expect("calls"), [0, 0, 1]);
    hand.close().expect("close");
}

fn listen() -> (String, UnixListener) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("deltabox-forked-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(&name).expect("an address");
    (name, UnixListener::bind_addr(&address).expect("listen"))
}

fn past<'a>(memory: &'a Memory, source: &'a Source, threads: &'a Threads) -> Past<'a> {
    Past { memory, source, threads, files: None }
}

/// Makes it again; it speaks.
fn fork(group: &Path, point: &Point) -> Result<(libc::pid_t, Voice), TemplateError> {
    let (name, listener) = listen();
    let stop = Stop { group, excluded: &[], deadline: Instant::now() + PATIENCE };
    let source = Source::of(&point.template).expect("pages");
    let pid = while_stopped(stop, |stopped| {
        let pid = restore_by_fork(stopped, &point.template, &past(&point.memory, &source, &point.threads), group)?;
        assert!(stopped.processes().iter().any(|process| process.pid == pid));
        assert_eq!(stopped.processes().len(), 1, "the template is let go");
        assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count(), 0);
        connect(stopped, pid, &name);
        Ok::<_, TemplateError>(pid)
    });
    let pid = pid.expect("stop")?;
    let (stream, _) = listener.accept().expect("accept");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    Ok((pid, Voice { stream: BufReader::new(stream) }))
}

/// What `stat` has in this field of proc_pid_stat(5), from the third on.
fn stat_field(pid: libc::pid_t, field: usize) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let rest = &stat[stat.rfind(')').expect("a name") + 2..];
    rest.split(' ').nth(field - 3).expect("a field").to_owned()
}

/// A template sleeps, and nobody has it.
fn is_at_rest(template: &Template) {
    let pid = template.pid();
    assert!(template.lives().expect("ask"));
    let end = Instant::now() + PATIENCE;
    let events = template.freezer().path().join("cgroup.events");
    while !fs::read_to_string(&events).expect("events").contains("frozen 1") {
        assert!(Instant::now() < end, "not frozen");
        std::thread::yield_now();
    }
    assert_eq!(fs::read_to_string(template.freezer().path().join("cgroup.freeze")).expect("state").trim(), "1");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("TracerPid:\t0\n") && status.contains("Threads:\t1\n"), "{status}");
    assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count(), 0);
}

fn kill_and_reap(pid: libc::pid_t) {
    nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
    reap(pid);
}

fn comes_back(n: &str, changes: &str, rounds: usize) {
    let mut subject = Subject::run("crew", n, &LEADS);
    let pid = subject.0.pid();
    let point = subject.checkpoint();
    changes.bytes().for_each(|letter| subject.tell(letter));
    subject.0.child.kill().expect("kill");
    subject.0.child.wait().expect("reap");
    for _ in 0..rounds {
        let (again, mut voice) = fork(&subject.0.group.0, &point).expect("a process");
        assert_eq!(again, pid, "another number");
        is_at_rest(&point.template);
        assert_eq!(stat_field(pid, 4), std::process::id().to_string(), "parent");
        assert_eq!((stat_field(pid, 5), stat_field(pid, 6)), (pid.to_string(), pid.to_string()), "group, session");
        let members = fs::read_to_string(subject.0.group.0.join("cgroup.procs")).expect("processes");
        assert_eq!(members.trim(), pid.to_string());
        voice.tell(b'c');
        voice.tell(b't');
        // It goes back in place too.
        let (name, listener) = listen();
        let source = Source::of(&point.template).expect("pages");
        voice.tell(b'm');
        subject.0.group.stopped(|stopped| {
            let past = past(&point.memory, &source, &point.threads);
            deltabox::deltacr::template::restore_in_place(stopped, pid, &past).expect("a rollback");
            drop((name, listener));
        });
        voice.tell(b'c');
        voice.tell(b'j');
        voice.stream.get_mut().write_all(b"x").expect("write");
        let status = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WALL)).expect("wait");
        assert_eq!(status, WaitStatus::Exited(Pid::from_raw(pid), 7));
    }
    let (again, _voice) = fork(&subject.0.group.0, &point).expect("a process");
    kill_and_reap(again);
    remove(point.template);
}

#[test]
fn a_program_that_was_killed_is_made_again_and_again() {
    comes_back("0", "t", 4);
}

#[test]
fn a_program_of_threads_is_made_again_with_all_of_them() {
    comes_back("6", "emt", 3);
}

#[test]
fn a_program_of_sixty_four_threads_is_made_again() {
    comes_back("64", "m", 1);
}
