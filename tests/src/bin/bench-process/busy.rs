//! Processes that never rest, one for each CPU.

use std::process::{Child, Command};

use anyhow::Context;

/// They end with it.
pub(crate) struct Busy(Vec<Child>);

impl Busy {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let n = std::thread::available_parallelism()?.get();
        let spin = || Command::new("/proc/self/exe").arg("spin").spawn().context("start a process that never rests");
        Ok(Self((0..n).map(|_| spin()).collect::<Result<_, _>>()?))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Such a process's whole life.
pub(crate) fn spin() -> anyhow::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    loop {
        std::hint::spin_loop();
    }
}
