//! Checkpoints and rollbacks of files, as a user sees them.

use std::fs;

use deltabox_tests::{Host, skipped_without_root, wait_within};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Does every second thing that a move has to carry over, again and again, and counts on nothing having happened.
const BUSY: &str = r#"
import os, socket, fcntl, mmap, sys, threading, time
os.makedirs('/srv/busy/dir'); os.chdir('/srv/busy/dir')
log = os.open('/srv/busy/log', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
gone = os.open('gone', os.O_CREAT | os.O_RDWR); os.unlink('gone')
lock = os.open('lock', os.O_CREAT | os.O_RDWR); fcntl.lockf(lock, fcntl.LOCK_EX)
m = os.open('map', os.O_CREAT | os.O_RDWR); os.ftruncate(m, 4096); mem = mmap.mmap(m, 4096); os.close(m)
server = socket.socket(socket.AF_UNIX); server.bind('/srv/busy/sock'); server.listen(8)
def serve():
    while True:
        c, _ = server.accept(); c.sendall(c.recv(64)); c.close()
threading.Thread(target=serve, daemon=True).start()
n_fds = len(os.listdir('/proc/self/fd'))
n = 0
while not os.path.exists('/srv/stop'):
    n += 1
    os.write(log, b'%d\n' % n)
    os.pwrite(gone, b'%20d' % n, 0); assert int(os.pread(gone, 20, 0)) == n
    mem[0:20] = b'%20d' % n
    assert int(open('map', 'rb').read(20)) == n, 'mapping'
    c = socket.socket(socket.AF_UNIX)
    try:
        assert os.getcwd() == '/srv/busy/dir', 'directory'
        c.connect('/srv/busy/sock')
    except (AssertionError, ConnectionRefusedError):
        # Between the death of an engine in the middle of a move and the next engine both roots are in use.
        if not os.environ.get('TORN'): raise
        c.close(); continue
    c.sendall(b'x'); assert c.recv(9) == b'x'; c.close()
    open('alive', 'w').write(str(n))
    time.sleep(0.001)
lines = open('/srv/busy/log').read().split()
assert lines == [str(i + 1) for i in range(n)], 'lines lost'
n_now = len(os.listdir('/proc/self/fd'))
while n_now != n_fds: n_now = len(os.listdir('/proc/self/fd'))
print('ok', flush=True)
"#;

fn start_busy(host: &Host) -> u64 {
    start_busy_with(host, "TORN=")
}

fn start_busy_with(host: &Host, env: &str) -> u64 {
    let text = host.cli(["exec", "-d", "--env", env, "box", "--", "/usr/bin/python3", "-c", BUSY]).ok();
    let pid = text.parse().expect("a pid");
    wait_within(30, "the program runs", || host.inside("box", "/srv/busy/dir/alive").exists());
    pid
}

/// The program has noticed nothing, up to the end.
fn end_busy(host: &Host, pid: u64) {
    host.sh("box", "touch /srv/stop").ok();
    let exit = || {
        let report = host.cli(["inspect", "box", "--json"]).json();
        let execs = report["execs"].as_array().expect("execs").clone();
        execs.into_iter().find(|exec| exec["pid"] == pid).map(|exec| exec["exit"].clone()).unwrap_or_default()
    };
    wait_within(30, "the program ends", || !exit().is_null());
    let log = host.cli(["logs", "box", &pid.to_string()]).ok();
    assert_eq!(log, "ok", "{}", exit());
}

fn layers(host: &Host) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(host.store().join("layers"))
        .expect("list layers")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Overlays in the sandbox's mount namespace.
fn n_overlays(host: &Host) -> usize {
    let pid = host.init("box");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo");
    mounts.lines().filter(|line| line.contains(" - overlay ")).count()
}

#[test]
fn a_rollback_goes_to_any_checkpoint_any_number_of_times() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut ids = Vec::new();
    for n in 0..4 {
        host.sh("box", &format!("echo {n} > /srv/n; mkdir -p /srv/d{n}; rm -f /etc/hostname; touch /tmp/t{n}")).ok();
        ids.push(host.checkpoint("box"));
    }
    for (n, id) in [2, 0, 3, 3, 1, 0].map(|n| (n, &ids[n])) {
        host.rollback("box", id);
        let expected: Vec<_> = (0..=n).map(|n| format!("/srv/d{n}")).collect();
        assert_eq!(host.sh("box", "cat /srv/n; echo /srv/d*").ok(), format!("{n}\n{}", expected.join(" ")));
        host.sh("box", "echo changed > /srv/n; rm -rf /srv/d*; mkdir /srv/d9").ok();
    }
    // A branch: the tree knows where it came from.
    let child = host.checkpoint("box");
    let tree = host.cli(["tree", "box", "--json"]).json();
    let parent = |id: &str| {
        let all = tree["checkpoints"].as_array().expect("checkpoints");
        all.iter().find(|one| one["id"] == id).expect("a checkpoint")["parent"].clone()
    };
    assert_eq!((parent(&child), parent(&ids[2])), (Value::from(ids[0].as_str()), Value::from(ids[1].as_str())));
    assert_eq!(tree["head"], child.as_str());
}

