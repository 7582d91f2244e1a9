//! Which thread is which: of a record by its TID inside, of a stop by its TID on the host.

use libc::pid_t;

use super::error::StateError;
use crate::deltacr::stop::Stopped;

/// A thread as it was and as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// Its place in the record of then.
    pub(super) was: usize,
    /// In the record of now, and among those stopped.
    pub(super) now: usize,
    /// Host TID.
    pub(super) host: pid_t,
}

/// Host TIDs of a stopped process, the leader first if it lives.
pub(super) fn host_threads(stopped: &Stopped, pid: pid_t) -> Result<Vec<pid_t>, StateError> {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    let threads = process.map(|process| process.threads.iter().map(|thread| thread.tid).collect::<Vec<_>>());
    threads.filter(|threads| !threads.is_empty()).ok_or(StateError::Threads { pid })
}

/// Pairs TIDs inside, `is` in the order of `hosts`; `None` unless both name the same threads.
pub(super) fn pair(
    was: impl ExactSizeIterator<Item = pid_t>,
    is: impl ExactSizeIterator<Item = pid_t>,
    hosts: &[pid_t],
) -> Option<Vec<Pair>> {
    if was.len() != is.len() || is.len() != hosts.len() {
        return None;
    }
    let was: Vec<pid_t> = was.collect();
    let find = |(now, tid): (usize, pid_t)| {
        let was = was.iter().position(|one| *one == tid)?;
        Some(Pair { was, now, host: hosts[now] })
    };
    is.enumerate().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(was: &[pid_t], is: &[pid_t], hosts: &[pid_t]) -> Option<Vec<Pair>> {
        pair(was.iter().copied(), is.iter().copied(), hosts)
    }

    #[test]
    fn threads_are_known_by_their_numbers_inside_in_whatever_order() {
        let expected = vec![Pair { was: 1, now: 0, host: 103 }, Pair { was: 0, now: 1, host: 102 }];
        assert_eq!(pairs(&[2, 3], &[3, 2], &[103, 102]), Some(expected));
        for (was, is, hosts) in [(&[2, 3][..], &[2][..], &[102][..]), (&[2], &[3], &[103]), (&[2], &[2], &[102, 103])] {
            assert_eq!(pairs(was, is, hosts), None);
        }
    }
}
