//! Which layers somebody needs, and the removal of the others.
//!
//! Needed is the stack of a live layer, of one that may become it, and of each checkpoint; what a root is mounted over;
//! what is being merged; and below a damaged layer everything that is older. The layers that were made for a sandbox are
//! removed by its driver, so never while it makes one; or, if merged ones stand for them, by the janitor: no stack that is
//! asked for from then on has them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::api::{BoundReport, DiskReport, GcReport, PoolReport, Reply, TreeNode, TreeReport};
use super::driver::Message;
use super::tree::{Checkpoint, CheckpointId};
use super::{Engine, Error, lock};
use crate::deltacr::moment::Outlook;
use crate::deltafs::layer::{LayerId, Record};
use crate::deltafs::layers::{Layers, Step, Usage};
use crate::sandbox::SandboxId;

/// Layers by which a sandbox needs others: its live one, the next one, each checkpoint's topmost.
pub(super) type Tops = BTreeSet<LayerId>;

/// How rollbacks would go, of the checkpoints that hold processes.
#[derive(Debug)]
pub struct Outlooks(BTreeMap<CheckpointId, Outlook>);

impl Engine {
    /// Removes all layers that nobody needs.
    pub(super) fn collect(&self, reply: Reply<GcReport>) {
        let orphans = match self.collect_orphans() {
            Ok(report) => report,
            Err(error) => return reply(Err(error)),
        };
        let handles: Vec<_> = self.sandboxes().iter().map(|(id, handle)| (id.clone(), handle.clone())).collect();
        let running: Vec<_> = handles.into_iter().filter(|(_, handle)| handle.shown.is_some()).collect();
        let sum = Arc::new(Mutex::new((running.len(), Ok(orphans), Some(reply))));
        let add = move |report: Result<GcReport, Error>| {
            let mut sum = lock(&sum);
            sum.0 = sum.0.saturating_sub(1);
            match (report, &mut sum.1) {
                (Ok(more), Ok(all)) => {
                    all.n_layers += more.n_layers;
                    all.bytes += more.bytes;
                }
                // Removed meanwhile, with its layers.
                (Err(Error::NoSandbox { .. }), _) | (_, Err(_)) => {}
                (Err(error), all) => *all = Err(error),
            }
            if sum.0 == 0
                && let Some(reply) = sum.2.take()
            {
                reply(std::mem::replace(&mut sum.1, Ok(GcReport::default())));
            }
        };
        if running.is_empty() {
            return add(Ok(GcReport::default()));
        }
        for (id, _) in running {
            let add = add.clone();
            self.post(&id, Message::Collect { reply: Box::new(add) });
        }
    }

    /// Removes layers of sandboxes that are no more.
    pub(super) fn collect_orphans(&self) -> Result<GcReport, Error> {
        let is_gone = |id: &SandboxId| !self.sandboxes().contains_key(id) && !self.0.store.sandbox(id).path().exists();
        self.remove_unneeded(|record| is_gone(&record.sandbox))
    }

    /// Removes layers of one sandbox that nobody needs. On its driver's thread. None if a checkpoint cannot be read:
    /// they may be its.
    pub(super) fn collect_of(&self, id: &SandboxId) -> Result<GcReport, Error> {
        if self.shown(id).is_ok_and(|shown| lock(&shown).tree.is_damaged()) {
            return Ok(GcReport::default());
        }
        self.collect_removed(id)
    }

    /// The same of one whose checkpoints are gone: none of them can need a layer.
    pub(super) fn collect_removed(&self, id: &SandboxId) -> Result<GcReport, Error> {
        self.remove_unneeded(|record| record.sandbox == *id)
    }

    fn remove_unneeded(&self, is_meant: impl Fn(&Record) -> bool) -> Result<GcReport, Error> {
        let layers = &self.0.layers;
        let io = |source| Error::Io { op: "clean up", path: self.0.store.layers(), source };
        let mut report = GcReport::default();
        let needed = self.needed(None);
        // From the latest on: what lies below a single layer that is there is there too, whenever this is cut short.
        for id in layers.list().map_err(io)?.into_iter().rev() {
            let Some(record) = needed.unneeded(layers, id) else { continue };
            if is_meant(&record) {
                report.bytes += layers.scan_usage(id).unwrap_or_default().bytes;
                report.n_layers += 1;
                layers.remove(id).map_err(io)?;
            }
        }
        Ok(report)
    }

