//! `demo`: the product's main job as a story, with its real output, held against what it should be.
//!
//! It uses a store and a daemon of its own. Both belong to a *keeper*: a second process in a process group of
//! its own, told on its stdin which sandboxes are made. When that closes, because the story is over or its
//! process is gone for whatever reason (Ctrl-C, SIGKILL), the keeper removes sandboxes, daemon and store.

use std::env;
use std::fs;
use std::io::{BufRead, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};

use crate::setup;
use crate::workspace::{self, Profile, Workspace};

/// Chosen: a daemon that has not bound its socket by then is taken for broken.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Chosen: a daemon that has not ended by then gets SIGKILL.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// There is no descriptor to wait on for a socket that does not exist yet.
const POLL_PERIOD: Duration = Duration::from_millis(5);

pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    setup::ensure(workspace)?;
    let binary = match env::var_os("DELTABOX_BIN") {
        Some(binary) => PathBuf::from(binary),
        None => workspace.build_binary("deltabox", "deltabox", Profile::Release)?,
    };
    let place = Place::make(binary)?;
    let mut story = Story { keeper: Keeper::start(&place)?, place, steps: Vec::new() };
    let told = tell(&mut story);
    println!();
    for (title, duration) in &story.steps {
        println!("{title:<58} {:>9.1} ms", duration.as_secs_f64() * 1e3);
    }
    println!("(from the start of the command to its exit; one run, no statistics)");
    let ended = story.keeper.finish();
    // The keeper has removed it; a command that ran on after the daemon's death may have made it again.
    let _ = fs::remove_dir_all(&story.place.home);
    told?;
    ended?;
    println!("demo: everything was as promised");
    Ok(())
}

/// What the product promises, in the order in which a user would meet it.
fn tell(story: &mut Story) -> anyhow::Result<()> {
    story.step("what this machine offers", &["doctor"])?.succeeds()?;
    wait_until_ready(&story.place, &mut story.keeper.process)?;

    let program =
        "import os, sys; print('python', sys.version.split()[0], 'is pid', os.getpid(), 'on', os.uname().nodename)";
    story
        .step("a program in a sandbox of its own", &["run", "--", "/usr/bin/python3", "-c", program])?
        .succeeds()?
        .prints("python 3")?;
    story.step("its exit status is the command's", &["run", "--", "sh", "-c", "exit 7"])?.exits_with(7)?;

    story.create("demo-a")?;
    // Names that nobody else on this machine uses: that they are absent outside must mean something.
    let dir = format!("/tmp/deltabox-story-{}", std::process::id());
    let file = format!("/usr/deltabox-story-{}", std::process::id());
    let write =
        format!("mkdir {dir} && for i in 1 2 3; do echo line $i > {dir}/$i; done && echo mine > {file} && ls {dir}");
    story
        .step("files written inside", &["exec", "demo-a", "--", "sh", "-c", &write])?
        .succeeds()?
        .prints("1\n2\n3\n")?;
    let read = format!("cat {dir}/* {file}");
    story
        .step("are there for the next command", &["exec", "demo-a", "--", "sh", "-c", &read])?
        .succeeds()?
        .prints("line 1\nline 2\nline 3\nmine\n")?;
    for path in [&dir, &file] {
        ensure!(!Path::new(path).exists(), "{path} was written inside and exists outside");
    }
    println!("   outside there is neither {dir} nor {file}");

    story.create("demo-b")?;
    let absent = format!("test ! -e {dir} && test ! -e {file} && echo nothing there");
    story
        .step("a second sandbox does not see them", &["exec", "demo-b", "--", "sh", "-c", &absent])?
        .succeeds()?
        .prints("nothing there")?;

    let detached =
        story.step("a command in the background", &["exec", "-d", "demo-a", "--", "sleep", "1000"])?.succeeds()?;
    let pid: u32 = detached.stdout.trim().parse().context("`exec -d` should print the pid inside")?;
    let ps = story.step("is among the sandbox's processes", &["ps", "demo-a"])?.succeeds()?;
    let is_listed =
        |line: &str| line.contains("sleep 1000") && line.split_whitespace().any(|word| word == pid.to_string());
    ensure!(ps.stdout.lines().any(is_listed), "`ps demo-a` should list `sleep 1000` with pid {pid}");
    story.step("and not among the other's", &["ps", "demo-b"])?.succeeds()?.hides("sleep 1000")?;

    story.step("both sandboxes", &["ls"])?.succeeds()?.prints("demo-a")?.prints("demo-b")?;
    story.step("removed with all that runs and lies in them", &["rm", "demo-a", "demo-b"])?.succeeds()?;
    story.step("nothing is left", &["ls"])?.succeeds()?.hides("demo-a")?.hides("demo-b")?;
    Ok(())
}