#[test]
fn a_checkpoint_of_what_has_not_changed_freezes_nothing() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    host.sh("box", "echo 1 > /srv/n").ok();
    let made = host.cli(["checkpoint", "box", "--fs-only", "--json"]).json();
    assert_eq!(made["fs_frozen"], true);
    for field in ["stopped_us", "total_us", "epoch", "created_unix_ms"] {
        assert!(made[field].is_u64(), "{made}");
    }
    assert!(made["phases_us"]["pivot"].is_u64(), "{made}");
    let before = layers(&host);
    let again = host.cli(["checkpoint", "box", "--fs-only", "--json", "--name", "same"]).json();
    assert_eq!((&again["fs_frozen"], &again["name"]), (&Value::from(false), &Value::from("same")));
    assert_eq!(layers(&host), before);
    // The root directory itself counts too.
    host.sh("box", "chmod 711 /").ok();
    assert_eq!(host.cli(["checkpoint", "box", "--fs-only", "--json"]).json()["fs_frozen"], true);
    host.rollback("box", "same");
    assert_eq!(host.sh("box", "stat -c %a /; cat /srv/n").ok(), "755\n1");
    host.rollback("box", "c3");
    assert_eq!(host.sh("box", "stat -c %a /").ok(), "711");
}

#[test]
fn programs_run_on_through_checkpoints_and_the_daemon_s_death() {
    if skipped_without_root() {
        return;
    }
    let mut host = Host::start();
    host.create("box");
    let pid = start_busy(&host);
    for _ in 0..10 {
        host.checkpoint("box");
    }
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    for _ in 0..10 {
        host.cli(["checkpoint", "box", "--fs-only", "--durable"]).ok();
    }
    end_busy(&host, pid);
    assert_eq!(n_overlays(&host), 1);
}

/// Steps of a checkpoint that can fail, and whether the engine dies there or gets an error.
const STEPS: [&str; 7] =
    ["create.layer", "checkpoints.arm", "switch.pivot", "rebase.give", "rebase.copy", "switch.seal", "tree.write"];

#[test]
fn a_checkpoint_that_fails_at_any_step_leaves_the_sandbox_as_it_was() {
    if skipped_without_root() {
        return;
    }
    for step in STEPS {
        println!("{step}");
        // The first layer must not fail.
        let host = Host::start();
        host.create("box");
        let pid = start_busy(&host);
        let first = host.checkpoint("box");
        let mut host = host.restart_with(&[("DELTABOX_FAULT", step)]);
        let failed = host.cli(["checkpoint", "box", "--fs-only", "--json"]).error();
        assert!(failed["message"].as_str().expect("a message").contains(step), "{step}: {failed}");
        assert_eq!(host.inspect("box")["head"], first.as_str(), "{step}");
        host.end_daemon(Signal::SIGTERM);
        let host = host.restart_without_faults();
        assert_eq!(n_overlays(&host), 1, "{step}");
        let second = host.checkpoint("box");
        host.cli(["gc"]).ok();
        end_busy(&host, pid);
        host.rollback("box", &first);
        host.rollback("box", &second);
        wait_within(30, &format!("{step}: no layer is left over"), || layers(&host).len() <= 4);
    }
}

