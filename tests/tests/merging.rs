//! Stacks stay short because layers are merged in the background, and no checkpoint is another for it.

use std::fs;
use std::path::PathBuf;

use deltabox_tests::disk::Disk;
use deltabox_tests::{Host, count, skipped_without_root, wait_within};
use nix::sys::signal::Signal;
use serde_json::Value;

fn create(host: &Host, merge_above: &str) {
    host.cli(["create", "box", "--merge-above", merge_above]).ok();
}

/// A change of every kind, told by `digest`.
fn change(host: &Host, n: usize) {
    let script = format!(
        "set -e; cd /srv; mkdir -p all; echo {n} > f{n}; echo {n} >> log; rm -f f$(({n} - 3)); mv all all{n}; mkdir all
        mv all{n} all/moved; echo {n} > all/f; rm -rf all/moved/moved/moved; test {n} = 0 || ln f{n} all/link; chmod 7{n}0 all/f || :"
    );
    host.sh("box", &script).ok();
}

fn digest(host: &Host) -> String {
    host.sh("box", "cd /srv && find . -printf '%p %y %m %T@ %l %n\\n' | sort | grep -v ' d ' ; find . -type f | sort | xargs md5sum").ok()
}

fn n_layers(host: &Host) -> u64 {
    host.cli(["inspect", "box", "--json"]).json()["disk"]["n_layers"].as_u64().expect("a number of layers")
}

fn dir(host: &Host) -> PathBuf {
    host.store().join("layers")
}

/// What lies in the store's directory of layers.
fn names(host: &Host) -> Vec<String> {
    let entries = fs::read_dir(dir(host)).expect("list layers");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Numbers of merged layers, and how many layers each stands for.
fn merged(host: &Host) -> Vec<(u64, u64)> {
    let names = names(host).into_iter().filter(|name| !name.starts_with('.'));
    let records = names.filter_map(|name| fs::read(dir(host).join(name).join("layer.json")).ok());
    let records = records.map(|text| serde_json::from_slice::<Value>(&text).expect("a record"));
    records.filter_map(|record| Some((record["id"].as_u64()?, record["merged"]["n_layers"].as_u64()?))).collect()
}

fn n_merges(host: &Host) -> u64 {
    let stats = host.cli(["stats", "box", "--json"]).json();
    let rows = stats["stats"].as_array().expect("rows");
    let whole = rows.iter().find(|row| row["operation"] == "merge" && row["phase"].is_null());
    whole.map_or(0, |row| row["n"].as_u64().expect("a count"))
}

#[test]
fn a_stack_stays_short_and_every_checkpoint_is_what_it_was() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    create(&host, "4");
    let mut states = Vec::new();
    for n in 0..count(24, 200) {
        change(&host, n);
        states.push((host.checkpoint("box"), digest(&host)));
    }
    wait_within(60, "the stack is short", || n_layers(&host) <= 10);
    for (id, expected) in states.iter().rev() {
        host.rollback("box", id);
        assert_eq!(&digest(&host), expected, "{id}");
    }
    // What no checkpoint needs by itself goes, and the last is what it was.
    let (last, expected) = states.pop().expect("checkpoints");
    host.rollback("box", &last);
    states.iter().for_each(|(id, _)| drop(host.cli(["rm", &format!("box@{id}")]).ok()));
    host.rollback("box", &last);
    assert_eq!(digest(&host), expected);
    wait_within(60, "unneeded layers are gone", || names(&host).len() <= 12);
    // A later engine finds the same.
    let mut host = host;
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    change(&host, 500);
    host.checkpoint("box");
    host.rollback("box", &last);
    assert_eq!(digest(&host), expected);
    host.cli(["rm", "box"]).ok();
    wait_within(60, "nothing is left", || names(&host).is_empty());
}

#[test]
fn checkpoints_without_a_pause_are_never_refused() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    create(&host, "32");
    let mut most = 0;
    for n in 0..count(120, 2000) {
        host.sh("box", &format!("echo {n} > /srv/f{}; echo {n} > /srv/last", n % 100)).ok();
        host.checkpoint("box");
        most = most.max(n_layers(&host));
    }
    wait_within(60, "the stack is short", || n_layers(&host) <= 62);
    assert!(most < 400, "{most} layers");
    host.rollback("box", "c7");
    assert_eq!(host.sh("box", "cat /srv/last; ls /srv | wc -l").ok(), "6\n8");
}

