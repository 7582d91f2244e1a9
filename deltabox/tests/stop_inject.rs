//! Programs in every kind of wait are stopped, used for injected calls and let go, and must not notice.
//!
//! The programs (`tests/programs/*.c`) judge themselves and say "ok". Each runs in a cgroup of its own.
//! `DELTABOX_SOAK` multiplies the rounds by ten.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::{Request, Stopped, while_stopped};
use deltabox::deltacr::{StopError, StopRefusal};
use deltabox::kernel::cgroups::Hierarchies;
use deltabox::sandbox::cgroup::remove_tree;

fn n_rounds() -> usize {
    if std::env::var_os("DELTABOX_SOAK").is_some() { 1000 } else { 100 }
}

/// Compiles a program, once for each version of its source, into cargo's directory for that.
fn program(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(format!("{name}.c"));
    let time = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let made = dir.join(format!("stop-inject-{name}"));
    if time(&made).is_none_or(|made| time(&source).is_none_or(|source| source > made)) {
        // Others may ask at the same time: each compiles for itself, the rename decides.
        let own = dir.join(format!("{name}.{}.{:?}", std::process::id(), std::thread::current().id()));
        let compile = ["-O1", "-pthread", "-o"];
        let status = Command::new("cc").args(compile).args([&own, &source]).status().expect("run cc");
        assert!(status.success(), "cc {}", source.display());
        std::fs::rename(&own, &made).expect("rename a program");
    }
    made
}

/// A cgroup that goes with its processes.
struct Group(PathBuf);

impl Group {
    fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let unified = Hierarchies::find().expect("cgroups").unified;
        let dir = unified.join(format!("deltabox-stop-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).expect("make a cgroup");
        Self(dir)
    }

    fn request(&self, deadline: Duration) -> Request<'_> {
        Request { group: &self.0, excluded: &[], deadline: Instant::now() + deadline }
    }

    fn stopped<R: Send>(&self, work: impl FnOnce(&mut Stopped) -> R + Send) -> R {
        while_stopped(self.request(Duration::from_secs(20)), work).expect("stop")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        let end = Instant::now() + Duration::from_secs(5);
        while remove_tree(&self.0).is_err() && Instant::now() < end {
            std::thread::yield_now();
        }
    }
}

/// A program in its group, ready to be disturbed.
struct Target {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    group: Group,
}

impl Target {
    fn start(name: &str, mode: &str) -> Self {
        let group = Group::new();
        let mut child = Command::new(program(name))
            .arg(mode)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a program");
        std::fs::write(group.0.join("cgroup.procs"), child.id().to_string()).expect("move into the cgroup");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("its output"));
        let mut target = Self { child, input, output, group };
        target.byte();
        assert_eq!(target.line(), "ready");
        target
    }

    fn pid(&self) -> libc::pid_t {
        self.child.id().try_into().expect("a pid")
    }

    fn byte(&mut self) {
        self.input.as_mut().expect("an input").write_all(b"x").expect("write to the program");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read from the program");
        line.trim().to_owned()
    }

    fn finish(mut self) -> String {
        let word = self.line();
        self.input = None;
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).expect("read the rest");
        // A child of this very process that ended during a stop was reaped by the tracer.
        let _ = self.child.wait();
        word + &rest
    }

    fn state(&self) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("stat");
        text[text.rfind(')').expect("a name") + 2..][..1].to_owned()
    }

    /// Its memory mappings, but for how they are merged.
    fn n_mappings(&self) -> usize {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("maps").lines().count()
    }

    fn status(&self, field: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        text.lines().find(|line| line.starts_with(field)).expect(field).to_owned()
    }

    /// Stops it, has it say its own PID, lets it go. `false` if it has ended by itself.
    fn disturb(&self) -> bool {
        let pid = self.pid();
        self.group.stopped(|stopped| {
            if stopped.processes().is_empty() {
                return false;
            }
            let mut hand = stopped.hand(pid).expect("a hand");
            let calls = [Call { nr: libc::SYS_getpid, args: [0; 6] }; 3];
            assert_eq!(hand.run(&calls).expect("calls"), [i64::from(pid); 3]);
            hand.close().expect("close");
            true
        })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn goes_through(name: &str, mode: &str) {
    let mut target = Target::start(name, mode);
    // A sleep may be over before all rounds are.
    let goes_on = (0..n_rounds()).all(|_| target.disturb());
    if goes_on {
        target.byte();
    }
    assert_eq!(target.finish(), "ok", "{name} {mode}");
}

macro_rules! waits {
    ($($test:ident $mode:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            goes_through("waits", $mode);
        })+
    };
}

