//! What a sandbox's layers lie on: the skeleton and its base. And the mount of a whole stack.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::{Engine, Error, error, lock};
use crate::deltafs::hostbase::{self, HostBase};
use crate::deltafs::layer::{LayerId, LiveLayer, open_dir};
use crate::deltafs::layers::{Stack, StackError};
use crate::deltafs::overlay;
use crate::sandbox::BaseRef;
use crate::sys::mount::{self, Clone as CloneWhat};

/// A base that is mounted, ready to be stacked upon.
#[derive(Debug)]
pub(super) struct Footing {
    /// Keeps a host base mounted.
    host: Option<Arc<HostBase>>,
    tree: OwnedFd,
}

impl Footing {
    /// For a new sandbox.
    pub(super) fn new(engine: &Engine, base: &BaseRef) -> Result<Self, Error> {
        let refused = |error| error::base_refused(&base.to_string(), error);
        match base {
            BaseRef::Host { with } => Self::on_host(engine.host_base(with)?),
            BaseRef::Dir { path } => {
                let tree = hostbase::directory(path, &engine.0.id_map).map_err(refused)?;
                Ok(Self { host: None, tree })
            }
            BaseRef::Image { name } => Ok(Self { host: None, tree: engine.0.images.tree(name)? }),
        }
    }

    /// For one that was made on the frame `digest`, if on a frame: the host may look different by now.
    pub(super) fn again(engine: &Engine, base: &BaseRef, digest: Option<&str>) -> Result<Self, Error> {
        let Some(digest) = digest else { return Self::new(engine, base) };
        let known = lock(&engine.0.host_bases).values().find(|host| host.digest == digest).cloned();
        match known {
            Some(host) => Self::on_host(host),
            None => {
                let host = HostBase::mount(&engine.0.store.frames(), digest, &engine.0.id_map);
                Self::on_host(Arc::new(host.map_err(|error| error::base_refused("host", error))?))
            }
        }
    }

    fn on_host(host: Arc<HostBase>) -> Result<Self, Error> {
        let tree = host.tree.try_clone();
        let tree =
            tree.map_err(|source| Error::Io { op: "copy the descriptor of", path: "the host base".into(), source })?;
        Ok(Self { host: Some(host), tree })
    }

    /// Digest of the frame, for a host base.
    pub(super) fn frame(&self) -> Option<String> {
        self.host.as_ref().map(|host| host.digest.clone())
    }

    /// Mounts of the host that are attached inside, for one sandbox: a mount can be attached once, so these are clones.
    pub(super) fn binds(&self) -> Result<Vec<(String, OwnedFd)>, Error> {
        let clone = |(path, mount): &(String, OwnedFd)| {
            let copy = mount::open_tree_clone(mount.as_fd(), c"", CloneWhat::One);
            let failed = |source| Error::Io { op: "clone the mount of", path: PathBuf::from(path), source };
            Ok((path.clone(), copy.map_err(failed)?))
        };
        self.host.iter().flat_map(|host| &host.binds).map(clone).collect()
    }

    /// What all layers lie on, the topmost first.
    pub(super) fn lowers<'a>(&'a self, engine: &'a Engine) -> [BorrowedFd<'a>; 2] {
        [engine.0.fixtures.skeleton().as_fd(), self.tree.as_fd()]
    }

    /// Mounts a stack, detached: `live` over `frozen` over the skeleton and the base.
    pub(super) fn mount(&self, engine: &Engine, frozen: &Stack, live: &LiveLayer) -> io::Result<OwnedFd> {
        let damaged = |id| move |source| io::Error::other(StackError { id, source });
        let open = |id: LayerId| open_dir(&engine.0.layers.upper(id)).map_err(damaged(id));
        let frozen = frozen.dirs().into_iter().map(open).collect::<io::Result<Vec<_>>>()?;
        let mut lowers: Vec<_> = frozen.iter().map(AsFd::as_fd).collect();
        lowers.extend(self.lowers(engine));
        overlay::mount_stack(&lowers, Some(live.top())).map_err(io::Error::other)
    }
}
