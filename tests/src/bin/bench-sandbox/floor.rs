//! Floors: the least that the kernel asks for the same result, as straight code without daemon, init or protocol.
//!
//! A bare sandbox has what a product's has in namespaces, cgroup, id map and overlay. It lacks what makes it
//! usable: its overlay is mounted but not attached, no proc, sysfs, devpts, mqueue, masks, filter, init.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use deltabox::deltafs::fixtures::Fixtures;
use deltabox::deltafs::hostbase::HostBase;
use deltabox::deltafs::layer::open_dir;
use deltabox::deltafs::overlay;
use deltabox::deltafs::overlay::Top;
use deltabox::kernel::cgroups::Hierarchies;
use deltabox::sandbox::cgroup::{remove_tree, store_group};
use deltabox::sandbox::idmap;
use deltabox::sandbox::idmap::HOST_ID_BASE;
use deltabox::sys::process::{self, Child, CloneRequest, Program};
use nix::fcntl::OFlag;
use nix::sys::memfd::MFdFlags;
use nix::sys::stat::Mode;

/// What runs in a bare sandbox.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trivial {
    /// A static program of two instructions: `exit(0)`.
    Exit,
    /// `/usr/bin/true` from the sandbox's overlay, dynamically linked as everywhere.
    True,
}

/// Makes bare sandboxes. May be used by several threads.
#[derive(Debug)]
pub(crate) struct Floor {
    dir: PathBuf,
    group: PathBuf,
    fixtures: Fixtures,
    base: HostBase,
    exit: OwnedFd,
    n_made: AtomicU64,
}

/// The cgroup of all bare sandboxes of a bench run.
pub(crate) fn group(keeper: u32) -> anyhow::Result<PathBuf> {
    Ok(store_group(&Hierarchies::find()?.unified, &format!("bench-{keeper}")))
}

/// From the kernel (include/uapi/linux/sched.h); nix has no name for it.
const CLONE_NEWTIME: u64 = 0x80;

/// The namespaces that `deltabox::sandbox::spawn` asks for.
fn namespaces() -> u64 {
    use nix::sched::CloneFlags as Flags;
    let all = Flags::CLONE_NEWUSER
        | Flags::CLONE_NEWPID
        | Flags::CLONE_NEWNS
        | Flags::CLONE_NEWIPC
        | Flags::CLONE_NEWUTS
        | Flags::CLONE_NEWNET;
    u64::from(all.bits().cast_unsigned()) | CLONE_NEWTIME
}

