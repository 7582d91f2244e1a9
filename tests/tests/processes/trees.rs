//! Processes that come and go.

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use serde_json::{Value, json};

use crate::{checkpoint, roll_back};

fn start() -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start();
    host.create("box");
    let worker = Worker::start(&host, "box");
    Some((host, worker))
}

#[test]
fn processes_that_were_made_since_are_gone_and_their_parents_know_nothing_of_them() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("import signal, subprocess, time; told = []; signal.signal(signal.SIGCHLD, lambda *_: told.append(1))");
    let id = checkpoint(&host);
    for change in [
        "children = [subprocess.Popen(['sleep', '1000']) for _ in range(5)]",
        "nested = subprocess.Popen(['sh', '-c', 'sleep 1000 & sleep 1000 & wait'])",
        // Ended, and nobody has asked for it.
        "zombie = os.fork()\nif zombie == 0: os._exit(3)\ntime.sleep(0.1)",
        // An orphan, init's child.
        "_ = subprocess.run(['sh', '-c', 'setsid sleep 1000 >/dev/null 2>&1 &'])",
        "threaded = subprocess.Popen([sys.executable, '-c', 'import threading, time\\nfor _ in range(20): threading.Thread(target=time.sleep, args=(1000,)).start()'])",
    ] {
        worker.ask(change);
        roll_back(&host, &id);
        let left = host.cli(["--json", "ps", "box"]).json();
        let left: Vec<_> =
            left["processes"].as_array().expect("processes").iter().map(|one| one["pid"].clone()).collect();
        assert_eq!(left, [json!(1), json!(2)], "after {change}");
        let wait = "try: answer = os.waitpid(-1, os.WNOHANG)
except ChildProcessError: answer = 'none'
[answer, told]";
        assert_eq!(worker.ask(wait), json!(["none", []]), "after {change}");
    }
    assert!(worker.end().success());
}

#[test]
fn a_command_that_was_started_since_ends_and_its_client_is_told() {
    let Some((host, worker)) = start() else { return };
    let id = checkpoint(&host);
    let since = Worker::start(&host, "box");
    roll_back(&host, &id);
    assert_eq!(since.wait().code(), Some(128 + 9));
    assert!(worker.end().success());
}

#[test]
fn a_rollback_that_cannot_be_is_refused_and_changes_nothing() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("n = 1; open('/srv/f', 'w').write('one')");
    let id = checkpoint(&host);
    let files = host.cli(["checkpoint", "box", "--fs-only"]).ok();
    worker.ask("n = 2; open('/srv/f', 'w').write('two')");
    let refused = host.cli(["--json", "rollback", "box", &files]);
    assert_eq!(refused.code(), 3);
    assert!(refused.error()["message"].as_str().expect("a message").contains("--fs-only"));
    assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "two"]));
    // Files alone go back to either.
    host.cli(["rollback", "box", &id, "--fs-only"]).ok();
    assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "one"]));
    assert!(worker.end().success());
}

#[test]
fn templates_go_with_their_checkpoints_and_nothing_stays() {
    let Some((host, mut worker)) = start() else { return };
    let group = host.inspect("box")["cgroup"].as_str().expect("a cgroup").to_owned();
    let n_templates = || {
        let names = std::fs::read_dir(&group).expect("the cgroup").map(|entry| entry.expect("an entry").file_name());
        names.filter(|name| name.to_string_lossy().starts_with('t')).count()
    };
    let change_and_keep = |n| {
        worker.ask(&format!("n = {n}"));
        checkpoint(&host)
    };
    let ids: Vec<_> = (0..3).map(change_and_keep).collect();
    assert_eq!(n_templates(), 3);
    host.cli(["rm", &format!("box@{}", ids[1])]).ok();
    wait_within(60, "a template is gone", || n_templates() == 2);
    roll_back(&host, &ids[0]);
    roll_back(&host, &ids[2]);
    assert_eq!(worker.ask("1"), json!(1));
    drop(worker);
    host.cli(["rm", "box"]).ok();
    assert!(!std::path::Path::new(&group).exists());
}

