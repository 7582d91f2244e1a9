//! `deltabox serve`.

use std::io::{self, IsTerminal};

use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::daemon::{ServeRequest, serve};
use crate::pool::Pool;
use crate::sandbox::PoolBounds;

use super::{Context, Failure, Outcome, parse, print};

/// Runs the daemon in the foreground. Other commands start it by themselves when they need it.
#[derive(Debug, clap::Args)]
#[command(after_help = "SIGTERM ends it; sandboxes live on, and the next daemon takes them up. It logs to standard \
    error, or to STORE/daemon.log\nwhen another command started it; DELTABOX_LOG sets what (info, debug, \
    deltabox::engine=trace).")]
pub(super) struct Args {
    /// Write one byte to this descriptor when connections are accepted.
    #[arg(long, value_name = "N")]
    ready_fd: Option<u32>,
    /// Most memory of templates of all sandboxes, bytes; K, M, G, T are powers of 1024 [default: $DELTABOX_POOL_MEMORY
    /// or half of the machine's].
    #[arg(long, value_name = "B", value_parser = parse::parse_bytes)]
    pool_memory: Option<u64>,
    /// Most templates of all sandboxes [default: $DELTABOX_POOL_TEMPLATES or no bound].
    #[arg(long, value_name = "N")]
    pool_templates: Option<usize>,
}

impl Args {
    /// What was said, else the environment, else the default.
    fn pool(&self) -> Result<PoolBounds, Failure> {
        let default = Pool::default_bounds();
        let bytes = self
            .pool_memory
            .map_or_else(|| of_environment("DELTABOX_POOL_MEMORY", parse::parse_bytes), |n| Ok(Some(n)));
        let number = |text: &str| text.parse::<usize>().map_err(|error| error.to_string());
        let n = self.pool_templates.map_or_else(|| of_environment("DELTABOX_POOL_TEMPLATES", number), |n| Ok(Some(n)));
        Ok(PoolBounds { bytes: bytes?.or(default.bytes), n_templates: n?.or(default.n_templates) })
    }
}

fn of_environment<T>(name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, Failure> {
    let Some(text) = std::env::var_os(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let text = text.to_string_lossy();
    let invalid = |error| Failure::usage(format!("{name}: {error}"), "see `deltabox help serve`");
    parse(&text).map(Some).map_err(invalid)
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let filter = EnvFilter::try_from_env("DELTABOX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let color = io::stderr().is_terminal();
    // A log that cannot be written (disk full) is lost; to complain about it on the same stream would panic.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(color);
    log.log_internal_errors(false).init();
    let request = ServeRequest { place: context.place.clone(), ready_fd: args.ready_fd, pool: args.pool()? };
    let ready = json!({
        "socket": context.place.socket,
        "store": context.place.store,
        "pid": std::process::id(),
    });
    let on_ready = || {
        // Who started us may have gone; that is no reason to end.
        let _ = if context.json {
            print::json(&ready)
        } else {
            print::line(&format!("listening on {}", context.place.socket.display()))
        };
    };
    serve(&request, on_ready).map_err(|error| Failure::new(1, "serve", error.to_string(), error.hint()))?;
    Ok(0)
}