#[test]
fn an_engine_that_dies_at_any_step_of_a_checkpoint_is_followed_by_one_that_finishes_or_undoes_it() {
    dies_at_each_of(&STEPS, true);
}

/// Steps of an injection, by the names of what has just been done.
const INJECTION: [&str; 12] = [
    "stop.interrupted",
    "stop.halted",
    "inject.recorded",
    "inject.prepared",
    "inject.registers",
    "inject.masked",
    "inject.queued",
    "inject.marked",
    "inject.resumed",
    "inject.leaving",
    "inject.unmasked",
    "inject.left",
];

#[test]
fn an_engine_that_dies_inside_an_injection_is_followed_by_one_that_finishes_or_undoes_it() {
    dies_at_each_of(&INJECTION, false);
}

/// With a checkpoint before, or in processes in which the engine has never been.
#[expect(clippy::print_stdout, reason = "the last one printed is the one that failed")]
fn dies_at_each_of(steps: &[&str], with_first: bool) {
    if skipped_without_root() {
        return;
    }
    for step in steps {
        println!("{step}");
        let host = Host::start();
        host.create("box");
        let pid = start_busy_with(&host, "TORN=1");
        let mut ids: Vec<_> = with_first.then(|| host.checkpoint("box")).into_iter().collect();
        let mut host = host.restart_with(&[("DELTABOX_FAULT", &format!("{step}:kill"))]);
        assert!(!host.cli(["checkpoint", "box", "--fs-only"]).status.success(), "{step}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        assert_eq!(n_overlays(&host), 1, "{step}");
        let tree = host.cli(["tree", "box", "--json"]).json();
        assert_eq!(tree["checkpoints"].as_array().expect("checkpoints").len(), ids.len(), "{step}: {tree}");
        ids.push(host.checkpoint("box"));
        end_busy(&host, pid);
        ids.iter().for_each(|id| host.rollback("box", id));
        wait_within(30, &format!("{step}: no layer is left over"), || layers(&host).len() <= 4);
    }
}

#[test]
fn an_engine_that_dies_at_any_step_of_a_rollback_is_followed_by_one_that_finishes_or_undoes_it() {
    if skipped_without_root() {
        return;
    }
    for step in ["checkpoints.arm", "switch.pivot", "rebase.give", "layers.remove"] {
        let host = Host::start();
        host.create("box");
        host.sh("box", "echo old > /srv/n; mkdir /srv/both").ok();
        let first = host.checkpoint("box");
        host.sh("box", "echo new > /srv/n").ok();
        let sleeper =
            host.cli(["exec", "-d", "-w", "/srv/both", "box", "--", "sh", "-c", "exec 5<>/srv/n; exec sleep 1000"]);
        sleeper.ok();
        wait_within(30, "it has opened its file", || host.inside("box", "/srv/n").exists());
        let mut host = host.restart_with(&[("DELTABOX_FAULT", &format!("{step}:kill"))]);
        let rolled = host.cli(["rollback", "box", &first, "--fs-only"]);
        host.wait_daemon();
        let host = host.restart_without_faults();
        assert_eq!(n_overlays(&host), 1, "{step}");
        let now = host.sh("box", "cat /srv/n").ok();
        assert!(if rolled.status.success() { now == "old" } else { now == "old" || now == "new" }, "{step}: {now}");
        host.rollback("box", &first);
        assert_eq!(host.sh("box", "cat /srv/n").ok(), "old", "{step}");
        host.cli(["gc"]).ok();
        wait_within(30, &format!("{step}: no layer is left over"), || layers(&host).len() == 2);
    }
}

#[test]
fn a_writer_outside_is_a_refusal_and_changes_nothing() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let pid = start_busy(&host);
    let file = fs::File::options().append(true).create(true).open(host.inside("box", "/srv/outside")).expect("open");
    let refused = host.cli(["checkpoint", "box", "--fs-only", "--json"]);
    assert_eq!(refused.code(), 3, "{refused:?}");
    assert_eq!(refused.error()["code"], "refused");
    assert_eq!(n_overlays(&host), 1);
    drop(file);
    host.checkpoint("box");
    end_busy(&host, pid);
}

