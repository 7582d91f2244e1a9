//! The demo's store and daemon, and who removes them whatever becomes of the demo.

use std::env;
use std::fs;
use std::io::{BufRead, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};

use crate::workspace;

/// Chosen: a daemon that has not bound its socket by then is taken for broken.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Chosen: a daemon that has not ended by then gets SIGKILL.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// There is no descriptor to wait on for a socket that does not exist yet.
const POLL_PERIOD: Duration = Duration::from_millis(5);

/// The binary and the state that it works on.
pub(super) struct Place {
    pub(super) binary: PathBuf,
    /// A fresh directory with store, socket and the daemon's log.
    pub(super) home: PathBuf,
}

impl Place {
    pub(super) fn make(binary: PathBuf) -> anyhow::Result<Self> {
        let home = env::temp_dir().join(format!("deltabox-demo-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&home).with_context(|| format!("create {}", home.display()))?;
        Ok(Self { binary, home })
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.home.join("socket")
    }

    fn log(&self) -> PathBuf {
        self.home.join("daemon.log")
    }

    /// `deltabox ARGS` on this state.
    pub(super) fn deltabox(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).env("DELTABOX_STORE", self.home.join("store")).env("DELTABOX_SOCKET", self.socket());
        // `cargo run`'s library path would slow down every exec, inside too.
        command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null());
        command
    }
}

/// The keeper as the story sees it.
pub(super) struct Keeper {
    pub(super) process: Child,
}

impl Keeper {
    pub(super) fn start(place: &Place) -> anyhow::Result<Self> {
        let mut command = Command::new(env::current_exe().context("find xtask's own program")?);
        command.args(["demo-keeper", "--binary"]).arg(&place.binary).arg("--home").arg(&place.home);
        // Ctrl-C goes to the terminal's foreground group; the keeper has to outlive that.
        let process = command.stdin(Stdio::piped()).process_group(0).spawn().context("start the demo's keeper")?;
        Ok(Self { process })
    }

    pub(super) fn will_make(&mut self, sandbox: &str) -> anyhow::Result<()> {
        let stdin = self.process.stdin.as_mut().context("the keeper's stdin is closed")?;
        writeln!(stdin, "{sandbox}").context("tell the keeper of a sandbox")
    }

    /// Lets it clean up, and waits for that.
    pub(super) fn finish(&mut self) -> anyhow::Result<()> {
        drop(self.process.stdin.take());
        let status = self.process.wait().context("wait for the demo's keeper")?;
        ensure!(status.success(), "the demo's keeper failed, see above");
        Ok(())
    }
}

#[derive(clap::Args)]
pub(crate) struct KeeperArgs {
    #[arg(long)]
    binary: PathBuf,
    #[arg(long)]
    home: PathBuf,
}

/// The keeper's process: owns the daemon until stdin closes, then removes everything.
pub(crate) fn keep(args: &KeeperArgs) -> anyhow::Result<()> {
    let place = Place { binary: args.binary.clone(), home: args.home.clone() };
    let kept = keep_daemon(&place);
    let removed = fs::remove_dir_all(&place.home).with_context(|| format!("remove {}", place.home.display()));
    kept.and(removed)
}

fn keep_daemon(place: &Place) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(place)?;
    let (made, early_end) = watch(&mut daemon)?;
    if early_end.is_some() && !made.is_empty() {
        // Sandboxes outlive their daemon: it takes another one to remove them.
        daemon = Daemon::start(place)?;
        wait_until_ready(place, &mut daemon.process)?;
    }
    for sandbox in made {
        // Gone already when the story went well. Cleaning up goes on whatever one command says.
        let _ = place.deltabox(&["rm", &sandbox]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
    let ended = daemon.end();
    let outcome = match early_end {
        Some(status) => Err(anyhow!("the daemon ended by itself: {status}")),
        None => ended,
    };
    if outcome.is_err() {
        println!("the daemon's log:\n{}", fs::read_to_string(place.log()).unwrap_or_default());
    }
    outcome
}

/// Collects the names of sandboxes until stdin closes. Gives the daemon's status if it has ended by then;
/// when that happens before the first sandbox, there is nothing to wait for.
fn watch(daemon: &mut Daemon) -> anyhow::Result<(Vec<String>, Option<ExitStatus>)> {
    let (sender, names) = mpsc::channel();
    thread::spawn(move || {
        let lines = std::io::stdin().lock().lines();
        // Ends with the pipe, or with this process.
        lines.map_while(Result::ok).try_for_each(|name| sender.send(name))
    });
    let mut made = Vec::new();
    loop {
        let received = names.recv_timeout(POLL_PERIOD);
        let ended = daemon.process.try_wait().context("look at the daemon")?;
        match received {
            Ok(name) => made.push(name),
            Err(RecvTimeoutError::Disconnected) => return Ok((made, ended)),
            Err(RecvTimeoutError::Timeout) if ended.is_some() && made.is_empty() => return Ok((made, ended)),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// Waits until the daemon takes connections; fails when `process` (it, or its keeper) ends before.
pub(super) fn wait_until_ready(place: &Place, process: &mut Child) -> anyhow::Result<()> {
    let begin = Instant::now();
    while UnixStream::connect(place.socket()).is_err() {
        if let Some(status) = process.try_wait().context("look at the daemon")? {
            bail!("the daemon did not start ({status})");
        }
        ensure!(begin.elapsed() < START_DEADLINE, "no socket after {START_DEADLINE:?}");
        thread::sleep(POLL_PERIOD);
    }
    Ok(())
}

/// `deltabox serve` as our own child: until it is waited for, its pid cannot be another's. Killed on drop.
struct Daemon {
    process: Child,
}

impl Daemon {
    fn start(place: &Place) -> anyhow::Result<Self> {
        let path = place.log();
        let log = fs::File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        let mut command = place.deltabox(&["serve"]);
        command.stdout(log.try_clone().context("duplicate the log's descriptor")?).stderr(log);
        Ok(Self { process: command.spawn().context("start `deltabox serve`")? })
    }

    /// Ends it with SIGTERM. One that does not heed that is killed, which is a failure.
    fn end(mut self) -> anyhow::Result<()> {
        if self.process.try_wait().context("look at the daemon")?.is_some() {
            return Ok(());
        }
        let pid = self.process.id().to_string();
        workspace::capture(Command::new("sh").args(["-c", "kill -TERM \"$1\"", "sh", &pid]))?;
        let begin = Instant::now();
        while self.process.try_wait().context("wait for the daemon")?.is_none() {
            ensure!(begin.elapsed() < END_DEADLINE, "the daemon did not end within {END_DEADLINE:?} of SIGTERM");
            thread::sleep(POLL_PERIOD);
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail harmlessly when it has been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
