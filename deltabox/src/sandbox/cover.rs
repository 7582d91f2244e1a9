//! Covers: empty directories over `/proc/PID` inside, so that nothing there tells of a process.
//!
//! ```text
//! /proc            of the sandbox
//!   1048577        the number shows in a listing; beneath it is nothing: ps, top, pgrep take it for one that has just ended
//! ```
//! The kernel takes a cover away when its process is reaped (6.18: proc_flush_pid, d_invalidate, detach_mounts), so nobody
//! has to. `hidepid` would do no good: it hides by users, a root's own daemons too.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::pid_t;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::root::Door;
use crate::sys::mount::{self, Clone, attr};

/// Covers for processes of one sandbox.
#[derive(Debug)]
pub struct Covers {
    door: Door,
    /// Its `/proc`.
    proc: OwnedFd,
    empty: OwnedFd,
    ready: Mutex<Vec<OwnedFd>>,
}

impl Covers {
    /// For the sandbox of init (host PID), whose `/proc` is there.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn new(init: pid_t) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let proc = nix::fcntl::open(format!("/proc/{init}/root/proc").as_str(), flags, Mode::empty())?;
        // A ramfs, unlike a tmpfs, has no size: df and the like do not list it.
        let fs = mount::fsopen(c"ramfs")?;
        mount::fsconfig_string(fs.as_fd(), c"mode", c"555")?;
        mount::fsconfig_create(fs.as_fd())?;
        let empty = mount::fsmount(fs.as_fd(), attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)?;
        Ok(Self { door: Door::of(init)?, proc, empty, ready: Mutex::default() })
    }

    /// Makes them ahead: `n` are there afterwards.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn prepare(&self, n: usize) -> io::Result<()> {
        let mut ready = self.lock();
        while ready.len() < n {
            // Only from here: the empty directory's own mount is in none of the sandbox's namespaces.
            ready.push(mount::open_tree_clone(self.empty.as_fd(), c"", Clone::One)?);
        }
        Ok(())
    }

    /// Covers processes, given by their numbers inside. Some microseconds to go there, and 10 for each.
    ///
    /// # Errors
    /// The kernel's word. Some may be covered.
    pub fn put_over(&self, inside: &[pid_t]) -> io::Result<()> {
        if inside.is_empty() {
            return Ok(());
        }
        self.prepare(inside.len())?;
        let mut ready = self.lock();
        self.door.visit(|| {
            for (number, cover) in inside.iter().zip(ready.drain(..inside.len())) {
                let at = CString::new(number.to_string())?;
                mount::move_mount(cover.as_fd(), self.proc.as_fd(), &at)?;
            }
            Ok(())
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use super::*;

    /// Killed and reaped when dropped.
    struct Sleeper(Child);

    impl Sleeper {
        fn start(words: &[&str]) -> Self {
            Self(Command::new(words[0]).args(&words[1..]).spawn().expect("start"))
        }

        fn pid(&self) -> pid_t {
            self.0.id().try_into().expect("a pid")
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A process with mounts of its own, in place of an init.
    fn init() -> Sleeper {
        let init = Sleeper::start(&["unshare", "-m", "--propagation", "private", "sleep", "1000"]);
        let look = |pid: &dyn std::fmt::Display| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).expect("mounts");
        let end = Instant::now() + Duration::from_secs(10);
        let name = || std::fs::read_to_string(format!("/proc/{}/comm", init.pid())).expect("a name");
        while look(&init.pid()) == look(&"self") || name().trim() != "sleep" {
            assert!(Instant::now() < end, "it has no mounts of its own");
            std::thread::yield_now();
        }
        init
    }

    #[test]
    fn a_cover_hides_a_process_from_one_proc_only_and_goes_with_it() {
        let init = init();
        let covers = Covers::new(init.pid()).expect("covers");
        let (one, other) = (Sleeper::start(&["sleep", "1000"]), Sleeper::start(&["sleep", "1000"]));
        covers.put_over(&[one.pid()]).expect("cover");
        let inside = |pid: pid_t, name: &str| format!("/proc/{}/root/proc/{pid}/{name}", init.pid());
        assert!(!Path::new(&inside(one.pid(), "stat")).exists());
        assert!(std::fs::read_dir(inside(one.pid(), "")).expect("a directory").next().is_none());
        assert!(Path::new(&inside(other.pid(), "stat")).exists());
        assert!(Path::new(&format!("/proc/{}/stat", one.pid())).exists(), "outside it shows");
        let mounts = || std::fs::read_to_string(format!("/proc/{}/mountinfo", init.pid())).expect("mounts");
        let at = format!(" /proc/{} ", one.pid());
        assert!(mounts().contains(&at));
        drop(one);
        assert!(!mounts().contains(&at), "the kernel has not taken it away");
        assert!(covers.put_over(&[0x3f_ffff]).is_err(), "nobody to cover");
    }

    /// Not a test: prints the numbers of docs/templates.md. Run with `--release --ignored --nocapture`.
    #[test]
    #[ignore = "prints numbers"]
    fn measure_covers() {
        let init = init();
        let covers = Covers::new(init.pid()).expect("covers");
        for n in [1, 8, 64] {
            let (mut ahead, mut over) = (Vec::new(), Vec::new());
            for _ in 0..200_usize.div_ceil(n) {
                let all: Vec<_> = (0..n).map(|_| Sleeper::start(&["sleep", "1000"])).collect();
                let begin = Instant::now();
                covers.prepare(n).expect("prepare");
                ahead.push(begin.elapsed());
                let pids: Vec<_> = all.iter().map(Sleeper::pid).collect();
                let begin = Instant::now();
                covers.put_over(&pids).expect("cover");
                over.push(begin.elapsed());
            }
            for (what, mut took) in [("ahead of the stop", ahead), ("in the stop", over)] {
                took.sort_unstable();
                let at = |part: usize| took[(took.len() - 1) * part / 100];
                println!(
                    "{n} covers, {what}: best {:?}, p50 {:?}, p99 {:?}, n = {}",
                    at(0),
                    at(50),
                    at(99),
                    took.len()
                );
            }
        }
    }
}