waits! {
    a_read_goes_on "read",
    a_recv_goes_on "recv",
    a_recv_with_a_timeout_goes_on "recv-timeout",
    a_poll_goes_on "poll",
    a_select_goes_on "select",
    an_epoll_wait_goes_on "epoll",
    a_wait_for_a_condition_goes_on "cond",
    a_wait_for_a_mutex_goes_on "mutex",
    a_sem_timedwait_goes_on "sem",
    a_semop_goes_on "semop",
    a_pause_goes_on "pause",
    a_sigsuspend_goes_on "sigsuspend",
    a_sigwaitinfo_goes_on "sigwait",
    an_accept_goes_on "accept",
    a_wait_for_a_child_goes_on "wait4",
    a_nanosleep_is_neither_short_nor_interrupted "nanosleep",
    an_absolute_sleep_is_neither_short_nor_interrupted "clock",
    thirty_two_threads_are_stopped_and_woken "idle32",
    threads_that_come_and_go_are_all_stopped "threads",
    processes_that_come_and_go_are_all_stopped "forks",
    a_filtered_process_is_used_and_filtered_again "filtered",
    a_process_without_its_leader_is_used "late-leader",
}

#[test]
fn registers_of_running_code_do_not_change() {
    goes_through("spins", "");
}

#[test]
fn restartable_sequences_lose_no_increment() {
    goes_through("counts", "");
}

#[test]
fn a_filter_holds_again_after_an_injected_call_passed_it() {
    let mut target = Target::start("waits", "filtered");
    let pid = target.pid();
    let result = target.group.stopped(|stopped| {
        let mut hand = stopped.hand(pid).expect("a hand");
        let anonymous = u64::try_from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).expect("flags");
        let at = hand.call(libc::SYS_mmap, [0, 4096, 0, anonymous, u64::MAX, 0]).expect("mmap");
        hand.call(libc::SYS_munmap, [at.cast_unsigned(), 4096, 0, 0, 0, 0]).expect("munmap")
    });
    assert_eq!(result, 0);
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn strings_pass_through_the_scratch_room_and_errors_come_back() {
    let target = Target::start("waits", "read");
    let pid = target.pid();
    target.group.stopped(|stopped| {
        let mut hand = stopped.hand(pid).expect("a hand");
        let scratch = hand.scratch().start;
        hand.write(scratch, b"/no/such/file\0").expect("write");
        assert_eq!(hand.call(libc::SYS_access, [scratch, 0, 0, 0, 0, 0]).expect("access"), -2);
        // More than one batch.
        let calls = vec![Call { nr: libc::SYS_getpid, args: [0; 6] }; 300];
        assert_eq!(hand.run(&calls).expect("calls"), vec![i64::from(pid); 300]);
        let mut bytes = [0; 5];
        hand.read(scratch, &mut bytes).expect("read");
        assert_eq!(&bytes, b"/no/s");
    });
}

#[test]
fn no_signal_is_lost_or_doubled() {
    let mut target = Target::start("waits", "count");
    let n = 100 * n_rounds();
    let mut sender = Command::new(program("sends"))
        .args([target.pid().to_string(), n.to_string()])
        .spawn()
        .expect("start the sender");
    let mut n_stops = 0;
    while sender.try_wait().expect("the sender's state").is_none() || n_stops < n_rounds() {
        assert!(target.disturb(), "the program ended");
        n_stops += 1;
    }
    assert!(sender.wait().expect("reap").success(), "the sender failed");
    target.byte();
    assert_eq!(target.finish(), n.to_string(), "after {n_stops} stops");
}

