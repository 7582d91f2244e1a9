//! The switch: a running sandbox from one root to another, with all its processes.
//!
//! ```text
//! stop -> next root? -> plan -> [take] -> open -> pivot -> rebase -> seal -> resume
//!             | unchanged                   |        |        |        |
//!             v                             v        v        v        v  something can still write to the old root
//!       [take] resume                     resume   resume   back by the same way: plan, open, pivot, rebase; resume
//! ```
//! With processes, a checkpoint takes their moment on the way, and a rollback comes back to one:
//!
//! ```text
//! stop -> next root -> prepare -> pivot -> end who is new -> restore, on the next root -> mappings of files -> resume
//!                         |         |             |            |                            |
//!                         v         v             `------------+----------------------------'
//!                       resume   resume           a failure: all are ended and made anew, from the templates
//!                                                 another: files are the target's, and no process is left
//! ```

mod walks;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use libc::pid_t;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deltacr::StopError;
use crate::deltacr::moment::{self, Draft, How, Identity, Moment, MomentError, Nursery, Return};
use crate::deltacr::rebase::{Ahead, Missing, Plan, RebaseError, find_private_writer};
use crate::deltacr::stop::{Request, Stopped, Tracer, while_stopped};
use crate::latency::{Phase, Span};
use crate::sandbox::root::{Namespace, Root};

pub(super) use walks::{Standing, Walks};

/// Where it takes place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ground<'a> {
    /// Host PID of the sandbox's init, which is not stopped.
    pub(super) init: pid_t,
    /// The cgroup directory with the processes.
    pub(super) group: &'a Path,
    /// When to give up stopping them.
    pub(super) deadline: Instant,
}

/// What becomes of the layer that the programs leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// It becomes frozen: nothing may write to it any more.
    Freeze,
    /// It is thrown away.
    Discard,
}

/// What a sandbox is moved for.
#[derive(Debug)]
pub(super) struct Errand<'a> {
    pub(super) purpose: Purpose,
    pub(super) processes: Processes<'a>,
}

/// What is done with the processes besides.
#[derive(Debug)]
pub(super) enum Processes<'a> {
    /// They go on as they are.
    Kept,
    /// Their moment is taken: into `draft`.
    Taken { ground: TakingGround<'a>, draft: &'a mut Option<Draft> },
    /// They come back to a moment.
    Returned { moment: &'a Moment, outcome: &'a mut Outcome },
}

/// What taking a moment needs to know.
#[derive(Debug)]
pub(super) struct TakingGround<'a> {
    /// Where the templates are born.
    pub(super) nursery: &'a Nursery,
    /// How many templates may be made.
    pub(super) room: usize,
    /// The moment that they come from.
    pub(super) earlier: Option<&'a Moment>,
    /// Where to put the content of what processes share.
    pub(super) memory: &'a Path,
}

/// What became of processes that were to come back.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) back: Vec<Back>,
    /// Who was made again: as it was, and as it is now.
    pub(super) made: Vec<(Identity, Identity)>,
    /// PIDs inside of those that were made as children of init, whatever became of them.
    pub(super) born: Vec<pid_t>,
    /// Streams that led out to where nobody is any more: whose (PID inside), and the end to read from.
    pub(super) streams: Vec<(pid_t, OwnedFd)>,
    /// Half way something failed, and none is left.
    pub(super) lost: Option<String>,
}

/// A process that has come back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Back {
    /// Its PID inside.
    pub(super) inside: pid_t,
    pub(super) how: How,
}

/// What was done. The programs run.
#[derive(Debug)]
pub(super) enum Switched {
    /// There was nothing to do.
    Unchanged { n_processes: usize, n_threads: usize },
    /// They are on the next root.
    Moved { n_processes: usize, n_threads: usize, n_descriptions: usize, old: OldRoot },
}

/// The root that was left.
#[derive(Debug)]
pub(super) struct OldRoot {
    namespace: Namespace,
    root: Root,
}

impl OldRoot {
    /// Takes it out of the sandbox's tree. To drop what is left tears down its inodes, if nothing uses it any more: 50
    /// to 90 ms for 20,000 of them, so not on a thread that anybody waits for.
    pub(super) fn detach(self) -> Root {
        if let Err(error) = self.namespace.detach(&self.root) {
            tracing::warn!(%error, "the old root stays attached until its sandbox ends");
        }
        self.root
    }
}

