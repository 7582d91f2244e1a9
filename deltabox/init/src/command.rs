//! One command: its streams, and the steps of the child from fork to exec.

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use deltabox_common::init::{Start, Streams};
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use crate::sys;

/// The outer ends of a command's streams, which init keeps so that a lost engine costs nothing.
pub(crate) struct Ends {
    /// Write end of stdin; only for [`Streams::Pipes`] and until the engine closes it.
    pub(crate) stdin: Option<OwnedFd>,
    /// Read ends, or the terminal's master.
    pub(crate) outer: Vec<OwnedFd>,
}

impl Ends {
    /// Those of a command whose streams are somebody else's.
    pub(crate) fn none() -> Self {
        Self { stdin: None, outer: Vec::new() }
    }

    /// All of them in the order that the engine expects.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'_>> {
        self.stdin.iter().chain(&self.outer).map(AsFd::as_fd).collect()
    }
}

/// What the child gets.
struct Inner {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    terminal: bool,
}

/// A forked child on its way to exec.
pub(crate) struct Starting {
    pub(crate) pid: u32,
    pub(crate) ends: Ends,
    /// Reads end of file when the program runs, or the failed step and its error number.
    pub(crate) verdict: OwnedFd,
}

/// Why a command did not start.
pub(crate) struct NotStarted {
    pub(crate) step: &'static str,
    pub(crate) errno: i32,
}

/// The steps of the child, in the order of their numbers on the verdict pipe.
const STEPS: [&str; 8] = ["setsid", "terminal", "standard streams", "limits", "setgroups", "setgid", "setuid", "chdir"];
const STEP_EXEC: usize = STEPS.len();

/// The failed step in what the child wrote.
pub(crate) fn read_verdict(bytes: &[u8]) -> Option<NotStarted> {
    let (&step, errno) = bytes.split_first()?;
    let step = STEPS.get(usize::from(step)).copied().unwrap_or("execve");
    Some(NotStarted { step, errno: i32::from_le_bytes(errno.try_into().unwrap_or([0; 4])) })
}

/// Makes the streams and forks the child.
pub(crate) fn start(start: &Start) -> Result<Starting, NotStarted> {
    let failed = |step| move |error: io::Error| NotStarted { step, errno: error.raw_os_error().unwrap_or(0) };
    let argv = c_strings(&start.argv).map_err(failed("arguments"))?;
    let envp = c_strings(&start.env).map_err(failed("environment"))?;
    if argv.is_empty() {
        return Err(NotStarted { step: "arguments", errno: libc::EINVAL });
    }
    let (inner, ends) = streams(start.streams).map_err(failed("make streams"))?;
    let (verdict, report) = pipe().map_err(failed("pipe"))?;
    let pid = sys::fork(|| {
        let (step, errno) = become_program(start, &inner, &argv, &envp);
        let mut bytes = vec![u8::try_from(step).unwrap_or(u8::MAX)];
        bytes.extend_from_slice(&errno.to_le_bytes());
        let _ = std::fs::File::from(report).write_all(&bytes);
        127
    })
    .map_err(failed("fork"))?;
    Ok(Starting { pid, ends, verdict })
}

