//! The report as a whole, on the machine the tests run on: root and a kernel that has all that is required.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::*;

/// Set in the process that [`alone`] starts, to the store to examine.
const ALONE: &str = "DELTABOX_TEST_ALONE";

/// Runs this one test again in a process of its own, where nothing else happens, as `uid` where given. Returns the
/// store in that process, and None, with that process's result asserted, in the first one.
///
/// The test binary is copied beside the store: its build directory need not be readable for everybody.
fn alone(test: &str, uid: Option<u32>) -> Option<PathBuf> {
    if let Some(store) = std::env::var_os(ALONE) {
        return Some(store.into());
    }
    require_root();
    let directory = tempfile::Builder::new().prefix("deltabox-doctor-test").tempdir_in("/var/tmp").unwrap();
    let open_to_all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(directory.path(), open_to_all.clone()).unwrap();
    let store = directory.path().join("store");
    std::fs::create_dir(&store).unwrap();
    std::fs::set_permissions(&store, open_to_all).unwrap();
    let program = directory.path().join("tests");
    // By another process: a descriptor open for writing here, inherited by some other test's child, is ETXTBSY.
    assert!(Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&program).status().unwrap().success());

    let mut command = Command::new(program);
    command.args([&format!("kernel::tests::{test}"), "--exact", "--test-threads=1", "--nocapture"]);
    command.env(ALONE, &store).current_dir("/");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let Output { status, stdout, stderr } = command.output().unwrap();
    let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
    assert!(status.success() && said.contains("1 passed"), "{test} alone, uid {uid:?}: {status}\n{said}");
    let left: Vec<_> = std::fs::read_dir(&store).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "left in the store: {left:?}");
    None
}

fn require_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root and a kernel with all that doctor requires");
}

fn names(findings: &[Finding], choose: impl Fn(&Finding) -> bool) -> Vec<&str> {
    findings.iter().filter(|finding| choose(finding)).map(|finding| finding.name).collect()
}

#[test]
fn doctor_finds_everything_required_on_this_machine() {
    require_root();
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let findings = examine(&store.path().join("not/yet/there"));
    let absent: Vec<_> =
        findings.iter().filter(|finding| finding.level == Required && !finding.verdict.is_found()).collect();
    assert!(absent.is_empty(), "{absent:#?}");
    assert!(suffices(&findings));
}

#[test]
fn doctor_names_every_probe_once() {
    let unique: BTreeSet<_> = PROBES.iter().map(|probe| probe.name).collect();
    assert_eq!(unique.len(), PROBES.len());
}

#[test]
fn the_documentation_has_a_row_for_every_probe_in_this_order() {
    let text = include_str!("../../docs/doctor.md");
    let rows: Vec<_> = text.lines().filter(|line| line.matches(" | ").count() >= 4).skip(1).collect();
    let expected = PROBES.iter().map(|probe| format!("| {} | {:?} |", probe.name, probe.level));
    assert_eq!(rows.len(), PROBES.len());
    for (row, start) in rows.into_iter().zip(expected) {
        assert!(row.to_lowercase().starts_with(&start.to_lowercase()), "{row} should begin with {start}");
    }
}

/// What could be left behind, as this process sees it.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    mounts: String,
    descriptors: BTreeSet<(String, PathBuf)>,
    children: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
    subtree_control: String,
    pid_max: String,
    memlock: (u64, u64),
}

impl Traces {
    fn collect() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap();
        let found = Hierarchies::find().unwrap();
        let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).unwrap();
        Self {
            mounts: read("/proc/self/mountinfo"),
            descriptors: descriptors(),
            children: children(),
            cgroups: found.v1.values().chain([&found.unified]).flat_map(|mount| own_cgroups(mount)).collect(),
            subtree_control: read(found.unified.join("cgroup.subtree_control").to_str().unwrap()),
            pid_max: read("/proc/sys/kernel/pid_max"),
            memlock: limit,
        }
    }
}

fn descriptors() -> BTreeSet<(String, PathBuf)> {
    let mut open = BTreeSet::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        // The descriptor of this very listing does not count.
        match std::fs::read_link(entry.path()) {
            Ok(target) if !target.to_string_lossy().contains("/fd") => {
                open.insert((entry.file_name().to_string_lossy().into_owned(), target));
            }
            _ => {}
        }
    }
    open
}

