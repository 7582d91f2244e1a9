//! Programs that do odd things while their files are checkpointed and rolled back under them.

use std::fs;
use std::path::PathBuf;

use deltabox_tests::{Host, skipped_without_root, wait_within};

/// `step(n)` tells the story that the program is there, and waits until that has done its part.
const STEPS: &str = r"
import os, sys, time
def step(n):
    open('/run/shm/at%d' % n, 'w').close()
    while not os.path.exists('/run/shm/go%d' % n): time.sleep(0.001)
";

/// A program in a sandbox of its own.
struct Program {
    host: Host,
    pid: String,
}

impl Program {
    fn start_in(host: Host, code: &str) -> Self {
        let code = format!("{STEPS}{code}");
        let pid = host.cli(["exec", "-d", "box", "--", "/usr/bin/python3", "-c", &code]).ok();
        Self { host, pid }
    }

    /// When the program has come to its step `n`, does something, and lets it go on.
    fn at<R>(&self, n: u32, work: impl FnOnce(&Host) -> R) -> R {
        wait_within(60, &format!("the program is at step {n}"), || self.inside(&format!("at{n}")).exists());
        let result = work(&self.host);
        fs::write(self.inside(&format!("go{n}")), "").expect("let the program go on");
        result
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.host.inside("box", &format!("/run/shm/{name}"))
    }

    /// What it has printed, once it has ended.
    fn end(&self) -> String {
        let pid: i64 = self.pid.parse().expect("a PID");
        wait_within(60, "the program ends", || {
            let report = self.host.cli(["inspect", "box", "--json"]).json();
            let execs = report["execs"].as_array().expect("execs");
            execs.iter().any(|exec| exec["pid"] == pid && !exec["exit"].is_null())
        });
        self.host.cli(["logs", "box", &self.pid]).ok()
    }
}

/// Removes what it reads, as it reads it, and tells what it was never given.
const REMOVER: &str = "
given = []
for entry in os.scandir('/srv/d'):
    given.append(entry.name); os.unlink(entry.path)
    if len(given) in (700, 1700): step(len(given))
missing = {'f%d' % n for n in range(3000)} - set(given)
print(len(missing), 'missing,', len(given) - len(set(given)), 'twice')
";

const FILL: &str = "mkdir /srv/d && cd /srv/d && seq -f f%.0f 0 2999 | xargs touch";

#[test]
fn a_directory_that_is_read_across_checkpoints_gives_each_name_once() {
    if skipped_without_root() {
        return;
    }
    // In the live layer alone; in a frozen one alone; in both.
    for more in ["", "checkpoint", "checkpoint; touch"] {
        let host = Host::start();
        host.create("box");
        host.sh("box", FILL).ok();
        if !more.is_empty() {
            host.checkpoint("box");
        }
        if more.ends_with("touch") {
            host.sh("box", "cd /srv/d; seq -f f%.0f 0 5 900 | xargs chmod 600; touch more; rm f1; touch f1; rm more")
                .ok();
        }
        let program = Program::start_in(host, REMOVER);
        program.at(700, |host| host.checkpoint("box"));
        program.at(1700, |host| host.checkpoint("box"));
        assert_eq!(program.end(), "0 missing, 0 twice", "{more}");
        assert_eq!(program.host.sh("box", "ls /srv/d | wc -l").ok(), "0");
    }
}

#[test]
fn a_directory_that_is_read_across_a_rollback_gives_all_that_is_in_both() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    host.sh("box", FILL).ok();
    host.checkpoint("box");
    host.sh("box", "cd /srv/d; seq -f f%.0f 0 2000 | xargs rm; seq -f f%.0f 0 2000 | xargs touch").ok();
    let program = Program::start_in(host, REMOVER);
    let back = |host: &Host| drop(host.cli(["rollback", "box", "c1", "--fs-only"]).ok());
    program.at(700, back);
    program.at(1700, back);
    let told = program.end();
    assert!(told.starts_with("0 missing"), "{told}");
}