/// Runs in the child. Returns the step that failed and why.
fn become_program(start: &Start, inner: &Inner, argv: &[CString], envp: &[CString]) -> (usize, i32) {
    let steps: [&dyn Fn() -> io::Result<()>; STEP_EXEC] = [
        &|| Ok(nix::unistd::setsid().map(drop)?),
        &|| if inner.terminal { sys::take_terminal(inner.stdin.as_fd()) } else { Ok(()) },
        &|| {
            sys::set_standard_stream(inner.stdin.as_fd(), 0)?;
            sys::set_standard_stream(inner.stdout.as_fd(), 1)?;
            sys::set_standard_stream(inner.stderr.as_fd(), 2)
        },
        // The engine has raised its own for its commands' sake; programs expect the usual (select(2) takes no more).
        &|| {
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            Ok(setrlimit(Resource::RLIMIT_NOFILE, soft.min(1024), hard)?)
        },
        &|| Ok(nix::unistd::setgroups(&[Gid::from_raw(start.gid)])?),
        &|| {
            let gid = Gid::from_raw(start.gid);
            Ok(nix::unistd::setresgid(gid, gid, gid)?)
        },
        &|| {
            let uid = Uid::from_raw(start.uid);
            Ok(nix::unistd::setresuid(uid, uid, uid)?)
        },
        &|| Ok(nix::unistd::chdir(start.cwd.as_str())?),
    ];
    sys::default_sigpipe_and_mask();
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    for (number, step) in steps.iter().enumerate() {
        if let Err(error) = step() {
            return (number, error.raw_os_error().unwrap_or(0));
        }
    }
    (STEP_EXEC, search_and_exec(argv, envp, &start.env) as i32)
}

/// execvp(3) with the PATH of the new environment: every directory is tried, EACCES is remembered.
fn search_and_exec(argv: &[CString], envp: &[CString], env: &[String]) -> nix::Error {
    let program = argv[0].as_bytes();
    if program.contains(&b'/') {
        return exec_or_shell(&argv[0], argv, envp);
    }
    if program.is_empty() {
        return nix::Error::ENOENT;
    }
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or("/usr/bin:/bin");
    let mut verdict = nix::Error::ENOENT;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let Ok(candidate) = CString::new([dir.as_bytes(), b"/", program].concat()) else { continue };
        match exec_or_shell(&candidate, argv, envp) {
            nix::Error::ENOENT | nix::Error::ENOTDIR => {}
            nix::Error::EACCES => verdict = nix::Error::EACCES,
            other => return other,
        }
    }
    verdict
}

/// A script without an interpreter line runs under /bin/sh, as execvp(3) has it.
fn exec_or_shell(path: &CString, argv: &[CString], envp: &[CString]) -> nix::Error {
    match sys::exec(path, argv, envp) {
        nix::Error::ENOEXEC => {
            let shell =
                [c"sh".to_owned(), path.clone()].into_iter().chain(argv[1..].iter().cloned()).collect::<Vec<_>>();
            sys::exec(c"/bin/sh", &shell, envp)
        }
        other => other,
    }
}

fn streams(kind: Streams) -> io::Result<(Inner, Ends)> {
    match kind {
        Streams::Pipes => {
            let (stdin, write) = pipe()?;
            let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
            let ends = Ends { stdin: Some(write), outer: vec![out, err] };
            Ok((Inner { stdin, stdout, stderr, terminal: false }, ends))
        }
        Streams::PipesNoStdin => {
            let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
            let ends = Ends { stdin: None, outer: vec![out, err] };
            Ok((Inner { stdin: null()?, stdout, stderr, terminal: false }, ends))
        }
        Streams::Log => {
            let (out, stdout) = pipe()?;
            let stderr = stdout.try_clone()?;
            Ok((Inner { stdin: null()?, stdout, stderr, terminal: false }, Ends { stdin: None, outer: vec![out] }))
        }
        Streams::Pty(size) => {
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let master = nix::fcntl::open("/dev/pts/ptmx", flags, Mode::empty())?;
            let stdin = sys::terminal_peer(master.as_fd())?;
            sys::set_terminal_size(stdin.as_fd(), size.rows, size.cols)?;
            let (stdout, stderr) = (stdin.try_clone()?, stdin.try_clone()?);
            Ok((Inner { stdin, stdout, stderr, terminal: true }, Ends { stdin: None, outer: vec![master] }))
        }
    }
}

/// Read end, write end.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = io::pipe()?;
    Ok((read.into(), write.into()))
}

fn null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::open("/dev/null")?.into())
}

fn c_strings(texts: &[String]) -> io::Result<Vec<CString>> {
    texts.iter().map(|text| CString::new(text.as_str()).map_err(io::Error::from)).collect()
}
