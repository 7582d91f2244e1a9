//! What differs between the two entries of a pair.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;

use super::content;
use super::pairs::Side;
use super::{Both, Change, DiffError, Pair, What, inside_path};
use crate::deltafs::view::{Entry, Kind};

/// A pair, opened; at least one of it.
pub(super) struct Opened {
    pub(super) old: Option<Entry>,
    pub(super) new: Option<Entry>,
}

impl Opened {
    /// `None` if all of it has vanished.
    pub(super) fn open(from: &Side<'_>, to: &Side<'_>, pair: &Pair) -> Result<Option<Self>, DiffError> {
        let old = pair.old.as_ref().map(|path| from.open(path)).transpose()?.flatten();
        let new = pair.new.as_ref().map(|path| to.open(path)).transpose()?.flatten();
        Ok((old.is_some() || new.is_some()).then_some(Self { old, new }))
    }

    /// `None` if nothing differs.
    pub(super) fn compare(&self, pair: &Pair) -> io::Result<Option<Change>> {
        let change = |what, entry: &Entry| Change {
            path: inside_path(pair.shown()),
            change: what,
            kind: entry.kind,
            was: None,
            from: None,
            content: false,
            old_size_bytes: None,
            new_size_bytes: None,
            mode: None,
            owner: None,
            xattrs: Vec::new(),
            target: None,
            patch: None,
        };
        let (old, new) = match (&self.old, &self.new) {
            (None, None) => return Ok(None),
            (Some(old), None) => {
                let path = inside_path(pair.old.as_deref().unwrap_or(pair.shown()));
                return Ok(Some(Change { path, old_size_bytes: size(old), ..change(What::Deleted, old) }));
            }
            (None, Some(new)) => {
                return Ok(Some(Change { new_size_bytes: size(new), ..change(What::Added, new) }));
            }
            (Some(old), Some(new)) => (old, new),
        };
        let from = pair.is_renamed.then(|| pair.old.as_deref().map(inside_path)).flatten();
        if old.kind != new.kind {
            return Ok(Some(Change {
                was: Some(old.kind),
                from,
                old_size_bytes: size(old),
                new_size_bytes: size(new),
                ..change(What::TypeChanged, new)
            }));
        }
        let what = if pair.is_renamed { What::Renamed } else { What::Modified };
        let mut found = Change { from, ..change(what, new) };
        if old.identity != new.identity {
            attributes(old, new, &mut found)?;
        }
        let differs = found.content
            || found.mode.is_some()
            || found.owner.is_some()
            || found.target.is_some()
            || !found.xattrs.is_empty();
        Ok((pair.is_renamed || differs).then_some(found))
    }
}

fn size(entry: &Entry) -> Option<u64> {
    (entry.kind == Kind::File).then_some(entry.size)
}

fn attributes(old: &Entry, new: &Entry, found: &mut Change) -> io::Result<()> {
    found.content = match old.kind {
        Kind::File => !content::is_same(old, new)?,
        Kind::CharDevice | Kind::BlockDevice => old.rdev != new.rdev,
        Kind::Directory | Kind::Symlink | Kind::Fifo | Kind::Socket => false,
    };
    if found.content {
        (found.old_size_bytes, found.new_size_bytes) = (size(old), size(new));
    }
    found.mode = both(old.mode, new.mode, |mode| format!("{mode:04o}"));
    found.owner = both((old.uid, old.gid), (new.uid, new.gid), |(uid, gid)| format!("{uid}:{gid}"));
    let target = |target: Option<OsString>| target.map(|target| target.to_string_lossy().into_owned());
    found.target = both(old.target()?, new.target()?, |one| target(one).unwrap_or_default());
    let (old, new) = (old.xattrs()?, new.xattrs()?);
    let names: BTreeSet<_> = old.keys().chain(new.keys()).filter(|name| old.get(*name) != new.get(*name)).collect();
    found.xattrs = names.into_iter().map(|name| name.to_string_lossy().into_owned()).collect();
    Ok(())
}

fn both<T: PartialEq>(from: T, to: T, text: impl Fn(T) -> String) -> Option<Both<String>> {
    (from != to).then(|| Both { from: text(from), to: text(to) })
}
