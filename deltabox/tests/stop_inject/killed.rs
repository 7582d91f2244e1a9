//! Engines that are killed (-9) at any moment leave programs that run on by themselves.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::{Request, while_stopped};

use crate::target::{Target, n_rounds};

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
            Request { group: Path::new(&group), excluded: &[], deadline: Instant::now() + Duration::from_secs(30) };
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

/// An engine in a process of its own.
fn engine(test: &str, target: &Target) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--exact", test, "--nocapture"])
        .env("DELTABOX_TEST_GROUP", &target.group.0)
        .env("DELTABOX_TEST_PID", target.pid().to_string())
        .stderr(Stdio::null());
    command
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
        let mut engine = engine("killed::engine_that_will_be_killed", &target)
            .stdout(Stdio::piped())
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
fn wide_registers_survive_killed_engines() {
    if std::arch::is_x86_feature_detected!("avx512f") {
        survives_engines("spins512", "", false);
    } else {
        println!("skipped: this CPU has no AVX-512");
    }
}

#[test]
fn calls_with_timeouts_survive_killed_engines() {
    survives_engines("waits", "naps", false);
}

#[test]
fn running_code_survives_engines_killed_at_their_first_steps() {
    survives_engines("spins", "", true);
}

/// The engine fails or is killed at a step of its first stop and hand. The area is there already, unless `fresh`.
fn goes_on_after(point: &str, action: &str, fresh: bool) {
    for (name, mode) in [("spins", ""), ("waits", "read"), ("waits", "nanosleep"), ("waits", "cond")] {
        let mut target = Target::start(name, mode);
        if !fresh {
            target.disturb();
        }
        let what = format!("{point}:{action} in {name} {mode}, fresh {fresh}");
        let mut engine = engine("killed::engine_that_will_be_killed", &target);
        let status = engine.env("DELTABOX_FAULT", format!("{point}:{action}")).stdout(Stdio::null()).status();
        let status = status.expect("run an engine");
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, (action == "kill").then_some(9), "{what}: the engine ended with {status}");
        assert!(!status.success(), "{what}: nothing happened to the engine");
        assert!(target.status("TracerPid").ends_with("\t0"), "{what}");
        // The sleep may be over.
        if mode != "nanosleep" || target.disturb() {
            target.byte();
        }
        assert_eq!(target.finish(), "ok", "{what}");
    }
}

macro_rules! points {
    ($($test:ident $point:literal $($fresh:literal)+),+ $(,)?) => {
        $(#[test]
        fn $test() {
            for action in ["kill", "error"] {
                $(goes_on_after($point, action, $fresh);)+
            }
        })+
    };
}

points! {
    programs_go_on_without_an_engine_that_has_interrupted_them "stop.interrupted" false,
    programs_go_on_without_an_engine_that_has_stopped_them "stop.halted" false,
    programs_go_on_without_an_engine_that_has_written_boot_code "inject.prepared" true,
    programs_go_on_without_an_engine_that_has_set_registers "inject.registers" true false,
    programs_go_on_without_an_engine_that_has_blocked_signals "inject.masked" true false,
    programs_go_on_without_an_engine_that_has_queued_the_marker "inject.queued" true false,
    programs_go_on_without_an_engine_that_has_let_injected_code_run "inject.resumed" true false,
    programs_go_on_without_an_engine_that_has_seen_the_marker "inject.marked" true false,
    programs_go_on_without_an_engine_that_has_recorded_the_area "inject.recorded" true false,
    programs_go_on_without_an_engine_that_is_about_to_leave "inject.leaving" true false,
    programs_go_on_without_an_engine_that_has_restored_the_mask "inject.unmasked" true false,
    programs_go_on_without_an_engine_that_has_restored_registers "inject.left" true false,
}

/// Not a test: the engine that injects a call which blocks.
#[test]
fn engine_that_blocks() {
    let (Some(group), Ok(pid)) = (std::env::var_os("DELTABOX_TEST_GROUP"), std::env::var("DELTABOX_TEST_PID")) else {
        return;
    };
    let pid: libc::pid_t = pid.parse().expect("a pid");
    let request =
        Request { group: Path::new(&group), excluded: &[], deadline: Instant::now() + Duration::from_secs(30) };
    let _ = while_stopped(request, |stopped| stopped.hand(pid).expect("a hand").call(libc::SYS_pause, [0; 6]));
}

#[test]
fn an_orphan_blocked_in_an_injected_call_is_found_at_a_stop_without_a_hand() {
    let mut target = Target::start("waits", "read");
    let mut engine =
        engine("killed::engine_that_blocks", &target).stdout(Stdio::null()).spawn().expect("start an engine");
    let pause = format!("{} ", libc::SYS_pause);
    let end = Instant::now() + Duration::from_secs(30);
    while !std::fs::read_to_string(format!("/proc/{}/syscall", target.pid())).expect("syscall").starts_with(&pause) {
        assert!(Instant::now() < end, "no injected call");
        std::thread::yield_now();
    }
    engine.kill().expect("kill the engine");
    engine.wait().expect("reap the engine");
    let registers = target.group.stopped(|stopped| stopped.processes()[0].threads[0].registers);
    assert_eq!(registers.orig_rax, libc::SYS_read.cast_unsigned(), "its own call");
    target.byte();
    assert_eq!(target.finish(), "ok");
}
