//! System call filters.

use std::io;

use super::check;

/// The kernel's sizes of notification, response and data (`struct seccomp_notif_sizes`), which user notification needs.
pub fn notification_sizes() -> io::Result<[u16; 3]> {
    let mut sizes = [0_u16; 3];
    // SAFETY: the kernel writes three 16-bit numbers, as many as there is room for.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_NOTIF_SIZES, 0, sizes.as_mut_ptr()) })?;
    Ok(sizes)
}

/// A filter that answers `errno` to the system call `number` and allows all others. Looks at no architecture.
pub fn deny_one(number: u32, errno: i32) -> [libc::sock_filter; 4] {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt,
        jf,
        k,
    };
    // The call's number is the first field of seccomp_data.
    [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        op(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | (errno.cast_unsigned() & libc::SECCOMP_RET_DATA),
        ),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}
