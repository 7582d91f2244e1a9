//! Rounds without end leave nothing behind: not in the sandbox, in the daemon, in the kernel, in the store.

#![expect(clippy::panic, reason = "a broken assumption ends the story")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use deltabox::kernel::cgroups::Hierarchies;
use deltabox_tests::leftovers::Leftovers;
use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, count, n_descriptors, resident_bytes, skipped_without_root, wait_within};
use nix::unistd::Pid;
use serde_json::json;

use crate::{checkpoint, roll_back};

/// Rounds that go before: caches fill, pools grow.
const N_WARM: usize = 30;
/// Bytes by which memory may be more than after the first rounds (chosen: an allocator's and a cache's ups and downs; a
/// leak of one page or 4 KiB per round is 20 MB in soak).
const SLACK: u64 = 8 << 20;

/// What can leak, counted.
struct Census {
    counts: BTreeMap<&'static str, usize>,
    bytes: BTreeMap<&'static str, u64>,
}

impl Census {
    fn of(host: &Host) -> Self {
        let (daemon, init) = (host.daemon_pid(), host.init("box"));
        let left = Leftovers::of(&host.store());
        let lines = |path: String| fs::read_to_string(path).expect("a file of /proc").lines().count();
        let listed = host.cli(["--json", "ps", "box"]).json();
        let n_files = |dir: &str| n_below(&host.store().join(dir));
        // Kept for `logs` as long as the sandbox is.
        let n_logs = n_files("sandboxes/box/logs");
        let counts = BTreeMap::from([
            ("processes of all its cgroups", left.processes.len()),
            ("tasks that the kernel counts", tasks(&host.store())),
            ("cgroups", left.cgroups.iter().filter(|path| path.is_dir()).count()),
            ("mounts of the daemon", lines(format!("/proc/{daemon}/mountinfo"))),
            ("mounts inside", lines(format!("/proc/{init}/mountinfo"))),
            ("descriptors of the daemon", n_descriptors(daemon)),
            ("threads of the daemon", n_threads(daemon)),
            ("descriptors of init", n_descriptors(init)),
            ("processes inside", listed["processes"].as_array().expect("processes").len()),
            ("files of the sandbox", n_files("sandboxes") - n_logs),
            ("layers", fs::read_dir(host.store().join("layers")).expect("layers").count()),
            ("files of layers", n_files("layers")),
        ]);
        let bytes = BTreeMap::from([
            ("memory of the daemon", resident_bytes(daemon)),
            ("memory of init", resident_bytes(init)),
            ("memory of the sandbox", memory_of_all(&host.store())),
        ]);
        Self { counts, bytes }
    }
}

fn n_below(path: &Path) -> usize {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| 1 + if entry.path().is_dir() { n_below(&entry.path()) } else { 0 }).sum()
}

/// Without those of tokio, which come with requests and go when they have been idle for 10 s.
fn n_threads(pid: Pid) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
    let name = |path: PathBuf| fs::read_to_string(path.join("comm")).unwrap_or_default();
    tasks.filter(|task| !name(task.path()).starts_with("tokio")).count()
}

/// The store's cgroup in the hierarchy of a controller.
fn group_of(store: &Path, controller: &str) -> PathBuf {
    let hosts = Hierarchies::find().expect("find the cgroup hierarchies");
    let tag = fs::read_to_string(store.join("tag")).expect("read the store's tag");
    hosts.v1.get(controller).unwrap_or(&hosts.unified).join("deltabox").join(tag)
}

/// Zombies count too.
fn tasks(store: &Path) -> usize {
    let group = group_of(store, "pids").join("box/pids.current");
    fs::read_to_string(&group).unwrap_or_else(|error| panic!("{}: {error}", group.display())).trim().parse().expect("n")
}

/// Bytes of private memory and of the kernel's own, without the cache of files.
fn memory_of_all(store: &Path) -> u64 {
    let group = group_of(store, "memory").join("box");
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let stat = read("memory.stat").unwrap_or_else(|| panic!("no memory.stat in {}", group.display()));
    let field = |name: &str| {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok()).unwrap_or(0)
    };
    let own = read("memory.kmem.usage_in_bytes").map_or(0, |text| text.trim().parse().expect("bytes"));
    // The first is version 2, the others version 1.
    field("anon") + field("kernel") + field("total_rss") + own
}

