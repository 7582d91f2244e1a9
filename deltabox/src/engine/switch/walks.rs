//! Walks through directories, which a switch would make fail: waited for.
//!
//! Who walks (fts of `find`, `rm -r`, `du`; Python's `rmtree`) remembers devices and inode numbers and compares them on
//! the way back, and the device changes with the root. A walk is known by a directory that is open for reading. There
//! are those who only keep one open: their directories *stand*, and are not waited for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use libc::pid_t;

use crate::deltacr::rebase::OpenDirectory;
use crate::deltacr::stop::Stopped;

/// A directory stands if its process has had it open for so long (chosen: a walk that waits for a disk goes on sooner)...
const IDLE: Duration = Duration::from_millis(200);
/// ... and has run for less than this meanwhile (chosen: a few stops cost less, a walk more).
const RESTING: Duration = Duration::from_millis(1);
/// While somebody walks (chosen: a hundred times what a stop that finds it takes).
const BETWEEN_STOPS: Duration = Duration::from_millis(50);
/// Chosen: a look costs microseconds and stops nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Directories that the programs of a sandbox keep open, as known from its switches so far.
#[derive(Debug, Default)]
pub(in crate::engine) struct Standing(BTreeSet<OpenDirectory>);

/// The walks of one switch.
#[derive(Debug)]
pub(in crate::engine) struct Walks<'a> {
    /// Until when they are waited for.
    pub(in crate::engine) end: Instant,
    standing: &'a mut Standing,
    /// Since when each was seen open, and how long its process had run by then.
    seen: BTreeMap<OpenDirectory, (Instant, Duration)>,
    /// Who walked at the last look.
    walkers: BTreeSet<pid_t>,
}

impl<'a> Walks<'a> {
    pub(in crate::engine) fn new(end: Instant, standing: &'a mut Standing) -> Self {
        Self { end, standing, seen: BTreeMap::new(), walkers: BTreeSet::new() }
    }

    /// Lets the programs run until nobody walks any more, or for so long that a stop costs them little.
    pub(super) fn wait(&self) {
        let end = Instant::now() + BETWEEN_STOPS;
        while Instant::now() < end && self.walkers.iter().any(|pid| has_directory(*pid)) {
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Whether to let the programs go on for a while and look again.
    pub(super) fn are_in_the_way(&mut self, stopped: &Stopped, open: BTreeSet<OpenDirectory>) -> bool {
        let now = Instant::now();
        let known = &self.standing.0;
        let walked: Vec<_> = open.iter().filter(|directory| !known.contains(directory)).cloned().collect();
        let has_time = now + BETWEEN_STOPS < self.end;
        let rest = |directory: &OpenDirectory, seen: &mut BTreeMap<_, _>| {
            let ran = run_time(stopped, directory.pid());
            let (since, before) = *seen.entry(directory.clone()).or_insert((now, ran));
            if now - since < IDLE {
                return false;
            }
            seen.insert(directory.clone(), (now, ran));
            ran.saturating_sub(before) < RESTING
        };
        if has_time && !walked.iter().all(|directory| rest(directory, &mut self.seen)) {
            self.walkers = walked.iter().map(OpenDirectory::pid).collect();
            return true;
        }
        self.walkers.clear();
        // Waited for in vain, or known: next time too.
        self.standing.0 = open;
        false
    }
}

/// Whether a process has a directory open, as far as that can be seen while it runs.
fn has_directory(pid: pid_t) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    descriptors.into_iter().flatten().flatten().any(|entry| fs::metadata(entry.path()).is_ok_and(|look| look.is_dir()))
}

/// How long the threads of a process have run, in all.
fn run_time(stopped: &Stopped, pid: pid_t) -> Duration {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    let of_thread = |tid: pid_t| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
    };
    let threads = process.iter().flat_map(|process| &process.threads);
    threads.filter_map(|thread| of_thread(thread.tid)).sum()
}
