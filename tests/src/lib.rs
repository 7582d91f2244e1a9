//! What the stories share: a daemon of their own in a store of their own, and a look at what is left behind.
//!
//! Every story runs the built binary as a user would. A missing privilege fails the story by name; with
//! `DELTABOX_SKIP_PRIVILEGED=1` it is skipped, and says so.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "test support: a broken assumption ends the story"
)]

pub mod bench;
pub mod disk;
pub mod leftovers;
pub mod terminal;
pub mod worker;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// The binary under test: `DELTABOX_BIN` (set by `cargo xtask test`), else the one beside this test's own.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("DELTABOX_BIN") {
        return path.into();
    }
    let me = std::env::current_exe().expect("path of the test binary");
    let path = me.ancestors().nth(2).expect("target directory").join("deltabox");
    assert!(path.exists(), "no {}: run `cargo xtask test`, which builds it", path.display());
    path
}

/// Whether big counts are wanted (`cargo xtask test --soak`).
pub fn soak() -> bool {
    std::env::var_os("DELTABOX_SOAK").is_some()
}

/// `small` in CI, `big` in soak.
pub fn count(small: usize, big: usize) -> usize {
    if soak() { big } else { small }
}

/// True when the story has to be skipped because somebody asked for that. Fails without root.
pub fn skipped_without_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    if std::env::var_os("DELTABOX_SKIP_PRIVILEGED").is_some() {
        println!("SKIPPED: needs root, and DELTABOX_SKIP_PRIVILEGED is set");
        return true;
    }
    panic!("this story needs root; set DELTABOX_SKIP_PRIVILEGED=1 to skip it");
}

/// A finished command.
#[derive(Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Its exit code; -1 after a signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Standard output of a success, without the last newline.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "failed: {self:?}");
        self.stdout.trim_end().to_owned()
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
    }

    /// The error object of a failure under `--json`.
    #[track_caller]
    pub fn error(self) -> Value {
        assert!(!self.status.success(), "succeeded: {self:?}");
        let value: Value = serde_json::from_str(&self.stderr).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        value["error"].clone()
    }
}

/// A daemon with a store and a socket of its own. Dropped: all its sandboxes are removed and it is ended.
#[derive(Debug)]
pub struct Host {
    dir: TempDir,
    daemon: Option<Child>,
    env: Vec<(String, String)>,
    /// A command and arguments that the daemon is started by.
    under: Vec<String>,
}

impl Host {
    /// Starts one.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts one with extra environment (fault points).
    pub fn start_with(env: &[(&str, &str)]) -> Self {
        let dir = TempDir::with_prefix("deltabox-test-").expect("temporary directory");
        Self::start_in(dir, env)
    }

    /// Starts one by way of another command (`prlimit ...`), which must execute it in its own place.
    pub fn start_under(under: &[&str]) -> Self {
        let dir = TempDir::with_prefix("deltabox-test-").expect("temporary directory");
        let under = under.iter().map(|word| (*word).to_owned()).collect();
        let mut host = Self { dir, daemon: None, env: Vec::new(), under };
        host.start_daemon();
        host
    }

    /// Starts one whose store and socket lie in `dir`.
    pub fn start_in(dir: TempDir, env: &[(&str, &str)]) -> Self {
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let mut host = Self { dir, daemon: None, env, under: Vec::new() };
        host.start_daemon();
        host
    }

    /// Starts the daemon (again) and waits until it listens.
    pub fn start_daemon(&mut self) {
        let log = fs::File::options().append(true).create(true).open(self.dir.path().join("daemon.log")).unwrap();
        let mut words: Vec<std::ffi::OsString> = self.under.iter().map(Into::into).collect();
        words.extend([binary().into(), "serve".into()]);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .envs(self.environment())
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("start deltabox serve");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("read from deltabox serve");
        assert!(line.starts_with("listening on "), "serve said {line:?}; its log: {}", self.daemon_log());
        self.daemon = Some(child);
    }

    /// The same store with a fresh daemon that has no fault points armed.
    #[must_use]
    pub fn restart_without_faults(mut self) -> Self {
        if self.daemon.is_some() {
            self.end_daemon(Signal::SIGTERM);
        }
        self.env.clear();
        self.start_daemon();
        self
    }

    /// The same store with a fresh daemon that has this environment.
    #[must_use]
    pub fn restart_with(mut self, env: &[(&str, &str)]) -> Self {
        if self.daemon.is_some() {
            self.end_daemon(Signal::SIGTERM);
        }
        self.env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.start_daemon();
        self
    }

