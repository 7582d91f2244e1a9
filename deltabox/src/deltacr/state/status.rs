//! `/proc/PID/task/TID/status`: what of a thread can be seen from outside only.

use std::fs::File;
use std::io::Read;

use libc::pid_t;

use super::credentials::Sets;
use super::error::{StateError, process};

/// Those of its fields that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) umask: u32,
    pub(super) sets: Sets,
    pub(super) no_new_privs: bool,
    pub(super) seccomp_mode: u32,
    pub(super) n_filters: u32,
}

impl Status {
    /// Reads that of a thread; 13 us. All of it comes along.
    pub(super) fn read(pid: pid_t, tid: pid_t) -> Result<(Self, Vec<u8>), StateError> {
        let failed = || process("read the status of", pid);
        // Names and groups come before what is looked for: whole, but in one read as a rule.
        let mut bytes = Vec::with_capacity(4096);
        let file = File::open(format!("/proc/{pid}/task/{tid}/status")).map_err(failed())?;
        file.take(1 << 20).read_to_end(&mut bytes).map_err(failed())?;
        let status = parse(&String::from_utf8_lossy(&bytes)).map_err(|field| StateError::Status { pid, field })?;
        Ok((status, bytes))
    }
}

/// Parses it, or names the field that is missing. A name in it has its line ends escaped: it cannot look like a field.
fn parse(text: &str) -> Result<Status, &'static str> {
    // In the kernel's order: one walk.
    let mut lines = text.lines();
    let mut word = |field: &'static str| {
        let found = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        found.map(str::trim).ok_or(field)
    };
    let set = |text: Result<&str, _>, field| u64::from_str_radix(text?, 16).map_err(|_| field);
    Ok(Status {
        umask: u32::from_str_radix(word("Umask")?, 8).map_err(|_| "Umask")?,
        sets: Sets {
            inheritable: set(word("CapInh"), "CapInh")?,
            permitted: set(word("CapPrm"), "CapPrm")?,
            effective: set(word("CapEff"), "CapEff")?,
            bounding: set(word("CapBnd"), "CapBnd")?,
            ambient: set(word("CapAmb"), "CapAmb")?,
        },
        no_new_privs: word("NoNewPrivs")? == "1",
        // Not there in kernels without it; then nothing has filters.
        seccomp_mode: word("Seccomp").map_or(Ok(0), |mode| mode.parse().map_err(|_| "Seccomp"))?,
        n_filters: word("Seccomp_filters").map_or(Ok(0), |n| n.parse().map_err(|_| "Seccomp_filters"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Name:\ta\\nUmask:\t0777\nUmask:\t0027\nState:\tt (tracing stop)\nCapInh:\t0000000000000001\n\
        CapPrm:\t000001fffeffffff\nCapEff:\t0000000000000002\nCapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000003\n\
        NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\n";

    #[test]
    fn fields_are_found_whatever_the_name() {
        let sets =
            Sets { inheritable: 1, permitted: 0x1ff_feff_ffff, effective: 2, bounding: 0x1ff_ffff_ffff, ambient: 3 };
        let expected = Status { umask: 0o27, sets, no_new_privs: true, seccomp_mode: 2, n_filters: 3 };
        assert_eq!(parse(TEXT), Ok(expected));
    }

    #[test]
    fn a_field_that_is_missing_or_spoilt_is_named() {
        for field in ["Umask", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"] {
            let without: String =
                TEXT.lines().filter(|line| !line.starts_with(field)).flat_map(|l| [l, "\n"]).collect();
            assert_eq!(parse(&without), Err(field));
        }
        assert_eq!(parse(&TEXT.replace("filters:\t3", "filters:\tx")), Err("Seccomp_filters"));
        assert_eq!(parse(&TEXT.replace("0027", "09")), Err("Umask"));
    }
}