    /// Removes those of these layers that nobody needs.
    pub(super) fn collect_among(&self, mut those: Vec<LayerId>) -> Result<(), Error> {
        if those.is_empty() {
            return Ok(());
        }
        let layers = &self.0.layers;
        let needed = self.needed(None);
        those.sort_unstable_by(|a, b| b.cmp(a));
        for id in those {
            if needed.unneeded(layers, id).is_some() {
                let io = |source| Error::Io { op: "clean up", path: self.0.store.layers(), source };
                layers.remove(id).map_err(io)?;
            }
        }
        Ok(())
    }

    /// All layers that sandboxes need, but for one of them.
    fn needed(&self, except: Option<&SandboxId>) -> Needed {
        let handles: Vec<_> = self.sandboxes().iter().map(|(id, handle)| (id.clone(), handle.clone())).collect();
        let mut needed = Needed::default();
        for (_, handle) in handles.into_iter().filter(|(id, _)| Some(id) != except) {
            let Some(shown) = handle.shown else { continue };
            let (tops, held) = {
                let shown = lock(&shown);
                (shown.tops.clone(), shown.held.clone())
            };
            needed.add(&self.0.layers, tops);
            needed.layers.extend(held.dirs);
            needed.damaged = needed.damaged.max(held.unread);
        }
        needed
    }

    /// Asks a sandbox how rollbacks to its checkpoints would go: for [`Engine::tree`].
    pub fn outlooks(&self, id: &SandboxId, reply: Reply<Outlooks>) {
        self.post(id, Message::Outlook { reply: Box::new(move |all| reply(all.map(Outlooks))) });
    }

    /// The checkpoints of a sandbox. Looks at every layer, walks those that were not walked before, measures templates.
    pub fn tree(&self, id: &SandboxId, Outlooks(mut outlooks): Outlooks) -> Result<TreeReport, Error> {
        let shown = self.shown(id)?;
        let (tree, head, live, most) = {
            let shown = lock(&shown);
            (Arc::clone(&shown.tree), shown.report.head.clone(), shown.live, shown.report.spec.pool)
        };
        let layers = &self.0.layers;
        let mut others = self.needed(Some(id));
        others.add(layers, [live]);
        let mut looks = BTreeMap::new();
        let stacks: Vec<_> = tree.iter().map(|one| Stack::look(layers, one.top, &mut looks)).collect();
        let pool = &self.0.pool;
        let (held, mut weights) = pool.weigh(id);
        let mut n_users = BTreeMap::new();
        for layer in stacks.iter().flat_map(|stack| &stack.layers) {
            *n_users.entry(*layer).or_insert(0) += 1;
        }
        let node = |(one, stack): (&Checkpoint, Stack)| {
            let (mut own_bytes, mut shared_bytes) = (0, 0);
            for layer in &stack.layers {
                let bytes = layers.frozen_usage(*layer).unwrap_or_default().bytes;
                let is_own = n_users.get(layer) == Some(&1) && !others.layers.contains(layer);
                *(if is_own { &mut own_bytes } else { &mut shared_bytes }) += bytes;
            }
            let (checkpoint, n_layers) = (one.report(id), stack.layers.len());
            let (own_templates, shared_templates) = weights.remove(&one.id.0).unwrap_or_default();
            let outlook = outlooks.remove(&one.id);
            TreeNode {
                checkpoint,
                n_layers,
                own_bytes,
                shared_bytes,
                in_memory: outlook.is_some(),
                own_templates,
                shared_templates,
                outlook,
                damage: stack.damage,
            }
        };
        let checkpoints = tree.iter().zip(stacks).map(node).collect();
        let host = BoundReport { held: pool.held(), most: pool.bounds() };
        let pool = PoolReport { sandbox: BoundReport { held, most }, host };
        Ok(TreeReport { sandbox: id.clone(), head, checkpoints, pool })
    }

