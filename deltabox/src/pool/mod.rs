//! The pool: what the templates of all sandboxes take, and how much they may.
//!
//! ```text
//! checkpoint   admit -> Ticket -> stop; at most so many templates are made -> keep      (dropped: nothing was made)
//!                 '-> Full, before anybody is stopped
//! afterwards   survey, in the background: what the new ones weigh, and the one before, which the program's writes made grow
//! ```
//! What is refused is refused on fresh figures: where the last known ones reach a bound all are measured once more.
//! Nothing is evicted: each template is the only copy of its process at that moment.

mod judge;
mod shelf;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::sys::sysinfo::sysinfo;

use crate::deltacr::template::Gauge;
use crate::sandbox::{PoolBounds as Bounds, SandboxId};
pub use judge::{Candidate, Reached, Weight, Whose};
use judge::{Size, judge, largest};
use shelf::{Age, Shelf};

/// How much longer than a survey its sandbox is left alone afterwards (chosen: a twentieth of a processor).
const REST: u32 = 20;
/// Checkpoints that are named when there is no room (chosen).
const N_NAMED: usize = 3;

/// What all sandboxes' templates take.
#[derive(Debug)]
pub struct Pool {
    host: Bounds,
    shelves: Mutex<BTreeMap<SandboxId, Shelf>>,
}

/// A checkpoint that has no room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Full {
    /// Whose bound is in the way.
    pub whose: Whose,
    /// Which one.
    pub reached: Reached,
    /// What is held.
    pub held: Weight,
    /// Checkpoints whose removal would free most.
    pub largest: Vec<Candidate>,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.whose {
            Whose::Sandbox => "its templates",
            Whose::Host => "the templates of all sandboxes",
        };
        match self.reached {
            Reached::Templates(most) => {
                write!(f, "{who} are {}, and there is room for {most}", self.held.n_templates)
            }
            Reached::Bytes(most) => {
                write!(f, "{who} take {} of memory, and may take {}", Size(self.held.bytes), Size(most))
            }
        }
    }
}

impl Full {
    /// What to do.
    pub fn hint(&self) -> String {
        let option = match self.reached {
            Reached::Templates(_) => "--pool-templates",
            Reached::Bytes(_) => "--pool-memory",
        };
        let command = match self.whose {
            Whose::Sandbox => "create",
            Whose::Host => "serve",
        };
        let named: Vec<_> = self.largest.iter().map(Candidate::to_string).collect();
        match named.as_slice() {
            [] => format!("give more room with `{command} {option}`, or make a checkpoint with --fs-only"),
            named => format!("`deltabox rm` of {} frees most; or `{command} {option}`", named.join(", ")),
        }
    }
}

impl Pool {
    /// An empty one.
    pub fn new(host: Bounds) -> Arc<Self> {
        Arc::new(Self { host, shelves: Mutex::default() })
    }

    /// What a host may hold if nobody says: half of its memory.
    pub fn default_bounds() -> Bounds {
        Bounds { n_templates: None, bytes: sysinfo().ok().map(|machine| machine.ram_total() / 2) }
    }

    /// A sandbox's bounds from now on.
    pub fn open(&self, sandbox: &SandboxId, bounds: Bounds) {
        self.lock().entry(sandbox.clone()).or_default().bounds = bounds;
    }

    /// Forgets all of a sandbox's checkpoints: its templates are gone.
    pub fn clear(&self, sandbox: &SandboxId) {
        if let Some(shelf) = self.lock().get_mut(sandbox) {
            shelf.clear();
        }
    }

    /// Forgets a sandbox.
    pub fn close(&self, sandbox: &SandboxId) {
        self.lock().remove(sandbox);
    }

    /// Makes room for `n` templates, or as many as there is room for.
    ///
    /// # Errors
    /// There is none for even one.
    pub fn admit(self: &Arc<Self>, sandbox: &SandboxId, n: usize) -> Result<Ticket, Full> {
        match self.try_admit(sandbox, n) {
            Err(Full { reached: Reached::Bytes(_), whose, .. }) => {
                self.measure(|one, _| whose == Whose::Host || one == sandbox);
                self.try_admit(sandbox, n)
            }
            judged => judged,
        }
    }

