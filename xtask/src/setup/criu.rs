//! CRIU 4 for Debian releases whose own is too old: unpacked beside the system, which stays as it is.
//!
//! apt works on a state directory of its own with an empty dpkg status, so it downloads CRIU with all its
//! libraries, libc included; they are unpacked under the target directory and run by their own loader.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::probe;
use crate::workspace::{self, Workspace};

/// The Debian release with CRIU 4.1.1. Its packages are unpacked, never installed.
const SUITE: &str = "trixie";

/// Where CRIU 4 is: ours, or the system's when it is new enough.
pub(super) fn check(workspace: &Workspace) -> Result<String, String> {
    let Some(program) = find(workspace).or_else(|| workspace::find_program("criu")) else {
        return Err("not on PATH and not in the target directory".to_owned());
    };
    let version = probe::run(&program, &["--version"])?;
    match parse_major(&version) {
        Some(4..) => Ok(format!("{version} ({})", program.display())),
        _ => Err(format!("{}: `{version}`, 4 is needed", program.display())),
    }
}

/// Our own, if it is there.
pub(crate) fn find(workspace: &Workspace) -> Option<PathBuf> {
    Some(prefix(workspace).join("criu")).filter(|path| path.is_file())
}

/// The major number in `Version: 4.1.1`.
fn parse_major(version: &str) -> Option<u32> {
    version.strip_prefix("Version:")?.trim().split('.').next()?.parse().ok()
}

fn prefix(workspace: &Workspace) -> PathBuf {
    workspace.target.join("criu")
}

/// Downloads and unpacks; the prefix appears whole or not at all.
pub(super) fn install(workspace: &Workspace) -> anyhow::Result<()> {
    for program in ["apt-get", "dpkg-deb"] {
        if workspace::find_program(program).is_none() {
            bail!("no {program} here; install CRIU 4 with your package manager");
        }
    }
    let mirror = find_mirror()?;
    let work = workspace.target.join(format!("criu-{}", std::process::id()));
    let unpacked = work.join("prefix");
    let result = download_and_unpack(&mirror, &work, &unpacked).and_then(|()| {
        let prefix = prefix(workspace);
        if prefix.exists() {
            fs::remove_dir_all(&prefix).with_context(|| format!("remove {}", prefix.display()))?;
        }
        fs::rename(&unpacked, &prefix).with_context(|| format!("rename to {}", prefix.display()))
    });
    // Only downloads; a rest of them harms nobody.
    let _ = fs::remove_dir_all(&work);
    result
}

fn download_and_unpack(mirror: &Mirror, work: &Path, unpacked: &Path) -> anyhow::Result<()> {
    for dir in ["lists/partial", "cache/archives/partial", "parts", "prefix"] {
        fs::create_dir_all(work.join(dir)).with_context(|| format!("create {dir} in {}", work.display()))?;
    }
    write(&work.join("status"), "")?;
    write(&work.join("sources.list"), &format!("deb [{}] {} {SUITE} main\n", mirror.options(), mirror.uri))?;
    let config = work.join("apt.conf");
    write(&config, &apt_config(work))?;
    let apt = |args: &[&str]| {
        workspace::run(Command::new("apt-get").arg("-q").args(args).env("APT_CONFIG", &config).current_dir(work))
    };
    apt(&["update"])?;
    // crit, which shows and edits images, comes with the Python and the protobuf module that fit it.
    apt(&["install", "-y", "--download-only", "criu", "python3-pycriu"])?;
    let archives = work.join("cache/archives");
    for entry in fs::read_dir(&archives).with_context(|| format!("list {}", archives.display()))? {
        let package = entry?.path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            workspace::capture(Command::new("dpkg-deb").arg("-x").arg(&package).arg(unpacked))?;
        }
    }
    let criu = r#"--argv0 criu "$p/usr/sbin/criu""#;
    write_program(&unpacked.join("criu"), &script("", criu))?;
    let python = r#"export PYTHONHOME="$p/usr" PYTHONPATH="$p/usr/lib/python3/dist-packages""#;
    write_program(&unpacked.join("crit"), &script(python, r#""$p/usr/bin/python3" -m crit"#))
}

/// apt's configuration for a run that knows nothing of the installed system.
fn apt_config(work: &Path) -> String {
    let work = work.display();
    format!(
        r#"Dir::State "{work}";
Dir::State::Lists "{work}/lists";
Dir::State::status "{work}/status";
Dir::Cache "{work}/cache";
Dir::Etc::sourcelist "{work}/sources.list";
Dir::Etc::sourceparts "{work}/parts";
Dir::Etc::preferencesparts "{work}/parts";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
"#
    )
}

/// A script that runs an unpacked program with the loader and libraries that came with it, wherever the prefix lies.
fn script(prepare: &str, program: &str) -> String {
    let (libraries, loader) = match env::consts::ARCH {
        "aarch64" => ("usr/lib/aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
        _ => ("usr/lib/x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
    };
    format!(
        r#"#!/bin/sh
p=$(dirname "$(readlink -f "$0")")
{prepare}
exec "$p/{libraries}/{loader}" --library-path "$p/{libraries}" {program} "$@"
"#
    )
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).with_context(|| format!("chmod {}", path.display()))
}

/// Where this machine gets its own Debian packages.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    /// Key file named by the source; apt's own trusted keys when absent.
    signed_by: Option<String>,
}

impl Mirror {
    /// The bracketed options of a one-line source.
    fn options(&self) -> String {
        let signed_by = self.signed_by.as_ref().map_or(String::new(), |key| format!(" signed-by={key}"));
        let arch = if env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        format!("arch={arch}{signed_by}")
    }
}

/// The mirror that serves this machine's own release.
fn find_mirror() -> anyhow::Result<Mirror> {
    let os_release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let field = |key: &str| {
        os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(|v| v.trim_matches('"')))
    };
    let (Some("debian"), Some(codename)) = (field("ID"), field("VERSION_CODENAME")) else {
        bail!("this is not a Debian release; install CRIU 4 with your package manager");
    };
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    let mirror = texts.filter_map(|text| parse_mirror(&text, codename)).next();
    mirror.with_context(|| format!("no source of {codename} main under /etc/apt; install CRIU 4 yourself"))
}

