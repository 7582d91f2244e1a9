//! `deltabox stats`.

use crate::daemon::types::StatList;
use crate::latency::Row;
use crate::sandbox::SandboxId;

use super::{Context, Outcome, print};

/// Shows where the time of operations went: each operation as a whole, then its phases.
///
/// Counted by the daemon since it started, at 1 % precision; a removed sandbox keeps its part in the sum of all.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One sandbox; all that this daemon has had when absent.
    sandbox: Option<SandboxId>,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Aligned columns, microseconds.
    Table,
    /// One JSON object, as with --json.
    Json,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let path = args.sandbox.map_or_else(|| "/v1/stats".to_owned(), |id| format!("/v1/sandboxes/{id}/stats"));
    let list: StatList = context.client()?.get(&path)?;
    if context.json || args.format == Format::Json {
        print::json(&list)?;
        return Ok(0);
    }
    let rows: Vec<_> = list.stats.iter().map(cells).collect();
    let headings = ["OPERATION", "PHASE", ">N", ">MEAN us", ">P50", ">P90", ">P99", ">P99.9", ">MAX"];
    print::table(&headings, &rows)?;
    Ok(0)
}

fn cells(row: &Row) -> Vec<String> {
    let times = [row.mean_us, row.p50_us, row.p90_us, row.p99_us, row.p999_us, row.max_us];
    let mut cells = match &row.phase {
        None => vec![row.operation.clone(), String::new()],
        Some(phase) => vec![String::new(), phase.clone()],
    };
    cells.push(row.n.to_string());
    cells.extend(times.map(|us| format!("{us:.0}")));
    cells
}
