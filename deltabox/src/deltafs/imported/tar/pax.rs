//! PAX extension records: `LENGTH KEY=VALUE\n`, LENGTH counting the whole record in decimal.

use std::collections::BTreeMap;

use crate::deltafs::imported::meta::{Mtime, Xattr};

/// Key and value of each record, in order.
pub(super) type Records = Vec<(Vec<u8>, Vec<u8>)>;

pub(super) fn parse_records(mut bytes: &[u8]) -> Result<Records, &'static str> {
    const MALFORMED: &str = "a malformed extension record";
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let digits = bytes.iter().position(|byte| *byte == b' ').ok_or(MALFORMED)?;
        let len = usize::try_from(parse_decimal(&bytes[..digits]).ok_or(MALFORMED)?).map_err(|_| MALFORMED)?;
        let (record, rest) = bytes.split_at_checked(len).ok_or(MALFORMED)?;
        let record = record.get(digits + 1..).and_then(|record| record.strip_suffix(b"\n")).ok_or(MALFORMED)?;
        let equals = record.iter().position(|byte| *byte == b'=').filter(|at| *at > 0).ok_or(MALFORMED)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = rest;
    }
    Ok(records)
}

pub(super) fn parse_decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.is_ascii_digit().then(|| digit - b'0')?;
        value.checked_mul(10)?.checked_add(digit.into())
    })
}

/// `[-]SECONDS[.FRACTION]`; more than nine digits of fraction are cut, as the kernel could not keep them.
pub(super) fn parse_mtime(text: &[u8]) -> Option<Mtime> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let (secs, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let secs = i64::try_from(parse_decimal(secs)?).ok()?;
    let nanos = (0..9).fold(0, |nanos, i| nanos * 10 + fraction.get(i).map_or(0, |digit| u32::from(digit - b'0')));
    Some(match (negative, nanos) {
        (false, _) => Mtime { secs, nanos },
        (true, 0) => Mtime { secs: -secs, nanos: 0 },
        (true, _) => Mtime { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

/// The extended attributes among `records`: `SCHILY.xattr.*` (GNU tar, star, bsdtar) and `LIBARCHIVE.xattr.*`
/// (bsdtar, which writes both). An attribute that cannot be decoded is an error.
pub(super) fn xattrs(records: &Records) -> Result<Vec<Xattr>, &'static str> {
    let mut found = BTreeMap::new();
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let value = decode_base64(value).ok_or("an extended attribute that is not base64")?;
            found.insert(decode_percent(name), value);
        }
    }
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            found.insert(decode_percent(name), value.clone());
        }
    }
    Ok(found.into_iter().map(|(name, value)| Xattr { name, value }).collect())
}

/// `%XX` decoded; anything else stands for itself. (GNU tar writes `=` and `%` of names so.)
fn decode_percent(text: &[u8]) -> Vec<u8> {
    let hex = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let byte = match tail {
            [high, low, ..] if *first == b'%' => hex(*high).zip(hex(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        decoded.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    decoded
}

fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut n_bits) = (0_u32, 0);
    for byte in text.iter().filter(|byte| !matches!(byte, b'=' | b'\n')) {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(six)) & 0xffff;
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            decoded.push(u8::try_from(bits >> n_bits & 0xff).ok()?);
        }
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_keep_binary_values_and_malformed_ones_are_refused() {
        let records = parse_records(b"9 path=a\n22 SCHILY.xattr.k=\n=\0\n").unwrap();
        assert_eq!(records[0], (b"path".to_vec(), b"a".to_vec()));
        assert_eq!(records[1], (b"SCHILY.xattr.k".to_vec(), b"\n=\0".to_vec()));
        for bad in [
            &b"9 path=a"[..],
            b"8 path=a\n",
            b"9 path:a\n",
            b"path=a\n",
            b"5 =a\n",
            b"0 \n",
            b"1 ",
            b"99999999999999999999 a=b\n",
        ] {
            assert!(parse_records(bad).is_err(), "{:?} was taken", bad.escape_ascii().to_string());
        }
    }

    #[test]
    fn times_have_nanoseconds_and_may_lie_before_the_epoch() {
        let mtime = |text: &str| parse_mtime(text.as_bytes()).map(|mtime| (mtime.secs, mtime.nanos));
        assert_eq!(mtime("1700000000.123456789"), Some((1_700_000_000, 123_456_789)));
        assert_eq!(mtime("5.5"), Some((5, 500_000_000)));
        assert_eq!(mtime("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(mtime("-3"), Some((-3, 0)));
        assert_eq!(mtime("7.0000000019"), Some((7, 1)));
        for bad in ["", "x", "1.x", "1.2.3", "--1", "99999999999999999999"] {
            assert_eq!(mtime(bad), None, "{bad}");
        }
    }

    #[test]
    fn attributes_are_decoded_from_both_spellings() {
        let records = vec![
            (b"LIBARCHIVE.xattr.user.a%3Db".to_vec(), b"AP/+aGk".to_vec()),
            (b"SCHILY.xattr.user.%25x%zz".to_vec(), b"\0raw".to_vec()),
        ];
        let found = xattrs(&records).unwrap();
        assert_eq!(found[0], Xattr { name: b"user.%x%zz".to_vec(), value: b"\0raw".to_vec() });
        assert_eq!(found[1], Xattr { name: b"user.a=b".to_vec(), value: b"\x00\xff\xfehi".to_vec() });
    }
}
