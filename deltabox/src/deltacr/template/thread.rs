//! One thread: what the kernel keeps for it, read and put back. What a program keeps for it is memory.

use libc::{pid_t, user_regs_struct as Registers};
use nix::sys::ptrace::setregs;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::error::{TemplateError, check, process};
use super::face::Face;
use crate::deltacr::area::Memory;
use crate::deltacr::frame::{XSTATE_MAX_BYTES, zero_registers};
use crate::deltacr::handover::call;
use crate::deltacr::inject::Call;
use crate::deltacr::rseq::leave_critical_section;
use crate::deltacr::stop::{Stopped, Thread};
use crate::deltacr::told::PR_GET_TID_ADDRESS;
use crate::sys::process::CloneCall;
use crate::sys::ptrace::{
    RseqConfiguration, get_robust_list, get_rseq_configuration, get_signal_mask, get_xstate, set_signal_mask,
    set_xstate,
};

/// rseq's flag to give up a registration.
const RSEQ_UNREGISTER: u64 = 1;
const N_REGISTERS: usize = 27;

/// A thread as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Inside.
    pub(super) tid: pid_t,
    name: Vec<u8>,
    pub(super) rights: String,
    /// In the order of the kernel's `struct user_regs_struct`.
    registers: [u64; N_REGISTERS],
    mask: u64,
    /// Extended registers, without the zeros at their end.
    xstate: Vec<u8>,
    xstate_bytes: usize,
    rseq: Rseq,
    robust_list: (u64, u64),
    /// Where the kernel clears its number at its end, 0 for nowhere.
    clear_tid: u64,
}

/// A registration for restartable sequences; address 0 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Rseq {
    address: u64,
    size_bytes: u32,
    signature: u32,
}

impl Rseq {
    fn of(tid: pid_t) -> std::io::Result<Self> {
        let RseqConfiguration { address, size_bytes, signature, .. } = get_rseq_configuration(tid)?;
        Ok(if address == 0 { Self::NONE } else { Self { address, size_bytes, signature } })
    }

    const NONE: Self = Self { address: 0, size_bytes: 0, signature: 0 };

    fn call(self, flags: u64) -> Call {
        call(libc::SYS_rseq, &[self.address, self.size_bytes.into(), flags, self.signature.into()])
    }
}

impl Record {
    pub(super) fn read(stopped: &mut Stopped, pid: pid_t, tid: pid_t) -> Result<Self, TemplateError> {
        let failed = process("read registers of", pid);
        let told = stopped.take_told(pid, tid);
        let face = told.as_ref().map_or_else(|| Face::read(pid, tid), |(_, status)| Face::of(status));
        let Face { inside, name, rights } = face.map_err(failed)?;
        let mask = get_signal_mask(tid).map_err(failed)?;
        let mut xstate = vec![0; XSTATE_MAX_BYTES];
        let xstate_bytes = get_xstate(tid, &mut xstate).map_err(failed)?;
        let used = xstate[..xstate_bytes].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        xstate.truncate(used);
        let (rseq, robust_list) = (Rseq::of(tid).map_err(failed)?, get_robust_list(tid).map_err(failed)?);
        let clear_tid = match told {
            Some((clear_tid, _)) => clear_tid,
            None => read_clear_tid(stopped, pid, tid)?,
        };
        // After the hand: that may have led the thread out of a restartable sequence.
        let mut registers = zero_registers();
        if let Some(thread) = find(stopped, pid, tid) {
            registers = stopped.kept.waits.timed.without_time_left(tid, &thread.registers);
        }
        registers.rip = leave_critical_section(&Memory::of(pid, tid), tid, &registers).map_err(failed)?;
        let registers = words(&registers);
        Ok(Self { tid: inside, name, rights, registers, mask, xstate, xstate_bytes, rseq, robust_list, clear_tid })
    }

    /// The registers that it goes on with.
    pub(super) fn registers(&self) -> Registers {
        from_words(&self.registers)
    }

    /// The clone3 that makes it, its number to be found at `number`.
    pub(super) fn birth(&self, number: u64) -> CloneCall {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | if self.clear_tid == 0 { 0 } else { libc::CLONE_CHILD_CLEARTID };
        CloneCall {
            flags: flags.cast_unsigned().into(),
            child_tid: self.clear_tid,
            tls: self.registers().fs_base,
            set_tid: number,
            ..CloneCall::default()
        }
    }

