//! Finding out by doing: run it, link with it.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::workspace::Workspace;

/// The first line that the program prints, or why it cannot be run.
pub(super) fn run(program: impl AsRef<Path>, args: &[&str]) -> Result<String, String> {
    output(&mut Command::new(program.as_ref()), args)
}

/// As [`run`], of a command begun elsewhere.
pub(super) fn output(command: &mut Command, args: &[&str]) -> Result<String, String> {
    let output = command.args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|err| format!("{}: {err}", command.get_program().display()))?;
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, last_line(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned())
}

/// The version of a C library, from its own description.
pub(super) fn library(name: &str) -> Result<String, String> {
    run("pkg-config", &["--modversion", name])
}

const PROGRAM: &str = "#include <stdio.h>\n#include <linux/types.h>\nint main(void) { return puts(\"ok\") < 0; }\n";

/// Compiles, links and runs a C program.
pub(super) fn link(workspace: &Workspace, flags: &[&str]) -> Result<String, String> {
    fs::create_dir_all(&workspace.target).map_err(|err| format!("{}: {err}", workspace.target.display()))?;
    // Two runs at the same time must not execute each other's half-written program.
    let binary = workspace.target.join(format!("setup-probe-{}{}", std::process::id(), flags.concat()));
    let result = compile(&binary, flags).and_then(|()| match run(&binary, &[])?.as_str() {
        "ok" => Ok(format!("cc {}", flags.join(" ")).trim_end().to_owned()),
        other => Err(format!("the compiled program printed `{other}`")),
    });
    // It is not there when compiling failed.
    let _ = fs::remove_file(&binary);
    result
}

fn compile(binary: &Path, flags: &[&str]) -> Result<(), String> {
    let mut command = Command::new("cc");
    command.args(flags).args(["-x", "c", "-o"]).arg(binary).arg("-");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|err| format!("cc: {err}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // When cc ends early this fails too, and its own status says more.
        let _ = stdin.write_all(PROGRAM.as_bytes());
    }
    let output = child.wait_with_output().map_err(|err| format!("cc: {err}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("cc {}: {}", flags.join(" "), first_error(&output.stderr)))
    }
}

/// The line that names the cause: compilers and linkers print it before their summary.
fn first_error(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let error = text.lines().find(|line| line.contains("error") || line.contains("cannot find"));
    error.map_or_else(|| last_line(stderr), |line| line.trim().to_owned())
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).lines().last().unwrap_or("no message").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_taken_from_the_linkers_words() {
        let stderr =
            b"/usr/bin/ld: cannot find -lc: No such file or directory\ncollect2: error: ld returned 1 exit status\n";
        assert_eq!(first_error(stderr), "/usr/bin/ld: cannot find -lc: No such file or directory");
        assert_eq!(first_error(b""), "no message");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_and_not_a_crash() {
        assert!(run("/nonexistent/program", &[]).is_err());
        assert_eq!(run("sh", &["-c", "echo one; echo two"]), Ok("one".to_owned()));
        assert_eq!(run("sh", &["-c", "echo bad >&2; exit 3"]), Err("exit status: 3: bad".to_owned()));
    }
}
