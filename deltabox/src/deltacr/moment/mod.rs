//! All processes of a sandbox at one moment: taken at a checkpoint, come back to at a rollback.
//!
//! ```text
//!  Draft::take       stopped: what all hold (descriptors); per process threads, signals, a template
//!  Draft::complete   they run again: the rest is read from the templates
//!
//!  Moment::plan      pure: who comes back in place, who has to go, who is missing
//!  Return::prepare   everything is opened; nothing has changed yet
//!  Return::end       who has to go is gone, without a trace for its parent
//!  Return::restore   who is missing is made; memory, threads, signals, descriptors, process by process; zombies
//! ```
//! Files are somebody else's: the caller has pivoted to the checkpoint's stack between `end` and `restore`.

mod birth;
mod end;
mod error;
mod family;
mod file;
mod identity;
mod outlook;
mod plan;
mod restore;
mod take;

use std::sync::Arc;

use libc::pid_t;
use serde::{Deserialize, Serialize};

pub use error::MomentError;
pub use file::{FileError, FoundTemplates};
pub use identity::Identity;
pub use outlook::{Outlook, n_living, who_lives};
pub use plan::{How, Live, Plan};
pub use restore::Return;
pub use take::{Draft, Ground, Nursery, remove_templates};

use super::descriptors::Held;
use super::shared::SharedMemory;
use super::state::Person;
use super::tasks::pid_inside;
use super::template::{End, Gauge, Memory, Template, Threads};

/// All processes, as they were. Its templates live as long as their cgroups.
#[derive(Debug)]
pub struct Moment {
    held: Held,
    /// Parents before children.
    processes: Vec<Past>,
    zombies: Vec<Zombie>,
    shared: SharedMemory,
    /// The kernel's number of the device that the tree of files was on.
    tree: u64,
}

/// A process as it was.
#[derive(Debug)]
struct Past {
    identity: Identity,
    /// That of an earlier moment too, if it was then what it is now.
    template: Arc<Template>,
    memory: Memory,
    threads: Threads,
    person: Person,
    /// By job control.
    is_stopped: bool,
}

/// A process that had ended, for whose status its parent had not yet asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Zombie {
    identity: Identity,
    end: End,
}

impl Past {
    /// Bytes of memory that were its own, not of files.
    fn own_bytes(&self) -> u64 {
        self.memory.own_bytes()
    }
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
        self.processes.iter().map(Past::own_bytes).sum::<u64>() + self.shared.n_bytes()
    }

    /// Takes in that a process was made again: as it `was`, and as it `is`. Whether it is one of these.
    pub fn rename(&mut self, was: &Identity, is: &Identity) -> bool {
        let mut is_one = false;
        let living = self.processes.iter_mut().map(|past| &mut past.identity);
        for identity in living.chain(self.zombies.iter_mut().map(|zombie| &mut zombie.identity)) {
            if identity.is(was) {
                *identity = Identity { host: is.host, start: is.start, ..*identity };
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

    /// How a process of now was then.
    fn of_now(&self, now: &Identity) -> Option<&Past> {
        self.processes.iter().find(|past| past.identity.is(now))
    }

    /// What tells the weight of each template, and how many bytes its process had.
    pub fn templates(&self) -> impl Iterator<Item = (Gauge, u64)> {
        self.processes.iter().map(|past| (past.template.gauge(), past.own_bytes()))
    }

    /// The numbers of its templates, inside.
    pub fn template_numbers(&self) -> impl Iterator<Item = pid_t> {
        self.processes.iter().filter_map(|past| pid_inside(past.template.pid()).ok())
    }

    /// Ends the templates that no other moment has, and removes their cgroups.
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
