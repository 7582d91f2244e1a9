//! Taking a moment.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libc::pid_t;

use super::error::{MomentError, process};
use super::{Identity, Moment, Past};
use crate::deltacr::descriptors::{Held, Reading};
use crate::deltacr::handover::call;
use crate::deltacr::shared::{Found, SharedMemory};
use crate::deltacr::state::Person;
use crate::deltacr::stop::{Process, Stopped};
use crate::deltacr::table::Ahead;
use crate::deltacr::tasks::{Lists, read_identity};
use crate::deltacr::template::{Freezer, Outline, Request, Template, TemplateError, Threads};
use crate::fault;
use crate::sandbox::root::Root;

/// How long a template that is of no use may take to end (chosen: it needs microseconds and a CPU).
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Where a moment is taken.
#[derive(Clone, Copy, Debug)]
pub struct Ground<'a> {
    /// The root of the processes.
    pub root: &'a Root,
    /// Host PID of the sandbox's init: it will be the templates' parent.
    pub init: pid_t,
    /// Where the templates are born.
    pub nursery: &'a Nursery,
    /// Where to put the content of shared memory, a file that is not there yet.
    pub memory: &'a Path,
}

/// Empty frozen cgroups for templates, made before anybody stands still.
#[derive(Debug)]
pub struct Nursery {
    /// The cgroup above those of the processes; those of the templates are made in it.
    group: PathBuf,
    /// With what their names begin.
    prefix: String,
    ready: Mutex<Vec<Freezer>>,
    n_made: AtomicUsize,
}

impl Nursery {
    /// Makes as many as `group/live` has processes now, at most 64.
    pub fn new(group: &Path, prefix: String) -> Self {
        let n = Lists::open(&group.join("live")).and_then(|lists| lists.processes()).map_or(0, |pids| pids.len());
        let (ready, n_made) = Default::default();
        let nursery = Self { group: group.to_owned(), prefix, ready, n_made };
        // Init has none. What fails here fails again when it is needed, and is told then.
        let made: Vec<_> = (1..n.min(MAX_READY)).map_while(|_| nursery.make().ok()).collect();
        *nursery.lock() = made;
        nursery
    }

    fn make(&self) -> Result<Freezer, TemplateError> {
        let number = self.n_made.fetch_add(1, Ordering::Relaxed);
        Freezer::create(&self.group, &format!("{}{number}", self.prefix))
    }

    fn take(&self) -> Result<Freezer, TemplateError> {
        let ready = self.lock().pop();
        ready.map_or_else(|| self.make(), Ok)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Freezer>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        for unused in self.lock().drain(..) {
            if let Err(error) = unused.remove() {
                tracing::warn!(%error, "an empty cgroup stays until its sandbox ends");
            }
        }
    }
}

/// Cgroups made ahead at most (chosen: 64 take some milliseconds).
const MAX_READY: usize = 64;

/// A moment of which something has still to be read.
#[derive(Debug)]
pub struct Draft {
    held: Held,
    processes: Vec<Sketch>,
    shared: SharedMemory,
    tree: u64,
}

#[derive(Debug)]
struct Sketch {
    identity: Identity,
    template: Template,
    outline: Outline,
    threads: Threads,
    person: Person,
}

impl Draft {
    /// Takes what is there while all processes are stopped.
    ///
    /// # Errors
    /// All processes are as they were, and no template is left.
    pub fn take(stopped: &mut Stopped, ground: &Ground<'_>, ahead: Ahead) -> Result<Self, MomentError> {
        let Reading { mut held, memory: memfds, doubtful } = Held::read(stopped, ground.root, ground.init, ahead)?;
        for (tid, inside, number) in doubtful {
            let closes = closes_on_exec(stopped, tid, number)?;
            held.set_close_on_exec(inside, number, closes);
        }
        let mut identities = Vec::with_capacity(stopped.processes().len());
        for one in stopped.processes() {
            identities.push(read_identity(one.pid).map_err(process("identify", one.pid))?);
        }
        let (processes, shared) = (Vec::with_capacity(identities.len()), SharedMemory::default());
        let mut draft = Self { held, processes, shared, tree: ground.root.dev() };
        for identity in parents_first(&identities) {
            match sketch(stopped, ground, identity) {
                Ok(sketch) => draft.processes.push(sketch),
                Err(error) => {
                    draft.discard();
                    return Err(error);
                }
            }
        }
        match draft.read_shared(memfds, ground.memory) {
            Ok(shared) => draft.shared = shared,
            Err(source) => {
                draft.discard();
                return Err(MomentError::Shared { op: "copy", source });
            }
        }
        Ok(draft)
    }

    fn read_shared(&self, mut found: Vec<Found>, path: &Path) -> std::io::Result<SharedMemory> {
        for Sketch { identity, outline, .. } in &self.processes {
            for mapping in outline.shared_memory(self.tree) {
                found.push(Found::mapped(identity.host, &mapping)?);
            }
        }
        SharedMemory::read(&found, path)
    }

