//! The system call filter of every sandbox: what its processes may not ask the kernel, whatever their user.
//!
//! A deny list, because sandboxes run unknown programs: refused is what makes or enters namespaces and mounts,
//! what reaches kernel machinery that no namespace contains, and what no checkpoint could hold. Capabilities
//! inside the user namespace are the second wall, `max_user_namespaces = 0` the third.
//! Measured cost (facts: namespaces): 21 ns per system call.

use libc::c_long;

const EPERM: u32 = libc::EPERM.cast_unsigned();
const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();
const EAFNOSUPPORT: u32 = libc::EAFNOSUPPORT.cast_unsigned();

/// `AUDIT_ARCH_X86_64` (include/uapi/linux/audit.h): ELF machine 62, 64 bit, little endian.
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
/// Bit of the call numbers of the x32 interface.
const X32_BIT: u32 = 0x4000_0000;
/// All `CLONE_NEW*` of clone(2) and unshare(2); `CLONE_NEWTIME` means a signal number in clone(2).
const CLONE_NEW: u32 = 0x7E02_0000;
const CLONE_NEWTIME: u32 = 0x80;

/// Offsets in the kernel's `struct seccomp_data`; arguments by their low half.
const AT_NR: u32 = 0;
const AT_ARCH: u32 = 4;
const AT_ARG0: u32 = 16;

/// Refused with EPERM.
const DENIED: [c_long; 51] = [
    // Mounts and roots: the engine alone changes them.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    467, // open_tree_attr, since Linux 6.15
    libc::SYS_setns,
    // Handles reach files past every path check.
    libc::SYS_open_by_handle_at,
    // Kernel machinery that no namespace contains.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_syslog,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_vhangup,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_userfaultfd,
    libc::SYS_memfd_secret,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS__sysctl,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS_modify_ldt,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
];

/// Refused with ENOSYS, so that programs fall back to what they used before these calls existed:
/// clone3's flags cannot be inspected (behind a pointer), io_uring's work cannot be checkpointed.
const ABSENT: [c_long; 4] =
    [libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Socket families that a sandbox may open: Unix, IPv4, IPv6, netlink. Others are not contained by a network
/// namespace (vsock reaches the hypervisor) or are kernel code that no sandbox needs.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Capabilities left to a sandbox's root, by number (include/uapi/linux/capability.h). The last three are what
/// the engine's injected calls need; the filter denies a program what they would open.
const CAPABILITIES: [u32; 13] = [
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL
    6,  // SETGID
    7,  // SETUID
    8,  // SETPCAP
    10, // NET_BIND_SERVICE
    31, // SETFCAP
    18, // SYS_CHROOT
    21, // SYS_ADMIN
    40, // CHECKPOINT_RESTORE
];

/// The bounding set as two words, as capset(2) has them.
pub fn capabilities() -> (u32, u32) {
    let bits = CAPABILITIES.iter().fold(0_u64, |bits, number| bits | 1 << number);
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// The filter as an array of the kernel's `struct sock_filter` (8 bytes each, little endian).
pub fn program() -> Vec<u8> {
    assemble().into_iter().flat_map(Instruction::bytes).collect()
}

/// One classic BPF instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

impl Instruction {
    fn bytes(self) -> [u8; 8] {
        let ([a, b], [e, f, g, h]) = (self.code.to_le_bytes(), self.k.to_le_bytes());
        [a, b, self.jt, self.jf, e, f, g, h]
    }
}

/// Loads the word at `offset` of seccomp_data.
fn load(offset: u32) -> Instruction {
    Instruction { code: 0x20, jt: 0, jf: 0, k: offset }
}

/// Skips `jt` or `jf` instructions by whether the word equals `k`.
fn equal(k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code: 0x15, jt, jf, k }
}

/// Skips by whether the word shares a bit with `k`.
fn any_bit(k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code: 0x45, jt, jf, k }
}

fn allow() -> Instruction {
    Instruction { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }
}

fn refuse(errno: u32) -> Instruction {
    Instruction { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | errno }
}

