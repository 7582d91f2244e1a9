//! The moments that a sandbox's checkpoints hold, and the pool's knowledge of their templates: always the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Driver;
use crate::deltacr::moment::{self, Draft, Moment, Outlook};
use crate::engine::Error;
use crate::engine::tree::CheckpointId;
use crate::pool::{Pool, Ticket};
use crate::sandbox::SandboxId;

impl Driver {
    /// Room for the templates of a checkpoint.
    pub(super) fn admit(&self, n_processes: usize) -> Result<Ticket, Error> {
        let id = &self.manifest.id;
        self.engine.0.pool.admit(id, n_processes).map_err(|full| Error::Refused {
            what: format!("checkpoint `{id}` with its processes"),
            why: full.to_string(),
            hint: full.hint(),
        })
    }

    /// Has measured, when there is time, what the templates weigh.
    pub(super) fn survey(&self) {
        let (pool, id) = (Arc::clone(&self.engine.0.pool), self.manifest.id.clone());
        self.engine.0.surveyor.try_take(move || pool.survey(&id));
    }

    /// Removes the templates of a checkpoint that did not come to be.
    pub(super) fn discard(&self, draft: Option<Draft>) {
        if let Some(draft) = draft {
            self.engine.0.janitor.take(move || draft.discard());
        }
    }

    /// Removes the templates of a checkpoint that is no more.
    pub(super) fn forget_moment(&self, checkpoint: CheckpointId, moment: Option<Moment>) {
        let Some(moment) = moment else { return };
        let (id, path) = (self.manifest.id.clone(), self.dir.processes(checkpoint));
        self.engine.0.janitor.take(move || {
            // Without templates it says nothing: the next engine removes it, if it is still there.
            let _ = std::fs::remove_file(path);
            if let Err(error) = moment.remove() {
                tracing::error!(sandbox = %id, %error, "a template stays until its sandbox ends");
            }
        });
    }

    /// How rollbacks to its checkpoints would go. Those whose templates are lost hold files only from now on.
    pub(super) fn outlook(&mut self) -> BTreeMap<CheckpointId, Outlook> {
        let lost: Vec<_> = self.moments.iter().filter_map(|(id, moment)| Some((id, moment.lost_template()?))).collect();
        for (id, inside) in lost {
            tracing::error!(sandbox = %self.manifest.id, checkpoint = %id, inside, "a template is gone: its processes are lost");
            let moment = self.moments.remove(id);
            self.forget_moment(id, moment);
        }
        let Some(init) = self.life.as_ref().map(|life| life.init.pid) else { return BTreeMap::new() };
        let group = self.manifest.cgroups.unified.join("live");
        // A group that cannot be read is gone, with everybody in it.
        let living = moment::who_lives(&group, init).unwrap_or_default();
        self.moments.iter().map(|(id, moment)| (id, moment.outlook(&living))).collect()
    }
}

#[derive(Debug)]
pub(super) struct Moments {
    all: BTreeMap<CheckpointId, Moment>,
    pool: Arc<Pool>,
    sandbox: SandboxId,
}

impl Moments {
    pub(super) fn new(pool: Arc<Pool>, sandbox: SandboxId) -> Self {
        Self { all: BTreeMap::new(), pool, sandbox }
    }

    pub(super) fn get(&self, id: CheckpointId) -> Option<&Moment> {
        self.all.get(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (CheckpointId, &Moment)> {
        self.all.iter().map(|(id, moment)| (*id, moment))
    }

    /// Which processes and templates they have must not change.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (CheckpointId, &mut Moment)> {
        self.all.iter_mut().map(|(id, moment)| (*id, moment))
    }

    pub(super) fn insert(&mut self, id: CheckpointId, moment: Moment) {
        self.pool.put(&self.sandbox, id.0, moment.templates());
        self.all.insert(id, moment);
    }

    /// The pool counts no longer what is about to go.
    pub(super) fn remove(&mut self, id: CheckpointId) -> Option<Moment> {
        self.pool.forget(&self.sandbox, id.0);
        self.all.remove(&id)
    }

    /// Lends one out: it comes back by [`Moments::give_back`].
    pub(super) fn lend(&mut self, id: CheckpointId) -> Option<(CheckpointId, Moment)> {
        self.pool.touch(&self.sandbox, id.0);
        self.all.remove_entry(&id)
    }

    pub(super) fn give_back(&mut self, lent: Option<(CheckpointId, Moment)>) {
        self.all.extend(lent);
    }

    /// Their templates are gone, with the sandbox's processes.
    pub(super) fn clear(&mut self) {
        self.pool.clear(&self.sandbox);
        self.all.clear();
    }
}
