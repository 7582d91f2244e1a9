//! What stands in the way of a stop: it is waited for or refused, and the programs do not notice.

use std::io::Write;
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::while_stopped;
use deltabox::deltacr::{StopError, StopRefusal};

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
