//! A layer made ahead: its directories are there, and nobody has been told of it.
//!
//! ```text
//! DIR/N/upper, DIR/N/work  empty; whose directory DIR is removes what a crash has left
//! layers/N                 once it is used: its record is in it before the rename
//! ```

use std::io;
use std::path::{Path, PathBuf};

use super::{Layers, Stack};
use crate::deltafs::layer::{LiveLayer, Record, RootLook};
use crate::deltafs::remove::remove_tree;
use crate::sandbox::SandboxId;

/// A layer that nobody uses yet. Dropped, it is removed.
#[derive(Debug)]
pub struct SpareLayer {
    path: PathBuf,
    /// `None` once it is used.
    layer: Option<LiveLayer>,
}

impl Layers {
    /// Makes one whose root looks so, in a directory of `above`, which is on the layers' file system.
    pub fn spare(&self, above: &Path, sandbox: &SandboxId, root: RootLook) -> io::Result<SpareLayer> {
        let id = self.next_id();
        let path = above.join(id.to_string());
        let mut spare = SpareLayer { path, layer: None };
        match LiveLayer::prepare(&spare.path, Record::new(id, sandbox.clone(), root)) {
            Ok(layer) => spare.layer = Some(layer),
            Err(error) => {
                // The first failure is the one to report.
                let _ = remove_tree(&spare.path);
                return Err(error);
            }
        }
        Ok(spare)
    }

    /// Makes it a layer above a stack, as [`Layers::create`] does.
    pub fn use_spare(&self, mut spare: SpareLayer, below: &Stack, head: Option<String>) -> io::Result<LiveLayer> {
        let Some(layer) = &mut spare.layer else { return Err(io::ErrorKind::NotFound.into()) };
        layer.settle(&spare.path, below.top(), below.depth(), below.dirs(), head)?;
        let id = layer.record().id;
        std::fs::rename(&spare.path, self.path(id))?;
        // As after a failure of `create` nothing is left.
        crate::fault::point("layers.spare").inspect_err(|_| drop(self.remove(id)))?;
        spare.layer.take().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl SpareLayer {
    /// To be mounted; `None` once it is used.
    pub fn layer(&self) -> Option<&LiveLayer> {
        self.layer.as_ref()
    }
}

impl Drop for SpareLayer {
    fn drop(&mut self) {
        if self.layer.take().is_some()
            && let Err(error) = remove_tree(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(path = %self.path.display(), %error, "a layer of no use stays until the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_layer_is_none_until_it_is_used_and_goes_if_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (store, above) = (dir.path().join("layers"), dir.path().join("box"));
        std::fs::create_dir(&above).unwrap();
        let layers = Layers::open(&store).unwrap();
        let name = "a".parse().unwrap();
        let first = layers.create(&Stack::default(), &name, None, RootLook::first()).unwrap().record().id;
        let below = layers.stack(Some(first)).unwrap();
        let spare = layers.spare(&above, &name, RootLook::first()).unwrap();
        let unused = layers.spare(&above, &name, RootLook::first()).unwrap();
        assert_eq!(layers.list().unwrap().len(), 1);
        let used = layers.use_spare(spare, &below, Some("c1".to_owned())).unwrap();
        assert!(used.is_unchanged().unwrap());
        let id = used.record().id;
        assert_eq!(layers.load(id).unwrap().record(), used.record());
        assert_eq!((used.record().parent, used.record().head.as_deref()), (Some(first), Some("c1")));
        assert_eq!(layers.stack(Some(id)).unwrap().dirs(), [id, first]);
        assert_eq!(std::fs::read_dir(&above).unwrap().count(), 1);
        drop(unused);
        assert_eq!(std::fs::read_dir(&above).unwrap().count(), 0);
    }
}
