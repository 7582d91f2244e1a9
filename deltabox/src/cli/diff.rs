//! `deltabox diff`.

use std::io::IsTerminal;

use crate::deltafs::diff::{Both, Change, What};
use crate::deltafs::view::Kind;
use crate::engine::DiffReport;
use crate::sandbox::SandboxId;

use super::{Context, Outcome, parse, print};

/// Shows what differs between two states of a sandbox's files.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A added, D deleted, M modified, R renamed, T another type. The live state is read while programs \
                        may write to it: it is no snapshot. Times alone are no difference.\n\n\
                        Examples:\n  \
                        deltabox diff dev              since the last checkpoint or rollback\n  \
                        deltabox diff dev c1 c4 -p     between two checkpoints, with the text"
)]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
    /// Id or name of the checkpoint with the older state [default: where the sandbox's state comes from].
    #[arg(value_parser = parse::parse_checkpoint)]
    from: Option<String>,
    /// Id or name of the checkpoint with the newer state [default: the live state].
    #[arg(value_parser = parse::parse_checkpoint)]
    to: Option<String>,
    /// Also show what changed in text files, as `diff -u` does.
    #[arg(short, long)]
    patch: bool,
    /// Also list what deleted directories held.
    #[arg(long)]
    contents: bool,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let mut query = vec![format!("patch={}&contents={}", args.patch, args.contents)];
    query.extend(args.from.map(|from| format!("from={from}")));
    query.extend(args.to.map(|to| format!("to={to}")));
    let report: DiffReport =
        context.client()?.get(&format!("/v1/sandboxes/{}/diff?{}", args.sandbox, query.join("&")))?;
    if context.json {
        print::json(&report)?;
        return Ok(0);
    }
    // A file's content must not drive the terminal; a patch in a file or pipe must be whole.
    let clean = std::io::stdout().is_terminal();
    for change in &report.changes {
        print::line(&line(change))?;
        if let Some(patch) = &change.patch {
            let lines = patch.split_inclusive('\n').map(|line| line.strip_suffix('\n').unwrap_or(line));
            match clean {
                true => lines.map(printable).try_for_each(|line| print::line(&line))?,
                false => print::text(patch)?,
            }
        }
    }
    Ok(0)
}

/// A line of a file, with its tabs.
fn printable(line: &str) -> String {
    line.split('\t').map(print::printable).collect::<Vec<_>>().join("\t")
}

/// `M /etc/hosts (120 -> 140 bytes, mode 0644 -> 0600)`.
fn line(change: &Change) -> String {
    let letter = match change.change {
        What::Added => 'A',
        What::Deleted => 'D',
        What::Modified => 'M',
        What::Renamed => 'R',
        What::TypeChanged => 'T',
    };
    let slash = |path: &str, kind| {
        let is_dir = kind == Kind::Directory && path != "/";
        format!("{}{}", print::printable(path), if is_dir { "/" } else { "" })
    };
    let was = change.was.unwrap_or(change.kind);
    let from = change.from.as_ref().map(|from| format!("{} -> ", slash(from, was))).unwrap_or_default();
    let details = details(change);
    let details = if details.is_empty() { details } else { format!(" ({details})") };
    format!("{letter} {from}{}{details}", slash(&change.path, change.kind))
}

fn details(change: &Change) -> String {
    let mut details = Vec::new();
    if let Some(was) = change.was {
        details.push(format!("{} -> {}", word(was), word(change.kind)));
    } else if !matches!(change.kind, Kind::File | Kind::Directory) && change.change == What::Added {
        details.push(word(change.kind).to_owned());
    }
    match (change.old_size_bytes, change.new_size_bytes) {
        (Some(old), Some(new)) if old == new => details.push(format!("{new} bytes, other content")),
        (Some(old), Some(new)) => details.push(format!("{old} -> {new} bytes")),
        (None, Some(size)) if change.change == What::Added => details.push(format!("{size} bytes")),
        _ => {}
    }
    let both = |name: &str, both: &Option<Both<String>>| {
        let both = both.as_ref()?;
        Some(format!("{name} {} -> {}", print::printable(&both.from), print::printable(&both.to)))
    };
    details.extend(both("mode", &change.mode));
    details.extend(both("owner", &change.owner));
    details.extend(both("target", &change.target));
    details.extend(change.xattrs.iter().map(|name| format!("attribute {}", print::printable(name))));
    details.join(", ")
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Directory => "directory",
        Kind::Symlink => "symbolic link",
        Kind::Fifo => "FIFO",
        Kind::Socket => "socket",
        Kind::CharDevice => "character device",
        Kind::BlockDevice => "block device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(json: &str) -> Change {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn each_change_is_one_line() {
        let table = [
            (r#"{"path":"/a","change":"added","kind":"file","new_size_bytes":5}"#, "A /a (5 bytes)"),
            (r#"{"path":"/a","change":"deleted","kind":"file","old_size_bytes":5}"#, "D /a"),
            (r#"{"path":"/d","change":"deleted","kind":"directory"}"#, "D /d/"),
            (
                r#"{"path":"/e","change":"renamed","kind":"directory","from":"/d","mode":{"from":"0755","to":"0700"}}"#,
                "R /d/ -> /e/ (mode 0755 -> 0700)",
            ),
            (
                r#"{"path":"/a","change":"modified","kind":"file","content":true,"old_size_bytes":1,"new_size_bytes":2,
                    "owner":{"from":"0:0","to":"1:1"},"xattrs":["user.x"]}"#,
                "M /a (1 -> 2 bytes, owner 0:0 -> 1:1, attribute user.x)",
            ),
            (r#"{"path":"/a","change":"type_changed","kind":"symlink","was":"file"}"#, "T /a (file -> symbolic link)"),
            (r#"{"path":"/a\u001b[2J","change":"added","kind":"fifo"}"#, "A /a\u{fffd}[2J (FIFO)"),
            (
                r#"{"path":"/","change":"modified","kind":"directory","mode":{"from":"0755","to":"0700"}}"#,
                "M / (mode 0755 -> 0700)",
            ),
        ];
        for (json, text) in table {
            assert_eq!(line(&change(json)), text);
        }
    }

    #[test]
    fn a_line_keeps_its_tabs_and_nothing_else_that_moves_the_cursor() {
        assert_eq!(printable("+a\tb\x1b[2J\r"), "+a\tb\u{fffd}[2J\u{fffd}");
    }
}