#[test]
fn a_bracket_keeps_output_and_status_and_nothing_else() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("n = 1; open('/srv/f', 'w').write('one')");
    let script = "echo out; echo more > /srv/f; touch /srv/new; sleep 1000 & kill -USR1 1; exit 7";
    let done = host.cli(["exec", "--bracket", "box", "--", "sh", "-c", script]);
    assert_eq!((done.code(), done.stdout.as_str()), (7, "out\n"));
    assert_eq!(worker.ask("[n, open('/srv/f').read(), os.path.exists('/srv/new')]"), json!([1, "one", false]));
    let ps = host.cli(["--json", "ps", "box"]).json();
    assert_eq!(ps["processes"].as_array().expect("processes").len(), 2);
    assert_eq!(host.cli(["--json", "tree", "box"]).json()["checkpoints"], json!([]));
    let failed = host.cli(["exec", "--bracket", "box", "--", "/no/such/program"]);
    assert_ne!(failed.code(), 0);
    assert_eq!(host.cli(["--json", "tree", "box"]).json()["checkpoints"], json!([]));
    assert!(worker.end().success());
}

#[test]
fn a_daemon_that_is_killed_and_started_again_rolls_back_to_the_same_states() {
    let Some((mut host, mut worker)) = start() else { return };
    worker.ask(
        "import threading, mmap
n = 1; open('/srv/f', 'w').write('one'); shared = mmap.mmap(-1, 8192); shared[:3] = b'one'
r, w = os.pipe(); os.write(w, b'one')
threading.Thread(target=threading.Event().wait, daemon=True).start()",
    );
    let first = checkpoint(&host);
    worker.ask("n = 2; open('/srv/f', 'w').write('two'); shared[:3] = b'two'; os.read(r, 9); os.write(w, b'two')");
    let second = checkpoint(&host);
    for (to, n, text) in [(&first, 1, "one"), (&second, 2, "two"), (&first, 1, "one")] {
        host.end_daemon(nix::sys::signal::Signal::SIGKILL);
        host.start_daemon();
        let report = roll_back(&host, to);
        assert_eq!(report["processes"], json!([{"pid": 2, "how": "in place"}]));
        let look = "[n, open('/srv/f').read(), shared[:3].decode(), os.read(r, 9).decode(), threading.active_count()]";
        assert_eq!(worker.ask(look), json!([n, text, text, text, 2]));
        worker.ask("n = 3; open('/srv/f', 'w').write('three')");
    }
    // A file that is not whole: files only.
    let dir = host.store().join("sandboxes/box/checkpoints");
    let path = dir.join(format!("{first}.processes"));
    let mut bytes = std::fs::read(&path).expect("the records");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).expect("write");
    host.end_daemon(nix::sys::signal::Signal::SIGKILL);
    host.start_daemon();
    let refused = host.cli(["--json", "rollback", "box", &first]);
    assert_eq!(refused.code(), 3);
    assert!(refused.error()["message"].as_str().expect("a message").contains("not held any more"));
    host.cli(["rollback", "box", &first, "--fs-only"]).ok();
    assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([3, "one"]));
    roll_back(&host, &second);
    assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "two"]));
    assert!(worker.end().success());
}

