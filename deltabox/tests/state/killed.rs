//! Engines that fail or are killed (-9) while they put a process back: it runs on, and the next engine puts it back.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use deltabox::deltacr::state::Person;
use deltabox::deltacr::stop::{Request, while_stopped};

use crate::{Where, start, tell};

/// Not a test: the engine that is killed by the next one, when told a group, a process and a record.
#[test]
fn engine_that_will_be_killed() {
    let Ok(record) = std::env::var("DELTABOX_TEST_RECORD") else { return };
    let group = std::env::var_os("DELTABOX_TEST_GROUP").expect("a group");
    let pid: libc::pid_t = std::env::var("DELTABOX_TEST_PID").expect("a process").parse().expect("a pid");
    let person: Person = serde_json::from_str(&record).expect("a record");
    let request =
        Request { group: Path::new(&group), excluded: &[], deadline: Instant::now() + Duration::from_secs(30) };
    while_stopped(request, |stopped| person.put_back(stopped, pid)).expect("stop").expect("put back");
}

fn goes_on_after(point: &str, program: &str, kinds: &str, is_untouched: bool) {
    for place in [Where::Host, Where::Sandbox] {
        for action in ["kill", "error"] {
            let (mut target, pid) = start(program, kinds, place);
            let read =
                |target: &crate::Target| target.group.stopped(|stopped| Person::read(stopped, pid).expect("read"));
            assert_eq!(tell(&mut target, b'c'), "ok");
            let person = read(&target);
            assert_eq!(tell(&mut target, b'm'), "ok");
            let changed = read(&target);
            let engine = Command::new(std::env::current_exe().expect("own path"))
                .args(["--exact", "killed::engine_that_will_be_killed", "--nocapture"])
                .env("DELTABOX_TEST_GROUP", &target.group.0)
                .env("DELTABOX_TEST_PID", pid.to_string())
                .env("DELTABOX_TEST_RECORD", serde_json::to_string(&person).expect("a record"))
                .env("DELTABOX_FAULT", format!("{point}:{action}"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .expect("run an engine");
            let signal = std::os::unix::process::ExitStatusExt::signal(&engine);
            assert_eq!(signal, (action == "kill").then_some(9), "{point}: the engine ended with {engine}");
            assert!(!engine.success(), "nothing happened to the engine");
            let bad = tell(&mut target, b'c');
            assert!(bad.starts_with("bad"), "{point}:{action}: it is not put back, or does not run: {bad}");
            if is_untouched {
                assert_eq!(read(&target), changed, "{point}:{action}");
            }
            target.group.stopped(|stopped| person.put_back(stopped, pid)).expect("the next engine");
            assert_eq!(tell(&mut target, b'c'), "ok", "{point}:{action}");
        }
    }
}

#[test]
fn a_process_is_as_it_was_after_an_engine_that_has_not_begun() {
    goes_on_after("state.change", "person", "caps,limits,habits,traits,group", true);
}

#[test]
fn a_process_goes_on_after_an_engine_that_has_put_back_one_thread() {
    goes_on_after("state.thread", "person", "ids,limits,habits,group", false);
}

#[test]
fn a_process_goes_on_after_an_engine_that_has_taken_its_waiting_signals() {
    goes_on_after("state.taken", "state", "actions,stacks,pending", false);
}
