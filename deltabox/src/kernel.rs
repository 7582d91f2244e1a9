//! What the running kernel offers of what deltabox relies on, found by doing each thing once.
//!
//! `PROBES` is the whole list: what is tried, how much depends on it, what its absence costs and how to get it.
//! Every probe undoes what it does, also when a step fails, waits for nothing longer than a deadline, and claims
//! nothing it has not seen: a missing permission is told apart from a missing feature.
//!
//! ```text
//! examine(store) -> for each Probe: run(&Ground) -> found | missing | denied | not probed -> Finding
//! ```

pub mod cgroups;
mod criu;
mod layers;
mod limits;
mod pages;
mod privileges;
mod probe;
mod programs;
mod sandboxes;
mod tracing;

use std::cell::OnceCell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::sys::bpf::VmlinuxBtf;
use cgroups::{Hierarchies, HierarchiesError};
use probe::{Failure, Outcome};

/// How much depends on a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Without it there are no sandboxes, or none that can be checkpointed.
    Required,
    /// Without it something works worse or not at all.
    Recommended,
    /// Nothing in ordinary use needs it.
    Optional,
}

/// What a probe came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It was done.
    Found {
        /// What was seen.
        detail: String,
    },
    /// The kernel does not offer it.
    Missing {
        /// The step that failed, and how.
        detail: String,
    },
    /// This process may not use it; whether it is there is not known.
    Denied {
        /// The step that failed, and how.
        detail: String,
    },
    /// It could not be tried.
    NotProbed {
        /// What was in the way.
        #[serde(rename = "detail")]
        why: String,
    },
}

impl Verdict {
    /// Whether it was done.
    pub fn is_found(&self) -> bool {
        matches!(self, Self::Found { .. })
    }
}

/// One probe's result.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked for.
    pub name: &'static str,
    /// How much depends on it.
    pub level: Level,
    /// Whether it was found.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// What it means if it is not found.
    pub consequence: &'static str,
    /// How to get it.
    pub remedy: &'static str,
    /// How long the probe took.
    pub took_us: u64,
}

/// What probes share.
struct Ground {
    /// The directory of the store, or its nearest ancestor that exists.
    store: PathBuf,
    cgroups: Result<Hierarchies, HierarchiesError>,
    /// Parsing takes tens of milliseconds, so once.
    btf: OnceCell<io::Result<VmlinuxBtf>>,
    /// Root of the initial user namespace.
    privileged: bool,
}

struct Probe {
    name: &'static str,
    level: Level,
    run: fn(&Ground) -> Outcome,
    consequence: &'static str,
    remedy: &'static str,
}

const fn probe(
    name: &'static str,
    level: Level,
    run: fn(&Ground) -> Outcome,
    consequence: &'static str,
    remedy: &'static str,
) -> Probe {
    Probe { name, level, run, consequence, remedy }
}

use Level::{Optional, Recommended, Required};

/// A remedy that several probes share.
const AS_ROOT: &str = "run as root, outside of containers (sudo deltabox ...)";
const NEWER: &str = "a newer kernel, without this feature disabled in its configuration";

