//! Checkpoints and rollbacks without end under a program with several threads that writes without end.
//!
//! Each thread numbers its writes. So what a checkpoint holds of a thread's log is what its parent holds and then numbers
//! without a gap: from the parent's last on, or, if a rollback lies in between, from the last one that the discarded
//! layer got. The layers are read where they lie in the store.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a broken assumption of a helper ends its story")]

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use deltabox_tests::{Host, count, n_descriptors, resident_bytes, skipped_without_root};
use nix::unistd::Pid;
use serde_json::Value;

const N_THREADS: usize = 4;
/// Checkpoints there may be.
const N_KEPT: usize = 16;

/// A thread's log as a checkpoint holds it.
#[derive(Clone, Debug, Default)]
struct Log {
    bytes: Vec<u8>,
}

impl Log {
    fn last(&self) -> u64 {
        self.bytes.last_chunk().map_or(0, |last| u64::from_le_bytes(*last))
    }
}

struct Rounds {
    host: Host,
    /// What each checkpoint holds, and a hash of each layer that was frozen.
    checkpoints: BTreeMap<String, [Log; N_THREADS]>,
    layers: BTreeMap<u64, u64>,
    head: String,
    /// The last number of each thread that some layer got.
    last: [u64; N_THREADS],
    random: u64,
}

impl Rounds {
    fn random(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.random >> 33).unwrap() % below
    }

    fn layer(&self, id: u64) -> PathBuf {
        self.host.store().join(format!("layers/{id}"))
    }

    fn json(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn sandbox(&self) -> PathBuf {
        self.host.store().join("sandboxes/box")
    }

    /// A file as a checkpoint has it.
    fn frozen(&self, id: &str, name: &str) -> Vec<u8> {
        // Again if a layer was replaced by a merged one, and is gone.
        (0..100).find_map(|_| self.look_into(id, name)).unwrap_or_else(|| panic!("{id}: its layers are gone"))
    }

    fn look_into(&self, id: &str, name: &str) -> Option<Vec<u8>> {
        let mut layer = Self::json(&self.sandbox().join(format!("checkpoints/{id}.json")))["top"].as_u64();
        let merged = self.merged();
        while let Some(at) = layer {
            let dir = merged.get(&at).map_or(at, |(_, dir)| *dir);
            match fs::read(self.layer(dir).join("upper/srv").join(name)) {
                Ok(bytes) => return Some(bytes),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => panic!("{name} of layer {dir}: {error}"),
            }
            let record = fs::read(self.layer(dir).join("layer.json")).ok()?;
            layer = serde_json::from_slice::<Value>(&record).unwrap()["parent"].as_u64();
        }
        Some(Vec::new())
    }

    /// By their topmost layer, the merged ones that stand for the most: how many, and where. What the last checkpoint or
    /// rollback has left is removed meanwhile.
    fn merged(&self) -> BTreeMap<u64, (u64, u64)> {
        let mut merged = BTreeMap::new();
        for entry in fs::read_dir(self.host.store().join("layers")).unwrap() {
            let Ok(text) = fs::read(entry.unwrap().path().join("layer.json")) else { continue };
            let record: Value = serde_json::from_slice(&text).unwrap();
            if let (Some(top), Some(n)) = (record["merged"]["top"].as_u64(), record["merged"]["n_layers"].as_u64()) {
                let found = (n, record["id"].as_u64().unwrap());
                let longest = merged.entry(top).or_insert(found);
                *longest = found.max(*longest);
            }
        }
        merged
    }

    fn checkpoint(&mut self) {
        let report = self.host.cli(["checkpoint", "box", "--fs-only", "--json"]).json();
        let id = report["id"].as_str().unwrap().to_owned();
        let before = self.checkpoints.get(&self.head).cloned().unwrap_or_default();
        let logs = std::array::from_fn(|k| {
            let log = Log { bytes: self.frozen(&id, &format!("log{k}")) };
            let new = log.bytes.strip_prefix(before[k].bytes.as_slice());
            let new = new.unwrap_or_else(|| panic!("{id}: log {k} does not begin with that of {}", self.head));
            let mut expected = self.last[k];
            for number in new.chunks(8) {
                expected += 1;
                assert_eq!(number, expected.to_le_bytes(), "{id}: log {k} after {}", self.head);
            }
            self.last[k] = expected;
            let value = |name| {
                let bytes = self.frozen(&id, &format!("{name}{k}"));
                bytes.first_chunk().map_or(0, |value| u64::from_le_bytes(*value))
            };
            let (place, mapped) = (value("place"), value("mapped"));
            // Of the same instant. (Just after a rollback the others may still be the target's.)
            if new.len() >= 16 {
                assert!((expected - 1..=expected).contains(&place), "{id}: {expected}, but {place} in place");
                assert!((expected - 1..=place).contains(&mapped), "{id}: {place} in place, but {mapped} mapped");
            }
            log
        });
        if report["fs_frozen"] == true {
            let top = Self::json(&self.sandbox().join(format!("checkpoints/{id}.json")))["top"].as_u64().unwrap();
            self.layers.insert(top, hash_tree(&self.layer(top).join("upper")).unwrap());
        }
        self.checkpoints.insert(id.clone(), logs);
        self.head = id;
    }

    fn rollback(&mut self) {
        let n = self.random(self.checkpoints.len());
        let to = self.checkpoints.keys().nth(n).unwrap().clone();
        let live = Self::json(&self.sandbox().join("sandbox.json"))["live"].as_u64().unwrap();
        // Open for writing, so they were copied when the programs came to this layer.
        let upper = self.layer(live).join("upper/srv");
        let discarded = [0, 1, 2, 3].map(|k| File::open(upper.join(format!("log{k}"))).unwrap());
        self.host.cli(["rollback", "box", &to, "--fs-only"]).ok();
        for (last, mut file) in self.last.iter_mut().zip(discarded) {
            let mut log = Log::default();
            file.read_to_end(&mut log.bytes).unwrap();
            *last = log.last();
        }
        self.head = to;
    }

    fn forget(&mut self) {
        while self.checkpoints.len() > N_KEPT {
            let n = self.random(self.checkpoints.len());
            let id = self.checkpoints.keys().nth(n).unwrap().clone();
            // What the next one is compared with.
            if id != self.head {
                self.host.cli(["rm", &format!("box@{id}")]).ok();
                self.checkpoints.remove(&id);
            }
        }
    }

    /// Layers that are still there are as they were when they were frozen.
    fn compare_layers(&mut self) -> usize {
        let (host, layers) = (&self.host, &mut self.layers);
        let upper = |id: &u64| host.store().join(format!("layers/{id}/upper"));
        // The janitor may be removing some.
        layers.retain(|id, hash| match hash_tree(&upper(id)) {
            Ok(now) if now == *hash => true,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !upper(id).exists() => false,
            other => panic!("layer {id} has changed: {other:?}"),
        });
        layers.len()
    }
}

