//! The command line: one file per command. Parses, calls the daemon, prints reports; decides nothing else.
//!
//! Exit codes are a contract: 0, 1 error, 2 usage, 3 refused, 125 engine unreachable; `exec`, `run` and
//! `attach` exit with the command's own. With `--json` a command prints exactly one JSON object on standard
//! output, or one `{"error": {...}}` on standard error.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing reports is what this module is for")]

mod attach;
mod bracket;
mod checkpoint;
mod create;
mod diff;
mod doctor;
mod exec;
mod gc;
mod image;
mod inspect;
mod kill;
mod logs;
mod ls;
mod parse;
mod print;
mod ps;
mod rm;
mod rollback;
mod run;
mod serve;
mod stats;
mod tree;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::daemon::Place;
use crate::daemon::client::{Client, ClientError};
use crate::daemon::types::{ErrorBody, ErrorDetail};

/// Sandboxes for agents: files and processes together, on an unmodified Linux kernel.
#[derive(Debug, Parser)]
#[command(
    name = "deltabox",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = false,
    after_help = "Exit codes: 0 done, 1 error, 2 usage, 3 refused, 125 engine unreachable; exec, run and attach \
                  exit with the command's own.\n\n\
                  Examples:\n  \
                  deltabox run -- bash                      a shell in a sandbox that is gone afterwards\n  \
                  deltabox create dev --memory 2G           a sandbox that stays\n  \
                  deltabox exec dev -- make -j4             a command in it\n  \
                  deltabox rm dev"
)]
struct Cli {
    /// Print one JSON object instead of text (errors on standard error, as JSON too).
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
    /// The daemon's socket [default: $DELTABOX_SOCKET or /run/deltabox/deltabox.sock].
    #[arg(long, global = true, help_heading = "Everywhere", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The store directory [default: $DELTABOX_STORE or /var/lib/deltabox].
    #[arg(long, global = true, help_heading = "Everywhere", value_name = "DIR")]
    store: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What this kernel offers, what is missing and how to get it.
    Doctor,
    Create(create::Args),
    Run(run::Args),
    Exec(exec::Args),
    Attach(attach::Args),
    Ls(ls::Args),
    Ps(ps::Args),
    Stats(stats::Args),
    Inspect(inspect::Args),
    Logs(logs::Args),
    Kill(kill::Args),
    Rm(rm::Args),
    Checkpoint(checkpoint::Args),
    Rollback(rollback::Args),
    Tree(tree::Args),
    Diff(diff::Args),
    Gc(gc::Args),
    Image(image::Args),
    Serve(serve::Args),
}

/// What every command has.
struct Context {
    place: Place,
    json: bool,
}

impl Context {
    fn client(&self) -> Result<Client, Failure> {
        Ok(Client::new(self.place.clone())?)
    }
}

/// What a command did not do, and what the program exits with.
#[derive(Debug)]
struct Failure {
    exit_code: u8,
    detail: ErrorDetail,
    /// Nobody reads our output any more: nothing more is said.
    quiet: bool,
}

/// The exit code of a command that did what it should, or why not.
type Outcome = Result<u8, Failure>;

impl Failure {
    fn new(exit_code: u8, code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let detail = ErrorDetail { code: code.to_owned(), message: message.into(), hint: hint.into() };
        Self { exit_code, detail, quiet: false }
    }

    /// With one more thing to know.
    fn with_hint(mut self, more: &str) -> Self {
        let hint = &mut self.detail.hint;
        if !hint.is_empty() {
            hint.push_str("; ");
        }
        hint.push_str(more);
        self
    }

    fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(2, "usage", message, hint)
    }

    fn report(&self, json: bool) {
        if self.quiet {
            return;
        }
        let ErrorDetail { message, hint, .. } = &self.detail;
        if json {
            let body = ErrorBody { error: self.detail.clone() };
            print::error_line(&serde_json::to_string(&body).unwrap_or_default());
        } else if hint.is_empty() {
            print::error_line(&format!("deltabox: {message}"));
        } else {
            print::error_line(&format!("deltabox: {message}; {hint}"));
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self { exit_code: error.exit_code(), detail: error.detail(), quiet: error.is_broken_pipe() }
    }
}

/// The whole program: from its arguments to its exit code.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, wants_json(&arguments)),
    };
    let context = Context { place: Place::find(cli.socket, cli.store), json: cli.json };
    let outcome = match cli.command {
        Command::Doctor => return doctor::run(&context.place.store, context.json),
        Command::Create(args) => create::run(args, &context),
        Command::Run(args) => run::run(args, &context),
        Command::Exec(args) => exec::run(args, &context),
        Command::Attach(args) => attach::run(args, &context),
        Command::Ls(args) => ls::run(args, &context),
        Command::Ps(args) => ps::run(args, &context),
        Command::Stats(args) => stats::run(args, &context),
        Command::Inspect(args) => inspect::run(args, &context),
        Command::Logs(args) => logs::run(args, &context),
        Command::Kill(args) => kill::run(args, &context),
        Command::Rm(args) => rm::run(args, &context),
        Command::Checkpoint(args) => checkpoint::run(args, &context),
        Command::Rollback(args) => rollback::run(args, &context),
        Command::Tree(args) => tree::run(args, &context),
        Command::Diff(args) => diff::run(args, &context),
        Command::Gc(args) => gc::run(&args, &context),
        Command::Image(args) => image::run(args, &context),
        Command::Serve(args) => serve::run(args, &context),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.report(cli.json);
            ExitCode::from(failure.exit_code)
        }
    }
}

/// Help and version are no errors; everything else is exit code 2.
fn usage(error: &clap::Error, json: bool) -> ExitCode {
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if json && !asked_for {
        let text = error.to_string();
        // What clap says before its usage lines, on one line.
        let words = text.lines().take_while(|line| !line.is_empty()).flat_map(str::split_whitespace);
        let message = words.skip_while(|word| *word == "error:").collect::<Vec<_>>().join(" ");
        Failure::usage(message, "see `deltabox help`").report(true);
    } else {
        // A closed output is nothing to complain about.
        let _ = error.print();
    }
    ExitCode::from(if asked_for { 0 } else { 2 })
}

/// Whether `--json` was among our own options, for a command line that did not parse.
fn wants_json(arguments: &[OsString]) -> bool {
    arguments.iter().take_while(|text| *text != "--").any(|text| text == "--json")
}

#[cfg(test)]
mod tests;
