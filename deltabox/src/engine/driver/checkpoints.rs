//! The driver's checkpoints and rollbacks: each a straight line.
//!
//! ```text
//! checkpoint: admit -> next layer, announced in sandbox.json, mounted ahead -> switch -> sandbox.json -> cN.json
//! rollback:   admit -> target whole? -> next layer over it, announced, mounted -> switch -> sandbox.json
//! ```
//! Until the switch a failure leaves an announced layer that nobody uses, which goes; after it the sandbox is on the
//! next layer, whatever else fails. An engine that dies in between finds both layers named in sandbox.json and sees at
//! init's root which one it is on (`engine/recover.rs`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::merging::no_room;
use super::spare::SpareRoot;
use super::{Driver, MAX_LAYERS, io_error};
use crate::deltacr::moment::{self, Moment, Nursery};
use crate::deltafs::layer::{LayerId, LiveLayer, RootLook};
use crate::deltafs::layers::{Stack, StackError};
use crate::engine::api::{BackReport, CheckpointReport, CheckpointRequest, PhaseTime, RollbackReport, RollbackRequest};
use crate::engine::footing::Footing;
use crate::engine::manifest::Manifest;
use crate::engine::store::SandboxDir;
use crate::engine::switch::{
    Errand, Ground, OldRoot, Outcome, Processes, Purpose, SwitchError, Switched, TakingGround, Walks, switch,
};
use crate::engine::tree::{Checkpoint, CheckpointId, Measured};
use crate::engine::{Engine, Error, unix_ms};
use crate::latency::{Phase, Span};
use crate::pool::Ticket;

/// How long programs may take to stop, and commands that are just being started to start (chosen).
const DEADLINE: Duration = Duration::from_secs(10);

/// The next layer, mounted.
struct Armed {
    layer: LiveLayer,
    mount: OwnedFd,
    /// How its root looks.
    look: RootLook,
}

