//! The system call filter of every sandbox: what its processes may not ask the kernel, whatever their user.
//!
//! A deny list, because sandboxes run unknown programs: refused is what makes or enters namespaces and mounts,
//! what reaches kernel machinery that no namespace contains, and what no checkpoint could hold. Capabilities
//! inside the user namespace are the second wall, `max_user_namespaces = 0` the third.
//!
//! It also keeps templates out of reach: whoever is named by a number that no program has (`reserve.rs`) is not there, and
//! `kill(-1)` is handed to init, which leaves them out (`init/src/everyone.rs`).
//!
//! Cost: what is let through whatever its arguments are costs the kernel a look at a bitmap; `docs/isolation.md` has the numbers.

use libc::c_long;

use super::reserve::PROGRAMS_END;

const EPERM: u32 = libc::EPERM.cast_unsigned();
const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();
const EAFNOSUPPORT: u32 = libc::EAFNOSUPPORT.cast_unsigned();
const ESRCH: u32 = libc::ESRCH.cast_unsigned();
const EINVAL: u32 = libc::EINVAL.cast_unsigned();

/// `AUDIT_ARCH_X86_64` (include/uapi/linux/audit.h): ELF machine 62, 64 bit, little endian.
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
/// Bit of the call numbers of the x32 interface.
const X32_BIT: u32 = 0x4000_0000;
/// All `CLONE_NEW*` of clone(2) and unshare(2); `CLONE_NEWTIME` means a signal number in clone(2).
const CLONE_NEW: u32 = 0x7E02_0000;
const CLONE_NEWTIME: u32 = 0x80;

/// Offsets in the kernel's `struct seccomp_data`; arguments by their low half, which is all that the kernel takes of a number.
const AT_NR: u32 = 0;
const AT_ARCH: u32 = 4;
const AT_ARG0: u32 = 16;
const AT_ARG1: u32 = 24;
const AT_ARG2: u32 = 32;

/// Numbers of templates, and what `kill` calls the groups of these: one range of words without a sign, from the first to
/// the last.
const HIDDEN: (u32, u32) = (PROGRAMS_END.cast_unsigned(), (-PROGRAMS_END).cast_unsigned());
/// From the kernel (include/uapi/asm-generic/fcntl.h).
const F_SETSIG: u32 = 10;
/// Everyone, as `kill` calls it.
const EVERYONE: u32 = (-1_i32).cast_unsigned();

/// Calls that name a process, thread or group by number, and where. Of those that name two the second is not looked at
/// if the kernel looks for it only within the first (tgkill).
const NAMING: [(c_long, &[u32]); 27] = [
    (libc::SYS_getpgid, &[AT_ARG0]),
    (libc::SYS_setpgid, &[AT_ARG0]),
    (libc::SYS_getsid, &[AT_ARG0]),
    (libc::SYS_kill, &[AT_ARG0]),
    (libc::SYS_tgkill, &[AT_ARG0]),
    (libc::SYS_tkill, &[AT_ARG0]),
    (libc::SYS_prlimit64, &[AT_ARG0]),
    (libc::SYS_sched_getaffinity, &[AT_ARG0]),
    (libc::SYS_sched_setaffinity, &[AT_ARG0]),
    (libc::SYS_sched_getscheduler, &[AT_ARG0]),
    (libc::SYS_sched_setscheduler, &[AT_ARG0]),
    (libc::SYS_sched_getparam, &[AT_ARG0]),
    (libc::SYS_sched_setparam, &[AT_ARG0]),
    (libc::SYS_sched_getattr, &[AT_ARG0]),
    (libc::SYS_sched_setattr, &[AT_ARG0]),
    (libc::SYS_sched_rr_get_interval, &[AT_ARG0]),
    (libc::SYS_getpriority, &[AT_ARG1]),
    (libc::SYS_setpriority, &[AT_ARG1]),
    (libc::SYS_ioprio_get, &[AT_ARG1]),
    (libc::SYS_ioprio_set, &[AT_ARG1]),
    (libc::SYS_rt_sigqueueinfo, &[AT_ARG0]),
    (libc::SYS_rt_tgsigqueueinfo, &[AT_ARG0]),
    (libc::SYS_pidfd_open, &[AT_ARG0]),
    (libc::SYS_process_vm_readv, &[AT_ARG0]),
    (libc::SYS_process_vm_writev, &[AT_ARG0]),
    (libc::SYS_kcmp, &[AT_ARG0, AT_ARG1]),
    (libc::SYS_get_robust_list, &[AT_ARG0]),
];

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

