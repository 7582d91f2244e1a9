//! Programs that have ended are made again under the parent that had them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::state::Signals;
use deltabox::deltacr::stop::{Request, Stopped, while_stopped};
use deltabox::deltacr::template::{
    End, Freezer, Kin, Past, Source, Template, TemplateError, TemplateRefusal, Threads, make_zombie, rebuild,
    restore_in_place,
};
use libc::pid_t;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::restored::{Point, is_as_it_was};
use crate::target::program;
use crate::{PATIENCE, Subject, remove};

/// What is said with a program that has its descriptors from the test.
struct Voice(BufReader<UnixStream>);

impl Voice {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self(BufReader::new(stream))
    }

    fn send(&mut self, letter: u8) {
        self.0.get_mut().write_all(&[letter]).expect("write to the program");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("read from the program");
        line.trim().to_owned()
    }

    fn ask(&mut self, letter: u8) -> String {
        self.send(letter);
        self.line()
    }
}

fn listen() -> (String, UnixListener) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("deltabox-rebuilt-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(&name).expect("an address");
    (name, UnixListener::bind_addr(&address).expect("listen"))
}

/// Has a process without descriptors speak on an abstract socket.
fn connect(stopped: &mut Stopped, pid: pid_t, name: &str) {
    let mut hand = stopped.hand(pid).expect("a hand");
    let at = hand.scratch().start;
    let family = u16::try_from(libc::AF_UNIX).expect("a family").to_ne_bytes();
    let address = [&family, &[0][..], name.as_bytes()].concat();
    hand.write(at, &address).expect("write");
    let call = |nr, [first, second, third]: [u64; 3]| Call { nr, args: [first, second, third, 0, 0, 0] };
    let calls = [
        call(libc::SYS_socket, [1, 1, 0]),
        call(libc::SYS_connect, [0, at, address.len() as u64]),
        call(libc::SYS_dup2, [0, 1, 0]),
    ];
    assert_eq!(hand.run(&calls).expect("calls"), [0, 0, 1]);
    hand.close().expect("close");
}

/// A parent, and what speaks with its child.
struct Family {
    parent: Subject,
    name: String,
    listener: UnixListener,
    child: pid_t,
    voice: Voice,
}

/// A process at a checkpoint.
struct Before {
    point: Point,
    signals: Signals,
    kin: Kin,
}

impl Family {
    fn start(command: &str, variables: &[(&str, &str)]) -> Self {
        let (name, listener) = listen();
        let variables = [&[("CHILD", command), ("NAME", name.as_str())], variables].concat();
        let parent = Subject::run("kin", "", &variables);
        let voice = Voice::accept(&listener);
        let child = only_child(parent.0.pid());
        Self { parent, name, listener, child, voice }
    }

    fn ask_parent(&mut self, letter: u8) -> String {
        self.parent.0.input.as_mut().expect("an input").write_all(&[letter]).expect("write to the parent");
        self.parent.0.line()
    }

    fn checkpoint(&self, pid: pid_t, freezer: &str) -> Before {
        let (freezer, request) = (self.parent.freezer(freezer), self.parent.request());
        let (threads, signals, (template, outline)) = self.parent.0.group.stopped(|stopped| {
            let threads = Threads::read(stopped, pid).expect("threads");
            let signals = Signals::read(stopped, pid).expect("signals");
            (threads, signals, Template::make(stopped, pid, freezer, &request).expect("a template"))
        });
        let memory = outline.complete(&template).expect("a description");
        Before { point: Point { template, memory, threads }, signals, kin: Kin::read(pid).expect("kin") }
    }

    /// The child is killed, and its parent waits for it.
    fn lose_child(&mut self) {
        kill(Pid::from_raw(self.child), Signal::SIGKILL).expect("kill");
        assert_eq!(self.ask_parent(b'w'), format!("{} 9", self.child));
    }

