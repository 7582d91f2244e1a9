//! What is varied: one thing at a time, from a base.

use serde_json::{Value, json};

/// A combination that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) name: &'static str,
    /// Open descriptions of each process, each of a file of its own with 4 KiB.
    pub(crate) n_descriptions: usize,
    /// They are open for reading and writing; else for reading.
    pub(crate) writable: bool,
    pub(crate) n_processes: usize,
    /// Files of 4 KiB written before each checkpoint and each rollback.
    pub(crate) n_dirty: usize,
    /// Checkpoints that the live layer comes from, each with a layer of its own.
    pub(crate) n_layers: usize,
    /// As many layers may be in a stack before some are merged.
    pub(crate) merge_above: usize,
}

const BASE: Cell = Cell {
    name: "base",
    n_descriptions: 4,
    writable: true,
    n_processes: 1,
    n_dirty: 20,
    n_layers: 1,
    merge_above: 480,
};

/// All of them. `base`: 4 descriptions open for writing, 1 process, 20 files, 1 layer.
const CELLS: [Cell; 12] = [
    BASE,
    Cell { name: "read-only", writable: false, ..BASE },
    Cell { name: "unchanged", writable: false, n_dirty: 0, ..BASE },
    Cell { name: "64-descriptions", n_descriptions: 64, ..BASE },
    Cell { name: "64-read-only", n_descriptions: 64, writable: false, ..BASE },
    Cell { name: "512-descriptions", n_descriptions: 512, ..BASE },
    Cell { name: "512-read-only", n_descriptions: 512, writable: false, ..BASE },
    Cell { name: "16-processes", n_processes: 16, ..BASE },
    Cell { name: "2000-files", n_dirty: 2000, ..BASE },
    Cell { name: "50-layers", n_layers: 50, ..BASE },
    Cell { name: "300-layers", n_layers: 300, ..BASE },
    Cell { name: "300-merged", n_layers: 300, merge_above: 32, ..BASE },
];

impl Cell {
    /// Those that are wanted; all if none is named.
    pub(crate) fn some(names: &[String], quick: bool) -> Vec<Self> {
        let is_wanted = |cell: &Self| {
            if names.is_empty() { !quick || cell.n_layers <= 50 } else { names.iter().any(|name| name == cell.name) }
        };
        CELLS.into_iter().filter(is_wanted).collect()
    }

    /// How many rounds of those wanted: fewer where one takes long.
    pub(crate) fn rounds(&self, wanted: u32) -> u32 {
        let is_long = self.n_descriptions > 100 || self.n_dirty > 100 || self.n_layers > 100;
        if is_long { wanted.div_ceil(4) } else { wanted }
    }

    /// As JSON.
    pub(crate) fn describe(&self) -> Value {
        json!({
            "cell": self.name,
            "n_descriptions": self.n_descriptions * self.n_processes,
            "writable": self.writable,
            "n_processes": self.n_processes,
            "n_dirty": self.n_dirty,
            "n_layers": self.n_layers,
            "merge_above": self.merge_above,
        })
    }
}
