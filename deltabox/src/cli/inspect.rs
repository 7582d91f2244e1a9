//! `deltabox inspect`.

use serde_json::json;

use crate::daemon::client::{Client, ClientError};
use crate::daemon::types::{ExecList, ImageList};
use crate::engine::{BaseReport, ExecReport, Exit, SandboxReport, Stdio};
use crate::sandbox::Net;

use super::{Context, Failure, Outcome, ls, parse, print};

/// Shows all there is to know about a sandbox and its commands, or about an image.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  deltabox inspect dev\n  deltabox inspect dev --json | jq .sandbox.init_pid")]
pub(super) struct Args {
    /// A sandbox, or else an imported image.
    #[arg(value_name = "SANDBOX|IMAGE", value_parser = parse::parse_image)]
    name: String,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    match client.get::<SandboxReport>(&format!("/v1/sandboxes/{}", args.name)) {
        Ok(sandbox) => {
            let held: ExecList = client.get(&format!("/v1/sandboxes/{}/execs", args.name))?;
            show_sandbox(&sandbox, &held.execs, context.json)?;
        }
        Err(ClientError::Answer { status: 404, .. }) => show_image(&find_image(&client, &args.name)?, context.json)?,
        Err(error) => return Err(error.into()),
    }
    Ok(0)
}

fn find_image(client: &Client, name: &str) -> Result<BaseReport, Failure> {
    let list: ImageList = client.get("/v1/images")?;
    list.images.into_iter().find(|image| image.name == name).ok_or_else(|| {
        let hint = "`deltabox ls` and `deltabox image ls` show what there is";
        Failure::new(1, "not_found", format!("no sandbox and no image `{name}`"), hint)
    })
}

fn show_sandbox(sandbox: &SandboxReport, execs: &[ExecReport], json: bool) -> Result<(), Failure> {
    if json {
        return print::json(&json!({"sandbox": sandbox, "execs": execs}));
    }
    let limit = |limit: Option<String>| limit.unwrap_or_else(|| "none".to_owned());
    let net = match sandbox.spec.net {
        Net::None => "none",
        Net::Host => "host",
    };
    print::fields(&[
        ("sandbox", sandbox.id.to_string()),
        ("state", ls::state(&sandbox.state)),
        ("age", print::age(sandbox.created_unix_ms)),
        ("base", sandbox.spec.base.to_string()),
        ("net", net.to_owned()),
        ("memory limit", limit(sandbox.spec.limits.memory_bytes.map(print::size))),
        ("process limit", limit(sandbox.spec.limits.n_pids.map(|n| n.to_string()))),
        ("environment", sandbox.spec.env.join(" ")),
        ("init pid", sandbox.init_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
        ("cgroup", sandbox.cgroup.display().to_string()),
        ("live layer", sandbox.live_layer.display().to_string()),
        ("created in", format!("{} us", sandbox.create_us)),
    ])?;
    if execs.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = execs.iter().map(exec_row).collect();
    print::text("\n")?;
    print::table(&[">PID", "STREAMS", "STATE", ">AGE", "COMMAND"], &rows)
}

fn exec_row(exec: &ExecReport) -> Vec<String> {
    let streams = match exec.stdio {
        Stdio::Pipes { .. } => "pipes",
        Stdio::Pty { .. } => "tty",
        Stdio::Log => "log",
    };
    let state = match exec.exit {
        None if exec.attached => "attached".to_owned(),
        None => "running".to_owned(),
        Some(Exit::Exited { status }) => format!("exited {status}"),
        Some(Exit::Signaled { signal, .. }) => format!("signal {signal}"),
        Some(Exit::Lost) => "lost".to_owned(),
    };
    vec![exec.pid.to_string(), streams.to_owned(), state, print::age(exec.started_unix_ms), exec.argv.join(" ")]
}

fn show_image(image: &BaseReport, json: bool) -> Result<(), Failure> {
    if json {
        return print::json(&json!({"image": image}));
    }
    print::fields(&[
        ("image", image.name.clone()),
        ("imported from", image.source.clone()),
        ("age", print::age(image.imported_unix_ms)),
        ("entries", image.n_entries.to_string()),
        ("size", print::size(image.len_bytes)),
    ])?;
    image.notes.iter().try_for_each(|note| print::line(&format!("note: {}", print::printable(note))))
}