    /// Makes the child again; it speaks.
    fn rebuild(&mut self, past: &Before) {
        let (pid, name) = (self.parent.0.pid(), self.name.clone());
        let child = self.parent.0.group.stopped(|stopped| {
            let child = past.rebuild(stopped, pid).expect("a rebuilt process");
            past.is_seen(child);
            assert_eq!(fs::read_dir(format!("/proc/{child}/fd")).expect("descriptors").count(), 0);
            connect(stopped, child, &name);
            child
        });
        assert_eq!(child, self.child, "another number");
        assert_eq!(Kin::read(child).expect("kin"), past.kin);
        assert_eq!(only_child(pid), child);
        for what in ["exe", "cgroup"] {
            look_alike(what, child, if what == "exe" { past.point.template.pid() } else { pid });
        }
        for what in ["cmdline", "environ", "auxv"] {
            let read = |pid| fs::read(format!("/proc/{pid}/{what}")).expect("read");
            assert!(read(child) == read(past.point.template.pid()), "{what}");
        }
        self.voice = Voice::accept(&self.listener);
    }
}

impl Before {
    fn rebuild(&self, stopped: &mut Stopped, parent: pid_t) -> Result<pid_t, TemplateError> {
        let source = Source::of(&self.point.template).expect("pages");
        let Point { memory, threads, .. } = &self.point;
        let child = rebuild(stopped, parent, None, &self.kin, &Past { memory, source: &source, threads, files: None })?;
        self.signals.put_back(stopped, child).expect("signals");
        Ok(child)
    }

    /// Memory is as it was, but for what the kernel itself writes for restartable sequences.
    fn is_seen(&self, child: pid_t) {
        is_as_it_was(child, &self.point, 32 * self.point.threads.n_threads());
    }

    fn restore_in_place(&self, stopped: &mut Stopped, pid: pid_t) {
        let source = Source::of(&self.point.template).expect("pages");
        let Point { memory, threads, .. } = &self.point;
        restore_in_place(stopped, pid, &Past { memory, source: &source, threads, files: None }).expect("a rollback");
    }
}

fn look_alike(what: &str, left: pid_t, right: pid_t) {
    let look = |pid| {
        let path = format!("/proc/{pid}/{what}");
        fs::read_link(&path).map(|link| link.into_os_string()).or_else(|_| fs::read_to_string(&path).map(Into::into))
    };
    assert_eq!(look(left).expect("look"), look(right).expect("look"), "{what}");
}

fn children(pid: pid_t) -> Vec<pid_t> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
    text.split_ascii_whitespace().map(|number| number.parse().expect("a number")).collect()
}

