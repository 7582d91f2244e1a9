//! Where injected code lives in a process, and how it gets there.
//!
//! ```text
//! vdso, last bytes of its last page (dead space, private to the process once written):
//!   "deltabox area 01" | address of the area or 0 | boot code | its slots
//!
//! area (AREA_BYTES, private; stays mapped, children inherit it, exec drops it)
//!   0x0000  batch code                 r-x
//!   0x1000  slots, 0x1800 ucontext     rw-
//!   0x2000  extended registers
//!   0x5000  calls, 64 bytes each
//!   0x7000  scratch for arguments
//! ```
//!
//! Nothing read here is trusted: a program may have changed or unmapped all of it. What is not exactly our code at the
//! recorded address is not our area.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use libc::pid_t;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::frame::{AREA_XSTATE, XSTATE_MAX_BYTES};
use crate::sys::blob::{self, AREA_BYTES, AREA_CALLS as CALLS, AREA_SLOTS, N_SLOTS};

const _: () = assert!(CALLS == AREA_XSTATE + XSTATE_MAX_BYTES, "calls follow the extended registers");
/// Bytes of a call.
pub(super) const CALL_BYTES: usize = 64;
/// Calls that fit.
pub(super) const N_CALLS: usize = 128;
/// Room for what pointers of calls point at.
pub(super) const SCRATCH: usize = CALLS + N_CALLS * CALL_BYTES;
const _: () = assert!(SCRATCH < AREA_BYTES, "the scratch room is what is left");

const MAGIC: &[u8; 16] = b"deltabox area 01";
const HEADER_BYTES: usize = MAGIC.len() + 8;
const PAGE_BYTES: usize = 4096;
/// More than the batch code has.
const MAX_CODE_BYTES: usize = 1024;

/// The memory of another process, through one of its threads.
#[derive(Debug)]
pub(super) struct Memory {
    tid: pid_t,
    path: PathBuf,
    /// For what its protection forbids; opened when first needed.
    file: OnceCell<File>,
}

impl Memory {
    pub(super) fn of(pid: pid_t, tid: pid_t) -> Self {
        Self { tid, path: PathBuf::from(format!("/proc/{pid}/task/{tid}/mem")), file: OnceCell::new() }
    }

    /// Reads whatever the protection, as a debugger does.
    pub(super) fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let len_bytes = bytes.len();
        let remote = [remote(at, len_bytes)?];
        if process_vm_readv(Pid::from_raw(self.tid), &mut [IoSliceMut::new(bytes)], &remote) == Ok(len_bytes) {
            return Ok(());
        }
        self.file()?.read_exact_at(bytes, at)
    }

    /// Writes whatever the protection, as a debugger does.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all([(at, bytes)])
    }

    /// Reads all parts or fails, only what the process itself could read.
    pub(super) fn read_all<const N: usize>(&self, parts: [(u64, &mut [u8]); N]) -> io::Result<()> {
        let mut remotes = [remote(0, 0)?; N];
        let mut len_bytes = 0;
        for (remote_part, (at, bytes)) in remotes.iter_mut().zip(&parts) {
            *remote_part = remote(*at, bytes.len())?;
            len_bytes += bytes.len();
        }
        let mut locals = parts.map(|(_, bytes)| IoSliceMut::new(bytes));
        let n = process_vm_readv(Pid::from_raw(self.tid), &mut locals, &remotes)?;
        if n == len_bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Writes one part after the other, whatever their protection.
    pub(super) fn write_all<const N: usize>(&self, parts: [(u64, &[u8]); N]) -> io::Result<()> {
        let mut remotes = [remote(0, 0)?; N];
        let mut len_bytes = 0;
        for (remote_part, (at, bytes)) in remotes.iter_mut().zip(&parts) {
            *remote_part = remote(*at, bytes.len())?;
            len_bytes += bytes.len();
        }
        let locals = parts.map(|(_, bytes)| IoSlice::new(bytes));
        if process_vm_writev(Pid::from_raw(self.tid), &locals, &remotes) == Ok(len_bytes) {
            return Ok(());
        }
        parts.iter().try_for_each(|(at, bytes)| self.file()?.write_all_at(bytes, *at))
    }

    fn file(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = File::options().read(true).write(true).open(&self.path)?;
        Ok(self.file.get_or_init(|| file))
    }
}

fn remote(at: u64, len: usize) -> io::Result<RemoteIoVec> {
    let base = usize::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
    Ok(RemoteIoVec { base, len })
}

/// What is known of a process from the last hand in it. Nothing of it is relied on without a look.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) pid: pid_t,
    pub(super) tid: pid_t,
    /// `stat` of the thread, kept open: it answers ESRCH when the thread is gone, whatever has its number then.
    pub(super) stat: File,
    pub(super) place: Place,
    pub(super) area: u64,
}

impl Known {
    /// Whether the area is still there and recorded.
    pub(super) fn holds(&self, memory: &Memory) -> bool {
        let mut header = [0; HEADER_BYTES];
        let mut code = [0; MAX_CODE_BYTES];
        let mut last = [0; 1];
        let code = &mut code[..blob::batch().len()];
        let end = self.area.wrapping_add(AREA_BYTES as u64 - 1);
        let read = memory.read_all([(self.place.start, &mut header), (self.area, &mut *code), (end, &mut last)]);
        read.is_ok() && parse_header(&header) == Some(self.area) && *code == *blob::batch()
    }
}