/// Why the sandbox is not on the next root.
#[derive(Debug, thiserror::Error)]
pub(super) enum SwitchError {
    /// Something about its programs stands in the way. They run on, nothing has changed.
    #[error("{why}")]
    Refused {
        why: String,
        hint: String,
        /// It passes as soon as they have run a little.
        passing: bool,
    },
    /// The machine failed. They run on, nothing has changed.
    #[error("{what}: {source}")]
    Failed { what: String, source: io::Error },
    /// The machine failed, and did again on the way back: some processes are on the one root, some on the other.
    #[error("{what}")]
    Lost { what: String },
}

/// Moves the sandbox to the root that `next` gives: a detached mount, or `None` if there is nothing to do. `next` runs
/// while the programs stand still, and again if they have to be let go for a moment (a connection that waits to be
/// accepted). `ready` is that mount if it is there already. Ends the phases from `Arm` to `Resume`; a repeated attempt
/// counts its time from its own stop on.
pub(super) fn switch(
    tracer: &mut Tracer,
    ground: &Ground<'_>,
    Errand { purpose, mut processes }: Errand<'_>,
    mut walks: Walks<'_>,
    ready: Option<OwnedFd>,
    mut next: impl FnMut() -> io::Result<Option<OwnedFd>> + Send,
    span: &mut Span,
) -> Result<Switched, SwitchError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| SwitchError::Failed { what, source }
    };
    let namespace = Namespace::of(ground.init).map_err(failed("find the sandbox's mounts"))?;
    let from = Root::of(ground.init).map_err(failed("find the sandbox's root"))?;
    if let Some(ready) = ready {
        namespace.look_ahead(&Root::new(ready).map_err(failed("look at the next root"))?);
    }
    let mut pause = FIRST_PAUSE;
    let before = *span;
    let done = loop {
        *span = before;
        // The last attempt too has time to stop them.
        let deadline = ground.deadline.max(Instant::now() + STOP_AT_LEAST);
        let request = Request { group: ground.group, excluded: &[ground.init], deadline };
        let mut ahead = Ahead::open(ground.group, ground.init);
        let attempt = tracer.while_stopped(request, |stopped| {
            span.end_of_at(Phase::Arm, stopped.begun());
            span.end_of(Phase::Stop);
            let init = ground.init;
            let what = Move { namespace: &namespace, from: &from, init, purpose, ahead: std::mem::take(&mut ahead) };
            let moved = match &mut processes {
                Processes::Returned { moment, outcome } => {
                    return_all(stopped, &what, ground.group, (moment, outcome), &mut next, span)
                }
                Processes::Kept => move_all(stopped, what, None, &mut walks, &mut next, span),
                Processes::Taken { ground, draft } => {
                    move_all(stopped, what, Some((ground, draft)), &mut walks, &mut next, span)
                }
            };
            // The engine's copies are closed: a program that closes its own can execute the file that it wrote (ETXTBSY).
            stopped.resume();
            span.end_of(Phase::Resume);
            moved
        });
        match attempt.map_err(SwitchError::from).flatten() {
            Err(SwitchError::Refused { passing: true, .. }) if Instant::now() + pause < ground.deadline => {
                // For its programs to do what the refusal waits for; there is nothing to be woken by.
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
                walks.wait();
            }
            other => break other?,
        }
    };
    let Done { n_processes, n_threads, n_descriptions } = done;
    Ok(match n_descriptions {
        None => Switched::Unchanged { n_processes, n_threads },
        Some(n_descriptions) => {
            Switched::Moved { n_processes, n_threads, n_descriptions, old: OldRoot { namespace, root: from } }
        }
    })
}

/// Between two attempts (chosen: what is waited for takes a program microseconds once it runs).
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// How long a stop may take at the end of the time (chosen).
const STOP_AT_LEAST: Duration = Duration::from_secs(1);

/// What one attempt has done.
struct Done {
    n_processes: usize,
    n_threads: usize,
    /// `None`: there was nothing to do.
    n_descriptions: Option<usize>,
}

/// From where, in what mounts, to what end; and what was looked up before the stop.
struct Move<'a> {
    namespace: &'a Namespace,
    from: &'a Root,
    init: pid_t,
    purpose: Purpose,
    ahead: Ahead,
}

