//! What a process had, given back to it.

use std::os::fd::AsFd;

use libc::pid_t;

use super::open::Opened;
use super::{DescriptorError, Seat, Slot, What};
use crate::deltacr::HandoverError;
use crate::deltacr::handover::{Gift, LastCall, Receiver, Session, Use, call, check, give_denied_directory};
use crate::deltacr::locks;
use crate::deltacr::objects::terminal::{bring_forward, take_terminal};
use crate::deltacr::stop::Stopped;
use crate::deltacr::table::Table;

impl Opened<'_> {
    /// Gives process `pid`, inside known as `inside`, all that it held, and closes all that it holds now. Processes that
    /// share a table get it once: `with_table` says whether it is this one's turn.
    ///
    /// # Errors
    /// The process is neither what it was nor what it should be, and must not be let go.
    pub fn give(
        &self,
        stopped: &mut Stopped,
        pid: pid_t,
        inside: pid_t,
        with_table: bool,
    ) -> Result<(), DescriptorError> {
        let Some(seat) = self.held.seats.get(&inside) else { return Ok(()) };
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        let process = stopped.processes().iter().find(|process| process.pid == pid);
        let tid = process.and_then(|process| process.threads.first()).map_or(pid, |thread| thread.tid);
        let (table, numbers) = Table::open_with_numbers(pid, tid).map_err(failed("open the descriptors"))?;
        let slots = self.held.tables.get(seat.table).filter(|_| with_table).map_or(&[][..], Vec::as_slice);
        let mut numbers = numbers;
        if with_table {
            make_room(stopped, pid, &numbers, slots)?;
            numbers = slots.iter().map(|slot| slot.number).collect();
        }
        let receiver = Receiver { pid, tid, task: table.pidfd(), numbers: &numbers };
        let (gifts, last) = (self.gifts(slots, inside), self.lock_calls(seat, slots));
        let session = Session::open(stopped, receiver)?;
        match session.give(&gifts, &last) {
            Err(error) if error.is_denied_directory() => Ok(give_denied_directory(stopped, receiver, &gifts)?),
            given => Ok(given?),
        }
    }

    /// What a process does once all have what they had: what its epoll instances wait for, who is sent signals about its
    /// descriptors, which group is in the foreground of its terminal; one that was made again (`is_new`) has to take that
    /// terminal first.
    ///
    /// # Errors
    /// The process is not what it should be, and must not be let go.
    pub(in crate::deltacr) fn finish(
        &self,
        stopped: &mut Stopped,
        pid: pid_t,
        inside: pid_t,
        is_new: bool,
    ) -> Result<(), DescriptorError> {
        let Some(seat) = self.held.seats.get(&inside) else { return Ok(()) };
        let slots = self.held.tables.get(seat.table).map_or(&[][..], Vec::as_slice);
        let calls = self.last_calls(slots, inside, is_new);
        if calls.is_empty() {
            return Ok(());
        }
        let failed = |op| move |source| DescriptorError::Process { op, pid, source };
        let process = stopped.processes().iter().find(|process| process.pid == pid);
        let tid = process.and_then(|process| process.threads.first()).map_or(pid, |thread| thread.tid);
        let (table, numbers) = Table::open_with_numbers(pid, tid).map_err(failed("open the descriptors"))?;
        let receiver = Receiver { pid, tid, task: table.pidfd(), numbers: &numbers };
        Ok(Session::open(stopped, receiver)?.give(&[], &calls)?)
    }

    fn last_calls(&self, slots: &[Slot], inside: pid_t, is_new: bool) -> Vec<LastCall> {
        let (mut calls, mut has_terminal) = (Vec::new(), !is_new);
        for (at, description) in self.held.descriptions.iter().enumerate() {
            let number = slots.iter().find(|slot| slot.description == at).map(|slot| slot.number);
            if let What::Epoll { epoll, holders } = &description.what {
                for (holder, (_, number)) in holders.iter().enumerate().filter(|(_, (pid, _))| *pid == inside) {
                    calls.extend(epoll.last_calls(holder, *number));
                }
            }
            let Some(number) = number else { continue };
            if let What::Terminal { terminal, is_master: false } = description.what
                && let Some(terminal) = self.held.terminals.get(terminal)
                && terminal.session() == Some(inside)
            {
                if !std::mem::replace(&mut has_terminal, true) {
                    calls.push(take_terminal(number));
                }
                calls.extend(terminal.foreground().map(|group| bring_forward(number, group)));
            }
        }
        for (at, description) in self.held.descriptions.iter().enumerate() {
            let number = slots.iter().find(|slot| slot.description == at).map(|slot| slot.number);
            if let (Some(settings), Some(number)) = (&description.settings, number) {
                calls.extend(settings.last_calls(number));
            }
        }
        calls
    }

    /// Which table a process had.
    pub fn table(&self, inside: pid_t) -> Option<usize> {
        self.held.seats.get(&inside).map(|seat| seat.table)
    }

    fn gifts(&self, slots: &[Slot], inside: pid_t) -> Vec<Gift<'_>> {
        let gift = |slot: &Slot| {
            let flags = if slot.close_on_exec { libc::O_CLOEXEC } else { 0 };
            let file = self.descriptions.get(slot.description)?.as_ref()?.as_fd();
            Some(Gift { file, what: Use::Descriptor { number: slot.number, flags } })
        };
        let cwd = self.cwds.get(&inside).map(|cwd| Gift { file: cwd.as_fd(), what: Use::WorkingDirectory });
        slots.iter().filter_map(gift).chain(cwd).collect()
    }

    /// Each lock through a descriptor that can take it.
    fn lock_calls(&self, seat: &Seat, slots: &[Slot]) -> Vec<LastCall> {
        let file = |description: usize| match &self.held.descriptions.get(description)?.what {
            What::File { path, .. } => Some((Some(path), None)),
            What::Nameless { key, .. } => Some((None, Some(key))),
            _ => None,
        };
        let mut calls = Vec::new();
        let mut done = Vec::new();
        for (description, lock) in &seat.locks {
            let Some(locked) = file(*description) else { continue };
            if done.contains(&(locked, *lock)) {
                continue;
            }
            done.push((locked, *lock));
            let fits = |slot: &&Slot| {
                let flags = self.held.descriptions.get(slot.description).map_or(0, |one| one.flags);
                file(slot.description) == Some(locked) && locks::can_take(lock, flags)
            };
            calls.extend(slots.iter().find(fits).map(|slot| locks::call(slot.number, lock)));
        }
        calls
    }
}

