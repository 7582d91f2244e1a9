//! What one process gets, as calls that it makes.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use super::{Description, Holding, Kind, Seat};
use crate::deltacr::fdinfo::Target;
use crate::deltacr::handover::{Gift, LastCall, Use, number, unsigned};
use crate::deltacr::locks;

/// Whether something in this process is to be replaced.
pub(super) fn needs_work(seat: &Seat, descriptions: &[Description]) -> bool {
    let is_new = |holding: &Holding| {
        let description = &descriptions[holding.description];
        description.new.is_some()
            || match &description.kind {
                Kind::File => false,
                Kind::Listener(listener) => listener.is_there(),
                Kind::Watcher(_) => true,
            }
    };
    seat.holdings.iter().any(is_new)
        || seat.cwd.as_ref().is_some_and(|(_, new)| new.is_some())
        || seat.mappings.iter().any(|mapping| mapping.new.is_some())
}

pub(super) fn gifts<'a>(seat: &'a Seat, descriptions: &'a [Description]) -> Vec<Gift<'a>> {
    let new = |index: usize| descriptions.get(index).and_then(|one| one.new.as_ref());
    let mut gifts = Vec::new();
    for holding in &seat.holdings {
        let flags = if holding.close_on_exec { libc::O_CLOEXEC } else { 0 };
        let what = Use::Descriptor { number: holding.number, flags };
        gifts.extend(new(holding.description).map(|file| Gift { file: file.as_fd(), what }));
    }
    for mapping in &seat.mappings {
        let lock = if mapping.locked { libc::MAP_LOCKED } else { 0 };
        let what = Use::Mapping {
            start: mapping.start,
            len_bytes: mapping.len_bytes,
            protection: mapping.protection,
            flags: unsigned(libc::MAP_SHARED | libc::MAP_FIXED | lock),
            offset_bytes: mapping.offset_bytes,
        };
        gifts.extend(mapping.new.as_ref().map(|file| Gift { file: file.as_fd(), what }));
    }
    if let Some((_, Some(new))) = &seat.cwd {
        gifts.push(Gift { file: new.as_fd(), what: Use::WorkingDirectory });
    }
    gifts
}

/// What only works once all descriptors are in their places.
pub(super) fn last_calls(seat: &Seat, descriptions: &[Description]) -> Vec<LastCall> {
    let moved = |index: usize| descriptions.get(index).filter(|one| one.new.is_some());
    let mut calls = Vec::new();
    let mut done = BTreeSet::new();
    for &(index, lock) in &seat.locks {
        let Some(description) = moved(index) else { continue };
        if !done.insert((description.place.stat.identity(), lock)) {
            continue;
        }
        let fits = |other: &&Holding| {
            moved(other.description).is_some_and(|one| {
                one.place.stat.identity() == description.place.stat.identity() && locks::can_take(&lock, one.info.flags)
            })
        };
        calls.extend(seat.holdings.iter().find(fits).map(|holding| locks::call(holding.number, &lock)));
    }
    let polled = |target: &Target| {
        let of = |holding: &&Holding| holding.number == target.number;
        let description = seat.holdings.iter().find(of).and_then(|holding| moved(holding.description));
        // Regular files and directories cannot be in such a list.
        description.is_some_and(|one| !matches!(one.kind, Kind::File) || one.place.stat.kind() == libc::S_IFIFO)
    };
    for (epoll, targets) in &seat.epolls {
        for target in targets.iter().filter(|target| polled(target)) {
            let mut bytes = target.events.to_ne_bytes().to_vec();
            bytes.extend(target.data.to_ne_bytes());
            calls.push(LastCall {
                name: "epoll_ctl",
                nr: libc::SYS_epoll_ctl,
                args: vec![number(*epoll), unsigned(libc::EPOLL_CTL_ADD), number(target.number)],
                bytes,
            });
        }
    }
    calls
}