impl Floor {
    /// Everything that an engine, too, makes once.
    pub(crate) fn new(scratch: &Path, group: PathBuf) -> anyhow::Result<Self> {
        let id_map = idmap::open_namespace().context("make a user namespace with the id map")?;
        let base = HostBase::prepare(&scratch.join("frames"), &[], &id_map)?;
        let fixtures = Fixtures::make().context("make the fixtures")?;
        fs::create_dir_all(&group).with_context(|| format!("create {}", group.display()))?;
        let dir = scratch.join("layers");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self { dir, group, fixtures, base, exit: exit_program()?, n_made: AtomicU64::new(0) })
    }

    /// Makes a bare sandbox, runs the program in it as its first process and waits for its end. What it took, and
    /// what is left of it, whose removal is not in the clock.
    pub(crate) fn create(&self, program: Trivial) -> anyhow::Result<(Duration, Bare)> {
        let names = self.names();
        let begun = Instant::now();
        let mut bare = self.make(names)?;
        let file = match program {
            Trivial::Exit => self.exit.try_clone()?,
            Trivial::True => {
                let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
                nix::fcntl::openat(&bare.root, "usr/bin/true", flags, Mode::empty())?
            }
        };
        let (gate, mut opener) = std::io::pipe()?;
        let program = Program { file: file.as_fd(), argv: &[c"true"], envp: &[], fds: &[] };
        let child = process::clone_and_exec(bare.request(), gate.as_fd(), &program).context("clone3")?;
        idmap::write_maps(child.pid).context("write the id map")?;
        bare.net = Some(File::open(format!("/proc/{}/ns/net", child.pid)).context("open a network namespace")?);
        opener.write_all(b"x")?;
        let status = process::reap(&child)?;
        let took = begun.elapsed();
        ensure!(status == 0, "the trivial program ended with raw status {status:#x}");
        Ok((took, bare))
    }

    /// What it takes to end and remove a bare sandbox with one waiting process.
    pub(crate) fn remove(&self) -> anyhow::Result<Duration> {
        let bare = self.make(self.names())?;
        let (gate, _hold) = std::io::pipe()?;
        let child: Child = process::clone_waiting(bare.request(), gate.as_fd()).context("clone3")?;
        idmap::write_maps(child.pid).context("write the id map")?;
        let begun = Instant::now();
        fs::write(bare.group.join("cgroup.kill"), "1").context("kill a bare sandbox")?;
        process::reap(&child)?;
        bare.remove()?;
        Ok(begun.elapsed())
    }

    fn names(&self) -> (PathBuf, PathBuf) {
        let name = self.n_made.fetch_add(1, Ordering::Relaxed).to_string();
        (self.dir.join(&name), self.group.join(&name))
    }

    fn make(&self, (dir, group): (PathBuf, PathBuf)) -> anyhow::Result<Bare> {
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        [&dir, &upper, &work].into_iter().try_for_each(fs::create_dir).context("create a layer")?;
        std::os::unix::fs::chown(&upper, Some(HOST_ID_BASE), Some(HOST_ID_BASE)).context("chown a layer")?;
        let (upper, work) = (open_dir(&upper)?, open_dir(&work)?);
        let top = Top { upper: upper.as_fd(), work: work.as_fd() };
        let stack = [self.fixtures.skeleton().as_fd(), self.base.tree.as_fd()];
        let root = overlay::mount_stack(&stack, Some(top))?;
        fs::create_dir(&group).context("create a cgroup")?;
        let cgroup = File::open(&group).context("open a cgroup")?.into();
        Ok(Bare { dir, group, root, cgroup, net: None })
    }
}

/// A bare sandbox. Its network namespace lives until it is removed: taking one down is work that the kernel does
/// later, and during which nobody can make one (`pernet_ops_rwsem`).
pub(crate) struct Bare {
    dir: PathBuf,
    group: PathBuf,
    root: OwnedFd,
    cgroup: OwnedFd,
    net: Option<File>,
}

impl Bare {
    fn request(&self) -> CloneRequest<'_> {
        CloneRequest { namespaces: namespaces(), cgroup: Some(self.cgroup.as_fd()), set_tid: None }
    }

    pub(crate) fn remove(self) -> anyhow::Result<()> {
        drop((self.root, self.cgroup, self.net));
        remove_tree(&self.group)?;
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }
}

/// A static x86-64 ELF file: one header, one segment, `mov eax, 60; xor edi, edi; syscall`.
fn exit_program() -> anyhow::Result<OwnedFd> {
    const BASE: u64 = 0x40_0000;
    const CODE: [u8; 9] = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    const CODE_AT: u64 = 64 + 56;
    let len = CODE_AT + CODE.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes()); // executable, x86-64
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [BASE + CODE_AT, 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers at, no sections
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1_u32, 5] {
        elf.extend(word.to_le_bytes()); // loadable, readable and executable
    }
    for word in [0, BASE, BASE, len, len, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(CODE);
    // MFD_EXEC, as for the product's init.
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::from_bits_retain(0x10);
    let mut file = File::from(nix::sys::memfd::memfd_create(c"exit", flags).context("memfd_create")?);
    file.write_all(&elf)?;
    // Opened anew: a file that is open for writing cannot be executed.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    Ok(File::open(path).context("open the trivial program")?.into())
}
