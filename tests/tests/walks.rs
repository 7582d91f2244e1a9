//! Walks through directories (find, rm -r, rmtree) under checkpoints: who walks compares devices, and those change.

use std::process::Stdio;

use deltabox_tests::{Host, count, skipped_without_root, wait_within};

/// Makes a deep tree and has each tool walk through it; prints what went wrong.
const WALKER: &str = r"
import os, shutil, subprocess, sys
def tree():
    for i in range(60):
        os.makedirs(f'/srv/t/{i % 5}/{i}/' + '/'.join('abcdefgh'[:i % 9]), exist_ok=True)
        open(f'/srv/t/{i % 5}/{i}/f', 'w').close()
def run(*words):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode: print(words, done.stdout)
    return done.stdout
for n in range(int(sys.argv[1])):
    tree()
    names = run('find', '/srv/t').count('\n')
    expected = 1 + 5 + 60 + 60 + sum(i % 9 for i in range(60))
    if names != expected: print('find', names, expected)
    run('chmod', '-R', 'u+w', '/srv/t')
    run('du', '-s', '/srv/t')
    run('rm', '-rf', '/srv/t')
    tree()
    shutil.rmtree('/srv/t')
print('done')
";

/// Has a directory open and computes, for half a second of its own; then says so, and only then closes it.
const HOLDER: &str = r"
import os, time
directory = os.open('/srv', os.O_RDONLY | os.O_DIRECTORY)
open('/run/shm/open', 'w').close()
if os.environ.get('STANDS'): time.sleep(1000)
while time.process_time() < 0.5 or os.path.exists('/run/shm/stay'): pass
open('/srv/over', 'w').close()
os.close(directory)
time.sleep(1000)
";

fn checkpoint(host: &Host, patience: &str) -> String {
    host.cli(["checkpoint", "box", "--fs-only", "--patience", patience]).ok()
}

fn start_holder(environment: &[&str]) -> Host {
    let host = Host::start();
    host.create("box");
    let words = ["exec", "-d", "box", "--", "/usr/bin/env"].iter().chain(environment);
    host.cli(words.chain(&["/usr/bin/python3", "-c", HOLDER])).ok();
    wait_within(60, "a directory is open", || host.inside("box", "/run/shm/open").exists());
    host
}

/// What the checkpoint has that the sandbox had not in the beginning.
fn has_over(host: &Host, checkpoint: &str) -> bool {
    host.cli(["rollback", "box", checkpoint, "--fs-only"]).ok();
    host.inside("box", "/srv/over").exists()
}

#[test]
fn walks_notice_no_checkpoint() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "box", "--merge-above", "4"]).ok();
    let rounds = count(2, 40).to_string();
    let mut command = host.command(["exec", "box", "--", "/usr/bin/python3", "-c", WALKER, &rounds]);
    let mut walker = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("start the walker");
    let mut n = 0;
    while walker.try_wait().expect("look at the walker").is_none() {
        let id = host.cli(["checkpoint", "box", "--fs-only"]).ok();
        host.cli(["rm", &format!("box@{id}")]).ok();
        n += 1;
    }
    let done = walker.wait_with_output().expect("its output");
    assert_eq!(String::from_utf8_lossy(&done.stdout), "done\n", "after {n} checkpoints");
    assert!(n > 4, "{n} checkpoints");
}

#[test]
fn a_walk_is_waited_for() {
    if skipped_without_root() {
        return;
    }
    let host = start_holder(&[]);
    let id = checkpoint(&host, "60000");
    assert!(has_over(&host, &id), "the checkpoint is older than the end of the walk");
}

#[test]
fn a_walk_is_not_waited_for_without_patience() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    host.sh("box", "touch /run/shm/stay").ok();
    host.cli(["exec", "-d", "box", "--", "/usr/bin/python3", "-c", HOLDER]).ok();
    let id = checkpoint(&host, "0");
    std::fs::remove_file(host.inside("box", "/run/shm/stay")).expect("let the walk end");
    assert!(!has_over(&host, &id));
}

#[test]
fn a_directory_that_is_kept_open_is_not_waited_for() {
    if skipped_without_root() {
        return;
    }
    let host = start_holder(&["STANDS=1"]);
    // Ten minutes: this story would not end.
    for n in 0..3 {
        host.sh("box", &format!("echo {n} > /srv/n")).ok();
        checkpoint(&host, "600000");
    }
}
