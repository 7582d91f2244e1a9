//! Taking a moment.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libc::pid_t;

use super::birth::make_template;
use super::error::{MomentError, process};
use super::{Identity, Moment, Past, Zombie};
use crate::deltacr::descriptors::{Held, Reading};
use crate::deltacr::handover::call;
use crate::deltacr::place::Place;
use crate::deltacr::shared::{Found, SharedMemory};
use crate::deltacr::state::Person;
use crate::deltacr::stop::{Process, Stopped, Tracer};
use crate::deltacr::table::Ahead;
use crate::deltacr::tasks::{Lists, scan_children};
use crate::deltacr::template::{
    End, Freezer, Mapping, Outline, Template, TemplateError, TemplateRefusal, Threads, outline_if_unchanged,
};
use crate::fault;
use crate::sandbox::backstage::Backstage;
use crate::sandbox::reserve::Opened;
use crate::sandbox::root::Root;

/// How long a template that is of no use may take to end (chosen: it needs microseconds and a CPU).
pub(super) const END_PATIENCE: Duration = Duration::from_secs(5);

/// Where a moment is taken.
#[derive(Clone, Copy, Debug)]
pub struct Ground<'a> {
    /// The root of the processes.
    pub root: &'a Root,
    /// Host PID of the sandbox's init: it will be the templates' parent.
    pub init: pid_t,
    /// Where the templates are born.
    pub nursery: &'a Nursery,
    /// How many templates may be made.
    pub room: usize,
    /// The moment before, whose templates serve for whoever is as he was then.
    pub earlier: Option<&'a Moment>,
    /// Where to put the content of what is shared, a file that is not there yet.
    pub memory: &'a Path,
    /// The root will be sealed before the processes run: what is only on it nobody can change then.
    pub seals: bool,
}

/// Empty frozen cgroups for templates, made before anybody stands still.
#[derive(Debug)]
pub struct Nursery {
    /// The cgroup above those of the processes; those of the templates are made in it.
    group: PathBuf,
    /// With what their names begin.
    prefix: String,
    backstage: Arc<Backstage>,
    ready: Mutex<Vec<Freezer>>,
    n_made: AtomicUsize,
}

impl Nursery {
    /// Makes as many as `group/live` has processes now, at most 64.
    ///
    /// # Errors
    /// Nothing can be put over their directories in `/proc`.
    pub fn new(group: &Path, prefix: String, backstage: Arc<Backstage>) -> io::Result<Self> {
        let n = Lists::open(&group.join("live")).and_then(|lists| lists.processes()).map_or(0, |pids| pids.len());
        let (ready, n_made) = Default::default();
        backstage.covers.prepare(n.clamp(1, MAX_READY) - 1)?;
        let nursery = Self { group: group.to_owned(), prefix, backstage, ready, n_made };
        // Init has none. What fails here fails again when it is needed, and is told then.
        let made: Vec<_> = (1..n.min(MAX_READY)).map_while(|_| nursery.make().ok()).collect();
        *nursery.lock() = made;
        Ok(nursery)
    }

    fn make(&self) -> Result<Freezer, TemplateError> {
        let number = self.n_made.fetch_add(1, Ordering::Relaxed);
        Freezer::create(&self.group, &format!("{}{number}", self.prefix))
    }