impl Driver {
    /// Carries out a checkpoint; what is to be cleaned up after it has been answered comes along.
    pub(in crate::engine) fn checkpoint(
        &mut self,
        request: &CheckpointRequest,
        span: &mut Span,
    ) -> Result<(CheckpointReport, Option<OldRoot>), Error> {
        span.end_of(Phase::Queue);
        if let Some(name) = &request.name {
            self.tree.check_name(name)?;
        }
        let (init, group) = self.ready_to_switch()?;
        let backstage = self.life.as_ref().and_then(|life| life.backstage.clone());
        if backstage.is_none() && !request.fs_only {
            return Err(Error::Refused {
                what: format!("checkpoint `{}` with its processes", self.manifest.id),
                why: "its init has not told what it holds".to_owned(),
                hint: "init was stopped by somebody? try again when it runs".to_owned(),
            });
        }
        let ticket = match request.fs_only {
            true => None,
            false => Some(self.admit(moment::n_living(&group))?),
        };
        self.load_ground()?;
        let unchanged = self.live.as_ref().map_or(Ok(false), LiveLayer::is_unchanged);
        let unchanged = unchanged.map_err(io_error("look at the live layer of", &self.dir))?;
        let top = Some(self.manifest.live);
        let below = match unchanged {
            true => self.engine.0.layers.known_stack(top).map_err(Error::Layer)?,
            false => self.stack_with_room(|layers| layers.known_stack(top))?,
        };
        let durable = self.tree.is_durable();
        let unified = self.manifest.cgroups.unified.clone();
        let Self { engine, dir, manifest, live, footing, .. } = self;
        let (Some(live), Some(footing)) = (live.as_ref(), footing.as_ref()) else { return Err(Error::ShuttingDown) };
        let id = CheckpointId(manifest.next_checkpoint);
        let earlier = manifest.head.and_then(|head| self.moments.get(head));
        let mut arm = Arm { engine, dir, footing, manifest, below: &below, head: id, durable };
        let (mut armed, mut frozen_look) = (None, None);
        if !unchanged {
            armed = Some(arm.arm(live.root_look().map_err(io_error("look at the root of", dir))?, None)?);
        }
        let end = Instant::now() + Duration::from_millis(request.patience_ms.into());
        let walks = Walks::new(end, &mut self.standing);
        let ground = Ground { init, group: &group, deadline: end + DEADLINE };
        let ready = armed.as_ref().map(|next| next.mount.try_clone()).transpose();
        let ready = ready.map_err(io_error("mount the next root of", dir))?;
        let next = || {
            // What had changed before the stop is not looked at again.
            if armed.is_none() && live.is_unchanged()? {
                return Ok(None);
            }
            let look = live.root_look()?;
            let next = match &mut armed {
                Some(next) => next,
                None => armed.insert(arm.arm(look.clone(), None).map_err(io::Error::other)?),
            };
            if next.look != look {
                look.apply(next.mount.as_fd())?;
                next.look = look.clone();
            }
            frozen_look = Some(look);
            next.mount.try_clone().map(Some)
        };
        let memory = dir.checkpoints().join(format!("{id}.memory"));
        let nursery = match backstage.filter(|_| !request.fs_only) {
            Some(backstage) => Some(
                Nursery::new(&unified, format!("t{}-", id.0), backstage)
                    .map_err(io_error("prepare for the templates of", dir))?,
            ),
            None => None,
        };
        let mut draft = None;
        let processes = match &nursery {
            None => Processes::Kept,
            Some(nursery) => Processes::Taken {
                ground: TakingGround {
                    nursery,
                    room: ticket.as_ref().map_or(0, Ticket::most),
                    earlier,
                    memory: &memory,
                },
                draft: &mut draft,
            },
        };
        let errand = Errand { purpose: Purpose::Freeze, processes };
        let switched = switch(&mut self.tracer, &ground, errand, walks, ready, next, span);
        let switched = self.after_switch(switched, armed.map(|armed| armed.layer), "checkpoint");
        let switched = match (switched, draft.take()) {
            (Ok(switched), taken) => {
                draft = taken;
                switched
            }
            (Err(error), taken) => {
                self.discard(taken);
                return Err(error);
            }
        };
        let (frozen, mut measured, old) = measured_of(switched);
        let moment = match draft.map(|draft| draft.complete(&mut self.tracer)).transpose() {
            Ok(moment) => moment,
            Err(error) => {
                self.clean_up(old, None);
                return Err(Error::Switch {
                    what: format!("checkpoint `{}`: read its templates", self.manifest.id),
                    source: io::Error::other(error),
                });
            }
        };
        if let Some(moment) = &moment {
            measured.n_descriptions = moment.held().n_descriptions();
            measured.memory_bytes = moment.memory_bytes();
            span.end_of(Phase::Describe);
        }
        let Some(live) = self.live.as_mut() else { return Err(Error::ShuttingDown) };
        if let Some(look) = frozen_look.filter(|_| frozen) {
            live.set_first_look(look);
        }
        let (top, root) = (live.record().parent, live.record().root.clone());
        let (parent, epoch) = (self.manifest.head, self.manifest.epoch);
        let durable = request.durable;
        let mut checkpoint =
            Checkpoint::new(id, request.name.clone(), parent, epoch, unix_ms(), top, root, frozen, durable);
        checkpoint.fs_only = request.fs_only;
        if moment.is_some() {
            let running = self.commands.values().filter(|command| command.exit.is_none());
            checkpoint.commands = running.map(|command| (command.pid, command.tag.clone())).collect();
        }
        let saved = moment.as_ref().map_or(Ok(()), |moment| moment.save(&self.dir.processes(id)));
        if let Err(error) = saved {
            self.clean_up(old, None);
            self.forget_moment(id, moment);
            return Err(io_error("write what is held of processes in", &self.dir)(error));
        }
        let made = self.record_checkpoint(&mut checkpoint, measured, span);
        // Whatever failed: the programs are where they are.
        match made {
            Ok(()) => {
                if let Some(moment) = moment {
                    self.moments.insert(id, moment);
                    self.survey();
                }
                drop(ticket);
                Ok((checkpoint.report(&self.manifest.id), old))
            }
            Err(error) => {
                self.clean_up(old, None);
                self.forget_moment(id, moment);
                Err(error)
            }
        }
    }

    /// After the switch: on disk what makes it a checkpoint.
    fn record_checkpoint(
        &mut self,
        checkpoint: &mut Checkpoint,
        measured: Measured,
        span: &mut Span,
    ) -> Result<(), Error> {
        self.manifest.next_checkpoint += 1;
        self.manifest.epoch += 1;
        self.save()?;
        if checkpoint.durable {
            self.sync(checkpoint.top)?;
            span.end_of(Phase::Sync);
        }
        checkpoint.set_measured(Measured {
            stopped_us: us(span.stopped()),
            total_us: us(span.total()),
            phases_us: phases(span),
            ..measured
        });
        let added = Arc::make_mut(&mut self.tree).add(checkpoint.clone());
        added.map_err(io_error("write the checkpoint in", &self.dir))?;
        // On disk from the next change of sandbox.json on; until then the epoch tells (`engine/recover.rs`).
        self.manifest.head = Some(checkpoint.id);
        span.end_of(Phase::Manifest);
        checkpoint.total_us = us(span.total());
        checkpoint.phases_us = phases(span);
        self.book.record(self.manifest.id.as_str(), span);
        Ok(())
    }

