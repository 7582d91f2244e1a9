//! A second thread of the engine, which helps the tracer with what takes long, if a CPU is free.
//!
//! ```text
//! parts            0  1  2  3  4  5  6 ...        each is begun once, from the front
//! tracer           *     *     *                  takes the results in their order; what was begun and is not done when
//! second thread       *     *     *  (late)       nothing else is to be begun, it does itself
//! ```
//! Nobody waits for the second thread: on a busy machine it comes late or not at all, and has cost a wake-up. So what it does
//! must be of no consequence when it comes late: it looks and reads, the tracer writes.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// So many results wait to be taken at most (chosen: of 256 KB each they are 16 MB).
const MOST_WAITING: usize = 64;

/// Does `work` with all parts, and takes the results in their order. With no more than `few` parts nobody is asked to help.
///
/// # Errors
/// The first failure of either.
pub(super) fn share<P, R>(
    parts: Vec<P>,
    few: usize,
    work: impl Fn(&P) -> io::Result<R> + Send + Sync + 'static,
    mut take: impl FnMut(&P, R) -> io::Result<()>,
) -> io::Result<()>
where
    P: Send + Sync + 'static,
    R: Send + 'static,
{
    let done = parts.iter().map(|_| Mutex::new(None)).collect();
    let job = Arc::new(Job { parts, work, done, next: AtomicUsize::new(0), n_taken: AtomicUsize::new(0) });
    if job.parts.len() > few {
        let theirs = job.clone();
        // One that works for another sandbox is left alone.
        let _ = second_thread().map(|thread| thread.try_send(Box::new(move || theirs.help())));
    }
    let mut at = 0;
    while let Some(part) = job.parts.get(at) {
        let result = match job.result(at) {
            Some(result) => result,
            None => match job.begin() {
                Some(other) if other != at => {
                    let result = (job.work)(&job.parts[other])?;
                    job.put(other, result);
                    continue;
                }
                // The second thread has lost its CPU in the middle of it, or failed: that is found out here too.
                _ => (job.work)(part)?,
            },
        };
        take(part, result)?;
        at += 1;
        job.n_taken.store(at, Ordering::Relaxed);
    }
    Ok(())
}

struct Job<P, R, W> {
    parts: Vec<P>,
    work: W,
    done: Vec<Mutex<Option<R>>>,
    next: AtomicUsize,
    n_taken: AtomicUsize,
}

impl<P, R, W: Fn(&P) -> io::Result<R>> Job<P, R, W> {
    /// The next part that nobody has begun, unless too many results wait.
    fn begin(&self) -> Option<usize> {
        if self.next.load(Ordering::Relaxed) >= self.n_taken.load(Ordering::Relaxed) + MOST_WAITING {
            return None;
        }
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        (at < self.parts.len()).then_some(at)
    }

    fn put(&self, at: usize, result: R) {
        *self.done[at].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    }

    fn result(&self, at: usize) -> Option<R> {
        self.done[at].lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn help(&self) {
        while let Some(at) = self.begin() {
            // A failure is the tracer's to find.
            let Ok(result) = (self.work)(&self.parts[at]) else { return };
            self.put(at, result);
        }
    }
}

type Help = Box<dyn FnOnce() + Send>;

/// It lives as long as the engine.
fn second_thread() -> Option<&'static SyncSender<Help>> {
    static THREAD: OnceLock<Option<SyncSender<Help>>> = OnceLock::new();
    let start = || {
        let (sender, jobs) = sync_channel::<Help>(0);
        let work = move || {
            // It was started by a tracer, which is kept on one CPU.
            if let Ok(cpus) = sched_getaffinity(Pid::this()) {
                let _ = sched_setaffinity(Pid::from_raw(0), &cpus);
            }
            jobs.into_iter().for_each(|help| help());
        };
        std::thread::Builder::new().name("second".to_owned()).spawn(work).ok().map(|_| sender)
    };
    THREAD.get_or_init(start).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whoever_works() {
        for n in [0, 1, 3, 500] {
            let mut taken = Vec::new();
            let work = |part: &usize| Ok(part * 2);
            share((0..n).collect(), 2, work, |part, double| {
                taken.push((*part, double));
                Ok(())
            })
            .expect("no failure");
            assert!(taken.into_iter().eq((0..n).map(|part| (part, part * 2))));
        }
    }

    #[test]
    fn a_failure_is_found_whoever_meets_it() {
        let work = |part: &usize| if *part == 300 { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) };
        let mut n_taken = 0;
        let failed = share((0..500).collect(), 0, work, |_, ()| {
            n_taken += 1;
            Ok(())
        });
        assert_eq!(failed.expect_err("a failure").kind(), io::ErrorKind::NotFound);
        assert!(n_taken <= 300);
    }
}
