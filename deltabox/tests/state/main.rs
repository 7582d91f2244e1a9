//! What a process is apart from memory: changed by the program, put back by the engine, confirmed by the program.

mod measured;
mod person;
#[path = "../stop_inject/target.rs"]
#[expect(dead_code, reason = "some of it is for tests of stops alone")]
mod target;

use deltabox::deltacr::state::Signals;

use target::Target;

fn tell(target: &mut Target, letter: u8) -> String {
    use std::io::Write;
    target.input.as_mut().expect("an input").write_all(&[letter]).expect("write to the program");
    target.line()
}

/// Read, changed and put back twice, and once more with nothing changed.
fn comes_back(kinds: &str) {
    let mut target = Target::start("state", kinds);
    let pid = target.pid();
    assert_eq!(tell(&mut target, b'c'), "ok", "{kinds}");
    let signals = target.group.stopped(|stopped| Signals::read(stopped, pid).expect("read"));
    for letters in ["mc", "mc", "c"] {
        for letter in letters.bytes() {
            if letter == b'm' {
                assert_eq!(tell(&mut target, letter), "ok", "{kinds}");
                assert_ne!(tell(&mut target, b'c'), "ok", "{kinds}: it has not changed");
            }
            target.group.stopped(|stopped| signals.put_back(stopped, pid).expect("put back"));
        }
        assert_eq!(tell(&mut target, b'c'), "ok", "{kinds}");
        let now = target.group.stopped(|stopped| Signals::read(stopped, pid).expect("read"));
        // Timers have run on.
        if !kinds.contains("timers") {
            assert_eq!(now, signals, "{kinds}: from outside it looks different");
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
