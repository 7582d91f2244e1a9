//! Namespace probes: all of a sandbox's namespaces at once, its uid map, its clock, its PIDs.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::Ground;
use super::probe::{Failure, Outcome, ProbeChild, at, unless};
use crate::sys::process::CloneRequest;
use crate::sys::steps::Step;

/// Names under /proc/PID/ns, flags, all but time: that one is no part of the minimum.
const NAMESPACES: [(&str, libc::c_int); 7] = [
    ("user", libc::CLONE_NEWUSER),
    ("pid", libc::CLONE_NEWPID),
    ("mnt", libc::CLONE_NEWNS),
    ("net", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

/// The ids that sandboxes get here: inside 0..65536 are outside 100000..165536.
const ID_MAP: &str = "0 100000 65536";

/// The first outside id of [`ID_MAP`].
pub(super) const FIRST_OUTSIDE_ID: u32 = 100_000;

fn request(flags: libc::c_int) -> CloneRequest<'static> {
    CloneRequest { namespaces: u64::from(flags.cast_unsigned()), ..CloneRequest::default() }
}

fn all_flags() -> libc::c_int {
    NAMESPACES.iter().fold(0, |flags, (_, flag)| flags | flag)
}

/// A child in new namespaces. A limit of zero on their number (ENOSPC) means that they are not offered.
fn start(flags: libc::c_int, steps: &[Step<'_>], op: &str) -> Result<ProbeChild, Failure> {
    ProbeChild::start(request(flags), steps).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EUSERS) => {
            Failure::Missing(format!("{op}: the limit /proc/sys/user/max_*_namespaces"))
        }
        _ => at(op)(error),
    })
}

/// Whether the child is in another namespace of that kind than we are.
fn is_apart(child: Pid, name: &str) -> Result<bool, Failure> {
    let link =
        |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).map_err(at("read a link in /proc/PID/ns"));
    Ok(link(&child.to_string())? != link("self")?)
}

/// One clone3 gives a child in all seven.
pub(super) fn namespaces(_: &Ground) -> Outcome {
    let child = start(all_flags(), &[Step::Wait], "clone3 with user pid mnt net ipc uts cgroup")?;
    for (name, _) in NAMESPACES {
        unless(is_apart(child.pid(), name)?, &format!("clone3 left the child in our {name} namespace"))?;
    }
    Ok("user pid mnt net ipc uts cgroup by one clone3".to_owned())
}

/// The sandbox's ids can be mapped.
pub(super) fn id_map(_: &Ground) -> Outcome {
    let child = start(libc::CLONE_NEWUSER, &[Step::Wait], "clone3 with CLONE_NEWUSER")?;
    map_ids(&child)?;
    for file in ["uid_map", "gid_map"] {
        let path = format!("/proc/{}/{file}", child.pid());
        let map = std::fs::read_to_string(&path).map_err(at(&format!("read {file}")))?;
        let written = map.split_ascii_whitespace().eq(ID_MAP.split(' '));
        unless(written, &format!("{file} does not keep what is written"))?;
    }
    Ok(format!("uid_map and gid_map took {ID_MAP}"))
}

fn map_ids(child: &ProbeChild) -> Result<(), Failure> {
    for file in ["uid_map", "gid_map"] {
        let path = format!("/proc/{}/{file}", child.pid());
        std::fs::write(path, ID_MAP).map_err(at(&format!("write {file}")))?;
    }
    Ok(())
}

/// A user namespace with a sandbox's map. It has no process left.
pub(super) fn mapped_user_namespace() -> Result<OwnedFd, Failure> {
    let child = start(libc::CLONE_NEWUSER, &[Step::Wait], "clone3 with CLONE_NEWUSER")?;
    map_ids(&child)?;
    let file = File::open(format!("/proc/{}/ns/user", child.pid())).map_err(at("open /proc/PID/ns/user"))?;
    Ok(file.into())
}