    /// Carries out a rollback; what is to be cleaned up after it has been answered comes along.
    pub(in crate::engine) fn rollback(
        &mut self,
        request: &RollbackRequest,
        span: &mut Span,
    ) -> Result<(RollbackReport, Option<OldRoot>, LayerId), Error> {
        span.end_of(Phase::Queue);
        let target = self.tree.find(&self.manifest.id, &request.checkpoint)?.clone();
        let (init, group) = self.ready_to_switch()?;
        let moment = match request.fs_only {
            true => None,
            false => Some(self.moments.get(target.id).ok_or_else(|| without_processes(&self.manifest, &target))?),
        };
        // Out of the driver's hands for as long as it lends itself to the switch.
        let moment = moment.map(|_| target.id).and_then(|id| self.moments.lend(id));
        let rolled_back = self.roll_back(&target, (init, &group), moment.as_ref().map(|(_, moment)| moment), span);
        self.moments.give_back(moment);
        for (pid, tag) in target.commands.iter().filter(|_| rolled_back.is_ok()) {
            let n_births = self.born.iter().filter(|inside| u32::try_from(**inside) == Ok(*pid)).count();
            if n_births > 0 {
                self.returned(*pid, tag.clone(), u32::try_from(n_births).unwrap_or(1));
            }
        }
        self.born.clear();
        for (was, is) in std::mem::take(&mut self.made_again) {
            for (id, moment) in self.moments.iter_mut() {
                if moment.rename(&was, &is)
                    && let Err(error) = moment.save(&self.dir.processes(id))
                {
                    // The next engine takes that process for another one, and makes it again.
                    tracing::error!(sandbox = %self.manifest.id, checkpoint = %id, %error, "not written down");
                }
            }
        }
        rolled_back
    }

    /// What commands write that had ended and have come back goes to their logs: their clients are gone.
    fn log_streams(&self, streams: Vec<(i32, OwnedFd)>) {
        for (pid, end) in streams {
            let path = self.dir.log(u32::try_from(pid).unwrap_or(0));
            if let Err(error) = self.logs.follow(end, &path) {
                tracing::error!(sandbox = %self.manifest.id, pid, %error, "log lost");
            }
        }
    }

    fn roll_back(
        &mut self,
        target: &Checkpoint,
        (init, group): (i32, &Path),
        moment: Option<&Moment>,
        span: &mut Span,
    ) -> Result<(RollbackReport, Option<OldRoot>, LayerId), Error> {
        self.load_ground()?;
        let discarded = self.manifest.live;
        let below = self.stack_with_room(|layers| layers.stack(target.top))?;
        let durable = self.tree.is_durable();
        let spare = self.spares.take(&self.engine, &below, &target.root);
        self.spares.encourage();
        let Self { engine, dir, manifest, footing, .. } = self;
        let Some(footing) = footing.as_ref() else { return Err(Error::ShuttingDown) };
        let mut arm = Arm { engine, dir, footing, manifest, below: &below, head: target.id, durable };
        let Armed { layer, mount, .. } = arm.arm(target.root.clone(), spare)?;
        // Other files come back under every walk: it need not be spared this.
        let walks = Walks::new(Instant::now(), &mut self.standing);
        let ground = Ground { init, group, deadline: Instant::now() + DEADLINE };
        let ready = mount.try_clone().map_err(io_error("mount the next root of", dir))?;
        let next = || mount.try_clone().map(Some);
        let mut outcome = Outcome::default();
        let processes = match moment {
            None => Processes::Kept,
            Some(moment) => Processes::Returned { moment, outcome: &mut outcome },
        };
        let errand = Errand { purpose: Purpose::Discard, processes };
        let switched = switch(&mut self.tracer, &ground, errand, walks, Some(ready), next, span);
        let switched = self.after_switch(switched, Some(layer), "roll back")?;
        let (_, measured, old) = measured_of(switched);
        self.manifest.head = Some(target.id);
        self.manifest.epoch += 1;
        if let Err(error) = self.save() {
            // It has taken place. Whoever reads the old sandbox.json finds the new layer at init's root, or as the only
            // one that is left.
            tracing::error!(sandbox = %self.manifest.id, %error, "rolled back, but that could not be written down yet");
        }
        span.end_of(Phase::Manifest);
        let Outcome { back, made, born, streams, lost } = outcome;
        self.born = born;
        self.made_again.extend(made);
        self.log_streams(streams);
        if let Some(why) = lost {
            self.clean_up(old, Some(discarded));
            return Err(Error::Lost { id: self.manifest.id.clone(), checkpoint: target.id.to_string(), why });
        }
        self.book.record(self.manifest.id.as_str(), span);
        let report = RollbackReport {
            checkpoint: target.id.to_string(),
            stopped_us: us(span.stopped()),
            total_us: us(span.total()),
            phases_us: phases(span),
            n_processes: measured.n_processes,
            n_threads: measured.n_threads,
            n_descriptions: measured.n_descriptions,
            processes: back.iter().map(|one| BackReport { pid: one.inside, how: one.how.name().to_owned() }).collect(),
        };
        Ok((report, old, discarded))
    }