/// The first source of `main` of release `codename` in a sources file of either format.
fn parse_mirror(text: &str, codename: &str) -> Option<Mirror> {
    text.lines().find_map(|line| parse_one_line(line, codename)).or_else(|| {
        let stanzas = text.split("\n\n");
        stanzas.filter_map(|stanza| parse_stanza(stanza, codename)).next()
    })
}

/// `deb [signed-by=KEY arch=amd64] URI SUITE COMPONENT...`
fn parse_one_line(line: &str, codename: &str) -> Option<Mirror> {
    let mut rest = line.trim().strip_prefix("deb ")?.trim();
    let mut options = "";
    if let Some(bracketed) = rest.strip_prefix('[') {
        let (inside, after) = bracketed.split_once(']')?;
        (options, rest) = (inside, after);
    }
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    if words.next()? != codename || !words.any(|component| component == "main") {
        return None;
    }
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
    Some(Mirror { uri, signed_by })
}

/// A paragraph of `Key: value` lines.
fn parse_stanza(stanza: &str, codename: &str) -> Option<Mirror> {
    let field = |key: &str| {
        stanza.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(key).then_some(value.trim())
        })
    };
    let has = |key: &str, word: &str| field(key).is_some_and(|value| value.split_whitespace().any(|w| w == word));
    if !has("Types", "deb") || !has("Suites", codename) || !has("Components", "main") || has("Enabled", "no") {
        return None;
    }
    let uri = field("URIs")?.split_whitespace().next()?.to_owned();
    // An armored key may also stand in the source itself, on lines of its own: then the value is empty.
    let signed_by = field("Signed-By").filter(|key| key.starts_with('/')).map(str::to_owned);
    Some(Mirror { uri, signed_by })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_read_from_a_deb822_file() {
        let text = "Types: deb\n# a comment\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\n\
                    Components: main\n\nTypes: deb deb-src\nURIs: http://mirror.example/debian http://other.example\n\
                    Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /usr/share/keyrings/k.gpg\n";
        assert_eq!(
            parse_mirror(text, "bookworm"),
            Some(Mirror {
                uri: "http://mirror.example/debian".to_owned(),
                signed_by: Some("/usr/share/keyrings/k.gpg".to_owned())
            })
        );
        assert_eq!(parse_mirror(text, "trixie"), None);
        assert_eq!(parse_mirror(&text.replace("Types", "Enabled: no\nTypes"), "bookworm"), None);
    }

    #[test]
    fn the_mirror_is_read_from_a_one_line_file() {
        let text = "# deb http://old.example bookworm main\ndeb-src http://src.example bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm contrib main\n";
        assert_eq!(
            parse_mirror(text, "bookworm"),
            Some(Mirror { uri: "http://mirror.example/debian".to_owned(), signed_by: Some("/k.gpg".to_owned()) })
        );
        let bare = parse_mirror("deb http://mirror.example/debian bookworm main", "bookworm");
        assert_eq!(bare, Some(Mirror { uri: "http://mirror.example/debian".to_owned(), signed_by: None }));
        assert_eq!(parse_mirror("deb http://mirror.example/debian bookworm contrib", "bookworm"), None);
    }

    #[test]
    fn only_a_version_line_of_criu_is_a_version() {
        assert_eq!(parse_major("Version: 4.1.1"), Some(4));
        assert_eq!(parse_major("Version: 3.17"), Some(3));
        assert_eq!(parse_major("criu"), None);
    }
}