/// What a round does that the rollback at its end takes back.
const STEPS: [&str; 6] = [
    "children = [subprocess.Popen(['sleep', '1000']) for _ in range(3)]",
    "more = threading.Thread(target=threading.Event().wait, daemon=True); more.start()",
    "ended = subprocess.run(['sh', '-c', 'echo 1 | cat > /srv/made; sleep 1000 & exit 3'])",
    "heap = [os.urandom(100000) for _ in range(20)]; shared[:5] = b'later'",
    "pipes = [os.pipe() for _ in range(20)]; os.write(pipes[0][1], b'x' * 5000)",
    "[open(f'/srv/f{k}', 'w').write('x' * 3000) for k in range(20)]; stop.set(); thread.join()\nif os.path.exists('/srv/kept'): os.unlink('/srv/kept')",
];

fn round(host: &Host, worker: &mut Worker, base: &str, n: usize) {
    worker.ask(STEPS[n % STEPS.len()]);
    // A command that began since; it ends with the rollback.
    if n % 10 == 3 {
        host.cli(["exec", "-d", "box", "--", "sleep", "1000"]).ok();
    }
    let next = checkpoint(host);
    worker.ask(STEPS[(n / STEPS.len()) % STEPS.len()]);
    let third = n.is_multiple_of(4).then(|| checkpoint(host));
    if !n.is_multiple_of(3) {
        roll_back(host, &next);
        worker.ask("open('/srv/again', 'w').write('again')");
    }
    roll_back(host, base);
    for id in third.into_iter().chain([next]) {
        host.cli(["rm", &format!("box@{id}")]).ok();
    }
    let look = "[open('/srv/kept').read(), shared[:5].decode(), sorted(os.listdir('/srv')), threading.active_count()]";
    assert_eq!(worker.ask(look), json!(["kept", "first", ["kept"], 2]), "round {n}");
}

#[test]
fn rounds_without_end_leave_nothing_behind() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "box", "--memory", "2G", "--pids", "400"]).ok();
    let mut worker = Worker::start(&host, "box");
    worker.ask(
        "import mmap, subprocess, threading
open('/srv/kept', 'w').write('kept')
shared = mmap.mmap(-1, 100000); shared[:5] = b'first'
stop = threading.Event(); thread = threading.Thread(target=stop.wait); thread.start()
lives = subprocess.Popen(['sleep', '100000'])",
    );
    let base = checkpoint(&host);
    for n in 0..N_WARM {
        round(&host, &mut worker, &base, n);
    }
    let n_layers = || fs::read_dir(host.store().join("layers")).expect("layers").count();
    // What goes in the background.
    let few = |host: &Host| Leftovers::of(&host.store()).processes.len() <= 5 && n_layers() <= 2;
    wait_within(60, "the first rounds are over", || few(&host));
    let before = Census::of(&host);
    let n_rounds = count(200, 5000);
    for n in 0..n_rounds {
        round(&host, &mut worker, &base, n);
    }
    let mut left = String::new();
    let mut is_same = || {
        let after = Census::of(&host);
        let more = |(name, n): (&&str, &usize)| {
            (before.counts[name] != *n).then(|| format!("{name}: {} {n}", before.counts[name]))
        };
        left = after.counts.iter().filter_map(more).collect::<Vec<_>>().join("; ");
        left.is_empty()
    };
    // What goes in the background has so long.
    let end = Instant::now() + Duration::from_secs(30);
    while !is_same() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(left, "", "{n_rounds} rounds");
    let after = Census::of(&host);
    println!("{:?}\n{:?}\n{:?}", before.counts, before.bytes, after.bytes);
    for (name, bytes) in &after.bytes {
        let first = before.bytes[name];
        assert!(*bytes <= first + SLACK, "{name}: {first} bytes, after {n_rounds} rounds {bytes}");
    }
    worker.ask("stop.set(); lives.kill(); lives.wait()");
    assert!(worker.end().success());
}
