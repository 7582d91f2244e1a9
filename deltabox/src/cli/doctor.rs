//! `deltabox doctor`: what this kernel offers, what is missing and how to get it.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use serde_json::json;

use crate::kernel::{Finding, Level, Verdict, examine, suffices};

/// Runs all probes and prints the report. Fails if something required was not found.
pub(super) fn run(store: &Path, json: bool) -> ExitCode {
    let findings = undisturbed(|| examine(store));
    let ok = suffices(&findings);
    let kernel = kernel_release();
    let text = if json {
        let report = json!({ "kernel": kernel, "ok": ok, "findings": findings });
        format!("{report}\n")
    } else {
        let width = width(std::env::var("COLUMNS").ok().as_deref());
        let head = format!("Linux {kernel}, store {}\n\n", store.display());
        head + &table(&findings, width) + "\n" + &wrap(&summary(&findings), 0, width)
    };
    // A reader that went away (`| head`) has all it wanted.
    let _ = std::io::stdout().write_all(text.as_bytes());
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs `work` to its end, which is near, before an interrupt takes effect: probes must undo what they do.
fn undisturbed<T>(work: impl FnOnce() -> T) -> T {
    let ends: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    let before = ends.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let result = work();
    if let Ok(before) = before {
        // Fails for no mask that was set before.
        let _ = before.thread_set_mask();
    }
    result
}

fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".to_owned(), |name| name.release().to_string_lossy().into_owned())
}

/// The line length: what the terminal says, bounded to what stays readable.
fn width(columns: Option<&str>) -> usize {
    columns.and_then(|text| text.parse().ok()).unwrap_or(110).clamp(60, 140)
}

fn verdict(finding: &Finding) -> (&'static str, &str) {
    match &finding.verdict {
        Verdict::Found { detail } => ("found", detail),
        Verdict::Missing { detail } => ("missing", detail),
        Verdict::Denied { detail } => ("denied", detail),
        Verdict::NotProbed { why } => ("not probed", why),
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::Required => "required",
        Level::Recommended => "recommended",
        Level::Optional => "optional",
    }
}

/// One line per finding; consequence and remedy below those that were not found.
fn table(findings: &[Finding], width: usize) -> String {
    let longest = |text: fn(&Finding) -> &str| findings.iter().map(|finding| text(finding).len()).max().unwrap_or(0);
    let (names, levels, words) = (
        longest(|finding| finding.name),
        longest(|finding| level(finding.level)),
        longest(|finding| verdict(finding).0),
    );
    let indent = words + 2 + names + 2 + levels + 2;
    let mut text = String::new();
    let mut remedy_above = "";
    for finding in findings {
        let (word, detail) = verdict(finding);
        text += &format!("{word:words$}  {:names$}  {:levels$}  ", finding.name, level(finding.level));
        text += &wrap(detail, indent, width);
        if !finding.verdict.is_found() {
            let remedy = if finding.remedy == remedy_above { "as above" } else { finding.remedy };
            remedy_above = finding.remedy;
            for line in [format!("means: {}", finding.consequence), format!("to do: {remedy}")] {
                text += &" ".repeat(indent);
                // "means: " and "to do: " are as long as each other: their texts align.
                text += &wrap(&line, indent + "means: ".len(), width);
            }
        }
    }
    text
}

/// `text` broken at spaces so that lines that begin at column `indent` end before `width`. Ends with a newline.
fn wrap(text: &str, indent: usize, width: usize) -> String {
    let room = width.saturating_sub(indent).max(30);
    let mut lines = String::new();
    let mut used = 0;
    for word in text.split_ascii_whitespace() {
        let len = word.chars().count();
        if used > 0 && used + 1 + len > room {
            lines += "\n";
            lines += &" ".repeat(indent);
            used = 0;
        } else if used > 0 {
            lines += " ";
            used += 1;
        }
        lines += word;
        used += len;
    }
    lines + "\n"
}

fn summary(findings: &[Finding]) -> String {
    let n_found = findings.iter().filter(|finding| finding.verdict.is_found()).count();
    let lacking = |level: Level| {
        let absent = findings.iter().filter(|finding| finding.level == level && !finding.verdict.is_found());
        absent.map(|finding| finding.name).collect::<Vec<_>>().join(", ")
    };
    let mut text = format!("{n_found} of {} found. ", findings.len());
    let (required, recommended) = (lacking(Level::Required), lacking(Level::Recommended));
    text += &match (required.is_empty(), recommended.is_empty()) {
        (false, _) => format!("deltabox cannot work here: {required} required.\n"),
        (true, false) => format!("deltabox works here; it would be better with {recommended}.\n"),
        (true, true) => "deltabox works here.\n".to_owned(),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(name: &'static str, level: Level, verdict: Verdict) -> Finding {
        Finding { name, level, verdict, consequence: "something is worse", remedy: "get it", took_us: 7 }
    }

    fn sample() -> Vec<Finding> {
        vec![
            finding("root", Level::Required, Verdict::Found { detail: "uid 0".to_owned() }),
            finding("reflink", Level::Optional, Verdict::Missing { detail: "FICLONE on ext4: EOPNOTSUPP".to_owned() }),
        ]
    }

    #[test]
    fn the_table_is_aligned_and_explains_only_what_is_not_found() {
        let expected = "\
found    root     required  uid 0
missing  reflink  optional  FICLONE on ext4: EOPNOTSUPP
                            means: something is worse
                            to do: get it
";
        assert_eq!(table(&sample(), 100), expected);
    }

    #[test]
    fn a_remedy_is_told_once_for_neighbours_that_share_it() {
        let denied = || Verdict::Denied { detail: "EPERM".to_owned() };
        let text = table(&[finding("a", Level::Required, denied()), finding("b", Level::Required, denied())], 100);
        assert_eq!(text.matches("to do: get it").count(), 1, "{text}");
        assert_eq!(text.matches("to do: as above").count(), 1, "{text}");
    }

    #[test]
    fn long_texts_are_broken_at_spaces_and_keep_their_column() {
        let text = wrap("one two three four five six seven eight nine ten", 4, 34);
        assert_eq!(text, "one two three four five six\n    seven eight nine ten\n");
        assert_eq!(wrap("", 4, 34), "\n");
        assert_eq!(wrap(&"x".repeat(50), 4, 34), "x".repeat(50) + "\n");
    }

    #[test]
    fn the_summary_names_what_is_required_first() {
        let mut findings = sample();
        assert_eq!(summary(&findings), "1 of 2 found. deltabox works here.\n");
        findings.push(finding("BTF", Level::Recommended, Verdict::Missing { detail: String::new() }));
        assert_eq!(summary(&findings), "1 of 3 found. deltabox works here; it would be better with BTF.\n");
        findings.push(finding("overlay", Level::Required, Verdict::NotProbed { why: String::new() }));
        assert_eq!(summary(&findings), "1 of 4 found. deltabox cannot work here: overlay required.\n");
    }

    #[test]
    fn a_finding_is_one_flat_json_object() {
        let expected = json!({
            "name": "reflink", "level": "optional", "verdict": "missing", "detail": "FICLONE on ext4: EOPNOTSUPP",
            "consequence": "something is worse", "remedy": "get it", "took_us": 7,
        });
        assert_eq!(serde_json::to_value(&sample()[1]).unwrap(), expected);
    }

    #[test]
    fn the_line_length_is_bounded() {
        assert_eq!([width(None), width(Some("x")), width(Some("10")), width(Some("500"))], [110, 110, 60, 140]);
    }
}
