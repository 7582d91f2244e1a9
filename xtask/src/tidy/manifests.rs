//! Every dependency is declared once, in the workspace's Cargo.toml.

use super::Finding;
use super::tree::Tree;

/// Workspaces of their own, which cannot inherit from ours.
const OUTSIDE: &[&str] = &["deltabox-ebpf/"];

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let manifests = tree.texts().filter(|(path, _)| *path == "Cargo.toml" || path.ends_with("/Cargo.toml"));
    let ours = manifests.filter(|(path, _)| !OUTSIDE.iter().any(|dir| path.starts_with(dir)));
    ours.flat_map(|(path, text)| {
        own_dependencies(text).into_iter().map(move |(line, name)| Finding {
            path: path.to_owned(),
            line,
            rule: "dependencies",
            what: format!("declare `{name}` in [workspace.dependencies] and write `{name}.workspace = true` here"),
        })
    })
    .collect()
}

/// Line and name of each dependency that is not inherited.
fn own_dependencies(text: &str) -> Vec<(usize, &str)> {
    let mut found: Vec<(usize, &str)> = Vec::new();
    let mut section = Section::Other;
    // Brackets of a value that goes on over the next lines.
    let mut open = 0_usize;
    for (i, line) in text.lines().enumerate() {
        let line = line.split(" #").next().unwrap_or("").trim();
        let is_continued = open > 0;
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if !is_continued && line.starts_with('[') {
            found.extend(section.take_unproven());
            section = Section::of(line, i + 1);
            continue;
        }
        open = (open + line.matches(['[', '{']).count()).saturating_sub(line.matches([']', '}']).count());
        let Some((key, value)) = line.split_once('=').filter(|_| !is_continued) else { continue };
        let (key, value) = (key.trim(), value.trim());
        match &mut section {
            Section::Other => {}
            Section::Dependencies => {
                let (name, attribute) = key.split_once('.').unwrap_or((key, ""));
                let is_inherited = match attribute {
                    "workspace" => value == "true",
                    "" => value.replace(' ', "").contains("workspace=true"),
                    // Others, such as features, may stand beside `NAME.workspace`.
                    _ => !matches!(attribute, "version" | "path" | "git"),
                };
                if !is_inherited {
                    found.push((i + 1, name.trim_matches('"')));
                }
            }
            Section::Dependency { is_inherited, .. } => *is_inherited |= (key, value) == ("workspace", "true"),
        }
    }
    found.extend(section.take_unproven());
    found.sort_unstable();
    found
}

/// What the lines under a header mean.
enum Section<'t> {
    /// `[dependencies]`, `[target.X.dev-dependencies]`: one dependency a line.
    Dependencies,
    /// `[dependencies.NAME]`: one attribute a line.
    Dependency {
        line: usize,
        name: &'t str,
        is_inherited: bool,
    },
    Other,
}

impl<'t> Section<'t> {
    fn of(header: &'t str, line: usize) -> Self {
        let header = header.trim_matches(['[', ']']);
        let is_table = |part: &str| matches!(part, "dependencies" | "dev-dependencies" | "build-dependencies");
        if header.starts_with("workspace") {
            return Self::Other;
        }
        match header.rsplit_once('.') {
            None if is_table(header) => Self::Dependencies,
            Some((_, last)) if is_table(last) => Self::Dependencies,
            Some((before, name)) if is_table(before.rsplit('.').next().unwrap_or("")) => {
                Self::Dependency { line, name, is_inherited: false }
            }
            _ => Self::Other,
        }
    }

    /// The dependency whose section has ended without inheriting.
    fn take_unproven(&self) -> Option<(usize, &'t str)> {
        match self {
            Self::Dependency { line, name, is_inherited: false } => Some((*line, name)),
            Self::Dependency { .. } | Self::Dependencies | Self::Other => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::places;
    use super::*;

    #[test]
    fn a_dependency_with_a_version_of_its_own_is_found() {
        let text = "[package]\nname = \"x\"\nversion = \"1\"\n\n[dependencies]\nanyhow.workspace = true\nlibc = \"0.2\"\n\
                    nix = { workspace = true, features = [\n    \"fs\",\n] }\nserde = { version = \"1\" } # why\n\n\
                    [target.'cfg(unix)'.dev-dependencies]\ntar.features = []\ntar.version = \"1\"\ntoml.path = \"x\"\nzstd = \"1\"\n\n\
                    [dependencies.good]\nworkspace = true\n[build-dependencies.bad]\nversion = \"1\"\n[lints]\nworkspace = true\n";
        let files = [("x/Cargo.toml", text), ("deltabox-ebpf/Cargo.toml", "[dependencies]\naya = \"1\"\n")];
        assert_eq!(
            places(check, &files),
            [
                "x/Cargo.toml:7",
                "x/Cargo.toml:11",
                "x/Cargo.toml:15",
                "x/Cargo.toml:16",
                "x/Cargo.toml:17",
                "x/Cargo.toml:21",
            ]
        );
    }

    #[test]
    fn the_workspace_itself_declares_versions() {
        let text = "[workspace]\nmembers = [\n  \"x\",\n]\n\n[workspace.dependencies]\nanyhow = \"1\"\n";
        assert_eq!(places(check, &[("Cargo.toml", text)]), [] as [&str; 0]);
    }
}
