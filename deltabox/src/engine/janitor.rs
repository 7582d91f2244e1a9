//! What nobody has to wait for: old mounts are dropped, layers nobody needs are removed.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};

type Job = Box<dyn FnOnce() + Send>;

/// Jobs that may wait (chosen: then those who bring more wait for the janitor, so that nothing piles up).
const N_WAITING: usize = 64;

/// A thread that takes jobs one after the other.
#[derive(Clone, Debug)]
pub(super) struct Janitor(SyncSender<Job>);

impl Janitor {
    pub(super) fn start() -> io::Result<Self> {
        let (sender, jobs) = sync_channel::<Job>(N_WAITING);
        let work = move || jobs.into_iter().for_each(|job| job());
        std::thread::Builder::new().name("janitor".to_owned()).spawn(work)?;
        Ok(Self(sender))
    }

    /// Waits while too many are waiting already.
    pub(super) fn take(&self, job: impl FnOnce() + Send + 'static) {
        if let Err(refused) = self.0.send(Box::new(job)) {
            // The thread is gone (a job panicked): better late than never.
            (refused.0)();
        }
    }
}
