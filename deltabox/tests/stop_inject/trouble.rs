//! What stands in the way of a stop: it is waited for or refused, and the programs do not notice.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::{Stopped, Tracer, while_stopped};
use deltabox::deltacr::{InjectError, InjectRefusal, StopError, StopRefusal};

use crate::target::{Target, n_rounds};

#[test]
fn a_process_stopped_by_job_control_stays_stopped_and_continues() {
    use nix::sys::signal::{Signal, kill};
    let mut target = Target::start("waits", "cond");
    let pid = nix::unistd::Pid::from_raw(target.pid());
    kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
    nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WUNTRACED)).expect("it stops");
    for _ in 0..n_rounds() {
        assert!(target.disturb(), "the program ended");
        let end = Instant::now() + Duration::from_secs(30);
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
        match while_stopped(target.group.request(Duration::from_secs(30)), |_| ()) {
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
        let request = target.group.request(Duration::from_secs(30));
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

fn goes_through(mode: &str) {
    let mut target = Target::start("trouble", mode);
    for _ in 0..n_rounds() {
        assert!(target.disturb(), "the program ended");
    }
    target.byte();
    assert_eq!(target.finish(), "ok", "{mode}");
}

#[test]
fn programs_that_spawn_others_without_end_are_stopped() {
    goes_through("spawn");
}

#[test]
fn a_program_that_threads_of_its_own_replace_is_stopped() {
    goes_through("exec-thread");
}

/// All of its processes, one call in each.
fn disturb_all(target: &Target, tracer: &mut Tracer) {
    let work = |stopped: &mut Stopped| {
        let pids: Vec<_> = stopped.processes().iter().map(|process| process.pid).collect();
        for pid in &pids {
            let mut hand = stopped.hand(*pid).expect("a hand");
            assert_eq!(hand.call(libc::SYS_getpid, [0; 6]).expect("a call"), i64::from(*pid));
            hand.close().expect("close");
        }
        pids.len()
    };
    let n = tracer.while_stopped(target.group.request(Duration::from_secs(30)), work).expect("stop");
    assert_eq!(n, 3);
}

#[test]
fn a_read_of_a_terminal_goes_on() {
    let mut target = Target::start("trouble", "tty");
    let mut tracer = Tracer::new();
    (0..n_rounds()).for_each(|_| disturb_all(&target, &mut tracer));
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_background_process_that_its_terminal_stopped_stays_so_and_comes_back() {
    let mut target = Target::start("trouble", "tty-background");
    let mut tracer = Tracer::new();
    (0..n_rounds()).for_each(|_| disturb_all(&target, &mut tracer));
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_refused_stop_interrupts_no_call_of_other_processes() {
    let mut target = Target::start("trouble", "traced-epoll");
    for _ in 0..n_rounds() {
        match while_stopped(target.group.request(Duration::from_secs(30)), |_| ()) {
            Err(StopError::Refused(StopRefusal::TracedInside { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_stop_that_waits_for_a_vfork_interrupts_no_call_of_other_threads() {
    let mut target = Target::start("trouble", "vfork-epoll");
    while target.state() != "D" {
        std::thread::yield_now();
    }
    for _ in 0..5 {
        match while_stopped(target.group.request(Duration::from_millis(20)), |_| ()) {
            Err(StopError::Refused(StopRefusal::VforkInFlight { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn an_exec_held_up_by_a_debugger_inside_does_not_hold_up_the_engine() {
    let mut target = Target::start("trouble", "exec-held");
    for _ in 0..3 {
        match while_stopped(target.group.request(Duration::from_millis(50)), |_| ()) {
            Err(StopError::Refused(StopRefusal::Uninterruptible { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_process_without_a_vdso_is_stopped_but_refuses_a_hand() {
    let mut target = Target::start("trouble", "no-vdso");
    let pid = target.pid();
    let error = target.group.stopped(|stopped| stopped.hand(pid).map(drop).expect_err("no place"));
    assert!(matches!(error, InjectError::Refused(InjectRefusal::NoPlace { .. })), "{error}");
    target.byte();
    assert_eq!(target.finish(), "ok");
}

/// A file system that is frozen while this lives.
struct Frozen {
    dir: PathBuf,
}

impl Frozen {
    fn new() -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("frozen-{}", std::process::id()));
        let image = dir.with_extension("img");
        let _ = std::fs::create_dir(&dir);
        std::fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("make an image");
        run("mkfs.ext4", &["-q".as_ref(), image.as_os_str()]);
        run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), dir.as_os_str()]);
        std::fs::remove_file(&image).expect("remove the image's name");
        run("fsfreeze", &["-f".as_ref(), dir.as_os_str()]);
        Self { dir }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let command = |name: &str, args: &[&OsStr]| Command::new(name).args(args).stderr(Stdio::null()).status();
        let _ = command("fsfreeze", &["-u".as_ref(), self.dir.as_os_str()]);
        let _ = command("umount", &["-l".as_ref(), self.dir.as_os_str()]);
        let _ = std::fs::remove_dir(&self.dir);
    }
}

fn run(name: &str, args: &[&OsStr]) {
    let status = Command::new(name).args(args).stdout(Stdio::null()).status().expect("run a program");
    assert!(status.success(), "{name} {args:?}: {status}");
}

#[test]
fn a_process_that_sleeps_uninterruptibly_is_refused_at_the_deadline_and_goes_on() {
    let frozen = Frozen::new();
    let target = Target::start("trouble", &format!("write:{}", frozen.dir.join("file").display()));
    while target.state() != "D" {
        std::thread::yield_now();
    }
    for _ in 0..3 {
        match while_stopped(target.group.request(Duration::from_millis(50)), |_| ()) {
            Err(StopError::Refused(StopRefusal::Uninterruptible { pid, state, .. })) => {
                assert_eq!((pid, state), (target.pid(), 'D'));
            }
            other => panic!("{other:?}"),
        }
    }
    run("fsfreeze", &["-u".as_ref(), frozen.dir.as_os_str()]);
    assert_eq!(target.finish(), "ok");
}

/// Kills the child of the pair at `moment`, while all is stopped; the error that the engine meets.
fn killed(moment: impl FnOnce(&mut Stopped, libc::pid_t, &dyn Fn()) -> Option<InjectError> + Send) {
    let mut target = Target::start("trouble", "pair");
    let child: libc::pid_t = target.line().parse().expect("a pid");
    let parent = target.pid();
    let kill = || nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::SIGKILL).expect("kill");
    target.group.stopped(|stopped| {
        let error = moment(stopped, child, &kill);
        assert!(matches!(error, None | Some(InjectError::Gone { .. })), "{error:?}");
        // The other one is as it was.
        let mut hand = stopped.hand(parent).expect("a hand");
        assert_eq!(hand.call(libc::SYS_getpid, [0; 6]).expect("a call"), i64::from(parent));
    });
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn a_process_killed_during_the_stop_is_gone_and_its_parent_hears_of_it() {
    killed(|_, _, kill| {
        kill();
        None
    });
}

#[test]
fn a_process_killed_before_a_hand_is_gone() {
    killed(|stopped, child, kill| {
        kill();
        Some(stopped.hand(child).and_then(|mut hand| hand.call(libc::SYS_getpid, [0; 6])).expect_err("it is dead"))
    });
}

#[test]
fn a_process_killed_between_calls_is_gone() {
    killed(|stopped, child, kill| {
        let mut hand = stopped.hand(child).expect("a hand");
        hand.call(libc::SYS_getpid, [0; 6]).expect("a call");
        kill();
        Some(hand.call(libc::SYS_getpid, [0; 6]).expect_err("it is dead"))
    });
}

#[test]
fn a_process_killed_in_a_call_is_gone_at_once() {
    killed(|stopped, child, _| {
        let mut hand = stopped.hand(child).expect("a hand");
        // As a sibling, or the kernel for want of memory, would do it.
        let own = hand.call(libc::SYS_getpid, [0; 6]).expect("a call").cast_unsigned();
        let signal = 9;
        Some(hand.call(libc::SYS_kill, [own, signal, 0, 0, 0, 0]).expect_err("it is dead"))
    });
}
