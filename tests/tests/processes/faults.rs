//! Failures and deaths of the engine at each step, and what they leave.

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use serde_json::json;

use crate::{checkpoint, roll_back};

fn start(fault: &str) -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start_with(&[("DELTABOX_FAULT", fault)]);
    host.create("box");
    let worker = Worker::start_as(&host, "box", &["/usr/bin/python3"]);
    Some((host, worker))
}

/// Names of the cgroups of templates.
fn templates(host: &Host) -> Vec<String> {
    let group = host.inspect("box")["cgroup"].as_str().expect("a cgroup").to_owned();
    let entries = std::fs::read_dir(group).expect("the cgroup");
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with('t')).collect()
}

#[test]
fn a_checkpoint_that_fails_at_any_step_leaves_the_program_and_nothing_else() {
    for fault in [
        "moment.take",
        "template.cloned",
        "template.attended",
        "switch.pivot",
        "rebase.give",
        "moment.save",
        "tree.write",
    ] {
        let Some((host, mut worker)) = start(fault) else { return };
        worker.ask("n = 1; f = open('/srv/f', 'w'); f.write('one'); f.flush()");
        let failed = host.cli(["--json", "checkpoint", "box"]);
        assert_eq!(failed.code(), 1, "{fault}: {failed:?}");
        let message = failed.error()["message"].as_str().expect("a message").to_owned();
        assert!(message.contains(fault), "{message}");
        wait_within(60, "its templates are gone", || templates(&host).is_empty());
        assert_eq!(
            worker.ask("f.write('two'); f.flush(); [n, open('/srv/f').read()]"),
            json!([1, "onetwo"]),
            "{fault}"
        );
        // And again: a failure uses nothing up.
        assert_eq!(host.cli(["checkpoint", "box"]).code(), 1);
        let host = host.restart_without_faults();
        checkpoint(&host);
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "onetwo");
    }
}

#[test]
fn a_rollback_that_fails_before_anything_has_changed_changes_nothing() {
    let Some((host, mut worker)) = start("moment.prepare") else { return };
    worker.ask("n = 1; open('/srv/f', 'w').write('one')");
    let id = checkpoint(&host);
    worker.ask("n = 2; open('/srv/f', 'w').write('two')");
    for _ in 0..2 {
        let failed = host.cli(["--json", "rollback", "box", &id]);
        assert_eq!(failed.code(), 1, "{failed:?}");
        assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "two"]));
    }
    checkpoint(&host);
    assert!(worker.end().success());
}

#[test]
fn a_rollback_that_fails_half_way_leaves_files_and_checkpoints_and_no_process() {
    // Once more when all are made anew.
    for fault in ["moment.end", "moment.restore"] {
        let Some((host, mut worker)) = start(fault) else { return };
        worker.ask("os.umask(0o77); open('/srv/f', 'w').write('one')");
        let id = checkpoint(&host);
        worker.ask("os.umask(0); open('/srv/f', 'w').write('two')");
        let failed = host.cli(["--json", "rollback", "box", &id]);
        assert_eq!(failed.code(), 1, "{fault}: {failed:?}");
        assert_eq!(failed.error()["code"], json!("lost"), "{fault}");
        assert_eq!(worker.wait().code(), Some(128 + 9));
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "one", "{fault}");
        let ps = host.cli(["--json", "ps", "box"]).json();
        assert_eq!(ps["processes"].as_array().expect("processes").len(), 1);
        assert_eq!(host.cli(["--json", "tree", "box"]).json()["head"], json!(id));
        // It can be worked with.
        host.cli(["checkpoint", "box", "--fs-only"]).ok();
    }
}

/// A program with a child, and one for whose end it has not waited; they go when it is told to.
const FAMILY: &str = "
import os, time
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    while True: time.sleep(1)
zombie = os.fork()
if zombie == 0: os._exit(3)
os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
while os.getpgid(child) != child: time.sleep(0.001)
open('/srv/f', 'w').write('one')
while True:
    if os.path.exists('/srv/go'):
        os.unlink('/srv/go'); os.kill(child, 9); os.waitpid(child, 0); os.waitpid(zombie, 0); open('/srv/f', 'w').write('two')
    time.sleep(0.001)";