    /// Takes a checkpoint away, and the layers that only it needed.
    pub(super) fn remove_checkpoint(&mut self, text: &str) -> Result<(), Error> {
        let target = self.tree.find(&self.manifest.id, text)?.clone();
        if self.manifest.head == Some(target.id) {
            self.manifest.head = target.parent;
            self.save().inspect_err(|_| self.manifest.head = Some(target.id))?;
        }
        let removed = Arc::make_mut(&mut self.tree).remove(target.id);
        self.show();
        removed.map_err(io_error("remove a checkpoint from", &self.dir))?;
        self.spares.discard(&self.engine);
        let moment = self.moments.remove(target.id);
        self.forget_moment(target.id, moment);
        self.engine.collect_of(&self.manifest.id).map(drop)
    }

    /// Leaves to the janitor what the operation has left behind, its old root detached.
    pub(in crate::engine) fn clean_up(&mut self, old: Option<OldRoot>, discarded: Option<LayerId>) {
        let Some(root) = old.map(OldRoot::detach) else { return };
        let (engine, replaced) = (self.engine.clone(), self.merging.take_replaced());
        let (id, is_damaged) = (self.manifest.id.clone(), self.tree.is_damaged());
        self.engine.0.janitor.take(move || {
            if let Err(error) = root.tear_down() {
                tracing::warn!(%error, "what is cached of an old root goes with its last user");
            }
            drop(root);
            if let Some(layer) = discarded
                && let Err(error) = engine.0.layers.remove(layer)
            {
                tracing::error!(%layer, %error, "a discarded layer stays until the next gc");
            }
            if !is_damaged && let Err(error) = engine.collect_among(replaced) {
                tracing::error!(sandbox = %id, %error, "layers that were merged stay until the next gc");
            }
        });
    }

    /// Init's PID and the group to stop; or why not. No command is just being started: a child of init that is born
    /// during the pivot could keep the old root.
    fn ready_to_switch(&mut self) -> Result<(i32, std::path::PathBuf), Error> {
        if let Some(why) = &self.torn {
            return Err(Error::Torn { id: self.manifest.id.clone(), why: why.clone() });
        }
        self.alive()?;
        let end = Instant::now() + DEADLINE;
        while !self.starting.is_empty() {
            match self.alive()?.link.recv(end) {
                Ok((message, fds)) => self.hear(message, fds),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(Error::Refused {
                        what: format!("stop `{}`", self.manifest.id),
                        why: "its init does not start a command that was asked for".to_owned(),
                        hint: "its init may have been stopped by a signal from the host".to_owned(),
                    });
                }
                Err(error) => self.lost(&error),
            }
        }
        let init = self.alive()?.init.pid;
        Ok((init, self.manifest.cgroups.unified.join("live")))
    }

    /// Opens what the first checkpoint after a start of the engine needs.
    fn load_ground(&mut self) -> Result<(), Error> {
        if self.footing.is_none() {
            let (base, frame) = (&self.manifest.spec.base, self.manifest.frame.as_deref());
            self.footing = Some(Arc::new(Footing::again(&self.engine, base, frame)?));
        }
        if self.live.is_none() {
            let id = self.manifest.live;
            let layer = self.engine.0.layers.load(id);
            self.live = Some(layer.map_err(|source| Error::Layer(StackError { id, source }))?);
        }
        Ok(())
    }

    /// Takes the outcome in: on the next layer, or where it was; then the next layer goes.
    fn after_switch(
        &mut self,
        switched: Result<Switched, SwitchError>,
        next: Option<LiveLayer>,
        what: &str,
    ) -> Result<Switched, Error> {
        match (&switched, next) {
            (Ok(Switched::Moved { .. }), Some(layer)) => {
                (self.manifest.live, self.manifest.next) = (layer.record().id, None);
                self.live = Some(layer);
            }
            // Both layers are in use: both stay named.
            (Err(SwitchError::Lost { .. }), _) => {}
            (_, next) => {
                self.manifest.next = None;
                if let Some(layer) = next.map(|layer| layer.record().id) {
                    let engine = self.engine.clone();
                    self.engine.0.janitor.take(move || drop(engine.0.layers.remove(layer)));
                }
            }
        }
        self.show();
        let id = self.manifest.id.clone();
        switched.map_err(|error| match error {
            SwitchError::Refused { why, hint, .. } => Error::Refused { what: format!("{what} `{id}`"), why, hint },
            SwitchError::Failed { what: step, source } => {
                Error::Switch { what: format!("{what} `{id}`: {step}"), source }
            }
            SwitchError::Lost { what } => {
                self.torn = Some(what.clone());
                Error::Torn { id, why: what }
            }
        })
    }

    /// After a switch.
    fn save(&self) -> Result<(), Error> {
        self.show();
        let saved = crate::fault::point("checkpoints.moved")
            .and_then(|()| self.manifest.save(self.dir.path(), self.tree.is_durable()));
        saved.map_err(io_error("write the manifest in", &self.dir))
    }

    /// Writes the layers of a stack to disk.
    fn sync(&self, top: Option<LayerId>) -> Result<(), Error> {
        let layers = &self.engine.0.layers;
        for id in layers.known_stack(top).map_err(Error::Layer)?.dirs() {
            let written = crate::fault::point("checkpoints.sync").and_then(|()| layers.sync(id));
            written.map_err(|source| Error::Io { op: "write to disk", path: layers.path(id), source })?;
        }
        self.dir.sync().map_err(io_error("write to disk", &self.dir))
    }
}