    fn try_admit(self: &Arc<Self>, sandbox: &SandboxId, n: usize) -> Result<Ticket, Full> {
        let mut shelves = self.lock();
        let host = shelves.values().map(Shelf::expected).fold(Weight::default(), |sum, one| sum + one);
        let (bounds, own) = shelves.get(sandbox).map(|shelf| (shelf.bounds, shelf.expected())).unwrap_or_default();
        match judge([(Whose::Sandbox, bounds, own), (Whose::Host, self.host, host)]) {
            Ok(most) => {
                let n = n.min(most);
                shelves.entry(sandbox.clone()).or_default().n_expected += n;
                Ok(Ticket { pool: Arc::clone(self), sandbox: sandbox.clone(), n, most })
            }
            Err((whose, reached)) => {
                let held = if whose == Whose::Host { host } else { own };
                let meant = shelves.iter().filter(|(id, _)| whose == Whose::Host || *id == sandbox);
                let largest = largest(meant.flat_map(|(id, shelf)| shelf.candidates(id)).collect(), N_NAMED);
                Err(Full { whose, reached, held, largest })
            }
        }
    }

    /// Takes in a checkpoint's templates, each with the bytes that its process had.
    pub fn put(&self, sandbox: &SandboxId, checkpoint: u32, templates: impl IntoIterator<Item = (Gauge, u64)>) {
        self.lock().entry(sandbox.clone()).or_default().put(checkpoint, templates);
    }

    /// Notes that somebody has gone back to it.
    pub fn touch(&self, sandbox: &SandboxId, checkpoint: u32) {
        if let Some(shelf) = self.lock().get_mut(sandbox) {
            shelf.touch(checkpoint);
        }
    }

    /// Forgets a checkpoint, with what only it had.
    pub fn forget(&self, sandbox: &SandboxId, checkpoint: u32) {
        if let Some(shelf) = self.lock().get_mut(sandbox) {
            shelf.forget(checkpoint);
        }
    }

    /// Measures what is new of a sandbox, and the two latest checkpoints, unless that was done just now.
    pub fn survey(&self, sandbox: &SandboxId) {
        let begin = Instant::now();
        let is_due = |shelf: &Shelf| shelf.rests_until.is_none_or(|until| until <= begin);
        if !self.lock().get(sandbox).is_some_and(is_due) {
            return;
        }
        self.measure(|one, known| one == sandbox && known != Age::Old);
        if let Some(shelf) = self.lock().get_mut(sandbox) {
            shelf.rests_until = Some(Instant::now() + begin.elapsed() * REST);
        }
    }

    /// Measures all of a sandbox's, and tells: the sum; by checkpoint what only it has, and what others have too.
    pub fn weigh(&self, sandbox: &SandboxId) -> (Weight, BTreeMap<u32, (Weight, Weight)>) {
        self.measure(|one, _| one == sandbox);
        let shelves = self.lock();
        let Some(shelf) = shelves.get(sandbox) else { return Default::default() };
        (shelf.weight(), shelf.shares().collect())
    }

    /// What all sandboxes hold, as last measured.
    pub fn held(&self) -> Weight {
        self.lock().values().map(Shelf::weight).fold(Weight::default(), |sum, one| sum + one)
    }

    /// What they may hold.
    pub fn bounds(&self) -> Bounds {
        self.host
    }

