//! What is measured: programs, their size and pages, how much they write, what else the machine does.

use serde_json::{Value, json};

/// What kind of program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Python with three threads.
    Python,
    /// Three generations of Python; the grandchild has the memory and three threads.
    Tree,
    /// Node, in a blocking read.
    Node,
    /// A JVM.
    Jvm,
}

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// What it fills with data, besides what it is itself.
    pub(crate) mb: u32,
    /// With huge pages.
    pub(crate) huge: bool,
}

/// One combination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) program: Program,
    /// Every how many pages one is written.
    pub(crate) step: u32,
    /// As many processes that never rest run beside it as there are CPUs.
    pub(crate) busy: bool,
}

const fn python(name: &'static str, mb: u32, huge: bool) -> Program {
    Program { name, kind: Kind::Python, mb, huge }
}

const PROGRAMS: [Program; 10] = [
    python("python-50", 50, false),
    python("python-500", 500, false),
    python("python-2000", 2000, false),
    python("python-50-huge", 50, true),
    python("python-500-huge", 500, true),
    python("python-2000-huge", 2000, true),
    Program { name: "node", kind: Kind::Node, mb: 50, huge: false },
    Program { name: "jvm", kind: Kind::Jvm, mb: 50, huge: false },
    Program { name: "tree-50", kind: Kind::Tree, mb: 50, huge: false },
    Program { name: "tree-500", kind: Kind::Tree, mb: 500, huge: false },
];

/// 1 % and 12.5 % of the pages.
const STEPS: [u32; 2] = [100, 8];

/// Of `--quick`.
const QUICK: [&str; 5] = ["python-50", "python-500", "node", "jvm", "tree-50"];

impl Program {
    /// Those that are wanted; all if none is named.
    pub(crate) fn some(names: &[String], quick: bool) -> Vec<Self> {
        let is_wanted = |program: &Self| {
            if names.is_empty() {
                !quick || QUICK.contains(&program.name)
            } else {
                names.iter().any(|name| name == program.name)
            }
        };
        PROGRAMS.into_iter().filter(is_wanted).collect()
    }

    pub(crate) fn cells(self, quick: bool) -> Vec<Cell> {
        let cell = |step, busy| Cell { program: self, step, busy };
        let all = [false, true].into_iter().flat_map(|busy| STEPS.map(|step| cell(step, busy)));
        all.filter(|cell| !quick || (cell.step == STEPS[0] && !cell.busy)).collect()
    }

    pub(crate) fn n_processes(self) -> usize {
        if self.kind == Kind::Tree { 3 } else { 1 }
    }

    /// Threads that each read one byte, and tell when they did.
    pub(crate) fn n_readers(self) -> usize {
        match self.kind {
            Kind::Python => 3,
            Kind::Tree => 5,
            Kind::Node | Kind::Jvm => 1,
        }
    }
}

impl Cell {
    /// How many rounds of those wanted: fewer where one takes long.
    pub(crate) fn rounds(&self, wanted: u32) -> u32 {
        match self.program.mb {
            0..=100 => wanted,
            101..=1000 => wanted.div_ceil(2),
            _ => wanted.div_ceil(5),
        }
    }

    /// Every how many rounds CRIU is asked, too: it takes long and varies little (chosen).
    pub(crate) fn criu_every(&self, n_rounds: u32) -> u32 {
        let times = match self.program.mb {
            0..=100 => 20,
            101..=1000 => 10,
            _ => 5,
        };
        n_rounds.div_ceil(times)
    }

    /// Pages that are written before a rollback.
    pub(crate) fn n_dirty_pages(&self) -> u64 {
        (u64::from(self.program.mb) * 256).div_ceil(self.step.into())
    }

    pub(crate) fn dirty_percent(&self) -> f64 {
        100.0 / f64::from(self.step)
    }

    /// As JSON.
    pub(crate) fn describe(&self) -> Value {
        json!({
            "program": self.program.name,
            "mb": self.program.mb,
            "huge_pages": self.program.huge,
            "n_processes": self.program.n_processes(),
            "dirty_percent": self.dirty_percent(),
            "n_dirty_pages": self.n_dirty_pages(),
            "busy": self.busy,
        })
    }
}
