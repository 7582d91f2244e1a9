//! Files that a process has to map again, handed to it: from the template's own mappings of them.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::OFlag;

use super::error::{TemplateError, TemplateRefusal, check};
use super::mapping::{Advice, Mapping, read_maps};
use super::plan::{Step, covering};
use super::restore::{Files, unopened};
use super::source::Source;
use crate::deltacr::handover::call;
use crate::deltacr::inject::{Call, Hand};
use crate::deltacr::reopen::reopen;
use crate::sandbox::root::Root;
use crate::sys::process::{pidfd_getfd, pidfd_open_thread};
use crate::sys::socket::send_with_fds;

/// Descriptors in one message at most.
const N_PER_MESSAGE: usize = 60;

// Where things lie in the scratch room.
const PAIR: u64 = 0;
const HEADER: u64 = 64;
const VECTOR: u64 = 128;
const BYTE: u64 = 144;
const CONTROL: u64 = 256;

/// Descriptors in the process, to be closed again.
#[derive(Debug, Default)]
pub(super) struct Wares {
    files: Vec<(u64, i32)>,
    others: Vec<i32>,
}

impl Wares {
    /// Hands over what `steps` map.
    ///
    /// # Errors
    /// Nothing was handed over that is not closed again.
    pub(super) fn give(
        hand: &mut Hand<'_>,
        source: &Source,
        steps: &[(Range<u64>, Step)],
        shared: Option<&Files<'_>>,
    ) -> Result<Self, TemplateError> {
        let pid = hand.pid();
        let mut opened: Vec<(u64, File)> = Vec::new();
        let is_file = |step: &Step| matches!(step, Step::Map(mapping) if mapping.has_file());
        if !steps.iter().any(|(_, step)| is_file(step)) {
            return Ok(Self::default());
        }
        let there = read_maps(source.pid()).map_err(unopened(pid))?;
        for (_, step) in steps {
            let Step::Map(mapping) = step else { continue };
            if !mapping.has_file() || opened.iter().any(|(start, _)| *start == mapping.start) {
                continue;
            }
            if let Some(files) = shared.filter(|_| mapping.shared) {
                let file = match files.shared.file(mapping) {
                    Some(file) => Some(open_again(file, mapping)),
                    None => mapping.in_tree.then(|| open_in(files.tree.root, mapping)),
                };
                if let Some(file) = file {
                    opened.push((mapping.start, file.map_err(unopened(pid))?));
                    continue;
                }
            }
            let Some(copy) = covering(&there, mapping.start).filter(|copy| copy.shows_the_same(mapping)) else {
                return Err(TemplateRefusal::Lost { pid, kind: "a file", start: mapping.start }.into());
            };
            let link = format!("/proc/{}/map_files/{:x}-{:x}", source.pid(), copy.start, copy.end);
            opened.push((mapping.start, File::open(link).map_err(unopened(pid))?));
        }
        Self::give_files(hand, &opened)
    }

    /// Hands over files, each for the mapping that begins at its address.
    ///
    /// # Errors
    /// Nothing was handed over that is not closed again.
    pub(super) fn give_files(hand: &mut Hand<'_>, files: &[(u64, File)]) -> Result<Self, TemplateError> {
        let mut wares = Self::default();
        let received = wares.receive(hand, files);
        if received.is_err() {
            // The first failure is the one to report.
            let _ = hand.run(&wares.close_calls());
        }
        received.map(|()| wares)
    }

    fn receive(&mut self, hand: &mut Hand<'_>, files: &[(u64, File)]) -> Result<(), TemplateError> {
        let pid = hand.pid();
        let scratch = hand.scratch().start;
        let flags = |flags: i32| u64::from(flags.cast_unsigned());
        let kind = flags(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
        let made = hand.run(&[call(libc::SYS_socketpair, &[flags(libc::AF_UNIX), kind, 0, scratch + PAIR])])?;
        check(pid, "socketpair", made[0])?;
        let mut bytes = [0; 8];
        hand.read(scratch + PAIR, &mut bytes)?;
        let pair = [0, 4].map(|at| bytes[at..at + 4].try_into().map_or(-1, i32::from_ne_bytes));
        self.others.extend(pair);
        let pidfd = pidfd_open_thread(hand.tid()).map_err(unopened(pid))?;
        let socket = pidfd_getfd(pidfd.as_fd(), pair[1]).map_err(unopened(pid))?;
        for files in files.chunks(N_PER_MESSAGE) {
            let given: Vec<BorrowedFd<'_>> = files.iter().map(|(_, file)| file.as_fd()).collect();
            send_with_fds(socket.as_fd(), &[0], &given).map_err(unopened(pid))?;
            let control_bytes = 16 + 4 * files.len() as u64;
            let header = [0, 0, scratch + VECTOR, 1, scratch + CONTROL, control_bytes.next_multiple_of(8), 0];
            hand.write(scratch + HEADER, &header.map(u64::to_le_bytes).concat())?;
            hand.write(scratch + VECTOR, &[scratch + BYTE, 1].map(u64::to_le_bytes).concat())?;
            let from = i64::from(pair[0]).cast_unsigned();
            let how = flags(libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC);
            let received = hand.call(libc::SYS_recvmsg, call(0, &[from, scratch + HEADER, how]).args)?;
            check(pid, "recvmsg", received)?;
            let mut control = vec![0; 16 + 4 * files.len()];
            hand.read(scratch + CONTROL, &mut control)?;
            // The header tells how many there was room for.
            let len_bytes = control[..8].try_into().map_or(0, usize::from_le_bytes).clamp(16, control.len());
            let numbers = control[16..len_bytes].chunks_exact(4);
            let numbers = numbers.map(|four| four.try_into().map_or(-1, i32::from_ne_bytes));
            self.files.extend(files.iter().map(|(start, _)| *start).zip(numbers));
        }
        if self.files.len() < files.len() {
            return Err(TemplateRefusal::TooFewDescriptors { pid }.into());
        }
        Ok(())
    }

    /// Under which number the process has a mapping's file.
    pub(super) fn number(&self, mapping: &Mapping) -> Option<i32> {
        self.number_at(mapping.start)
    }

    /// The same by its first address.
    pub(super) fn number_at(&self, start: u64) -> Option<i32> {
        self.files.iter().find(|(other, _)| *other == start).map(|(_, number)| *number)
    }

    /// Closes all that was handed over.
    pub(super) fn close_calls(&self) -> Vec<Call> {
        let numbers = self.files.iter().map(|(_, number)| *number).chain(self.others.iter().copied());
        numbers.map(|number| call(libc::SYS_close, &[i64::from(number).cast_unsigned()])).collect()
    }
}

/// Opens a file of the tree as it was open for the mapping.
fn open_in(root: &Root, mapping: &Mapping) -> io::Result<File> {
    let mut opened = Err(io::ErrorKind::NotFound.into());
    for path in mapping.paths() {
        opened = root.open(&CString::new(path)?, access(mapping)).map_err(io::Error::from);
        if opened.is_ok() {
            break;
        }
    }
    opened.map(File::from)
}

/// The same with a file that is open for both.
fn open_again(file: BorrowedFd<'_>, mapping: &Mapping) -> io::Result<File> {
    match access(mapping) {
        OFlag::O_RDWR => file.try_clone_to_owned().map(File::from),
        read_only => reopen(file, read_only).map(File::from),
    }
}

fn access(mapping: &Mapping) -> OFlag {
    if mapping.has(Advice::SharedWritable) { OFlag::O_RDWR } else { OFlag::O_RDONLY }
}
