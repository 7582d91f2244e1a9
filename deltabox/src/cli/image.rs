//! `deltabox image import|ls|rm`.

use std::path::PathBuf;

use serde_json::json;

use crate::daemon::types::{ImageList, ImageRequest};
use crate::engine::BaseReport;

use super::{Context, Outcome, parse, print};

/// Imported root file systems that sandboxes start from.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Copies a directory or tar archive into the store, as a base for `create --base NAME`.
    #[command(after_help = "Examples:\n  deltabox image import debian ./rootfs\n  \
        docker export $(docker create debian:12) > d.tar && deltabox image import debian d.tar")]
    Import {
        /// Its name: a-z, 0-9 and -.
        #[arg(value_parser = parse::parse_image)]
        name: String,
        /// A directory, or a tar archive (plain, gzip or zstd).
        #[arg(value_name = "DIR|TAR", value_parser = parse::parse_path)]
        source: PathBuf,
    },
    /// Lists the images.
    Ls,
    /// Removes an image that no sandbox uses.
    Rm {
        /// Its name.
        #[arg(value_parser = parse::parse_image)]
        name: String,
    },
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let client = context.client()?;
    match args.command {
        Command::Import { name, source } => {
            let report: BaseReport = client.post("/v1/images", &ImageRequest { name, path: source })?;
            if context.json {
                print::json(&report)?;
            } else {
                print::line(&report.name)?;
                for note in &report.notes {
                    print::error_line(&format!("deltabox: note: {}", print::printable(note)));
                }
            }
        }
        Command::Ls => {
            let list: ImageList = client.get("/v1/images")?;
            if context.json {
                print::json(&list)?;
            } else {
                let row = |image: &BaseReport| {
                    vec![
                        image.name.clone(),
                        image.n_entries.to_string(),
                        print::size(image.len_bytes),
                        print::age(image.imported_unix_ms),
                        image.source.clone(),
                    ]
                };
                let rows: Vec<_> = list.images.iter().map(row).collect();
                print::table(&["IMAGE", ">ENTRIES", ">SIZE", ">AGE", "SOURCE"], &rows)?;
            }
        }
        Command::Rm { name } => {
            client.delete(&format!("/v1/images/{name}"))?;
            if context.json {
                print::json(&json!({"removed": name}))?;
            }
        }
    }
    Ok(0)
}