    /// What the files of a sandbox take on disk. Walks its live layer, and others that were not walked before.
    pub fn disk(&self, id: &SandboxId) -> Result<DiskReport, Error> {
        let shown = self.shown(id)?;
        let (tops, held, live) = {
            let shown = lock(&shown);
            (shown.tops.clone(), shown.held.clone(), shown.live)
        };
        let layers = &self.0.layers;
        let others = self.needed(Some(id));
        let (mut mine, mut stack) = (Needed::default(), Needed::default());
        mine.add(layers, tops);
        mine.layers.extend(held.dirs);
        stack.add(layers, [live]);
        let live_bytes = layers.scan_usage(live).unwrap_or_default().bytes;
        let (mut own_bytes, mut shared_bytes) = (live_bytes, 0);
        for layer in mine.layers.into_iter().filter(|layer| *layer != live) {
            let Usage { bytes, .. } = layers.frozen_usage(layer).unwrap_or_default();
            *(if others.layers.contains(&layer) { &mut shared_bytes } else { &mut own_bytes }) += bytes;
        }
        Ok(DiskReport { live_bytes, own_bytes, shared_bytes, n_layers: stack.walked.len().saturating_sub(1) })
    }
}

/// Directories of layers that somebody needs.
#[derive(Debug, Default)]
struct Needed {
    layers: BTreeSet<LayerId>,
    /// Those whose stacks are in it, down to the base.
    walked: BTreeSet<LayerId>,
    /// The highest layer that is damaged: what lies below it cannot be told, but that it is older.
    damaged: Option<LayerId>,
}

impl Needed {
    fn add(&mut self, layers: &Layers, tops: impl IntoIterator<Item = LayerId>) {
        for top in tops {
            // Even if a merged one takes its place: `diff` tells more of renamed directories from single ones.
            self.layers.insert(top);
            let mut next = Some(top);
            while let Some(name) = next {
                // A merged one is looked at again: what it stands for may go because of it.
                let step = layers.step(name).and_then(|step| match step.n_layers {
                    1 => Ok(step),
                    _ => layers.check(name),
                });
                next = match step {
                    Ok(step) => {
                        self.layers.insert(step.id);
                        // Else everything from here on down is in it already.
                        self.walked.insert(step.id).then_some(step.parent).flatten()
                    }
                    Err(_) => {
                        self.layers.extend(layers.directories(name));
                        self.damaged = self.damaged.max(Some(name));
                        None
                    }
                };
            }
        }
    }

    /// The record of a layer that is not needed, and can be read.
    fn unneeded(&self, layers: &Layers, id: LayerId) -> Option<Record> {
        let record = (!self.layers.contains(&id)).then(|| Record::load(&layers.path(id)).ok())??;
        let may_lie_below = self.damaged.is_some_and(|damaged| record.name() < damaged);
        (!may_lie_below).then_some(record)
    }
}

/// What a checkpoint's stack was found to be.
struct Stack {
    layers: Vec<LayerId>,
    damage: Option<String>,
}

impl Stack {
    /// Looks at each layer that is not in `looks` yet.
    fn look(layers: &Layers, top: Option<LayerId>, looks: &mut BTreeMap<LayerId, Look>) -> Self {
        let (mut stack, mut next) = (Self { layers: Vec::new(), damage: None }, top);
        while let Some(name) = next {
            let look = looks.entry(name).or_insert_with(|| layers.check(name).map_err(|error| error.to_string()));
            let (id, parent) = match look {
                Ok(step) => (step.id, step.parent),
                Err(damage) => {
                    stack.damage = Some(damage.clone());
                    (name, None)
                }
            };
            stack.layers.push(id);
            next = parent;
        }
        stack
    }
}

/// A layer's topmost directory, or what is wrong with it.
type Look = Result<Step, String>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltafs::layer::RootLook;

    #[test]
    fn what_may_lie_below_a_damaged_layer_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let make = |layers: &Layers, parent| {
            let below = layers.known_stack(parent).unwrap();
            layers.create(&below, &"a".parse().unwrap(), None, RootLook::first()).unwrap().record().id
        };
        let layers = Layers::open(dir.path()).unwrap();
        let first = make(&layers, None);
        let second = make(&layers, Some(first));
        let third = make(&layers, Some(second));
        let fourth = make(&layers, None);
        std::fs::write(layers.path(second).join("layer.json"), "{").unwrap();
        // Another engine, which has not seen it whole.
        let layers = Layers::open(dir.path()).unwrap();
        let mut needed = Needed::default();
        needed.add(&layers, [third]);
        let kept: Vec<_> =
            [first, second, third, fourth].into_iter().filter(|id| needed.unneeded(&layers, *id).is_none()).collect();
        assert_eq!(kept, [first, second, third]);
        let stack = Stack::look(&layers, Some(third), &mut BTreeMap::new());
        assert_eq!(stack.layers, [third, second]);
        assert!(stack.damage.unwrap().contains("layer 2"));
    }
}
