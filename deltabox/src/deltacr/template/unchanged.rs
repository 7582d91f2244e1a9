//! Whether a template still is what its process is: then the next checkpoint needs no other one.
//!
//! A shell that waits for its child is not copied again and again. It has the same mappings, and the same bytes in them: a
//! page that was written since may have got back what it had. What the kernel and the engine write does not count: each
//! thread's CPU in its rseq area, the engine's own area.

use std::ops::Range;

use libc::pid_t;

use super::error::{TemplateError, process};
use super::make::ask;
use super::mapping::{Mapping, read_smaps};
use super::memory::{Memory, Outline, without};
use super::pages;
use super::ranges::len_of;
use super::remove::Template;
use super::source::{Pages, Source};
use crate::deltacr::stop::Stopped;
use crate::sys::ptrace::get_rseq_configuration;

/// Processes with more memory of their own are not looked at (chosen: from here on a look costs as much as a template).
const MOST_BYTES: u64 = 8 << 20;
/// Bytes that are compared (chosen: waiting writes to a few pages, a program that runs to more).
const MOST_COMPARED: usize = 32 * 4096;

/// An outline of the process for another use of its template, if it is what it was when that was made.
///
/// # Errors
/// The process is gone, or cannot be read.
pub(in crate::deltacr) fn outline_if_unchanged(
    stopped: &mut Stopped,
    pid: pid_t,
    template: &Template,
    memory: &Memory,
) -> Result<Option<Outline>, TemplateError> {
    if memory.own_bytes() > MOST_BYTES || !template.lives()? {
        return Ok(None);
    }
    let failed = process("compare with its template", pid);
    let (Ok(source), Ok(present)) = (Source::of(template), Pages::of(pid)) else { return Ok(None) };
    let Some(written) = pages::find_few(&source, &present, &memory.mappings, MOST_COMPARED).map_err(failed)? else {
        return Ok(None);
    };
    let told = kernels_bytes(stopped, pid).map_err(process("look at the threads of", pid))?;
    let read = |pages: &Pages| {
        let mut bytes = vec![0; len_of(&written)];
        pages.read(&written, &mut bytes).map(|()| blank(bytes, &written, &told))
    };
    if read(&present).map_err(failed)? != read(source.pages()).map_err(failed)? {
        return Ok(None);
    }
    let mappings = read_smaps(pid).map_err(process("read the mappings of", pid))?;
    if !are_alike(&mappings, memory) {
        return Ok(None);
    }
    let mut hand = stopped.hand(pid)?;
    let (brk, is_subreaper) = ask(&mut hand)?;
    let area = hand.area();
    hand.close()?;
    let is_same = brk == memory.brk && area == memory.area;
    Ok(is_same.then_some(Outline { pid, mappings: Some(mappings), area, brk, is_subreaper }))
}

/// Limits, protection, files, advice.
fn are_alike(present: &[Mapping], memory: &Memory) -> bool {
    let mut present = present.to_vec();
    without(&mut present, &memory.area);
    let plain = |mapping: &Mapping| Mapping { anonymous_bytes: 0, in_tree: false, ..mapping.clone() };
    present.len() == memory.mappings.len()
        && present.iter().zip(&memory.mappings).all(|(is, was)| plain(is) == plain(was))
}

/// Where the kernel tells threads what they run on: `cpu_id_start`, `cpu_id`; `node_id`, `mm_cid` of struct rseq.
fn kernels_bytes(stopped: &Stopped, pid: pid_t) -> std::io::Result<Vec<Range<u64>>> {
    let mut told = Vec::new();
    let processes = stopped.processes().iter().filter(|process| process.pid == pid);
    for thread in processes.flat_map(|process| &process.threads) {
        let area = get_rseq_configuration(thread.tid)?.address;
        if area != 0 {
            told.extend([area..area + 8, area + 20..area + 28]);
        }
    }
    Ok(told)
}

/// `bytes` of `pages`, with zeros at `addresses`.
fn blank(mut bytes: Vec<u8>, pages: &[Range<u64>], addresses: &[Range<u64>]) -> Vec<u8> {
    let mut offset = 0;
    for page in pages {
        for one in addresses {
            let (start, end) = (one.start.max(page.start), one.end.min(page.end));
            if start < end {
                let at = |address: u64| offset + usize::try_from(address - page.start).unwrap_or(0);
                bytes[at(start)..at(end)].fill(0);
            }
        }
        offset += len_of(std::slice::from_ref(page));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_blanked_wherever_it_lies() {
        let pages = [0x1000..0x1004, 0x2000..0x2004];
        let bytes = blank(vec![1; 8], &pages, &[0xfff..0x1001, 0x1003..0x2001, 0x3000..0x3008]);
        assert_eq!(bytes, [0, 1, 1, 0, 0, 1, 1, 1]);
    }
}
