//! Templates of stopped programs, and programs put back in place from them.
//!
//! `tests/programs/memory.c` has memory of many kinds and judges itself; the tests look from outside too.

mod forked;
mod killed;
mod made;
mod measured;
mod rebuilt;
mod restored;
#[path = "../stop_inject/target.rs"]
#[expect(dead_code, reason = "some of it is for tests of stops alone")]
mod target;
mod threads;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use deltabox::deltacr::stop::Stopped;
use deltabox::deltacr::template::{Freezer, Mapping, Memory, Outline, Request, Template, TemplateError, read_smaps};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use target::Target;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A program of which templates are made. This process is their parent, as init is in a sandbox.
pub(crate) struct Subject(pub(crate) Target, Option<libc::pid_t>);

impl Subject {
    pub(crate) fn start(kinds: &str) -> Self {
        Self::start_as(kinds, &[])
    }

    pub(crate) fn start_as(kinds: &str, variables: &[(&str, &str)]) -> Self {
        Self::run("memory", kinds, variables)
    }

    pub(crate) fn run(program: &str, mode: &str, variables: &[(&str, &str)]) -> Self {
        nix::sys::prctl::set_child_subreaper(true).expect("become a subreaper");
        Self(Target::start_as(program, mode, variables), None)
    }

    /// A Python program, in a PID namespace whose init is a shell. That takes the first byte.
    pub(crate) fn python(path: &str) -> Self {
        nix::sys::prctl::set_child_subreaper(true).expect("become a subreaper");
        const INSIDE: &str = r#"head -c1 >/dev/null; exec 3<&0; exec unshare -p -f --kill-child sh -c '"$@" <&3 3<&- & exec 3<&-; wait' sh "$@""#;
        let arguments = ["-c", INSIDE, "sh", "python3", path];
        Self::inside(Target::start_program(std::path::Path::new("/bin/sh"), &arguments, &[]))
    }

    /// In a PID namespace, whose init is the parent: numbers of what has ended stay free there.
    pub(crate) fn run_inside(program: &str, mode: &str, variables: &[(&str, &str)]) -> Self {
        let variables = [variables, &[("INSIDE", "1")]].concat();
        Self::inside(Self::run(program, mode, &variables).0)
    }

    fn inside(mut target: Target) -> Self {
        let procs = fs::read_to_string(target.group.0.join("cgroup.procs")).expect("processes");
        let mut numbers = procs.lines().map(|line| line.parse().expect("a pid")).collect::<Vec<libc::pid_t>>();
        let inside = |pid: &libc::pid_t| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("numbers").to_owned();
            line.split_ascii_whitespace().skip(1).last().map_or(0, |number| number.parse::<u32>().expect("a number"))
        };
        numbers.sort_by_key(inside);
        let [outside, init, own] = numbers.try_into().expect("the program, its init and who made that");
        for pid in [outside, init] {
            let root = target.group.0.parent().expect("a root").join("cgroup.procs");
            fs::write(root, pid.to_string()).expect("move out of the cgroup");
        }
        target.other = Some(own);
        Self(target, Some(init))
    }

    pub(crate) fn freezer(&self, name: &str) -> Freezer {
        Freezer::create(&self.0.group.0, name).expect("a frozen cgroup")
    }

    /// Whose children templates become.
    pub(crate) fn keeper(&self) -> libc::pid_t {
        self.1.unwrap_or_else(|| std::process::id().try_into().expect("a pid"))
    }

    pub(crate) fn request(&self) -> Request {
        Request { keeper: Some(self.keeper()), ..Request::default() }
    }

    /// Makes a template, and has `look` look at both before the program goes on.
    pub(crate) fn make_and(
        &self,
        request: &Request,
        look: impl FnOnce(&mut Stopped, &Template, &Outline) + Send,
    ) -> Result<(Template, Memory), TemplateError> {
        let freezer = self.freezer("t1");
        let made = self.0.group.stopped(|stopped| {
            let made = Template::make(stopped, self.0.pid(), freezer, request)?;
            look(stopped, &made.0, &made.1);
            Ok::<_, TemplateError>(made)
        })?;
        let memory = made.1.complete(&made.0)?;
        Ok((made.0, memory))
    }

    pub(crate) fn make(&self) -> (Template, Memory) {
        self.make_and(&self.request(), |_, _, _| {}).expect("a template")
    }

    /// Has the program do something, and say so.
    pub(crate) fn tell(&mut self, letter: u8) {
        use std::io::Write;
        self.0.input.as_mut().expect("an input").write_all(&[letter]).expect("write to the program");
        assert_eq!(self.0.line(), "ok", "after '{}'", char::from(letter));
    }
}

/// Removes a template, and reaps it as its parent.
pub(crate) fn remove(template: Template) {
    let pid = template.pid();
    let path = template.freezer().path().to_owned();
    template.remove(PATIENCE).expect("remove a template");
    assert!(!path.exists());
    reap(pid);
}

pub(crate) fn reap(pid: libc::pid_t) {
    let end = Instant::now() + PATIENCE;
    loop {
        let reaped = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WALL));
        // The helper of an engine that was killed is its parent as long as it lives; then this process is.
        let is_the_helpers = reaped == Err(Errno::ECHILD) && Path::new(&format!("/proc/{pid}")).exists();
        if !is_the_helpers || Instant::now() >= end {
            reaped.expect("reap a template");
            return;
        }
        std::thread::yield_now();
    }
}

/// What `smaps` tells, without the counts: those change by looking.
pub(crate) fn mappings(pid: libc::pid_t) -> Vec<Mapping> {
    let mut mappings = read_smaps(pid).expect("mappings");
    mappings.iter_mut().for_each(|mapping| mapping.anonymous_bytes = 0);
    mappings
}

/// Bytes of a process, whatever their protection; `None` where there are none.
pub(crate) fn bytes(pid: libc::pid_t, mapping: &Mapping) -> Option<Vec<u8>> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("memory");
    let mut bytes = vec![0; usize::try_from(mapping.len_bytes()).expect("a size")];
    memory.read_exact_at(&mut bytes, mapping.start).ok().map(|()| bytes)
}