/// All probes, in the order of the report.
const PROBES: [Probe; 40] = [
    probe("root", Required, privileges::root, "the engine cannot make, stop or restore sandboxes", AS_ROOT),
    probe(
        "engine capabilities",
        Required,
        privileges::engine_capabilities,
        "single steps of creating, checkpointing and restoring are refused",
        "grant the capabilities named (systemd: CapabilityBoundingSet=, container: --privileged)",
    ),
    probe(
        "BPF capabilities",
        Recommended,
        privileges::bpf_capabilities,
        "changed pages and files are found by scans only",
        "grant CAP_BPF and CAP_PERFMON",
    ),
    probe(
        "CAP_SYS_RESOURCE",
        Optional,
        privileges::resource_capability,
        "limits above the engine's own hard limits cannot be restored; criu cannot dump processes of other users",
        "grant CAP_SYS_RESOURCE",
    ),
    probe(
        "cgroup v2",
        Required,
        limits::unified,
        "sandboxes and templates have no cgroup to be frozen and killed in",
        "mount it: mount -t cgroup2 none /sys/fs/cgroup",
    ),
    probe(
        "cgroup freezer",
        Required,
        limits::freezer,
        "templates cannot be parked: signals would wake them",
        "Linux 5.7 or newer with CONFIG_CGROUPS, the v2 hierarchy writable",
    ),
    probe(
        "cgroup.kill",
        Required,
        limits::kill,
        "a sandbox cannot be ended in one step that no fork escapes",
        "Linux 5.14 or newer, the v2 hierarchy writable",
    ),
    probe(
        "memory limit",
        Recommended,
        limits::memory,
        "--memory is refused; a sandbox can exhaust the machine",
        "mount a hierarchy with the memory controller, v2 or v1 (CONFIG_MEMCG; some kernels: cgroup_enable=memory)",
    ),
    probe(
        "process limit",
        Recommended,
        limits::pids,
        "--pids is refused; a fork bomb inside reaches the machine",
        "mount a hierarchy with the pids controller, v2 or v1 (CONFIG_CGROUP_PIDS)",
    ),
    probe(
        "namespaces",
        Required,
        sandboxes::namespaces,
        "no sandbox can be created",
        "enable all seven in the kernel's configuration; raise /proc/sys/user/max_*_namespaces if they are 0",
    ),
    probe(
        "id map",
        Required,
        sandboxes::id_map,
        "users inside a sandbox cannot be told from those of the machine",
        "CAP_SETUID and CAP_SETGID in the initial user namespace",
    ),
    probe(
        "time namespace",
        Recommended,
        sandboxes::time,
        "after a reboot CLOCK_MONOTONIC goes backward in a restored sandbox",
        "Linux 5.6 or newer with CONFIG_TIME_NS",
    ),
    probe(
        "set_tid",
        Required,
        sandboxes::set_tid,
        "processes and threads cannot be restored under their numbers",
        "Linux 5.5 or newer",
    ),
    probe(
        "pid_max per namespace",
        Required,
        sandboxes::pid_max,
        "templates have no range of PIDs that the sandbox cannot reach",
        "Linux 6.14 or newer, /proc/sys writable",
    ),
    probe(
        "suspended seccomp",
        Required,
        tracing::suspend_seccomp,
        "injected system calls are subject to the sandbox's own filter",
        "CONFIG_CHECKPOINT_RESTORE; run the engine without a seccomp filter of its own (container: unconfined)",
    ),
    probe(
        "seccomp notification",
        Required,
        tracing::user_notification,
        "kill(-1) inside a sandbox cannot be handed to its init",
        "Linux 5.0 or newer with CONFIG_SECCOMP_FILTER",
    ),
    probe(
        "pidfd",
        Required,
        tracing::pidfd,
        "descriptors cannot be taken from stopped processes",
        "Linux 5.6 or newer",
    ),
    probe(
        "exec by descriptor",
        Required,
        tracing::exec_by_descriptor,
        "the sandbox's init cannot be started",
        "Linux 3.19 or newer; vm.memfd_noexec below 2",
    ),
    probe(
        "kcmp",
        Required,
        tracing::kcmp,
        "descriptors that share an offset cannot be told from those that do not",
        "CONFIG_KCMP (CONFIG_CHECKPOINT_RESTORE selects it)",
    ),
    probe(
        "rseq configuration",
        Required,
        tracing::rseq_configuration,
        "threads cannot be restored: glibc registers restartable sequences for each",
        "Linux 5.13 or newer",
    ),
    probe(
        "TCP repair",
        Recommended,
        tracing::tcp_repair,
        "TCP connections inside a sandbox are refused by checkpoint",
        "CAP_NET_ADMIN, CONFIG_CHECKPOINT_RESTORE",
    ),
    probe(
        "process_madvise",
        Optional,
        pages::advise_other,
        "huge pages cannot be made for a running sandbox from outside; checkpoints of big processes stay slower",
        "Linux 5.10 or newer, CAP_SYS_NICE and CAP_SYS_PTRACE",
    ),
    probe(
        "PAGEMAP_SCAN",
        Recommended,
        pages::scan_present,
        "exact scans read the whole pagemap instead, which is slower",
        "Linux 6.7 or newer with CONFIG_PROC_PAGE_MONITOR",
    ),
    probe(
        "uffd WP_ASYNC",
        Recommended,
        pages::async_write_protect,
        "rollbacks compare all pages of big processes with their templates: 0.14 us for each page",
        "Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP",
    ),
    probe(
        "store",
        Required,
        layers::store,
        "nothing can be kept: no layers, no images",
        "choose a directory on a writable filesystem: DELTABOX_STORE or --store",
    ),
    probe(
        "overlay",
        Required,
        layers::overlay_by_descriptor,
        "no layers: no sandbox has a root filesystem",
        "Linux 6.13 or newer with CONFIG_OVERLAY_FS, the store on ext4, xfs, btrfs or tmpfs, not on an overlay",
    ),
    probe(
        "overlay seal",
        Required,
        layers::seal,
        "a checkpoint cannot prove that nothing writes to the layer it froze",
        "Linux 5.12 or newer (mount_setattr)",
    ),
    probe(
        "idmapped store",
        Required,
        layers::idmapped_store,
        "imported images cannot be a sandbox's base",
        "Linux 6.15 or newer (detached mounts as layers); the store (DELTABOX_STORE) on ext4, xfs, btrfs or tmpfs",
    ),
    probe(
        "plain root",
        Recommended,
        layers::plain_root,
        "--base host is refused: an overlay cannot be idmapped; imported images only",
        "run the engine outside of the container, or import an image: deltabox image import",
    ),
    probe(
        "idmapped root",
        Recommended,
        layers::idmapped_root,
        "--base host is refused; imported images only",
        "a root filesystem that can be idmapped (ext4, xfs, btrfs), or import an image: deltabox image import",
    ),
    probe(
        "host base",
        Recommended,
        layers::host_base,
        "--base host is refused; imported images only",
        "what idmapped store and idmapped root need",
    ),
    probe(
        "reflink",
        Optional,
        layers::reflink,
        "the first write to a big file after a checkpoint copies all of it (ext4, 100 MB: 30 to 37 ms)",
        "put the store (DELTABOX_STORE) on xfs with reflink=1 where big existing files are modified",
    ),
    probe(
        "BTF",
        Recommended,
        programs::btf,
        "no tracking by eBPF: changed pages and files are found by scans only",
        "CONFIG_DEBUG_INFO_BTF (distribution kernels have it)",
    ),
    probe(
        "BPF tp_btf",
        Recommended,
        programs::tp_btf,
        "no tracking by eBPF: changed pages and files are found by scans only",
        "Linux 5.5 or newer with BTF, CAP_BPF and CAP_PERFMON",
    ),
    probe("BPF raw_tp", Optional, programs::raw_tracepoint, "nothing: tp_btf is what is used", NEWER),
    probe("BPF iter", Optional, programs::iterator, "nothing in this version uses iterators", NEWER),
    probe(
        "BPF fentry",
        Optional,
        programs::fentry,
        "nothing: tp_btf is what is used",
        "a kernel whose build and policy allow it",
    ),
    probe(
        "BPF lsm",
        Optional,
        programs::lsm,
        "nothing: tp_btf is what is used",
        "a kernel whose build and policy allow it: CONFIG_BPF_LSM, bpf in its lsm= list",
    ),
    probe(
        "BPF kprobe",
        Optional,
        programs::kprobe,
        "nothing: tp_btf is what is used",
        "a kernel whose build and policy allow it: CONFIG_KPROBE_EVENTS",
    ),
    probe(
        "CRIU",
        Optional,
        criu::criu,
        "no outside judge of images, no restore by stock criu",
        "install criu 4.1.1 or newer and set DELTABOX_CRIU to it (3.17 fails on new kernels)",
    ),
];

