//! What of an entry's metadata a base keeps, and in which form: pure rules, no I/O.
//!
//! A base is stored *shifted*: id N of the image is id `SHIFT + N` on disk, as uppers are. So a sandbox mounts it
//! without an idmapped mount, which a store on an overlay could not have.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

/// Host id of the sandbox's root. Every sandbox maps 0..65536 to SHIFT..SHIFT + 65536.
pub(super) const SHIFT: u32 = 100_000;
const N_IDS: u32 = 65_536;
/// Where ids go that no sandbox has: 65534 inside, the kernel's own overflow id.
const NOBODY: u32 = SHIFT + 65_534;

/// Seconds and nanoseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mtime {
    pub(super) secs: i64,
    pub(super) nanos: u32,
}

/// An extended attribute as the source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Xattr {
    pub(super) name: Vec<u8>,
    pub(super) value: Vec<u8>,
}

/// The metadata of one entry as the source has it.
#[derive(Clone, Debug, Default)]
pub(super) struct Meta {
    /// Permission bits, 0o7777 at most.
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: Mtime,
    pub(super) xattrs: Vec<Xattr>,
}

/// Something that could not be kept as it was. One kind each, so that notes stay few however many entries there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Note {
    IdOutOfRange,
    SocketSkipped,
    WhiteoutNodeSkipped,
    WhiteoutMarkerSkipped,
    VolumeLabelSkipped,
    MountPoint,
    TrustedXattr,
    OverlayXattr,
    SecurityXattr,
    BadCapability,
    AclDropped,
    OtherXattr,
    XattrUnsupported,
}

impl Note {
    fn text(self) -> &'static str {
        match self {
            Self::IdOutOfRange => "owned by an id above 65535: now 65534 (nobody)",
            Self::SocketSkipped => "sockets skipped",
            Self::WhiteoutNodeSkipped => "overlay whiteouts (character device 0:0) skipped",
            Self::WhiteoutMarkerSkipped => "aufs markers (.wh..wh.*) skipped",
            Self::VolumeLabelSkipped => "volume labels skipped",
            Self::MountPoint => "other mounts not entered (a directory is left empty, a file skipped)",
            Self::TrustedXattr => "trusted.* attributes dropped",
            Self::OverlayXattr => "user.overlay.* attributes dropped",
            Self::SecurityXattr => "security.* attributes other than capabilities dropped",
            Self::BadCapability => "file capabilities dropped: unknown format or a root above 65535",
            Self::AclDropped => "access control lists dropped: not in the kernel's binary form, or ids above 65535",
            Self::OtherXattr => "attributes outside user.* and security.capability dropped",
            Self::XattrUnsupported => "attributes dropped: the store's file system, or the file's type, takes none",
        }
    }
}

/// Notes counted by kind, each with its first entry: bounded, whatever the source holds.
#[derive(Debug, Default)]
pub(super) struct Notes(BTreeMap<Note, (u64, PathBuf)>);

impl Notes {
    pub(super) fn add(&mut self, note: Note, entry: &Path) {
        self.0.entry(note).or_insert_with(|| (0, entry.to_owned())).0 += 1;
    }

    /// One sentence per kind.
    pub(super) fn sentences(&self) -> Vec<String> {
        let sentence = |(note, (n, first)): (&Note, &(u64, PathBuf))| {
            format!("{n} x {} (first: {})", note.text(), first.display())
        };
        self.0.iter().map(sentence).collect()
    }
}

/// The id on disk of `id` in the image; `None` if no sandbox has such an id.
fn shift(id: u64) -> Option<u32> {
    u32::try_from(id).ok().filter(|id| *id < N_IDS).map(|id| id + SHIFT)
}

/// The owner and group on disk.
pub(super) fn shifted_owner(meta: &Meta, entry: &Path, notes: &mut Notes) -> (u32, u32) {
    let (uid, gid) = (shift(meta.uid), shift(meta.gid));
    if uid.is_none() || gid.is_none() {
        notes.add(Note::IdOutOfRange, entry);
    }
    (uid.unwrap_or(NOBODY), gid.unwrap_or(NOBODY))
}

pub(super) const ACL_ACCESS: &CStr = c"system.posix_acl_access";
pub(super) const ACL_DEFAULT: &CStr = c"system.posix_acl_default";

/// The attribute as it is to be set on disk, or why it is not.
///
/// `trusted.overlay.*` above all must not pass: it would steer the sandbox's overlay (redirect to other paths of the
/// layer, hide directories, take a file's content from elsewhere).
pub(super) fn stored_xattr(xattr: &Xattr) -> Result<(CString, Vec<u8>), Note> {
    let name = CString::new(xattr.name.clone()).map_err(|_| Note::OtherXattr)?;
    let value = match xattr.name.as_slice() {
        b"security.capability" => shifted_capability(&xattr.value).ok_or(Note::BadCapability)?,
        b"system.posix_acl_access" | b"system.posix_acl_default" => {
            shifted_acl(&xattr.value).ok_or(Note::AclDropped)?
        }
        name if name.starts_with(b"user.overlay.") => return Err(Note::OverlayXattr),
        name if name.starts_with(b"user.") => xattr.value.clone(),
        name if name.starts_with(b"trusted.") => return Err(Note::TrustedXattr),
        name if name.starts_with(b"security.") => return Err(Note::SecurityXattr),
        _ => return Err(Note::OtherXattr),
    };
    Ok((name, value))
}

