//! `deltabox create`.

use std::path::PathBuf;

use crate::engine::{CreateRequest, SandboxReport};
use crate::sandbox::{BaseRef, Limits, Net, PoolBounds, SandboxId, SandboxSpec};

use super::{Context, Failure, Outcome, parse, print};

/// Makes a sandbox and prints its id.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    deltabox create                                     named by the engine\n  \
    deltabox create dev --memory 2G --pids 500\n  \
    deltabox create dev --base ./rootfs --net host\n  \
    deltabox create dev --with /home/me/.cargo --env CI=1")]
pub(super) struct Args {
    /// Its name, and its host name inside: a-z, 0-9 and -.
    name: Option<SandboxId>,
    #[command(flatten)]
    spec: SpecArgs,
}

/// What a sandbox is to be: shared with `run`.
#[derive(Debug, clap::Args)]
pub(super) struct SpecArgs {
    /// Read-only root it starts from: `host`, a directory (with a slash or `.`), or an imported image.
    #[arg(long, value_name = "host|DIR|IMAGE", default_value = "host", value_parser = parse::parse_base)]
    base: BaseRef,
    /// A directory of the host that is to exist inside, on top of `--base host` (repeatable).
    #[arg(long, value_name = "DIR", value_parser = parse::parse_path)]
    with: Vec<PathBuf>,
    /// Its network: nothing but loopback, or the host's own.
    #[arg(long, value_name = "none|host", default_value = "none", value_parser = parse_net)]
    net: Net,
    /// Most memory in bytes; K, M, G, T are powers of 1024.
    #[arg(long, value_name = "B", value_parser = parse::parse_bytes)]
    memory: Option<u64>,
    /// Most processes and threads.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pids: Option<u64>,
    /// Environment of every command (repeatable).
    #[arg(long, value_name = "K=V", value_parser = parse::parse_env)]
    env: Vec<String>,
    /// Merge layers in the background when checkpoints have made more of them than this; 480: never.
    #[arg(long, value_name = "N", default_value_t = SandboxSpec::default().merge_above, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=480))]
    merge_above: usize,
    /// Most memory of the templates of its checkpoints, bytes; K, M, G, T are powers of 1024.
    #[arg(long, value_name = "B", value_parser = parse::parse_bytes)]
    pool_memory: Option<u64>,
    /// Most templates: one for each process of each checkpoint that has changed since the one before.
    #[arg(long, value_name = "N")]
    pool_templates: Option<usize>,
}

fn parse_net(text: &str) -> Result<Net, String> {
    match text {
        "none" => Ok(Net::None),
        "host" => Ok(Net::Host),
        _ => Err("none or host".to_owned()),
    }
}

impl SpecArgs {
    pub(super) fn into_spec(self) -> Result<SandboxSpec, Failure> {
        let base = match self.base {
            BaseRef::Host { .. } => BaseRef::Host { with: self.with },
            other if self.with.is_empty() => other,
            _ => return Err(Failure::usage("--with goes with `--base host` only", "see `deltabox help create`")),
        };
        let limits = Limits { memory_bytes: self.memory, n_pids: self.pids };
        let pool = PoolBounds { n_templates: self.pool_templates, bytes: self.pool_memory };
        Ok(SandboxSpec { base, net: self.net, limits, env: self.env, merge_above: self.merge_above, pool })
    }
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let request = CreateRequest { name: args.name, spec: args.spec.into_spec()? };
    let report: SandboxReport = context.client()?.post("/v1/sandboxes", &request)?;
    if context.json {
        print::json(&report)?
    } else {
        print::line(report.id.as_str())?
    }
    Ok(0)
}