/// The room for boot code in a process's vdso.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    start: u64,
}

impl Place {
    /// Finds it; `None` if there is no vdso, or no room left in it. By a living thread: a leader may have ended.
    pub(super) fn find(pid: pid_t, tid: pid_t, memory: &Memory) -> io::Result<Option<Self>> {
        let auxv = std::fs::read(format!("/proc/{pid}/task/{tid}/auxv"))?;
        let Some(vdso) = parse_vdso(&auxv) else { return Ok(None) };
        let mut header = [0; 64];
        if memory.read(vdso, &mut header).is_err() {
            return Ok(None);
        }
        let Some(len_bytes) = parse_elf_len(&header) else { return Ok(None) };
        let need = place_bytes();
        let mut tail = vec![0; need];
        let start = vdso + (len_bytes.next_multiple_of(PAGE_BYTES) - need) as u64;
        if len_bytes % PAGE_BYTES == 0 || memory.read(start, &mut tail).is_err() {
            return Ok(None);
        }
        let free = len_bytes.next_multiple_of(PAGE_BYTES) - len_bytes >= need && tail.iter().all(|byte| *byte == 0);
        Ok((free || tail.starts_with(MAGIC)).then_some(Self { start }))
    }

    /// Whether an instruction is in injected code, here or in `area`.
    pub(super) fn is_injected(self, area: Option<u64>, rip: u64) -> bool {
        rip.wrapping_sub(self.start) < place_bytes() as u64
            || area.is_some_and(|area| rip.wrapping_sub(area) < AREA_SLOTS as u64)
    }

    /// Where execution of the boot code starts.
    pub(super) fn boot(self) -> u64 {
        self.start + HEADER_BYTES as u64
    }

    /// Writes the boot code with its slots; from now on no area is recorded.
    pub(super) fn prepare(self, memory: &Memory, slots: &[u8; N_SLOTS * 8]) -> io::Result<()> {
        let bytes = [MAGIC.as_slice(), &0_u64.to_le_bytes(), blob::boot(), slots].concat();
        memory.write(self.start, &bytes)
    }

    /// The area recorded here, if it is there with our code in it.
    pub(super) fn recorded(self, memory: &Memory) -> io::Result<Option<u64>> {
        let mut header = [0; HEADER_BYTES];
        memory.read(self.start, &mut header)?;
        let Some(area) = parse_header(&header) else { return Ok(None) };
        let mut code = vec![0; blob::batch().len()];
        // All of it must be there, its last page too.
        let mut last = [0; 1];
        let there = memory.read(area, &mut code).is_ok()
            && memory.read(area.wrapping_add(AREA_BYTES as u64 - 1), &mut last).is_ok();
        Ok((there && code == blob::batch()).then_some(area))
    }

    /// Fills a new area with code and records it.
    pub(super) fn record(self, memory: &Memory, area: u64) -> io::Result<()> {
        memory.write(area, blob::batch())?;
        memory.write(self.start + MAGIC.len() as u64, &area.to_le_bytes())
    }
}

/// The area's address in a header, if it is one and has one.
fn parse_header(header: &[u8; HEADER_BYTES]) -> Option<u64> {
    let (magic, address) = header.split_at(MAGIC.len());
    let area = address.try_into().map_or(0, u64::from_le_bytes);
    (magic == MAGIC && area != 0).then_some(area)
}

fn place_bytes() -> usize {
    (HEADER_BYTES + blob::boot().len() + N_SLOTS * 8).next_multiple_of(64)
}

/// AT_SYSINFO_EHDR of an auxiliary vector.
fn parse_vdso(auxv: &[u8]) -> Option<u64> {
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_le_bytes);
    auxv.chunks_exact(16).find(|pair| word(&pair[..8]) == Some(libc::AT_SYSINFO_EHDR)).and_then(|pair| word(&pair[8..]))
}

/// How long an ELF image of the vdso's kind is: to the end of its section headers, which linkers write last.
fn parse_elf_len(header: &[u8; 64]) -> Option<usize> {
    // 64 bits, little endian.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let half = |at: usize| header[at..at + 2].try_into().map_or(0, u16::from_le_bytes);
    let sections = header[40..48].try_into().map(u64::from_le_bytes).ok()?;
    let end = sections.checked_add(u64::from(half(58)) * u64::from(half(60)))?;
    // Without sections its length is not known; a vdso has a few pages.
    (sections != 0 && end <= 16 * PAGE_BYTES as u64).then(|| usize::try_from(end).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vdso_is_found_in_an_auxiliary_vector() {
        let words = [3_u64, 64, 33, 0x7000, 0, 0];
        let auxv: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(parse_vdso(&auxv), Some(0x7000));
        for len in 0..32 {
            assert_eq!(parse_vdso(&auxv[..len]), None, "cut at {len}");
        }
    }

    #[test]
    fn the_length_of_an_image_is_the_end_of_its_section_headers() {
        let mut header = [0_u8; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[40..48].copy_from_slice(&0x1600_u64.to_le_bytes());
        header[58] = 64;
        header[60] = 17;
        assert_eq!(parse_elf_len(&header), Some(0x1600 + 64 * 17));
        header[43] = 0xff;
        assert_eq!(parse_elf_len(&header), None);
        header[4] = 1;
        assert_eq!(parse_elf_len(&header), None);
    }
}
