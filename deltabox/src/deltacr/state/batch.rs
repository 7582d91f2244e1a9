//! System calls that go to a process together, with the memory that they point at.
//!
//! ```text
//! scratch room of the area:   | input | output | input | output ...      written at once, read at once
//! ```
//! Pieces of state add their questions, all are asked in one round trip, then each piece takes its answers.

use super::error::{StateError, check};
use crate::deltacr::inject::{Call, Hand};

/// Calls to be made together in one process.
#[derive(Debug)]
pub(super) struct Batch {
    scratch: u64,
    room_bytes: usize,
    calls: Vec<Call>,
    names: Vec<&'static str>,
    /// What lies in the scratch room.
    memory: Vec<u8>,
    has_input: bool,
    pid: libc::pid_t,
    results: Vec<i64>,
}

/// A part of the scratch room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Its address in the process.
    pub(super) at: u64,
    offset: usize,
    len_bytes: usize,
}

/// One of the calls.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked(usize);

/// Calls of one round trip.
const N_CALLS: usize = 128;

impl Batch {
    /// An empty one for the process of `hand`.
    pub(super) fn new(hand: &Hand<'_>) -> Self {
        let scratch = hand.scratch();
        Self {
            scratch: scratch.start,
            room_bytes: usize::try_from(scratch.end - scratch.start).unwrap_or(0),
            calls: Vec::with_capacity(N_CALLS),
            names: Vec::with_capacity(N_CALLS),
            memory: Vec::with_capacity(8192),
            has_input: false,
            pid: hand.pid(),
            results: Vec::new(),
        }
    }

    /// Room for an answer. What no call writes to is not clean: nothing is written there before.
    pub(super) fn room(&mut self, len_bytes: usize) -> Room {
        let offset = self.memory.len().next_multiple_of(8);
        self.memory.resize(offset + len_bytes, 0);
        assert!(self.memory.len() <= self.room_bytes, "what one batch points at fits");
        Room { at: self.scratch + offset as u64, offset, len_bytes }
    }

    /// The address of bytes that are there when the calls are made.
    pub(super) fn input(&mut self, bytes: &[u8]) -> u64 {
        let room = self.room(bytes.len());
        self.memory[room.offset..room.offset + room.len_bytes].copy_from_slice(bytes);
        self.has_input = true;
        room.at
    }

    /// Adds a call.
    pub(super) fn add(&mut self, name: &'static str, nr: i64, args: &[u64]) -> Asked {
        assert!(self.calls.len() < N_CALLS, "one round trip");
        let mut six = [0; 6];
        six[..args.len()].copy_from_slice(args);
        self.calls.push(Call { nr, args: six });
        self.names.push(name);
        Asked(self.calls.len() - 1)
    }

    /// Whether there is anything to do.
    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Makes the calls, whatever they return.
    ///
    /// # Errors
    /// As [`Hand::run`].
    pub(super) fn run(&mut self, hand: &mut Hand<'_>) -> Result<(), StateError> {
        let input = if self.has_input { self.memory.clone() } else { Vec::new() };
        self.results = hand.run_with(&self.calls, (self.scratch, &input), (self.scratch, &mut self.memory))?;
        Ok(())
    }

    /// Makes the calls.
    ///
    /// # Errors
    /// As [`Hand::run`], and the first call that failed; those after it were made.
    pub(super) fn run_all(&mut self, hand: &mut Hand<'_>) -> Result<(), StateError> {
        if self.is_empty() {
            return Ok(());
        }
        self.run(hand)?;
        self.check_all()
    }

    /// Fails with the first call that failed.
    pub(super) fn check_all(&self) -> Result<(), StateError> {
        (0..self.calls.len()).try_for_each(|at| self.answer(Asked(at)).map(drop))
    }

    /// What a call returned.
    pub(super) fn result(&self, asked: Asked) -> i64 {
        self.results.get(asked.0).copied().unwrap_or(-i64::from(libc::EIO))
    }

    /// What a call returned.
    ///
    /// # Errors
    /// It failed.
    pub(super) fn answer(&self, asked: Asked) -> Result<i64, StateError> {
        // A limit of 0 and the like are no errors: only these are.
        match self.result(asked) {
            result @ -4095..0 => check(self.names[asked.0], self.pid, result),
            result => Ok(result),
        }
    }

    /// The same as a number of 32 bits.
    pub(super) fn answer_u32(&self, asked: Asked) -> Result<u32, StateError> {
        let result = self.answer(asked)?;
        let cut = u32::try_from(result & 0xffff_ffff);
        cut.map_err(|_| StateError::Unclear { call: self.names[asked.0], pid: self.pid, result })
    }

    /// The same as a PID or TID.
    pub(super) fn answer_pid(&self, asked: Asked) -> Result<libc::pid_t, StateError> {
        let result = self.answer(asked)?;
        let unclear = |_| StateError::Unclear { call: self.names[asked.0], pid: self.pid, result };
        libc::pid_t::try_from(result).map_err(unclear)
    }

    /// Refuses a keyring that was found by KEYCTL_GET_KEYRING_ID.
    pub(super) fn refuse_keyring(&self, asked: Asked, whose: &'static str) -> Result<(), StateError> {
        // ENOKEY as a rule; ENOSYS where the kernel has no keys.
        if self.result(asked) < 0 { Ok(()) } else { Err(StateError::Keyring { pid: self.pid, whose }) }
    }

    /// What the calls left in a room.
    pub(super) fn bytes(&self, room: Room) -> &[u8] {
        &self.memory[room.offset..room.offset + room.len_bytes]
    }

    /// The same as words of 32 bits.
    pub(super) fn words(&self, room: Room) -> Vec<u32> {
        self.bytes(room).chunks_exact(4).map(|four| four.try_into().map_or(0, u32::from_le_bytes)).collect()
    }
}

/// Words as the kernel reads them.
pub(super) fn words_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
