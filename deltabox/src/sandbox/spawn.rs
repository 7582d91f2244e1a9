//! Bringing a sandbox to life: a process in new namespaces, born into its cgroup, that executes init.
//!
//! ```text
//! engine                                      child
//! clone3(NEWUSER|NEWPID|..., INTO_CGROUP) ->  waits at the gate
//! write uid_map, gid_map; limits' groups
//! open the gate                           ->  root of its user namespace, exec init (sealed memfd)
//! Boot + mounts                           ->  mounts, pivot, masks, capabilities, filter
//! waits for                               <-  Ready
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use deltabox_common::init::{Boot, FromInit, ToInit};
use nix::fcntl::SealFlag;
use nix::sys::memfd::MFdFlags;

use super::backstage::Backstage;
use super::cgroup::{CgroupError, Cgroups};
use super::link::InitLink;
use super::reserve::PROGRAMS_END;
use super::{Net, SandboxId, filter, idmap};
use crate::latency::{Phase, Span};
use crate::sys::process::{self, Child, CloneRequest, Program};

/// Init's program, built by build.rs.
static INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/deltabox-init"));

/// How long init may take to set up its sandbox (chosen: a thousand times the usual).
const BOOT_DEADLINE: Duration = Duration::from_secs(20);

/// What a sandbox is made of, prepared by the caller.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Its name, for the hostname.
    pub id: &'a SandboxId,
    /// Its network.
    pub net: Net,
    /// Its root file system: a detached mount.
    pub root: OwnedFd,
    /// Its `/dev`: a detached mount.
    pub dev: OwnedFd,
    /// Read-only mounts to attach at absolute paths inside.
    pub binds: Vec<(String, OwnedFd)>,
    /// Its groups.
    pub cgroups: &'a Cgroups,
    /// Where init listens for later engines: a path in the store, out of the sandbox's reach.
    pub listener: &'a Path,
}

/// A sandbox whose init is ready.
#[derive(Debug)]
pub struct Spawned {
    /// Its init.
    pub init: Child,
    /// The connection to it.
    pub link: InitLink,
    /// Where its templates will be.
    pub backstage: Backstage,
}

