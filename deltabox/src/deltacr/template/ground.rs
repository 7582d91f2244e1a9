//! From a foreign memory to bare ground: a newborn's copy of its parent's memory goes, the kernel's own pages and the
//! engine's area move to where the process had them.
//!
//! ```text
//! parent's copy     [area] [ .... ] [heap]  [libraries] [vvar vdso] [stack]
//! 1 bridge          ................ [area'|vvar' vdso'] .................     free in both lists
//! 2 the rest goes                    [area'|vvar' vdso']
//! 3 home            [area]           [area']                [vvar vdso]         PR_SET_MM_MAP: limits, auxv, exe
//! 4                 [area]                                  [vvar vdso]         and all else is mapped by restore.rs
//! ```
//! The engine finds its area through the vdso, and that through the auxiliary vector: whenever the hand is taken back, all
//! three agree. PR_SET_MM_MAP takes another program file (CAP_CHECKPOINT_RESTORE) only while none of the old one's
//! pages are mapped, so it comes before any mapping.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use libc::pid_t;

use super::error::{TemplateError, TemplateRefusal, check, process};
use super::mapping::{Mapping, read_maps};
use super::memory::Sections;
use super::restore::{Past, Room, unopened};
use super::source::PAGE_BYTES;
use super::wares::Wares;
use crate::deltacr::handover::call;
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::stop::Stopped;
use crate::sys::blob::{AREA_BYTES, AREA_SLOTS};

/// Where bridges are looked for, and the distance that they keep (chosen: no stack's guard reaches so far).
const LOWEST: u64 = 1 << 32;
const DISTANCE: u64 = 16 << 20;
/// The end of what a process can map without asking for more: 47 bits, less a page.
const HIGHEST: u64 = (1 << 47) - PAGE_BYTES;
/// Bytes of the kernel's `struct prctl_mm_map`.
const MAP_BYTES: u64 = 104;
/// prctl's answer that no program file is given.
const NO_FILE: u32 = u32::MAX;

/// What is known before anything happens.
#[derive(Debug)]
pub(super) struct Ground {
    /// The kernel's pages in the parent and in the process.
    kernels: Vec<(Range<u64>, u64)>,
    /// Room for the area and the kernel's pages, free in both.
    bridge: u64,
    auxv: Vec<u8>,
    /// The program's file, if it is not the parent's.
    program: Option<File>,
}

impl Ground {
    /// Looks at the parent, whose memory a newborn will have, and at the checkpoint.
    ///
    /// # Errors
    /// Something of the checkpoint cannot be made again.
    pub(super) fn plan(parent: pid_t, past: &Past<'_>) -> Result<Self, TemplateError> {
        let template = past.source.pid();
        let failed = process("read the mappings of", parent);
        let present = read_maps(parent).map_err(failed)?;
        Room::check_empty(past, parent)?;
        let kernels = pair(&present, &past.memory.mappings);
        let kernels = kernels.ok_or(TemplateRefusal::KernelsPages { pid: parent })?;
        let mut taken: Vec<Range<u64>> =
            present.iter().chain(&past.memory.mappings).map(|mapping| mapping.range()).collect();
        taken.push(past.memory.area.clone());
        let bridge =
            find_room(taken, AREA_BYTES as u64 + span(&kernels)).ok_or(TemplateRefusal::NoMemory { pid: parent })?;
        let auxv = fs::read(format!("/proc/{template}/auxv")).map_err(process("read the state of", template))?;
        let path = |pid| format!("/proc/{pid}/exe");
        let is = |pid| fs::metadata(path(pid)).map(|meta| (meta.dev(), meta.ino())).map_err(unopened(parent));
        let program = if is(template)? == is(parent)? {
            None
        } else {
            Some(File::open(path(template)).map_err(unopened(parent))?)
        };
        Ok(Self { kernels, bridge, auxv, program })
    }

    /// Where the kernel's pages lie on the bridge.
    fn on_bridge(&self, range: &Range<u64>) -> u64 {
        let first = self.kernels.first().map_or(range.start, |(first, _)| first.start);
        self.bridge + AREA_BYTES as u64 + (range.start - first)
    }
}

/// Leaves nothing in a newborn but the area and the kernel's pages, both at home.
pub(super) fn clear(stopped: &mut Stopped, pid: pid_t, ground: &Ground, past: &Past<'_>) -> Result<(), TemplateError> {
    let mut hand = stopped.hand(pid)?;
    map_area(&mut hand, ground.bridge)?;
    hand.move_area(ground.bridge).map_err(process("move the area of", pid))?;
    let mut hand = stopped.hand(pid)?;
    let bridged = ground.bridge..ground.bridge + AREA_BYTES as u64 + span(&ground.kernels);
    let mut calls: Vec<Call> =
        ground.kernels.iter().map(|(from, _)| move_call(from.start, from, ground.on_bridge(from))).collect();
    calls.push(call(libc::SYS_munmap, &[0, bridged.start]));
    calls.push(call(libc::SYS_munmap, &[bridged.end, HIGHEST - bridged.end]));
    calls.extend(ground.kernels.iter().map(|(from, to)| move_call(ground.on_bridge(from), from, *to)));
    run(&mut hand, &calls)?;
    set_limits(&mut hand, ground, past)?;
    let home = past.memory.area.start;
    map_area(&mut hand, home)?;
    hand.move_area(home).map_err(process("move the area of", pid))?;
    let mut hand = stopped.hand(pid)?;
    run(&mut hand, &[call(libc::SYS_munmap, &[bridged.start, bridged.end - bridged.start])])?;
    Ok(hand.close()?)
}