fn only_child(pid: pid_t) -> pid_t {
    let children = children(pid);
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

fn wait_until(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

/// A program with memory of these kinds, killed and rebuilt twice.
fn memory_comes_back(kinds: &str) {
    let command = format!("exec {} {kinds}", program("memory").display());
    let mut family = Family::start(&command, &[]);
    assert_eq!(family.voice.ask(b'x'), "ready");
    let past = family.checkpoint(family.child, "t1");
    for _ in 0..2 {
        assert_eq!(family.voice.ask(b'm'), "ok");
        family.lose_child();
        family.rebuild(&past);
        assert_eq!(family.voice.ask(b'c'), "ok");
        assert_eq!(family.voice.ask(b's'), "ok");
    }
    // It goes on in every way: its end is its parent's to see.
    family.voice.send(b'q');
    assert_eq!(family.ask_parent(b'w'), format!("{} 0", family.child));
    remove(past.point.template);
}

macro_rules! kinds {
    ($($test:ident $kinds:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            memory_comes_back($kinds);
        })+
    };
}

kinds! {
    a_child_with_a_heap_is_rebuilt "heap",
    a_child_with_its_own_break_is_rebuilt "brk",
    a_child_with_a_deep_stack_is_rebuilt "stack",
    a_child_with_huge_pages_is_rebuilt "huge",
    a_child_with_locked_pages_is_rebuilt "locked",
    a_child_with_guards_is_rebuilt "guard",
    a_child_with_advised_pages_is_rebuilt "unforked,wiped",
    a_child_with_pages_of_files_is_rebuilt "file",
    a_child_with_named_pages_is_rebuilt "named",
    a_child_with_threads_is_rebuilt "threads",
    a_child_with_much_memory_is_rebuilt "big",
    a_child_with_everything_is_rebuilt
        "heap,huge,locked,guard,unforked,wiped,moved,gone,rebuilt,file,lazy,hole,named,brk,threads,stack",
}

/// A Python program that remembers; `m` changes much of what it knows, `c` says what that is, `x` ends it with 5.
const PYTHON: &str = r#"
import os, sys, json, random, hashlib, socket
if len(sys.argv) > 1:
    s = socket.socket(socket.AF_UNIX)
    s.connect("\0" + sys.argv[1])
    os.dup2(s.fileno(), 0)
    os.dup2(s.fileno(), 1)
    s.detach()
random.seed(7)
state = {i: str(i) * 3 for i in range(50000)}
os.write(1, b"ready\n")
while True:
    letter = os.read(0, 1)
    if letter == b"m":
        for i in range(0, 50000, 3):
            state[i] = random.random()
        state["list"] = [bytearray(1000) for i in range(3000)]
        os.write(1, b"ok\n")
    elif letter == b"c":
        text = json.dumps([sorted(map(str, state.items())), random.getstate()], default=str)
        os.write(1, hashlib.sha256(text.encode()).hexdigest().encode() + b"\n")
    else:
        sys.exit(5)
"#;

#[test]
fn a_python_child_of_a_c_program_is_rebuilt_and_goes_on() {
    let mut family = Family::start("exec /usr/bin/python3 -c \"$PYTHON\"", &[("PYTHON", PYTHON)]);
    assert_eq!(family.voice.line(), "ready");
    let before = family.voice.ask(b'c');
    let past = family.checkpoint(family.child, "t1");
    for _ in 0..2 {
        assert_eq!(family.voice.ask(b'm'), "ok");
        assert_ne!(family.voice.ask(b'c'), before);
        family.lose_child();
        family.rebuild(&past);
        assert_eq!(family.voice.ask(b'c'), before);
    }
    family.voice.send(b'x');
    assert_eq!(family.ask_parent(b'w'), format!("{} {}", family.child, 5 << 8));
    remove(past.point.template);
}

#[test]
fn a_python_child_of_a_shell_is_rebuilt_and_the_shell_waits_for_it() {
    let script = "/usr/bin/python3 -c \"$PYTHON\" $NAME & echo ready; read -n 1; wait $!; echo $?; read -n 1";
    let command = format!("exec bash -c '{script}'");
    let mut family = Family::start(&command, &[("PYTHON", PYTHON)]);
    // The shell speaks on the first connection, Python on the second.
    let mut python = Voice::accept(&family.listener);
    assert_eq!(family.voice.line(), "ready");
    assert_eq!(python.line(), "ready");
    let before = python.ask(b'c');
    let shell = family.child;
    let child = only_child(shell);
    let past = family.checkpoint(child, "t1");
    let shells = family.checkpoint(shell, "t2");
    for _ in 0..2 {
        python.ask(b'm');
        kill(Pid::from_raw(child), Signal::SIGKILL).expect("kill");
        wait_until("the shell reaps it", || children(shell).is_empty());
        let name = family.name.clone();
        family.parent.0.group.stopped(|stopped| {
            shells.restore_in_place(stopped, shell);
            assert_eq!(past.rebuild(stopped, shell).expect("a rebuilt process"), child);
            past.is_seen(child);
            connect(stopped, child, &name);
        });
        python = Voice::accept(&family.listener);
        assert_eq!(python.ask(b'c'), before);
    }
    python.send(b'x');
    assert_eq!(family.voice.ask(b'w'), "5", "the shell's own word");
    remove(past.point.template);
    remove(shells.point.template);
}

#[test]
fn a_grandchild_is_rebuilt_after_its_parent() {
    let kin = format!("exec {}", program("kin").display());
    let mut family = Family::start(&kin, &[("CHILD2", &kin), ("LEADS", "1")]);
    assert_eq!(family.voice.ask(b'x'), "ready");
    let mut grand = Voice::accept(&family.listener);
    assert_eq!(grand.ask(b'x'), "ready");
    let (child, grandchild) = (family.child, only_child(family.child));
    assert_eq!(grand.ask(b'm'), "1");
    let who = (family.voice.ask(b'p'), grand.ask(b'p'));
    let (past, below) = (family.checkpoint(child, "t1"), family.checkpoint(grandchild, "t2"));
    for _ in 0..2 {
        assert_eq!((family.voice.ask(b'm'), grand.ask(b'm')), ("1".into(), "2".into()));
        kill(Pid::from_raw(grandchild), Signal::SIGKILL).expect("kill");
        assert_eq!(family.voice.ask(b'w'), format!("{grandchild} 9"));
        family.lose_child();
        let (parent, name) = (family.parent.0.pid(), family.name.clone());
        family.parent.0.group.stopped(|stopped| {
            assert_eq!(past.rebuild(stopped, parent).expect("a child"), child);
            connect(stopped, child, &name);
            assert_eq!(below.rebuild(stopped, child).expect("a grandchild"), grandchild);
            connect(stopped, grandchild, &name);
        });
        family.voice = Voice::accept(&family.listener);
        grand = Voice::accept(&family.listener);
        assert_eq!((family.voice.ask(b'c'), grand.ask(b'c')), ("0".into(), "1".into()));
        assert_eq!((family.voice.ask(b'p'), grand.ask(b'p')), who);
        assert_eq!((only_child(parent), only_child(child)), (child, grandchild));
    }
    grand.send(b'x');
    assert_eq!(family.voice.ask(b'w'), format!("{grandchild} {}", 7 << 8));
    family.voice.send(b'x');
    assert_eq!(family.ask_parent(b'w'), format!("{child} {}", 7 << 8));
    remove(past.point.template);
    remove(below.point.template);
}

#[test]
fn a_leader_of_a_group_is_rebuilt_as_one() {
    let kin = format!("exec {}", program("kin").display());
    let mut family = Family::start(&kin, &[("GROUP", "1")]);
    assert_eq!(family.voice.ask(b'x'), "ready");
    let past = family.checkpoint(family.child, "t1");
    assert_eq!(past.kin.group, past.kin.pid);
    let who = family.voice.ask(b'p');
    family.lose_child();
    family.rebuild(&past);
    assert_eq!(family.voice.ask(b'p'), who);
    remove(past.point.template);
}

/// A number that was free a moment ago.
fn free_number() -> pid_t {
    let mut child = std::process::Command::new("true").spawn().expect("start a program");
    child.wait().expect("reap");
    child.id().try_into().expect("a pid")
}

#[test]
fn zombies_come_back_with_the_status_that_they_had() {
    let mut parent = Subject::run("kin", "", &[]);
    let pid = parent.0.pid();
    for (end, status) in [
        (End::Exited(0), 0),
        (End::Exited(77), 77 << 8),
        (End::Killed(libc::SIGKILL), libc::SIGKILL),
        (End::Killed(libc::SIGTERM), libc::SIGTERM),
        (End::Killed(libc::SIGSEGV), libc::SIGSEGV),
        (End::Killed(libc::SIGCHLD), -1),
    ] {
        let above = Kin::read(pid).expect("kin");
        let record = Kin { pid: free_number(), exit_signal: libc::SIGCHLD, ..above };
        let made = parent.0.group.stopped(|stopped| {
            let made = make_zombie(stopped, pid, &record, end);
            if made.is_ok() {
                assert_eq!(End::read(record.pid).expect("a status"), Some(end));
                assert_eq!(Kin::read(record.pid).expect("kin"), record);
            }
            made
        });
        let mut ask = |letter| {
            parent.0.input.as_mut().expect("an input").write_all(&[letter]).expect("write");
            parent.0.line()
        };
        if status >= 0 {
            assert_eq!(made.expect("a zombie"), record.pid);
            assert_eq!(ask(b'w'), format!("{} {status}", record.pid));
        } else {
            let error = made.expect_err("nobody ends by this signal");
            assert!(matches!(error, TemplateError::Refused(TemplateRefusal::Zombie { .. })), "{error}");
            assert_eq!(ask(b'l'), format!("5 {}", -libc::ECHILD), "the parent knows nothing of it");
        }
    }
}

#[test]
fn a_zombie_is_read() {
    let mut child = std::process::Command::new("sh").args(["-c", "kill -15 $$"]).spawn().expect("start a program");
    let pid = child.id().try_into().expect("a pid");
    wait_until("it ends", || End::read(pid).expect("a status").is_some());
    assert_eq!(End::read(pid).expect("a status"), Some(End::Killed(15)));
    assert_eq!(Kin::read(pid).expect("kin").exit_signal, libc::SIGCHLD);
    child.wait().expect("reap");
    assert_eq!(End::read(std::process::id().try_into().expect("a pid")).expect("a status"), None);
}

/// What fails leaves the parent as it was, and it knows nothing.
fn fails(family: &mut Family, past: &Before, parent: pid_t, is: impl Fn(&TemplateError) -> bool) {
    let seen = family.ask_parent(b'l');
    let error = family.parent.0.group.stopped(|stopped| {
        let n_processes = stopped.processes().len();
        let error = past.rebuild(stopped, parent).expect_err("a failure");
        assert_eq!(stopped.processes().len(), n_processes);
        error
    });
    assert!(is(&error), "{error:?}");
    assert_eq!(family.ask_parent(b'l'), seen);
    assert_eq!(family.ask_parent(b'c'), "0");
}

#[test]
fn what_cannot_be_rebuilt_leaves_everything_as_it_was() {
    let command = format!("exec {} heap,shared", program("memory").display());
    let mut family = Family::start(&command, &[]);
    assert_eq!(family.voice.ask(b'x'), "ready");
    let parent = family.parent.0.pid();
    let shared = family.checkpoint(family.child, "t1");
    let command = format!("exec {}", program("kin").display());
    let mut other = Family::start(&command, &[]);
    assert_eq!(other.voice.ask(b'x'), "ready");
    let mut past = other.checkpoint(other.child, "t1");
    let above = other.parent.0.pid();
    let refused = |error: &TemplateError, refusal: TemplateRefusal| matches!(error, TemplateError::Refused(one) if *one == refusal);
    // It lives.
    let pid = past.kin.pid;
    fails(&mut other, &past, above, |error| refused(error, TemplateRefusal::NumberTaken { number: pid }));
    assert_eq!(other.voice.ask(b'c'), "0");
    other.lose_child();
    // The parent is not among the stopped.
    fails(&mut other, &past, parent, |error| matches!(error, TemplateError::Inject(_)));
    // Nobody is in its group.
    let kin = past.kin;
    past.kin.group = free_number();
    fails(&mut other, &past, above, |error| refused(error, TemplateRefusal::Group { pid, group: past.kin.group }));
    past.kin = Kin { session: 1, ..kin };
    fails(&mut other, &past, above, |error| refused(error, TemplateRefusal::Session { pid, session: 1 }));
    past.kin = kin;
    other.rebuild(&past);
    assert_eq!(other.voice.ask(b'c'), "0");
    // Shared memory that nobody has.
    family.lose_child();
    fails(&mut family, &shared, parent, |error| {
        matches!(error, TemplateError::Refused(TemplateRefusal::Lost { kind: "shared memory", .. }))
    });
    remove(shared.point.template);
    remove(past.point.template);
}

/// Not a test: the engine that is to fail, when told a group, a parent and its child.
#[test]
fn engine_that_will_fail() {
    let variable = |name| std::env::var(name).ok();
    let (Some(group), Some(parent), Some(child)) =
        (variable("DELTABOX_TEST_GROUP"), variable("DELTABOX_TEST_PARENT"), variable("DELTABOX_TEST_CHILD"))
    else {
        return;
    };
    let [parent, child]: [pid_t; 2] = [parent, child].map(|number| number.parse().expect("a pid"));
    let group = std::path::Path::new(&group);
    let stop = || Request { group, excluded: &[], deadline: Instant::now() + PATIENCE };
    let freezer = Freezer::create(group, "t1").expect("a frozen cgroup");
    let made = while_stopped(stop(), |stopped| {
        let kin = Kin::read(child).expect("kin");
        let threads = Threads::read(stopped, child).expect("threads");
        let signals = Signals::read(stopped, child).expect("signals");
        let (template, outline) = Template::make(stopped, child, freezer, &Default::default()).expect("a template");
        (kin, threads, signals, template, outline)
    });
    let (kin, threads, signals, template, outline) = made.expect("stop");
    let memory = outline.complete(&template).expect("a description");
    let before = Before { point: Point { template, memory, threads }, signals, kin };
    kill(Pid::from_raw(child), Signal::SIGKILL).expect("kill");
    wait_until("it ends", || End::read(child).expect("a status").is_some());
    let rebuilt = while_stopped(stop(), |stopped| {
        let mut hand = stopped.hand(parent).expect("a hand");
        let child = u64::try_from(child).expect("a pid");
        assert_eq!(hand.call(libc::SYS_wait4, [child, 0, 0, 0, 0, 0]).expect("a call").cast_unsigned(), child);
        hand.close().expect("close");
        let n_processes = stopped.processes().len();
        let rebuilt = before.rebuild(stopped, parent);
        assert_eq!(stopped.processes().len(), n_processes + usize::from(rebuilt.is_ok()));
        rebuilt
    });
    // 3 tells of a failure that was told.
    std::process::exit(if rebuilt.expect("stop").is_err() { 3 } else { 0 });
}

/// What a parent sees of an engine that fails, or dies, in a rebuild.
fn engine_ends(point: &str, action: &str) {
    let command = format!("exec {}", program("kin").display());
    let mut family = Family::start(&command, &[]);
    assert_eq!(family.voice.ask(b'x'), "ready");
    let status = std::process::Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "rebuilt::engine_that_will_fail", "--nocapture"])
        .env("DELTABOX_TEST_GROUP", &family.parent.0.group.0)
        .env("DELTABOX_TEST_PARENT", family.parent.0.pid().to_string())
        .env("DELTABOX_TEST_CHILD", family.child.to_string())
        .env("DELTABOX_FAULT", format!("{point}:{action}"))
        .status()
        .expect("run an engine");
    let ended = (status.code(), std::os::unix::process::ExitStatusExt::signal(&status));
    if action == "kill" {
        assert_eq!(ended, (None, Some(9)), "{point}");
        assert_eq!(family.ask_parent(b'w'), format!("{} 9", family.child), "{point}");
    } else {
        assert_eq!(ended, (Some(3), None), "{point}");
        // The only signal is that of its first end.
        assert_eq!(family.ask_parent(b'l'), format!("1 {}", -libc::ECHILD), "{point}");
    }
    assert!(children(family.parent.0.pid()).is_empty());
    assert_eq!(family.ask_parent(b'm'), "1");
    let freezer = Freezer::open(family.parent.0.group.0.join("t1")).expect("a cgroup");
    remove(Template::find(freezer).expect("look").expect("a template"));
}

