//! What an idle sandbox keeps in memory: init, kernel objects, the daemon's share.
//!
//! The machine's own counters move with everything else that runs on it, so the daemon is put into a memory
//! cgroup for the while: its sandboxes are born into it, and what they make the kernel allocate is charged there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use deltabox::kernel::cgroups::Hierarchies;
use deltabox_tests::bench::machine::{kilobytes, meminfo_bytes};
use serde_json::{Map, Value, json};

use crate::many::N_SANDBOXES;
use crate::product::Product;

/// Of `/proc/meminfo`: kernel memory by kind, and what is left.
const MEMINFO: [&str; 6] = ["MemAvailable", "Slab", "SUnreclaim", "KernelStack", "PageTables", "Percpu"];

pub(crate) fn run(product: &Product, daemon: i32, keeper: u32) -> anyhow::Result<Value> {
    // What the first sandbox costs once is not part of what each one costs.
    product.create("first")?;
    let group = Group::enter(daemon, keeper)?;
    let before = snapshot(daemon, group.as_ref())?;
    let (mut rss, mut pss) = (Vec::new(), Vec::new());
    let names: Vec<String> = (0..N_SANDBOXES).map(|number| format!("idle-{number}")).collect();
    let mut inits = Vec::new();
    for name in &names {
        inits.push(product.create(name)?.init_pid.context("a running sandbox has an init")?);
    }
    let after = snapshot(daemon, group.as_ref())?;
    for init in inits {
        rss.push(of_process(init, "status", "VmRSS")?);
        pss.push(of_process(init, "smaps_rollup", "Pss")?);
    }
    let mut per_sandbox = Map::new();
    for (name, after) in &after {
        let grown = after - before.get(name).copied().unwrap_or(0);
        let n = i64::try_from(N_SANDBOXES)?;
        per_sandbox.insert(name.clone(), json!(grown / n));
    }
    for name in &names {
        product.remove(name)?;
    }
    product.remove("first")?;
    drop(group);
    Ok(json!({
        "n_sandboxes": N_SANDBOXES,
        "init_rss_bytes_median": median(rss),
        "init_pss_bytes_median": median(pss),
        "growth_per_sandbox_bytes": per_sandbox,
    }))
}

/// For people, in KiB.
pub(crate) fn text(memory: &Value) -> String {
    let kib = |value: &Value| format!("{:.0} KiB", value.as_f64().unwrap_or(0.0) / 1024.0);
    let (rss, pss) = (kib(&memory["init_rss_bytes_median"]), kib(&memory["init_pss_bytes_median"]));
    let mut text = format!("memory per idle sandbox ({N_SANDBOXES} of them): init VmRSS {rss}, PSS {pss} (medians)\n");
    for (name, value) in memory["growth_per_sandbox_bytes"].as_object().into_iter().flatten() {
        text.push_str(&format!("  {name:<24} {}\n", kib(value)));
    }
    text + "  (charged.*: memory cgroup of daemon and sandboxes; meminfo.*: whole machine, with all that runs there)\n"
}

type Snapshot = std::collections::BTreeMap<String, i64>;

fn snapshot(daemon: i32, group: Option<&Group>) -> anyhow::Result<Snapshot> {
    let mut found = Snapshot::new();
    for name in MEMINFO {
        found.insert(format!("meminfo.{name}"), i64::try_from(meminfo_bytes(name))?);
    }
    found.insert("daemon.VmRSS".to_owned(), i64::try_from(of_process(daemon, "status", "VmRSS")?)?);
    for (name, bytes) in group.map(Group::charged).unwrap_or_default() {
        found.insert(format!("charged.{name}"), bytes);
    }
    Ok(found)
}

fn of_process(pid: i32, file: &str, name: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/{file}");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    kilobytes(&text, name).with_context(|| format!("{name} in {path}"))
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// A memory cgroup with the daemon in it, until dropped.
struct Group {
    dir: PathBuf,
    home: PathBuf,
    daemon: i32,
}

/// What is charged, by file of a version 1 group.
const CHARGED: [(&str, &str); 2] = [("all", "memory.usage_in_bytes"), ("kernel", "memory.kmem.usage_in_bytes")];

impl Group {
    /// `None` where there is no version 1 memory hierarchy (a version 2 group would tear the daemon out of its place).
    fn enter(daemon: i32, keeper: u32) -> anyhow::Result<Option<Self>> {
        let Some(dir) = dir(keeper)? else { return Ok(None) };
        let root = dir.parent().context("a hierarchy has a root")?;
        let home = home(daemon, root)?;
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let group = Self { dir, home, daemon };
        group.put(&group.dir)?;
        Ok(Some(group))
    }

    fn put(&self, into: &Path) -> anyhow::Result<()> {
        let file = into.join("cgroup.procs");
        fs::write(&file, self.daemon.to_string()).with_context(|| format!("write {}", file.display()))
    }

    fn charged(&self) -> Vec<(String, i64)> {
        let read = |(name, file): (&str, &str)| {
            let text = fs::read_to_string(self.dir.join(file)).ok()?;
            Some((name.to_owned(), text.trim().parse().ok()?))
        };
        let stat = fs::read_to_string(self.dir.join("memory.stat")).unwrap_or_default();
        let parts = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            ["rss", "cache"].contains(&name).then(|| Some((name.to_owned(), bytes.parse().ok()?)))?
        });
        CHARGED.into_iter().filter_map(read).chain(parts).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The keeper removes the group again if this fails.
        let _ = self.put(&self.home);
        let _ = fs::remove_dir(&self.dir);
    }
}

fn dir(keeper: u32) -> anyhow::Result<Option<PathBuf>> {
    Ok(Hierarchies::find()?.v1.get("memory").map(|root| root.join(format!("deltabox-bench-{keeper}"))))
}

/// The group that a process is in, in the memory hierarchy.
fn home(pid: i32, root: &Path) -> anyhow::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("read the daemon's cgroups")?;
    let path = text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers.split(',').any(|name| name == "memory").then_some(path)
    });
    Ok(root.join(path.unwrap_or("/").trim_start_matches('/')))
}

/// What a bench that was cut short has left; nothing lives in it any more.
pub(crate) fn remove_group(keeper: u32) -> anyhow::Result<()> {
    match dir(keeper)? {
        Some(dir) if dir.exists() => Ok(deltabox::sandbox::cgroup::remove_tree(&dir)?),
        _ => Ok(()),
    }
}
