//! `deltabox inspect`.

use serde_json::json;

use crate::daemon::client::{Client, ClientError};
use crate::daemon::types::{ExecList, ImageList};
use crate::engine::{
    BaseReport, BoundReport, DiskReport, ExecReport, Exit, PoolReport, SandboxReport, Stdio, TreeNode, TreeReport,
};
use crate::sandbox::Net;

use super::parse::{self, Target};
use super::{Context, Failure, Outcome, ls, print, tree};

/// Shows all there is to know about a sandbox and its commands, a checkpoint, or an image.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  deltabox inspect dev\n  deltabox inspect dev --json | jq .sandbox.init_pid")]
pub(super) struct Args {
    /// A sandbox, a checkpoint of one, or else an imported image.
    #[arg(value_name = "SANDBOX[@CHECKPOINT]|IMAGE", value_parser = parse::parse_target)]
    target: Target,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    let Target { sandbox: name, checkpoint } = args.target;
    if let Some(checkpoint) = checkpoint {
        let tree: TreeReport = client.get(&format!("/v1/sandboxes/{name}/checkpoints"))?;
        show_checkpoint(&find_checkpoint(tree, &checkpoint)?, context.json)?;
        return Ok(0);
    }
    match client.get::<SandboxReport>(&format!("/v1/sandboxes/{name}")) {
        Ok(sandbox) => {
            let held: ExecList = client.get(&format!("/v1/sandboxes/{name}/execs"))?;
            let disk: DiskReport = client.get(&format!("/v1/sandboxes/{name}/disk"))?;
            let tree: TreeReport = client.get(&format!("/v1/sandboxes/{name}/checkpoints"))?;
            show_sandbox(&sandbox, &held.execs, (disk, tree.pool), context.json)?;
        }
        Err(ClientError::Answer { status: 404, .. }) => {
            show_image(&find_image(&client, name.as_str())?, context.json)?;
        }
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

fn find_checkpoint(tree: TreeReport, text: &str) -> Result<TreeNode, Failure> {
    let TreeReport { sandbox, checkpoints, .. } = tree;
    let is_it = |node: &TreeNode| node.checkpoint.id == text || node.checkpoint.name.as_deref() == Some(text);
    checkpoints.into_iter().find(is_it).ok_or_else(|| {
        let message = format!("sandbox `{sandbox}` has no checkpoint `{text}`");
        Failure::new(1, "no_checkpoint", message, format!("`deltabox tree {sandbox}` shows its checkpoints"))
    })
}

fn show_checkpoint(node: &TreeNode, json: bool) -> Result<(), Failure> {
    if json {
        return print::json(&json!({"checkpoint": node}));
    }
    let one = &node.checkpoint;
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    print::fields(&[
        ("checkpoint", format!("{}@{}", one.sandbox, one.id)),
        ("name", or_dash(&one.name)),
        ("parent", or_dash(&one.parent)),
        ("age", print::age(one.created_unix_ms)),
        ("holds", if one.fs_only { "files" } else { "files and processes" }.to_owned()),
        ("froze a layer", yes_no(one.fs_frozen)),
        ("durable", yes_no(one.durable)),
        ("layers", node.n_layers.to_string()),
        ("damage", or_dash(&node.damage)),
        ("own", print::size(node.own_bytes)),
        ("shared", print::size(node.shared_bytes)),
        ("stopped", format!("{} us", one.stopped_us)),
        ("made in", format!("{} us", one.total_us)),
        ("processes", format!("{} with {} threads", one.n_processes, one.n_threads)),
        ("moved", format!("{} open file descriptions", one.n_descriptions)),
        ("templates", format!("{} ({})", tree::templates(node), print::size(tree::held_bytes(node)))),
        ("rollback", tree::back(node)),
        ("refused", or_dash(&node.outlook.as_ref().and_then(|outlook| outlook.refused.clone()))),
    ])
}

fn show_sandbox(
    sandbox: &SandboxReport,
    execs: &[ExecReport],
    (disk, pool): (DiskReport, PoolReport),
    json: bool,
) -> Result<(), Failure> {
    if json {
        return print::json(&json!({"sandbox": sandbox, "execs": execs, "disk": disk, "pool": pool}));
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
        ("checkpoint", sandbox.head.clone().unwrap_or_else(|| "-".to_owned())),
        ("epoch", sandbox.epoch.to_string()),
        ("layers", disk.n_layers.to_string()),
        ("disk, since then", print::size(disk.live_bytes)),
        ("disk, own", print::size(disk.own_bytes)),
        ("disk, shared", print::size(disk.shared_bytes)),
        ("templates", bound(&pool.sandbox)),
        ("templates, all", bound(&pool.host)),
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

/// What templates take of what they may.
fn bound(BoundReport { held, most }: &BoundReport) -> String {
    let or_none = |most: Option<String>| most.unwrap_or_else(|| "any".to_owned());
    let (n, bytes) = (most.n_templates.map(|n| n.to_string()), most.bytes.map(print::size));
    format!("{} of {}, {} of {}", held.n_templates, or_none(n), print::size(held.bytes), or_none(bytes))
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
