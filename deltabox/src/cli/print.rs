//! Text for people: aligned tables, ages, sizes; and JSON for programs. A closed output is not an error.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::Failure;

/// Writes to standard output. Fails quietly when nobody reads it.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| {
        let quiet = error.kind() == io::ErrorKind::BrokenPipe;
        let failure = Failure::new(1, "local", format!("write standard output: {error}"), "");
        Failure { quiet, ..failure }
    })
}

/// Writes one line.
pub(super) fn line(line: &str) -> Result<(), Failure> {
    text(&format!("{line}\n"))
}

/// Writes one JSON object.
pub(super) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let encoded = serde_json::to_string(value);
    line(&encoded.map_err(|error| Failure::new(1, "local", format!("encode JSON: {error}"), ""))?)
}

/// Writes one line to standard error, if anybody reads it.
pub(super) fn error_line(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Rows under headings, each column as wide as its widest cell; a column whose heading begins with `>` is
/// aligned to the right. Without rows only the headings.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    text(&format_table(headings, rows))
}

fn format_table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let right: Vec<bool> = headings.iter().map(|heading| heading.starts_with('>')).collect();
    let first = headings.iter().map(|heading| heading.trim_start_matches('>').to_owned()).collect();
    let all: Vec<Vec<String>> =
        std::iter::once(first).chain(rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect())).collect();
    let width = |column: usize| all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..headings.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in &all {
        let mut line = String::new();
        for ((cell, width), right) in row.iter().zip(&widths).zip(&right) {
            if !line.is_empty() {
                line.push_str("  ");
            }
            let padding = " ".repeat(width - cell.chars().count());
            if *right {
                line.push_str(&padding);
                line.push_str(cell);
            } else {
                line.push_str(cell);
                line.push_str(&padding);
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// `name  value` lines.
pub(super) fn fields(fields: &[(&str, String)]) -> Result<(), Failure> {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = fields.iter().map(|(name, value)| format!("{name:width$}  {}\n", printable(value)));
    text(&lines.collect::<String>())
}

/// Without control characters: what runs inside a sandbox chooses its own command line, and must not drive
/// the terminal of who looks at it.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// How long ago, in the largest unit that fits: `12s`, `3m`, `5h`, `8d`.
pub(super) fn age(unix_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format_age(u64::try_from(now.as_millis()).unwrap_or(u64::MAX).saturating_sub(unix_ms))
}

fn format_age(age_ms: u64) -> String {
    let seconds = age_ms / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Bytes with a binary unit, one digit after the point below ten: `512`, `1.5K`, `64M`.
pub(super) fn size(len_bytes: u64) -> String {
    let mut unit = 1_u64;
    for name in ["", "K", "M", "G", "T"] {
        let next = unit.saturating_mul(1024);
        if len_bytes < next || name == "T" {
            let tenths = u128::from(len_bytes) * 10 / u128::from(unit);
            return if unit == 1 || tenths >= 100 {
                format!("{}{name}", tenths / 10)
            } else {
                format!("{}.{}{name}", tenths / 10, tenths % 10)
            };
        }
        unit = next;
    }
    len_bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_end_without_blanks() {
        let rows =
            [vec!["a".to_owned(), "10".to_owned(), "x".to_owned()], vec!["long".into(), "9".into(), String::new()]];
        let text = format_table(&["NAME", ">N", "REST"], &rows);
        assert_eq!(text, "NAME   N  REST\na     10  x\nlong   9\n");
    }

    #[test]
    fn a_command_line_cannot_drive_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a\u{fffd}[2Jb\u{fffd}c");
    }

    #[test]
    fn ages_and_sizes_are_short() {
        let ages = [(0, "0s"), (59_999, "59s"), (60_000, "1m"), (7_200_000, "2h"), (172_800_000, "2d")];
        for (ms, text) in ages {
            assert_eq!(format_age(ms), text);
        }
        let sizes =
            [(0, "0"), (1023, "1023"), (1024, "1.0K"), (1536, "1.5K"), (64 << 20, "64M"), (u64::MAX, "16777215T")];
        for (n, text) in sizes {
            assert_eq!(size(n), text);
        }
    }
}