#[test]
fn an_engine_that_dies_in_a_merge_leaves_nothing_and_the_next_one_merges() {
    if skipped_without_root() {
        return;
    }
    for step in ["merge.finish", "merge.publish"] {
        let mut host = Host::start();
        create(&host, "2");
        let mut states = Vec::new();
        for n in 0..2 {
            change(&host, n);
            states.push((host.checkpoint("box"), digest(&host)));
        }
        host = host.restart_with(&[("DELTABOX_FAULT", &format!("{step}:kill"))]);
        change(&host, 2);
        // Answered before the merge begins.
        let third = host.checkpoint("box");
        host.wait_daemon();
        assert!(merged(&host).is_empty(), "{step}");
        let host = host.restart_without_faults();
        assert!(!names(&host).iter().any(|name| name.starts_with('.')), "{step}: {:?}", names(&host));
        states.push((third, digest(&host)));
        change(&host, 3);
        host.checkpoint("box");
        wait_within(60, &format!("{step}: it merges"), || n_layers(&host) <= 3);
        for (id, expected) in &states {
            host.rollback("box", id);
            assert_eq!(&digest(&host), expected, "{step}: {id}");
        }
    }
}

#[test]
fn a_merge_that_fails_is_told_and_changes_nothing() {
    if skipped_without_root() {
        return;
    }
    for step in ["merge.finish", "merge.publish"] {
        let host = Host::start();
        create(&host, "2");
        let host = host.restart_with(&[("DELTABOX_FAULT", step)]);
        let mut states = Vec::new();
        for n in 0..6 {
            change(&host, n);
            states.push((host.checkpoint("box"), digest(&host)));
        }
        wait_within(60, &format!("{step}: it is told"), || host.daemon_log().contains("could not be merged"));
        assert_eq!(n_layers(&host), 6);
        assert!(merged(&host).is_empty(), "{step}");
        wait_within(60, &format!("{step}: nothing is left of it"), || {
            !names(&host).iter().any(|name| name.starts_with('.'))
        });
        for (id, expected) in &states {
            host.rollback("box", id);
            assert_eq!(&digest(&host), expected, "{step}: {id}");
        }
    }
}

#[test]
fn a_merge_leaves_half_of_the_free_room() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make_with("tmpfs", "size=64M");
    let host = Host::start_in(disk.dir(), &[]);
    create(&host, "2");
    for n in 0..3 {
        host.sh("box", &format!("head -c 14M /dev/urandom > /srv/f{n}")).ok();
        host.checkpoint("box");
    }
    wait_within(60, "it is told", || host.daemon_log().contains("half of what is free"));
    assert!(merged(&host).is_empty());
    assert_eq!(host.sh("box", "cat /srv/f* | wc -c").ok(), (3 * 14 * 1024 * 1024).to_string());
}

#[test]
fn a_sandbox_is_removed_while_its_layers_are_merged() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    for _ in 0..count(5, 40) {
        create(&host, "2");
        for n in 0..3 {
            host.sh("box", &format!("head -c 30M /dev/zero | tr '\\0' x > /srv/f{n}; mkdir -p /srv/d{n}/e")).ok();
            host.checkpoint("box");
        }
        host.cli(["rm", "box"]).ok();
        wait_within(60, "nothing is left", || names(&host).is_empty());
    }
}

#[test]
fn what_a_durable_checkpoint_stands_on_is_on_disk_when_it_is_merged() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    create(&host, "2");
    for n in 0..6 {
        change(&host, n);
        host.cli(["checkpoint", "box", "--fs-only", "--durable"]).ok();
    }
    wait_within(60, "it merges", || n_merges(&host) > 0);
    let stats = host.cli(["stats", "box"]).ok();
    let merges = stats.split("merge").nth(1).expect("merges in stats");
    assert!(merges.contains("copy") && merges.contains("sync"), "{stats}");
}