    /// Reads the rest. The processes may run meanwhile.
    ///
    /// # Errors
    /// A template is gone; the others are removed.
    pub fn complete(self) -> Result<Moment, MomentError> {
        let mut processes = Vec::with_capacity(self.processes.len());
        let mut rest = self.processes.into_iter();
        for Sketch { identity, template, outline, threads, person } in rest.by_ref() {
            match outline.complete(&template) {
                Ok(memory) => processes.push(Past { identity, template, memory, threads, person }),
                Err(error) => {
                    let made = processes.into_iter().map(|past: Past| past.template);
                    let failed = remove_all(made.chain([template]).chain(rest.map(|sketch| sketch.template)));
                    if let Err(error) = failed {
                        tracing::error!(%error, "a template of no use stays");
                    }
                    // As long as the template: there is none that it could go with.
                    let _ = self.shared.remove();
                    return Err(error.into());
                }
            }
        }
        Ok(Moment { held: self.held, processes, shared: self.shared, tree: self.tree })
    }

    /// Removes the templates.
    pub fn discard(self) {
        if let Err(error) = remove_all(self.processes.into_iter().map(|sketch| sketch.template)) {
            tracing::error!(%error, "a template of no use stays");
        }
        if let Err(error) = self.shared.remove() {
            tracing::error!(%error, "a copy of shared memory of no use stays");
        }
    }
}

/// Removes the templates that are in groups below `group`, whose names are `prefix` and more, but for those in `kept`:
/// their moment is lost.
///
/// # Errors
/// The first failure; the others were removed.
pub fn remove_templates(group: &Path, prefix: &str, kept: &BTreeSet<String>) -> Result<(), MomentError> {
    let entries = match fs::read_dir(group) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(process("list the templates of", 0))?,
    };
    let is_one = |name: &str| name.starts_with(prefix) && !kept.contains(name);
    let groups = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_one));
    let remove = |path: PathBuf| {
        let end = Instant::now() + END_PATIENCE;
        loop {
            match Template::find(Freezer::open(path.clone())?)? {
                Ok(template) => return template.remove(END_PATIENCE),
                Err(empty) => match empty.remove() {
                    // One that an engine died in the middle of making may be born just now.
                    Err(_) if Instant::now() < end => {}
                    removed => return removed,
                },
            }
        }
    };
    let removed = groups.filter(|entry| entry.path().is_dir()).map(|entry| remove(entry.path()));
    Ok(removed.fold(Ok(()), Result::and)?)
}

/// All, whichever fail.
pub(super) fn remove_all(templates: impl Iterator<Item = Template>) -> Result<(), TemplateError> {
    let removed = templates.map(|template| template.remove(END_PATIENCE));
    removed.fold(Ok(()), Result::and)
}

fn sketch(stopped: &mut Stopped, ground: &Ground<'_>, identity: Identity) -> Result<Sketch, MomentError> {
    let pid = identity.host;
    fault::point("moment.take").map_err(process("take", pid))?;
    let threads = Threads::read(stopped, pid)?;
    let person = Person::read(stopped, pid)?;
    let freezer = ground.nursery.take()?;
    let request = Request { keeper: Some(ground.init), ..Request::default() };
    let (template, outline) = Template::make(stopped, pid, freezer, &request)?;
    Ok(Sketch { identity, template, outline, threads, person })
}

/// Asks the process of task `tid` itself.
fn closes_on_exec(stopped: &mut Stopped, tid: pid_t, number: i32) -> Result<bool, MomentError> {
    let has = |process: &&Process| process.threads.iter().any(|thread| thread.tid == tid);
    let pid = stopped.processes().iter().find(has).map_or(tid, |process| process.pid);
    let mut hand = stopped.hand(pid)?;
    let number = i64::from(number).cast_unsigned();
    let flags = hand.call(libc::SYS_fcntl, call(0, &[number, libc::F_GETFD.cast_unsigned().into()]).args)?;
    hand.close()?;
    Ok(flags & i64::from(libc::FD_CLOEXEC) != 0)
}

/// Who has no parent among them first, then those whose parents are there, and so on.
fn parents_first(identities: &[Identity]) -> Vec<Identity> {
    let mut sorted: Vec<Identity> = Vec::with_capacity(identities.len());
    let mut rest = identities.to_vec();
    while !rest.is_empty() {
        let waiting: Vec<pid_t> = rest.iter().map(|one| one.inside).collect();
        let (ready, later): (Vec<_>, Vec<_>) = rest.into_iter().partition(|one| !waiting.contains(&one.parent));
        if ready.is_empty() {
            // No tree: what the kernel never shows.
            sorted.extend(later);
            break;
        }
        sorted.extend(ready);
        rest = later;
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_before_children_however_they_are_listed() {
        let one = |inside, parent| Identity { inside, parent, host: inside + 1000, start: 1, leads: false };
        let sorted = parents_first(&[one(9, 7), one(7, 5), one(8, 1), one(5, 1)]);
        let inside: Vec<_> = sorted.iter().map(|one| one.inside).collect();
        assert_eq!(inside, [8, 5, 7, 9]);
        // Whatever that may be, it ends.
        assert_eq!(parents_first(&[one(2, 3), one(3, 2)]).len(), 2);
    }
}