#[test]
fn a_process_stopped_by_job_control_stays_stopped_and_continues() {
    use nix::sys::signal::{Signal, kill};
    let mut target = Target::start("waits", "cond");
    let pid = nix::unistd::Pid::from_raw(target.pid());
    kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
    nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WUNTRACED)).expect("it stops");
    for _ in 0..n_rounds() {
        assert!(target.disturb(), "the program ended");
        let end = Instant::now() + Duration::from_secs(10);
        while target.state() != "T" {
            assert!(Instant::now() < end, "state {} after a stop", target.state());
            std::thread::yield_now();
        }
    }
    kill(pid, Signal::SIGCONT).expect("SIGCONT");
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_process_traced_inside_is_refused_and_undisturbed() {
    let mut target = Target::start("waits", "traced");
    for _ in 0..n_rounds() {
        match while_stopped(target.group.request(Duration::from_secs(20)), |_| ()) {
            Err(StopError::Refused(StopRefusal::TracedInside { tracer, .. })) => assert_eq!(tracer, target.pid()),
            other => panic!("{other:?}"),
        }
    }
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_vfork_in_flight_is_refused_at_the_deadline_and_goes_on() {
    let mut target = Target::start("waits", "vfork");
    while target.state() != "D" {
        std::thread::yield_now();
    }
    for _ in 0..3 {
        match while_stopped(target.group.request(Duration::from_millis(50)), |_| ()) {
            Err(StopError::Refused(StopRefusal::VforkInFlight { pid, .. })) => assert_eq!(pid, target.pid()),
            other => panic!("{other:?}"),
        }
    }
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_vfork_in_flight_is_waited_for() {
    for _ in 0..n_rounds() / 10 {
        let mut target = Target::start("waits", "vfork");
        while target.state() != "D" {
            std::thread::yield_now();
        }
        let request = target.group.request(Duration::from_secs(20));
        let mut input = target.input.take().expect("an input");
        let n_threads = std::thread::scope(|scope| {
            let stop = scope.spawn(|| while_stopped(request, |stopped| stopped.n_threads()));
            input.write_all(b"x").expect("let the child execute");
            stop.join().expect("the stopping thread")
        });
        assert!(n_threads.expect("stop") <= 2);
        assert_eq!(target.finish(), "ok");
    }
}

#[test]
fn a_hand_needs_a_stopped_process() {
    let target = Target::start("waits", "read");
    let error = target.group.stopped(|stopped| stopped.hand(1).map(drop).expect_err("not ours"));
    assert!(error.to_string().contains("process 1 is not among"), "{error}");
}

#[test]
fn a_blocked_call_is_given_up_and_the_process_goes_on() {
    let mut target = Target::start("waits", "read");
    let pid = target.pid();
    let error = target.group.stopped(|stopped| {
        let mut hand = stopped.hand(pid).expect("a hand");
        let calls = [Call { nr: libc::SYS_getpid, args: [0; 6] }, Call { nr: libc::SYS_pause, args: [0; 6] }];
        hand.run(&calls).expect_err("pause blocks")
    });
    assert!(error.to_string().contains("injected call 1 in process"), "{error}");
    assert!(target.disturb(), "the program ended");
    target.byte();
    assert_eq!(target.finish(), "ok");
}

/// Not a test: the engine that is killed by the next one, when told a group and a process.
#[test]
fn engine_that_will_be_killed() {
    let (Some(group), Ok(pid)) = (std::env::var_os("DELTABOX_TEST_GROUP"), std::env::var("DELTABOX_TEST_PID")) else {
        return;
    };
    let pid: libc::pid_t = pid.parse().expect("a pid");
    let mut first = true;
    println!("engine begins");
    loop {
        let request =
            Request { group: Path::new(&group), excluded: &[], deadline: Instant::now() + Duration::from_secs(20) };
        let stopped = while_stopped(request, |stopped| {
            let mut hand = stopped.hand(pid).expect("a hand");
            let calls = [Call { nr: libc::SYS_getpid, args: [0; 6] }; 20];
            hand.run(&calls).expect("calls");
            hand.close().expect("close");
        });
        stopped.expect("stop");
        if first {
            println!("engine works");
            first = false;
        }
    }
}

/// `fresh`: each round begins with a process that has no area yet, so that its making is interrupted too.
fn survives_engines(name: &str, mode: &str, fresh: bool) {
    let n = if fresh { n_rounds() } else { 2 * n_rounds() };
    let mut target = Target::start(name, mode);
    target.disturb();
    let n_mappings = target.n_mappings();
    let mask = target.status("SigBlk");
    let mut random = 12345_u64;
    for round in 0..n {
        if fresh {
            target = Target::start(name, mode);
        }
        let mut engine = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "engine_that_will_be_killed", "--nocapture"])
            .env("DELTABOX_TEST_GROUP", &target.group.0)
            .env("DELTABOX_TEST_PID", target.pid().to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start an engine");
        let mut lines = BufReader::new(engine.stdout.take().expect("its output")).lines();
        let sign = if fresh { "engine begins" } else { "engine works" };
        let works = lines.by_ref().map_while(Result::ok).any(|line| line.contains(sign));
        assert!(works, "the engine does not work in round {round}");
        // Any moment of a few milliseconds: busy, because a sleep ends at the timer's moments.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        const SPAN_US: u64 = 1000;
        let end = Instant::now() + Duration::from_micros((random >> 33) % SPAN_US);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        engine.kill().expect("kill the engine");
        engine.wait().expect("reap the engine");
        if fresh {
            assert!(target.disturb(), "the program ended");
            target.byte();
            assert_eq!(target.line(), "ok", "round {round}");
        }
    }
    if !fresh {
        assert!(target.disturb(), "the program ended");
        assert_eq!(target.n_mappings(), n_mappings, "mappings are left behind");
        assert_eq!(target.status("SigBlk"), mask, "the signal mask changed");
        assert!(target.status("TracerPid").ends_with("\t0"));
        target.byte();
        assert_eq!(target.finish(), "ok");
    }
}

#[test]
fn running_code_survives_killed_engines() {
    survives_engines("spins", "", false);
}

#[test]
fn calls_with_timeouts_survive_killed_engines() {
    survives_engines("waits", "naps", false);
}

#[test]
fn running_code_survives_engines_killed_at_their_first_steps() {
    survives_engines("spins", "", true);
}

/// Not a test: prints the numbers of docs/stop-and-inject.md. Run with `--release --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn measure() {
    fn show(what: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_nanos() / 100;
        let us = |tenths: u128| format!("{}.{}", tenths / 10, tenths % 10);
        println!("{what:40} p50 {:>8} us  p99 {:>8} us  n {}", us(at(50)), us(at(99)), times.len());
    }
    for (mode, n_threads) in [("read", 2), ("idle4", 4), ("idle32", 32)] {
        let target = Target::start("waits", mode);
        let (mut whole, mut inside) = (Vec::new(), Vec::new());
        for _ in 0..1000 {
            let begin = Instant::now();
            let stopped = target.group.stopped(|stopped| {
                assert_eq!(stopped.n_threads(), n_threads);
                Instant::now()
            });
            inside.push(stopped - begin);
            whole.push(begin.elapsed());
        }
        show(&format!("thread start + stop, {n_threads} threads"), inside);
        show("the same + resume + thread end", whole);
    }
    let target = Target::start("waits", "read");
    let pid = target.pid();
    let (mut open, mut one, mut many) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..1000 {
        target.group.stopped(|stopped| {
            let begin = Instant::now();
            let mut hand = stopped.hand(pid).expect("a hand");
            open.push(begin.elapsed());
            let call = Call { nr: libc::SYS_getpid, args: [0; 6] };
            let begin = Instant::now();
            hand.run(&[call]).expect("a call");
            one.push(begin.elapsed());
            let begin = Instant::now();
            hand.run(&[call; 64]).expect("calls");
            many.push(begin.elapsed());
        });
    }
    show("hand", open);
    show("one call", one);
    show("64 calls", many);
}
