//! Threads for what nobody has to wait for: old mounts are dropped, layers are removed or merged.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};

type Job = Box<dyn FnOnce() + Send>;

/// Jobs that may wait (chosen: few enough that nothing piles up).
const N_WAITING: usize = 64;

/// A thread that takes jobs one after the other.
#[derive(Clone, Debug)]
pub(super) struct Worker(SyncSender<Job>);

impl Worker {
    /// For what should be done soon.
    pub(super) fn start(name: &str) -> io::Result<Self> {
        Self::start_after(name, || {})
    }

    /// For what has time: programs and the engine's other threads get the processors first.
    pub(super) fn start_in_background(name: &str) -> io::Result<Self> {
        let name_of_it = name.to_owned();
        Self::start_after(name, move || {
            if let Err(error) = crate::sys::process::be_nice() {
                tracing::warn!(%error, "the {name_of_it} thread competes with everybody for the processors");
            }
        })
    }

    fn start_after(name: &str, prepare: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (sender, jobs) = sync_channel::<Job>(N_WAITING);
        let work = move || {
            prepare();
            jobs.into_iter().for_each(|job| job());
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
        Ok(Self(sender))
    }

    /// Waits while too many are waiting already.
    pub(super) fn take(&self, job: impl FnOnce() + Send + 'static) {
        if let Err(refused) = self.0.send(Box::new(job)) {
            // The thread is gone (a job panicked): better late than never.
            (refused.0)();
        }
    }

    /// Whether it takes a job that can be left out: not while too many are waiting.
    pub(super) fn try_take(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.0.try_send(Box::new(job)).is_ok()
    }
}