/// A time namespace with a clock of its own, and whether clone3 makes it along with the others.
pub(super) fn time(_: &Ground) -> Outcome {
    let steps = [
        Step::Unshare(libc::CLONE_NEWTIME),
        Step::Write { path: c"/proc/self/timens_offsets", text: b"monotonic 1000 0\n" },
        Step::Wait,
    ];
    let child = ProbeChild::start(CloneRequest::default(), &steps).map_err(at("clone3"))?;
    child.next().map_err(at("unshare(CLONE_NEWTIME)"))?;
    child.next().map_err(at("write /proc/self/timens_offsets"))?;
    let flags = all_flags() | libc::CLONE_NEWTIME;
    let together = match ProbeChild::start(request(flags), &[Step::Wait]) {
        Ok(child) => is_apart(child.pid(), "time")?,
        Err(_) => false,
    };
    let how = if together { "clone3 makes one with the others" } else { "by unshare only, not by clone3" };
    Ok(format!("its clock was set; {how}"))
}

/// A process gets the PID that was asked for.
pub(super) fn set_tid(_: &Ground) -> Outcome {
    const WANTED: libc::pid_t = 300;
    let child = start(libc::CLONE_NEWPID, &[Step::CloneWithPid(WANTED)], "clone3 with CLONE_NEWPID")?;
    let got = child.next().map_err(at("clone3 with set_tid in a new PID namespace"))?;
    unless(got == i64::from(WANTED), "set_tid gave another PID")?;
    Ok(format!("PID {WANTED} in a new PID namespace"))
}

const PID_MAX: &str = "/proc/sys/kernel/pid_max";

fn read_pid_max() -> Result<libc::pid_t, Failure> {
    let text = std::fs::read_to_string(PID_MAX).map_err(at("read pid_max"))?;
    text.trim().parse().map_err(|_| Failure::NotProbed(format!("{PID_MAX} is not a number")))
}

/// A PID namespace has its own pid_max, and set_tid keeps below it.
///
/// Before Linux 6.14 there is one pid_max for the machine: the first write lowers it by 1 only, is checked outside,
/// and is undone there if it was the machine's.
pub(super) fn pid_max(_: &Ground) -> Outcome {
    let outer = read_pid_max()?;
    let limit = outer / 2;
    let number =
        |value: libc::pid_t| CString::new(value.to_string()).map_err(|error| Failure::NotProbed(error.to_string()));
    let (harmless, low, raised) = (number(outer - 1)?, number(limit)?, number(limit + 1)?);
    let path = c"/proc/sys/kernel/pid_max";
    let steps = [
        Step::Write { path, text: harmless.as_bytes() },
        Step::Wait,
        Step::Write { path, text: low.as_bytes() },
        Step::CloneWithPid(limit),
        Step::CloneWithPid(limit - 1),
        Step::Write { path, text: raised.as_bytes() },
        Step::CloneWithPid(limit),
    ];
    let child = start(libc::CLONE_NEWPID, &steps, "clone3 with CLONE_NEWPID")?;
    child.next().map_err(at("write pid_max in a new PID namespace"))?;
    if read_pid_max()? != outer {
        restore_pid_max(outer).map_err(at("put pid_max back"))?;
        return Err(Failure::Missing("one pid_max for the whole machine".to_owned()));
    }
    child.go().map_err(at("answer of the child"))?;
    child.next().map_err(at("lower pid_max in the namespace"))?;
    let above = child.next();
    unless(
        above.is_err_and(|error| error.raw_os_error() == Some(Errno::EINVAL as i32)),
        "set_tid at pid_max was not refused with EINVAL",
    )?;
    child.next().map_err(at("clone3 with set_tid below pid_max"))?;
    child.next().map_err(at("raise pid_max in the namespace"))?;
    child.next().map_err(at("clone3 with set_tid after raising pid_max"))?;
    unless(read_pid_max()? == outer, "the machine's pid_max changed")?;
    Ok(format!("lowered to {limit} inside, {outer} outside as before; set_tid {limit} refused, then allowed"))
}

fn restore_pid_max(value: libc::pid_t) -> io::Result<()> {
    std::fs::write(PID_MAX, value.to_string())
}
