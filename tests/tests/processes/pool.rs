//! Templates: shared by checkpoints, bounded, lost.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::{checkpoint, roll_back};

/// The templates of the sandbox: the names of their cgroups, with their host PIDs.
fn templates(host: &Host) -> BTreeMap<String, Option<i32>> {
    let group = PathBuf::from(host.inspect("box")["cgroup"].as_str().expect("a cgroup"));
    let groups = fs::read_dir(&group).expect("a cgroup").flatten().filter(|entry| entry.path().is_dir());
    let named = groups.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()));
    let pid = |path: PathBuf| fs::read_to_string(path.join("cgroup.procs")).ok()?.trim().parse().ok();
    named.filter(|(name, _)| name.starts_with('t')).map(|(name, path)| (name, pid(path))).collect()
}

/// Kills a template from outside, and waits for its end.
fn lose(template: Option<i32>) {
    let pid = template.expect("a template");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill a template");
    wait_within(60, "a template is gone", || !PathBuf::from(format!("/proc/{pid}")).exists());
}

fn has(host: &Host, n: usize) -> bool {
    templates(host).values().flatten().count() == n
}

/// For the worker: the others, if they stand still.
const WAITING: &str = r#"
import time
def waiting():
    def stands(pid):
        try: return b'never' in open(f'/proc/{pid}/cmdline', 'rb').read() and open(f'/proc/{pid}/syscall').read()[:1] != 'r'
        except OSError: return False
    return sorted(int(name) for name in os.listdir('/proc') if name.isdigit() and stands(name))
"#;

#[test]
fn who_only_waited_is_held_once() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    // Two that read what never comes, the second under a shell that waits for it.
    host.sh("box", "mkfifo /srv/never").ok();
    host.cli(["exec", "-d", "box", "--", "cat", "/srv/never"]).ok();
    host.cli(["exec", "-d", "box", "--", "sh", "-c", "exec 3<>/srv/never; cat /srv/never; echo over"]).ok();
    worker.ask(WAITING);
    let sleepers = "waiting()";
    worker.ask("n = 0\nwhile len(waiting()) < 3: time.sleep(0.001)");
    let all = worker.ask(sleepers);
    let base = checkpoint(&host);
    assert!(has(&host, 4), "{:?}", templates(&host));
    let mut later = Vec::new();
    for n in 1..=4 {
        worker.ask(&format!("n = {n}"));
        later.push(checkpoint(&host));
        assert!(has(&host, 4 + n), "only the worker has changed: {:?}", templates(&host));
    }
    // Whoever removes the first one leaves to the others what is theirs.
    host.cli(["rm", &format!("box@{base}")]).ok();
    wait_within(60, "the worker's first template is gone", || has(&host, 7));
    for (n, to) in [(1, 0), (4, 3), (2, 1)] {
        roll_back(&host, &later[to]);
        assert_eq!(worker.ask("n"), n);
        assert_eq!(worker.ask(sleepers), all);
    }
    // And those who have ended since are made from them.
    worker.ask(&format!("for pid in {all}: os.kill(pid, 9)"));
    roll_back(&host, &later[2]);
    assert_eq!(worker.ask("n"), 3);
    assert_eq!(worker.ask(sleepers), all);
    // The next engine finds them shared.
    let before = templates(&host);
    let mut host = host;
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    assert_eq!(templates(&host), before);
    worker.ask(&format!("for pid in {all}: os.kill(pid, 9)"));
    roll_back(&host, &later[0]);
    assert_eq!((worker.ask("n"), worker.ask(sleepers)), (1.into(), all));
    for (n, one) in later.iter().enumerate() {
        assert!(!has(&host, 0), "{n}");
        host.cli(["rm", &format!("box@{one}")]).ok();
    }
    wait_within(60, "no template is left", || templates(&host).is_empty());
}

/// A refused checkpoint: what is said, and what to do.
fn refused(host: &Host, sandbox: &str) -> (String, String) {
    let refused = host.cli(["--json", "checkpoint", sandbox]);
    assert_eq!(refused.code(), 3);
    let error = refused.error();
    let text = |field: &str| error[field].as_str().expect("a text").to_owned();
    (text("message"), text("hint"))
}

