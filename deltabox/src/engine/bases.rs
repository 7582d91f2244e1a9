//! Imported images, as far as sandboxes are concerned: who stands on which.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::MutexGuard;

use super::api::BaseReport;
use super::{Engine, Error, Handle, lock};
use crate::deltafs::imported::{BaseManifest, ImportError};
use crate::sandbox::{BaseRef, SandboxId};

impl Engine {
    /// Imports a directory or tar archive as a base (blocking, may take long).
    pub fn import_base(&self, name: &str, source: &Path) -> Result<BaseReport, Error> {
        Ok(report(self.0.images.import(name, source)?))
    }

    /// Imported bases, sorted by name (blocking reads).
    pub fn bases(&self) -> Result<Vec<BaseReport>, Error> {
        Ok(self.0.images.list()?.into_iter().map(report).collect())
    }

    /// Removes an imported base (blocking, walks its tree); refused while a sandbox stands on it.
    pub fn remove_base(&self, name: &str) -> Result<(), Error> {
        {
            let sandboxes = self.sandboxes();
            let user = sandboxes.iter().find(|(_, handle)| handle.image.as_deref() == Some(name));
            if let Some((id, _)) = user {
                return Err(Error::Refused {
                    what: format!("remove the image `{name}`"),
                    why: format!("sandbox `{id}` stands on it"),
                    hint: "remove its sandboxes first".to_owned(),
                });
            }
            lock(&self.0.leaving).insert(name.to_owned());
        }
        let removed = self.0.images.remove(name);
        let sandboxes = self.sandboxes();
        lock(&self.0.leaving).remove(name);
        drop(sandboxes);
        Ok(removed?)
    }

    /// The image that a new sandbox is to stand on. `sandboxes` is held until the sandbox is among them, so that no
    /// removal comes in between.
    pub(super) fn take_image(
        &self,
        base: &BaseRef,
        _sandboxes: &MutexGuard<'_, BTreeMap<SandboxId, Handle>>,
    ) -> Result<Option<String>, Error> {
        match base {
            BaseRef::Host { .. } | BaseRef::Dir { .. } => Ok(None),
            BaseRef::Image { name } if lock(&self.0.leaving).contains(name) => {
                Err(Error::NoBase { name: name.clone() })
            }
            BaseRef::Image { name } => Ok(Some(name.clone())),
        }
    }
}

fn report(manifest: BaseManifest) -> BaseReport {
    let BaseManifest { name, n_entries, len_bytes, imported_unix_ms, source, notes } = manifest;
    BaseReport { name, n_entries, len_bytes, imported_unix_ms, source, notes }
}

impl From<ImportError> for Error {
    fn from(error: ImportError) -> Self {
        let refused = |hint: &str| Self::Refused {
            what: "import an image".to_owned(),
            why: error.to_string(),
            hint: hint.to_owned(),
        };
        match error {
            ImportError::Name(error) => Self::Invalid { what: "name", why: error.to_string() },
            ImportError::Reserved { .. } => Self::Invalid { what: "name", why: error.to_string() },
            ImportError::Exists { name } => Self::Exists { what: "image", name },
            ImportError::NotFound { name } => Self::NoBase { name },
            ImportError::Source { .. } => refused("give a directory or a tar archive outside of the store"),
            ImportError::Archive { .. } | ImportError::Compression { .. } => {
                refused("the archive is damaged or cut short; fetch or make it again. Nothing of it was kept")
            }
            ImportError::Entry { .. } => refused("the archive was not made for this; nothing of it was kept"),
            ImportError::EntryIo { .. } => refused("see the entry named; nothing of the source was kept"),
            ImportError::Io { op, path, source } => Self::Io { op, path, source },
            ImportError::Manifest { .. } => Self::Refused {
                what: "read an image's manifest".to_owned(),
                why: error.to_string(),
                hint: "the store is damaged there; remove that image".to_owned(),
            },
        }
    }
}