#[test]
fn a_rollback_that_fails_or_dies_while_it_makes_processes_leaves_no_half_of_one() {
    let faults = ["rebuild.born", "rebuild.cleared", "rebuild.furnished", "family.groups", "family.zombies"];
    for (fault, kills) in faults.iter().flat_map(|fault| [(fault, false), (fault, true)]) {
        if skipped_without_root() {
            return;
        }
        let fault = format!("{fault}{}", if kills { ":kill" } else { "" });
        let mut host = Host::start_with(&[("DELTABOX_FAULT", &fault)]);
        host.create("box");
        let pid = host.cli(["exec", "-d", "box", "--", "/usr/bin/python3", "-c", FAMILY]).ok();
        let file = host.inside("box", "/srv/f");
        let is = |text: &str| std::fs::read(&file).is_ok_and(|is| is == text.as_bytes());
        wait_within(30, "it has children", || is("one"));
        let id = checkpoint(&host);
        host.sh("box", "touch /srv/go").ok();
        wait_within(30, "they are gone", || host.sh("box", "cat /srv/f").ok() == "two");
        let failed = host.cli(["--json", "rollback", "box", &id]);
        assert_ne!(failed.code(), 0, "{fault}");
        if kills {
            host.wait_daemon();
        } else {
            assert_eq!(failed.error()["code"], json!("lost"), "{fault}");
        }
        let host = host.restart_without_faults();
        let ps = host.cli(["--json", "ps", "box"]).json();
        assert_eq!(ps["processes"].as_array().expect("processes").len(), 1, "{fault}: {ps}");
        // All are made again, each where it was.
        let report = roll_back(&host, &id);
        let ways: Vec<_> = report["processes"].as_array().expect("processes").iter().map(|one| &one["how"]).collect();
        assert_eq!(ways, ["fork", "rebuild"], "{fault}");
        let children = format!("cat /proc/[0-9]*/stat | awk '$4 == {pid} {{print $3, $5 == {pid}}}' | sort");
        assert_eq!(host.sh("box", &children).ok(), "S 0\nZ 1", "{fault}");
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "one", "{fault}");
    }
}

#[test]
fn a_rollback_that_fails_half_way_makes_all_anew_and_clients_stay() {
    for fault in
        ["moment.end:once", "moment.restore:once", "state.change", "rebuild.furnished:once", "fork.furnished:once"]
    {
        let Some((host, mut worker)) = start(fault) else { return };
        let begin = "n = 1; os.umask(0o77); open('/srv/f', 'w').write('one')
child = os.fork()
if child == 0:
    import time
    while True: time.sleep(1)
os.getpid()";
        let pid = worker.ask(begin);
        let id = checkpoint(&host);
        for round in 0..3 {
            let change =
                "n = 2; os.umask(0); open('/srv/f', 'w').write('two'); os.kill(child, 9); os.waitpid(child, 0)";
            worker.ask(change);
            if fault.starts_with("fork") {
                worker.ask("os.setresuid(1000, 1000, 1000)");
            }
            let report = roll_back(&host, &id);
            if round == 0 {
                assert_eq!(report["processes"][0], json!({"pid": pid, "how": "fork"}), "{fault}");
            }
            let state = "[n, open('/srv/f').read(), os.umask(0o77), os.getuid(), os.waitpid(child, os.WNOHANG)[0]]";
            assert_eq!(worker.ask(state), json!([1, "one", 0o77, 0, 0]), "{fault} {round}");
        }
        // Its client is told of its last end only.
        worker.tell("os._exit(7)");
        assert_eq!(worker.wait().code(), Some(7), "{fault}");
    }
}

#[test]
fn an_engine_killed_in_a_checkpoint_leaves_programs_that_run_on() {
    for fault in ["moment.take", "template.born", "template.attended", "template.cloned", "switch.pivot", "switch.seal"]
    {
        let Some((mut host, mut worker)) = start(&format!("{fault}:kill")) else { return };
        worker.ask("n = 1; f = open('/srv/f', 'w'); f.write('one'); f.flush()");
        let died = host.cli(["checkpoint", "box"]);
        assert_ne!(died.code(), 0, "{fault}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        // Its client comes back to it.
        assert_eq!(
            worker.ask("f.write('two'); f.flush(); [n, open('/srv/f').read()]"),
            json!([1, "onetwo"]),
            "{fault}"
        );
        assert_eq!(templates(&host), Vec::<String>::new(), "{fault}");
        let id = checkpoint(&host);
        worker.ask("n = 2");
        roll_back(&host, &id);
        assert_eq!(worker.ask("n"), json!(1));
        assert!(worker.end().success());
    }
}

#[test]
fn an_engine_killed_in_a_rollback_leaves_all_or_no_programs_and_whole_files() {
    for (fault, survives) in
        [("moment.prepare", true), ("moment.end", false), ("state.change", false), ("moment.restore", false)]
    {
        let Some((mut host, mut worker)) = start(&format!("{fault}:kill")) else { return };
        worker.ask("n = 1; os.umask(0o77); open('/srv/f', 'w').write('one')");
        let id = checkpoint(&host);
        worker.ask("n = 2; os.umask(0); open('/srv/f', 'w').write('two')");
        assert_ne!(host.cli(["rollback", "box", &id]).code(), 0, "{fault}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        // Its input stays open.
        let _worker = if survives {
            assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "two"]), "{fault}");
            checkpoint(&host);
            Some(worker)
        } else {
            assert_ne!(worker.wait().code(), Some(0), "{fault}");
            let file = host.sh("box", "cat /srv/f").ok();
            assert!(["one", "two"].contains(&file.as_str()), "{fault}: {file}");
            let ps = host.cli(["--json", "ps", "box"]).json();
            assert_eq!(ps["processes"].as_array().expect("processes").len(), 1, "{fault}");
            None
        };
        // And back it is, in place or made again.
        let report = roll_back(&host, &id);
        assert_eq!(report["processes"].as_array().expect("processes").len(), 1, "{fault}: {report}");
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "one", "{fault}");
        let how = if survives { "in place" } else { "fork" };
        assert_eq!(report["processes"][0]["how"], json!(how), "{fault}");
    }
}