macro_rules! points {
    ($($test:ident $point:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            engine_ends($point, "error");
            engine_ends($point, "kill");
        })+
    };
}

points! {
    a_child_that_was_only_born_never_runs "rebuild.born",
    a_child_with_foreign_memory_never_runs "rebuild.begun",
    a_child_without_memory_never_runs "rebuild.cleared",
    a_child_without_threads_never_runs "rebuild.filled",
    a_child_that_nobody_lets_go_never_runs "rebuild.furnished",
}

#[test]
#[ignore = "a measurement"]
fn measure_rebuilt() {
    for (parent_mb, child_mb) in [(0, 1), (0, 50), (200, 1), (200, 50), (1000, 1)] {
        let command = format!("BIG_MB={child_mb} exec {} big", program("memory").display());
        let mut family = Family::start(&command, &[("FILL_MB", parent_mb.to_string().as_str())]);
        assert_eq!(family.voice.ask(b'x'), "ready");
        let past = family.checkpoint(family.child, "t1");
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..7 {
            family.lose_child();
            let (pid, name) = (family.parent.0.pid(), family.name.clone());
            times.push(family.parent.0.group.stopped(|stopped| {
                let begin = Instant::now();
                let child = past.rebuild(stopped, pid).expect("a rebuilt process");
                let time = begin.elapsed();
                connect(stopped, child, &name);
                time
            }));
            family.voice = Voice::accept(&family.listener);
            assert_eq!(family.voice.ask(b'c'), "ok");
        }
        times.sort_unstable();
        println!("parent {parent_mb} MB, child {child_mb} MB: median {:?}, best {:?}", times[3], times[0]);
        remove(past.point.template);
    }
}