#[test]
fn a_sandbox_has_no_more_templates_than_it_may() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "box", "--pool-templates", "3"]).ok();
    let mut worker = Worker::start(&host, "box");
    let mut keep = |n: usize| {
        worker.ask(&format!("n = {n}"));
        host.cli(["--json", "checkpoint", "box"])
    };
    for n in 1..=3 {
        keep(n).ok();
    }
    assert_eq!(keep(4).code(), 3);
    let (message, hint) = refused(&host, "box");
    assert!(message.contains("its templates are 3, and there is room for 3"), "{message}");
    assert!(hint.contains("box@c") && hint.contains("create --pool-templates"), "{hint}");
    assert!(has(&host, 3));
    // Files alone need none; a checkpoint that goes makes room; and the next engine knows as much.
    host.cli(["checkpoint", "box", "--fs-only"]).ok();
    host.cli(["rm", "box@c2"]).ok();
    keep(5).ok();
    let mut host = host;
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    worker.ask("n = 6");
    refused(&host, "box");
    // More processes than there is room for: it is found out in the stop, and nothing has changed.
    host.cli(["rm", "box@c1"]).ok();
    worker.ask("import subprocess; others = [subprocess.Popen(['sleep', '1000']) for _ in range(2)]");
    let (message, hint) = refused(&host, "box");
    assert!(message.contains("needs more than 1 new templates"), "{message}");
    assert!(hint.contains("--pool-templates"), "{hint}");
    wait_within(60, "the templates of the refused checkpoint are gone", || has(&host, 2));
    worker.ask("[one.kill() or one.wait() for one in others]; n = 7");
    let last = checkpoint(&host);
    worker.ask("n = 8");
    roll_back(&host, "c3");
    assert_eq!(worker.ask("n"), 3);
    roll_back(&host, &last);
    assert_eq!(worker.ask("n"), 7);
    assert!(worker.end().success());
}

#[test]
fn templates_take_no_more_memory_than_they_may() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start_with(&[("DELTABOX_POOL_MEMORY", "96M")]);
    host.create("box");
    host.create("other");
    let mut worker = Worker::start(&host, "box");
    worker.ask("heap = bytearray(40 << 20)");
    let mut kept = Vec::new();
    let last = loop {
        // All of it is written: the template before has its pages to itself from now on.
        worker.ask(&format!("heap[::4096] = bytes([{} % 250]) * len(heap[::4096])", kept.len() + 1));
        let made = host.cli(["--json", "checkpoint", "box"]);
        if made.code() != 0 {
            break made;
        }
        kept.push(made.json()["id"].as_str().expect("an id").to_owned());
        assert!(kept.len() < 20, "no bound");
    };
    assert_eq!(last.code(), 3);
    let (message, hint) = refused(&host, "box");
    assert!(message.contains("templates of all sandboxes take") && message.contains("may take 96 MiB"), "{message}");
    assert!(hint.contains("box@c") && hint.contains("serve --pool-memory"), "{hint}");
    // 40 MB each, but for the last, which the program shares.
    assert!((3..=4).contains(&kept.len()), "{kept:?}");
    let pool = &host.cli(["--json", "tree", "box"]).json()["pool"];
    let held = pool["host"]["held"]["bytes"].as_u64().expect("bytes");
    assert!((96 << 20..200 << 20).contains(&held), "{pool}");
    assert_eq!(pool["host"]["held"], pool["sandbox"]["held"]);
    // It is the host's bound: nobody else has room either.
    let mut neighbour = Worker::start(&host, "other");
    let (message, _) = refused(&host, "other");
    assert!(message.contains("of all sandboxes"), "{message}");
    assert_eq!(neighbour.ask("1"), 1);
    for one in &kept[..2] {
        host.cli(["rm", &format!("box@{one}")]).ok();
    }
    host.cli(["checkpoint", "other"]).ok();
    roll_back(&host, kept.last().expect("one"));
    assert_eq!(worker.ask("heap[4096]"), kept.len());
}

#[test]
fn a_lost_template_is_told_and_concerns_its_checkpoints_alone() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask(WAITING);
    host.sh("box", "mkfifo /srv/never").ok();
    host.cli(["exec", "-d", "box", "--", "sh", "-c", "exec 3<>/srv/never; read never <&3"]).ok();
    worker.ask("while len(waiting()) < 1: time.sleep(0.001)");
    let mut kept = Vec::new();
    for n in 1..=3 {
        worker.ask(&format!("n = {n}; open('/srv/n', 'w').write('{n}')"));
        kept.push(checkpoint(&host));
    }
    // The worker's template of the second, by somebody outside.
    let own = templates(&host).iter().find(|(name, _)| name.starts_with("t2-")).and_then(|(_, pid)| *pid);
    lose(own);
    let back = |host: &Host| {
        let tree = host.cli(["--json", "tree", "box"]).json();
        let nodes = tree["checkpoints"].as_array().expect("checkpoints").clone();
        nodes.iter().map(|node| node["in_memory"].as_bool().expect("a flag")).collect::<Vec<_>>()
    };
    assert_eq!(back(&host), [true, false, true]);
    assert!(host.cli(["tree", "box"]).ok().contains("files; processes lost"));
    assert!(host.cli(["inspect", "box@c2"]).ok().contains("processes lost"));
    let refused = host.cli(["--json", "rollback", "box", &kept[1]]);
    assert_eq!(refused.code(), 3);
    assert_eq!(worker.ask("n"), 3, "nothing has changed");
    // Its files are there, and whatever else the others hold: the shell's template too, which it shared.
    host.cli(["rollback", "box", &kept[1], "--fs-only"]).ok();
    assert_eq!(worker.ask("[n, open('/srv/n').read()]"), json!([3, "2"]));
    for (to, n) in [(0, 1), (2, 3)] {
        roll_back(&host, &kept[to]);
        assert_eq!(worker.ask("[n, open('/srv/n').read(), len(waiting())]"), json!([n, n.to_string(), 1]));
    }
    // That which all share, too: none is left, and what is made from now on is whole.
    let all: Vec<_> = templates(&host).into_iter().filter(|(name, _)| name.starts_with("t1-")).collect();
    assert_eq!(all.len(), 2, "the worker's and the shell's: {all:?}");
    for (_, pid) in all {
        lose(pid);
    }
    assert_eq!(back(&host), [false, false, false]);
    worker.ask("n = 4");
    let new = checkpoint(&host);
    worker.ask("n = 5");
    roll_back(&host, &new);
    assert_eq!(worker.ask("[n, len(waiting())]"), json!([4, 1]));
    wait_within(60, "what is of no use is gone", || has(&host, 2));
    assert!(worker.end().success());
}

