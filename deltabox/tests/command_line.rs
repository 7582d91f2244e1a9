//! The program itself, from outside: exit codes, errors, and how the daemon comes and goes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "what a helper cannot do fails the test")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A place of its own, whose daemon (if any) is ended with it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_deltabox"));
        command.args(line.split_whitespace()).stdin(Stdio::null());
        command.env("DELTABOX_SOCKET", self.socket()).env("DELTABOX_STORE", self.dir.path().join("store"));
        command.env_remove("DELTABOX_NO_AUTOSTART");
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    fn run_without_autostart(&self, line: &str) -> Output {
        self.command(line).env("DELTABOX_NO_AUTOSTART", "1").output().unwrap()
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("run/sock")
    }

    fn daemon_pid(&self) -> Option<i32> {
        let lock = fs::read_to_string(self.dir.path().join("run/sock.lock")).ok()?;
        let pid: i32 = lock.trim().parse().ok()?;
        // A lock file outlives its daemon, whose number may be somebody else's by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        command.windows(5).any(|word| word == b"serve").then_some(pid)
    }

    fn end_daemon(&self, signal: nix::sys::signal::Signal) {
        let Some(pid) = self.daemon_pid() else { return };
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, signal).unwrap();
        // It may be nobody's child or our own: gone or a zombie, it no longer holds its lock.
        let lock = fs::File::options().write(true).open(self.dir.path().join("run/sock.lock")).unwrap();
        drop(nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.end_daemon(nix::sys::signal::Signal::SIGKILL);
    }
}

fn error(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stderr);
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
    for field in ["code", "message", "hint"] {
        assert!(value["error"][field].is_string(), "{text}");
    }
    value["error"].clone()
}

#[test]
fn a_command_line_that_does_not_parse_exits_2_and_says_so_in_json_if_asked() {
    let place = Place::new();
    for line in ["exec dev", "create --memory lots", "nonsense", ""] {
        let output = place.run(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
    let output = place.run("--json exec dev");
    assert_eq!((output.status.code(), error(&output)["code"].as_str()), (Some(2), Some("usage")));
}

#[test]
fn without_a_daemon_and_without_autostart_every_command_exits_125() {
    let place = Place::new();
    let lines =
        ["create", "ls", "ps a", "inspect a", "logs a", "kill a", "rm a b", "image ls", "image rm a", "attach a 1"];
    for line in lines {
        let output = place.run_without_autostart(&format!("{line} --json"));
        assert_eq!(output.status.code(), Some(125), "{line}");
        let error = error(&output);
        assert_eq!(error["code"], "unreachable");
        assert!(error["message"].as_str().unwrap().contains("run/sock: no such file"), "{error}");
        assert!(output.stdout.is_empty());
    }
    for line in ["exec a -- true", "run -- true"] {
        assert_eq!(place.run_without_autostart(line).status.code(), Some(125), "{line}");
    }
}

#[test]
fn a_user_who_may_not_connect_is_told_where_why_and_what_to_do() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root, to become somebody else");
    let place = Place::new();
    fs::create_dir(place.dir.path().join("run")).unwrap();
    let _listener = UnixListener::bind(place.socket()).unwrap();
    // A copy of the program where anybody may run it; the socket's directory is open, the socket is not.
    let program = place.dir.path().join("deltabox");
    // By a process of its own: a descriptor open for writing here would be inherited by what other tests start
    // (ETXTBSY).
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_deltabox")).arg(&program).status().unwrap().success());
    for (path, mode) in [(place.dir.path(), 0o755), (&program, 0o755), (&place.socket(), 0o600)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let socket = place.socket();
    let output = Command::new(&program).args(["ls", "--socket"]).arg(&socket).uid(65_534).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text, format!("deltabox: connect {}: permission denied; run as root\n", socket.display()));
}

#[test]
fn a_daemon_that_does_not_start_is_reported_with_its_reason() {
    let place = Place::new();
    // A store that cannot be one.
    fs::write(place.dir.path().join("store"), "").unwrap();
    let output = place.run("ls --json");
    assert_eq!(output.status.code(), Some(125));
    assert!(error(&output)["message"].as_str().unwrap().starts_with("start daemon: "), "{output:?}");
}

#[test]
fn something_else_on_the_socket_is_not_taken_for_a_daemon() {
    let place = Place::new();
    fs::create_dir(place.dir.path().join("run")).unwrap();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let impostor = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 64]);
    });
    let output = place.run("ls --json");
    assert_eq!((output.status.code(), error(&output)["code"].as_str()), (Some(125), Some("unreachable")));
    impostor.join().unwrap();
}

#[test]
fn commands_at_the_same_time_start_one_daemon_between_them() {
    let place = Place::new();
    let clients: Vec<Child> = (0..6)
        .map(|_| place.command("ls --json").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    for client in clients {
        let output = client.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, b"{\"sandboxes\":[]}\n");
    }
    let log = fs::read_to_string(place.dir.path().join("store/daemon.log")).unwrap();
    assert_eq!(log.matches("listening socket=").count(), 1, "{log}");
    assert_eq!(fs::metadata(place.dir.path().join("store")).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(place.dir.path().join("store/daemon.log")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_daemon_started_by_a_command_keeps_nothing_of_it() {
    let place = Place::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    // A descriptor that the caller left open (by dup, without close-on-exec) and never told us about.
    let line = format!("exec 9>&1; exec {} ls", env!("CARGO_BIN_EXE_deltabox"));
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]).stdin(Stdio::null()).stdout(writer);
    shell.env("DELTABOX_SOCKET", place.socket()).env("DELTABOX_STORE", place.dir.path().join("store"));
    assert!(shell.status().unwrap().success());
    drop(shell);
    // Ends only when nobody holds the pipe: the daemon does not.
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let pid = place.daemon_pid().unwrap();
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).unwrap();
    assert_eq!(session.as_raw(), pid);
}

#[test]
fn a_daemon_that_is_told_to_end_takes_its_socket_away_and_exits_0() {
    let place = Place::new();
    for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGINT] {
        let mut daemon = place.command("serve --json").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        let out = daemon.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["pid"], daemon.id());
        assert!(place.run_without_autostart("ls").status.success());
        place.end_daemon(signal);
        let status = daemon.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None));
        assert!(!place.socket().exists());
    }
}

#[test]
fn a_second_daemon_is_refused_and_a_killed_one_replaced() {
    let place = Place::new();
    assert!(place.run("ls").status.success());
    let first = place.daemon_pid().unwrap();
    let output = place.run("serve --json");
    assert_eq!(output.status.code(), Some(1));
    let message = error(&output)["message"].as_str().unwrap().to_owned();
    assert!(message.contains(&format!("already running, pid {first}")), "{message}");
    place.end_daemon(nix::sys::signal::Signal::SIGKILL);
    assert!(place.socket().exists(), "a killed daemon leaves its socket");
    let start = Instant::now();
    assert!(place.run("ls").status.success());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_ne!(place.daemon_pid().unwrap(), first);
}

#[test]
fn a_daemon_of_another_store_is_not_used_by_accident() {
    let place = Place::new();
    assert!(place.run("ls").status.success());
    let output = place.command("ls --json").env("DELTABOX_STORE", place.dir.path().join("other")).output().unwrap();
    assert_eq!((output.status.code(), error(&output)["code"].as_str()), (Some(1), Some("other_store")));
}
