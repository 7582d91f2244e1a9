//! Where the lower layers of a sandbox come from: the host, a directory, or an imported image.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::hostbase::{self, HostBaseError};

/// A base ready to be stacked upon.
#[derive(Debug)]
pub struct Base {
    /// Lower directories, topmost first, below the skeleton.
    pub lowers: Vec<OwnedFd>,
    /// Read-only mounts to attach inside.
    pub binds: Vec<(String, OwnedFd)>,
}

/// A directory of the host as it is, idmapped.
pub fn directory(path: &Path, id_map: &OwnedFd) -> Result<Base, HostBaseError> {
    if !path.is_absolute() || !path.is_dir() {
        return Err(HostBaseError::BadPath { path: path.to_owned(), why: "not a directory (give an absolute path)" });
    }
    Ok(Base { lowers: vec![hostbase::idmapped(path, id_map)?], binds: Vec::new() })
}

/// An imported image: its tree is stored with the sandbox's ids already.
pub fn imported(tree: OwnedFd) -> io::Result<Base> {
    Ok(Base { lowers: vec![tree], binds: Vec::new() })
}
