//! The measured program in its sandbox, and the protocol with it.
//!
//! ```text
//!                 every reader waits for a byte of its input                  <- here the checkpoint is taken
//!  d to each      the first writes to memory, each says `gone`, and waits for ever: nobody reads the input
//!  p to each      stays in the input: the connection to the client is not part of a checkpoint
//!  rollback       every reader waits for a byte again, and has it: `back WHEN WRONG`, when it ran (CLOCK_MONOTONIC)
//! ```

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::fcntl::{OFlag, SpliceFFlags, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cell::{Cell, Kind, Program};

/// How long anything that should come soon may take (chosen).
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const PYTHON: &str = include_str!("program.py");
const NODE: &str = include_str!("program.js");
const JAVA: &str = include_str!("Program.java");

/// Bytes of a terminal-sized line; more readers than that there are not.
const TEE_BYTES: usize = 64;

/// The program, and the client of it.
pub(crate) struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    n_readers: usize,
    /// Host PID of the process with the memory.
    pub(crate) large: i32,
    /// Its input, for a look at what is in it.
    pipe: File,
}

/// How a program came back.
pub(crate) struct Back {
    /// When the last of its readers ran, on the clock of [`monotonic`].
    pub(crate) last_ran: Duration,
}

/// Why a kind of program cannot be measured here, and the command that changes it.
pub(crate) fn missing(kind: Kind) -> Option<String> {
    let has = |path: &str| Path::new(path).exists();
    let (name, is_there) = match kind {
        Kind::Python | Kind::Tree => ("/usr/bin/python3", has("/usr/bin/python3")),
        Kind::Node => ("/usr/bin/node", has("/usr/bin/node")),
        Kind::Jvm => ("/usr/bin/java and /usr/bin/javac", has("/usr/bin/java") && has("/usr/bin/javac")),
    };
    (!is_there).then(|| format!("no {name}; `cargo xtask setup --with-programs` brings it"))
}

/// Its command line; the class of the JVM's program lies in `classes`.
pub(crate) fn argv(cell: &Cell, mode: &str, classes: &str) -> Vec<String> {
    let Cell { program: Program { kind, mb, huge, .. }, step, .. } = *cell;
    let (mb, step) = (mb.to_string(), step.to_string());
    let pages = if huge { "huge" } else { "small" };
    let words: Vec<&str> = match kind {
        Kind::Python => vec!["/usr/bin/python3", "-c", PYTHON, &mb, pages, &step, "1", mode],
        Kind::Tree => vec!["/usr/bin/python3", "-c", PYTHON, &mb, pages, &step, "3", mode],
        Kind::Node => vec!["/usr/bin/node", "-e", NODE, "--", &mb, &step, mode],
        Kind::Jvm => vec!["/usr/bin/java", "-Xmx256m", "-cp", classes, "Program", &mb, &step, mode],
    };
    words.into_iter().map(str::to_owned).collect()
}

/// Compiles the JVM's program into `dir`, once.
pub(crate) fn compile(dir: &Path) -> anyhow::Result<()> {
    if dir.join("Program.class").exists() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    let source = dir.join("Program.java");
    fs::write(&source, JAVA)?;
    let status = Command::new("/usr/bin/javac").arg("-d").arg(dir).arg(&source).status().context("start javac")?;
    ensure!(status.success(), "javac: {status}");
    Ok(())
}

impl Running {
    /// Starts it in a sandbox, whose processes are in `group`.
    pub(crate) fn start(sandbox: &str, group: &Path, cell: &Cell, classes: &str) -> anyhow::Result<Self> {
        let mut child = Command::new(deltabox_tests::binary())
            .args(["exec", "-i", sandbox, "--"])
            .args(argv(cell, "told", classes))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start deltabox exec")?;
        let input = child.stdin.take().context("its input is piped")?;
        let mut output = BufReader::new(child.stdout.take().context("its output is piped")?);
        let mut number = |word: &str| -> anyhow::Result<i32> {
            let line = line(&mut output)?;
            let number = line.strip_prefix(word).with_context(|| format!("the program says `{line}`"))?;
            Ok(number.trim().parse()?)
        };
        let (leader, large) = (number("leader")?, number("ready")?);
        let pipe = PathBuf::from(format!("/proc/{}/fd/0", host_pid(group, leader)?));
        let pipe = open_pipe(&pipe).with_context(|| format!("open {}", pipe.display()))?;
        let large = host_pid(group, large)?;
        Ok(Self { child, input: Some(input), output, n_readers: cell.program.n_readers(), large, pipe })
    }