/// Why a sandbox did not come to life. What was started has been killed.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A call of the engine failed.
    #[error("{op}: {source}")]
    Call {
        /// What was being done.
        op: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// A step of init's set-up failed.
    #[error("init: {step}: {source}")]
    Boot {
        /// The step.
        step: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// Init ended or fell silent before it was ready.
    #[error("init did not become ready: {why}")]
    NotReady {
        /// What is known.
        why: String,
    },
    /// The limits' groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

fn call(op: &'static str) -> impl FnOnce(io::Error) -> SpawnError {
    move |source| SpawnError::Call { op, source }
}

/// Makes the sandbox. Blocks until init is ready (about a millisecond).
pub fn spawn(parts: Parts<'_>, span: &mut Span) -> Result<Spawned, SpawnError> {
    crate::fault::point("create.spawn").map_err(call("clone3"))?;
    let (ours, theirs) = UnixStream::pair().map_err(call("make a socket pair"))?;
    let listener = super::listen_at(parts.listener).map_err(call("listen for engines"))?;
    let (gate, mut opener) = io::pipe().map_err(call("make a pipe"))?;
    let live = parts.cgroups.open_live()?;

    let program = init_program().map_err(call("prepare init"))?;
    let request = CloneRequest { namespaces: namespaces(parts.net), cgroup: Some(live.as_fd()), set_tid: None };
    // Init outlives this engine and must keep nothing of its terminal or log.
    let null = File::options().read(true).write(true).open("/dev/null").map_err(call("open /dev/null"))?;
    let null = null.as_fd();
    let fds = [(null, 0), (null, 1), (null, 2), (theirs.as_fd(), 3), (listener.as_fd(), 4)];
    let program = Program { file: program, argv: &[c"deltabox-init"], envp: &[], fds: &fds };
    let init = process::clone_and_exec(request, gate.as_fd(), &program).map_err(call("clone3 with new namespaces"))?;
    drop((theirs, gate));

    let newborn = Newborn { init: Some(init) };
    crate::fault::point("create.gate").map_err(call("write the id map"))?;
    let mut link = InitLink::new(ours).map_err(call("set up a socket"))?;
    idmap::write_maps(newborn.pid()).map_err(call("write the id map"))?;
    parts.cgroups.attach_v1(newborn.pid())?;
    opener.write_all(b"x").map_err(call("open the gate"))?;
    span.end_of(Phase::Spawn);
    boot(&mut link, parts)?;
    let spawned = newborn.ready(link)?;
    span.end_of(Phase::Boot);
    Ok(spawned)
}

fn namespaces(net: Net) -> u64 {
    let all = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let net = if net == Net::None { libc::CLONE_NEWNET } else { 0 };
    // CLONE_NEWTIME shares its bit with the exit signal of clone(2); clone3(2) takes it. The cgroup namespace is
    // init's to make, once it is in its cgroup.
    u64::from((all | net).cast_unsigned()) | 0x80
}

fn boot(link: &mut InitLink, parts: Parts<'_>) -> Result<(), SpawnError> {
    crate::fault::point("create.boot").map_err(call("boot"))?;
    let host_net = parts.net == Net::Host;
    let message = ToInit::Boot(Boot {
        hostname: parts.id.to_string(),
        host_net,
        pid_max: PROGRAMS_END.cast_unsigned(),
        caps: filter::capabilities(),
        filter: filter::program(),
        binds: parts.binds.iter().map(|(path, _)| path.clone()).collect(),
    });
    let host_sys = if host_net { Some(super::host_sys().map_err(call("clone the mount of /sys"))?) } else { None };
    let fixed = [Some(parts.root.as_fd()), Some(parts.dev.as_fd()), host_sys.as_ref().map(AsFd::as_fd)];
    let binds = parts.binds.iter().map(|(_, fd)| fd.as_fd());
    let fds: Vec<BorrowedFd<'_>> = fixed.into_iter().flatten().chain(binds).collect();
    link.send(&message, &fds).map_err(call("send boot to init"))
}

/// Killed when dropped before it was ready.
struct Newborn {
    init: Option<Child>,
}

impl Newborn {
    fn pid(&self) -> libc::pid_t {
        self.init.as_ref().map_or(0, |init| init.pid)
    }

    fn ready(mut self, mut link: InitLink) -> Result<Spawned, SpawnError> {
        let backstage = match link.recv(Instant::now() + BOOT_DEADLINE) {
            Ok((FromInit::Ready, fds)) => Backstage::new(self.pid(), fds).map_err(call("go behind its programs"))?,
            Ok((FromInit::BootFailed { step, errno }, _)) => {
                return Err(SpawnError::Boot { step, source: io::Error::from_raw_os_error(errno) });
            }
            Ok((other, _)) => return Err(SpawnError::NotReady { why: format!("it said {other:?}") }),
            Err(error) => return Err(SpawnError::NotReady { why: self.epitaph(&error) }),
        };
        match self.init.take() {
            Some(init) => Ok(Spawned { init, link, backstage }),
            None => Err(SpawnError::NotReady { why: "taken twice".to_owned() }),
        }
    }

    fn epitaph(&mut self, error: &io::Error) -> String {
        let Some(init) = self.init.take() else { return error.to_string() };
        // Gone already or not: after this it is.
        let _ = process::pidfd_send_signal(init.pidfd.as_fd(), libc::SIGKILL);
        match process::reap(&init) {
            Ok(status) => format!("{error}; raw exit status {status:#x} (120-123: before its program ran)"),
            Err(wait) => format!("{error}; {wait}"),
        }
    }
}

impl Drop for Newborn {
    fn drop(&mut self) {
        if let Some(init) = self.init.take() {
            let _ = process::pidfd_send_signal(init.pidfd.as_fd(), libc::SIGKILL);
            let _ = process::reap(&init);
        }
    }
}

/// Init's executable: one sealed memfd per engine, whose pages all sandboxes share.
fn init_program() -> io::Result<BorrowedFd<'static>> {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program.as_fd());
    }
    // MFD_EXEC (0x10, since Linux 6.3): executable also where `vm.memfd_noexec` makes the default not so.
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::from_bits_retain(0x10);
    let mut file = File::from(nix::sys::memfd::memfd_create(c"deltabox-init", flags)?);
    file.write_all(INIT)?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
    Ok(PROGRAM.get_or_init(|| file.into()).as_fd())
}
