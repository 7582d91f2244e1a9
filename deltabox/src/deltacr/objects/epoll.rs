//! epoll(7): what an instance waits for.
//!
//! A target is a file *and* the number under which it was added; a program that changes or removes it names that number.
//! So it is added again by a process that has the file under that number, in a call of its own: a signalfd would wake
//! only that one, too. The number tells nothing if its file was closed there and lives on elsewhere: kcmp compares.
//!
//! What the kernel does not tell:
//! - whether an edge has been given out: it is given once more (never too few),
//! - which of the targets that are ready come first,
//! - a target that was waited for once (EPOLLONESHOT) and was given out has no events left; added again it is
//!   told of an error or hang-up, as is every target. A program that gets such an event handles it as it would at the
//!   next EPOLL_CTL_MOD.
//!
//! Nested instances: first all exist, then targets are added, in any order.

use std::cmp::Ordering;
use std::io;
use std::os::fd::OwnedFd;

use libc::pid_t;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll as Instance, EpollCreateFlags};
use serde::{Deserialize, Serialize};

use super::error::failed;
use super::{ObjectError, ObjectRefusal};
use crate::deltacr::LastCall;
use crate::deltacr::fdinfo::{FdInfo, Target};
use crate::deltacr::handover::{number as argument, unsigned};
use crate::sys::notify::{EpollSlot, compare_target};

/// An epoll instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    targets: Vec<Watched>,
}

/// What an instance waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// Which of the holders has the file under the number.
    pub holder: usize,
    /// The descriptor.
    pub number: i32,
    /// `EPOLL*`.
    pub events: u32,
    /// What the program is told with them.
    pub data: u64,
}

/// A stopped task with a descriptor of the instance.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    /// Host number of the task.
    pub task: pid_t,
    /// The instance's descriptor.
    pub number: i32,
}

impl Epoll {
    /// Reads an instance that `holders` have; `fdinfo` is that of any of them.
    ///
    /// # Errors
    /// `Target`: none of them has a target under its number any more. Or the kernel's word.
    pub fn read(fdinfo: &str, holders: &[Holder]) -> Result<Self, ObjectError> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let info = FdInfo::parse(fdinfo).ok_or_else(invalid).map_err(failed("read fdinfo of an epoll instance"))?;
        let mut targets = Vec::with_capacity(info.targets.len());
        for (i, target) in info.targets.iter().enumerate() {
            let Target { number, events, data } = *target;
            // The kernel counts in the order in which it tells.
            let nth = info.targets[..i].iter().filter(|other| other.number == number).count();
            let mut holder = None;
            for (at, one) in holders.iter().enumerate() {
                let is_there = has(*one, number, nth).map_err(failed("compare the targets of an epoll instance"))?;
                if is_there {
                    holder = Some(at);
                    break;
                }
            }
            let holder = holder.ok_or(ObjectRefusal::Target { number })?;
            targets.push(Watched { holder, number, events, data });
        }
        Ok(Self { targets })
    }

    /// Makes an empty instance.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn make(&self) -> io::Result<OwnedFd> {
        Ok(Instance::new(EpollCreateFlags::EPOLL_CLOEXEC)?.0)
    }

    /// What the process that was holder `holder` (in the order in which it was read) does once all its descriptors are
    /// in their places; it has the instance under `number`.
    pub fn last_calls(&self, holder: usize, number: i32) -> Vec<LastCall> {
        let add = |target: &Watched| LastCall {
            name: "epoll_ctl",
            nr: libc::SYS_epoll_ctl,
            args: vec![argument(number), unsigned(libc::EPOLL_CTL_ADD), argument(target.number)],
            bytes: [&target.events.to_ne_bytes()[..], &target.data.to_ne_bytes()].concat(),
        };
        self.targets.iter().filter(|target| target.holder == holder).map(add).collect()
    }

    /// What it waits for.
    pub fn targets(&self) -> &[Watched] {
        &self.targets
    }
}

