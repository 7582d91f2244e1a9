//! A sandbox's cgroups: `deltabox/STORE/SANDBOX/live` in the unified hierarchy for freezing and killing, and
//! `deltabox/STORE/SANDBOX` in each version 1 hierarchy that a limit needs.

use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

use super::spec::{Limits, SandboxId};
use crate::kernel::cgroups::Hierarchies;

/// The cgroup directories of one sandbox, as its manifest records them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroups {
    /// In the unified hierarchy; its child `live` holds the processes.
    pub unified: PathBuf,
    /// In version 1 hierarchies, for limits.
    pub v1: Vec<PathBuf>,
}

/// A limit or group that this host's cgroups do not give.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No hierarchy has the controller.
    #[error("no cgroup hierarchy of this host can limit {what} (controller `{controller}`)")]
    NoController {
        /// What was to be limited.
        what: &'static str,
        /// The controller's name.
        controller: &'static str,
    },
    /// A file operation on a cgroup failed.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// Processes are still there after the deadline.
    #[error("processes in {path} did not end within {deadline_s} s of cgroup.kill (in an uninterruptible sleep?)", path = path.display())]
    StillPopulated {
        /// The group.
        path: PathBuf,
        /// How long was waited.
        deadline_s: u64,
    },
}

trait At<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, CgroupError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, CgroupError> {
        self.map_err(|source| CgroupError::Io { op, path: path.to_owned(), source })
    }
}

/// The name of the directory that holds all stores' groups in each hierarchy.
const TOP: &str = "deltabox";

/// Where the groups of one store lie.
pub fn store_group(hierarchy: &Path, store_tag: &str) -> PathBuf {
    hierarchy.join(TOP).join(store_tag)
}

impl Cgroups {
    /// Makes the groups with their limits. On failure what was made is removed again.
    pub fn create(hosts: &Hierarchies, store_tag: &str, id: &SandboxId, limits: &Limits) -> Result<Self, CgroupError> {
        let unified = store_group(&hosts.unified, store_tag).join(id.as_str());
        let mut groups = Self { unified, v1: Vec::new() };
        let made = groups.make(hosts, store_tag, id, limits);
        if made.is_err() {
            // The first failure is the one to report.
            let _ = groups.remove();
        }
        made.map(|()| groups)
    }

    fn make(
        &mut self,
        hosts: &Hierarchies,
        store_tag: &str,
        id: &SandboxId,
        limits: &Limits,
    ) -> Result<(), CgroupError> {
        let live = self.unified.join("live");
        create_all(&live)?;
        let wanted = [
            ("memory", "memory", limits.memory_bytes, "memory.max", "memory.limit_in_bytes"),
            ("processes", "pids", limits.n_pids, "pids.max", "pids.max"),
        ];
        for (what, controller, value, v2_file, v1_file) in wanted {
            let Some(value) = value else { continue };
            let file = if hosts.v2_controllers.contains(controller) {
                enable_below(&hosts.unified, store_tag, controller)?;
                self.unified.join(v2_file)
            } else if let Some(root) = hosts.v1.get(controller) {
                let dir = store_group(root, store_tag).join(id.as_str());
                create_all(&dir)?;
                let file = dir.join(v1_file);
                if !self.v1.contains(&dir) {
                    self.v1.push(dir);
                }
                file
            } else {
                return Err(CgroupError::NoController { what, controller });
            };
            fs::write(&file, value.to_string()).at("write", &file)?;
        }
        Ok(())
    }

    /// The directory that processes are born into.
    pub fn open_live(&self) -> Result<OwnedFd, CgroupError> {
        let live = self.unified.join("live");
        Ok(fs::File::open(&live).at("open", &live)?.into())
    }

    /// Puts a process into the version 1 groups (in the unified hierarchy it was born in place).
    pub fn attach_v1(&self, pid: libc::pid_t) -> Result<(), CgroupError> {
        for dir in &self.v1 {
            let file = dir.join("cgroup.procs");
            fs::write(&file, pid.to_string()).at("write", &file)?;
        }
        Ok(())
    }

    /// Host PIDs of all processes.
    pub fn processes(&self) -> Result<Vec<libc::pid_t>, CgroupError> {
        let file = self.unified.join("live/cgroup.procs");
        let text = fs::read_to_string(&file).at("read", &file)?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Kills every process and waits until none is left. Groups that do not exist have none.
    ///
    /// `init` is a pidfd of the process that outlives all others (PID 1 of their namespace), if one is at hand. With it
    /// the end is seen at once: the kernel notifies of `cgroup.events` only every 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV),
    /// and the birth of the first process was such an event.
    pub fn kill(&self, init: Option<BorrowedFd<'_>>, deadline: Duration) -> Result<(), CgroupError> {
        let file = self.unified.join("cgroup.kill");
        match fs::write(&file, "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.at("write", &file)?,
        }
        self.wait_empty(init, deadline)
    }

    fn wait_empty(&self, mut init: Option<BorrowedFd<'_>>, deadline: Duration) -> Result<(), CgroupError> {
        let path = self.unified.join("cgroup.events");
        let mut events = fs::File::open(&path).at("open", &path)?;
        let end = Instant::now() + deadline;
        let mut text = String::new();
        loop {
            text.clear();
            events.rewind().at("read", &path)?;
            events.read_to_string(&mut text).at("read", &path)?;
            if text.contains("populated 0") {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::StillPopulated { path: self.unified.clone(), deadline_s: deadline.as_secs() });
            }
            // The kernel notifies a change of cgroup.events as POLLPRI.
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            fds.extend(init.map(|init| PollFd::new(init, PollFlags::POLLIN)));
            match nix::poll::poll(&mut fds, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()).at("poll", &path),
            }
            // It stays readable; what is left after it is waited for by the events alone.
            if fds.get(1).is_some_and(|fd| fd.any() == Some(true)) {
                init = None;
            }
        }
    }

    /// Removes the groups, and those of the store if it has no other sandbox. They must be empty; what does not exist
    /// is fine.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for dir in self.v1.iter().chain([&self.unified]) {
            remove_tree(dir)?;
            for above in dir.ancestors().skip(1).take(2) {
                // Not while another sandbox, or another store, is in it.
                if fs::remove_dir(above).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Makes a group and those above it. Another sandbox's removal may take an empty one away in between.
fn create_all(dir: &Path) -> Result<(), CgroupError> {
    const N_TRIES: usize = 100;
    for _ in 1..N_TRIES {
        match fs::create_dir_all(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other.at("create", dir),
        }
    }
    fs::create_dir_all(dir).at("create", dir)
}

/// Removes a cgroup and its descendants, deepest first (only rmdir works on cgroups).
pub fn remove_tree(dir: &Path) -> Result<(), CgroupError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.at("read", dir)?,
    };
    for entry in entries {
        let entry = entry.at("read", dir)?;
        if entry.file_type().at("stat", dir)?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", dir),
    }
}

/// Hands a version 2 controller down from the hierarchy's root to the sandboxes of a store.
fn enable_below(unified: &Path, store_tag: &str, controller: &str) -> Result<(), CgroupError> {
    for dir in [unified.to_owned(), unified.join(TOP), store_group(unified, store_tag)] {
        let file = dir.join("cgroup.subtree_control");
        fs::write(&file, format!("+{controller}")).at("write", &file)?;
    }
    Ok(())
}