/// PR_SET_MM_MAP: where the program's parts lie, its auxiliary vector and its file.
fn set_limits(hand: &mut Hand<'_>, ground: &Ground, past: &Past<'_>) -> Result<(), TemplateError> {
    const PROGRAM: u64 = 0;
    let pid = hand.pid();
    let files = ground.program.as_ref().map(|file| file.try_clone().map(|file| (PROGRAM, file)));
    let files: Vec<_> = files.into_iter().collect::<io::Result<_>>().map_err(unopened(pid))?;
    let wares = if files.is_empty() { Wares::default() } else { Wares::give_files(hand, &files)? };
    let number = wares.number_at(PROGRAM).map_or(NO_FILE, i32::cast_unsigned);
    let at = hand.scratch().start;
    let Sections { code, data, heap, stack, arguments, environment } = past.memory.sections;
    // The heap is given its length by brk.
    let words = [
        code.0,
        code.1,
        data.0,
        data.1,
        heap,
        heap,
        stack,
        arguments.0,
        arguments.1,
        environment.0,
        environment.1,
        at + MAP_BYTES,
    ];
    let mut bytes = words.map(u64::to_le_bytes).concat();
    bytes.extend(u32::try_from(ground.auxv.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend(&ground.auxv);
    hand.write(at, &bytes)?;
    let set = [libc::PR_SET_MM, libc::PR_SET_MM_MAP].map(|word| u64::from(word.cast_unsigned()));
    let mut calls = vec![call(libc::SYS_prctl, &[set[0], set[1], at, MAP_BYTES])];
    calls.extend(wares.close_calls());
    let results = hand.run(&calls)?;
    check(pid, "prctl(PR_SET_MM_MAP)", results[0])
}

/// The engine's area at an address where nothing is.
fn map_area(hand: &mut Hand<'_>, at: u64) -> Result<(), TemplateError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let protection = |flags: i32| u64::from(flags.cast_unsigned());
    let (len_bytes, slots) = (AREA_BYTES as u64, AREA_SLOTS as u64);
    let code = protection(libc::PROT_READ | libc::PROT_EXEC);
    let data = protection(libc::PROT_READ | libc::PROT_WRITE);
    let nothing = (-1_i64).cast_unsigned();
    let calls = [
        call(libc::SYS_mmap, &[at, len_bytes, code, protection(flags), nothing, 0]),
        call(libc::SYS_mprotect, &[at + slots, len_bytes - slots, data]),
    ];
    run(hand, &calls)
}

fn run(hand: &mut Hand<'_>, calls: &[Call]) -> Result<(), TemplateError> {
    let results = hand.run(calls)?;
    let name = |call: &Call| match call.nr {
        libc::SYS_mremap => "mremap of the kernel's pages",
        libc::SYS_munmap => "munmap",
        libc::SYS_mprotect => "mprotect",
        _ => "mmap",
    };
    results.iter().zip(calls).try_for_each(|(result, call)| check(hand.pid(), name(call), *result))
}

fn move_call(from: u64, range: &Range<u64>, to: u64) -> Call {
    let len_bytes = range.end - range.start;
    let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).cast_unsigned().into();
    call(libc::SYS_mremap, &[from, len_bytes, len_bytes, how, to])
}

/// The kernel's pages that are there, each with the address at which it was; `None` if they are not the same ones.
fn pair(present: &[Mapping], wanted: &[Mapping]) -> Option<Vec<(Range<u64>, u64)>> {
    let (is, was) = (kernels(present), kernels(wanted));
    let look = |one: &&Mapping| (one.name.clone(), one.len_bytes());
    let is_same = is.iter().map(look).eq(was.iter().map(look));
    is_same.then(|| is.iter().zip(&was).map(|(is, was)| (is.range(), was.start)).collect())
}

fn kernels(mappings: &[Mapping]) -> Vec<&Mapping> {
    mappings.iter().filter(|mapping| mapping.is_kernels()).collect()
}

/// From the first to the last of the kernel's pages.
fn span(kernels: &[(Range<u64>, u64)]) -> u64 {
    match (kernels.first(), kernels.last()) {
        (Some((first, _)), Some((last, _))) => last.end - first.start,
        _ => 0,
    }
}

/// An address at which nothing is taken, nor near it.
fn find_room(mut taken: Vec<Range<u64>>, len_bytes: u64) -> Option<u64> {
    taken.sort_unstable_by_key(|range| range.start);
    let mut at = LOWEST;
    for range in taken {
        if range.start >= at + len_bytes + DISTANCE {
            break;
        }
        at = at.max(range.end.saturating_add(DISTANCE).next_multiple_of(PAGE_BYTES));
    }
    (at + len_bytes + DISTANCE <= HIGHEST).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_found_away_from_everything() {
        assert_eq!(find_room(vec![], 0x1000), Some(LOWEST));
        let near = LOWEST + DISTANCE;
        assert_eq!(find_room(vec![0..1, near..near + 0x1000], 0x1000), Some(near + 0x1000 + DISTANCE));
        assert_eq!(find_room(vec![0..1, near + 0x1000..near + 0x2000], 0x1000), Some(LOWEST));
        assert_eq!(find_room(vec![0..0x1000, LOWEST..HIGHEST], 0x1000), None);
    }
}
