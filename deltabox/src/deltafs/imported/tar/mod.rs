//! A tar archive as the source of a base, with the whiteout markers of OCI layers.

mod archive;
mod header;
mod pax;
mod sparse;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use self::archive::{Archive, Entry, Kind};
use self::sparse::SparseMap;
use super::ImportError;
use super::beneath::TreePath;
use super::meta::Note;
use super::writer::TreeWriter;

/// Writes every entry of the archive, then reads it to its end.
pub(super) fn write_archive(input: impl Read, writer: &mut TreeWriter) -> Result<(), ImportError> {
    let mut archive = Archive::new(input);
    let mut is_empty = true;
    while let Some(entry) = archive.next_entry()? {
        write_entry(&mut archive, entry, writer)?;
        is_empty = false;
    }
    if is_empty { Err(archive.damaged("it holds no entry")) } else { Ok(()) }
}

fn write_entry(archive: &mut Archive<impl Read>, entry: Entry, writer: &mut TreeWriter) -> Result<(), ImportError> {
    let Entry { path: raw_path, kind, meta, has_text_acl } = entry;
    let named = || std::ffi::OsStr::from_bytes(&raw_path);
    let path = TreePath::parse(&raw_path).map_err(|why| ImportError::entry(named(), why))?;
    if has_text_acl {
        writer.note(Note::AclDropped, path.as_path());
    }
    let name = path.as_path().file_name().map(OsStrExt::as_bytes).unwrap_or_default();
    if let Some(hidden) = name.strip_prefix(b".wh.") {
        return match hidden {
            b".wh..opq" => writer.opaque(&path),
            _ if hidden.starts_with(b".wh.") => {
                writer.note(Note::WhiteoutMarkerSkipped, path.as_path());
                Ok(())
            }
            _ => writer.whiteout(&path.sibling(hidden).map_err(|why| ImportError::entry(named(), why))?),
        };
    }
    match kind {
        Kind::File(sparse) => writer.file(&path, &meta, |file, buf| copy(archive, &path, sparse, file, buf)),
        Kind::Dir => writer.dir(&path, &meta),
        Kind::Symlink { target } => writer.symlink(&path, &meta, &target),
        Kind::Node(node) => writer.node(&path, &meta, node),
        Kind::HardLink { target } => {
            let target = TreePath::parse(&target)
                .map_err(|_| ImportError::entry(&path, "a hard link whose target is no path in the archive"))?;
            writer.hard_link(&path, &target)
        }
        Kind::VolumeLabel => {
            writer.note(Note::VolumeLabelSkipped, path.as_path());
            Ok(())
        }
    }
}

/// The current entry's data into `file`, holes staying holes.
fn copy(
    archive: &mut Archive<impl Read>,
    path: &TreePath,
    sparse: Option<SparseMap>,
    mut file: &File,
    buf: &mut [u8],
) -> Result<(), ImportError> {
    let Some(map) = sparse else {
        loop {
            match archive.read_data(buf)? {
                0 => return Ok(()),
                n => file.write_all(&buf[..n]).map_err(ImportError::on("write", path))?,
            }
        }
    };
    for (mut offset, len) in map.segments {
        let end = offset + len;
        while offset < end {
            let want = usize::try_from(end - offset).map_or(buf.len(), |left| left.min(buf.len()));
            match archive.read_data(&mut buf[..want])? {
                0 => return Err(archive.damaged("a sparse map that does not fit its data")),
                n => {
                    file.write_all_at(&buf[..n], offset).map_err(ImportError::on("write", path))?;
                    offset += n as u64;
                }
            }
        }
    }
    file.set_len(map.real_len).map_err(ImportError::on("set length of", path))
}
