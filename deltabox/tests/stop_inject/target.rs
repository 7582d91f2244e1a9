//! Programs in cgroups of their own, ready to be disturbed.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::{Request, Stopped, Tracer, while_stopped};
use deltabox::kernel::cgroups::Hierarchies;
use deltabox::sandbox::cgroup::remove_tree;

pub(crate) fn n_rounds() -> usize {
    if std::env::var_os("DELTABOX_SOAK").is_some() { 1000 } else { 100 }
}

/// Compiles a program, once for each version of its source, into cargo's directory for that.
pub(crate) fn program(name: &str) -> PathBuf {
    // One after the other: a program that runs keeps its name then.
    static COMPILING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _compiling = COMPILING.lock();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(format!("{name}.c"));
    let time = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let made = dir.join(format!("stop-inject-{name}"));
    if time(&made).is_none_or(|made| time(&source).is_none_or(|source| source > made)) {
        // Others may ask at the same time: each compiles for itself, the rename decides.
        let own = dir.join(format!("{name}.{}.{:?}", std::process::id(), std::thread::current().id()));
        let compile = ["-O1", "-pthread", "-o"];
        let status = Command::new("cc").args(compile).args([&own, &source]).status().expect("run cc");
        assert!(status.success(), "cc {}", source.display());
        std::fs::rename(&own, &made).expect("rename a program");
    }
    made
}

/// A cgroup that goes with its processes.
pub(crate) struct Group(pub(crate) PathBuf);

impl Group {
    pub(crate) fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let unified = Hierarchies::find().expect("cgroups").unified;
        let dir = unified.join(format!("deltabox-stop-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).expect("make a cgroup");
        Self(dir)
    }

    pub(crate) fn request(&self, deadline: Duration) -> Request<'_> {
        Request { group: &self.0, excluded: &[], deadline: Instant::now() + deadline }
    }

    pub(crate) fn stopped<R: Send>(&self, work: impl FnOnce(&mut Stopped) -> R + Send) -> R {
        while_stopped(self.request(Duration::from_secs(30)), work).expect("stop")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        let end = Instant::now() + Duration::from_secs(30);
        while remove_tree(&self.0).is_err() && Instant::now() < end {
            std::thread::yield_now();
        }
    }
}

/// A program in its group, ready to be disturbed.
pub(crate) struct Target {
    pub(crate) child: Child,
    pub(crate) input: Option<ChildStdin>,
    pub(crate) output: BufReader<ChildStdout>,
    pub(crate) group: Group,
    /// The program itself, if that is not the child that was started.
    pub(crate) other: Option<libc::pid_t>,
}

impl Target {
    pub(crate) fn start(name: &str, mode: &str) -> Self {
        Self::start_as(name, mode, &[])
    }

    /// With variables in its environment.
    pub(crate) fn start_as(name: &str, mode: &str, variables: &[(&str, &str)]) -> Self {
        Self::start_program(&program(name), &[mode], variables)
    }

    /// Any program.
    pub(crate) fn start_program(program: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let group = Group::new();
        let mut child = Command::new(program)
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a program");
        std::fs::write(group.0.join("cgroup.procs"), child.id().to_string()).expect("move into the cgroup");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("its output"));
        let mut target = Self { child, input, output, group, other: None };
        target.byte();
        assert_eq!(target.line(), "ready");
        target
    }

    pub(crate) fn pid(&self) -> libc::pid_t {
        self.other.unwrap_or_else(|| self.child.id().try_into().expect("a pid"))
    }

    pub(crate) fn byte(&mut self) {
        self.input.as_mut().expect("an input").write_all(b"x").expect("write to the program");
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read from the program");
        line.trim().to_owned()
    }

    pub(crate) fn finish(mut self) -> String {
        let word = self.line();
        self.input = None;
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).expect("read the rest");
        // A child of this very process that ended during a stop was reaped by the tracer.
        let _ = self.child.wait();
        word + &rest
    }

    pub(crate) fn state(&self) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("stat");
        text[text.rfind(')').expect("a name") + 2..][..1].to_owned()
    }

    /// Its memory mappings, but for how they are merged.
    pub(crate) fn n_mappings(&self) -> usize {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("maps").lines().count()
    }

    pub(crate) fn status(&self, field: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        text.lines().find(|line| line.starts_with(field)).expect(field).to_owned()
    }

    /// Stops it, has it say its own PID, lets it go. `false` if it has ended by itself.
    pub(crate) fn disturb(&self) -> bool {
        self.disturb_by(&mut Tracer::new())
    }

    pub(crate) fn disturb_by(&self, tracer: &mut Tracer) -> bool {
        let pid = self.pid();
        let work = |stopped: &mut Stopped| {
            if stopped.processes().is_empty() {
                return false;
            }
            let mut hand = stopped.hand(pid).expect("a hand");
            let calls = [Call { nr: libc::SYS_getpid, args: [0; 6] }; 3];
            assert_eq!(hand.run(&calls).expect("calls"), [i64::from(pid); 3]);
            hand.close().expect("close");
            true
        };
        tracer.while_stopped(self.group.request(Duration::from_secs(30)), work).expect("stop")
    }

    /// Whether it says something, or ends, within this time.
    pub(crate) fn speaks_within(&self, time: Duration) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        assert!(self.output.buffer().is_empty(), "a line was not read");
        let mut fds = [PollFd::new(self.output.get_ref().as_fd(), PollFlags::POLLIN)];
        let time = PollTimeout::try_from(time).expect("a time");
        poll(&mut fds, time).expect("poll") > 0
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
