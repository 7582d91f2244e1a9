//! The root that the next rollback will want, made and mounted while nobody waits for it.
//!
//! ```text
//! checkpoint, rollback: answered -> janitor: a layer and its mount over the head's stack, kept here
//! rollback: the head's stack, unchanged? -> its record, its name among the layers, announced in sandbox.json -> switch
//! ```
//! To make files and directories is most of what a rollback does before the stop, a layer and its mount take twelve; a file
//! system that looks long for a free inode takes milliseconds for them. It is made for the head, to which most rollbacks
//! lead: each of several attempts from one checkpoint. A sandbox that is not rolled back has none, and one that has made
//! three of them for nothing gets no other one before its next rollback.
//!
//! Until it is used it lies in `spares/N` of the store and is no layer: an engine that dies leaves a directory that the next
//! one removes ([`sweep`]). Then it is `layers/N`; the kernel goes on to show the mount's `upperdir` by the name it had
//! when it was mounted, so the number is the same.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::Driver;
use crate::deltafs::layer::{LayerId, LiveLayer, RootLook};
use crate::deltafs::layers::{SpareLayer, Stack};
use crate::deltafs::remove::remove_tree;
use crate::engine::footing::Footing;
use crate::engine::{Engine, lock};
use crate::sandbox::SandboxId;

/// So many may be made for nothing in a row (chosen).
const MOST_WASTED: u32 = 3;

/// One sandbox's.
#[derive(Debug)]
pub(super) struct Spares {
    slot: Arc<Mutex<Slot>>,
    n_wasted: u32,
}

#[derive(Debug, Default)]
struct Slot {
    /// Which one is wanted: an earlier one that comes late is not.
    number: u64,
    root: Option<SpareRoot>,
}

/// A mounted root that nobody uses yet. The mount goes before its layer.
#[derive(Debug)]
pub(super) struct SpareRoot {
    mount: OwnedFd,
    layer: SpareLayer,
    below: Vec<LayerId>,
    look: RootLook,
}

impl Default for Spares {
    fn default() -> Self {
        Self { slot: Arc::default(), n_wasted: MOST_WASTED }
    }
}

impl Spares {
    /// The one for a rollback to this stack, whose root is to look so, if it is ready.
    pub(super) fn take(&mut self, engine: &Engine, below: &Stack, look: &RootLook) -> Option<SpareRoot> {
        let root = self.empty()?;
        // A layer that is there now was there all the time: numbers are given once.
        if root.below == below.dirs() && root.look == *look {
            return Some(root);
        }
        engine.0.janitor.try_take(move || drop(root));
        None
    }

    /// It is of no use any more.
    pub(super) fn discard(&mut self, engine: &Engine) {
        if let Some(root) = self.empty() {
            self.n_wasted += 1;
            engine.0.janitor.try_take(move || drop(root));
        }
    }

    /// A rollback has taken place: there may be another one.
    pub(super) fn encourage(&mut self) {
        self.n_wasted = 0;
    }

    fn empty(&self) -> Option<SpareRoot> {
        let mut slot = lock(&self.slot);
        slot.number += 1;
        slot.root.take()
    }
}

impl SpareRoot {
    fn make(engine: &Engine, sandbox: &SandboxId, footing: &Footing, order: Order) -> io::Result<Self> {
        let Order { top, look } = order;
        let layers = &engine.0.layers;
        let below = layers.known_stack(top).map_err(io::Error::other)?;
        let layer = layers.spare(&engine.0.store.spares(), sandbox, look.clone())?;
        let live = layer.layer().ok_or(io::ErrorKind::NotFound)?;
        let mount = footing.mount(engine, &below, live)?;
        Ok(Self { mount, layer, below: below.dirs(), look })
    }

    /// Makes it the root of a layer: the layer, and its mount.
    pub(super) fn settle(
        self,
        engine: &Engine,
        below: &Stack,
        head: Option<String>,
    ) -> io::Result<(LiveLayer, OwnedFd)> {
        Ok((engine.0.layers.use_spare(self.layer, below, head)?, self.mount))
    }
}

/// What root is wanted.
struct Order {
    top: Option<LayerId>,
    look: RootLook,
}

impl Driver {
    /// Has a root made for a rollback to the head. An operation has been answered.
    pub(super) fn prepare_spare(&mut self) {
        self.spares.discard(&self.engine);
        if self.spares.n_wasted >= MOST_WASTED || self.torn.is_some() || self.life.is_none() {
            return;
        }
        let Some(head) = self.manifest.head.and_then(|head| self.tree.get(head)) else { return };
        let Some(footing) = self.footing.clone() else { return };
        let order = Order { top: head.top, look: head.root.clone() };
        let (engine, slot, number) = (self.engine.clone(), self.spares.slot.clone(), lock(&self.spares.slot).number);
        let id = self.manifest.id.clone();
        self.engine.0.janitor.try_take(move || match SpareRoot::make(&engine, &id, &footing, order) {
            Ok(root) => {
                let mut slot = lock(&slot);
                if slot.number == number {
                    slot.root = Some(root);
                }
            }
            // What fails here fails again when it is needed, and is told then.
            Err(error) => tracing::debug!(sandbox = %id, %error, "no root is ready for the next rollback"),
        });
    }
}

/// Removes what an engine that died has left of them in the store's directory for them.
///
/// # Errors
/// Something stays.
pub(in crate::engine) fn sweep(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        remove_tree(&entry?.path())?;
    }
    Ok(())
}
