//! Where the data of a sparse file lies: GNU's old format and its PAX formats 0.0, 0.1 and 1.0.

use super::header::{Block, number};
use super::pax::{Records, parse_decimal};

/// Chosen: 16 MB of memory at most; a file of 8 GB with every other page a hole.
const MAX_SEGMENTS: usize = 1 << 20;
const MALFORMED: &str = "a malformed sparse map";

/// The data segments of a file in order, as offset and length.
#[derive(Debug, Default)]
pub(super) struct SparseMap {
    pub(super) segments: Vec<(u64, u64)>,
    pub(super) real_len: u64,
}

impl SparseMap {
    pub(super) fn push(&mut self, offset: u64, len: u64) -> Result<(), &'static str> {
        let at_least = self.segments.last().map_or(0, |(offset, len)| offset + len);
        let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok()).ok_or(MALFORMED)?;
        if offset < at_least || end < offset {
            return Err("a sparse map with overlapping or unordered segments");
        }
        if self.segments.len() == MAX_SEGMENTS {
            return Err("a sparse file of more than a million segments");
        }
        self.segments.push((offset, len));
        Ok(())
    }

    /// The segments in an old GNU header (`in_header`) or an extension block, and whether an extension block follows.
    pub(super) fn push_gnu(&mut self, block: &Block, in_header: bool) -> Result<bool, &'static str> {
        let (table, more) = if in_header { (&block[386..482], block[482]) } else { (&block[..504], block[504]) };
        for segment in table.as_chunks::<24>().0 {
            if segment[0] == 0 {
                break;
            }
            let field = |field| u64::try_from(number(field)?).map_err(|_| MALFORMED);
            self.push(field(&segment[..12])?, field(&segment[12..])?)?;
        }
        Ok(more != 0)
    }

    pub(super) fn gnu_real_len(block: &Block) -> Result<u64, &'static str> {
        u64::try_from(number(&block[483..495])?).map_err(|_| MALFORMED)
    }

    /// The map in PAX records, formats 0.0 (a pair of records per segment) and 0.1 (one list).
    pub(super) fn from_pax(records: &Records, real_len: u64) -> Result<Self, &'static str> {
        let mut map = Self { segments: Vec::new(), real_len };
        let mut numbers = Vec::new();
        for (key, value) in records {
            match key.as_slice() {
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => numbers.push(value.as_slice()),
                b"GNU.sparse.map" if !value.is_empty() => numbers = value.split(|byte| *byte == b',').collect(),
                _ => {}
            }
        }
        let (pairs, []) = numbers.as_chunks::<2>() else { return Err(MALFORMED) };
        for [offset, len] in pairs {
            map.push(parse_decimal(offset).ok_or(MALFORMED)?, parse_decimal(len).ok_or(MALFORMED)?)?;
        }
        Ok(map)
    }

    /// Checks the finished map against the file's length and the data that the archive has for it.
    pub(super) fn check(&self, data_len: u64) -> Result<(), &'static str> {
        let end = self.segments.last().map_or(0, |(offset, len)| offset + len);
        let sum: u64 = self.segments.iter().map(|(_, len)| len).sum();
        if end > self.real_len || i64::try_from(self.real_len).is_err() {
            return Err("a sparse map beyond the end of its file");
        }
        if sum == data_len { Ok(()) } else { Err("a sparse map that does not fit its data") }
    }
}

/// Reads the map of format 1.0, decimal lines at the start of the data in whole blocks, as blocks come in.
#[derive(Debug, Default)]
pub(super) struct MapLines {
    line: Vec<u8>,
    n_left: Option<u64>,
    offset: Option<u64>,
}

impl MapLines {
    /// Takes the next block; true when the map is complete (what follows in the block is padding).
    pub(super) fn push(&mut self, block: &Block, map: &mut SparseMap) -> Result<bool, &'static str> {
        for byte in block {
            if *byte != b'\n' {
                if self.line.len() == 20 {
                    return Err(MALFORMED);
                }
                self.line.push(*byte);
                continue;
            }
            let value = parse_decimal(&self.line).ok_or(MALFORMED)?;
            self.line.clear();
            match (self.n_left, self.offset.take()) {
                (None, _) => self.n_left = Some(value),
                (Some(_), None) => self.offset = Some(value),
                (Some(n_left), Some(offset)) => {
                    map.push(offset, value)?;
                    self.n_left = Some(n_left - 1);
                }
            }
            if self.n_left == Some(0) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