#[test]
fn differences_are_the_same_whatever_was_merged() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    create(&host, "480");
    let other = |args: &[&str]| host.cli(args.iter().copied()).ok();
    host.cli(["create", "merging", "--merge-above", "2"]).ok();
    for n in 0..9 {
        for sandbox in ["box", "merging"] {
            let script = format!(
                "cd /srv; echo {n} > f{n}; echo {n} >> log; mkdir d{n}; echo {n} > d{n}/in; test {n} = 0 || mv d$(({n} - 1)) d{n}/moved
                rm -f f$(({n} - 4)); touch -d @1000000000 f{n} log; chmod 70{n} log || :"
            );
            host.sh(sandbox, &script).ok();
            other(&["checkpoint", sandbox, "--fs-only"]);
        }
    }
    let pairs = [("c1", "c9"), ("c9", "c1"), ("c3", "c6"), ("c8", "c9"), ("c5", "c5"), ("c2", "c7")];
    let differences = |sandbox: &str| -> Vec<String> {
        pairs.iter().map(|(from, to)| other(&["diff", sandbox, from, to, "-p"])).collect()
    };
    let expected = differences("box");
    assert_eq!(differences("merging"), expected);
    let n_dirs = || host.cli(["inspect", "merging", "--json"]).json()["disk"]["n_layers"].as_u64();
    wait_within(60, "it merges", || n_dirs().is_some_and(|n| n <= 5));
    assert_eq!(differences("merging"), expected);
}

#[test]
fn differences_are_the_same_when_single_layers_are_gone() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    create(&host, "480");
    host.cli(["create", "merging", "--merge-above", "2"]).ok();
    for n in 0..9 {
        for sandbox in ["box", "merging"] {
            // No directory is renamed: that would be told otherwise.
            let script = format!(
                "cd /srv; echo {n} > f{n}; echo {n} >> log; mkdir d{n}; echo {n} > d{n}/in; rm -rf d$(({n} - 2)) f$(({n} - 4))
                test {n} = 0 || mv f$(({n} - 1)) g{n}; touch -d @1000000000 f{n} log; chmod 70{n} log || :"
            );
            host.sh(sandbox, &script).ok();
            host.cli(["checkpoint", sandbox, "--fs-only"]).ok();
        }
    }
    let n_dirs = || host.cli(["inspect", "merging", "--json"]).json()["disk"]["n_layers"].as_u64();
    wait_within(60, "it merges", || n_dirs().is_some_and(|n| n <= 5));
    host.sh("merging", "echo x > /srv/x").ok();
    host.cli(["checkpoint", "merging", "--fs-only"]).ok();
    for id in ["c2", "c4", "c6", "c7"] {
        host.cli(["rm", &format!("box@{id}")]).ok();
        host.cli(["rm", &format!("merging@{id}")]).ok();
    }
    let single: Vec<_> = names(&host);
    for (from, to) in [("c1", "c9"), ("c9", "c1"), ("c3", "c8"), ("c5", "c9"), ("c3", "c5")] {
        let diff = |sandbox: &str| host.cli(["diff", sandbox, from, to, "-p", "--contents"]).ok();
        assert_eq!(diff("merging"), diff("box"), "{from} {to}, from {single:?}");
    }
}

/// Checkpoints c1 to c`n` of changes, and their states.
fn checkpoints(host: &Host, n: usize) -> Vec<(String, String)> {
    let mut states = Vec::new();
    for n in 0..n {
        change(host, n);
        states.push((host.checkpoint("box"), digest(host)));
    }
    states
}

fn assert_each(host: &Host, states: &[(String, String)], what: &str) {
    for (id, expected) in states {
        host.rollback("box", id);
        assert_eq!(&digest(host), expected, "{what}: {id}");
    }
}