/// Names, modes, sizes and contents of all that is in a directory.
fn hash_tree(top: &Path) -> std::io::Result<u64> {
    fn add(dir: &Path, hasher: &mut DefaultHasher) -> std::io::Result<()> {
        let entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<BTreeSet<_>>>()?;
        for path in entries {
            let info = path.symlink_metadata()?;
            (path.file_name(), info.mode(), info.uid(), info.mtime(), info.mtime_nsec()).hash(hasher);
            if info.is_dir() {
                add(&path, hasher)?;
            } else if info.is_file() {
                fs::read(&path)?.hash(hasher);
            }
        }
        Ok(())
    }
    let mut hasher = DefaultHasher::new();
    add(top, &mut hasher)?;
    Ok(hasher.finish())
}

/// What must not grow from round to round.
#[derive(Debug)]
struct Held {
    daemon_descriptors: usize,
    init_descriptors: usize,
    daemon_threads: usize,
    mounts: usize,
    program_descriptors: usize,
    program_maps: usize,
}

impl Held {
    /// No count is above that of `was`. The daemon may have two threads more: how busy its pool was is chance.
    fn is_within(&self, was: &Self) -> bool {
        self.daemon_descriptors <= was.daemon_descriptors
            && self.init_descriptors <= was.init_descriptors
            && self.daemon_threads <= was.daemon_threads + 2
            && self.mounts <= was.mounts
            && self.program_descriptors <= was.program_descriptors
            && self.program_maps <= was.program_maps
    }
}