/// Call numbers are small and positive.
fn number(call: c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn assemble() -> Vec<Instruction> {
    let mut code = vec![load(AT_ARCH), equal(AUDIT_ARCH_X86_64, 1, 0), refuse(ENOSYS)];
    code.extend([load(AT_NR), any_bit(X32_BIT, 0, 1), refuse(ENOSYS)]);
    for call in DENIED {
        code.extend([equal(number(call), 0, 1), refuse(EPERM)]);
    }
    for call in ABSENT {
        code.extend([equal(number(call), 0, 1), refuse(ENOSYS)]);
    }
    // clone and unshare: not with namespaces. The word is loaded afresh, so each ends in a verdict.
    code.extend([
        equal(number(libc::SYS_clone), 0, 4),
        load(AT_ARG0),
        any_bit(CLONE_NEW, 0, 1),
        refuse(EPERM),
        allow(),
    ]);
    let namespaces = CLONE_NEW | CLONE_NEWTIME;
    code.extend([
        equal(number(libc::SYS_unshare), 0, 4),
        load(AT_ARG0),
        any_bit(namespaces, 0, 1),
        refuse(EPERM),
        allow(),
    ]);
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let n = u8::try_from(FAMILIES.len()).unwrap_or(u8::MAX);
        code.extend([equal(number(call), 0, n + 3), load(AT_ARG0)]);
        for (skip, family) in (1..=n).rev().zip(FAMILIES) {
            code.push(equal(family.cast_unsigned(), skip, 0));
        }
        code.extend([refuse(EAFNOSUPPORT), allow()]);
    }
    code.push(allow());
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(arch: u32, nr: u32, arg0: u32) -> u32 {
        let code = assemble();
        let (mut at, mut word) = (0, 0);
        loop {
            let i = code[at];
            at += 1;
            match i.code {
                0x20 => word = [(AT_NR, nr), (AT_ARCH, arch), (AT_ARG0, arg0)].iter().find(|w| w.0 == i.k).unwrap().1,
                0x15 => at += usize::from(if word == i.k { i.jt } else { i.jf }),
                0x45 => at += usize::from(if word & i.k != 0 { i.jt } else { i.jf }),
                0x06 => return i.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn call(nr: c_long, arg0: u32) -> u32 {
        verdict(AUDIT_ARCH_X86_64, number(nr), arg0)
    }

    #[test]
    fn every_denied_call_is_refused_and_ordinary_ones_pass() {
        for nr in DENIED {
            assert_eq!(call(nr, 0), libc::SECCOMP_RET_ERRNO | EPERM, "call {nr}");
        }
        for nr in ABSENT {
            assert_eq!(call(nr, 0), libc::SECCOMP_RET_ERRNO | ENOSYS, "call {nr}");
        }
        for nr in
            [libc::SYS_read, libc::SYS_openat, libc::SYS_execve, libc::SYS_ptrace, libc::SYS_kill, libc::SYS_seccomp]
        {
            assert_eq!(call(nr, u32::MAX), libc::SECCOMP_RET_ALLOW, "call {nr}");
        }
    }

    #[test]
    fn clone_and_unshare_pass_only_without_namespaces() {
        for bit in 0..32 {
            let flags = 1_u32 << bit;
            let refused = CLONE_NEW & flags != 0;
            let expected = if refused { libc::SECCOMP_RET_ERRNO | EPERM } else { libc::SECCOMP_RET_ALLOW };
            assert_eq!(call(libc::SYS_clone, flags | 17), expected, "clone {flags:#x}");
            let refused = refused || flags == CLONE_NEWTIME;
            let expected = if refused { libc::SECCOMP_RET_ERRNO | EPERM } else { libc::SECCOMP_RET_ALLOW };
            assert_eq!(call(libc::SYS_unshare, flags), expected, "unshare {flags:#x}");
        }
    }

    #[test]
    fn sockets_of_four_families_only() {
        for family in 0..64 {
            let expected = if FAMILIES.contains(&family) {
                libc::SECCOMP_RET_ALLOW
            } else {
                libc::SECCOMP_RET_ERRNO | EAFNOSUPPORT
            };
            assert_eq!(call(libc::SYS_socket, family.cast_unsigned()), expected, "family {family}");
            assert_eq!(call(libc::SYS_socketpair, family.cast_unsigned()), expected, "family {family}");
        }
    }

    #[test]
    fn other_call_interfaces_do_not_exist() {
        assert_eq!(verdict(0x4000_0003, 165, 0), libc::SECCOMP_RET_ERRNO | ENOSYS, "i386");
        assert_eq!(call(165 | c_long::from(X32_BIT), 0), libc::SECCOMP_RET_ERRNO | ENOSYS, "x32");
    }

    #[test]
    fn the_filter_fits_the_kernels_limit() {
        assert!(assemble().len() <= 4096 && program().len() == assemble().len() * 8);
    }
}
