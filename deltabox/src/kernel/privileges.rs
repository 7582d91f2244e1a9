//! What this process may do: user, user namespace, capabilities.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;

use super::Ground;
use super::probe::{Failure, Outcome, at};

/// Capabilities by their bit (include/uapi/linux/capability.h).
type Capability = (u32, &'static str);

/// What creating, stopping, rebasing and restoring sandboxes takes.
const ENGINE: [Capability; 11] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (12, "CAP_NET_ADMIN"),
    (18, "CAP_SYS_CHROOT"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (23, "CAP_SYS_NICE"),
    (40, "CAP_CHECKPOINT_RESTORE"),
];

/// What loading and attaching BPF programs takes.
const BPF: [Capability; 2] = [(38, "CAP_PERFMON"), (39, "CAP_BPF")];

const RESOURCE: [Capability; 1] = [(24, "CAP_SYS_RESOURCE")];

/// The inode number of the initial user namespace (PROC_USER_INIT_INO in include/linux/proc_ns.h).
const INITIAL_USER_NS: u64 = 0xEFFF_FFFD;

fn is_initial_user_ns() -> std::io::Result<bool> {
    Ok(std::fs::metadata("/proc/self/ns/user")?.ino() == INITIAL_USER_NS)
}

/// Whether this is root of the initial user namespace, for all that can be told.
pub(super) fn is_initial_root() -> bool {
    nix::unistd::geteuid().is_root() && is_initial_user_ns().unwrap_or(false)
}

/// Whether this is root of the initial user namespace.
pub(super) fn root(_: &Ground) -> Outcome {
    let initial = is_initial_user_ns().map_err(at("stat /proc/self/ns/user"))?;
    let uid = nix::unistd::geteuid();
    match (uid.is_root(), initial) {
        (true, true) => Ok("uid 0 in the initial user namespace".to_owned()),
        (true, false) => Err(Failure::Denied("uid 0, but not in the initial user namespace".to_owned())),
        (false, _) => Err(Failure::Denied(format!("uid {uid}"))),
    }
}

/// The engine's capabilities.
pub(super) fn engine_capabilities(_: &Ground) -> Outcome {
    require(&ENGINE)
}

/// The tracker's capabilities.
pub(super) fn bpf_capabilities(_: &Ground) -> Outcome {
    require(&BPF)
}

/// The capability to raise resource limits.
pub(super) fn resource_capability(_: &Ground) -> Outcome {
    require(&RESOURCE)
}

fn require(wanted: &[Capability]) -> Outcome {
    let status = std::fs::read_to_string("/proc/self/status").map_err(at("read /proc/self/status"))?;
    let effective = parse_effective(&status)
        .ok_or_else(|| Failure::NotProbed("/proc/self/status has no CapEff line".to_owned()))?;
    let names = |has: bool| {
        let mut text = String::new();
        for (bit, name) in wanted {
            if ((effective >> bit) & 1 == 1) == has {
                // Writing to a string cannot fail.
                let _ = write!(text, "{}{name}", if text.is_empty() { "" } else { " " });
            }
        }
        text
    };
    let lacking = names(false);
    if lacking.is_empty() { Ok(names(true)) } else { Err(Failure::Denied(format!("lacks {lacking}"))) }
}

/// The effective capabilities in `/proc/PID/status`.
fn parse_effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_capabilities_are_read_from_the_status_file() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000001fffeffffff\nCapBnd:\t0\n";
        assert_eq!(parse_effective(status), Some(0x1ff_feff_ffff));
        assert_eq!(parse_effective("CapEff:\tzz\n"), None);
        assert_eq!(parse_effective("Name:\tx\n"), None);
    }
}
