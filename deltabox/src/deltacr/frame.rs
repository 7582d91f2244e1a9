//! What injected code needs to leave a thread as it was: slots and a signal frame, byte by byte. Pure.
//!
//! ```text
//! slots:  all signals | marker | own mask | plain? | rflags rsp rip rax rbx rcx rdx rsi rdi rbp r8 .. r15 | n calls
//!
//! ucontext (at AREA_CONTEXT, where rsp points at rt_sigreturn):
//!    0 flags   8 link  16 stack {sp, flags, size}  40 r8 .. r15  104 rdi rsi rbp rbx rdx rax rcx rsp rip eflags
//!  184 cs gs fs ss  192 err trapno oldmask cr2  224 -> fpstate  232 reserved  296 mask
//!
//! fpstate (64-byte aligned, at AREA_XSTATE): XSAVE standard format; in bytes 464 .. 512 of its legacy part
//!  464 magic1  468 size with magic2  472 components  480 size; magic2 follows the last component
//! ```

use libc::user_regs_struct as Registers;

use super::interrupted::GoOn;
use crate::sys::blob::{AREA_SLOTS, N_SLOTS, slot};

/// Where the extended registers lie in the area: the pages after the slots and the context.
pub(super) const AREA_XSTATE: usize = AREA_SLOTS + 0x1000;
/// How much room they have (measured: 11008 bytes with AMX, 2696 with AVX-512).
pub(super) const XSTATE_MAX_BYTES: usize = 0x3000;
/// The legacy part and the XSAVE header, which are always there.
const XSTATE_MIN_BYTES: usize = 576;
const CONTEXT_BYTES: usize = 304;

/// Registers of which none is set.
pub(super) fn zero_registers() -> Registers {
    Registers {
        r15: 0,
        r14: 0,
        r13: 0,
        r12: 0,
        rbp: 0,
        rbx: 0,
        r11: 0,
        r10: 0,
        r9: 0,
        r8: 0,
        rax: 0,
        rcx: 0,
        rdx: 0,
        rsi: 0,
        rdi: 0,
        orig_rax: 0,
        rip: 0,
        cs: 0,
        eflags: 0,
        rsp: 0,
        ss: 0,
        fs_base: 0,
        gs_base: 0,
        ds: 0,
        es: 0,
        fs: 0,
        gs: 0,
    }
}