#[test]
fn removed_checkpoints_and_sandboxes_free_their_layers() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut ids = Vec::new();
    for n in 0..3 {
        host.sh("box", &format!("head -c 300000 /dev/urandom > /srv/f{n}")).ok();
        ids.push(host.checkpoint("box"));
    }
    host.rollback("box", &ids[0]);
    assert_eq!(host.cli(["rm", "box@c9", "--json"]).error()["code"], "no_checkpoint");
    let own = host.cli(["inspect", "box@c3", "--json"]).json()["checkpoint"]["own_bytes"].as_u64().expect("bytes");
    assert!(own >= 300_000, "{own}");
    let n_before = layers(&host).len();
    host.cli(["rm", "box@c3"]).ok();
    assert_eq!(layers(&host).len(), n_before - 1);
    // The one in the middle is needed by nobody after that.
    host.cli(["rm", "box@c2"]).ok();
    assert_eq!(layers(&host).len(), n_before - 2);
    assert_eq!(host.cli(["gc", "--json"]).json()["n_layers"], 0);
    assert_eq!(host.cli(["rollback", "box", "c2", "--fs-only", "--json"]).error()["code"], "no_checkpoint");
    let disk = host.cli(["inspect", "box", "--json"]).json()["disk"].clone();
    assert!(disk["own_bytes"].as_u64().expect("bytes") >= 300_000 && disk["shared_bytes"] == 0, "{disk}");
    host.cli(["rm", "box"]).ok();
    assert!(layers(&host).is_empty(), "{:?}", layers(&host));
}

#[test]
fn a_removal_that_is_cut_short_leaves_a_checkpoint_that_can_be_used_and_removed() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    for n in 1..4 {
        host.sh("box", &format!("echo {n} > /srv/n")).ok();
        host.checkpoint("box");
    }
    let mut host = host.restart_with(&[("DELTABOX_FAULT", "tree.remove:kill")]);
    assert!(!host.cli(["rm", "box@c2"]).status.success());
    host.wait_daemon();
    let host = host.restart_without_faults();
    for n in [2, 3, 1] {
        host.rollback("box", &format!("c{n}"));
        assert_eq!(host.sh("box", "cat /srv/n").ok(), n.to_string());
    }
    host.cli(["rm", "box@c2"]).ok();
    host.rollback("box", "c3");
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "3");
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let code = |args: &[&str]| {
        let output = host.cli(args.iter().copied().chain(["--json"]));
        let exit = output.code();
        (exit, output.error()["code"].as_str().expect("a code").to_owned())
    };
    assert_eq!(code(&["checkpoint", "box", "--fs-only", "--name", "c7"]), (2, "invalid".to_owned()));
    host.cli(["checkpoint", "box", "--fs-only", "--name", "taken"]).ok();
    assert_eq!(code(&["checkpoint", "box", "--fs-only", "--name", "taken"]), (1, "exists".to_owned()));
    assert_eq!(code(&["rollback", "box", "taken"]), (3, "refused".to_owned()));
    assert_eq!(code(&["rollback", "box", "nothing", "--fs-only"]), (1, "no_checkpoint".to_owned()));
    assert_eq!(code(&["tree", "nobody"]), (1, "no_sandbox".to_owned()));
    // A layer that is gone is named, and nothing happens.
    host.sh("box", "echo 1 > /srv/n").ok();
    let second = host.checkpoint("box");
    let third_layer = layers(&host).last().expect("a layer").clone();
    host.sh("box", "echo 2 > /srv/n").ok();
    host.checkpoint("box");
    let frozen = host.store().join("layers").join(&third_layer);
    let aside = host.scratch().join("aside");
    fs::rename(&frozen, &aside).expect("take a layer away");
    let error = host.cli(["rollback", "box", "c3", "--fs-only", "--json"]).error();
    assert_eq!(error["code"], "damaged_layer", "{error}");
    assert!(error["message"].as_str().expect("a message").contains(&third_layer), "{error}");
    host.rollback("box", &second);
    fs::rename(&aside, &frozen).expect("put it back");
    host.rollback("box", "c3");
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "2");
    host.cli(["kill", "box"]).ok();
    assert_eq!(code(&["checkpoint", "box", "--fs-only"]), (1, "dead".to_owned()));
}
