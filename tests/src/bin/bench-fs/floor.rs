//! The floor: the same stack mounted and pivoted to, as straight code in a process that is alone in its namespace.
//!
//! One line in: the layers' directories. Then a line in for each measurement, and its nanoseconds out: all, the pivot.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use deltabox::deltafs::fixtures::Fixtures;
use deltabox::deltafs::hostbase::HostBase;
use deltabox::deltafs::layer::open_dir;
use deltabox::deltafs::overlay::{Top, mount_stack};
use deltabox::sandbox::idmap;
use deltabox::sys::mount::{Clone as CloneWhat, move_mount, open_tree_clone};
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, umount2};
use nix::sched::CloneFlags;
use nix::sys::stat::{Mode, mkdirat};

/// The floor's process, as the measuring one has it.
pub(crate) struct Floor {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Floor {
    /// Over these layers, the topmost first.
    pub(crate) fn start(scratch: &Path, layers: &[PathBuf]) -> anyhow::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("floor")
            .arg(scratch)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the floor")?;
        let mut input = child.stdin.take().context("its input is piped")?;
        let output = BufReader::new(child.stdout.take().context("its output is piped")?);
        writeln!(input, "{}", serde_json::to_string(layers)?)?;
        let mut floor = Self { child, input: Some(input), output };
        for _ in 0..N_WARM_UP {
            floor.measure()?;
        }
        Ok(floor)
    }

    /// One mount with pivot, and what of it the pivot.
    pub(crate) fn measure(&mut self) -> anyhow::Result<[Duration; 2]> {
        writeln!(self.input.as_mut().context("it runs")?, "go").context("ask the floor")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(serde_json::from_str::<[u64; 2]>(&line).context("read what the floor measured")?.map(Duration::from_nanos))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// The first leaves the host's root with all its mounts.
const N_WARM_UP: u32 = 5;

/// The floor's whole life.
pub(crate) fn serve(scratch: &Path) -> anyhow::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    super::store::make_private()?;
    let mut lines = std::io::stdin().lines();
    let layers: Vec<PathBuf> = serde_json::from_str(&lines.next().context("a first line")??)?;
    let id_map = idmap::open_namespace().context("make a user namespace with the id map")?;
    let base = HostBase::prepare(&scratch.join("frames"), &[], &id_map)?;
    let fixtures = Fixtures::make().context("make the fixtures")?;
    let dir = scratch.join(format!("floor-{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    // In place of the layer that a checkpoint freezes: that is in use as another mount's upper directory.
    let frozen = dir.join("frozen");
    fs::create_dir(&frozen)?;
    // The host's mounts go with its root, and what was opened through them cannot be stacked then.
    let ours = scratch.parent().context("the store is beside the scratch directory")?;
    let tree = open_tree_clone(open_dir(ours)?.as_fd(), c"", CloneWhat::One).context("clone a mount")?;
    let open =
        |path: &Path| -> anyhow::Result<OwnedFd> { Ok(openat(&tree, path.strip_prefix(ours)?, DIR, Mode::empty())?) };
    let mut stack = vec![open(&frozen)?];
    for layer in &layers {
        stack.push(open(layer)?);
    }
    stack.extend([fixtures.skeleton().try_clone()?, base.tree.try_clone()?]);
    let dir = open(&dir)?;
    for (number, line) in lines.enumerate() {
        line?;
        println!("{:?}", once(&stack, &dir, number)?.map(|took| took.as_nanos()));
    }
    Ok(())
}

const DIR: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

fn once(stack: &[OwnedFd], dir: &OwnedFd, number: usize) -> anyhow::Result<[Duration; 2]> {
    let make = |name: &str| -> anyhow::Result<OwnedFd> {
        let name = format!("{number}-{name}");
        mkdirat(dir, name.as_str(), Mode::S_IRWXU)?;
        Ok(openat(dir, name.as_str(), DIR, Mode::empty())?)
    };
    let (upper, work) = (make("upper")?, make("work")?);
    let begun = Instant::now();
    let lowers: Vec<_> = stack.iter().map(AsFd::as_fd).collect();
    let mount = mount_stack(&lowers, Some(Top { upper: upper.as_fd(), work: work.as_fd() }))?;
    let mounted = Instant::now();
    move_mount(mount.as_fd(), open_dir(Path::new("/"))?.as_fd(), c"").context("attach")?;
    nix::unistd::fchdir(&mount)?;
    nix::unistd::pivot_root(".", ".").context("pivot_root")?;
    let took = [begun.elapsed(), mounted.elapsed()];
    umount2(".", MntFlags::MNT_DETACH).context("detach the old root")?;
    nix::unistd::chdir("/")?;
    Ok(took)
}
