//! A merged layer that is being made: nobody's until it is published.
//!
//! ```text
//! layers/.merging-N/upper      being filled
//! layers/.merging-N/layer.json when it is full
//! layers/N                     renamed: from here on it stands for its run
//! ```
//! A crash leaves `.merging-N`, which the next engine removes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use super::stack::Step;
use super::{LayerId, Layers, MERGING, Merged, Record, RootLook, lock};
use crate::deltafs::layer::open_dir;
use crate::deltafs::remove::remove_tree;
use crate::deltafs::sync::{sync_dir, sync_tree};
use crate::sandbox::SandboxId;

/// Being filled. Removed when dropped.
#[derive(Debug)]
pub struct Draft {
    staging: Staging,
    upper: OwnedFd,
    record: Record,
    merged: Merged,
}

/// Full, its record written. Removed when dropped.
#[derive(Debug)]
pub struct FullDraft {
    staging: Staging,
    id: LayerId,
    merged: Merged,
    synced: bool,
}

#[derive(Debug)]
struct Staging {
    path: PathBuf,
    published: bool,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = remove_tree(&self.path)
        {
            tracing::error!(path = %self.path.display(), %error, "what was left of a merge remains until the next start");
        }
    }
}

impl Layers {
    /// An empty one for `run`, consecutive steps of a stack, the topmost first.
    pub fn draft(&self, run: &[Step], sandbox: &SandboxId) -> io::Result<Draft> {
        let (Some(merged), Some(lowest)) = (Merged::of(run), run.last()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let id = self.next_id();
        let staging = Staging { path: self.dir.join(format!("{MERGING}{id}")), published: false };
        fs::create_dir(&staging.path)?;
        let upper = staging.path.join("upper");
        fs::create_dir(&upper)?;
        let upper = open_dir(&upper)?;
        let mut record = Record::new(id, sandbox.clone(), RootLook::of(upper.as_fd())?);
        record.parent = lowest.parent;
        record.depth = lowest.depth;
        record.merged = Some(merged);
        Ok(Draft { staging, upper, record, merged })
    }

    /// Puts it in its place: stacks that are asked for from now on have it. `durable`: it is on disk before that, or a
    /// power failure could leave half a layer where whole ones were.
    pub fn publish(&self, mut draft: FullDraft, durable: bool) -> io::Result<LayerId> {
        if durable {
            draft.sync()?;
        }
        let (id, merged) = (draft.id, draft.merged);
        crate::fault::point("merge.publish")?;
        fs::rename(&draft.staging.path, self.path(id))?;
        draft.staging.published = true;
        if draft.synced {
            sync_dir(&self.dir)?;
            lock(&self.synced).insert(id);
        }
        lock(&self.index).add_merged(id, merged);
        Ok(id)
    }
}

impl Draft {
    /// Where its content goes.
    pub fn upper(&self) -> BorrowedFd<'_> {
        self.upper.as_fd()
    }

    /// Nothing more comes.
    pub fn finish(mut self) -> io::Result<FullDraft> {
        self.record.root = RootLook::of(self.upper.as_fd())?;
        crate::fault::point("merge.finish")?;
        self.record.save(&self.staging.path)?;
        Ok(FullDraft { staging: self.staging, id: self.record.id, merged: self.merged, synced: false })
    }
}

impl FullDraft {
    /// Writes it to disk for good, its name excepted.
    pub fn sync(&mut self) -> io::Result<()> {
        if !self.synced {
            sync_tree(&self.staging.path)?;
            self.synced = true;
        }
        Ok(())
    }
}
