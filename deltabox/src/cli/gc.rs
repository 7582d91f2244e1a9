//! `deltabox gc`.

use crate::engine::GcReport;

use super::{Context, Outcome, print};

/// Removes what no sandbox and no checkpoint needs any more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args, context: &Context) -> Outcome {
    let report: GcReport = context.client()?.post("/v1/gc", &())?;
    if context.json {
        print::json(&report)?;
    } else {
        print::line(&format!("{} layers removed, {} freed", report.n_layers, print::size(report.bytes)))?;
    }
    Ok(0)
}
