//! What the templates of one sandbox take.

use std::collections::BTreeMap;
use std::time::Instant;

use libc::pid_t;

use super::judge::{Candidate, Weight};
use crate::deltacr::template::Gauge;
use crate::sandbox::{PoolBounds as Bounds, SandboxId};

/// A sandbox's templates.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    pub(super) bounds: Bounds,
    /// Those that are just being made.
    pub(super) n_expected: usize,
    stock: BTreeMap<u32, Stock>,
    known: BTreeMap<pid_t, Known>,
    /// Sum of what is known.
    bytes: u64,
    /// Not surveyed before.
    pub(super) rests_until: Option<Instant>,
}

/// A checkpoint's.
#[derive(Debug)]
struct Stock {
    used: Instant,
    pids: Vec<pid_t>,
}

/// One, which several checkpoints may have.
#[derive(Debug)]
struct Known {
    gauge: Gauge,
    n_users: usize,
    /// Before it is measured: all that its process had.
    bytes: u64,
    is_measured: bool,
}

impl Shelf {
    pub(super) fn weight(&self) -> Weight {
        Weight { n_templates: self.known.len(), bytes: self.bytes }
    }

    pub(super) fn expected(&self) -> Weight {
        Weight { n_templates: self.known.len() + self.n_expected, bytes: self.bytes }
    }

    /// All of its templates are gone.
    pub(super) fn clear(&mut self) {
        *self = Self { bounds: self.bounds, n_expected: self.n_expected, ..Self::default() };
    }

    pub(super) fn touch(&mut self, checkpoint: u32) {
        if let Some(stock) = self.stock.get_mut(&checkpoint) {
            stock.used = Instant::now();
        }
    }

    /// Each template, and how old what is known of it may be.
    pub(super) fn ages(&self) -> Vec<(Gauge, Age)> {
        let latest: Vec<pid_t> = self.stock.values().rev().take(2).flat_map(|stock| &stock.pids).copied().collect();
        let age = |(pid, known): (&pid_t, &Known)| match () {
            () if !known.is_measured => Age::New,
            () if latest.contains(pid) => Age::Young,
            () => Age::Old,
        };
        self.known.iter().map(|one| (one.1.gauge.clone(), age(one))).collect()
    }

    /// By checkpoint what only it has, and what others have too.
    pub(super) fn shares(&self) -> impl Iterator<Item = (u32, (Weight, Weight))> {
        self.stock.iter().map(|(checkpoint, stock)| (*checkpoint, self.shares_of(stock)))
    }

    pub(super) fn put(&mut self, checkpoint: u32, templates: impl IntoIterator<Item = (Gauge, u64)>) {
        self.forget(checkpoint);
        let mut pids = Vec::new();
        for (gauge, bytes) in templates {
            let pid = gauge.pid();
            pids.push(pid);
            let known = self.known.entry(pid).or_insert_with(|| {
                self.bytes += bytes;
                Known { gauge, n_users: 0, bytes, is_measured: false }
            });
            known.n_users += 1;
        }
        self.stock.insert(checkpoint, Stock { used: Instant::now(), pids });
    }

    pub(super) fn forget(&mut self, checkpoint: u32) {
        let Some(stock) = self.stock.remove(&checkpoint) else { return };
        for pid in stock.pids {
            let Some(known) = self.known.get_mut(&pid) else { continue };
            known.n_users -= 1;
            if known.n_users == 0 {
                self.bytes -= known.bytes;
                self.known.remove(&pid);
            }
        }
    }

    pub(super) fn note(&mut self, pid: pid_t, bytes: u64) {
        if let Some(known) = self.known.get_mut(&pid) {
            self.bytes = self.bytes - known.bytes + bytes;
            (known.bytes, known.is_measured) = (bytes, true);
        }
    }

    /// What of a checkpoint's only it has, and what others have too.
    fn shares_of(&self, stock: &Stock) -> (Weight, Weight) {
        let (mut own, mut shared) = (Weight::default(), Weight::default());
        for known in stock.pids.iter().filter_map(|pid| self.known.get(pid)) {
            let part = if known.n_users == 1 { &mut own } else { &mut shared };
            *part = *part + Weight { n_templates: 1, bytes: known.bytes };
        }
        (own, shared)
    }

    pub(super) fn candidates<'a>(&'a self, sandbox: &'a SandboxId) -> impl Iterator<Item = Candidate> + 'a {
        let one = |(checkpoint, stock): (&u32, &Stock)| Candidate {
            sandbox: sandbox.clone(),
            checkpoint: *checkpoint,
            weight: self.shares_of(stock).0,
            unused: stock.used.elapsed(),
        };
        self.stock.iter().map(one)
    }
}

/// What may have changed since a template was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    /// It never was.
    New,
    /// Of one of the two latest checkpoints: it grows with each page that the program writes.
    Young,
    /// Of an older one.
    Old,
}
