//! Where the workspace lies, and how its commands are started.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

/// The workspace this xtask belongs to.
pub(crate) struct Workspace {
    /// Directory of the workspace's Cargo.toml.
    pub(crate) root: PathBuf,
    /// Cargo's target directory, wherever the user's configuration puts it.
    pub(crate) target: PathBuf,
}

/// Which cargo profile a binary is built with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn locate() -> anyhow::Result<Self> {
        let mut command = Command::new(cargo_program());
        command.args(["metadata", "--no-deps", "--format-version", "1"]);
        if let Some(manifest_dir) = env::var_os("CARGO_MANIFEST_DIR") {
            command.current_dir(manifest_dir);
        }
        let metadata: Value = serde_json::from_str(&capture(&mut command)?).context("read cargo metadata")?;
        let path = |key: &str| {
            metadata[key].as_str().map(PathBuf::from).with_context(|| format!("cargo metadata has no `{key}`"))
        };
        Ok(Self { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// `cargo SUBCOMMAND`, to be run at the root.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = Command::new(cargo_program());
        command.arg(subcommand).current_dir(&self.root);
        command
    }

    /// Builds one binary and gives its absolute path.
    pub(crate) fn build_binary(&self, package: &str, binary: &str, profile: Profile) -> anyhow::Result<PathBuf> {
        let mut command = self.cargo("build");
        command.args(["--package", package, "--bin", binary, "--message-format", "json-render-diagnostics"]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        println!("$ {}", line_of(&command));
        // Diagnostics and progress go to stderr, the list of what was built to stdout.
        let messages = capture(command.stderr(Stdio::inherit()))?;
        parse_executable(&messages, binary).with_context(|| format!("cargo built no binary `{binary}` of `{package}`"))
    }
}

/// The path of `binary` among cargo's JSON messages.
fn parse_executable(messages: &str, binary: &str) -> Option<PathBuf> {
    messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let is_it = message["reason"] == "compiler-artifact" && message["target"]["name"] == binary;
        if is_it { message["executable"].as_str().map(PathBuf::from) } else { None }
    })
}

/// The cargo that runs us, else the one on PATH.
fn cargo_program() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// A program that PATH leads to.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Prints the command, runs it with our own streams, and fails unless it succeeds.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let line = line_of(command);
    println!("$ {line}");
    let status = command.status().with_context(|| format!("start `{line}`"))?;
    if !status.success() {
        bail!("`{line}`: {status}");
    }
    Ok(())
}

/// Runs a command and gives its standard output; fails with its standard error (unless that is inherited).
pub(crate) fn capture(command: &mut Command) -> anyhow::Result<String> {
    let line = line_of(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}`: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{line}` did not print UTF-8"))
}

/// How a person would type the command.
pub(crate) fn line_of(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        line.push(' ');
        if arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "'\"$;&|<>()*?".contains(c)) {
            line.push_str(&format!("'{}'", arg.replace('\'', "'\\''")));
        } else {
            line.push_str(&arg);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_read_from_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"deltabox","kind":["lib"]},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"deltabox","kind":["bin"]},"executable":"/t/deltabox"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(parse_executable(messages, "deltabox"), Some(PathBuf::from("/t/deltabox")));
        assert_eq!(parse_executable(messages, "other"), None);
    }

    #[test]
    fn a_command_line_is_printed_as_it_would_be_typed() {
        let mut command = Command::new("/usr/bin/sh");
        command.args(["-c", "exit '7'", "", "x"]);
        assert_eq!(line_of(&command), r"sh -c 'exit '\''7'\''' '' x");
    }
}
