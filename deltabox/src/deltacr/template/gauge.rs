//! What a template weighs.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use libc::pid_t;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::mapping::parse_kilobytes;

/// Measures one template. It keeps nothing of it alive.
#[derive(Clone, Debug)]
pub struct Gauge {
    pid: pid_t,
    pidfd: Arc<OwnedFd>,
}

impl Gauge {
    /// Of a template, by its host PID and a pidfd of it.
    pub(crate) fn of(pid: pid_t, pidfd: Arc<OwnedFd>) -> Self {
        Self { pid, pidfd }
    }

    /// Its host PID.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Its share of memory, bytes: pages of its own, those that several processes have counted for each by its share;
    /// swapped ones too, pages of files not. 20 ns for each page. 0 if it is gone.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self) -> io::Result<u64> {
        let text = match fs::read(format!("/proc/{}/smaps_rollup", self.pid)) {
            Ok(text) => text,
            Err(_) if self.is_gone() => return Ok(0),
            Err(error) => return Err(error),
        };
        // Its number may have passed to another before it was read.
        match parse(&String::from_utf8_lossy(&text)) {
            _ if self.is_gone() => Ok(0),
            Some(bytes) => Ok(bytes),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn is_gone(&self) -> bool {
        poll(&mut [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }
}

fn parse(text: &str) -> Option<u64> {
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        parse_kilobytes(line?)
    };
    Some(of("Pss_Anon")? + of("Pss_Shmem")? + of("SwapPss")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_shared_and_swapped_pages_weigh() {
        let text = "1000-2000 ---p [rollup]\nRss: 900 kB\nPss: 700 kB\nPss_Anon:  12 kB\nPss_File: 99 kB\nPss_Shmem: 3 kB\nSwapPss: 1 kB\n";
        assert_eq!(parse(text), Some(16 * 1024));
        assert_eq!(parse(&text.replace("SwapPss", "Swap")), None);
    }
}
