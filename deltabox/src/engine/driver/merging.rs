//! The driver's merges: the stacks of its sandbox stay short, and nobody waits for that.
//!
//! ```text
//! a checkpoint or rollback was answered   stack too long: a run of its layers goes to the merger thread
//! merged                                  a message in the inbox; published: stacks from now on have it
//! the next switch was answered            nothing is mounted over what it replaces: what nobody needs is removed
//! ```
//! One at a time for a sandbox. A failure leaves everything as it was, with a longer stack.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::{Driver, Message};
use crate::deltafs::layer::{LayerId, Merged, open_dir};
use crate::deltafs::layers::{FullDraft, Layers, Stack, StackError, Step, run_to_merge};
use crate::deltafs::merge::{MergeError, merge};
use crate::engine::{Engine, Error};
use crate::latency::{Operation, Phase, Span};
use crate::sandbox::SandboxId;

/// Layers in a stack at most. From the kernel: 500 lower ones (OVL_MAX_STACK), of which skeleton and base take two;
/// the rest is left for what is to come.
pub(in crate::engine) const MAX_LAYERS: usize = 480;

/// After a failure: by how much a stack grows before another merge is tried (chosen: what failed may be large).
const N_PATIENCE: usize = 16;

/// How long a checkpoint waits for a merge when it has no room left (chosen, as long as it waits for programs).
const DEADLINE: Duration = Duration::from_secs(10);

/// Merges of one sandbox.
#[derive(Debug, Default)]
pub(super) struct Merging {
    job: Option<Job>,
    /// Runs that could not be merged: passed over, or none would be any more.
    impossible: BTreeSet<Merged>,
    /// Shorter stacks are left alone for now.
    shortest: usize,
    /// What merged layers stand for, and those themselves: perhaps nobody needs it.
    replaced: Vec<LayerId>,
}

/// One that the merger thread has. Nobody wants it any more once this is dropped.
#[derive(Debug)]
struct Job {
    run: Vec<Step>,
    made: Receiver<Made>,
    cancel: Arc<AtomicBool>,
}

impl Drop for Job {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
    }
}

type Made = (Result<FullDraft, MergeError>, Span);

/// What the merger thread is given.
struct Order {
    engine: Engine,
    sandbox: SandboxId,
    run: Vec<Step>,
    below: Vec<LayerId>,
    /// Skeleton and base.
    lowers: Vec<OwnedFd>,
    /// There are checkpoints that survive a power failure.
    durable: bool,
    cancel: Arc<AtomicBool>,
}

impl Merging {
    /// Directories that are being read.
    pub(super) fn sources(&self) -> impl Iterator<Item = LayerId> {
        self.job.iter().flat_map(|job| &job.run).map(|step| step.id)
    }

    /// Nobody wants what is being made.
    pub(super) fn cancel(&mut self) {
        self.job = None;
    }

    /// What may be removed, once nothing is mounted over it.
    pub(super) fn take_replaced(&mut self) -> Vec<LayerId> {
        std::mem::take(&mut self.replaced)
    }
}

impl Driver {
    /// Begins a merge if the stack that the sandbox lies on is too long.
    pub(super) fn merge_if_long(&mut self) {
        let Some(live) = self.live.as_ref().filter(|_| self.torn.is_none()) else { return };
        let Some(footing) = self.footing.as_ref().filter(|_| self.merging.job.is_none()) else { return };
        let layers = &self.engine.0.layers;
        // Damage is told to those who ask for something.
        let Ok(stack) = layers.known_stack(live.record().parent) else { return };
        if stack.len() < self.merging.shortest {
            return;
        }
        let impossible = |run: &[Step]| Merged::of(run).is_some_and(|run| self.merging.impossible.contains(&run));
        let Some(run) = run_to_merge(stack.steps(), self.manifest.spec.merge_above, impossible) else { return };
        let lowers = footing.lowers(&self.engine).iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<_>>();
        let Ok(lowers) = lowers.inspect_err(|error| tracing::warn!(%error, "no merge for now")) else { return };
        let cancel = Arc::new(AtomicBool::new(false));
        let order = Order {
            engine: self.engine.clone(),
            sandbox: self.manifest.id.clone(),
            run: stack.steps()[run.clone()].to_vec(),
            below: stack.dirs().split_off(run.end),
            lowers,
            durable: self.tree.is_durable(),
            cancel: Arc::clone(&cancel),
        };
        let run = order.run.clone();
        let (tell, made) = channel::<Made>();
        let mail = Arc::clone(&self.mail);
        let span = Span::begin(Operation::Merge);
        let work = move || {
            carry_out(&order, span, &tell);
            // Of a sandbox that is no more: what was made is gone.
            drop(tell);
            drop(mail.post(Message::MergeEnded));
        };
        self.merging.job = Some(Job { run, made, cancel });
        // Before it begins: its sources are to stay.
        self.show();
        if !self.engine.0.merger.try_take(work) {
            self.merging.job = None;
            self.show();
        }
    }

    /// Takes in what the merger thread has made, if it has.
    pub(super) fn end_merge(&mut self) {
        self.wait_for_merge(Instant::now());
    }