/// The part during which the programs stand still.
fn move_all(
    stopped: &mut Stopped,
    Move { namespace, from, init, purpose, ahead }: Move<'_>,
    mut taken: Option<(&mut TakingGround<'_>, &mut &mut Option<Draft>)>,
    walks: &mut Walks<'_>,
    next: &mut impl FnMut() -> io::Result<Option<OwnedFd>>,
    clock: &mut Span,
) -> Result<Done, SwitchError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| SwitchError::Failed { what, source }
    };
    let (n_processes, n_threads) = (stopped.processes().len(), stopped.n_threads());
    let mut take = |stopped: &mut Stopped, seals: bool, clock: &mut Span| -> Result<(), SwitchError> {
        let Some((ground, draft)) = &mut taken else { return Ok(()) };
        let TakingGround { nursery, room, earlier, memory } = ground;
        let ground = moment::Ground { root: from, init, nursery, room: *room, earlier: *earlier, memory, seals };
        // An earlier attempt may have got further.
        if let Some(old) = draft.replace(Draft::take(stopped, &ground, Ahead::default())?) {
            old.discard();
        }
        clock.end_of(Phase::Take);
        Ok(())
    };
    let Some(mount) = next().map_err(failed("make the next root"))? else {
        take(stopped, false, clock)?;
        return Ok(Done { n_processes, n_threads, n_descriptions: None });
    };
    let to = Root::new(mount).map_err(failed("make the next root"))?;
    let missing = match purpose {
        Purpose::Freeze => Missing::Copied,
        Purpose::Discard => Missing::Left,
    };
    let plan = Plan::make(stopped, from, from, ahead)?;
    clock.end_of(Phase::Plan);
    if walks.are_in_the_way(stopped, plan.open_directories()) {
        return Err(SwitchError::Refused {
            why: "a program walks through directories".to_owned(),
            hint: "try again when it has done that".to_owned(),
            passing: true,
        });
    }
    take(stopped, purpose == Purpose::Freeze, clock)?;
    let mut opened = plan.open(&to, missing)?;
    clock.end_of(Phase::Open);
    let n_descriptions = Some(opened.n_descriptions());
    namespace.pivot(from, &to).map_err(failed("pivot"))?;
    clock.end_of(Phase::Pivot);
    let rebased = opened.commit(stopped, namespace).map_err(SwitchError::from);
    clock.end_of(Phase::Rebase);
    let sealed = rebased.and_then(|()| seal(stopped, namespace, from, purpose));
    clock.end_of(Phase::Seal);
    match sealed {
        Ok(()) => Ok(Done { n_processes, n_threads, n_descriptions }),
        Err(error) => Err(go_back(stopped, namespace, &to, from, error)),
    }
}

/// The same for processes that come back to a moment, while they stand still.
fn return_all(
    stopped: &mut Stopped,
    what: &Move<'_>,
    live: &Path,
    (moment, outcome): (&Moment, &mut Outcome),
    next: &mut impl FnMut() -> io::Result<Option<OwnedFd>>,
    clock: &mut Span,
) -> Result<Done, SwitchError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| SwitchError::Failed { what, source }
    };
    let Move { namespace, from, init, .. } = *what;
    let mount = next().map_err(failed("make the next root"))?;
    let to = mount.ok_or_else(|| failed("make the next root")(io::ErrorKind::NotFound.into()))?;
    let to = Root::new(to).map_err(failed("make the next root"))?;
    let mut way = Return::prepare(stopped, moment, (from, &to), init)?;
    clock.end_of(Phase::Prepare);
    namespace.pivot(from, &to).map_err(failed("pivot"))?;
    clock.end_of(Phase::Pivot);
    // From here on there is no way but on.
    let ended = way.end(stopped).map_err(SwitchError::from);
    clock.end_of(Phase::Kill);
    let mut restore = |stopped: &mut Stopped, way: &mut Return<'_>| -> Result<(), SwitchError> {
        way.restore(stopped, from.dev(), &to, live)?;
        clock.end_of(Phase::Restore);
        let mut opened = Plan::of_mappings(stopped, from, &way.staying())?.open(&to, Missing::Left)?;
        opened.commit(stopped, namespace)?;
        clock.end_of(Phase::Rebase);
        Ok(())
    };
    let went = ended.and_then(|()| restore(stopped, &mut way)).or_else(|error| {
        tracing::warn!(%error, "its processes cannot come back as they are: all are made anew");
        way.begin_anew(stopped, (from, &to), init)?;
        restore(stopped, &mut way)
    });
    let back = way.plan().back.iter().map(|(identity, how)| Back { inside: identity.inside, how: *how }).collect();
    let (made, born, streams) = (way.made().to_vec(), stopped.take_born(), way.take_streams());
    *outcome = Outcome { back, made, born, streams, lost: None };
    let (n_processes, n_threads) = (stopped.processes().len(), stopped.n_threads());
    let n_descriptions = Some(moment.held().n_descriptions());
    if let Err(error) = went {
        // Half of the one state and half of the other must not run.
        for process in stopped.processes() {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        outcome.lost = Some(error.to_string());
    }
    Ok(Done { n_processes, n_threads, n_descriptions })
}