/// Tries everything. Made for a process with one thread; with more it is as safe, but forks copy all its descriptors.
///
/// `store` need not exist; its nearest existing ancestor stands for it. Takes a tenth of a second or two.
pub fn examine(store: &Path) -> Vec<Finding> {
    let ground = Ground {
        store: existing_ancestor(store),
        cgroups: Hierarchies::find(),
        btf: OnceCell::new(),
        privileged: privileges::is_initial_root(),
    };
    PROBES.iter().map(|probe| run(probe, &ground)).collect()
}

/// Whether everything required was found.
pub fn suffices(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.level != Required || finding.verdict.is_found())
}

fn run(probe: &Probe, ground: &Ground) -> Finding {
    let start = Instant::now();
    let outcome = (probe.run)(ground);
    let took_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    // Whoever is not root should first become that: what the kernel lacks is not known before.
    let unprivileged = matches!(outcome, Err(Failure::Denied(_))) && !ground.privileged;
    let verdict = match outcome {
        Ok(detail) => Verdict::Found { detail },
        Err(Failure::Missing(detail)) => Verdict::Missing { detail },
        Err(Failure::Denied(detail)) => Verdict::Denied { detail },
        Err(Failure::NotProbed(why)) => Verdict::NotProbed { why },
    };
    Finding {
        name: probe.name,
        level: probe.level,
        verdict,
        consequence: probe.consequence,
        remedy: if unprivileged { AS_ROOT } else { probe.remedy },
        took_us,
    }
}

fn existing_ancestor(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let found = absolute.ancestors().find(|ancestor| ancestor.is_dir());
    found.unwrap_or(Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests;
