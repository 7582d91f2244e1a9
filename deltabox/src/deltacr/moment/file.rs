//! A moment on disk, for the next engine: its records, and where its templates are.
//!
//! ```text
//! | "DBXMOMNT" | version u32 | length u64 | CRC-32 of the records u32 | records (postcard) |     little endian
//! ```
//! Records are this version's structs in their order; another version's file is not read. It outlives the engine, not the
//! machine: templates do not.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Identity, Moment, Past, Zombie};
use crate::deltacr::descriptors::Held;
use crate::deltacr::shared::SharedMemory;
use crate::deltacr::state::Person;
use crate::deltacr::template::{Freezer, Memory, Template, Threads};

const MAGIC: &[u8; 8] = b"DBXMOMNT";
/// Raised when a record changes.
const VERSION: u32 = 5;
const HEADER_BYTES: usize = 24;

#[derive(Serialize, Deserialize)]
struct Written {
    held: Held,
    shared: SharedMemory,
    tree: u64,
    processes: Vec<WrittenPast>,
    zombies: Vec<Zombie>,
}

#[derive(Serialize, Deserialize)]
struct WrittenPast {
    identity: Identity,
    /// Name of its template's cgroup.
    template: String,
    memory: Memory,
    threads: Threads,
    person: Person,
    is_stopped: bool,
}

/// A moment that cannot be come back to.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("read it: {0}")]
    Read(#[from] io::Error),
    /// It is not whole, or not of this version.
    #[error("it is damaged or of another version")]
    Damaged,
    /// A template is not there any more.
    #[error("the template of process {inside} (inside) is gone")]
    Lost {
        /// Its PID inside.
        inside: libc::pid_t,
    },
}

impl Moment {
    /// Puts its file in place.
    ///
    /// # Errors
    /// There is none, or the one that was there before.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let past = |past: &Past| WrittenPast {
            identity: past.identity,
            template: name_of(&past.template),
            memory: past.memory.clone(),
            threads: past.threads.clone(),
            person: past.person.clone(),
            is_stopped: past.is_stopped,
        };
        let written = Written {
            held: self.held.clone(),
            shared: self.shared.clone(),
            tree: self.tree,
            processes: self.processes.iter().map(past).collect(),
            zombies: self.zombies.clone(),
        };
        let records = postcard::to_stdvec(&written).map_err(io::Error::other)?;
        let staging = path.with_extension("processes.new");
        fs::write(&staging, wrap(&records))?;
        crate::fault::point("moment.save")?;
        fs::rename(&staging, path)
    }

    /// Reads the file, and finds the templates in the groups below `group`, or among those `found` before.
    ///
    /// # Errors
    /// There is no way back to it.
    pub fn load(path: &Path, group: &Path, found: &mut FoundTemplates) -> Result<Self, FileError> {
        let bytes = fs::read(path)?;
        let Written { held, shared, tree, processes, zombies } =
            unwrap(&bytes).and_then(|records| postcard::from_bytes(records).ok()).ok_or(FileError::Damaged)?;
        let find = |past: WrittenPast| {
            let WrittenPast { identity, template, memory, threads, person, is_stopped } = past;
            let lost = FileError::Lost { inside: identity.inside };
            let template = found.find(group, template).ok_or(lost)?;
            Ok(Past { identity, template, memory, threads, person, is_stopped })
        };
        let processes = processes.into_iter().map(find).collect::<Result<_, FileError>>()?;
        Ok(Self { held, processes, zombies, shared, tree })
    }

    /// Names of its templates' cgroups.
    pub fn template_names(&self) -> impl Iterator<Item = String> {
        self.processes.iter().map(|past| name_of(&past.template))
    }
}

/// Templates that were found again, by the names of their cgroups: several moments may have one.
#[derive(Debug, Default)]
pub struct FoundTemplates(BTreeMap<String, Arc<Template>>);

impl FoundTemplates {
    fn find(&mut self, group: &Path, name: String) -> Option<Arc<Template>> {
        if let Some(template) = self.0.get(&name) {
            return Some(template.clone());
        }
        let found = Freezer::open(group.join(&name)).and_then(Template::find);
        let template = Arc::new(found.ok()?.ok()?);
        self.0.insert(name, template.clone());
        Some(template)
    }
}

fn name_of(template: &Template) -> String {
    template.freezer().path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn wrap(records: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((records.len() as u64).to_le_bytes());
    bytes.extend(crc32fast::hash(records).to_le_bytes());
    bytes.extend(records);
    bytes
}

fn unwrap(bytes: &[u8]) -> Option<&[u8]> {
    let (header, records) = bytes.split_at_checked(HEADER_BYTES)?;
    let version = u32::from_le_bytes(header[8..12].try_into().ok()?);
    let len = u64::from_le_bytes(header[12..20].try_into().ok()?);
    let sum = u32::from_le_bytes(header[20..24].try_into().ok()?);
    let is_whole = header.starts_with(MAGIC) && version == VERSION && len == records.len() as u64;
    (is_whole && crc32fast::hash(records) == sum).then_some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_damage_to_the_file_is_seen() {
        let bytes = wrap(b"some records");
        assert_eq!(unwrap(&bytes), Some(&b"some records"[..]));
        for len in 0..bytes.len() {
            assert_eq!(unwrap(&bytes[..len]), None, "cut at {len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unwrap(&damaged), None, "bit {bit}");
        }
        assert_eq!(unwrap(&[bytes, vec![0]].concat()), None, "longer");
    }
}