/// Finishes, or undoes, what an engine that died in the middle of a switch has left: all processes are on init's root
/// then, and only that is in the tree.
pub(super) fn finish(init: pid_t, group: &Path, purpose: Purpose, deadline: Instant) -> Result<(), SwitchError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| SwitchError::Failed { what, source }
    };
    let namespace = Namespace::of(init).map_err(failed("find the sandbox's mounts"))?;
    let root = Root::of(init).map_err(failed("find the sandbox's root"))?;
    namespace.take_off(&root).map_err(failed("take back a root that was not entered"))?;
    let Some(old) = Root::left(init).map_err(failed("find the old root"))? else { return Ok(()) };
    let request = Request { group, excluded: &[init], deadline };
    let missing = match purpose {
        Purpose::Freeze => Missing::CopiedLate,
        Purpose::Discard => Missing::Copied,
    };
    while_stopped(request, |stopped| {
        let mut opened = Plan::make(stopped, &root, &old, Ahead::default())?.open(&root, missing)?;
        opened.commit(stopped, &namespace)?;
        drop(opened);
        // A layer that was discarded need not be sealed, and one that is frozen has no writers any more.
        let _ = namespace.seal(&old).map_err(failed("seal the old root"))?;
        namespace.detach(&old).map_err(failed("detach the old root"))
    })?
}

fn seal(stopped: &Stopped, namespace: &Namespace, from: &Root, purpose: Purpose) -> Result<(), SwitchError> {
    let failed = |source| SwitchError::Failed { what: "seal the old root".to_owned(), source };
    if purpose == Purpose::Discard {
        return Ok(());
    }
    crate::fault::point("switch.seal").map_err(failed)?;
    if namespace.seal(from).map_err(failed)? {
        return Ok(());
    }
    if let Some(refusal) = find_private_writer(stopped, from) {
        return Err(SwitchError::Refused {
            why: refusal.to_string(),
            hint: "its programs run on; have it opened read-only, which is enough for a private mapping".to_owned(),
            passing: false,
        });
    }
    Err(SwitchError::Refused {
        why: "something outside of its processes can still write to its files".to_owned(),
        hint: "a program of the host has a file of the sandbox open for writing; close it and try again".to_owned(),
        passing: false,
    })
}

/// Back to the root that was left. What was copied stays with its holders.
fn go_back(stopped: &mut Stopped, namespace: &Namespace, from: &Root, to: &Root, reason: SwitchError) -> SwitchError {
    let mut go = || -> Result<(), SwitchError> {
        let mut opened = Plan::make(stopped, from, from, Ahead::default())?.open(to, Missing::Left)?;
        namespace.pivot(from, to).map_err(|source| SwitchError::Failed { what: "pivot back".to_owned(), source })?;
        opened.commit(stopped, namespace)?;
        namespace.detach(from).map_err(|source| SwitchError::Failed { what: "detach".to_owned(), source })
    };
    match go() {
        Ok(()) => reason,
        Err(error) => SwitchError::Lost { what: format!("{reason}; and on the way back: {error}") },
    }
}

impl From<StopError> for SwitchError {
    fn from(error: StopError) -> Self {
        match error {
            StopError::Refused(refusal) => Self::Refused {
                why: refusal.to_string(),
                hint: "its programs run on; try again when that process is done with it".to_owned(),
                passing: false,
            },
            other => Self::Failed { what: "stop its processes".to_owned(), source: io::Error::other(other) },
        }
    }
}

impl From<MomentError> for SwitchError {
    fn from(error: MomentError) -> Self {
        let hint = match error {
            MomentError::Room { .. } => {
                "its programs run on; remove checkpoints that are not needed, or give more room: \
                                         `create --pool-templates`, `serve --pool-templates`"
            }
            _ => "its programs run on; close that, or end the process",
        };
        let hint = hint.to_owned();
        match error {
            error if error.is_refusal() => Self::Refused { why: error.to_string(), hint, passing: error.is_passing() },
            other => {
                Self::Failed { what: "take or bring back its processes".to_owned(), source: io::Error::other(other) }
            }
        }
    }
}

impl From<RebaseError> for SwitchError {
    fn from(error: RebaseError) -> Self {
        let hint = "its programs run on; close that, or end the process".to_owned();
        match error {
            RebaseError::Refused(refusal) => {
                Self::Refused { why: refusal.to_string(), hint, passing: refusal.is_passing() }
            }
            RebaseError::Handover(error) if error.is_refusal() => {
                Self::Refused { why: error.to_string(), hint, passing: false }
            }
            other => Self::Failed { what: "move its processes".to_owned(), source: io::Error::other(other) },
        }
    }
}

#[cfg(test)]
mod tests;
