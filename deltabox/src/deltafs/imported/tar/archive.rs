//! The framing of a tar stream: headers, extension headers, data, end; entries come out whole or not at all.
//!
//! Why not the `tar` crate: it takes the end of the file for the end of the archive, reads extension headers of any
//! length into memory, splits binary attributes at newlines, fills holes with zeros and does not know GNU's PAX
//! sparse formats. The tests build their archives with it.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::header::{BLOCK_BYTES, Block, Header, text};
use super::pax::{self, Records};
use super::sparse::{MapLines, SparseMap};
use crate::deltafs::imported::ImportError;
use crate::deltafs::imported::meta::{Meta, Mtime};
use crate::deltafs::imported::writer::Node;

/// Chosen: the largest extension header taken, and the most global records kept. 16 attributes of the largest size.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// One entry, every extension applied; the path as the archive has it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) meta: Meta,
    /// Whether it had an access list in text form, which is not taken.
    pub(super) has_text_acl: bool,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Its data is read with [`Archive::read_data`].
    File(Option<SparseMap>),
    Dir,
    Symlink {
        target: Vec<u8>,
    },
    HardLink {
        target: Vec<u8>,
    },
    Node(Node),
    VolumeLabel,
}

/// A tar stream being read.
pub(super) struct Archive<R> {
    input: R,
    /// Bytes read.
    offset: u64,
    /// Of the current entry: data not read yet, and the padding to a whole block after it.
    data_left: u64,
    padding: u64,
    /// The last entry begun, for errors.
    at: PathBuf,
    /// Records of global extension headers, later ones last.
    global: Records,
    global_bytes: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, offset: 0, data_left: 0, padding: 0, at: PathBuf::new(), global: Vec::new(), global_bytes: 0 }
    }

    /// The next entry; what was left of the last one's data is skipped. `None` after the end-of-archive mark, the
    /// whole input having been read and found good.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, ImportError> {
        self.skip_rest()?;
        let (mut long_path, mut long_link, mut local) = (None, None, None);
        loop {
            let mut block = [0; BLOCK_BYTES];
            self.read_exact(&mut block)?;
            if block == [0; BLOCK_BYTES] {
                if long_path.is_some() || long_link.is_some() || local.is_some() {
                    return Err(self.damaged("an extension header without its entry"));
                }
                return self.read_end().map(|()| None);
            }
            let header = Header::parse(&block).map_err(|why| match self.offset {
                512 => self.damaged("not a tar archive, or its first header is damaged"),
                _ => self.damaged(why),
            })?;
            let slot = match header.kind {
                b'L' => &mut long_path,
                b'K' => &mut long_link,
                b'x' | b'X' => &mut local,
                b'g' => {
                    let records = self.read_extension(header.size)?;
                    self.add_global(&records)?;
                    continue;
                }
                _ => return self.assemble(header, &block, long_path, long_link, local).map(Some),
            };
            if slot.is_some() {
                return Err(self.damaged("two extension headers of one kind for one entry"));
            }
            *slot = Some(self.read_extension(header.size)?);
        }
    }

    /// Reads more of the current entry's data; 0 at its end.
    pub(super) fn read_data(&mut self, buf: &mut [u8]) -> Result<usize, ImportError> {
        let want = usize::try_from(self.data_left).map_or(buf.len(), |left| left.min(buf.len()));
        if want == 0 {
            return Ok(0);
        }
        let n = self.read(&mut buf[..want])?;
        if n == 0 {
            return Err(self.damaged("it ends within an entry's data"));
        }
        self.data_left -= n as u64;
        Ok(n)
    }

    pub(super) fn damaged(&self, why: &'static str) -> ImportError {
        ImportError::Archive { entry: self.at.clone(), offset: self.offset, why }
    }

    fn assemble(
        &mut self,
        header: Header,
        block: &Block,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        local: Option<Vec<u8>>,
    ) -> Result<Entry, ImportError> {
        let mut records = self.global.clone();
        records.extend(pax::parse_records(&local.unwrap_or_default()).map_err(|why| self.damaged(why))?);
        // The last one counts; an empty value takes back what came before it.
        let get = |key: &str| {
            let found = records.iter().rev().find(|(found, _)| found == key.as_bytes());
            found.map(|(_, value)| value.as_slice()).filter(|value| !value.is_empty())
        };
        let path = get("GNU.sparse.name").or(get("path")).map(<[u8]>::to_vec);
        let path = path.or(long_path.map(|path| text(&path).to_vec())).unwrap_or(header.path);
        let link = get("linkpath").map(<[u8]>::to_vec);
        let link = link.or(long_link.map(|link| text(&link).to_vec())).unwrap_or(header.link);
        self.at = OsString::from_vec(path.clone()).into();

        let numeric = |key: &str, why: &'static str| -> Result<Option<u64>, ImportError> {
            get(key).map(|value| pax::parse_decimal(value).ok_or_else(|| self.damaged(why))).transpose()
        };
        let bad_mtime = || self.damaged("a malformed mtime");
        let mtime = get("mtime").map(|value| pax::parse_mtime(value).ok_or_else(bad_mtime)).transpose()?;
        let meta = Meta {
            mode: header.mode,
            uid: numeric("uid", "a malformed uid")?.unwrap_or(header.uid),
            gid: numeric("gid", "a malformed gid")?.unwrap_or(header.gid),
            mtime: mtime.unwrap_or(Mtime { secs: header.mtime_secs, nanos: 0 }),
            xattrs: pax::xattrs(&records).map_err(|why| self.damaged(why))?,
        };
        let size = numeric("size", "a malformed size")?.unwrap_or(header.size);
        let has_text_acl = records.iter().any(|(key, _)| key.starts_with(b"SCHILY.acl."));
        let dev = libc::makedev(header.major, header.minor);
        let kind = match header.kind {
            // Before ustar a directory was a file whose name ends so.
            0 | b'0' | b'7' if path.ends_with(b"/") => Kind::Dir,
            0 | b'0' | b'7' => {
                self.begin_data(size)?;
                Kind::File(self.read_pax_sparse_map(&records)?)
            }
            b'S' => Kind::File(Some(self.read_gnu_sparse_map(block, size)?)),
            b'1' => Kind::HardLink { target: link },
            b'2' => Kind::Symlink { target: link },
            b'3' => Kind::Node(Node::Char { dev }),
            b'4' => Kind::Node(Node::Block { dev }),
            b'5' => Kind::Dir,
            b'6' => Kind::Node(Node::Fifo),
            b'V' => Kind::VolumeLabel,
            b'M' => return Err(self.damaged("a part of a multi-volume archive")),
            b'D' => return Err(self.damaged("an incremental dump, not a plain archive")),
            _ => return Err(self.damaged("an entry of unknown type")),
        };
        // Of the kinds without data some writers give a size all the same, and none of them writes data.
        Ok(Entry { path, kind, meta, has_text_acl })
    }

    fn begin_data(&mut self, size: u64) -> Result<(), ImportError> {
        if i64::try_from(size).is_err() {
            return Err(self.damaged("a size too large"));
        }
        self.data_left = size;
        self.padding = size.next_multiple_of(BLOCK_BYTES as u64) - size;
        Ok(())
    }

    fn read_gnu_sparse_map(&mut self, block: &Block, size: u64) -> Result<SparseMap, ImportError> {
        let damaged = |why| self.damaged(why);
        let mut map = SparseMap { real_len: SparseMap::gnu_real_len(block).map_err(damaged)?, ..SparseMap::default() };
        let mut more = map.push_gnu(block, true).map_err(damaged)?;
        while more {
            let mut block = [0; BLOCK_BYTES];
            self.read_exact(&mut block)?;
            more = map.push_gnu(&block, false).map_err(|why| self.damaged(why))?;
        }
        self.begin_data(size)?;
        map.check(size).map_err(|why| self.damaged(why))?;
        Ok(map)
    }

    fn read_pax_sparse_map(&mut self, records: &Records) -> Result<Option<SparseMap>, ImportError> {
        let get = |key: &str| records.iter().rev().find(|(found, _)| found == key.as_bytes()).map(|(_, value)| value);
        let real_len = match get("GNU.sparse.realsize").or(get("GNU.sparse.size")) {
            None => return Ok(None),
            Some(value) => pax::parse_decimal(value).ok_or_else(|| self.damaged("a malformed sparse size"))?,
        };
        let map = match (get("GNU.sparse.major").map(Vec::as_slice), get("GNU.sparse.minor").map(Vec::as_slice)) {
            (None | Some(b"0"), _) => SparseMap::from_pax(records, real_len).map_err(|why| self.damaged(why))?,
            (Some(b"1"), Some(b"0")) => {
                let mut map = SparseMap { real_len, ..SparseMap::default() };
                let mut lines = MapLines::default();
                let mut block = [0; BLOCK_BYTES];
                loop {
                    self.data_left = self
                        .data_left
                        .checked_sub(BLOCK_BYTES as u64)
                        .ok_or_else(|| self.damaged("a sparse map longer than its entry"))?;
                    self.read_exact(&mut block)?;
                    if lines.push(&block, &mut map).map_err(|why| self.damaged(why))? {
                        break map;
                    }
                }
            }
            _ => return Err(self.damaged("a sparse file of unknown format")),
        };
        map.check(self.data_left).map_err(|why| self.damaged(why))?;
        Ok(Some(map))
    }

    /// The data of an extension header.
    fn read_extension(&mut self, size: u64) -> Result<Vec<u8>, ImportError> {
        let len = usize::try_from(size).ok().filter(|_| size <= MAX_EXTENSION_BYTES);
        let len = len.ok_or_else(|| self.damaged("an extension header of more than 1 MiB"))?;
        let mut bytes = vec![0; len.next_multiple_of(BLOCK_BYTES)];
        self.read_exact(&mut bytes)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    fn add_global(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        self.global_bytes += bytes.len() as u64;
        if self.global_bytes > MAX_EXTENSION_BYTES {
            return Err(self.damaged("global extension headers of more than 1 MiB"));
        }
        self.global.extend(pax::parse_records(bytes).map_err(|why| self.damaged(why))?);
        Ok(())
    }

    /// After the first zero block: the second, then nothing but zeros. Reading to the end is also what makes a
    /// decoder check its trailer.
    fn read_end(&mut self) -> Result<(), ImportError> {
        let mut buf = [0; 8192];
        self.read_exact(&mut buf[..BLOCK_BYTES])?;
        let mut n = BLOCK_BYTES;
        while n > 0 {
            if buf[..n].iter().any(|byte| *byte != 0) {
                return Err(self.damaged("data after the end-of-archive mark"));
            }
            n = self.read(&mut buf)?;
        }
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), ImportError> {
        let mut buf = [0; 8192];
        while self.read_data(&mut buf)? > 0 {}
        self.data_left = std::mem::take(&mut self.padding);
        while self.read_data(&mut buf)? > 0 {}
        Ok(())
    }

    fn read_exact(&mut self, mut buf: &mut [u8]) -> Result<(), ImportError> {
        while !buf.is_empty() {
            match self.read(buf)? {
                0 => return Err(self.damaged("it ends before its end-of-archive mark")),
                n => buf = &mut buf[n..],
            }
        }
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, ImportError> {
        loop {
            match self.input.read(buf) {
                Ok(n) => {
                    self.offset += n as u64;
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel's errors carry its number, the decoders' own do not.
                Err(source) if source.raw_os_error().is_some() => {
                    return Err(ImportError::EntryIo { op: "read archive at", entry: self.at.clone(), source });
                }
                Err(source) => {
                    return Err(ImportError::Compression { entry: self.at.clone(), offset: self.offset, source });
                }
            }
        }
    }
}