    /// What environment points commands to this daemon.
    pub fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![
            ("DELTABOX_STORE", self.store()),
            ("DELTABOX_SOCKET", self.dir.path().join("run/deltabox.sock")),
            ("DELTABOX_NO_AUTOSTART", PathBuf::from("1")),
        ]
    }

    /// The store directory.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// A directory for the story's own files.
    pub fn scratch(&self) -> PathBuf {
        let path = self.dir.path().join("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// What the daemon has logged.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// PID of the daemon.
    pub fn daemon_pid(&self) -> Pid {
        let child = self.daemon.as_ref().expect("the daemon runs");
        Pid::from_raw(i32::try_from(child.id()).unwrap())
    }

    /// Ends the daemon with a signal and waits for it.
    pub fn end_daemon(&mut self, signal: Signal) -> ExitStatus {
        kill(self.daemon_pid(), signal).expect("signal the daemon");
        self.wait_daemon()
    }

    /// Waits for the daemon to end by itself (a fault point).
    pub fn wait_daemon(&mut self) -> ExitStatus {
        self.daemon.take().expect("the daemon runs").wait().expect("wait for the daemon")
    }

    /// A `deltabox` command, not yet started.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(binary());
        command.args(args).envs(self.environment());
        command
    }

    /// Runs `deltabox ARGS`.
    pub fn cli<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        output(self.command(args).stdin(Stdio::null()))
    }

    /// Runs `deltabox ARGS` with this standard input.
    pub fn cli_with_input<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>, input: &[u8]) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start deltabox");
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            // A command that does not read its input closes the pipe; that is its right.
            scope.spawn(move || _ = stdin.write_all(input));
            let mut stderr = child.stderr.take().unwrap();
            let errors = scope.spawn(move || read_all(&mut stderr));
            let stdout = read_all(&mut child.stdout.take().unwrap());
            Output { status: child.wait().unwrap(), stdout, stderr: errors.join().unwrap() }
        })
    }

    /// Makes a sandbox with default settings.
    #[track_caller]
    pub fn create(&self, name: &str) -> String {
        self.cli(["create", name]).ok()
    }

    /// Runs a shell script in a sandbox.
    pub fn sh(&self, sandbox: &str, script: &str) -> Output {
        self.cli(["exec", sandbox, "--", "sh", "-c", script])
    }

    /// `inspect` of a sandbox.
    #[track_caller]
    pub fn inspect(&self, sandbox: &str) -> Value {
        self.cli(["inspect", "--json", sandbox]).json()["sandbox"].clone()
    }

    /// Host PID of a sandbox's init.
    #[track_caller]
    pub fn init(&self, sandbox: &str) -> Pid {
        let pid = self.inspect(sandbox)["init_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        Pid::from_raw(pid.expect("a running init"))
    }

    /// Where the host finds what lies at an absolute path inside.
    #[track_caller]
    pub fn inside(&self, sandbox: &str, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init(sandbox)))
    }

    /// A checkpoint of a sandbox's files; its id.
    #[track_caller]
    pub fn checkpoint(&self, sandbox: &str) -> String {
        self.cli(["checkpoint", sandbox, "--fs-only"]).ok()
    }

    /// Takes a sandbox's files back to a checkpoint.
    #[track_caller]
    pub fn rollback(&self, sandbox: &str, to: &str) {
        self.cli(["rollback", sandbox, to, "--fs-only"]).ok();
    }
}

/// Looks again and again until it is so; fails after so many seconds.
#[track_caller]
pub fn wait_within(seconds: u64, what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !is_so() {
        assert!(Instant::now() < end, "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log ---\n{}", self.daemon_log());
        }
        if self.daemon.is_none() && !self.store().join("tag").exists() {
            return;
        }
        if self.daemon.is_none() {
            self.env.clear();
            self.start_daemon();
        }
        let listed = self.cli(["ls", "--json"]);
        let listed: Value = serde_json::from_str(&listed.stdout).unwrap_or_default();
        for sandbox in listed["sandboxes"].as_array().into_iter().flatten() {
            if let Some(id) = sandbox["id"].as_str() {
                let removed = self.cli(["rm", id]);
                if !removed.status.success() {
                    eprintln!("rm {id}: {removed:?}");
                }
            }
        }
        if let Some(mut child) = self.daemon.take() {
            let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap_or(0)), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

/// Runs a command to its end.
pub fn output(command: &mut Command) -> Output {
    let output = command.output().expect("run a command");
    Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn read_all(from: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).expect("read from a command");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Resident memory of a process in bytes.
pub fn resident_bytes(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read a process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process with memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes") * 1024
}

/// Open descriptors of a process.
pub fn n_descriptors(pid: Pid) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("list descriptors").count()
}

/// Whether a path exists, not following links.
pub fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}