    /// The same, waiting for it. Whether anything has ended.
    fn wait_for_merge(&mut self, end: Instant) -> bool {
        let Some(job) = &self.merging.job else { return false };
        let made = match job.made.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(made) => Some(made),
            Err(RecvTimeoutError::Timeout) => return false,
            // It has panicked.
            Err(RecvTimeoutError::Disconnected) => None,
        };
        let Some(job) = self.merging.job.take() else { return false };
        let made = made.ok_or("the merger thread has failed".to_owned());
        match made.and_then(|(draft, span)| Ok((draft.map_err(|error| self.blame(&job, error))?, span))) {
            Ok((draft, span)) => self.publish(&job, draft, span),
            Err(why) => self.give_up(&why),
        }
        self.show();
        self.merge_if_long();
        true
    }

    fn publish(&mut self, job: &Job, draft: FullDraft, mut span: Span) {
        // On which stacks the processes of a torn one lie is not known.
        if self.torn.is_some() {
            return;
        }
        let durable = self.tree.is_durable();
        match self.engine.0.layers.publish(draft, durable) {
            Ok(id) => {
                self.merging.shortest = 0;
                self.merging.replaced.extend(job.run.iter().map(|step| step.id).chain([id]));
                self.spares.discard(&self.engine);
                span.end_of(Phase::Manifest);
                self.book.record(self.manifest.id.as_str(), &span);
            }
            Err(error) => self.give_up(&error.to_string()),
        }
    }

    /// Remembers what is not to be tried again.
    fn blame(&mut self, job: &Job, error: MergeError) -> String {
        match error {
            MergeError::NoRoom | MergeError::Cancelled => {}
            // Perhaps it would do the next time. If not, it would be tried for ever, and its neighbours never; and a
            // larger run that it is part of comes sooner or later.
            MergeError::NotExpressible { .. } | MergeError::TooDeep | MergeError::Io { .. } => {
                self.merging.impossible.extend(Merged::of(&job.run));
            }
        }
        error.to_string()
    }

    fn give_up(&mut self, why: &str) {
        let live = self.live.as_ref().and_then(|live| live.record().parent);
        let n_layers = self.engine.0.layers.known_stack(live).map_or(0, |stack| stack.len());
        self.merging.shortest = n_layers + N_PATIENCE;
        tracing::warn!(sandbox = %self.manifest.id, why, n_layers, "layers could not be merged; tried again when there are more");
    }

    /// A stack that takes one more layer. If there are as many as the kernel takes, waits for merges.
    pub(super) fn stack_with_room(
        &mut self,
        stack: impl Fn(&Layers) -> Result<Stack, StackError>,
    ) -> Result<Stack, Error> {
        let end = Instant::now() + DEADLINE;
        loop {
            self.end_merge();
            let found = stack(&self.engine.0.layers).map_err(Error::Layer)?;
            if found.len() < MAX_LAYERS {
                return Ok(found);
            }
            self.merging.shortest = 0;
            self.merge_if_long();
            if !self.wait_for_merge(end) {
                return Err(no_room(&self.manifest.id, found.len()));
            }
        }
    }
}

/// There are as many layers as the kernel takes.
pub(super) fn no_room(id: &SandboxId, n_layers: usize) -> Error {
    Error::Refused {
        what: format!("put another layer on `{id}`"),
        why: format!("its stack has {n_layers} layers, and the kernel takes 500"),
        hint:
            "roll back to a checkpoint with fewer layers below it (`deltabox tree`); a sandbox that was created with a \
               lower --merge-above merges them"
                .to_owned(),
    }
}

/// On the merger thread.
fn carry_out(order: &Order, mut span: Span, tell: &Sender<Made>) {
    span.end_of(Phase::Queue);
    let made = make(order, &mut span);
    if order.cancel.load(Ordering::Relaxed) {
        return;
    }
    drop(tell.send((made, span)));
}

fn make(order: &Order, span: &mut Span) -> Result<FullDraft, MergeError> {
    let Order { engine, sandbox, run, below, lowers, durable, cancel } = order;
    let layers = &engine.0.layers;
    let at = |op: &'static str, path: PathBuf| move |source| MergeError::Io { op, path, source };
    has_room(engine, run)?;
    let open = |id: LayerId| open_dir(&layers.upper(id)).map_err(at("open", layers.upper(id)));
    let sources = run.iter().map(|step| open(step.id)).collect::<Result<Vec<_>, _>>()?;
    let below = below.iter().map(|id| open(*id)).collect::<Result<Vec<_>, _>>()?;
    let sources: Vec<_> = sources.iter().map(AsFd::as_fd).collect();
    let below: Vec<_> = below.iter().chain(lowers).map(AsFd::as_fd).collect();
    let dir = engine.0.store.layers();
    let draft = layers.draft(run, sandbox).map_err(at("make a layer in", dir.clone()))?;
    merge(&sources, &below, draft.upper(), cancel)?;
    let mut draft = draft.finish().map_err(at("make a layer in", dir.clone()))?;
    span.end_of(Phase::Copy);
    if *durable {
        draft.sync().map_err(at("write to disk a layer in", dir))?;
        span.end_of(Phase::Sync);
    }
    Ok(draft)
}

/// Programs are to have at least as much room as the copies may take.
fn has_room(engine: &Engine, run: &[Step]) -> Result<(), MergeError> {
    let dir = engine.0.store.layers();
    let failed = |op, source| MergeError::Io { op, path: dir.clone(), source };
    let room = nix::sys::statvfs::statvfs(&dir).map_err(|errno| failed("look at the room in", errno.into()))?;
    let free_bytes = room.blocks_available() * room.fragment_size();
    let (mut bytes, mut n_files) = (0, 0);
    for step in run {
        let usage = engine.0.layers.frozen_usage(step.id);
        let usage = usage.map_err(|source| failed("walk a layer in", source))?;
        (bytes, n_files) = (bytes + usage.bytes, n_files + usage.n_entries);
    }
    // A file system without a number of files that it can hold says that it holds none.
    let has_files = room.files() == 0 || n_files <= room.files_available() / 2;
    if bytes > free_bytes / 2 || !has_files {
        return Err(MergeError::NoRoom);
    }
    Ok(())
}
