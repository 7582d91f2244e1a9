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
        let pid =
            restore_by_fork(stopped, &point.template, &past(&point.memory, &source, &point.threads), None, group)?;
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

fn refusal(subject: &Subject, point: &Point) -> TemplateRefusal {
    let error = fork(&subject.0.group.0, point).map(drop).expect_err("a process");
    is_at_rest(&point.template);
    let procs = fs::read_to_string(subject.0.group.0.join("cgroup.procs")).expect("processes");
    assert_eq!(procs, "", "something was made");
    let text = error.to_string();
    let refusal = if let TemplateError::Refused(refusal) = error { Some(refusal) } else { None };
    refusal.expect(&text)
}

#[test]
fn a_program_that_shared_writable_memory_is_refused() {
    let mut subject = Subject::run("crew", "2", &[LEADS[0], ("SHARED", "1")]);
    let point = subject.checkpoint();
    subject.0.child.kill().expect("kill");
    subject.0.child.wait().expect("reap");
    let refusal = refusal(&subject, &point);
    assert!(matches!(refusal, TemplateRefusal::Lost { kind: "shared memory", .. }), "{refusal}");
    remove(point.template);
}

#[test]
fn a_program_that_lives_still_is_not_made_twice() {
    let mut subject = Subject::run("crew", "2", &LEADS);
    let point = subject.checkpoint();
    let pid = subject.0.pid();
    let source = Source::of(&point.template).expect("pages");
    let group = subject.0.group.0.clone();
    let error = subject.0.group.stopped(|stopped| {
        let past = past(&point.memory, &source, &point.threads);
        let error = restore_by_fork(stopped, &point.template, &past, None, &group).expect_err("a second one");
        assert_eq!(stopped.processes().len(), 1);
        error
    });
    assert!(
        matches!(error, TemplateError::Refused(TemplateRefusal::NumberTaken { number }) if number == pid),
        "{error}"
    );
    is_at_rest(&point.template);
    subject.tell(b'c');
    remove(point.template);
}

#[test]
fn a_program_of_another_user_is_refused_for_it_may_not_choose_its_number() {
    let mut subject = Subject::run("crew", "0", &[LEADS[0], ("USER_NUMBER", "64332")]);
    let point = subject.checkpoint();
    subject.0.child.kill().expect("kill");
    subject.0.child.wait().expect("reap");
    assert_eq!(refusal(&subject, &point), TemplateRefusal::Denied { pid: point.template.pid() });
    remove(point.template);
}

#[test]
fn a_lost_template_is_told() {
    let mut subject = Subject::run("crew", "0", &LEADS);
    let point = subject.checkpoint();
    let source = Source::of(&point.template).expect("pages");
    subject.0.child.kill().expect("kill");
    subject.0.child.wait().expect("reap");
    kill_and_reap(point.template.pid());
    let group = subject.0.group.0.clone();
    let error = subject.0.group.stopped(|stopped| {
        let past = past(&point.memory, &source, &point.threads);
        restore_by_fork(stopped, &point.template, &past, None, &group).expect_err("a process")
    });
    let pid = point.template.pid();
    assert!(
        matches!(error, TemplateError::Refused(TemplateRefusal::TemplateGone { pid: other }) if other == pid),
        "{error}"
    );
    point.template.remove(PATIENCE).expect("remove");
}

/// Not a test: the engine that is killed by the next ones.
#[test]
fn engine_that_will_be_killed() {
    let (Some(group), Some(records)) = (std::env::var_os("DELTABOX_TEST_GROUP"), std::env::var_os("DELTABOX_RECORDS"))
    else {
        return;
    };
    let group = Path::new(&group);
    let records = fs::read(records).expect("records");
    let (memory, threads): (Memory, Threads) = serde_json::from_slice(&records).expect("records");
    let freezer = Freezer::open(group.join("t1")).expect("a group");
    let template = Template::find(freezer).expect("look").expect("a template");
    let source = Source::of(&template).expect("pages");
    let stop = Stop { group, excluded: &[], deadline: Instant::now() + PATIENCE };
    println!("engine begins");
    let made = while_stopped(stop, |stopped| {
        restore_by_fork(stopped, &template, &past(&memory, &source, &threads), None, group)
    });
    made.expect("stop").expect("a process");
}

/// Whether it has SIGKILL to come, or is on its way out (PF_EXITING, PF_SIGNALED).
fn is_being_killed(pid: libc::pid_t) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:\t"));
    let flags: u64 = stat_field(pid, 9).parse().expect("flags");
    flags & 0x404 != 0
        || pending.is_none_or(|set| u64::from_str_radix(set, 16).expect("a set") & 1 << (libc::SIGKILL - 1) != 0)
}

