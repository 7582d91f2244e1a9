//! What a process is apart from memory: changed by the program, put back by the engine, confirmed by the program.

mod killed;
mod measured;
mod person;
#[path = "../stop_inject/target.rs"]
#[expect(dead_code, reason = "some of it is for tests of stops alone")]
mod target;

use deltabox::deltacr::state::Signals;
use libc::pid_t;

use target::Target;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Host,
    /// With a user namespace, a filter and few capabilities, as PID 2.
    Sandbox,
}

/// A program, and its host PID.
fn start(name: &str, kinds: &str, place: Where) -> (Target, pid_t) {
    let variables: &[_] = if place == Where::Sandbox { &[("SANDBOX", "1")] } else { &[] };
    let target = Target::start_as(name, kinds, variables);
    let pid = if place == Where::Sandbox { second_inside(&target) } else { target.pid() };
    (target, pid)
}

/// The process of the group with PID 2 in a namespace.
fn second_inside(target: &Target) -> pid_t {
    let list = std::fs::read_to_string(target.group.0.join("cgroup.procs")).expect("processes");
    let is_second = |pid: &pid_t| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("NSpid:")).unwrap_or_default().to_owned();
        line.split_ascii_whitespace().skip(2).eq(["2"])
    };
    list.lines().filter_map(|line| line.parse().ok()).find(is_second).expect("PID 2 inside")
}

fn tell(target: &mut Target, letter: u8) -> String {
    use std::io::Write;
    target.input.as_mut().expect("an input").write_all(&[letter]).expect("write to the program");
    target.line()
}

/// Read, changed and put back twice, and once more with nothing changed.
fn comes_back(kinds: &str) {
    for place in [Where::Host, Where::Sandbox] {
        let (mut target, pid) = start("state", kinds, place);
        assert_eq!(tell(&mut target, b'c'), "ok", "{kinds} {place:?}");
        let signals = target.group.stopped(|stopped| Signals::read(stopped, pid).expect("read"));
        for letters in ["mc", "mc", "c"] {
            for letter in letters.bytes() {
                if letter == b'm' {
                    assert_eq!(tell(&mut target, letter), "ok", "{kinds} {place:?}");
                    assert_ne!(tell(&mut target, b'c'), "ok", "{kinds} {place:?}: it has not changed");
                }
                target.group.stopped(|stopped| signals.put_back(stopped, pid).expect("put back"));
            }
            assert_eq!(tell(&mut target, b'c'), "ok", "{kinds} {place:?}");
            let now = target.group.stopped(|stopped| Signals::read(stopped, pid).expect("read"));
            // Timers have run on.
            if !kinds.contains("timers") {
                assert_eq!(now, signals, "{kinds} {place:?}: from outside it looks different");
            }
        }
    }
}

macro_rules! kinds {
    ($($test:ident $kinds:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            comes_back($kinds);
        })+
    };
}

kinds! {
    actions_come_back "actions",
    stacks_of_handlers_come_back "stacks",
    waiting_signals_come_back_with_what_they_say "pending",
    interval_timers_come_back "timers",
    all_of_signals_comes_back "actions,stacks,pending",
}
