//! `deltabox exec`, and what `run` and `attach` share with it.

use serde_json::json;

use crate::daemon::client::{Client, Ended, Local, OutputTo, is_terminal, terminal_size};
use crate::daemon::types::Started;
use crate::engine::{ExecRequest, Exit, OnDisconnect, Stdio};
use crate::sandbox::SandboxId;

use super::{Context, Failure, Outcome, bracket, parse, print};

/// Starts a command in a sandbox; the exit status is the command's.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without -t, SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to the command. With --json its \
    output is part of the object\n(the first 8 MiB of each stream).\n\n\
    Examples:\n  \
    deltabox exec dev -- make -j4\n  \
    deltabox exec -t dev -- bash                        a terminal, as ssh -t\n  \
    tar c src | deltabox exec -i dev -- tar x           -i passes standard input on\n  \
    deltabox exec -d dev -- ./server                    prints the pid inside; output: deltabox logs dev PID\n  \
    deltabox exec --bracket dev -- make check             tests whose side effects are undone\n  \
    deltabox exec -u 1000:1000 -w /src dev -- id"
)]
pub(super) struct Args {
    /// In the background: print its pid inside, write its output to its log.
    #[arg(short, long, conflicts_with_all = ["tty", "interactive", "on_disconnect"])]
    detach: bool,
    /// Without side effects: make a checkpoint, run the command, roll back. Only its output and exit status stay.
    #[arg(long, conflicts_with = "detach")]
    bracket: bool,
    #[command(flatten)]
    how: HowArgs,
    /// Environment on top of the sandbox's (repeatable).
    #[arg(long, value_name = "K=V", value_parser = parse::parse_env)]
    env: Vec<String>,
    /// The sandbox.
    sandbox: SandboxId,
    /// Program and arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// How a command runs: shared with `run`.
#[derive(Debug, clap::Args)]
pub(super) struct HowArgs {
    /// With a terminal of its own.
    #[arg(short, long)]
    tty: bool,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Working directory inside.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User (and group) inside, as numbers.
    #[arg(short, long, value_name = "UID[:GID]", value_parser = parse::parse_user)]
    user: Option<(u32, Option<u32>)>,
    /// What becomes of it when this client disappears: it ends, or goes on and can be attached to.
    #[arg(long, value_name = "end|leave", default_value = "end", value_parser = parse_on_disconnect)]
    on_disconnect: OnDisconnect,
}

fn parse_on_disconnect(text: &str) -> Result<OnDisconnect, String> {
    match text {
        "end" => Ok(OnDisconnect::End),
        "leave" => Ok(OnDisconnect::Leave),
        _ => Err("end or leave".to_owned()),
    }
}

impl HowArgs {
    /// A terminal if ours is one, and none was asked for or against (`run`).
    pub(super) fn with_terminal_if_ours(self, json: bool) -> Self {
        Self { tty: self.tty || (!json && is_terminal()), ..self }
    }

    fn request(&self, argv: Vec<String>, mut env: Vec<String>) -> ExecRequest {
        let stdio = if self.tty {
            if let Ok(term) = std::env::var("TERM")
                && !env.iter().any(|entry| entry.starts_with("TERM="))
            {
                env.push(format!("TERM={term}"));
            }
            Stdio::Pty { size: terminal_size() }
        } else {
            Stdio::Pipes { stdin: self.interactive }
        };
        let (uid, gid) = self.user.unwrap_or((0, None));
        ExecRequest { argv, env, cwd: self.workdir.clone(), uid, gid, stdio, on_disconnect: self.on_disconnect }
    }
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    if args.detach {
        let mut request = args.how.request(args.command, args.env);
        request.stdio = Stdio::Log;
        request.on_disconnect = OnDisconnect::Leave;
        let started: Started = client.post(&format!("/v1/sandboxes/{}/execs", args.sandbox), &request)?;
        if context.json {
            print::json(&started)?
        } else {
            print::line(&started.pid.to_string())?
        }
        return Ok(0);
    }
    if args.bracket {
        return bracket::run(&client, &args.sandbox, || {
            foreground(&client, &args.sandbox, &args.how, args.env, args.command, context.json)
        });
    }
    foreground(&client, &args.sandbox, &args.how, args.env, args.command, context.json)
}

/// Runs a command with our own streams and says what it ended with.
pub(super) fn foreground(
    client: &Client,
    sandbox: &SandboxId,
    how: &HowArgs,
    env: Vec<String>,
    argv: Vec<String>,
    json: bool,
) -> Outcome {
    if how.tty && json {
        return Err(Failure::usage(
            "--json does not go with -t",
            "leave -t away: the output becomes part of the object",
        ));
    }
    let request = how.request(argv, env);
    let ended = client.exec(sandbox, &request, local(how.tty, how.interactive, json))?;
    report(ended, sandbox, json)
}

/// Our side of a session. At a terminal, standard input belongs to it whether asked for or not.
pub(super) fn local(tty: bool, interactive: bool, json: bool) -> Local {
    Local {
        stdin: interactive || (tty && is_terminal()),
        tty,
        output: if json { OutputTo::Capture } else { OutputTo::Streams },
    }
}

/// The exit code of a session, and its object.
pub(super) fn report(ended: Ended, sandbox: &SandboxId, json: bool) -> Outcome {
    match ended {
        Ended::Left { signal } => Ok(128_u8.saturating_add(signal)),
        Ended::Exit { pid, exit, captured } => {
            if json {
                print::json(&json!({
                    "sandbox": sandbox,
                    "pid": pid,
                    "exit": exit,
                    "status": exit.shell_status(),
                    "stdout": String::from_utf8_lossy(&captured.stdout),
                    "stderr": String::from_utf8_lossy(&captured.stderr),
                    "truncated": captured.truncated,
                }))?;
            } else if exit == Exit::Lost {
                print::error_line(&format!("deltabox: sandbox `{sandbox}` ended under command {pid}"));
            }
            Ok(exit.shell_status())
        }
    }
}