    pub(super) fn take(&self) -> Result<Freezer, TemplateError> {
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
    zombies: Vec<Zombie>,
    shared: SharedMemory,
    /// Files that are still to be copied, on the root that was sealed.
    sealed: Vec<Found>,
    memory: PathBuf,
    tree: u64,
}

#[derive(Debug)]
struct Sketch {
    identity: Identity,
    template: Arc<Template>,
    outline: Outline,
    threads: Threads,
    person: Person,
    is_stopped: bool,
}

impl Draft {
    /// Takes what is there while all processes are stopped.
    ///
    /// # Errors
    /// All processes are as they were, and no template is left.
    pub fn take(stopped: &mut Stopped, ground: &Ground<'_>, ahead: Ahead) -> Result<Self, MomentError> {
        let Reading { mut held, memory: found, doubtful } = Held::read(stopped, ground.root, ground.init, ahead)?;
        for (tid, inside, number) in doubtful {
            let closes = closes_on_exec(stopped, tid, number)?;
            held.set_close_on_exec(inside, number, closes);
        }
        let mut identities = Vec::with_capacity(stopped.processes().len());
        for one in stopped.processes() {
            identities.push(Identity::read(one.pid).map_err(process("identify", one.pid))?);
            refuse_timers(one.pid)?;
        }
        let (processes, shared) = (Vec::with_capacity(identities.len()), SharedMemory::default());
        let (tree, memory) = (ground.root.dev(), ground.memory.to_owned());
        let (zombies, sealed) = (Vec::new(), Vec::new());
        let mut draft = Self { held, processes, zombies, shared, sealed, memory, tree };
        if let Err(error) = draft.make_templates(stopped, ground, &identities) {
            draft.discard();
            return Err(error);
        }
        match draft.read_shared(found, ground) {
            Ok(()) => Ok(draft),
            Err(error) => {
                draft.discard();
                Err(error)
            }
        }
    }

    /// With numbers that no program has, and nothing to be seen of them in `/proc`.
    fn make_templates(
        &mut self,
        stopped: &mut Stopped,
        ground: &Ground<'_>,
        identities: &[Identity],
    ) -> Result<(), MomentError> {
        let Backstage { reserve, covers } = &*ground.nursery.backstage;
        let numbers = reserve.open().map_err(process("raise the numbers for", 0))?;
        let mut hidden = Vec::with_capacity(identities.len());
        for identity in parents_first(identities) {
            let (sketch, number) = sketch(stopped, ground, &numbers, identity, hidden.len() < ground.room)?;
            let has_ended_children = sketch.person.has_ended_children();
            self.processes.push(sketch);
            hidden.extend(number);
            if has_ended_children {
                self.zombies.extend(find_zombies(identities, identity.host)?);
            }
        }
        covers.put_over(&hidden).map_err(process("cover the templates of", 0))?;
        fault::point("moment.hidden").map_err(process("hide", 0))
    }

    fn read_shared(&mut self, mut found: Vec<Found>, ground: &Ground<'_>) -> Result<(), MomentError> {
        let failed = |source| MomentError::Shared { op: "copy", source };
        for Sketch { identity, outline, .. } in &self.processes {
            for mapping in outline.shared_memory(self.tree) {
                if mapping.name.starts_with("/[aio]") {
                    let kind = "an asynchronous I/O context (io_setup(2))";
                    let (pid, start) = (identity.host, mapping.start);
                    return Err(TemplateError::from(TemplateRefusal::Mapping { pid, kind, start }).into());
                }
                let one = Found::mapped(identity.host, &mapping).map_err(failed)?;
                if one.is_in(ground.root) && !has_no_name(ground.root, identity.host, &mapping).map_err(failed)? {
                    let (pid, start) = (identity.host, mapping.start);
                    let kind = "a file whose name looks like that of a deleted one";
                    return Err(TemplateError::from(TemplateRefusal::Mapping { pid, kind, start }).into());
                }
                found.push(one);
            }
        }
        let is_late = |one: &mut Found| ground.seals && one.is_in(ground.root);
        self.sealed = found.extract_if(.., is_late).collect();
        self.shared.add(&found, &self.memory).map_err(failed)
    }

