//! `deltabox serve`.

use std::io::{self, IsTerminal};

use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::daemon::{ServeRequest, serve};

use super::{Context, Failure, Outcome, print};

/// Runs the daemon in the foreground. Other commands start it by themselves when they need it.
#[derive(Debug, clap::Args)]
#[command(after_help = "SIGTERM ends it; sandboxes live on, and the next daemon takes them up. It logs to standard \
    error, or to STORE/daemon.log\nwhen another command started it; DELTABOX_LOG sets what (info, debug, \
    deltabox::engine=trace).")]
pub(super) struct Args {
    /// Write one byte to this descriptor when connections are accepted.
    #[arg(long, value_name = "N")]
    ready_fd: Option<u32>,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let filter = EnvFilter::try_from_env("DELTABOX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let color = io::stderr().is_terminal();
    // A log that cannot be written (disk full) is lost; to complain about it on the same stream would panic.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(color);
    log.log_internal_errors(false).init();
    let request = ServeRequest { place: context.place.clone(), ready_fd: args.ready_fd };
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
