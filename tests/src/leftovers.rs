//! What sandboxes can leave on a machine: processes, mounts, cgroups, namespaces, files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use deltabox::kernel::cgroups::Hierarchies;

/// Everything of one store that can be seen from outside.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Processes called `deltabox-init` below the store's cgroups.
    pub processes: BTreeSet<i32>,
    /// Mount points in this mount namespace that lie in the store.
    pub mounts: BTreeSet<String>,
    /// The store's cgroup directories in all hierarchies.
    pub cgroups: BTreeSet<PathBuf>,
    /// Files below `sandboxes`.
    pub files: BTreeSet<PathBuf>,
}

impl Leftovers {
    /// Looks.
    pub fn of(store: &Path) -> Self {
        let mut found = Self::default();
        let hosts = Hierarchies::find().expect("find the cgroup hierarchies");
        let tag = fs::read_to_string(store.join("tag")).expect("read the store's tag");
        for root in hosts.v1.values().chain([&hosts.unified]) {
            walk(&root.join("deltabox").join(&tag), &mut |path| {
                if path.is_dir() {
                    found.cgroups.insert(path.to_owned());
                }
                if path.ends_with("cgroup.procs") {
                    let text = fs::read_to_string(path).unwrap_or_default();
                    found.processes.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
                }
            });
        }
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
        let store_text = store.to_string_lossy().into_owned();
        found.mounts.extend(mountinfo.lines().filter(|line| line.contains(&store_text)).map(str::to_owned));
        walk(&store.join("sandboxes"), &mut |path| _ = found.files.insert(path.to_owned()));
        found.files.remove(&store.join("sandboxes"));
        found
    }
}

/// Namespace ids of all processes, by following `/proc/PID/ns`.
pub fn namespaces() -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
        for link in fs::read_dir(entry.path().join("ns")).into_iter().flatten().flatten() {
            found.extend(fs::read_link(link.path()));
        }
    }
    found
}

fn walk(path: &Path, see: &mut dyn FnMut(&Path)) {
    if fs::symlink_metadata(path).is_err() {
        return;
    }
    see(path);
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            walk(&entry.path(), see);
        }
    }
}
