//! What hostile programs, full tables, stopped processes and damaged files must not do to the daemon or to others.

use std::fs;
use std::process::Stdio;

use deltabox_tests::{Host, output, skipped_without_root};
use nix::sys::signal::{Signal, kill};

#[test]
fn a_tree_nested_deeper_than_any_stack_is_removed() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let dig = "import os\nos.chdir('/tmp')\nfor i in range(20000): os.mkdir('d'); os.chdir('d')";
    host.cli(["exec", "a", "--", "python3", "-c", dig]).ok();
    host.cli(["rm", "a"]).ok();
    assert_eq!(fs::read_dir(host.store().join("sandboxes")).unwrap().count(), 0);
    host.create("a");
}

#[test]
fn a_damaged_manifest_costs_its_own_sandbox_and_no_other() {
    if skipped_without_root() {
        return;
    }
    let mut host = Host::start();
    host.create("good");
    host.create("bad");
    host.sh("good", "echo kept > /tmp/kept").ok();
    host.sh("bad", "echo kept > /tmp/kept").ok();
    host.end_daemon(Signal::SIGKILL);
    fs::write(host.store().join("sandboxes/bad/sandbox.json"), "").unwrap();
    host.start_daemon();
    assert_eq!(host.sh("good", "cat /tmp/kept").ok(), "kept");
    host.create("bad");
    assert_ne!(host.sh("bad", "cat /tmp/kept").code(), 0, "the name is free for a new one");
    let aside = fs::read_dir(host.store().join("sandboxes")).unwrap().flatten();
    let aside = aside.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains(".damaged-bad-")).unwrap();
    assert_eq!(fs::read_to_string(aside.join("layers/2/upper/tmp/kept")).unwrap(), "kept\n");
}

#[test]
fn a_stopped_init_keeps_nobody_from_the_daemon() {
    if skipped_without_root() {
        return;
    }
    let mut host = Host::start();
    host.create("stopped");
    host.create("other");
    let init = host.init("stopped");
    kill(init, Signal::SIGSTOP).unwrap();
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    assert_eq!(host.sh("other", "echo works").ok(), "works");
    assert_eq!(host.inspect("stopped")["state"], "running");
    kill(init, Signal::SIGCONT).unwrap();
    assert_eq!(host.sh("stopped", "echo works").ok(), "works");
}

#[test]
fn an_init_killed_from_outside_is_a_dead_sandbox() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let mut client = host.command(["exec", "a", "--", "sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
    while host.cli(["ps", "--json", "a"]).json()["processes"].as_array().unwrap().len() < 2 {}
    kill(host.init("a"), Signal::SIGKILL).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(137));
    assert_eq!(host.inspect("a")["state"], "dead");
    host.cli(["rm", "a"]).ok();
}

#[test]
fn more_commands_than_descriptors_are_refused_one_by_one() {
    if skipped_without_root() {
        return;
    }
    // The daemon under a hard limit that it cannot raise.
    let host = Host::start_under(&["prlimit", "--nofile=200:200"]);
    host.create("a");
    let mut clients: Vec<_> = (0..80)
        .map(|_| {
            let mut command = host.command(["exec", "a", "--", "sleep", "1000"]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    // Some are refused, some run; the sandbox lives through it. Then they go, and all is as before.
    for client in &mut clients {
        let _ = client.kill();
        client.wait().unwrap();
    }
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while host.cli(["exec", "a", "--", "true"]).code() != 0 {
        assert!(std::time::Instant::now() < end, "the daemon does not recover");
    }
    assert_eq!(host.inspect("a")["state"], "running");
}

#[test]
fn init_keeps_nothing_of_the_daemons_streams() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let init = host.init("a");
    for number in 0..3 {
        let target = fs::read_link(format!("/proc/{init}/fd/{number}")).unwrap();
        assert!(target.ends_with("null"), "{number} is {}", target.display());
    }
}

#[test]
fn what_a_program_takes_of_shared_tables_leaves_the_host_its_own() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let greedy = "import ctypes\nl=ctypes.CDLL(None)\nn=0\nwhile l.inotify_init()>=0: n+=1\nprint(n)";
    let n: u32 = host.cli(["exec", "a", "--", "python3", "-c", greedy]).ok().parse().unwrap();
    assert!(n <= 100, "{n} inotify instances");
    assert_eq!(host.cli(["exec", "a", "--", "bash", "-c", "ulimit -Hi"]).ok(), "16384");
    assert_eq!(host.sh("a", "ulimit -Sn").ok(), "1024");
    assert!(host.sh("a", "grep ' /dev/pts ' /proc/mounts").ok().contains("max=512"));
    let own = output(
        std::process::Command::new("python3").args(["-c", "import ctypes; print(ctypes.CDLL(None).inotify_init())"]),
    );
    assert_ne!(own.ok(), "-1");
}