/// A program that was killed, and its records in a file.
struct Ended {
    subject: Subject,
    pid: libc::pid_t,
    point: Point,
    records: std::path::PathBuf,
}

impl Ended {
    fn new() -> Self {
        let mut subject = Subject::run("crew", "3", &LEADS);
        let pid = subject.0.pid();
        let point = subject.checkpoint();
        subject.0.child.kill().expect("kill");
        subject.0.child.wait().expect("reap");
        let records = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("records-{}-{pid}", std::process::id()));
        fs::write(&records, serde_json::to_vec(&(&point.memory, &point.threads)).expect("records")).expect("write");
        Self { subject, pid, point, records }
    }

    fn engine(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command
            .args(["--exact", "forked::engine_that_will_be_killed", "--nocapture"])
            .env("DELTABOX_TEST_GROUP", &self.subject.0.group.0)
            .env("DELTABOX_RECORDS", &self.records)
            .stderr(Stdio::null());
        command
    }

    /// Waits until all of the group that can end has ended: it is reaped. Whether the template lives, which may be expected.
    fn settle(&self, expected: Option<bool>) -> bool {
        let template = self.point.template.pid();
        let end = Instant::now() + PATIENCE;
        loop {
            let status = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            let is_gone = !matches!(status, Ok(WaitStatus::StillAlive));
            let state = fs::read_to_string(self.point.template.freezer().path().join("cgroup.freeze")).expect("state");
            let lives = self.point.template.lives().expect("ask");
            // The engine's end may have killed it a moment ago.
            let ends = lives && (expected == Some(false) || is_being_killed(template));
            // Frozen, or dead: it must come to that by itself.
            if is_gone && !ends && (!lives || state.trim() == "1") {
                if lives {
                    is_at_rest(&self.point.template);
                } else {
                    reap(template);
                }
                return lives;
            }
            assert!(
                Instant::now() < end,
                "the template runs, or half a process: gone {is_gone}, lives {lives}, {state}"
            );
            std::thread::yield_now();
        }
    }

    /// The template is as good as before, if it is there.
    fn end(self, lives: bool) {
        if lives {
            let (pid, mut voice) = fork(&self.subject.0.group.0, &self.point).expect("a process");
            voice.tell(b'c');
            kill_and_reap(pid);
            remove(self.point.template);
        } else {
            let group = self.subject.0.group.0.join("t1");
            drop(self.point.template);
            fs::remove_dir(group).expect("an empty group");
        }
        fs::remove_file(self.records).expect("remove the records");
    }
}

fn is_frozen_or_dead_after(point: &str, action: &str, lives: bool) {
    let ended = Ended::new();
    let status = ended.engine().env("DELTABOX_FAULT", format!("{point}:{action}")).stdout(Stdio::null()).status();
    let status = status.expect("run an engine");
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, (action == "kill").then_some(9), "{point}: the engine ended with {status}");
    assert!(!status.success(), "nothing happened to the engine");
    assert_eq!(ended.settle(Some(lives)), lives, "{point}:{action}");
    ended.end(lives);
}

macro_rules! points {
    ($($test:ident $point:literal $killed:literal $failed:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            is_frozen_or_dead_after($point, "kill", $killed);
            is_frozen_or_dead_after($point, "error", $failed);
        })+
    };
}

points! {
    a_template_is_at_rest_without_an_engine_that_has_seized_it "fork.seized" true true,
    a_template_is_dead_without_an_engine_that_has_thawed_it "fork.thawed" false true,
    a_template_is_dead_without_an_engine_that_has_its_child "fork.born" false true,
    a_template_is_dead_without_an_engine_that_has_frozen_it "fork.frozen" false false,
    a_template_is_at_rest_without_an_engine_that_is_about_to_free_it "fork.freed" true true,
    half_a_process_does_not_outlive_its_engine "fork.furnished" true true,
}

#[test]
fn templates_survive_or_die_but_never_run_when_engines_are_killed_at_any_moment() {
    let mut random = 12345_u64;
    let mut n_lived = 0;
    let n_rounds = crate::target::n_rounds() / 4;
    for _ in 0..n_rounds {
        let ended = Ended::new();
        let mut engine = ended.engine().stdout(Stdio::piped()).spawn().expect("start an engine");
        let mut lines = BufReader::new(engine.stdout.take().expect("its output")).lines();
        assert!(lines.by_ref().map_while(Result::ok).any(|line| line.contains("engine begins")));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let end = Instant::now() + Duration::from_micros((random >> 33) % 6000);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        engine.kill().expect("kill the engine");
        engine.wait().expect("reap the engine");
        // A whole process runs on; without descriptors it ends itself.
        let lives = ended.settle(None);
        n_lived += usize::from(lives);
        ended.end(lives);
    }
    println!("{n_lived} of {n_rounds} templates outlived their engines");
}
