//! Where numbers were measured: they mean little without it.

use std::fs;
use std::path::Path;
use std::process::Command;

use deltabox::kernel::cgroups::Hierarchies;
use serde_json::{Value, json};

/// The machine, its load now, and the revision of this repository.
pub fn describe(store: &Path) -> Value {
    let uname = nix::sys::utsname::uname().expect("uname");
    json!({
        "kernel": uname.release().to_string_lossy(),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu_model": cpu_model(),
        "memory_bytes": meminfo_bytes("MemTotal"),
        "load": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "cgroups": cgroup_layout(),
        "store_fs": file_system_of(store),
        "revision": revision(),
        "optimized": !cfg!(debug_assertions),
    })
}

/// One line of `/proc/meminfo`, in bytes; 0 if the kernel has no such line.
pub fn meminfo_bytes(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kilobytes(&text, name).unwrap_or(0)
}

/// The value of a `NAME:  N kB` line, in bytes.
pub fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned())
}

fn cgroup_layout() -> Value {
    match Hierarchies::find() {
        Ok(found) => json!({
            "unified": found.unified,
            "v2_controllers": found.v2_controllers,
            "v1_controllers": found.v1.keys().collect::<Vec<_>>(),
        }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// Type of the file system that `path` lies on, by the longest mount point above it.
fn file_system_of(path: &Path) -> String {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = text.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let above = mounts.filter(|(point, _)| path.starts_with(point));
    above.max_by_key(|(point, _)| point.len()).map_or_else(|| "unknown".to_owned(), |(_, fs)| fs.to_owned())
}

fn revision() -> String {
    let git = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_kilobytes_are_read_by_their_whole_name() {
        let text = "MemTotal:       24684096 kB\nMem:  1 kB\nPss:                 120 kB\n";
        assert_eq!(kilobytes(text, "Mem"), Some(1024));
        assert_eq!(kilobytes(text, "Pss"), Some(120 * 1024));
        assert_eq!(kilobytes(text, "Slab"), None);
    }
}
