//! All processes of a sandbox at one moment: taken at a checkpoint, come back to at a rollback.
//!
//! ```text
//!  Draft::take       stopped: what all hold (descriptors); per process threads, signals, a template
//!  Draft::complete   they run again: the rest is read from the templates
//!
//!  Moment::plan      pure: who comes back in place, who has to go, who is missing
//!  Return::prepare   everything is opened; nothing has changed yet
//!  Return::end       who has to go is gone, without a trace for its parent
//!  Return::restore   memory, threads, signals, descriptors, process by process
//! ```
//! Files are somebody else's: the caller has pivoted to the checkpoint's stack between `end` and `restore`.

mod end;
mod error;
mod file;
mod plan;
mod restore;
mod take;

use libc::pid_t;
use serde::{Deserialize, Serialize};

pub use error::MomentError;
pub use file::FileError;
pub use plan::{How, Live, Plan};
pub use restore::Return;
pub use take::{Draft, Ground, Nursery, remove_templates};

use super::descriptors::Held;
use super::shared::SharedMemory;
use super::state::Person;
use super::template::{Memory, Template, Threads};

/// All processes, as they were. Its templates live as long as their cgroups.
#[derive(Debug)]
pub struct Moment {
    held: Held,
    /// Parents before children.
    processes: Vec<Past>,
    shared: SharedMemory,
    /// The kernel's number of the device that the tree of files was on.
    tree: u64,
}

/// A process as it was.
#[derive(Debug)]
struct Past {
    identity: Identity,
    template: Template,
    memory: Memory,
    threads: Threads,
    person: Person,
}

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// In the sandbox's PID namespace.
    pub inside: pid_t,
    /// Of its parent; 1 for init.
    pub parent: pid_t,
    /// In the host's PID namespace.
    pub host: pid_t,
    /// When it was made, clock ticks since boot: a number is given again, with another time.
    pub start: u64,
    /// It leads its session.
    pub leads: bool,
}

impl Moment {
    /// How many processes.
    pub fn n_processes(&self) -> usize {
        self.processes.len()
    }

    /// How many threads.
    pub fn n_threads(&self) -> usize {
        self.processes.iter().map(|past| past.threads.n_threads()).sum()
    }

    /// What they held.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Bytes of memory that are theirs, not of files (those that they share with each other counted once for each).
    pub fn memory_bytes(&self) -> u64 {
        let own = |past: &Past| past.memory.mappings.iter().map(|mapping| mapping.anonymous_bytes).sum::<u64>();
        self.processes.iter().map(own).sum::<u64>() + self.shared.n_bytes()
    }

    /// Takes in that a process was made again: as it `was`, and as it `is`. Whether it is one of these.
    pub fn rename(&mut self, was: &Identity, is: &Identity) -> bool {
        let mut is_one = false;
        for past in &mut self.processes {
            if (past.identity.host, past.identity.start) == (was.host, was.start) {
                past.identity = Identity { host: is.host, start: is.start, ..past.identity };
                is_one = true;
            }
        }
        is_one
    }

    /// The first template that is not there any more, by its process's PID inside.
    pub fn lost_template(&self) -> Option<pid_t> {
        let lost = |past: &&Past| !past.template.lives().unwrap_or(false);
        self.processes.iter().find(lost).map(|past| past.identity.inside)
    }

    /// Ends the templates, and removes their cgroups.
    ///
    /// # Errors
    /// The first failure; the others were removed.
    pub fn remove(self) -> Result<(), MomentError> {
        let templates = self.processes.into_iter().map(|past| past.template);
        let removed = take::remove_all(templates);
        let shared = self.shared.remove().map_err(|source| MomentError::Shared { op: "remove", source });
        removed.map_err(MomentError::from).and(shared)
    }
}
