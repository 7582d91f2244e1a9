//! Which layers somebody needs, and the removal of the others.
//!
//! Needed is what the chain of a live layer, of one that may become it, or of a checkpoint reaches. The layers that
//! were made for a sandbox are removed by its driver alone, so never while it makes one.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::api::{DiskReport, GcReport, Reply, TreeNode, TreeReport};
use super::driver::Message;
use super::{Engine, Error, lock};
use crate::deltafs::layer::{LayerId, Record};
use crate::deltafs::layers::Usage;
use crate::sandbox::SandboxId;

/// Layers by which a sandbox needs others: its live one, the next one, each checkpoint's topmost.
pub(super) type Tops = BTreeSet<LayerId>;

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
        self.remove_unneeded(|record| record.sandbox == *id)
    }

    fn remove_unneeded(&self, is_meant: impl Fn(&Record) -> bool) -> Result<GcReport, Error> {
        let layers = &self.0.layers;
        let io = |source| Error::Io { op: "clean up", path: self.0.store.layers(), source };
        let mut report = GcReport::default();
        let needed = self.needed(None)?;
        for id in layers.list().map_err(io)?.difference(&needed) {
            let Ok(record) = Record::load(&layers.path(*id)) else { continue };
            if is_meant(&record) {
                report.bytes += layers.scan_usage(*id).unwrap_or_default().bytes;
                report.n_layers += 1;
                layers.remove(*id).map_err(io)?;
            }
        }
        Ok(report)
    }

    /// All layers that sandboxes need, but for one of them.
    fn needed(&self, except: Option<&SandboxId>) -> Result<BTreeSet<LayerId>, Error> {
        let handles: Vec<_> = self.sandboxes().iter().map(|(id, handle)| (id.clone(), handle.clone())).collect();
        let mut needed = BTreeSet::new();
        for (_, handle) in handles.into_iter().filter(|(id, _)| Some(id) != except) {
            let tops = handle.shown.map(|shown| lock(&shown).tops.clone()).unwrap_or_default();
            self.add_chains(&tops, &mut needed)?;
        }
        Ok(needed)
    }

    fn add_chains(&self, tops: &Tops, needed: &mut BTreeSet<LayerId>) -> Result<(), Error> {
        for top in tops {
            let mut next = Some(*top);
            while let Some(id) = next {
                if !needed.insert(id) {
                    break;
                }
                // One that is gone or damaged needs nothing; its sandbox's checkpoints say so when they are used.
                next = Record::load(&self.0.layers.path(id)).ok().and_then(|record| record.parent);
            }
        }
        Ok(())
    }

    /// The checkpoints of a sandbox. Walks layers that were not walked before.
    pub fn tree(&self, id: &SandboxId) -> Result<TreeReport, Error> {
        let shown = self.shown(id)?;
        let (tree, head, live) = {
            let shown = lock(&shown);
            (Arc::clone(&shown.tree), shown.report.head.clone(), shown.live)
        };
        let others = self.needed(Some(id))?;
        let mut checkpoints = Vec::new();
        for one in tree.iter() {
            let chain = self.0.layers.chain(one.top).map_err(Error::Layer)?;
            // What other checkpoints of the same sandbox need.
            let mut needed = others.clone();
            let mut tops: Tops = tree.iter().filter(|other| other.id != one.id).filter_map(|other| other.top).collect();
            tops.insert(live);
            self.add_chains(&tops, &mut needed)?;
            let (mut own_bytes, mut shared_bytes) = (0, 0);
            for layer in &chain {
                let usage = self.0.layers.frozen_usage(*layer).unwrap_or_default();
                if needed.contains(layer) {
                    shared_bytes += usage.bytes;
                } else {
                    own_bytes += usage.bytes;
                }
            }
            checkpoints.push(TreeNode { checkpoint: one.report(id), n_layers: chain.len(), own_bytes, shared_bytes });
        }
        Ok(TreeReport { sandbox: id.clone(), head, checkpoints })
    }

    /// What the files of a sandbox take on disk. Walks its live layer, and others that were not walked before.
    pub fn disk(&self, id: &SandboxId) -> Result<DiskReport, Error> {
        let shown = self.shown(id)?;
        let (tops, live) = {
            let shown = lock(&shown);
            (shown.tops.clone(), shown.live)
        };
        let others = self.needed(Some(id))?;
        let mut mine = BTreeSet::new();
        self.add_chains(&tops, &mut mine)?;
        let live_bytes = self.0.layers.scan_usage(live).unwrap_or_default().bytes;
        let n_layers = self.0.layers.chain(Some(live)).map_err(Error::Layer)?.len() - 1;
        let (mut own_bytes, mut shared_bytes) = (live_bytes, 0);
        for layer in mine.into_iter().filter(|layer| *layer != live) {
            let Usage { bytes, .. } = self.0.layers.frozen_usage(layer).unwrap_or_default();
            if others.contains(&layer) {
                shared_bytes += bytes;
            } else {
                own_bytes += bytes;
            }
        }
        Ok(DiskReport { live_bytes, own_bytes, shared_bytes, n_layers })
    }
}