fn le_u32(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk::<4>().map(|four| u32::from_le_bytes(*four))
}

/// A file capability as revision 3, whose root is the sandbox's: revision 2 on disk would mean the host's root, and
/// the kernel ignores it inside a user namespace. Layout: `struct vfs_ns_cap_data` in `linux/capability.h`.
fn shifted_capability(value: &[u8]) -> Option<Vec<u8>> {
    const REVISION: u32 = 0xff00_0000;
    let magic = le_u32(value)?;
    let (sets, root) = match (magic & REVISION, value.len()) {
        (0x0200_0000, 20) => (&value[4..20], 0),
        (0x0300_0000, 24) => (&value[4..20], le_u32(&value[20..])?),
        _ => return None,
    };
    let root = shift(root.into())?;
    let mut shifted = (magic & !REVISION | 0x0300_0000).to_le_bytes().to_vec();
    shifted.extend_from_slice(sets);
    shifted.extend_from_slice(&root.to_le_bytes());
    Some(shifted)
}

/// A POSIX access control list with its users and groups shifted. Layout: `linux/posix_acl_xattr.h`.
fn shifted_acl(value: &[u8]) -> Option<Vec<u8>> {
    const VERSION: u32 = 2;
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let (version, entries) = value.split_first_chunk::<4>()?;
    let (entries, []) = entries.as_chunks::<8>() else { return None };
    if u32::from_le_bytes(*version) != VERSION {
        return None;
    }
    let mut shifted = version.to_vec();
    for entry in entries {
        shifted.extend_from_slice(&entry[..4]);
        let id = le_u32(&entry[4..])?;
        let id = if matches!(u16::from_le_bytes([entry[0], entry[1]]), USER | GROUP) { shift(id.into())? } else { id };
        shifted.extend_from_slice(&id.to_le_bytes());
    }
    Some(shifted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str, value: &[u8]) -> Result<Vec<u8>, Note> {
        stored_xattr(&Xattr { name: name.into(), value: value.to_vec() }).map(|(_, value)| value)
    }

    #[test]
    fn attributes_that_steer_overlayfs_or_belong_to_the_host_never_pass() {
        assert_eq!(stored("user.mime", b"x"), Ok(b"x".to_vec()));
        assert_eq!(stored("trusted.overlay.redirect", b"/etc"), Err(Note::TrustedXattr));
        assert_eq!(stored("trusted.x", b""), Err(Note::TrustedXattr));
        assert_eq!(stored("user.overlay.opaque", b"y"), Err(Note::OverlayXattr));
        assert_eq!(stored("security.selinux", b"u:r"), Err(Note::SecurityXattr));
        assert_eq!(stored("com.apple.quarantine", b""), Err(Note::OtherXattr));
        assert_eq!(stored("user.a\0b", b""), Err(Note::OtherXattr));
    }

    #[test]
    fn a_capability_becomes_revision_3_rooted_in_the_sandbox() {
        let sets = [7_u8; 16];
        let v2 = [&0x0200_0001_u32.to_le_bytes()[..], &sets].concat();
        let v3 = |root: u32| [&0x0300_0001_u32.to_le_bytes()[..], &sets, &root.to_le_bytes()].concat();
        assert_eq!(stored("security.capability", &v2), Ok(v3(100_000)));
        assert_eq!(stored("security.capability", &v3(0)), Ok(v3(100_000)));
        assert_eq!(stored("security.capability", &v3(1000)), Ok(v3(101_000)));
        assert_eq!(stored("security.capability", &v3(70_000)), Err(Note::BadCapability));
        for cut in 0..v2.len() {
            assert_eq!(stored("security.capability", &v2[..cut]), Err(Note::BadCapability), "{cut} bytes");
        }
    }

    #[test]
    fn an_acl_names_shifted_users_and_groups() {
        let acl = |id: u32| {
            let mut bytes = 2_u32.to_le_bytes().to_vec();
            for (tag, id) in [(1_u16, u32::MAX), (2, id), (4, u32::MAX), (8, id), (0x10, u32::MAX), (0x20, u32::MAX)] {
                bytes.extend_from_slice(&tag.to_le_bytes());
                bytes.extend_from_slice(&6_u16.to_le_bytes());
                bytes.extend_from_slice(&id.to_le_bytes());
            }
            bytes
        };
        assert_eq!(stored("system.posix_acl_access", &acl(1000)), Ok(acl(101_000)));
        assert_eq!(stored("system.posix_acl_default", &acl(65_536)), Err(Note::AclDropped));
        assert_eq!(stored("system.posix_acl_access", &acl(1)[..13]), Err(Note::AclDropped));
    }

    #[test]
    fn an_id_no_sandbox_has_becomes_nobody_with_a_note() {
        let mut notes = Notes::default();
        let owner =
            |uid, gid, notes: &mut Notes| shifted_owner(&Meta { uid, gid, ..Meta::default() }, Path::new("f"), notes);
        assert_eq!(owner(0, 65_535, &mut notes), (100_000, 165_535));
        assert!(notes.sentences().is_empty());
        assert_eq!(owner(65_536, u64::MAX, &mut notes), (165_534, 165_534));
        assert_eq!(notes.sentences().len(), 1);
    }
}
