//! Unified diffs, as `diff -u` makes them.

use std::io;
use std::path::Path;
use std::time::Duration;

use similar::TextDiff;

use super::compare::Opened;
use super::content;
use super::{Change, Pair, What};
use crate::deltafs::view::{Entry, Kind};

/// Larger files are not compared line by line. (Chosen: nobody reads such a diff.)
const MAX_FILE_BYTES: u64 = 1 << 20;
/// What is left out once a report has that many bytes of diffs. (Chosen: it is one answer, held in memory.)
const MAX_ALL_BYTES: usize = 16 << 20;
/// After that the comparison of two files goes on more coarsely. (Chosen: lines without order cost their square.)
const MAX_TIME: Duration = Duration::from_millis(500);

/// How much of a report is left for patches.
pub(super) struct Budget {
    left_bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { left_bytes: MAX_ALL_BYTES }
    }
}

impl Opened {
    /// What to show of the content of a file that has changed, if it is one.
    pub(super) fn patch(&self, pair: &Pair, change: &Change, budget: &mut Budget) -> io::Result<Option<String>> {
        let file = |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.kind == Kind::File);
        let is_changed = match change.change {
            What::Modified | What::Renamed => change.content,
            What::Added | What::Deleted | What::TypeChanged => true,
        };
        if !is_changed || !(file(&self.old) || file(&self.new)) {
            return Ok(None);
        }
        let old_name = name(file(&self.old), "a", pair.old.as_deref());
        let new_name = name(file(&self.new), "b", pair.new.as_deref());
        let sides = [&self.old, &self.new].map(|entry| match entry {
            Some(entry) if entry.kind == Kind::File => content::read(entry, MAX_FILE_BYTES),
            _ => Ok(Some(Vec::new())),
        });
        let [old, new] = sides;
        let (Some(old), Some(new)) = (old?, new?) else {
            return Ok(Some(format!("Files {old_name} and {new_name} differ; larger than {MAX_FILE_BYTES} bytes\n")));
        };
        let (Some(old), Some(new)) = (text(old), text(new)) else {
            return Ok(Some(format!("Binary files {old_name} and {new_name} differ\n")));
        };
        if budget.left_bytes == 0 {
            let why = format!("the diffs before it have more than {MAX_ALL_BYTES} bytes");
            return Ok(Some(format!("Files {old_name} and {new_name} differ; {why}\n")));
        }
        let diff = TextDiff::configure().timeout(MAX_TIME).diff_lines(old.as_str(), new.as_str());
        let patch = diff.unified_diff().header(&old_name, &new_name).to_string();
        budget.left_bytes = budget.left_bytes.saturating_sub(patch.len());
        Ok((!patch.is_empty()).then_some(patch))
    }
}

fn text(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// The name in a header; quoted as git does where a line could not hold it.
fn name(is_there: bool, side: &str, path: Option<&Path>) -> String {
    let Some(path) = path.filter(|_| is_there) else { return "/dev/null".to_owned() };
    let name = format!("{side}/{}", path.display());
    if name.chars().any(|c| c.is_control() || matches!(c, '"' | '\\')) { format!("{name:?}") } else { name }
}
