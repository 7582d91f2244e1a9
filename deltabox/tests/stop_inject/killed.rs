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
            .args(["--exact", "killed::engine_that_will_be_killed", "--nocapture"])
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
