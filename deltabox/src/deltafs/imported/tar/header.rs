//! One 512-byte header: V7, POSIX ustar, star and GNU.
//!
//! ```text
//!   0 name[100]  100 mode[8]  108 uid[8]  116 gid[8]  124 size[12]  136 mtime[12]  148 checksum[8]  156 type
//! 157 link[100]  257 magic[8] 265 uname[32] 297 gname[32] 329 major[8] 337 minor[8]
//! ustar: 345 prefix[155]      star ("tar\0" at 508): 345 prefix[131]
//! GNU:   386 four sparse segments (offset[12] length[12])  482 more?[1]  483 real size[12]
//! ```

pub(super) const BLOCK_BYTES: usize = 512;
pub(super) type Block = [u8; BLOCK_BYTES];

/// The fields as they stand in the header; extension headers may still override them.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) kind: u8,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) size: u64,
    pub(super) mtime_secs: i64,
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Header {
    pub(super) fn parse(block: &Block) -> Result<Self, &'static str> {
        check_sum(block)?;
        let is_ustar = &block[257..263] == b"ustar\0";
        let is_gnu = &block[257..265] == b"ustar  \0";
        let mut path = text(&block[..100]).to_vec();
        if is_ustar {
            let end = if &block[508..] == b"tar\0" { 476 } else { 500 };
            let prefix = text(&block[345..end]);
            if !prefix.is_empty() {
                path = [prefix, b"/", &path].concat();
            }
        }
        let device = |field| -> Result<u32, &'static str> {
            if !is_ustar && !is_gnu {
                return Ok(0);
            }
            u32::try_from(number(field)?).map_err(|_| "a device number out of range")
        };
        Ok(Self {
            kind: block[156],
            path,
            link: text(&block[157..257]).to_vec(),
            mode: u32::try_from(number(&block[100..108])? & 0o7777).map_err(|_| "a mode out of range")?,
            // Negative ids (old programs wrote -2 for nobody) are ids no sandbox has.
            uid: u64::try_from(number(&block[108..116])?).unwrap_or(u64::MAX),
            gid: u64::try_from(number(&block[116..124])?).unwrap_or(u64::MAX),
            size: u64::try_from(number(&block[124..136])?).map_err(|_| "a negative size")?,
            mtime_secs: number(&block[136..148])?,
            major: device(&block[329..337])?,
            minor: device(&block[337..345])?,
        })
    }
}

fn check_sum(block: &Block) -> Result<(), &'static str> {
    let byte = |i: usize| if (148..156).contains(&i) { b' ' } else { block[i] };
    let sum: i64 = (0..BLOCK_BYTES).map(|i| i64::from(byte(i))).sum();
    let stored = number(&block[148..156]).map_err(|_| "a header's checksum is not a number")?;
    if sum == stored { Ok(()) } else { Err("a header's checksum does not match") }
}

/// A field up to its first zero byte.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number: octal digits after spaces, ended by a space, zero or the field; or, first bit set, big-endian binary
/// in two's complement (GNU). An empty field is 0.
pub(super) fn number(field: &[u8]) -> Result<i64, &'static str> {
    const TOO_LARGE: &str = "a number too large";
    let Some((first, rest)) = field.split_first() else { return Ok(0) };
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let fill = if negative { 0xff } else { 0 };
        let (high, low) = rest.split_last_chunk::<7>().ok_or("a field too short for a binary number")?;
        // A field of 8 bytes keeps its six value bits of the first; in longer ones everything above 64 bits is sign.
        let (top, sign) = match high.split_last() {
            None => (if negative { first | 0x80 } else { first & 0x7f }, &[][..]),
            Some((top, sign)) => (*top, sign),
        };
        let first_is_sign = high.is_empty() || *first == if negative { 0xff } else { 0x80 };
        if !first_is_sign || sign.iter().any(|byte| *byte != fill) || (top & 0x80 != 0) != negative {
            return Err(TOO_LARGE);
        }
        let mut bytes = [top; 8];
        bytes[1..].copy_from_slice(low);
        return Ok(i64::from_be_bytes(bytes));
    }
    let digits = field.trim_ascii_start().split(|byte| matches!(byte, 0 | b' ')).next().unwrap_or_default();
    digits.iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8).and_then(|value| value.checked_add((digit - b'0').into())).ok_or(TOO_LARGE),
        _ => Err("a number with a character that is not an octal digit"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary_and_bounded() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"   644 \0"), Ok(0o644));
        assert_eq!(number(b"77777777777\0"), Ok(0o77_777_777_777));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert!(number(b"0000648\0").is_err());
        assert!(number(b"-000644\0").is_err());
        assert!(number(&[b'7'; 24]).is_err());
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Ok(256));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
        assert_eq!(number(&[0xff; 8]), Ok(-1));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Ok(1 << 33));
        assert!(number(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(number(&[0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }
}