#[test]
fn a_command_that_has_ended_since_is_made_again_from_its_template() {
    let Some((host, mut worker)) = start() else { return };
    // Its streams lead to its log.
    let program = "
import os, threading, time
count, stop = 0, threading.Event()
def run():
    global count
    while not stop.wait(0.001): count += 1
thread = threading.Thread(target=run); thread.start()
while not count: time.sleep(0.001)
held = open('/srv/held', 'w+'); held.write('held'); held.flush()
while not os.path.exists('/srv/end'):
    if os.path.exists('/srv/ask'):
        os.unlink('/srv/ask')
        answer = f'{os.getpid()} {os.getsid(0)} {held.tell()} {count > 0} {thread.is_alive()}'
        open('/srv/answer.new', 'w').write(answer); os.rename('/srv/answer.new', '/srv/answer')
    time.sleep(0.001)
print('ends', flush=True)
stop.set()";
    let pid = host.cli(["exec", "-d", "box", "--", "/usr/bin/python3", "-c", program]).ok();
    let ask = "import time
while not os.path.exists('/srv/held') or os.path.getsize('/srv/held') < 4: time.sleep(0.001)
open('/srv/ask', 'w').close()
while not os.path.exists('/srv/answer'): time.sleep(0.001)
answer = open('/srv/answer').read(); os.unlink('/srv/answer')
answer";
    let expected = json!(format!("{pid} {pid} 4 True True"));
    assert_eq!(worker.ask(ask), expected);
    let id = checkpoint(&host);
    let listed = |how: &str| json!({"pid": pid.parse::<u32>().expect("a pid"), "how": how});
    for _ in 0..3 {
        worker.ask("open('/srv/end', 'w').close()");
        wait_within(30, "the command has ended", || {
            host.cli(["--json", "ps", "box"]).json()["processes"].as_array().expect("processes").len() == 2
        });
        let report = roll_back(&host, &id);
        assert!(report["processes"].as_array().expect("processes").contains(&listed("fork")), "{report}");
        assert_eq!(worker.ask(ask), expected);
        assert_eq!(exit_of(&host, &pid), json!(null), "it runs, and is listed");
        // It lives again: from now on in place.
        let report = roll_back(&host, &id);
        assert!(report["processes"].as_array().expect("processes").contains(&listed("in place")), "{report}");
        assert_eq!(worker.ask(ask), expected);
    }
    worker.ask("open('/srv/end', 'w').close()");
    wait_within(30, "its last words are in its log", || {
        host.cli(["logs", "box", &pid]).stdout.lines().filter(|line| *line == "ends").count() >= 2
    });
    wait_within(30, "its end is told", || exit_of(&host, &pid)["status"] == json!(0));
    assert!(worker.end().success());
}

/// How a command has ended; null as long as it runs.
fn exit_of(host: &Host, pid: &str) -> Value {
    let execs = host.cli(["--json", "inspect", "box"]).json()["execs"].clone();
    let number: u32 = pid.parse().expect("a number");
    let found = execs.as_array().expect("execs").iter().find(|exec| exec["pid"] == number);
    assert!(found.is_some(), "{pid} is not in {execs}");
    found.map(|exec| exec["exit"].clone()).unwrap_or_default()
}

#[test]
fn a_command_that_is_made_again_keeps_its_client_and_the_client_is_told_how_it_ends() {
    let Some((host, mut worker)) = start() else { return };
    let pid = worker.ask("n = 1; os.getpid()");
    let id = checkpoint(&host);
    for round in 0..3 {
        // What it has given up for good it gets back only when it is made again.
        worker.ask("n = 2; os.setresuid(1000, 1000, 1000)");
        let report = roll_back(&host, &id);
        assert_eq!(report["processes"], json!([{"pid": pid, "how": "fork"}]), "round {round}");
        assert_eq!(worker.ask("[n, os.getuid(), os.getpid()]"), json!([1, 0, pid]));
        assert_eq!(exit_of(&host, &pid.to_string()), json!(null));
    }
    // Signals of its client reach it.
    worker.tell("os._exit(7)");
    assert_eq!(worker.wait().code(), Some(7));
}

#[test]
fn a_daemon_that_is_killed_finds_commands_that_were_made_again() {
    let Some((mut host, mut worker)) = start() else { return };
    let pid = host.cli(["exec", "-d", "box", "--", "sh", "-c", "while :; do sleep 0.01; done"]).ok();
    let id = checkpoint(&host);
    host.cli(["exec", "box", "--", "kill", "-9", &pid]).ok();
    wait_within(30, "it has ended", || exit_of(&host, &pid) != json!(null));
    worker.ask("os.setresuid(1000, 1000, 1000)");
    roll_back(&host, &id);
    host.end_daemon(nix::sys::signal::Signal::SIGKILL);
    host.start_daemon();
    assert_eq!(exit_of(&host, &pid), json!(null));
    assert_eq!(worker.ask("os.getuid()"), json!(0));
    host.cli(["exec", "box", "--", "kill", "-15", &pid]).ok();
    wait_within(30, "its end is told", || exit_of(&host, &pid)["signal"] == json!(15));
    assert!(worker.end().success());
}