    /// Reads the rest, and has watched from now on what becomes of it. The processes may run meanwhile.
    ///
    /// # Errors
    /// A template is gone, or something could not be copied; nothing is left.
    pub fn complete(mut self, tracer: &mut Tracer) -> Result<Moment, MomentError> {
        if let Err(source) = self.shared.add(&self.sealed, &self.memory) {
            self.discard();
            return Err(MomentError::Shared { op: "copy", source });
        }
        let mut processes = Vec::with_capacity(self.processes.len());
        tracer.watches().keep(|pid| self.processes.iter().any(|sketch| sketch.identity.host == pid));
        let mut rest = self.processes.into_iter();
        for Sketch { identity, template, outline, threads, person, is_stopped } in rest.by_ref() {
            let memory = outline.complete(&template).and_then(|memory| {
                tracer.watches().turn_to(identity.host, &template, &memory);
                memory.look_ahead(&template).map(|()| memory)
            });
            match memory {
                Ok(memory) => {
                    processes.push(Past { identity, template, memory, threads, person, is_stopped });
                }
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
        Ok(Moment { held: self.held, processes, zombies: self.zombies, shared: self.shared, tree: self.tree })
    }

    /// Removes the templates.
    pub fn discard(self) {
        if let Err(error) = remove_all(self.processes.into_iter().map(|sketch| sketch.template)) {
            tracing::error!(%error, "a template of no use stays");
        }
        if let Err(error) = self.shared.remove() {
            tracing::error!(%error, "a copy of what was shared stays");
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
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
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

/// All that nobody else has, whichever fail.
pub(super) fn remove_all(templates: impl Iterator<Item = Arc<Template>>) -> Result<(), TemplateError> {
    let last = templates.filter_map(Arc::into_inner);
    let removed = last.map(|template| template.remove(END_PATIENCE));
    removed.fold(Ok(()), Result::and)
}

/// One process, and the number inside of its template if that is new.
fn sketch(
    stopped: &mut Stopped,
    ground: &Ground<'_>,
    numbers: &Opened<'_>,
    identity: Identity,
    has_room: bool,
) -> Result<(Sketch, Option<pid_t>), MomentError> {
    let pid = identity.host;
    fault::point("moment.take").map_err(process("take", pid))?;
    // First: threads tell with it what their records need.
    let person = Person::read(stopped, pid)?;
    let threads = Threads::read(stopped, pid)?;
    let is_stopped = stopped.is_job_stopped(pid);
    let earlier = ground.earlier.and_then(|moment| moment.of_now(&identity));
    if let Some(Past { template, memory, .. }) = earlier
        && let Some(outline) = outline_if_unchanged(stopped, pid, template, memory)?
    {
        return Ok((Sketch { identity, template: template.clone(), outline, threads, person, is_stopped }, None));
    }
    if !has_room {
        return Err(MomentError::Room { room: ground.room });
    }
    let chooses = threads.choose_numbers();
    let (template, outline, number) = make_template(stopped, ground, numbers, pid, chooses)?;
    let (template, number) = (Arc::new(template), Some(number));
    Ok((Sketch { identity, template, outline, threads, person, is_stopped }, number))
}

/// Nothing makes a timer of timer_create(2) again as it was.
fn refuse_timers(pid: pid_t) -> Result<(), MomentError> {
    match fs::read(format!("/proc/{pid}/timers")) {
        Ok(timers) if !timers.is_empty() => Err(MomentError::Timers { pid }),
        // A kernel without such timers.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(process("read the timers of", pid)(error)),
        _ => Ok(()),
    }
}

/// The children of `parent` (host PID) that have ended, and of which it has not heard. One whose first thread alone has
/// ended is among those that live.
fn find_zombies(alive: &[Identity], parent: pid_t) -> Result<Vec<Zombie>, MomentError> {
    let failed = process("list the children of", parent);
    let children = scan_children(parent).map_err(failed)?;
    let mut zombies = Vec::new();
    for child in children.iter().filter(|child| child.is_zombie && alive.iter().all(|one| one.host != child.host)) {
        let end = End::read(child.host).map_err(failed)?;
        let identity = Identity::read(child.host).map_err(failed)?;
        zombies.extend(end.map(|end| Zombie { identity, end }));
    }
    Ok(zombies)
}

/// Whether a mapping is of a file on `root` that has no name, and not of one whose name ends as if it had none.
fn has_no_name(root: &Root, pid: pid_t, mapping: &Mapping) -> io::Result<bool> {
    let link = CString::new(format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end))?;
    Ok(Place::behind(root, root.as_fd(), &link)?.is_none_or(|place| place.unlinked))
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
        let one = |inside, parent| Identity::of(inside, parent, 1);
        let sorted = parents_first(&[one(9, 7), one(7, 5), one(8, 1), one(5, 1)]);
        let inside: Vec<_> = sorted.iter().map(|one| one.inside).collect();
        assert_eq!(inside, [8, 5, 7, 9]);
        // Whatever that may be, it ends.
        assert_eq!(parents_first(&[one(2, 3), one(3, 2)]).len(), 2);
    }
}
