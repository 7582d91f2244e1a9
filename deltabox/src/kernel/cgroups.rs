//! Where this machine's cgroup hierarchies are mounted.
//!
//! A host may be pure v2, pure v1 or hybrid (v2 without most controllers beside v1); none of the paths is fixed, so
//! they are read from mountinfo.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The controllers of v1 that the kernel knows (include/linux/cgroup_subsys.h); a v1 mount's other options are flags.
const V1_CONTROLLERS: [&str; 14] = [
    "cpuset",
    "cpu",
    "cpuacct",
    "blkio",
    "memory",
    "devices",
    "freezer",
    "net_cls",
    "perf_event",
    "net_prio",
    "hugetlb",
    "pids",
    "rdma",
    "misc",
];

/// The mounted cgroup hierarchies, as this process sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    /// The v2 hierarchy's mount point.
    pub unified: PathBuf,
    /// Mount points of v1 hierarchies by controller (`memory`, `pids`, ...). A controller is in v1 or v2, never both.
    pub v1: BTreeMap<String, PathBuf>,
    /// What `cgroup.controllers` of `unified` lists.
    pub v2_controllers: BTreeSet<String>,
}

/// Why the hierarchies are not known.
#[derive(Debug, thiserror::Error)]
pub enum HierarchiesError {
    /// A file could not be read.
    #[error("read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No cgroup2 file system is mounted where this process sees it.
    #[error("no cgroup v2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")]
    NoUnified,
}

impl Hierarchies {
    /// Reads `/proc/self/mountinfo` and the controllers of what it finds.
    ///
    /// # Errors
    /// [`HierarchiesError::NoUnified`] where only v1 or nothing is mounted.
    pub fn find() -> Result<Self, HierarchiesError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| HierarchiesError::Read { path: path.to_owned(), source })
        };
        let (unified, v1) = parse_mountinfo(&read(Path::new("/proc/self/mountinfo"))?);
        let unified = unified.ok_or(HierarchiesError::NoUnified)?;
        let controllers = read(&unified.join("cgroup.controllers"))?;
        Ok(Self { v2_controllers: parse_controllers(&String::from_utf8_lossy(&controllers)), unified, v1 })
    }
}

fn parse_controllers(text: &str) -> BTreeSet<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

/// The v2 mount point, if any, and the v1 mount points by controller. Lines it does not understand are passed over.
///
/// Of several mounts of one hierarchy the last that shows its root is taken: later mounts lie on top of earlier ones.
/// Where none shows the root (a container's bind mount) the last one is.
fn parse_mountinfo(text: &[u8]) -> (Option<PathBuf>, BTreeMap<String, PathBuf>) {
    let mut unified = None;
    let mut v1 = BTreeMap::new();
    for mount in text.split(|byte| *byte == b'\n').filter_map(parse_line) {
        match mount.fstype {
            b"cgroup2" => prefer(&mut unified, &mount),
            b"cgroup" => {
                for controller in v1_controllers(mount.super_options) {
                    let mut slot = v1.remove(controller);
                    prefer(&mut slot, &mount);
                    v1.extend(slot.map(|found| (controller.to_owned(), found)));
                }
            }
            _ => {}
        }
    }
    let path = |found: (bool, PathBuf)| found.1;
    (unified.map(path), v1.into_iter().map(|(name, found)| (name, path(found))).collect())
}

fn prefer(slot: &mut Option<(bool, PathBuf)>, mount: &Mount<'_>) {
    let shows_root = mount.root == b"/";
    if shows_root || slot.as_ref().is_none_or(|(known_root, _)| !known_root) {
        *slot = Some((shows_root, unescape(mount.mount_point)));
    }
}

fn v1_controllers(super_options: &[u8]) -> impl Iterator<Item = &'static str> + '_ {
    super_options
        .split(|byte| *byte == b',')
        .filter_map(|option| V1_CONTROLLERS.into_iter().find(|name| name.as_bytes() == option))
}

