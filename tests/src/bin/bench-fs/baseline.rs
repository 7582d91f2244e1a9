//! Baselines: what people do without layers, a copy of the upper directory by common tools, as whole processes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use deltabox_tests::bench::Samples;
use serde_json::{Map, Value};

use crate::results;

/// Copies take long and vary little (chosen).
const MAX_ROUNDS: u32 = 10;

/// The tools, and what they took.
pub(crate) struct Baselines {
    tools: Vec<(&'static str, Samples)>,
}

impl Baselines {
    /// Of the tools that this machine has.
    pub(crate) fn new() -> Self {
        let is_there = |name: &&str| {
            let asked = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            asked.is_ok_and(|status| status.success())
        };
        let tools = ["cp", "rsync", "tar"].into_iter().filter(is_there);
        Self { tools: tools.map(|name| (name, Samples::default())).collect() }
    }

    /// Copies `upper` by every tool into `scratch`, on the same file system.
    pub(crate) fn measure(&mut self, round: u32, upper: &Path, scratch: &Path) -> anyhow::Result<()> {
        if round >= MAX_ROUNDS {
            return Ok(());
        }
        let to = scratch.join("copy");
        for (name, samples) in &mut self.tools {
            let mut command = Command::new(*name);
            match *name {
                "cp" => command.arg("-a").arg(upper).arg(&to),
                "rsync" => command.arg("-a").arg(upper).arg(&to),
                _ => command.arg("-cf").arg(&to).arg("-C").arg(upper).arg("."),
            };
            let begun = Instant::now();
            // An upper directory has FIFOs and sockets at most; tar tells of what it skips.
            let status = command.stderr(Stdio::null()).status().with_context(|| format!("start {name}"))?;
            let took = begun.elapsed();
            ensure!(status.success(), "{name}: {status}");
            samples.record(took);
            if to.is_dir() { fs::remove_dir_all(&to)? } else { fs::remove_file(&to)? }
        }
        Ok(())
    }

    /// As JSON, by tool.
    pub(crate) fn describe(&self) -> Value {
        let all: Map<_, _> =
            self.tools.iter().map(|(name, samples)| ((*name).to_owned(), results::quantiles(samples))).collect();
        Value::Object(all)
    }
}