/// Whether a holder has under `number` just what was added so.
fn has(holder: Holder, number: i32, nth: usize) -> io::Result<bool> {
    let slot = EpollSlot {
        instance: holder.number.cast_unsigned(),
        target: number.cast_unsigned(),
        nth: u32::try_from(nth).map_err(io::Error::other)?,
    };
    match compare_target(holder.task, number, holder.task, slot) {
        Ok(order) => Ok(order == Ordering::Equal),
        // It has no such descriptor.
        Err(error) if error.raw_os_error() == Some(Errno::EBADF as i32) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

    use super::*;
    use crate::deltacr::objects::own_fdinfo;

    fn instance() -> Instance {
        Instance::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap()
    }

    fn read(instance: &Instance) -> Result<Epoll, ObjectError> {
        let holder = Holder { task: nix::unistd::gettid().as_raw(), number: instance.0.as_raw_fd() };
        Epoll::read(&own_fdinfo(instance.0.as_fd()).unwrap(), &[holder])
    }

    /// As the process would do it that has `files`.
    fn again(record: &Epoll, files: &[&OwnedFd]) -> Instance {
        let new = Instance(record.make().unwrap());
        for (call, target) in record.last_calls(0, new.0.as_raw_fd()).iter().zip(record.targets()) {
            assert_eq!(call.args[0], argument(new.0.as_raw_fd()));
            assert_eq!(call.args[2], argument(target.number));
            let events = u32::from_ne_bytes(call.bytes[..4].try_into().unwrap());
            let data = u64::from_ne_bytes(call.bytes[4..].try_into().unwrap());
            let flags = EpollFlags::from_bits_retain(events.cast_signed());
            let file = files.iter().find(|file| file.as_raw_fd() == target.number).unwrap();
            new.add(file, EpollEvent::new(flags, data)).unwrap();
        }
        new
    }

    fn ready(instance: &Instance) -> Vec<u64> {
        ready_within(instance, EpollTimeout::ZERO)
    }

    fn ready_within(instance: &Instance, timeout: EpollTimeout) -> Vec<u64> {
        let mut events = [EpollEvent::empty(); 8];
        let n = instance.wait(&mut events, timeout).unwrap();
        let mut data: Vec<_> = events[..n].iter().map(EpollEvent::data).collect();
        data.sort_unstable();
        data
    }

    fn pipe_with(bytes: &[u8]) -> (OwnedFd, OwnedFd) {
        let (r, w) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        if !bytes.is_empty() {
            nix::unistd::write(&w, bytes).unwrap();
        }
        (r, w)
    }

    #[test]
    fn targets_come_back_with_events_and_data() {
        let old = instance();
        let ((r, w), (quiet, _quiet)) = (pipe_with(b"x"), pipe_with(b""));
        old.add(&r, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX - 1)).unwrap();
        old.add(&w, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 2)).unwrap();
        old.add(&quiet, EpollEvent::new(EpollFlags::EPOLLIN, 3)).unwrap();
        let record = read(&old).unwrap();
        let new = again(&record, &[&r, &w, &quiet]);
        let sorted = |record: &Epoll| {
            let mut targets = record.targets().to_vec();
            targets.sort_by_key(|target| target.number);
            targets
        };
        assert_eq!(sorted(&read(&new).unwrap()), sorted(&record));
        assert_eq!(ready(&new), [2, u64::MAX - 1]);
        // The edge was given out, the level stays.
        assert_eq!(ready(&new), [u64::MAX - 1]);
        // Its number names it.
        new.delete(&r).unwrap();
        assert!(ready(&new).is_empty());
    }

    #[test]
    fn an_edge_that_was_given_out_is_given_once_more() {
        let old = instance();
        let (r, _w) = pipe_with(b"x");
        old.add(&r, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1)).unwrap();
        assert_eq!((ready(&old).len(), ready(&old).len()), (1, 0));
        assert_eq!(ready(&again(&read(&old).unwrap(), &[&r])), [1]);
    }

    #[test]
    fn a_spent_one_shot_stays_spent_for_what_it_waited_for() {
        let old = instance();
        let (r, w) = pipe_with(b"x");
        old.add(&r, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 1)).unwrap();
        assert_eq!(ready(&old), [1]);
        let new = again(&read(&old).unwrap(), &[&r]);
        assert!(ready(&new).is_empty());
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 5);
        new.modify(&r, &mut event).unwrap();
        assert_eq!(ready(&new), [5]);
        // What is said about hang-ups in the header.
        let spent = again(&read(&new).unwrap(), &[&r]);
        drop(w);
        // A child of another test has it until its exec.
        assert_eq!(ready_within(&spent, EpollTimeout::from(5000_u16)), [5]);
        assert!(ready(&spent).is_empty());
    }

    #[test]
    fn an_instance_in_an_instance_is_a_target_like_any_other() {
        let (outer, inner) = (instance(), instance());
        let (r, _w) = pipe_with(b"x");
        inner.add(&r, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
        outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 2)).unwrap();
        let (outer_record, inner_record) = (read(&outer).unwrap(), read(&inner).unwrap());
        assert_eq!(ready(&again(&outer_record, &[&inner.0])), [2]);
        assert_eq!(ready(&again(&inner_record, &[&r])), [1]);
    }

    fn is_refused(record: Result<Epoll, ObjectError>, wanted: i32) -> bool {
        matches!(record, Err(ObjectError::Refused(ObjectRefusal::Target { number })) if number == wanted)
    }

    #[test]
    fn a_target_that_lives_on_elsewhere_is_refused_by_its_number() {
        let old = instance();
        let (r, _w) = pipe_with(b"");
        old.add(&r, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
        let (number, _elsewhere) = (r.as_raw_fd(), r.try_clone().unwrap());
        assert!(read(&old).is_ok());
        drop(r);
        assert!(is_refused(read(&old), number));
    }

    #[test]
    fn a_target_that_another_process_still_has_is_that_ones() {
        use nix::fcntl::{FcntlArg, FdFlag, fcntl};
        let old = instance();
        let (r, _w) = pipe_with(b"");
        old.add(&r, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
        for fd in [&r, &old.0] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        }
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (number, instance) = (r.as_raw_fd(), old.0.as_raw_fd());
        drop(r);
        let tasks = [nix::unistd::gettid().as_raw(), child.id().cast_signed()];
        let holders = tasks.map(|task| Holder { task, number: instance });
        let record = Epoll::read(&own_fdinfo(old.0.as_fd()).unwrap(), &holders).unwrap();
        assert_eq!(record.targets().iter().map(|target| target.holder).collect::<Vec<_>>(), [1]);
        assert!(record.last_calls(0, 5).is_empty());
        assert_eq!(record.last_calls(1, 5)[0].args[2], argument(number));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_target_whose_number_another_file_has_is_refused_too() {
        // Other tests may take the number first.
        let has_shown = |_| {
            let old = instance();
            let (r, _w) = pipe_with(b"");
            let (other, _other) = pipe_with(b"");
            old.add(&r, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
            let (number, _elsewhere) = (r.as_raw_fd(), r.try_clone().unwrap());
            drop(r);
            let under = other.try_clone().unwrap();
            if under.as_raw_fd() != number {
                return false;
            }
            assert!(is_refused(read(&old), number));
            // Among the targets twice.
            old.add(&under, EpollEvent::new(EpollFlags::EPOLLIN, 2)).unwrap();
            assert_eq!(FdInfo::parse(&own_fdinfo(old.0.as_fd()).unwrap()).unwrap().targets.len(), 2);
            assert!(is_refused(read(&old), number));
            true
        };
        assert!((0..1000).any(has_shown));
    }

    #[test]
    fn an_empty_instance_needs_no_calls() {
        let record = read(&instance()).unwrap();
        assert!(record.targets().is_empty() && record.last_calls(0, 5).is_empty());
    }
}
