//! `deltabox run`: create, exec in the foreground, remove.

use crate::daemon::client::{Client, SignalHold};
use crate::engine::{CreateRequest, SandboxReport};
use crate::sandbox::SandboxId;

use super::create::SpecArgs;
use super::exec::{HowArgs, foreground};
use super::{Context, Failure, Outcome};

/// Runs a command in a new sandbox, which is removed afterwards; the exit status is the command's.
#[derive(Debug, clap::Args)]
#[command(after_help = "The command has a terminal if standard input and output are terminals.\n\n\
    Examples:\n  \
    deltabox run -- bash\n  \
    deltabox run --net host --memory 1G -- pip download requests\n  \
    deltabox run --keep --name try -- make test         the sandbox stays: deltabox exec try -- ...")]
pub(super) struct Args {
    /// Its name; generated when absent.
    #[arg(long, value_name = "NAME")]
    name: Option<SandboxId>,
    /// Do not remove the sandbox afterwards.
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    how: HowArgs,
    /// Program and arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    // From here to the session a Ctrl-C waits: the sandbox that is being made must be removed first.
    let hold = SignalHold::begin()
        .map_err(|error| Failure::new(1, "local", format!("hold signals: {error}"), "check the system's limits"))?;
    let client = context.client()?;
    let request = CreateRequest { name: args.name, spec: args.spec.into_spec()? };
    let sandbox: SandboxReport = client.post("/v1/sandboxes", &request)?;
    let mut removal = Removal { client: &client, id: &sandbox.id, armed: !args.keep };
    let how = args.how.with_terminal_if_ours(context.json);
    let outcome = foreground(&client, &sandbox.id, &how, Vec::new(), args.command, context.json);
    let removed = removal.remove();
    drop(hold);
    // What the command ended with says more than what became of its sandbox.
    match (outcome, removed) {
        (Ok(0), Err(failure)) => Err(failure),
        (outcome, Err(failure)) => {
            failure.report(context.json && outcome.is_ok());
            outcome
        }
        (outcome, Ok(())) => outcome,
    }
}

/// Removes the sandbox, on whichever way out.
struct Removal<'a> {
    client: &'a Client,
    id: &'a SandboxId,
    armed: bool,
}

impl Removal<'_> {
    fn remove(&mut self) -> Result<(), Failure> {
        if std::mem::take(&mut self.armed) {
            self.client.delete(&format!("/v1/sandboxes/{}", self.id))?;
        }
        Ok(())
    }
}

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        if let Err(failure) = self.remove() {
            failure.report(false);
        }
    }
}