struct Mount<'a> {
    root: &'a [u8],
    mount_point: &'a [u8],
    fstype: &'a [u8],
    super_options: &'a [u8],
}

/// `36 35 98:0 /root /mount/point rw,noatime shared:1 ... - fstype source superoptions`: the optional fields before
/// the dash are any number.
fn parse_line(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = fields.nth(3)?;
    let mount_point = fields.next()?;
    let _mount_options = fields.next()?;
    fields.by_ref().find(|field| field == b"-")?;
    let fstype = fields.next()?;
    let _source = fields.next()?;
    Some(Mount { root, mount_point, fstype, super_options: fields.next().unwrap_or_default() })
}

/// A path as a mountinfo field has it: undoes the kernel's octal escapes of space, tab, newline and backslash (`\040`).
pub fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &rest[4..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1(pairs: &[(&str, &str)]) -> BTreeMap<String, PathBuf> {
        pairs.iter().map(|(name, path)| ((*name).to_owned(), PathBuf::from(path))).collect()
    }

    #[test]
    fn a_pure_v2_host_has_a_unified_mount_and_no_v1() {
        let text = b"23 27 0:22 / /sys rw,relatime - sysfs sysfs rw\n\
            30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        assert_eq!(parse_mountinfo(text), (Some("/sys/fs/cgroup".into()), v1(&[])));
    }

    #[test]
    fn a_hybrid_host_has_both_and_named_hierarchies_are_no_controllers() {
        let text = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:10 master:3 - cgroup cgroup rw,cpu,cpuacct\n\
            35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let expected = v1(&[
            ("cpu", "/sys/fs/cgroup/cpu,cpuacct"),
            ("cpuacct", "/sys/fs/cgroup/cpu,cpuacct"),
            ("memory", "/sys/fs/cgroup/memory"),
        ]);
        assert_eq!(parse_mountinfo(text), (Some("/sys/fs/cgroup/unified".into()), expected));
    }

    #[test]
    fn a_v1_host_has_no_unified_mount() {
        let text = b"39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n";
        assert_eq!(parse_mountinfo(text), (None, v1(&[("pids", "/sys/fs/cgroup/pids")])));
    }

    #[test]
    fn a_host_without_cgroups_has_none() {
        let text = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n";
        assert_eq!(parse_mountinfo(text), (None, v1(&[])));
        assert_eq!(parse_mountinfo(b""), (None, v1(&[])));
    }

    #[test]
    fn octal_escapes_in_a_mount_point_are_undone() {
        let text = b"41 31 0:38 / /mnt/my\\040cgroup\\134x\\ rw - cgroup2 none rw\n";
        assert_eq!(parse_mountinfo(text).0, Some("/mnt/my cgroup\\x\\".into()));
    }

    #[test]
    fn a_mount_of_the_root_wins_over_a_bind_mount_of_a_part() {
        let text = b"41 31 0:38 / /sys/fs/cgroup rw - cgroup2 none rw\n\
            50 27 0:38 /part /run/part rw - cgroup2 none rw\n";
        assert_eq!(parse_mountinfo(text).0, Some("/sys/fs/cgroup".into()));
    }

    #[test]
    fn damaged_lines_are_passed_over() {
        let whole = b"41 31 0:38 / /sys/fs/cgroup rw - cgroup2 none rw";
        for len in 0..whole.len() {
            let (unified, _) = parse_mountinfo(&whole[..len]);
            assert!(unified.is_none_or(|path| path == Path::new("/sys/fs/cgroup")), "cut at {len}");
        }
    }

    #[test]
    fn the_v2_controllers_are_the_words_of_the_file() {
        assert_eq!(parse_controllers("memory pids\n"), ["memory".to_owned(), "pids".to_owned()].into());
        assert_eq!(parse_controllers("\n"), BTreeSet::new());
    }
}
