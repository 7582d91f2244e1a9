//! Machine code for other processes, as bytes. Nothing here is ever called; `deltacr/inject.rs` says what it is for.
//!
//! Both pieces find their data ("slots") relative to themselves, use no stack of the process, and never change the
//! flags or the stack pointer where a signal could arrive.

#[cfg(target_arch = "x86_64")]
use std::arch::global_asm;

/// Bytes of the area that [`boot`] maps.
pub const AREA_BYTES: usize = 0xB000;
/// Where the area's slots lie; its code lies below.
pub const AREA_SLOTS: usize = 0x1000;
/// Where the signal frame's `ucontext` lies in the area.
pub const AREA_CONTEXT: usize = 0x1800;
/// Number of slots, 8 bytes each.
pub const N_SLOTS: usize = 23;
/// Where the calls of a batch lie in the area.
pub const AREA_CALLS: usize = 0x5000;
/// Where the calls of a helper lie: a process that a batch made with clone3.
pub const AREA_HELPER: usize = 0xA000;

/// Slot numbers, in the order in which the code knows them.
pub mod slot {
    /// A set of all signals.
    pub const ALL: usize = 0;
    /// A set of the marker signal.
    pub const MARKER: usize = 1;
    /// The process's own mask.
    pub const MASK: usize = 2;
    /// 0: go on by rt_sigreturn; 1: go on by loading the registers.
    pub const PLAIN: usize = 3;
    /// Registers, from here on.
    pub const RFLAGS: usize = 4;
    /// The rest, in this order.
    pub const REGISTERS: [&str; 17] = [
        "rsp", "rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
        "r15",
    ];
    /// How many calls are to be made.
    pub const COUNT: usize = 22;
}

