//! cgroup probes: freezing, killing, limiting.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::Ground;
use super::cgroups::{Hierarchies, HierarchiesError};
use super::probe::{Failure, Outcome, PATIENCE, ProbeChild, at, open_directory, unique_name, unless, wait_for};
use crate::sys::process::CloneRequest;
use crate::sys::steps::Step;

/// The v2 hierarchy.
pub(super) fn unified(ground: &Ground) -> Outcome {
    let found = hierarchies(ground)?;
    let words = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    Ok(format!(
        "{}; its controllers: {}; in v1: {}",
        found.unified.display(),
        words(found.v2_controllers.iter().map(String::as_str).collect()),
        words(found.v1.keys().map(String::as_str).collect())
    ))
}

fn hierarchies(ground: &Ground) -> Result<&Hierarchies, Failure> {
    match &ground.cgroups {
        Ok(found) => Ok(found),
        Err(error @ HierarchiesError::NoUnified) => Err(Failure::Missing(error.to_string())),
        Err(error) => Err(Failure::NotProbed(error.to_string())),
    }
}

/// A child is born into a cgroup, frozen, thawed, and goes on.
pub(super) fn freezer(ground: &Ground) -> Outcome {
    let group = ProbeCgroup::create(&hierarchies(ground)?.unified).map_err(at("mkdir in the v2 hierarchy"))?;
    let directory = group.open().map_err(at("open the cgroup"))?;
    let child = born_into(&directory)?;
    let members = group.read("cgroup.procs").map_err(at("read cgroup.procs"))?;
    unless(members.trim() == child.pid().to_string(), "CLONE_INTO_CGROUP left the child elsewhere")?;
    group.write("cgroup.freeze", "1").map_err(at("write cgroup.freeze"))?;
    group.wait_event("frozen 1").map_err(at("wait for frozen 1 in cgroup.events"))?;
    group.write("cgroup.freeze", "0").map_err(at("write cgroup.freeze"))?;
    group.wait_event("frozen 0").map_err(at("wait for frozen 0 in cgroup.events"))?;
    child.go().map_err(at("answer of the thawed child"))?;
    Ok("born by CLONE_INTO_CGROUP, frozen, thawed".to_owned())
}

/// A cgroup with a frozen child in it is killed by one write.
pub(super) fn kill(ground: &Ground) -> Outcome {
    let group = ProbeCgroup::create(&hierarchies(ground)?.unified).map_err(at("mkdir in the v2 hierarchy"))?;
    let directory = group.open().map_err(at("open the cgroup"))?;
    let child = born_into(&directory)?;
    // Templates are killed frozen.
    group.write("cgroup.freeze", "1").map_err(at("write cgroup.freeze"))?;
    group.wait_event("frozen 1").map_err(at("wait for frozen 1 in cgroup.events"))?;
    group.write("cgroup.kill", "1").map_err(at("write cgroup.kill"))?;
    let status = child.wait().map_err(at("wait for the killed child"))?;
    unless(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "cgroup.kill did not send SIGKILL")?;
    Ok("a frozen member was killed".to_owned())
}

fn born_into(directory: &OwnedFd) -> Result<ProbeChild, Failure> {
    let request = CloneRequest { cgroup: Some(directory.as_fd()), ..CloneRequest::default() };
    ProbeChild::start(request, &[Step::Wait]).map_err(at("clone3 with CLONE_INTO_CGROUP"))
}

/// A limit on memory can be set.
pub(super) fn memory(ground: &Ground) -> Outcome {
    limit(hierarchies(ground)?, "memory", "memory.max", "memory.limit_in_bytes", "67108864")
}

/// A limit on the number of processes can be set.
pub(super) fn pids(ground: &Ground) -> Outcome {
    limit(hierarchies(ground)?, "pids", "pids.max", "pids.max", "64")
}

fn limit(found: &Hierarchies, controller: &str, v2_file: &str, v1_file: &str, value: &str) -> Outcome {
    let (version, mount, file) = if found.v2_controllers.contains(controller) {
        ("v2", &found.unified, v2_file)
    } else if let Some(mount) = found.v1.get(controller) {
        ("v1", mount, v1_file)
    } else {
        return Err(Failure::Missing(format!("no hierarchy has the {controller} controller")));
    };
    let enabled = if version == "v2" { Some(Enabled::ensure(mount, controller)?) } else { None };
    let group = ProbeCgroup::create(mount).map_err(at(&format!("mkdir in {}", mount.display())))?;
    group.write(file, value).map_err(at(&format!("write {file}")))?;
    let read = group.read(file).map_err(at(&format!("read {file}")))?;
    unless(read.trim() == value, &format!("{file} does not keep what is written"))?;
    drop(group);
    drop(enabled);
    Ok(format!("{version}: {file} was set in {}", mount.display()))
}

/// A controller that the hierarchy's root hands to its children; taken back on drop if it was not before.
struct Enabled(Option<(PathBuf, String)>);

impl Enabled {
    fn ensure(mount: &Path, controller: &str) -> Result<Self, Failure> {
        let path = mount.join("cgroup.subtree_control");
        let before = std::fs::read_to_string(&path).map_err(at("read cgroup.subtree_control"))?;
        if before.split_ascii_whitespace().any(|name| name == controller) {
            return Ok(Self(None));
        }
        std::fs::write(&path, format!("+{controller}")).map_err(at("enable the controller for children"))?;
        Ok(Self(Some((path, format!("-{controller}")))))
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        if let Some((path, text)) = &self.0 {
            // Refused only if somebody began to use it meanwhile; then it must stay.
            let _ = std::fs::write(path, text);
        }
    }
}

/// A cgroup of our own, removed on drop with whatever is in it.
struct ProbeCgroup(PathBuf);

impl ProbeCgroup {
    fn create(parent: &Path) -> io::Result<Self> {
        let path = parent.join(unique_name());
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn open(&self) -> io::Result<OwnedFd> {
        open_directory(&self.0)
    }

    fn read(&self, file: &str) -> io::Result<String> {
        std::fs::read_to_string(self.0.join(file))
    }

    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        // Not create: a file that the kernel does not offer is ENOENT, where creating it would be EACCES.
        let mut file = File::options().write(true).open(self.0.join(file))?;
        io::Write::write_all(&mut file, text.as_bytes())
    }

    /// Waits until `cgroup.events` has the line `wanted`; the kernel wakes pollers of the file at each change.
    fn wait_event(&self, wanted: &str) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut events = File::open(self.0.join("cgroup.events"))?;
        let mut text = String::new();
        loop {
            text.clear();
            events.rewind()?;
            events.read_to_string(&mut text)?;
            if text.lines().any(|line| line == wanted) {
                return Ok(());
            }
            wait_for(events.as_fd(), PollFlags::POLLPRI, deadline)?;
        }
    }
}

impl Drop for ProbeCgroup {
    fn drop(&mut self) {
        // Normally empty by now. v1 has neither file, and no process of ours is ever put there.
        if self.write("cgroup.kill", "1").is_ok() {
            let _ = self.wait_event("populated 0");
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_cgroup_is_gone_with_its_members() {
        let unified = Hierarchies::find().expect("needs cgroup v2").unified;
        let group = ProbeCgroup::create(&unified).expect("needs root");
        let directory = group.open().unwrap();
        let child = born_into(&directory).unwrap();
        let path = group.0.clone();
        group.write("cgroup.freeze", "1").unwrap();
        drop(group);
        assert!(matches!(child.wait().unwrap(), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
        assert!(!path.exists());
    }
}
