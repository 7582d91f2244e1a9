//! Registers of all threads of a process: read at a checkpoint, put back where the threads are the same.

use libc::{pid_t, user_regs_struct as Registers};
use nix::sys::ptrace::setregs;
use nix::unistd::Pid;

use super::error::{TemplateError, TemplateRefusal, process};
use crate::deltacr::area::Memory;
use crate::deltacr::frame::XSTATE_MAX_BYTES;
use crate::deltacr::rseq::leave_critical_section;
use crate::deltacr::stop::{Stopped, Thread};
use crate::deltacr::timed::TimedCalls;
use crate::sys::ptrace::{
    RseqConfiguration, get_robust_list, get_rseq_configuration, get_signal_mask, get_xstate, set_signal_mask,
    set_xstate,
};

/// The threads of a process as they were.
#[derive(Clone, Debug)]
pub struct Threads {
    records: Vec<Record>,
}

/// A thread.
#[derive(Clone, Debug)]
struct Record {
    tid: pid_t,
    registers: Registers,
    mask: u64,
    xstate: Vec<u8>,
    rseq: RseqConfiguration,
    robust_list: (u64, u64),
}

impl Threads {
    /// Reads those of a stopped process.
    ///
    /// # Errors
    /// It is not among the stopped ones, or was killed.
    pub fn read(stopped: &Stopped, pid: pid_t) -> Result<Self, TemplateError> {
        let threads = threads_of(stopped, pid)?;
        let timed = &stopped.kept.waits.timed;
        let records = threads.iter().map(|thread| Record::read(pid, thread, timed)).collect::<Result<_, _>>()?;
        Ok(Self { records })
    }

    /// How many.
    pub fn n_threads(&self) -> usize {
        self.records.len()
    }

    /// Fails unless the stopped process has just these threads, with what the kernel keeps for each.
    pub(in crate::deltacr) fn check(&self, stopped: &Stopped, pid: pid_t) -> Result<(), TemplateError> {
        let threads = threads_of(stopped, pid)?;
        let refused = || TemplateError::from(TemplateRefusal::Threads { pid });
        if threads.len() != self.records.len() {
            return Err(refused());
        }
        for record in &self.records {
            let failed = process("read the threads of", pid);
            let is_there = threads.iter().any(|thread| thread.tid == record.tid);
            if !is_there
                || get_rseq_configuration(record.tid).map_err(failed)? != record.rseq
                || get_robust_list(record.tid).map_err(failed)? != record.robust_list
            {
                return Err(refused());
            }
        }
        Ok(())
    }

    /// Puts them back. Calls that waited begin their wait anew, and what was remembered of waits is forgotten.
    pub(super) fn put_back(&self, stopped: &mut Stopped, pid: pid_t) -> Result<(), TemplateError> {
        let failed = process("set registers of", pid);
        for record in &self.records {
            set_xstate(record.tid, &record.xstate).map_err(failed)?;
            set_signal_mask(record.tid, record.mask).map_err(failed)?;
            setregs(Pid::from_raw(record.tid), record.registers).map_err(process("set registers of", pid))?;
            stopped.keep_registers(record.tid, record.registers);
            stopped.kept.waits.forget(record.tid);
        }
        Ok(())
    }
}

impl Record {
    fn read(pid: pid_t, thread: &Thread, timed: &TimedCalls) -> Result<Self, TemplateError> {
        let failed = process("read registers of", pid);
        let tid = thread.tid;
        let mut registers = timed.without_time_left(tid, &thread.registers);
        registers.rip = leave_critical_section(&Memory::of(pid, tid), tid, &registers).map_err(failed)?;
        let mut xstate = vec![0; XSTATE_MAX_BYTES];
        let filled = get_xstate(tid, &mut xstate).map_err(failed)?;
        xstate.truncate(filled);
        Ok(Self {
            tid,
            registers,
            mask: get_signal_mask(tid).map_err(failed)?,
            xstate,
            rseq: get_rseq_configuration(tid).map_err(failed)?,
            robust_list: get_robust_list(tid).map_err(failed)?,
        })
    }
}

fn threads_of(stopped: &Stopped, pid: pid_t) -> Result<&[Thread], TemplateError> {
    let process = stopped.processes().iter().find(|process| process.pid == pid);
    process.map(|process| process.threads.as_slice()).ok_or_else(|| TemplateRefusal::Threads { pid }.into())
}