/// The binary and the state that it works on.
struct Place {
    binary: PathBuf,
    /// A fresh directory with store, socket and the daemon's log.
    home: PathBuf,
}

impl Place {
    fn make(binary: PathBuf) -> anyhow::Result<Self> {
        let home = env::temp_dir().join(format!("deltabox-demo-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&home).with_context(|| format!("create {}", home.display()))?;
        Ok(Self { binary, home })
    }

    fn socket(&self) -> PathBuf {
        self.home.join("socket")
    }

    fn log(&self) -> PathBuf {
        self.home.join("daemon.log")
    }

    /// `deltabox ARGS` on this state.
    fn deltabox(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).env("DELTABOX_STORE", self.home.join("store")).env("DELTABOX_SOCKET", self.socket());
        // `cargo run`'s library path would slow down every exec, inside too.
        command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null());
        command
    }
}

struct Story {
    place: Place,
    keeper: Keeper,
    steps: Vec<(String, Duration)>,
}

impl Story {
    /// Runs one command, shows it with its output, and notes its time.
    fn step(&mut self, title: &str, args: &[&str]) -> anyhow::Result<Outcome> {
        if !self.steps.is_empty() {
            // A command would start a daemon that is not the keeper's.
            UnixStream::connect(self.place.socket()).context("the daemon is gone")?;
        }
        let mut command = self.place.deltabox(args);
        let line = workspace::line_of(&command);
        println!("\n-- {title}\n$ {line}");
        let begin = Instant::now();
        let output = command.output().with_context(|| format!("start `{line}`"))?;
        self.steps.push((title.to_owned(), begin.elapsed()));
        let outcome = Outcome {
            line,
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        for text in outcome.stdout.lines().chain(outcome.stderr.lines()) {
            println!("   {text}");
        }
        Ok(outcome)
    }

    fn create(&mut self, name: &str) -> anyhow::Result<()> {
        self.keeper.will_make(name)?;
        let created = self.step(&format!("a new sandbox, {name}"), &["create", name])?.succeeds()?;
        ensure!(
            created.stdout.trim() == name,
            "`create` should print `{name}`, and printed `{}`",
            created.stdout.trim()
        );
        Ok(())
    }
}

/// What a command did.
struct Outcome {
    line: String,
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Outcome {
    fn succeeds(self) -> anyhow::Result<Self> {
        self.exits_with(0)
    }

    fn exits_with(self, code: i32) -> anyhow::Result<Self> {
        if self.status.code() != Some(code) {
            bail!("`{}` should exit with {code}: {}: {}", self.line, self.status, self.stderr.trim());
        }
        Ok(self)
    }

    fn prints(self, text: &str) -> anyhow::Result<Self> {
        ensure!(self.stdout.contains(text), "`{}` should print {text:?}, and printed {:?}", self.line, self.stdout);
        Ok(self)
    }

    fn hides(self, text: &str) -> anyhow::Result<Self> {
        ensure!(!self.stdout.contains(text), "`{}` should not print {text:?}", self.line);
        Ok(self)
    }
}

/// The keeper as the story sees it.
struct Keeper {
    process: Child,
}

impl Keeper {
    fn start(place: &Place) -> anyhow::Result<Self> {
        let mut command = Command::new(env::current_exe().context("find xtask's own program")?);
        command.args(["demo-keeper", "--binary"]).arg(&place.binary).arg("--home").arg(&place.home);
        // Ctrl-C goes to the terminal's foreground group; the keeper has to outlive that.
        let process = command.stdin(Stdio::piped()).process_group(0).spawn().context("start the demo's keeper")?;
        Ok(Self { process })
    }

    fn will_make(&mut self, sandbox: &str) -> anyhow::Result<()> {
        let stdin = self.process.stdin.as_mut().context("the keeper's stdin is closed")?;
        writeln!(stdin, "{sandbox}").context("tell the keeper of a sandbox")
    }

    /// Lets it clean up, and waits for that.
    fn finish(&mut self) -> anyhow::Result<()> {
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
fn wait_until_ready(place: &Place, process: &mut Child) -> anyhow::Result<()> {
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