    /// It writes to memory, and reads its input no more.
    pub(crate) fn go_on(&mut self) -> anyhow::Result<()> {
        self.tell(b'd')?;
        for _ in 0..self.n_readers {
            let line = line(&mut self.output)?;
            ensure!(line == "gone", "the program says `{line}`");
        }
        Ok(())
    }

    /// Puts into its input what wakes it once it has come back.
    pub(crate) fn prepare_return(&mut self) -> anyhow::Result<()> {
        self.tell(b'p')?;
        let end = Instant::now() + PATIENCE;
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        while tee(self.pipe.as_fd(), write.as_fd(), TEE_BYTES, SpliceFFlags::SPLICE_F_NONBLOCK) != Ok(self.n_readers) {
            ensure!(Instant::now() < end, "the program's input does not come");
            std::thread::sleep(Duration::from_micros(200));
            let mut looked = [0; TEE_BYTES];
            // What an earlier look has copied.
            if poll(&mut [PollFd::new(read.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? > 0 {
                nix::unistd::read(&read, &mut looked)?;
            }
        }
        Ok(())
    }

    /// What it says after the rollback. Fails if its memory is not as it was.
    pub(crate) fn come_back(&mut self) -> anyhow::Result<Back> {
        let mut last_ran = Duration::ZERO;
        for _ in 0..self.n_readers {
            let line = line(&mut self.output)?;
            let Some((when, n_wrong)) = line.strip_prefix("back ").and_then(|rest| rest.split_once(' ')) else {
                bail!("the program says `{line}`");
            };
            ensure!(n_wrong == "0", "{n_wrong} pages are not as they were");
            last_ran = last_ran.max(Duration::from_nanos(when.parse()?));
        }
        Ok(Back { last_ran })
    }

    fn tell(&mut self, byte: u8) -> anyhow::Result<()> {
        let bytes = vec![byte; self.n_readers];
        self.input.as_mut().context("it runs")?.write_all(&bytes).context("tell the program something")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Now, on the clock that programs inside have, too.
pub(crate) fn monotonic() -> anyhow::Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

fn line(from: &mut BufReader<ChildStdout>) -> anyhow::Result<String> {
    if from.buffer().is_empty() {
        let patience = PollTimeout::try_from(PATIENCE)?;
        let n = poll(&mut [PollFd::new(from.get_ref().as_fd(), PollFlags::POLLIN)], patience)?;
        ensure!(n > 0, "the program says nothing");
    }
    let mut line = String::new();
    from.read_line(&mut line).context("read from the program")?;
    ensure!(!line.is_empty(), "the program has ended");
    Ok(line.trim_end().to_owned())
}

fn open_pipe(path: &Path) -> std::io::Result<File> {
    // Without waiting for a writer, should it be none any more.
    std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true), libc_nonblock()).open(path)
}

fn libc_nonblock() -> i32 {
    OFlag::O_NONBLOCK.bits()
}

/// Which process of the group has this number inside.
fn host_pid(group: &Path, inside: i32) -> anyhow::Result<i32> {
    let listed = fs::read_to_string(group.join("cgroup.procs")).context("list the sandbox's processes")?;
    for pid in listed.split_whitespace() {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        if numbers.split_whitespace().next_back().and_then(|number| number.parse().ok()) == Some(inside) {
            return Ok(pid.parse()?);
        }
    }
    bail!("no process has number {inside} inside")
}