#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .rodata.deltabox_blob, \"a\", @progbits",
    // Global, for link-time optimization puts this and what refers to it into different objects.
    ".globl dbx_boot, dbx_boot_end, dbx_batch, dbx_exit, dbx_batch_end",
    ".hidden dbx_boot, dbx_boot_end, dbx_batch, dbx_exit, dbx_batch_end",
    // rt_sigprocmask(how, set, NULL, 8); mov and lea leave the flags alone.
    ".macro dbx_mask how, set",
    "mov $14, %eax",
    "mov $\\how, %edi",
    "lea \\set(%rip), %rsi",
    "mov $0, %edx",
    "mov $8, %r10d",
    "syscall",
    ".endm",
    // Makes the call that rbx points to.
    ".macro dbx_call",
    "mov (%rbx), %rax",
    "mov 8(%rbx), %rdi",
    "mov 16(%rbx), %rsi",
    "mov 24(%rbx), %rdx",
    "mov 32(%rbx), %r10",
    "mov 40(%rbx), %r8",
    "mov 48(%rbx), %r9",
    "syscall",
    ".endm",
    // With all signals blocked: flags and what a call keeps first, then the mask, then what a call may change.
    ".macro dbx_go_on slots",
    "lea \\slots+32(%rip), %rsp",
    "popfq",
    "mov \\slots+40(%rip), %rsp",
    "mov \\slots+64(%rip), %rbx",
    "mov \\slots+104(%rip), %rbp",
    "mov \\slots+112(%rip), %r8",
    "mov \\slots+120(%rip), %r9",
    "mov \\slots+144(%rip), %r12",
    "mov \\slots+152(%rip), %r13",
    "mov \\slots+160(%rip), %r14",
    "mov \\slots+168(%rip), %r15",
    "dbx_mask 2, \\slots+16",
    "mov \\slots+56(%rip), %rax",
    "mov \\slots+72(%rip), %rcx",
    "mov \\slots+80(%rip), %rdx",
    "mov \\slots+88(%rip), %rsi",
    "mov \\slots+96(%rip), %rdi",
    "mov \\slots+128(%rip), %r10",
    "mov \\slots+136(%rip), %r11",
    "jmp *\\slots+48(%rip)",
    ".endm",
    // boot: maps the area, says so; if nobody listens unmaps it and goes on.
    ".balign 16",
    "dbx_boot:",
    "dbx_mask 2, dbx_boot_slots",
    "mov $9, %eax",
    "mov $0, %edi",
    "mov ${len}, %esi",
    "mov $5, %edx",
    "mov $0x22, %r10d",
    "mov $-1, %r8",
    "mov $0, %r9d",
    "syscall",
    "mov %rax, %rbx",
    "mov %rax, %r12",
    "cmp $-4096, %rax",
    "ja 1f",
    "lea {slots}(%rax), %rdi",
    "mov ${len}-{slots}, %esi",
    "mov $3, %edx",
    "mov $10, %eax",
    "syscall",
    "mov %rax, %r12",
    // No room for data (RLIMIT_DATA): nothing stays, and there is no area.
    "cmp $-4096, %rax",
    "jbe 1f",
    "mov %rbx, %rdi",
    "mov ${len}, %esi",
    "mov $11, %eax",
    "syscall",
    "mov %r12, %rbx",
    "1:",
    "dbx_mask 1, dbx_boot_slots+8",
    "dbx_mask 2, dbx_boot_slots",
    "cmp $-4096, %rbx",
    "ja 2f",
    "mov %rbx, %rdi",
    "mov ${len}, %esi",
    "mov $11, %eax",
    "syscall",
    "2:",
    "dbx_go_on dbx_boot_slots",
    ".balign 16",
    "dbx_boot_slots:",
    "dbx_boot_end:",
    // batch: the calls, 64 bytes each (number, six arguments, result), says so; the same again if there are new ones, else
    // goes on. Before the first one r12 counts down, so that a call made twice is never possible.
    ".balign 16",
    "dbx_batch:",
    "dbx_mask 2, dbx_batch+{slots}",
    "0:",
    "lea dbx_batch+{calls}(%rip), %rbx",
    "mov dbx_batch+{slots}+176(%rip), %r12",
    "movq $0, dbx_batch+{slots}+176(%rip)",
    "1:",
    "test %r12, %r12",
    "jz 2f",
    "dbx_call",
    "cmpq $435, (%rbx)",
    "jne 3f",
    "test %rax, %rax",
    "jz 5f",
    "3:",
    "mov %rax, 56(%rbx)",
    "add $64, %rbx",
    "dec %r12",
    "jmp 1b",
    "2:",
    "dbx_mask 1, dbx_batch+{slots}+8",
    "dbx_mask 2, dbx_batch+{slots}",
    "cmpq $0, dbx_batch+{slots}+176(%rip)",
    "jne 0b",
    "mov dbx_batch+{slots}+24(%rip), %eax",
    "test %eax, %eax",
    "jnz 4f",
    "lea dbx_batch+{context}(%rip), %rsp",
    "mov $15, %eax",
    "syscall",
    "ud2",
    "4:",
    "dbx_go_on dbx_batch+{slots}",
    // A child of clone3, the helper: its own calls, to the first that fails or ends it. It shares the memory.
    "5:",
    "lea dbx_batch+{helper}(%rip), %rbx",
    "6:",
    "dbx_call",
    "cmpq $435, (%rbx)",
    "jne 7f",
    "test %rax, %rax",
    "jz 8f",
    "7:",
    "mov %rax, 56(%rbx)",
    "add $64, %rbx",
    "cmp $-4096, %rax",
    "jbe 6b",
    // exit_group: a helper that failed; and a child of the helper, the template, should it ever run.
    "8:",
    "dbx_exit:",
    "mov $231, %eax",
    "mov $0, %edi",
    "syscall",
    "ud2",
    "dbx_batch_end:",
    ".popsection",
    len = const AREA_BYTES,
    slots = const AREA_SLOTS,
    calls = const AREA_CALLS,
    helper = const AREA_HELPER,
    context = const AREA_CONTEXT,
    options(att_syntax)
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    static dbx_boot: u8;
    static dbx_boot_end: u8;
    static dbx_batch: u8;
    static dbx_exit: u8;
    static dbx_batch_end: u8;
}

/// Code that maps the area and leaves its address in rbx, the result of its mprotect in r12. Its slots follow it.
#[cfg(target_arch = "x86_64")]
pub fn boot() -> &'static [u8] {
    between(&raw const dbx_boot, &raw const dbx_boot_end)
}

/// Code that makes as many calls as a slot says, which lie at [`AREA_CALLS`] from its start, its slots at [`AREA_SLOTS`].
/// A child of a clone3 among them makes those at [`AREA_HELPER`], and a child of that only exits.
#[cfg(target_arch = "x86_64")]
pub fn batch() -> &'static [u8] {
    between(&raw const dbx_batch, &raw const dbx_batch_end)
}

/// Where in [`batch`] the process ends.
#[cfg(target_arch = "x86_64")]
pub fn exit_offset() -> usize {
    between(&raw const dbx_batch, &raw const dbx_exit).len()
}

#[cfg(target_arch = "x86_64")]
fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: only called with two symbols of one piece of the assembly above, the first one first: no constant
    // is changed, none freed.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}
