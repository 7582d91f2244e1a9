//! Programs that know nothing of deltabox, checkpointed again and again while they work: each comes to the same
//! results as in a sandbox where nothing happens.
//!
//! Each works in rounds until it has been checkpointed often enough; the undisturbed one then works as many. So the
//! checkpoints lie in the middle of the work however fast the machine is.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a broken assumption of a helper ends its story")]

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use deltabox_tests::{Host, Output, count, skipped_without_root, soak};

const ROUNDS: &str = include_str!("programs/rounds.py");

/// A program, and what it needs.
struct Story<'a> {
    program: &'a str,
    env: Vec<(&'a str, String)>,
    /// More words for `create`.
    create: Vec<String>,
    /// How many milliseconds lie between two checkpoints, on average.
    gap_ms: u64,
    /// What must succeed on the files of a checkpoint made in the middle of the work.
    holds: &'a str,
}

impl<'a> Story<'a> {
    fn new(program: &'a str) -> Self {
        Self { program, env: Vec::new(), create: Vec::new(), gap_ms: 100, holds: "true" }
    }

    /// The command in a sandbox of the host, not yet started.
    fn command(&self, host: &Host, sandbox: &str, rounds: &str) -> std::process::Command {
        // Merges under way too.
        host.cli(
            ["create", "--merge-above", "4", sandbox].into_iter().map(str::to_owned).chain(self.create.iter().cloned()),
        )
        .ok();
        let program = format!("{ROUNDS}\n{}", self.program);
        let mut words = vec!["exec".to_owned(), sandbox.to_owned()];
        let own = [("ROUNDS", rounds.to_owned()), ("PROGRAM", program.clone())];
        for (name, value) in own.iter().chain(&self.env) {
            words.extend(["--env".to_owned(), format!("{name}={value}")]);
        }
        words.extend(["--", "/usr/bin/python3", "-c"].map(str::to_owned));
        words.push(program);
        let mut command = host.command(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self) {
        if skipped_without_root() {
            return;
        }
        let wanted = count(12, 100);
        let host = Host::start();
        let (results, checkpoints) = self.run_disturbed(&host, wanted);
        let rounds = results.lines().find_map(|line| line.strip_prefix("rounds ")).expect("a number of rounds");
        println!("{wanted} checkpoints in {rounds} rounds");
        let undisturbed = deltabox_tests::output(&mut self.command(&host, "calm", rounds)).ok();
        assert_eq!(results, undisturbed);
        // Going back into the middle of the work gives files that a program killed there could have left.
        for id in [&checkpoints[wanted / 3], &checkpoints[wanted - 1], &checkpoints[wanted / 2]] {
            host.cli(["rollback", "box", id, "--fs-only"]).ok();
            let held = host.sh("box", &format!("cd /srv/work; {}", self.holds));
            assert!(held.status.success(), "{id}: {held:?}");
        }
    }

    /// What it printed, and the checkpoints made while it ran.
    fn run_disturbed(&self, host: &Host, wanted: usize) -> (String, Vec<String>) {
        let mut child = self.command(host, "box", "").spawn().unwrap();
        let mut checkpoints = Vec::new();
        let root = format!("/proc/{}/root", host.inspect("box")["init_pid"]);
        let mut random = 1_u64;
        let mut failed = None;
        while checkpoints.len() < wanted && child.try_wait().unwrap().is_none() {
            if !Path::new(&root).join("srv/started").exists() {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            std::thread::sleep(Duration::from_millis((random >> 33) % (2 * self.gap_ms)));
            let made = host.cli(["checkpoint", "box", "--fs-only"]);
            if !made.status.success() {
                failed = Some(made);
                break;
            }
            // One that was made after the end proves nothing.
            if child.try_wait().unwrap().is_none() {
                checkpoints.push(made.ok());
            }
        }
        host.sh("box", "touch /srv/enough").ok();
        let done = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let done = Output { status: done.status, stdout: text(&done.stdout), stderr: text(&done.stderr) };
        assert!(failed.is_none(), "checkpoint {}: {failed:?}; the program: {done:?}", checkpoints.len() + 1);
        assert!(done.status.success(), "after {} checkpoints: {done:?}", checkpoints.len());
        assert_eq!(checkpoints.len(), wanted, "it ended before it was checkpointed often enough: {done:?}");
        (done.ok(), checkpoints)
    }
}

#[test]
fn git_commits_merges_stashes_and_collects() {
    let mut story = Story::new(include_str!("programs/git.py"));
    // A loose object or a reference is there or not; a killed git may leave a lock, which fsck does not mind.
    story.holds = "git -c safe.directory='*' -C repo fsck --full --no-dangling";
    story.run();
}

#[test]
fn sqlite_in_wal_mode_has_a_writer_and_readers() {
    let mut story = Story::new(include_str!("programs/sqlite.py"));
    story.holds = "exec /usr/bin/python3 -c \"import sqlite3; db = sqlite3.connect('bank.db'); \
                   assert db.execute('pragma integrity_check').fetchall() == [('ok',)]; \
                   assert db.execute('select sum(balance) from accounts').fetchone()[0] in (100000, None); \
                   n = db.execute('select count(*), max(id) from moves').fetchone(); assert n[0] == (n[1] or 0), n\"";
    story.run();
}

#[test]
fn tar_packs_and_unpacks_5000_files() {
    Story { gap_ms: 200, ..Story::new(include_str!("programs/tar.py")) }.run();
}

#[test]
fn make_compiles_100_files_with_three_compilers_at_a_time() {
    Story { gap_ms: 400, ..Story::new(include_str!("programs/make.py")) }.run();
}

#[test]
fn pip_installs_a_wheel() {
    Story { gap_ms: 200, ..Story::new(include_str!("programs/pip.py")) }.run();
}

/// The host's settings for pip, which has an index to ask.
fn with_an_index(program: &str) -> Story<'_> {
    let mut story = Story { gap_ms: 200, ..Story::new(program) };
    story.create = vec!["--net".to_owned(), "host".to_owned()];
    for (name, value) in std::env::vars().filter(|(name, _)| name.starts_with("PIP_") || name.ends_with("_proxy")) {
        story.create.extend(["--env".to_owned(), format!("{name}={value}")]);
    }
    story
}

#[test]
fn pip_installs_from_an_index_in_soak() {
    if !soak() {
        println!("SKIPPED: asks a package index; runs with `cargo xtask test --soak`");
        return;
    }
    let mut story = with_an_index(include_str!("programs/pip.py"));
    story.env.push(("PACKAGE", "toolz==1.0.0".to_owned()));
    story.run();
}

#[test]
fn pytest_runs_the_tests_of_a_real_project_in_soak() {
    if !soak() {
        println!("SKIPPED: installs pytest; runs with `cargo xtask test --soak`");
        return;
    }
    with_an_index(include_str!("programs/pytest.py")).run();
}

#[test]
fn a_node_server_keeps_its_connections_and_its_socket_in_the_tree() {
    let mut story = Story { gap_ms: 30, ..Story::new(include_str!("programs/node.py")) };
    let installed = ["/usr/bin/node", "/usr/local/bin/node"].into_iter().find(|path| Path::new(path).exists());
    let node = match installed {
        Some(path) => path,
        None if soak() => {
            story = Story { gap_ms: 30, ..with_an_index(story.program) };
            "pip"
        }
        None => {
            println!("SKIPPED: no node in /usr/bin or /usr/local/bin; `cargo xtask test --soak` fetches one");
            return;
        }
    };
    story.env.push(("NODE", node.to_owned()));
    story.env.push(("SERVER", include_str!("programs/server.js").to_owned()));
    story.run();
}
