//! A short tour of sandboxes, with the real output of each command, held against what it should be.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::keeper::{Keeper, Place, wait_until_ready};
use crate::workspace;

/// What the product promises, in the order in which a user would meet it.
pub(super) fn tell(story: &mut Story) -> anyhow::Result<()> {
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

pub(super) struct Story {
    pub(super) place: Place,
    pub(super) keeper: Keeper,
    pub(super) steps: Vec<(String, Duration)>,
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