/// The slots, as bytes: `own` is what the thread goes on with, `mask` its own mask.
pub(super) fn slots(own: &Registers, mask: u64, marker: i32, how: GoOn) -> [u8; N_SLOTS * 8] {
    let plain = u64::from(how == GoOn::Plain);
    let values: [u64; N_SLOTS] = [
        u64::MAX,
        1 << (marker - 1),
        mask,
        plain,
        own.eflags,
        own.rsp,
        own.rip,
        own.rax,
        own.rbx,
        own.rcx,
        own.rdx,
        own.rsi,
        own.rdi,
        own.rbp,
        own.r8,
        own.r9,
        own.r10,
        own.r11,
        own.r12,
        own.r13,
        own.r14,
        own.r15,
        0,
    ];
    const _: () = assert!(slot::RFLAGS + 1 + slot::REGISTERS.len() == slot::COUNT, "the slots are those of the code");
    let mut bytes = [0; N_SLOTS * 8];
    for (place, value) in bytes.chunks_exact_mut(8).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// The `ucontext` of rt_sigreturn, with the extended registers at `xstate`.
pub(super) fn context(own: &Registers, mask: u64, xstate: u64) -> [u8; CONTEXT_BYTES] {
    // UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS.
    const FLAGS: u64 = 1 | 2 | 4;
    // Not a mode that sigaltstack knows: the kernel then leaves the alternate stack, which ptrace does not tell, alone
    // (restore_altstack in kernel/signal.c passes over all but EFAULT).
    const KEEP_STACK: u64 = 0x7fff_0000;
    // cs and ss are 16-bit numbers; gs and fs between them are not restored in 64-bit code.
    let segments = (own.cs & 0xffff) | ((own.ss & 0xffff) << 48);
    let mut values = [0_u64; CONTEXT_BYTES / 8];
    values[0] = FLAGS;
    values[3] = KEEP_STACK;
    values[5..24].copy_from_slice(&[
        own.r8, own.r9, own.r10, own.r11, own.r12, own.r13, own.r14, own.r15, own.rdi, own.rsi, own.rbp, own.rbx,
        own.rdx, own.rax, own.rcx, own.rsp, own.rip, own.eflags, segments,
    ]);
    values[28] = xstate;
    values[37] = mask;
    let mut bytes = [0; CONTEXT_BYTES];
    for (place, value) in bytes.chunks_exact_mut(8).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Makes what PTRACE_GETREGSET gave (`filled` bytes of `xstate`) the extended registers of a signal frame; the length
/// of that. `end_of` tells where a component ends in the standard format. `None`: it does not fit or is damaged.
pub(super) fn seal_xstate(xstate: &mut [u8], filled: usize, end_of: impl Fn(u32) -> usize) -> Option<usize> {
    const MAGIC1: u32 = 0x4650_5853;
    const MAGIC2: u32 = 0x4650_5845;
    const LEGACY: u64 = 3;
    if filled < XSTATE_MIN_BYTES {
        return None;
    }
    // Only components in use: what is not listed is set to its initial state, as it is.
    let used = u64::from_le_bytes(xstate.get(512..520)?.try_into().ok()?);
    let end = (2..63).filter(|bit| used & (1 << bit) != 0).map(end_of).max().unwrap_or(0).max(XSTATE_MIN_BYTES);
    if end > filled || end + 4 > xstate.len() {
        return None;
    }
    let put = |bytes: &mut [u8], at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let size = u32::try_from(end).ok()?;
    xstate[464..512].fill(0);
    put(xstate, 464, &MAGIC1.to_le_bytes());
    put(xstate, 468, &(size + 4).to_le_bytes());
    put(xstate, 472, &(used | LEGACY).to_le_bytes());
    put(xstate, 480, &size.to_le_bytes());
    put(xstate, end, &MAGIC2.to_le_bytes());
    Some(end + 4)
}

/// Where a component of the extended registers ends in the standard format on this CPU.
///
/// Asked for once: a hypervisor answers CPUID in microseconds.
pub(super) fn component_end(bit: u32) -> usize {
    static ENDS: std::sync::LazyLock<[usize; 64]> = std::sync::LazyLock::new(|| {
        let mut ends = [0; 64];
        for (bit, end) in (0_u32..).zip(&mut ends).skip(2) {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, bit);
            *end = (leaf.eax as usize).saturating_add(leaf.ebx as usize);
        }
        ends
    });
    ENDS.get(bit as usize).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_context_lies_as_the_kernel_reads_it() {
        let own = Registers { r8: 8, rip: 0x40, eflags: 0x246, cs: 0x33, ss: 0x2b, ..zero_registers() };
        let bytes = context(&own, 0xff, 0x7000);
        let at = |offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"));
        assert_eq!((at(0), at(40), at(168), at(176)), (7, 8, 0x40, 0x246));
        assert_eq!((at(184), at(224), at(296)), (0x002b_0000_0000_0033, 0x7000, 0xff));
    }

    #[test]
    fn extended_registers_are_sealed_after_their_last_component_in_use() {
        let mut xstate = vec![0_u8; 4096];
        xstate[512..520].copy_from_slice(&0b111_u64.to_le_bytes());
        let len = seal_xstate(&mut xstate, 2816, |bit| if bit == 2 { 832 } else { 5000 }).expect("sealed");
        assert_eq!(len, 836);
        assert_eq!(&xstate[832..836], b"EXPF");
        assert_eq!(&xstate[464..468], b"SXPF");
        assert_eq!(xstate[472], 7);
    }

    #[test]
    fn extended_registers_that_do_not_fit_are_refused() {
        let mut xstate = vec![0_u8; 1024];
        xstate[512..520].copy_from_slice(&0b111_u64.to_le_bytes());
        assert_eq!(seal_xstate(&mut xstate, 1024, |_| 1022), None);
        assert_eq!(seal_xstate(&mut xstate, 575, |_| 600), None);
        assert_eq!(seal_xstate(&mut xstate, 700, |_| 832), None);
    }
}