/// Has exactly the numbers of `slots` in use: closes others, and puts something in those that are free. What arrives
/// takes the lowest free number, which must not be one that something else is for.
fn make_room(stopped: &mut Stopped, pid: pid_t, present: &[i32], slots: &[Slot]) -> Result<(), HandoverError> {
    let number = |number: i32| i64::from(number).cast_unsigned();
    let wanted: Vec<i32> = slots.iter().map(|slot| slot.number).collect();
    let others = present.iter().copied().filter(|number| !wanted.contains(number));
    let free: Vec<i32> = wanted.iter().copied().filter(|number| !present.contains(number)).collect();
    let mut calls: Vec<_> = others.map(|other| call(libc::SYS_close, &[number(other)])).collect();
    if !free.is_empty() {
        // The lowest number that is in use neither now nor before.
        let kept = |number: &i32| present.contains(number) && wanted.contains(number);
        let first = (0..).find(|number| !kept(number)).unwrap_or(0);
        calls.push(call(libc::SYS_eventfd2, &[0, 0]));
        let fill = |to: &i32| call(libc::SYS_dup3, &[number(first), number(*to), 0]);
        calls.extend(free.iter().filter(|to| **to != first).map(fill));
        if !free.contains(&first) {
            calls.push(call(libc::SYS_close, &[number(first)]));
        }
    }
    if calls.is_empty() {
        return Ok(());
    }
    let mut hand = stopped.hand(pid)?;
    // Whatever a close says, the descriptor is gone.
    for (result, made) in hand.run(&calls)?.into_iter().zip(&calls) {
        if made.nr != libc::SYS_close {
            check(pid, "dup3", result)?;
        }
    }
    Ok(hand.close()?)
}