/// A program with a file that has no name, and one with a name.
fn start_with_nameless(fault: &str) -> Option<(Host, Worker)> {
    let (host, mut worker) = start(fault)?;
    worker.ask(
        "t = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(t, b'one'); open('/srv/f', 'w').write('one'); n = 1",
    );
    Some((host, worker))
}

/// What it and its files are.
const STATE: &str = "[n, os.pread(t, 9, 0).decode(), open('/srv/f').read()]";

#[test]
fn a_copy_of_a_file_without_a_name_that_fails_leaves_everything_as_it_was() {
    for fault in ["shared.copy", "rebase.copy"] {
        let Some((host, mut worker)) = start_with_nameless(fault) else { return };
        for _ in 0..2 {
            let failed = host.cli(["--json", "checkpoint", "box"]);
            assert_eq!(failed.code(), 1, "{fault}: {failed:?}");
            let message = failed.error()["message"].as_str().expect("a message").to_owned();
            assert!(message.contains(fault), "{message}");
            wait_within(60, "its templates are gone", || templates(&host).is_empty());
            assert_eq!(worker.ask(STATE), json!([1, "one", "one"]), "{fault}");
        }
        assert_eq!(left_beside(&host), Vec::<String>::new(), "{fault}");
        worker.ask("os.write(t, b', two'); n = 2");
        let host = host.restart_without_faults();
        let id = checkpoint(&host);
        worker.ask("os.write(t, b', three'); n = 3");
        roll_back(&host, &id);
        assert_eq!(worker.ask(STATE), json!([2, "one, two", "one"]), "{fault}");
    }
    let Some((host, mut worker)) = start_with_nameless("shared.make") else { return };
    let id = checkpoint(&host);
    worker.ask("os.write(t, b', two'); n = 2");
    for _ in 0..2 {
        let failed = host.cli(["--json", "rollback", "box", &id]);
        assert_eq!(failed.code(), 1, "{failed:?}");
        assert_eq!(worker.ask(STATE), json!([2, "one, two", "one"]));
    }
    let host = host.restart_without_faults();
    roll_back(&host, &id);
    assert_eq!(worker.ask(STATE), json!([1, "one", "one"]));
    assert!(worker.end().success());
}

#[test]
fn an_engine_killed_while_it_copies_files_without_a_name_leaves_programs_that_run_on() {
    for fault in ["shared.copy", "rebase.copy", "shared.make"] {
        let Some((mut host, mut worker)) = start_with_nameless(&format!("{fault}:kill")) else { return };
        let made = host.cli(["checkpoint", "box"]);
        let id = (fault == "shared.make").then(|| made.ok());
        if let Some(id) = &id {
            worker.ask("n = 2; os.write(t, b', two')");
            assert_ne!(host.cli(["rollback", "box", id]).code(), 0);
        }
        host.wait_daemon();
        let host = host.restart_without_faults();
        if id.is_none() {
            assert_eq!(worker.ask(STATE), json!([1, "one", "one"]), "{fault}");
            worker.ask("n = 2; os.write(t, b', two')");
        }
        assert_eq!(worker.ask(STATE), json!([2, "one, two", "one"]), "{fault}");
        if id.is_none() {
            assert_eq!((templates(&host), left_beside(&host)), (vec![], vec![]), "{fault}");
        }
        let second = checkpoint(&host);
        worker.ask("n = 3; os.write(t, b', three')");
        for (id, state) in [(Some(&second), json!([2, "one, two", "one"])), (id.as_ref(), json!([1, "one", "one"]))] {
            let Some(id) = id else { continue };
            roll_back(&host, id);
            assert_eq!(worker.ask(STATE), state, "{fault}");
        }
        assert!(worker.end().success());
    }
}

/// Names of copies of what was shared, and of records of processes.
fn left_beside(host: &Host) -> Vec<String> {
    let entries = std::fs::read_dir(host.store().join("sandboxes/box/checkpoints")).expect("the checkpoints");
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.ends_with(".memory") || name.contains(".processes")).collect()
}