/// What making the next layer takes.
struct Arm<'a> {
    engine: &'a Engine,
    dir: &'a SandboxDir,
    footing: &'a Footing,
    manifest: &'a mut Manifest,
    below: &'a Stack,
    head: CheckpointId,
    /// There are checkpoints that survive a power failure.
    durable: bool,
}

impl Arm<'_> {
    /// Makes a layer, says in sandbox.json that it may become the live one, mounts it over the stack; or does with a
    /// `spare` what is left to do.
    fn arm(&mut self, look: RootLook, spare: Option<SpareRoot>) -> Result<Armed, Error> {
        if self.below.len() >= MAX_LAYERS {
            return Err(no_room(&self.manifest.id, self.below.len()));
        }
        let failed = |op| io_error(op, self.dir);
        let (layers, head) = (&self.engine.0.layers, Some(self.head.to_string()));
        let made = match spare {
            Some(spare) => spare.settle(self.engine, self.below, head).map(|(layer, mount)| (layer, Some(mount))),
            None => layers.create(self.below, &self.manifest.id, head, look.clone()).map(|layer| (layer, None)),
        };
        let (layer, mounted) = made.map_err(failed("make a layer for"))?;
        let id = layer.record().id;
        self.manifest.next = Some(id);
        let mounted = self
            .manifest
            .save(self.dir.path(), self.durable)
            .and_then(|()| crate::fault::point("checkpoints.arm"))
            .and_then(|()| mounted.map_or_else(|| self.footing.mount(self.engine, self.below, &layer), Ok));
        let mount = mounted.map_err(|source| {
            self.manifest.next = None;
            let _ = layers.remove(id);
            failed("mount the next root of")(source)
        })?;
        Ok(Armed { layer, mount, look })
    }
}

fn measured_of(switched: Switched) -> (bool, Measured, Option<OldRoot>) {
    match switched {
        Switched::Unchanged { n_processes, n_threads } => {
            (false, Measured { n_processes, n_threads, ..Measured::default() }, None)
        }
        Switched::Moved { n_processes, n_threads, n_descriptions, old } => {
            (true, Measured { n_processes, n_threads, n_descriptions, ..Measured::default() }, Some(old))
        }
    }
}

fn without_processes(manifest: &Manifest, target: &Checkpoint) -> Error {
    let why = match target.fs_only {
        true => "that checkpoint was made with --fs-only: it holds no processes",
        false => "its processes are not held any more: a template was lost, or the sandbox killed",
    };
    Error::Refused {
        what: format!("roll `{}` back to {} with its processes", manifest.id, target.id),
        why: why.to_owned(),
        hint: "give --fs-only to have its files back".to_owned(),
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn phases(span: &Span) -> Vec<PhaseTime> {
    span.phases().iter().map(|(phase, took)| PhaseTime { phase: phase.name().to_owned(), us: us(*took) }).collect()
}