/// PIDs of processes whose parent we are, orphans of our children included: we are their subreaper.
fn children() -> BTreeSet<String> {
    let us = std::process::id().to_string();
    let mut pids = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let pid = entry.unwrap().file_name().to_string_lossy().into_owned();
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        if status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|parent| parent.trim() == us)) {
            pids.insert(pid);
        }
    }
    pids
}

/// Cgroups made by this process; others come and go on a shared machine.
fn own_cgroups(directory: &Path) -> Vec<PathBuf> {
    let mark = format!(".deltabox-doctor.{}.", std::process::id());
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(directory) else { return found };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name().to_string_lossy().starts_with(&mark) {
                found.push(entry.path());
            }
            found.extend(own_cgroups(&entry.path()));
        }
    }
    found
}

/// Whatever changes in the mount table from here on was our doing, and orphans of our children become our children.
fn enter_own_mount_namespace() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    nix::sys::prctl::set_child_subreaper(true).unwrap();
}

#[test]
fn doctor_leaves_nothing_behind() {
    let Some(store) = alone("doctor_leaves_nothing_behind", None) else { return };
    enter_own_mount_namespace();
    let before = Traces::collect();
    assert_eq!(before.children, BTreeSet::new());
    let findings = examine(&store);
    assert_eq!(Traces::collect(), before);
    assert!(suffices(&findings), "{findings:#?}");
}

#[test]
fn doctor_leaves_nothing_behind_where_steps_fail() {
    let Some(store) = alone("doctor_leaves_nothing_behind_where_steps_fail", None) else { return };
    enter_own_mount_namespace();
    // A store on an overlay cannot hold upper directories or be idmapped.
    let directories = ["lower", "upper", "work", "store"].map(|name| store.join(name));
    directories.iter().for_each(|path| std::fs::create_dir(path).unwrap());
    let [lower, upper, work, inner] = directories.each_ref().map(|path| path.display());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("overlay"), &directories[3], Some("overlay"), flags, Some(&*options)).unwrap();

    let before = Traces::collect();
    let findings = examine(&directories[3]);
    assert_eq!(Traces::collect(), before);
    assert_eq!(std::fs::read_dir(&directories[3]).unwrap().count(), 0, "left in {inner}");
    let absent = names(&findings, |finding| finding.level == Required && !finding.verdict.is_found());
    assert_eq!(absent, ["overlay", "overlay seal", "idmapped store"]);

    nix::mount::umount(&directories[3]).unwrap();
    directories.iter().for_each(|path| std::fs::remove_dir_all(path).unwrap());
}

#[test]
fn doctor_without_privileges_claims_nothing_it_has_not_done() {
    let Some(store) = alone("doctor_without_privileges_claims_nothing_it_has_not_done", Some(65534)) else { return };
    assert_eq!(nix::unistd::geteuid().as_raw(), 65534);
    let before = descriptors();
    let findings = examine(&store);
    assert_eq!(descriptors(), before);
    assert_eq!(children(), BTreeSet::new());
    assert!(!suffices(&findings));

    let found = names(&findings, |finding| finding.verdict.is_found());
    // What the kernel lets anybody do; everything else needs privileges that were given up.
    let open_to_all = [
        "cgroup v2",
        "namespaces",
        "pid_max per namespace",
        "seccomp notification",
        "pidfd",
        "exec by descriptor",
        "kcmp",
        "rseq configuration",
        "PAGEMAP_SCAN",
        "uffd WP_ASYNC",
        "process_madvise",
        "store",
        "plain root",
        "reflink",
        "BTF",
        "CRIU",
    ];
    let claimed: Vec<_> = found.iter().filter(|name| !open_to_all.contains(name)).collect();
    assert!(claimed.is_empty(), "claimed without privileges: {claimed:?}\n{findings:#?}");

    for name in
        ["root", "engine capabilities", "cgroup freezer", "id map", "suspended seccomp", "overlay", "BPF tp_btf"]
    {
        let finding = findings.iter().find(|finding| finding.name == name).unwrap();
        assert!(matches!(finding.verdict, Verdict::Denied { .. }), "{finding:#?}");
        assert_eq!(finding.remedy, AS_ROOT, "{name}");
    }
}

#[test]
fn a_store_that_is_not_there_yet_is_judged_by_its_nearest_ancestor() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(existing_ancestor(&directory.path().join("a/b")), directory.path());
    assert_eq!(existing_ancestor(directory.path()), directory.path());
    assert!(existing_ancestor(Path::new("relative")).is_absolute());
}