#[test]
fn a_template_that_is_lost_in_the_middle_of_a_rollback_costs_the_processes_and_nothing_else() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start_with(&[("DELTABOX_FAULT", "moment.restore:stop")]);
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask("n = 1; open('/srv/n', 'w').write('1')");
    let first = checkpoint(&host);
    worker.ask("n = 2; open('/srv/n', 'w').write('2')");
    let second = checkpoint(&host);
    worker.ask("n = 3; open('/srv/n', 'w').write('3')");
    let lost = templates(&host).iter().find(|(name, _)| name.starts_with("t1-")).and_then(|(_, pid)| *pid);
    let daemon = host.daemon_pid();
    let resume = || kill(daemon, Signal::SIGCONT).expect("let the daemon go on");
    let stands = || {
        let stat = fs::read_to_string(format!("/proc/{daemon}/stat")).expect("the daemon");
        stat[stat.rfind(')').expect("a name")..].starts_with(") T")
    };
    let mut rollback = host.command(["--json", "rollback", "box", &first]).spawn().expect("a rollback");
    wait_within(60, "the daemon stands in the middle of it", stands);
    lose(lost);
    resume();
    // It stops at the second attempt too.
    let mut status = None;
    wait_within(30, "the rollback has ended", || {
        if stands() {
            resume();
        }
        status = rollback.try_wait().expect("a status");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(1));
    assert_eq!(worker.wait().code(), Some(128 + 9));
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "1");
    let tree = host.cli(["--json", "tree", "box"]).json();
    assert_eq!((&tree["head"], &tree["checkpoints"][0]["in_memory"]), (&json!(first), &json!(false)));
    assert_eq!(tree["checkpoints"][1]["outlook"]["n_forked"], 1, "{tree}");
    // The other checkpoint is whole: its processes are made again.
    let host = host.restart_without_faults();
    let report = roll_back(&host, &second);
    assert_eq!(report["processes"][0]["how"], "fork");
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "2");
}

#[test]
fn an_engine_that_dies_while_templates_are_shared_loses_none_that_a_checkpoint_has() {
    for fault in ["moment.hidden", "moment.save", "tree.write"] {
        if skipped_without_root() {
            return;
        }
        let host = Host::start();
        host.create("box");
        let mut worker = Worker::start(&host, "box");
        worker.ask(WAITING);
        host.sh("box", "mkfifo /srv/never").ok();
        host.cli(["exec", "-d", "box", "--", "sh", "-c", "exec 3<>/srv/never; read never <&3"]).ok();
        worker.ask("n = 1\nwhile len(waiting()) < 1: time.sleep(0.001)");
        let first = checkpoint(&host);
        worker.ask("n = 2");
        let mut host = host.restart_with(&[("DELTABOX_FAULT", &format!("{fault}:kill"))]);
        assert_ne!(host.cli(["checkpoint", "box"]).code(), 0, "{fault}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        wait_within(60, "only templates of checkpoints are there", || {
            let n_kept = host.cli(["--json", "tree", "box"]).json()["checkpoints"].as_array().map_or(0, Vec::len);
            has(&host, 1 + n_kept)
        });
        assert_eq!(worker.ask("n"), 2, "{fault}");
        for n in 3..5 {
            worker.ask(&format!("n = {n}"));
            checkpoint(&host);
            roll_back(&host, &first);
            assert_eq!(worker.ask("[n, len(waiting())]"), json!([1, 1]), "{fault}");
        }
        // The shell's is made from that which all share.
        worker.ask("[os.kill(pid, 9) for pid in waiting()]");
        roll_back(&host, &first);
        assert_eq!(worker.ask("[n, len(waiting())]"), json!([1, 1]), "{fault}");
        assert!(worker.end().success());
    }
}