    /// Takes away a registration for restartable sequences that it did not have. The kernel writes to its memory then.
    pub(super) fn unregister(&self, stopped: &mut Stopped, pid: pid_t, tid: pid_t) -> Result<(), TemplateError> {
        let present = Rseq::of(tid).map_err(process("read the threads of", pid))?;
        if present == self.rseq || present == Rseq::NONE {
            return Ok(());
        }
        let mut hand = stopped.hand_of(pid, tid)?;
        let results = hand.run(&[present.call(RSEQ_UNREGISTER)])?;
        check(pid, "rseq", results[0])?;
        Ok(hand.close()?)
    }

    /// Puts it back into a thread with this host TID. `is_new`: nothing of it is known. A call that waited begins its wait
    /// anew.
    pub(super) fn put_back(
        &self,
        stopped: &mut Stopped,
        pid: pid_t,
        tid: pid_t,
        is_new: bool,
    ) -> Result<(), TemplateError> {
        let failed = process("set registers of", pid);
        if is_new || self.differs(stopped, pid, tid)? {
            self.make_calls(stopped, pid, tid)?;
        }
        let mut xstate = self.xstate.clone();
        xstate.resize(self.xstate_bytes, 0);
        set_xstate(tid, &xstate).map_err(failed)?;
        set_signal_mask(tid, self.mask).map_err(failed)?;
        let registers = self.registers();
        setregs(Pid::from_raw(tid), registers).map_err(process("set registers of", pid))?;
        stopped.keep_registers(tid, registers);
        stopped.kept.waits.forget(tid);
        Ok(())
    }

    /// Whether the kernel keeps something else for it. Where its number is cleared only the thread can be asked; a thread
    /// library sets it once, with the base of `fs`.
    fn differs(&self, stopped: &Stopped, pid: pid_t, tid: pid_t) -> Result<bool, TemplateError> {
        let failed = process("read the threads of", pid);
        let fs_base = find(stopped, pid, tid).map_or(0, |thread| thread.registers.fs_base);
        Ok(fs_base == 0
            || fs_base != self.registers().fs_base
            || Rseq::of(tid).map_err(failed)? != self.rseq
            || get_robust_list(tid).map_err(failed)? != self.robust_list
            || Face::read(pid, tid).map_err(failed)?.name != self.name)
    }

    fn make_calls(&self, stopped: &mut Stopped, pid: pid_t, tid: pid_t) -> Result<(), TemplateError> {
        let present = Rseq::of(tid).map_err(process("read the threads of", pid))?;
        stopped.forget_told(pid);
        let mut hand = stopped.hand_of(pid, tid)?;
        let at = hand.scratch().start;
        let name = [self.name.as_slice(), &[0]].concat();
        let mut calls = vec![
            call(libc::SYS_set_robust_list, &[self.robust_list.0, self.robust_list.1]),
            call(libc::SYS_set_tid_address, &[self.clear_tid]),
            call(libc::SYS_prctl, &[libc::PR_SET_NAME.cast_unsigned().into(), at]),
        ];
        calls.extend((present != self.rseq).then(|| self.rseq.call(0)));
        let results = hand.run_with(&calls, (at, &name), (at, &mut []))?;
        for (result, name) in results.iter().zip(["set_robust_list", "set_tid_address", "prctl", "rseq"]) {
            check(pid, name, *result)?;
        }
        Ok(hand.close()?)
    }
}

fn read_clear_tid(stopped: &mut Stopped, pid: pid_t, tid: pid_t) -> Result<u64, TemplateError> {
    let mut hand = stopped.hand_of(pid, tid)?;
    let at = hand.scratch().start;
    let mut bytes = [0; 8];
    let ask = call(libc::SYS_prctl, &[PR_GET_TID_ADDRESS, at]);
    let results = hand.run_with(&[ask], (at, &[]), (at, &mut bytes))?;
    check(pid, "prctl", results[0])?;
    hand.close()?;
    Ok(u64::from_le_bytes(bytes))
}

fn find(stopped: &Stopped, pid: pid_t, tid: pid_t) -> Option<Thread> {
    let process = stopped.processes().iter().find(|process| process.pid == pid)?;
    process.threads.iter().find(|thread| thread.tid == tid).copied()
}

fn words(registers: &Registers) -> [u64; N_REGISTERS] {
    let Registers {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    } = *registers;
    [
        r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp, ss,
        fs_base, gs_base, ds, es, fs, gs,
    ]
}

fn from_words(words: &[u64; N_REGISTERS]) -> Registers {
    let [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    ] = *words;
    Registers {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    }
}
