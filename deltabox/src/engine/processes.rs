//! `ps`: the processes of a sandbox as the host's /proc tells them.

use std::fs;
use std::io;
use std::path::Path;

use super::Error;
use super::api::ProcessReport;

/// Reads all processes in a cgroup, sorted by their PID inside. One that ends meanwhile is left out.
pub(super) fn read(live: &Path) -> Result<Vec<ProcessReport>, Error> {
    let file = live.join("cgroup.procs");
    let text = match fs::read_to_string(&file) {
        // A dead sandbox's group may be gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(|source| Error::Io { op: "read", path: file, source })?,
    };
    let mut reports: Vec<ProcessReport> =
        text.lines().filter_map(|line| line.parse().ok()).filter_map(|pid| read_one(pid).ok().flatten()).collect();
    // Parents are known by their host PID until all are read.
    let inside: Vec<(i32, u32)> = reports.iter().map(|report| (report.host_pid, report.pid)).collect();
    for report in &mut reports {
        let parent = inside.iter().find(|(host, _)| u32::try_from(*host).is_ok_and(|host| host == report.ppid));
        report.ppid = parent.map_or(0, |(_, pid)| *pid);
    }
    reports.sort_by_key(|report| report.pid);
    Ok(reports)
}

/// `ppid` is still the host's.
fn read_one(host_pid: i32) -> io::Result<Option<ProcessReport>> {
    // Names are any bytes.
    let status = fs::read(format!("/proc/{host_pid}/status"))?;
    let cmdline = fs::read(format!("/proc/{host_pid}/cmdline"))?;
    Ok(parse(host_pid, &String::from_utf8_lossy(&status), &cmdline))
}

fn parse(host_pid: i32, status: &str, cmdline: &[u8]) -> Option<ProcessReport> {
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim);
    let number = |text: Option<&str>| text.and_then(|text| text.split_whitespace().next()?.parse().ok());
    let words = String::from_utf8_lossy(cmdline).trim_end_matches('\0').replace('\0', " ");
    let name = field("Name")?;
    let outside_uid: u32 = number(field("Uid"))?;
    Some(ProcessReport {
        pid: field("NSpid")?.split_whitespace().last()?.parse().ok()?,
        ppid: number(field("PPid"))?,
        host_pid,
        uid: outside_uid.saturating_sub(crate::sandbox::idmap::HOST_ID_BASE),
        state: field("State")?.chars().next()?.to_string(),
        n_threads: number(field("Threads"))?,
        // A zombie has no memory, and no line for it.
        rss_bytes: number(field("VmRSS")).map_or(0, |kb: u32| u64::from(kb) * 1024),
        command: if words.is_empty() { format!("[{name}]") } else { words },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_with_the_innermost_pid_and_the_inner_user() {
        let status = "Name:\tsh\nState:\tS (sleeping)\nPPid:\t900\nUid:\t101000\t0\t0\t0\nThreads:\t2\nNSpid:\t950\t7\nVmRSS:\t  12 kB\n";
        let report = parse(950, status, b"sh\0-c\0sleep 1\0").unwrap();
        assert_eq!(
            (report.pid, report.ppid, report.uid, report.n_threads, report.rss_bytes),
            (7, 900, 1000, 2, 12_288)
        );
        assert_eq!(report.command, "sh -c sleep 1");
        assert_eq!(parse(950, status, b"").unwrap().command, "[sh]");
        assert!(parse(950, "Name:\tsh\n", b"").is_none());
    }
}