#[test]
fn a_merged_layer_that_is_damaged_under_the_engine_is_passed_over_and_its_sources_stay() {
    if skipped_without_root() {
        return;
    }
    type Damage = fn(PathBuf);
    let damages: [(&str, Damage); 3] = [
        ("no content", |layer| fs::remove_dir_all(layer.join("upper")).expect("remove content")),
        ("no directory", |layer| fs::remove_dir_all(layer).expect("remove a layer")),
        ("a damaged record", |layer| fs::write(layer.join("layer.json"), "{").expect("damage a record")),
    ];
    for (what, damage) in damages {
        let host = Host::start();
        create(&host, "2");
        let mut states = checkpoints(&host, 3);
        wait_within(60, "it merges", || n_merges(&host) > 0);
        // The sandbox is on its sources until the next switch.
        host.cli(["gc"]).ok();
        for (id, _) in merged(&host) {
            damage(dir(&host).join(id.to_string()));
        }
        host.cli(["gc"]).ok();
        change(&host, 3);
        states.push((host.checkpoint("box"), digest(&host)));
        host.cli(["gc"]).ok();
        assert_each(&host, &states, what);
        let mut host = host;
        host.end_daemon(Signal::SIGKILL);
        host.start_daemon();
        assert_each(&host, &states, &format!("{what}, another engine"));
    }
}

#[test]
fn a_durable_checkpoint_of_a_young_store_outlives_a_power_failure_and_merges() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make("ext4");
    let mut host = Host::start_in(disk.dir(), &[]);
    create(&host, "2");
    checkpoints(&host, 3);
    wait_within(60, "it merges", || n_merges(&host) > 0);
    for (n, name) in [(3, "kept"), (4, "then")] {
        change(&host, n);
        host.cli(["checkpoint", "box", "--fs-only", "--durable", "--name", name]).ok();
    }
    for n in 5..10 {
        change(&host, n);
        host.checkpoint("box");
    }
    wait_within(60, "it merges", || n_merges(&host) > 2);
    let cgroup = PathBuf::from(host.inspect("box")["cgroup"].as_str().expect("a path"));
    disk.lose_power(|| {
        host.end_daemon(Signal::SIGKILL);
        fs::write(cgroup.join("cgroup.kill"), "1").expect("end what runs");
    });
    host.start_daemon();
    host.cli(["gc"]).ok();
    let tree = host.cli(["tree", "box", "--json"]).json();
    for name in ["kept", "then"] {
        let kept = tree["checkpoints"].as_array().expect("checkpoints").iter().find(|one| one["name"] == name);
        assert!(kept.expect("the durable checkpoint is there")["damage"].is_null(), "{tree}");
    }
    let diff = host.cli(["diff", "box", "kept", "then", "-p"]).ok();
    assert!(diff.contains(" 1\n 2\n 3\n+4"), "{diff}");
}

#[test]
fn no_layer_of_a_removed_sandbox_stays_even_if_a_checkpoint_could_not_be_read() {
    if skipped_without_root() {
        return;
    }
    let mut host = Host::start();
    create(&host, "2");
    checkpoints(&host, 4);
    host.end_daemon(Signal::SIGKILL);
    fs::write(host.store().join("sandboxes/box/checkpoints/c2.json"), "").expect("damage a checkpoint");
    host.start_daemon();
    host.cli(["rm", "box"]).ok();
    wait_within(60, "nothing is left", || names(&host).is_empty());
}

#[test]
fn what_a_root_is_mounted_over_stays_even_if_its_record_is_damaged() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    create(&host, "2");
    checkpoints(&host, 3);
    wait_within(60, "it merges", || n_merges(&host) > 0);
    let before = digest(&host);
    let held = names(&host);
    host.cli(["gc"]).ok();
    let live = PathBuf::from(host.inspect("box")["live_layer"].as_str().expect("a path"));
    fs::write(live.join("layer.json"), "{").expect("damage a record");
    for id in ["c1", "c2"] {
        host.cli(["rm", &format!("box@{id}")]).ok();
    }
    host.cli(["gc"]).ok();
    assert_eq!(names(&host), held);
    host.sh("box", "echo 2 > /proc/sys/vm/drop_caches || :").ok();
    assert_eq!(digest(&host), before);
    // Another engine cannot tell what it is mounted over; it says so instead of failing.
    let mut host = host;
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    host.cli(["gc"]).ok();
    assert_eq!(names(&host), held);
    host.cli(["inspect", "box", "--json"]).json();
    assert!(host.cli(["checkpoint", "box", "--fs-only", "--json"]).error()["message"].as_str().is_some());
}