    /// Reads the gauges that are meant, and notes what they show. Nobody waits for it.
    fn measure(&self, is_meant: impl Fn(&SandboxId, Age) -> bool) {
        let mut meant = Vec::new();
        for (sandbox, shelf) in self.lock().iter() {
            let ones = shelf.ages().into_iter().filter(|(_, age)| is_meant(sandbox, *age));
            meant.extend(ones.map(|(gauge, _)| (sandbox.clone(), gauge)));
        }
        for (sandbox, gauge) in meant {
            match gauge.read() {
                Ok(bytes) => {
                    if let Some(shelf) = self.lock().get_mut(&sandbox) {
                        shelf.note(gauge.pid(), bytes);
                    }
                }
                Err(error) => tracing::warn!(%sandbox, pid = gauge.pid(), %error, "a template cannot be measured"),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Shelf>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for templates that are being made, given back when dropped.
#[derive(Debug)]
pub struct Ticket {
    pool: Arc<Pool>,
    sandbox: SandboxId,
    n: usize,
    most: usize,
}

impl Ticket {
    /// For how many there is room: processes may have been born since they were counted.
    pub fn most(&self) -> usize {
        self.most
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(shelf) = self.pool.lock().get_mut(&self.sandbox) {
            shelf.n_expected = shelf.n_expected.saturating_sub(self.n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    /// Gauges of this process, under other numbers.
    fn gauge(pid: libc::pid_t) -> Gauge {
        let own = crate::sys::process::pidfd_open(std::process::id().cast_signed()).expect("a pidfd");
        Gauge::of(pid, Arc::<OwnedFd>::new(own))
    }

    fn id(name: &str) -> SandboxId {
        name.parse().expect("a name")
    }

    #[test]
    fn shared_templates_weigh_once_and_go_with_their_last_checkpoint() {
        let pool = Pool::new(Bounds::default());
        let (dev, bytes) = (id("dev"), 100);
        pool.put(&dev, 1, [(gauge(11), bytes), (gauge(12), bytes)]);
        pool.put(&dev, 2, [(gauge(11), bytes), (gauge(13), bytes)]);
        assert_eq!(pool.held(), Weight { n_templates: 3, bytes: 300 });
        pool.forget(&dev, 1);
        assert_eq!(pool.held(), Weight { n_templates: 2, bytes: 200 });
        pool.put(&dev, 2, [(gauge(11), bytes)]);
        assert_eq!(pool.held(), Weight { n_templates: 1, bytes: 100 });
        pool.forget(&dev, 2);
        pool.forget(&dev, 2);
        assert_eq!(pool.held(), Weight::default());
    }

    #[test]
    fn room_that_was_given_is_not_given_twice_and_comes_back() {
        let pool = Pool::new(Bounds { n_templates: Some(5), bytes: None });
        let (dev, other) = (id("dev"), id("other"));
        pool.open(&dev, Bounds { n_templates: Some(3), bytes: None });
        let first = pool.admit(&dev, 9).expect("room");
        assert_eq!((first.n, first.most()), (3, 3));
        let full = pool.admit(&dev, 1).expect_err("no room");
        assert_eq!((full.whose, full.reached), (Whose::Sandbox, Reached::Templates(3)));
        let second = pool.admit(&other, 9).expect("room");
        assert_eq!(second.n, 2);
        let full = pool.admit(&other, 1).expect_err("no room");
        assert_eq!((full.whose, full.held.n_templates), (Whose::Host, 5));
        assert!(full.to_string().contains("are 5, and there is room for 5"), "{full}");
        drop(first);
        pool.put(&dev, 7, [(gauge(11), 10 << 20)]);
        drop(second);
        assert_eq!(pool.admit(&dev, 9).expect("room").most(), 2);
    }

    #[test]
    fn what_is_refused_is_refused_on_fresh_figures() {
        let pool = Pool::new(Bounds { n_templates: None, bytes: Some(1 << 40) });
        let dev = id("dev");
        let own = || gauge(std::process::id().cast_signed());
        // As large as can be, before it is measured.
        pool.put(&dev, 1, [(own(), 1 << 41)]);
        pool.admit(&dev, 1).expect("room, as this process is small");
        let held = pool.held().bytes;
        assert!(0 < held && held < 1 << 40, "{held}");
        pool.open(&dev, Bounds { n_templates: None, bytes: Some(1) });
        let full = pool.admit(&dev, 1).expect_err("no room");
        assert_eq!((full.whose, full.reached), (Whose::Sandbox, Reached::Bytes(1)));
        assert!(full.hint().contains("dev@c1 (1 templates"), "{}", full.hint());
    }
}