/// Skips by whether the word, without a sign, is at least `k`.
fn at_least(k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code: 0x35, jt, jf, k }
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

/// Hands the call to init, which answers for the kernel.
fn hand_over() -> Instruction {
    Instruction { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_USER_NOTIF }
}

/// Call numbers are small and positive.
fn number(call: c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn assemble() -> Vec<Instruction> {
    let mut code = vec![load(AT_ARCH), equal(AUDIT_ARCH_X86_64, 1, 0), refuse(ENOSYS)];
    code.extend([load(AT_NR), any_bit(X32_BIT, 0, 1), refuse(ENOSYS)]);
    // What must be looked at comes first, what programs do most often foremost: all the rest is known by its number, and
    // the kernel remembers what is always let through. Arguments take the place of the number, so each ends in a verdict.
    code.extend(signals_of_descriptors());
    code.extend(hide_templates());
    code.extend(without_namespaces(libc::SYS_clone, CLONE_NEW));
    code.extend(without_namespaces(libc::SYS_unshare, CLONE_NEW | CLONE_NEWTIME));
    code.extend(socket_families(libc::SYS_socket));
    code.extend(socket_families(libc::SYS_socketpair));
    for call in DENIED {
        code.extend([equal(number(call), 0, 1), refuse(EPERM)]);
    }
    for call in ABSENT {
        code.extend([equal(number(call), 0, 1), refuse(ENOSYS)]);
    }
    code.push(allow());
    code
}

/// A descriptor that sends a signal to whom it was told (F_SETOWN_EX and two ioctls name him behind a pointer) must not
/// send one that cannot be blocked: templates have all others blocked. No program needs that.
fn signals_of_descriptors() -> Vec<Instruction> {
    let [kill, stop] = [libc::SIGKILL, libc::SIGSTOP].map(i32::cast_unsigned);
    let body =
        [load(AT_ARG1), equal(F_SETSIG, 0, 4), load(AT_ARG2), equal(kill, 1, 0), equal(stop, 0, 1), refuse(EINVAL)];
    block(libc::SYS_fcntl, body.to_vec())
}

fn hide_templates() -> Vec<Instruction> {
    // The first argument of ptrace says what is wanted; who asks to be traced names nobody, whatever the second is.
    let is_traceme = [load(AT_ARG0), equal(libc::PTRACE_TRACEME, 0, 1), allow()];
    let mut code = block(libc::SYS_ptrace, [&is_traceme[..], &refuse_hidden(AT_ARG1)].concat());
    for (call, places) in NAMING {
        let everyone = [load(AT_ARG0), equal(EVERYONE, 0, 1), hand_over()];
        let mut body = if call == libc::SYS_kill { everyone.to_vec() } else { Vec::new() };
        body.extend(places.iter().flat_map(|place| refuse_hidden(*place)));
        code.extend(block(call, body));
    }
    code
}

/// Goes on if who is named by the argument at `place` is no template.
fn refuse_hidden(place: u32) -> [Instruction; 4] {
    let (first, last) = HIDDEN;
    [load(place), at_least(first, 0, 2), at_least(last + 1, 1, 0), refuse(ESRCH)]
}

/// What is done about one call; where its end is reached it is let through.
fn block(call: c_long, mut body: Vec<Instruction>) -> Vec<Instruction> {
    body.push(allow());
    let n = u8::try_from(body.len()).unwrap_or(u8::MAX);
    body.insert(0, equal(number(call), 0, n));
    body
}

/// Clone and unshare: not with namespaces.
fn without_namespaces(call: c_long, namespaces: u32) -> Vec<Instruction> {
    block(call, vec![load(AT_ARG0), any_bit(namespaces, 0, 1), refuse(EPERM)])
}

fn socket_families(call: c_long) -> Vec<Instruction> {
    let n = u8::try_from(FAMILIES.len()).unwrap_or(u8::MAX);
    let mut body = vec![load(AT_ARG0)];
    body.extend((1..=n).rev().zip(FAMILIES).map(|(skip, family)| equal(family.cast_unsigned(), skip, 0)));
    body.push(refuse(EAFNOSUPPORT));
    block(call, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn run(arch: u32, nr: u32, args: [u32; 3]) -> u32 {
        let code = assemble();
        let words = [(AT_NR, nr), (AT_ARCH, arch), (AT_ARG0, args[0]), (AT_ARG1, args[1]), (AT_ARG2, args[2])];
        let (mut at, mut word) = (0, 0);
        loop {
            let i = code[at];
            at += 1;
            match i.code {
                0x20 => word = words.iter().find(|word| word.0 == i.k).unwrap().1,
                0x15 => at += usize::from(if word == i.k { i.jt } else { i.jf }),
                0x35 => at += usize::from(if word >= i.k { i.jt } else { i.jf }),
                0x45 => at += usize::from(if word & i.k != 0 { i.jt } else { i.jf }),
                0x06 => return i.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn verdict(arch: u32, nr: u32, arg0: u32) -> u32 {
        run(arch, nr, [arg0, 0, 0])
    }

    fn call(nr: c_long, arg0: u32) -> u32 {
        verdict(AUDIT_ARCH_X86_64, number(nr), arg0)
    }

    fn call_with(nr: c_long, args: [i32; 3]) -> u32 {
        run(AUDIT_ARCH_X86_64, number(nr), args.map(i32::cast_unsigned))
    }

    const GONE: u32 = libc::SECCOMP_RET_ERRNO | ESRCH;
    /// Who is not there: every template, and every group of one.
    const TEMPLATES: [i32; 6] =
        [PROGRAMS_END, PROGRAMS_END + 1, (1 << 22) - 1, -PROGRAMS_END, -PROGRAMS_END - 1, 1 - (1 << 22)];
    /// Who may be.
    const OTHERS: [i32; 7] = [0, 1, 2, PROGRAMS_END - 1, -2, -300, 1 - PROGRAMS_END];

    #[test]
    fn nobody_names_a_template_and_everybody_others() {
        for (nr, place) in NAMING.iter().flat_map(|(nr, places)| places.iter().map(|place| (*nr, *place))) {
            let args = |who| if place == AT_ARG0 { [who, 9, 0] } else { [0, who, 9] };
            for who in TEMPLATES {
                assert_eq!(call_with(nr, args(who)), GONE, "call {nr} of {who}");
            }
            for who in OTHERS {
                assert_eq!(call_with(nr, args(who)), libc::SECCOMP_RET_ALLOW, "call {nr} of {who}");
            }
        }
    }

    #[test]
    fn tracing_needs_somebody_who_is_there_unless_it_is_by_the_parent() {
        let requests = [libc::PTRACE_ATTACH, libc::PTRACE_SEIZE, libc::PTRACE_PEEKDATA].map(u32::cast_signed);
        for request in requests {
            for who in TEMPLATES {
                assert_eq!(call_with(libc::SYS_ptrace, [request, who, 0]), GONE);
            }
            for who in OTHERS {
                assert_eq!(call_with(libc::SYS_ptrace, [request, who, 0]), libc::SECCOMP_RET_ALLOW);
            }
        }
        assert_eq!(call_with(libc::SYS_ptrace, [0, PROGRAMS_END, 0]), libc::SECCOMP_RET_ALLOW, "PTRACE_TRACEME");
    }

    #[test]
    fn only_a_kill_of_everyone_is_handed_to_init() {
        assert_eq!(call_with(libc::SYS_kill, [-1, 9, 0]), libc::SECCOMP_RET_USER_NOTIF);
        for (nr, _) in NAMING.iter().filter(|(nr, _)| *nr != libc::SYS_kill) {
            assert_eq!(call_with(*nr, [-1, -1, -1]), libc::SECCOMP_RET_ALLOW, "call {nr}");
        }
    }

    #[test]
    fn descriptors_send_no_signal_that_cannot_be_blocked() {
        let fcntl = |command, argument| call_with(libc::SYS_fcntl, [3, command, argument]);
        for signal in [libc::SIGKILL, libc::SIGSTOP] {
            assert_eq!(fcntl(F_SETSIG.cast_signed(), signal), libc::SECCOMP_RET_ERRNO | EINVAL);
            assert_eq!(fcntl(libc::F_SETFL, signal), libc::SECCOMP_RET_ALLOW);
        }
        for signal in (0..=64).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
            assert_eq!(fcntl(F_SETSIG.cast_signed(), signal), libc::SECCOMP_RET_ALLOW);
        }
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
            [libc::SYS_read, libc::SYS_openat, libc::SYS_execve, libc::SYS_wait4, libc::SYS_fcntl, libc::SYS_seccomp]
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
