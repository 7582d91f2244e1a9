//! What differs between two states of a sandbox's files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::api::{DiffReport, DiffRequest};
use super::footing::Footing;
use super::manifest::Manifest;
use super::{Engine, Error, lock};
use crate::deltafs::diff::{self, Options, Stacks};
use crate::deltafs::layer::{LayerId, open_dir};
use crate::deltafs::layers::Fork;
use crate::sandbox::SandboxId;

/// How often layers may be removed under a reader before it gives up (chosen: a rollback in a loop).
const N_TRIES: usize = 3;

/// Two states.
struct States {
    layers: Fork,
    report: DiffReport,
}

impl Engine {
    /// Compares two states of a sandbox's files: reads the layers that they do not share. Not on a driver's thread, so
    /// the live state is no snapshot.
    pub fn diff(&self, id: &SandboxId, request: &DiffRequest) -> Result<DiffReport, Error> {
        for _ in 0..N_TRIES {
            let states = self.states(id, request)?;
            let changes = self.compare(id, &states, request);
            // Layers that a rollback or a removal has taken away meanwhile look empty.
            let Fork { from, to, common } = &states.layers;
            if [from, to, common].into_iter().flatten().all(|layer| self.0.layers.upper(*layer).is_dir()) {
                return Ok(DiffReport { changes: changes?, ..states.report });
            }
        }
        Err(Error::Refused {
            what: format!("compare files of `{id}`"),
            why: "its layers were removed again and again while they were read".to_owned(),
            hint: "try again while nobody rolls it back".to_owned(),
        })
    }

    fn states(&self, id: &SandboxId, request: &DiffRequest) -> Result<States, Error> {
        let shown = self.shown(id)?;
        let (tree, head, live) = {
            let shown = lock(&shown);
            (Arc::clone(&shown.tree), shown.report.head.clone(), shown.live)
        };
        let from = request.from.as_ref().or(head.as_ref()).map(|from| tree.find(id, from)).transpose()?;
        let to = request.to.as_ref().map(|to| tree.find(id, to)).transpose()?;
        let report = DiffReport {
            sandbox: id.clone(),
            from: from.map(|one| one.id.to_string()),
            to: to.map(|one| one.id.to_string()),
            changes: Vec::new(),
        };
        let layers = self.0.layers.fork(from.and_then(|one| one.top), to.map_or(Some(live), |one| one.top));
        Ok(States { layers: layers.map_err(Error::Layer)?, report })
    }

    fn compare(&self, id: &SandboxId, states: &States, request: &DiffRequest) -> Result<Vec<diff::Change>, Error> {
        let io = |op, path: PathBuf| move |source| Error::Io { op, path, source };
        let dir = self.0.store.sandbox(id);
        let manifest = Manifest::load(dir.path()).map_err(io("read the manifest in", dir.path().to_owned()))?;
        let footing = Footing::again(self, &manifest.spec.base, manifest.frame.as_deref())?;
        let open = |layers: &[LayerId]| -> Result<Vec<OwnedFd>, Error> {
            let open = |layer: &LayerId| {
                let path = self.0.layers.upper(*layer);
                open_dir(&path).map_err(io("open", path))
            };
            layers.iter().map(open).collect()
        };
        let Fork { from, to, common } = &states.layers;
        let (from, to, common) = (open(from)?, open(to)?, open(common)?);
        let lowers = footing.lowers(self);
        let stacks = Stacks { from: &fds(&from), to: &fds(&to), common: &[fds(&common), lowers.to_vec()].concat() };
        let options = Options { contents: request.contents, patch: request.patch };
        diff::diff(&stacks, options).map_err(|error| {
            let path = PathBuf::from("/").join(&error.path);
            Error::Io { op: "compare", path, source: error.source }
        })
    }
}

fn fds(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}
