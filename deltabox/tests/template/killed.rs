//! Engines that fail or are killed (-9) while they make a template: the program goes on as itself.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use deltabox::deltacr::stop::{Request as Stop, while_stopped};
use deltabox::deltacr::template::{Freezer, Request, Template};

use crate::{PATIENCE, Subject, mappings, reap};

const NAME: &str = "t1";

/// Not a test: the engine that is killed by the next one, when told a group and a process.
#[test]
fn engine_that_will_be_killed() {
    let (Some(group), Ok(pid)) = (std::env::var_os("DELTABOX_TEST_GROUP"), std::env::var("DELTABOX_TEST_PID")) else {
        return;
    };
    let pid: libc::pid_t = pid.parse().expect("a pid");
    let group = Path::new(&group);
    loop {
        let freezer = Freezer::create(group, NAME).expect("a cgroup");
        let stop = Stop { group, excluded: &[], deadline: Instant::now() + Duration::from_secs(30) };
        let made = while_stopped(stop, |stopped| Template::make(stopped, pid, freezer, &Request::default()));
        let (template, _) = made.expect("stop").expect("a template");
        template.remove(PATIENCE).expect("remove");
    }
}

fn engine(subject: &Subject) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--exact", "killed::engine_that_will_be_killed", "--nocapture"])
        .env("DELTABOX_TEST_GROUP", &subject.0.group.0)
        .env("DELTABOX_TEST_PID", subject.0.pid().to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// What a next engine does: removes what is there. `None`: there was no group; else whether it held a template.
fn clean_up(subject: &Subject) -> Option<bool> {
    let path = subject.0.group.0.join(NAME);
    if !path.exists() {
        return None;
    }
    let state = fs::read_to_string(path.join("cgroup.freeze")).expect("state");
    if state.trim() != "1" {
        fs::remove_dir(&path).expect("remove a group that nothing could enter");
        return Some(false);
    }
    let end = Instant::now() + PATIENCE;
    loop {
        match Template::find(Freezer::open(path.clone()).expect("a group")).expect("look") {
            Ok(template) => {
                let pid = template.pid();
                template.remove(PATIENCE).expect("remove a template");
                reap(pid);
                return Some(true);
            }
            // The helper of the dead engine may be about to make one: it is still there then.
            Err(freezer) if n_processes(subject) > 1 && Instant::now() < end => drop(freezer),
            Err(freezer) => match freezer.remove() {
                Ok(()) => return Some(false),
                // Born between the two looks.
                Err(error) => assert!(Instant::now() < end, "remove an empty group: {error}"),
            },
        }
    }
}

fn n_processes(subject: &Subject) -> usize {
    fs::read_to_string(subject.0.group.0.join("cgroup.procs")).expect("processes").lines().count()
}

const KINDS: &str = "heap,unforked,wiped,both,shared,threads,reaper";

/// The flags of every mapping of the program are its own again, it has no child, and nothing is left over.
fn goes_on(subject: &mut Subject, before: &[deltabox::deltacr::template::Mapping]) {
    // An orphan needs microseconds; the stop waits for it.
    assert!(subject.0.disturb(), "the program ended");
    assert!(subject.0.status("TracerPid").ends_with("\t0"));
    assert_eq!(mappings(subject.0.pid()), before);
    subject.tell(b's');
    subject.tell(b'c');
}

fn goes_on_after(point: &str, action: &str, has_template: bool) {
    let mut subject = Subject::start(KINDS);
    subject.0.disturb();
    let before = mappings(subject.0.pid());
    let status = engine(&subject).env("DELTABOX_FAULT", format!("{point}:{action}")).status().expect("run an engine");
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, (action == "kill").then_some(9), "{point}: the engine ended with {status}");
    assert!(!status.success(), "nothing happened to the engine");
    let left = clean_up(&subject);
    let expected = (action == "kill").then_some(has_template);
    assert_eq!(left, expected, "{point}:{action}");
    goes_on(&mut subject, &before);
}

macro_rules! points {
    ($($test:ident $point:literal $has_template:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            goes_on_after($point, "kill", $has_template);
            goes_on_after($point, "error", $has_template);
        })+
    };
}

points! {
    a_program_goes_on_without_an_engine_that_has_met_the_helper "template.born" false,
    a_program_goes_on_without_an_engine_that_has_given_the_cgroup "template.attended" true,
    a_program_goes_on_without_an_engine_that_has_its_template "template.cloned" true,
}

#[test]
fn programs_survive_engines_killed_at_any_moment() {
    let mut subject = Subject::start("heap,unforked,wiped,shared,threads");
    subject.0.disturb();
    let before = mappings(subject.0.pid());
    let mut random = 12345_u64;
    let mut n_found = 0;
    for _ in 0..crate::target::n_rounds() {
        let mut engine = engine(&subject).spawn().expect("start an engine");
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let end = Instant::now() + Duration::from_micros(3000 + (random >> 33) % 6000);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        engine.kill().expect("kill the engine");
        engine.wait().expect("reap the engine");
        n_found += usize::from(clean_up(&subject) == Some(true));
        assert!(subject.0.disturb(), "the program ended");
        assert_eq!(mappings(subject.0.pid()), before);
    }
    println!("{n_found} templates outlived their engines");
    subject.tell(b's');
    subject.tell(b'c');
}
