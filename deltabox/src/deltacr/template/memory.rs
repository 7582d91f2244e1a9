//! The description of a process's memory that goes with its template.

use std::fs;
use std::io;
use std::ops::Range;

use libc::pid_t;
use serde::{Deserialize, Serialize};

use super::error::{TemplateError, process};
use super::mapping::{Advice, Mapping, parse_kilobytes, read_smaps};
use super::pages::look_ahead;
use super::remove::Template;
use super::source::Source;

/// What a process had mapped when its template was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Every mapping with its exact limits, those that the template does not have too, but for the engine's area.
    pub mappings: Vec<Mapping>,
    /// The engine's area in the process.
    pub area: Range<u64>,
    /// The end of the heap, as brk(2) has it.
    pub brk: u64,
    /// Where the program's parts lie.
    pub sections: Sections,
}

/// Where the kernel takes a program's parts to lie (`/proc/PID/stat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sections {
    /// Code.
    pub code: (u64, u64),
    /// Data.
    pub data: (u64, u64),
    /// Where the heap of brk(2) begins.
    pub heap: u64,
    /// Where the main stack began.
    pub stack: u64,
    /// Arguments.
    pub arguments: (u64, u64),
    /// Environment.
    pub environment: (u64, u64),
}

/// What had to be learnt while the process was stopped. Everything else is in the template.
#[derive(Clone, Debug)]
pub struct Outline {
    pub(super) pid: pid_t,
    /// `None`: the template has them all, just as they were.
    pub(super) mappings: Option<Vec<Mapping>>,
    pub(super) area: Range<u64>,
    pub(super) brk: u64,
    pub(super) is_subreaper: bool,
}

impl Outline {
    /// The whole description. The process may run meanwhile: what is missing is read from the template.
    ///
    /// # Errors
    /// The template is gone.
    pub fn complete(self, template: &Template) -> Result<Memory, TemplateError> {
        let pid = template.pid();
        let mut mappings = match self.mappings {
            Some(mappings) => mappings,
            None => read_smaps(pid).map_err(process("read the mappings of", pid))?,
        };
        without(&mut mappings, &self.area);
        let sections = Sections::read(pid).map_err(process("read the state of", pid))?;
        Ok(Memory { mappings, area: self.area, brk: self.brk, sections })
    }

    /// Whether orphans below the process become its children (PR_SET_CHILD_SUBREAPER).
    pub fn is_subreaper(&self) -> bool {
        self.is_subreaper
    }

    /// The process.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Memory that the process shares for writing and that the template does not have, but for files of the tree, whose
    /// device (the kernel's number of it) is `tree`.
    pub(in crate::deltacr) fn shared_memory(&self, tree: u64) -> Vec<Mapping> {
        let mut mappings = self.mappings.clone().unwrap_or_default();
        Mapping::mark_tree(&mut mappings, &[tree]);
        mappings.retain(|one| one.has(Advice::SharedWritable) && !one.in_tree);
        mappings
    }

    /// The engine's area in it.
    pub fn area(&self) -> Range<u64> {
        self.area.clone()
    }
}

/// Takes the engine's area out of a list. It has code and data; the kernel may have joined them to neighbours.
pub(super) fn without(mappings: &mut Vec<Mapping>, area: &Range<u64>) {
    let mut kept = Vec::with_capacity(mappings.len());
    for mapping in mappings.drain(..) {
        if mapping.end <= area.start || mapping.start >= area.end {
            kept.push(mapping);
            continue;
        }
        if mapping.start < area.start {
            kept.push(Mapping { end: area.start, ..mapping.clone() });
        }
        if mapping.end > area.end {
            kept.push(Mapping { start: area.end, ..mapping });
        }
    }
    *mappings = kept;
}