#[test]
fn a_merge_leaves_half_of_the_free_files() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make_with("tmpfs", "size=256M,nr_inodes=9000");
    let host = Host::start_in(disk.dir(), &[]);
    create(&host, "2");
    for n in 0..3 {
        host.sh("box", &format!("mkdir /srv/d{n}; cd /srv/d{n}; seq 1600 | xargs touch")).ok();
        host.checkpoint("box");
    }
    wait_within(60, "it is told or done", || host.daemon_log().contains("half of what is free") || n_merges(&host) > 0);
    assert!(merged(&host).is_empty());
}

#[test]
fn a_run_that_can_never_be_merged_keeps_no_other_from_it() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make("ext4");
    let host = Host::start_in(disk.dir(), &[]);
    create(&host, "2");
    // A renamed directory whose attributes leave no room for a longer redirect.
    host.sh("box", "cd /srv; mkdir -p $(seq -s / 1000 1100)/d").ok();
    host.checkpoint("box");
    host.sh("box", "touch /srv/x").ok();
    host.checkpoint("box");
    let fill = "import os
d = '/srv/' + '/'.join(str(n) for n in range(1000, 1101))
os.rename(d + '/d', d + '/full')
d += '/full'
for i, start in enumerate((2000, 2000, 1000, 100)):
    for n in range(start, 0, -1):
        try: os.setxattr(d, 'user.%d' % i, b'x' * n); break
        except OSError: pass";
    host.cli(["exec", "box", "--", "python3", "-c", fill]).ok();
    host.checkpoint("box");
    let states = checkpoints(&host, 45);
    wait_within(60, "it is told", || host.daemon_log().contains("could not be merged"));
    wait_within(60, "the stack is short", || n_layers(&host) < 30);
    assert_each(&host, &states[40..], "");
}

#[test]
fn a_layer_that_cannot_be_removed_keeps_no_engine_from_its_start() {
    if skipped_without_root() {
        return;
    }
    let mut host = Host::start();
    create(&host, "2");
    let states = checkpoints(&host, 3);
    host.end_daemon(Signal::SIGKILL);
    // Of a sandbox that is no more.
    let record = fs::read_to_string(dir(&host).join("1/layer.json")).expect("a record");
    let orphan = dir(&host).join("77");
    fs::create_dir_all(orphan.join("upper")).expect("make a layer");
    let record = record.replace("\"box\"", "\"gone\"").replace("\"id\":1,", "\"id\":77,");
    fs::write(orphan.join("layer.json"), record).expect("make a layer");
    let host = host.restart_with(&[("DELTABOX_FAULT", "layers.remove")]);
    let log = host.daemon_log();
    assert!(log.contains("failed to remove the layers of sandboxes"), "{log}");
    assert_each(&host, &states, "");
    let host = host.restart_without_faults();
    wait_within(60, "it is gone", || !names(&host).iter().any(|name| name.contains("77")));
}

#[test]
fn a_durable_checkpoint_outlives_a_power_failure_after_others_that_are_not() {
    if skipped_without_root() {
        return;
    }
    // Not ext4: that writes a file's content before the rename that replaces another.
    let disk = Disk::make("xfs");
    let mut host = Host::start_in(disk.dir(), &[]);
    create(&host, "2");
    host.cli(["checkpoint", "box", "--fs-only", "--durable", "--name", "kept"]).ok();
    checkpoints(&host, 4);
    host.rollback("box", "c3");
    // Somebody's fsync writes all names of the file system to disk.
    fs::File::create(disk.path().join("other")).and_then(|file| file.sync_all()).expect("sync a file");
    let cgroup = PathBuf::from(host.inspect("box")["cgroup"].as_str().expect("a path"));
    disk.lose_power(|| {
        host.end_daemon(Signal::SIGKILL);
        fs::write(cgroup.join("cgroup.kill"), "1").expect("end what runs");
    });
    host.start_daemon();
    let tree = host.cli(["tree", "box", "--json"]).json();
    let kept = tree["checkpoints"].as_array().expect("checkpoints").iter().find(|one| one["name"] == "kept");
    assert!(kept.expect("the durable checkpoint is there")["damage"].is_null(), "{tree}");
}
