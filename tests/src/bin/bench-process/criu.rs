//! CRIU's full dump and restore of the same program, with every advantage: a container of its own.
//!
//! ```text
//! measure
//!   `- criu              a mount and a PID namespace; waits
//!        `- criu --init  PID 1: root bound and pivoted to, few mounts; /proc, /run (else CRIU probes the kernel each
//!             |          time) and images in memory; takes what CRIU lets go
//!             |- the program, its input and output nowhere
//!             `- criu dump --leave-running | kill, wait, criu restore --restore-detached
//! ```
//! One line in for each measurement, one line of JSON out.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::program::PATIENCE;

/// What is to be started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// CRIU's program.
    pub(crate) criu: PathBuf,
    /// The measured program, which says by `/run/ready` that it is.
    pub(crate) argv: Vec<String>,
    /// An empty directory.
    pub(crate) scratch: PathBuf,
    /// A file that the program needs, to be copied to `/run`.
    pub(crate) needed: Option<PathBuf>,
}

/// One dump and restore, microseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Took {
    pub(crate) dump_us: u64,
    /// Of the dump: the program stood still.
    pub(crate) frozen_us: u64,
    pub(crate) restore_us: u64,
}

/// The container, as the measuring process has it.
pub(crate) struct Criu {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// Where CRIU 4 is: named by the environment, else on PATH.
pub(crate) fn find() -> Option<PathBuf> {
    let named = std::env::var_os("DELTABOX_CRIU").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    named.or_else(|| std::env::split_paths(&path).map(|dir| dir.join("criu")).find(|path| path.is_file()))
}

impl Criu {
    pub(crate) fn start(order: &Order) -> anyhow::Result<Self> {
        fs::create_dir_all(&order.scratch)?;
        let mut child = Command::new("/proc/self/exe")
            .args(["criu", &serde_json::to_string(order)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a container for CRIU")?;
        let input = child.stdin.take().context("its input is piped")?;
        let output = BufReader::new(child.stdout.take().context("its output is piped")?);
        let mut criu = Self { child, input: Some(input), output };
        // The first finds out what the kernel can.
        criu.measure()?;
        Ok(criu)
    }

    pub(crate) fn measure(&mut self) -> anyhow::Result<Took> {
        writeln!(self.input.as_mut().context("it runs")?, "go").context("ask for a dump")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "CRIU's container has ended; it says why above");
        serde_json::from_str(&line).context("read what CRIU took")
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// The role that makes the namespaces.
pub(crate) fn contain(order: &str) -> anyhow::Result<()> {
    // What somebody has open to files of other mounts CRIU could not name.
    deltabox::sys::process::set_all_close_on_exec()?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC)
        .context("make namespaces")?;
    let status = Command::new("/proc/self/exe").args(["criu", "--init", order]).status()?;
    ensure!(status.success(), "the container: {status}");
    Ok(())
}

/// The role of PID 1 in them. Its end is everybody's.
pub(crate) fn serve(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order)?;
    enter(&order)?;
    start_program(&order.argv)?;
    let criu = Path::new("/mnt").join(order.criu.file_name().context("CRIU has a name")?);
    for line in std::io::stdin().lines() {
        line?;
        let took = once(&criu)?;
        println!("{}", serde_json::to_string(&took)?);
    }
    Ok(())
}

/// A root of its own with as few mounts as will do: CRIU reads them all.
fn enter(Order { scratch, needed, criu, .. }: &Order) -> anyhow::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    let bind = |from: &Path, to: &Path| {
        mount(Some(from), to, none, MsFlags::MS_BIND, none).with_context(|| format!("bind {}", from.display()))
    };
    bind(Path::new("/"), scratch)?;
    bind(Path::new("/dev"), &scratch.join("dev"))?;
    // With the libraries beside it.
    bind(criu.parent().context("CRIU lies somewhere")?, &scratch.join("mnt"))?;
    mount(Some("proc"), &scratch.join("proc"), Some("proc"), MsFlags::empty(), none).context("mount /proc")?;
    let run = scratch.join("run");
    mount(Some("tmpfs"), &run, Some("tmpfs"), MsFlags::empty(), Some("size=6g")).context("mount /run")?;
    if let Some(needed) = needed {
        fs::copy(needed, run.join(needed.file_name().context("a file")?)).context("copy what the program needs")?;
    }
    std::env::set_current_dir(scratch)?;
    nix::unistd::pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leave the old root")?;
    std::env::set_current_dir("/").context("enter the root")
}

fn start_program(argv: &[String]) -> anyhow::Result<()> {
    let output = File::create("/run/output")?;
    let (program, args) = argv.split_first().context("a program")?;
    let mut command = Command::new("/usr/bin/setsid");
    command.arg(program).args(args).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    // Waited for as any other that ends.
    let _child = command.spawn().with_context(|| format!("start {program}"))?;
    let end = Instant::now() + PATIENCE;
    while !Path::new("/run/ready").exists() {
        ensure!(Instant::now() < end, "the program is not ready: {}", fs::read_to_string("/run/output")?);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn once(criu: &Path) -> anyhow::Result<Took> {
    let images = Path::new("/run/images");
    fs::create_dir(images).context("create a directory for images")?;
    let leader = leader()?;
    let before = threads()?;
    let run = |args: &[&str]| -> anyhow::Result<u64> {
        let mut command = Command::new(criu);
        command.args(args).args(["-D", "/run/images", "-v1", "-o", "log", "--network-lock", "skip"]);
        let begun = Instant::now();
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("start criu")?;
        let took = begun.elapsed();
        let log = || fs::read_to_string(images.join("log")).unwrap_or_default();
        ensure!(status.success(), "criu {}: {status}: {}", args[0], log());
        Ok(u64::try_from(took.as_micros())?)
    };
    let dump_us = run(&["dump", "--tree", &leader.to_string(), "--leave-running"])?;
    let stats = fs::read(images.join("stats-dump")).context("read CRIU's own times")?;
    let frozen_us = parse_frozen_us(&stats).context("no times in stats-dump")?;
    // All but ourselves.
    kill(Pid::from_raw(-1), Signal::SIGKILL)?;
    while waitpid(None, None) != Err(nix::errno::Errno::ECHILD) {}
    let restore_us = run(&["restore", "--restore-detached"])?;
    ensure!(threads()? == before, "not all threads are back");
    fs::remove_dir_all(images)?;
    Ok(Took { dump_us, frozen_us, restore_us })
}

/// The program's first process: the child of ours with the lowest number.
fn leader() -> anyhow::Result<i32> {
    let children = fs::read_to_string("/proc/1/task/1/children").context("list children")?;
    let lowest = children.split_whitespace().filter_map(|pid| pid.parse().ok()).min();
    lowest.context("the program has ended")
}

/// Everybody here, with the number of its threads.
fn threads() -> anyhow::Result<Vec<(i32, usize)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()).filter(|pid| *pid != 1) {
            all.push((pid, fs::read_dir(format!("/proc/{pid}/task"))?.count()));
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// `frozen_time` of `stats-dump`: two magic numbers, a length, then protobuf: entry.dump (1).frozen_time (2).
fn parse_frozen_us(bytes: &[u8]) -> Option<u64> {
    let entry = bytes.get(12..)?;
    let dump = fields(entry).find(|(number, _)| *number == 1)?.1;
    match fields(dump.bytes()?).find(|(number, _)| *number == 2)?.1 {
        Field::Number(frozen_us) => Some(frozen_us),
        Field::Bytes(_) => None,
    }
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn bytes(&self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Number(_) => None,
        }
    }
}

/// Fields of a protobuf message of numbers and parts.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, Field<'_>)> {
    let varint = |rest: &mut &[u8]| -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, after) = rest.split_first()?;
            *rest = after;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    std::iter::from_fn(move || {
        let tag = varint(&mut rest)?;
        let value = varint(&mut rest)?;
        match tag & 7 {
            0 => Some((tag >> 3, Field::Number(value))),
            2 => {
                let (part, after) = rest.split_at_checked(usize::try_from(value).ok()?)?;
                rest = after;
                Some((tag >> 3, Field::Bytes(part)))
            }
            _ => None,
        }
    })
}

/// Its words on the command line: an order, for PID 1 or for the one that makes it.
pub(crate) fn run(init: bool, order: &str) -> anyhow::Result<()> {
    if order.is_empty() {
        bail!("no order");
    }
    if init { serve(order) } else { contain(order) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frozen_time_is_read_from_criu_s_statistics() {
        // dump { freezing_time 5, frozen_time 300, memdump_time 1 }
        let dump = [0x08, 5, 0x10, 0xac, 0x02, 0x18, 1];
        let mut bytes = vec![0; 8];
        bytes.extend([9, 0, 0, 0, 0x0a, 7]);
        bytes.extend(dump);
        assert_eq!(parse_frozen_us(&bytes), Some(300));
        for len in 0..bytes.len() - 2 {
            assert_eq!(parse_frozen_us(&bytes[..len]), None, "cut at {len}");
        }
    }
}
