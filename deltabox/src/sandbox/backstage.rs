//! Backstage: where the engine keeps processes of a sandbox that its programs neither see nor reach.

use std::io;
use std::os::fd::OwnedFd;

use libc::pid_t;

use super::cover::Covers;
use super::reserve::Reserve;

/// That of one sandbox, as long as the engine lives.
#[derive(Debug)]
pub struct Backstage {
    /// Numbers that no program has.
    pub reserve: Reserve,
    /// What is put over their directories in `/proc`.
    pub covers: Covers,
}

impl Backstage {
    /// Of the sandbox of init (host PID), with what that gives.
    ///
    /// # Errors
    /// The kernel's word, or init gave something else.
    pub fn new(init: pid_t, fds: Vec<OwnedFd>) -> io::Result<Self> {
        Ok(Self { reserve: Reserve::new(fds)?, covers: Covers::new(init)? })
    }
}
