//! Who a process is: changed by the program, put back by the engine, confirmed by the program. On the host and as in a
//! sandbox, where the program has a user namespace, a filter and few capabilities.

#![expect(clippy::panic, reason = "what is not expected fails the test, with what there was instead")]

use std::collections::BTreeSet;

use deltabox::deltacr::state::{Person, StateError};
use libc::pid_t;

use crate::target::Target;
use crate::{Where, second_inside, tell};

fn start(kinds: &str, place: Where) -> (Target, pid_t) {
    crate::start("person", kinds, place)
}

fn read(target: &Target, pid: pid_t) -> Person {
    target.group.stopped(|stopped| Person::read(stopped, pid).expect("read"))
}

fn put_back(target: &Target, pid: pid_t, person: &Person) -> Result<(), StateError> {
    target.group.stopped(|stopped| person.put_back(stopped, pid))
}

/// Read, changed and put back twice, and once more with nothing changed.
fn comes_back(kinds: &str) {
    for place in [Where::Host, Where::Sandbox] {
        let (mut target, pid) = start(kinds, place);
        assert_eq!(tell(&mut target, b'c'), "ok", "{kinds} {place:?}");
        let person = read(&target, pid);
        let written = serde_json::to_string(&person).expect("write a record");
        assert_eq!(serde_json::from_str::<Person>(&written).expect("read a record"), person);
        for letters in ["mc", "mc", "c"] {
            if letters.starts_with('m') {
                assert_eq!(tell(&mut target, b'm'), "ok", "{kinds} {place:?}");
                let bad = tell(&mut target, b'c');
                assert!(bad.starts_with("bad"), "{kinds} {place:?}: it has not changed: {bad}");
            }
            if let Err(error) = put_back(&target, pid, &person) {
                panic!("{kinds} {place:?}: {error}");
            }
            assert_eq!(tell(&mut target, b'c'), "ok", "{kinds} {place:?}");
            assert_eq!(read(&target, pid), person, "{kinds} {place:?}: from outside it looks different");
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
    users_and_groups_of_each_thread_come_back_and_what_they_forget "ids",
    users_come_back_without_any_capability "user",
    capabilities_and_securebits_of_each_thread_come_back "caps",
    limits_come_back "limits",
    policy_nice_affinity_and_slack_of_each_thread_come_back "schedule",
    names_umask_personality_and_parents_signals_come_back "habits",
    dumpable_subreaper_huge_pages_and_score_come_back "traits",
    a_process_comes_back_to_its_group "group",
    a_leader_of_a_group_comes_back_to_its_own "leader",
    all_of_a_process_comes_back "caps,limits,schedule,habits,traits,group",
    a_user_without_capabilities_comes_back_with_limits_and_names "user,limits,habits,group",
}

/// Changed beyond return: refused by what is known, by name; nothing is touched.
fn does_not_come_back(kinds: &str, what: &str) {
    for place in [Where::Host, Where::Sandbox] {
        let (mut target, pid) = start(kinds, place);
        let person = read(&target, pid);
        assert_eq!(tell(&mut target, b'm'), "ok", "{kinds} {place:?}");
        let now = read(&target, pid);
        let impossible = person.can_be_put_back(&now).expect_err("there is no way back");
        assert_eq!(impossible.what, what, "{kinds} {place:?}: {impossible}");
        assert_eq!(impossible.pid, if place == Where::Sandbox { 2 } else { pid });
        assert_ne!(impossible.was, impossible.is);
        match put_back(&target, pid, &person) {
            Err(StateError::Impossible(refused)) => assert_eq!(refused, impossible),
            other => panic!("{kinds} {place:?}: {other:?}"),
        }
        assert_eq!(read(&target, pid), now, "{kinds} {place:?}");
        // It is no other than before, so it is itself again.
        now.can_be_put_back(&now).expect("nothing to do");
    }
}

macro_rules! gone {
    ($($test:ident $kinds:literal $what:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            does_not_come_back($kinds, $what);
        })+
    };
}

gone! {
    no_new_privs_does_not_go "gone-nnp" "no_new_privs",
    a_filter_does_not_go "gone-filter" "seccomp",
    dropped_capabilities_do_not_come_back "gone-caps" "permitted capabilities",
    a_narrower_bound_does_not_widen "gone-bound" "the bound of capabilities",
    root_that_became_a_user_does_not_come_back "gone-user" "permitted capabilities",
    locked_securebits_stay "gone-locked" "securebits",
    a_new_session_is_not_left "gone-session" "the session",
    a_lowered_hard_limit_stays "gone-limit" "the limit of processes",
    another_thread_is_no_way_back "gone-thread" "threads",
}

#[test]
fn a_group_that_is_gone_is_named() {
    for place in [Where::Host, Where::Sandbox] {
        let (mut target, pid) = start("lonely", place);
        let person = read(&target, pid);
        assert_eq!(tell(&mut target, b'm'), "ok");
        person.can_be_put_back(&read(&target, pid)).expect("as far as it can tell");
        let error = put_back(&target, pid, &person).expect_err("no such group");
        assert!(error.to_string().contains("the process group, which is gone now, was"), "{error}");
    }
}

/// A group that all have left is made again by its leader, and only then there is one for the others.
#[test]
fn a_group_comes_back_with_its_leader_first() {
    for place in [Where::Host, Where::Sandbox] {
        let (mut target, pid) = start("single,pair", place);
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
        let child: pid_t = children.trim().parse().expect("one child");
        let (leader, member) = target.group.stopped(|stopped| {
            let mut read = |pid| Person::read(stopped, pid).expect("read");
            (read(pid), read(child))
        });
        for _ in 0..2 {
            assert_eq!(tell(&mut target, b'm'), "ok");
            assert!(tell(&mut target, b'c').starts_with("bad"));
            let error = put_back(&target, child, &member).expect_err("the group is gone");
            assert!(matches!(error, StateError::Impossible(_)), "{error}");
            target.group.stopped(|stopped| {
                leader.put_back(stopped, pid).expect("the leader");
                member.put_back(stopped, child).expect("the other");
            });
            assert_eq!(tell(&mut target, b'c'), "ok", "{place:?}");
        }
    }
}

#[test]
fn keys_of_a_process_are_refused() {
    let (mut target, pid) = start("keyring", Where::Host);
    read(&target, pid);
    assert_eq!(tell(&mut target, b'm'), "ok");
    let error = target.group.stopped(|stopped| Person::read(stopped, pid).expect_err("a keyring"));
    assert!(error.to_string().contains("has a keyring of its own"), "{error}");
    assert_eq!(tell(&mut target, b'c'), "ok");
}

#[test]
fn where_nothing_differs_nothing_is_done() {
    let (target, pid) = start("habits,caps", Where::Sandbox);
    target.group.stopped(|stopped| {
        let person = Person::read(stopped, pid).expect("read");
        // Not even looked at: there is no such process.
        person.put_back_from(&person, stopped, 1).expect("nothing to do");
        person.signals.put_back_from(&person.signals, stopped, 1).expect_err("signals that wait are looked at");
    });
}

#[test]
fn a_fork_with_the_same_pid_becomes_what_its_model_was() {
    for kinds in
        ["single,session", "single,session,habits,schedule,limits,traits", "single,session,ids", "single,session,caps"]
    {
        let (mut target, pid) = start(kinds, Where::Sandbox);
        let person = read(&target, pid);
        assert_eq!(tell(&mut target, b'f'), "ok", "{kinds}");
        let fork = second_inside(&target);
        assert_ne!(fork, pid);
        let bad = tell(&mut target, b'c');
        assert!(bad.starts_with("bad"), "{kinds}: a fork inherits all: {bad}");
        if let Err(error) = put_back(&target, fork, &person) {
            panic!("{kinds}: {error}");
        }
        assert_eq!(tell(&mut target, b'c'), "ok", "{kinds}");
        assert_eq!(read(&target, fork), person, "{kinds}");
    }
}

/// Of another parent, with more than it had: what is to be given up is given up.
#[test]
fn another_process_becomes_what_its_model_was() {
    let kinds = "single,poor,ids,habits,schedule,limits,traits";
    let (mut model, pid) = start(kinds, Where::Sandbox);
    assert_eq!(tell(&mut model, b'c'), "ok");
    let person = read(&model, pid);
    let mut other = Target::start_as("person", kinds, &[("SANDBOX", "1"), ("BARE", "1")]);
    let bad = tell(&mut other, b'c');
    assert!(bad.starts_with("bad"), "{bad}");
    let pid = second_inside(&other);
    person.can_be_made_by(&read(&other, pid), 1).expect("it has more");
    let back = read(&other, pid).can_be_made_by(&person, 1).expect_err("it has less");
    assert_eq!(back.what, "the bound of capabilities");
    if let Err(error) = put_back(&other, pid, &person) {
        panic!("{error}");
    }
    assert_eq!(tell(&mut other, b'c'), "ok");
    assert_eq!(read(&other, pid), person);
}

/// Whatever it does to itself: either there is a way back, and it is gone, or it is told beforehand.
#[test]
fn judgement_and_way_back_agree_about_credentials_changed_at_random() {
    let (mut seed, mut n_back, mut n_impossible) = (1_u32, 0, 0);
    for place in [Where::Host, Where::Sandbox] {
        for _ in 0..20 {
            let (mut target, pid) = start("single", place);
            let mut change = |target: &mut Target| {
                use std::io::Write;
                seed = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                let bytes = [&b"r"[..], &seed.to_le_bytes()].concat();
                target.input.as_mut().expect("an input").write_all(&bytes).expect("write to the program");
                assert_eq!(target.line(), "ok");
                seed
            };
            let first = change(&mut target);
            let mut person = read(&target, pid);
            for _ in 0..8 {
                let then = change(&mut target);
                let now = read(&target, pid);
                match (person.can_be_put_back(&now), put_back(&target, pid, &person)) {
                    (Ok(()), Ok(())) => {
                        n_back += usize::from(now != person);
                        assert_eq!(read(&target, pid), person, "{first} {then}");
                    }
                    (Err(judged), Err(StateError::Impossible(refused))) => {
                        assert_eq!(judged, refused);
                        n_impossible += 1;
                        person = now;
                    }
                    (judged, put) => {
                        panic!("{place:?} {first} {then}: {judged:?}, then {put:?}\n{person:#?}\n{now:#?}")
                    }
                }
            }
        }
    }
    println!("{n_back} times back, {n_impossible} times impossible");
    assert!(n_back > 50 && n_impossible > 30, "{n_back} times back, {n_impossible} times impossible");
}

#[test]
fn filters_of_its_own_are_not_made_again_by_another_parent() {
    let (mut target, pid) = start("gone-filter", Where::Sandbox);
    let (before, with_init) = (read(&target, pid), 1);
    before.can_be_made_by(&before, with_init).expect("no filter but init's");
    assert_eq!(tell(&mut target, b'm'), "ok");
    let after = read(&target, pid);
    after.can_be_put_back(&after).expect("the same process");
    let impossible = after.can_be_made_by(&after, with_init).expect_err("a filter of its own");
    assert_eq!(impossible.what, "the number of filters");
}

/// Host PIDs of threads tell nothing inside: a record names them as the program does.
#[test]
fn a_record_has_numbers_as_inside() {
    let (target, pid) = start("", Where::Sandbox);
    let written = serde_json::to_value(read(&target, pid)).expect("a record");
    let tids = |threads: &serde_json::Value| -> BTreeSet<i64> {
        let threads = threads.as_array().expect("threads");
        threads.iter().map(|thread| thread["tid"].as_i64().expect("a number")).collect()
    };
    assert_eq!(written["pid"], 2);
    assert_eq!(tids(&written["threads"]), BTreeSet::from([2, 3, 4]));
    assert_eq!(tids(&written["signals"]["threads"]), BTreeSet::from([2, 3, 4]));
    assert_eq!(written["membership"], serde_json::json!({"session": 1, "group": 1, "exit_signal": libc::SIGCHLD}));
}

#[test]
fn a_process_whose_first_thread_has_ended_is_read_by_another() {
    use std::time::{Duration, Instant};
    let target = Target::start("waits", "late-leader");
    let (pid, end) = (target.pid(), Instant::now() + Duration::from_secs(30));
    while target.state() != "Z" {
        assert!(Instant::now() < end, "the first thread does not end");
        std::thread::yield_now();
    }
    let person = read(&target, pid);
    let written = serde_json::to_value(&person).expect("a record");
    assert_eq!(written["pid"], pid);
    assert_eq!(written["membership"]["exit_signal"], libc::SIGCHLD);
    assert_eq!(written["threads"].as_array().expect("threads").len(), 1);
    assert_ne!(written["threads"][0]["tid"], pid);
    put_back(&target, pid, &person).expect("nothing to do");
}