fn held(host: &Host, program: Pid) -> Held {
    let n_lines = |path: &str| fs::read_to_string(path).unwrap().lines().count();
    // Other tests mount and unmount beside this one.
    let (store, mounts) = (host.store(), fs::read_to_string("/proc/self/mountinfo").unwrap());
    let own_mounts = mounts.lines().filter(|line| line.contains(store.to_str().unwrap())).count();
    let (daemon, init) = (host.daemon_pid(), host.init("box"));
    Held {
        daemon_descriptors: n_descriptors(daemon),
        init_descriptors: n_descriptors(init),
        daemon_threads: fs::read_dir(format!("/proc/{daemon}/task")).unwrap().count(),
        mounts: n_lines(&format!("/proc/{init}/mountinfo")) + own_mounts,
        program_descriptors: n_descriptors(program),
        program_maps: n_lines(&format!("/proc/{program}/maps")),
    }
}

/// What a process has open, numbers taken out, for the report of a failure.
fn descriptor_links(pid: Pid) -> Vec<String> {
    let links =
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let mut links: Vec<String> =
        links.map(|link| link.to_string_lossy().replace(|c: char| c.is_ascii_digit(), "")).collect();
    links.sort();
    links
}

/// The one program in the sandbox.
fn program(host: &Host) -> Pid {
    let group = PathBuf::from(host.inspect("box")["cgroup"].as_str().unwrap());
    let pids = fs::read_to_string(group.join("live/cgroup.procs")).unwrap();
    let init = host.init("box").to_string();
    let program: Vec<_> = pids.lines().filter(|pid| *pid != init).collect();
    assert_eq!(program.len(), 1, "{program:?}");
    Pid::from_raw(program[0].parse().unwrap())
}

/// Minor number of the device of the sandbox's root: the lowest that was free when it was mounted. File systems that are
/// never let go would drive it up for good; other tests beside this one do for a while.
fn device(host: &Host) -> u64 {
    let device = fs::metadata(format!("/proc/{}/root/", host.init("box"))).unwrap().dev();
    nix::sys::stat::minor(device)
}

#[test]
fn nothing_is_lost_changed_or_leaked_in_rounds_without_end() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "box", "--merge-above", "8"]).ok();
    let mut command = host.command(["exec", "box", "--", "/usr/bin/python3", "-c", include_str!("programs/writer.py")]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let root = PathBuf::from(format!("/proc/{}/root/srv", host.init("box")));
    let is_ready = |k: usize| fs::metadata(root.join(format!("mapped{k}"))).is_ok_and(|file| file.len() == 4096);
    while !(0..N_THREADS).all(is_ready) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let program = program(&host);
    let (checkpoints, layers, last) = Default::default();
    let mut rounds = Rounds { host, checkpoints, layers, head: String::new(), last, random: 1 };
    let n = count(120, 10_000);
    let mut before = None;
    for round in 0..n {
        rounds.checkpoint();
        if rounds.random(2) == 0 {
            rounds.rollback();
        }
        rounds.forget();
        if round % 100 == 99 {
            rounds.compare_layers();
        }
        if round == 50 {
            let host = &rounds.host;
            let (memory, links) = (resident_bytes(host.daemon_pid()), descriptor_links(host.daemon_pid()));
            before = Some((held(host, program), memory, device(host), links));
        }
    }
    assert!(rounds.compare_layers() > 0);
    let (was, memory, minor, links) = before.unwrap();
    let host = &rounds.host;
    // What was left last goes in the background.
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while !held(host, program).is_within(&was) && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    let is = held(host, program);
    println!("{n} rounds, {:?} writes; {was:?}, then {is:?}", rounds.last);
    let now = descriptor_links(host.daemon_pid());
    assert!(is.is_within(&was), "{was:?}, then {is:?}; the daemon's descriptors: {links:?}, then {now:?}");
    let grown = resident_bytes(host.daemon_pid()).saturating_sub(memory);
    assert!(grown < 16 << 20, "the daemon grew by {grown} bytes");
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while device(&rounds.host) >= minor + 32 {
        assert!(std::time::Instant::now() < end, "device {minor}, then {}", device(&rounds.host));
        // Another root.
        rounds.checkpoint();
        rounds.rollback();
        rounds.forget();
    }
    let host = &rounds.host;
    host.sh("box", "touch /srv/enough").ok();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{done:?}");
    // The last writes too.
    rounds.checkpoint();
}