impl Sections {
    /// Reads them of a process.
    pub(super) fn read(pid: pid_t) -> io::Result<Self> {
        let text = fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&String::from_utf8_lossy(&text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
        // Numbers of proc_pid_stat(5); the third is the first here.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            code: (field(26)?, field(27)?),
            stack: field(28)?,
            data: (field(45)?, field(46)?),
            heap: field(47)?,
            arguments: (field(48)?, field(49)?),
            environment: (field(50)?, field(51)?),
        })
    }
}

impl Memory {
    /// Bytes of memory that were its own, not of files.
    pub fn own_bytes(&self) -> u64 {
        self.mappings.iter().map(|mapping| mapping.anonymous_bytes).sum()
    }

    /// Looks ahead at the pages of its template: the first return would wait for it.
    ///
    /// # Errors
    /// The template is gone.
    pub fn look_ahead(&self, template: &Template) -> Result<(), TemplateError> {
        let looked = Source::of(template).and_then(|source| look_ahead(&source, &self.mappings));
        looked.map(drop).map_err(process("look at the pages of", template.pid()))
    }

    /// Whether a process still runs the program that it ran then: exec gives it other addresses.
    pub(in crate::deltacr) fn is_of(&self, pid: pid_t) -> io::Result<bool> {
        Ok(Sections::read(pid)? == self.sections)
    }
}

/// How much memory a process has, and whose child it is (`/proc/PID/status`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) parent: pid_t,
    /// Of all mappings.
    pub(super) mapped_bytes: u64,
    /// Of its own pages, swapped ones too.
    pub(super) anonymous_bytes: u64,
    pub(super) locked_bytes: u64,
}

impl Counts {
    pub(super) fn read(pid: pid_t) -> io::Result<Self> {
        let text = fs::read(format!("/proc/{pid}/status"))?;
        Self::parse(&String::from_utf8_lossy(&text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        let mut counts = Self::default();
        let mut n_found = 0;
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            n_found += 1;
            match name {
                "PPid" => counts.parent = value.trim().parse().ok()?,
                "VmSize" => counts.mapped_bytes = parse_kilobytes(value)?,
                "VmLck" => counts.locked_bytes = parse_kilobytes(value)?,
                "RssAnon" | "VmSwap" => counts.anonymous_bytes += parse_kilobytes(value)?,
                _ => n_found -= 1,
            }
        }
        (n_found == 5).then_some(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_need_all_their_lines() {
        let text = "Name:\tx\nPPid:\t7\nVmSize:\t  12 kB\nVmLck:\t 0 kB\nRssAnon:\t 8 kB\nVmSwap:\t 4 kB\n";
        let counts = Counts { parent: 7, mapped_bytes: 12288, anonymous_bytes: 12288, locked_bytes: 0 };
        assert_eq!(Counts::parse(text), Some(counts));
        assert_eq!(Counts::parse(&text[..text.len() - 13]), None);
    }

    #[test]
    fn the_area_is_cut_out_of_what_it_was_joined_to() {
        let whole = Mapping {
            start: 0x1000,
            end: 0x9000,
            protection: 3,
            shared: false,
            offset_bytes: 0,
            device: (0, 0),
            inode: 0,
            name: String::new(),
            advice: Default::default(),
            anonymous_bytes: 0,
            in_tree: false,
        };
        let mut mappings = vec![whole];
        without(&mut mappings, &(0x3000..0x5000));
        let ranges: Vec<_> = mappings.iter().map(Mapping::range).collect();
        assert_eq!(ranges, [0x1000..0x3000, 0x5000..0x9000]);
    }

    #[test]
    fn sections_are_the_fields_of_stat() {
        let mut text = String::from("7 (a) b) S");
        for number in 4..=52 {
            text += &format!(" {number}");
        }
        let sections = Sections::parse(&text).expect("sections");
        assert_eq!((sections.code, sections.stack, sections.heap), ((26, 27), 28, 47));
        assert_eq!((sections.arguments, sections.environment), ((48, 49), (50, 51)));
    }
}
