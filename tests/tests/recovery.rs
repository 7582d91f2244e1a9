//! What is on record after an operation that was cut short, and what the next one makes of it.

use std::fs;
use std::path::Path;

use deltabox_tests::disk::Disk;
use deltabox_tests::{Host, output, skipped_without_root};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

fn write(host: &Host, text: &str) {
    host.sh("box", &format!("echo {text} > /srv/n")).ok();
}

fn read(host: &Host) -> String {
    host.sh("box", "cat /srv/n").ok()
}

fn head(host: &Host) -> Value {
    host.inspect("box")["head"].clone()
}

fn node(host: &Host, id: &str) -> Value {
    let tree = host.cli(["tree", "box", "--json"]).json();
    let all = tree["checkpoints"].as_array().expect("checkpoints").clone();
    all.into_iter().find(|one| one["id"] == id).expect("a checkpoint")
}

fn n_layers(host: &Host) -> usize {
    fs::read_dir(host.store().join("layers")).expect("list layers").count()
}

fn end_init(host: &Host) {
    let init = host.init("box");
    kill(init, Signal::SIGKILL).expect("kill init");
}

/// A sandbox with a checkpoint `c1` of "old", then "new" written; the daemon has `fault` armed.
fn prepared(fault: &str) -> Host {
    let host = Host::start();
    host.create("box");
    write(&host, "old");
    host.checkpoint("box");
    write(&host, "new");
    host.cli(["exec", "-d", "-w", "/srv", "box", "--", "sh", "-c", "exec 5<>/srv/n; exec sleep 1000"]).ok();
    host.restart_with(&[("DELTABOX_FAULT", fault)])
}

#[test]
fn nothing_comes_from_a_checkpoint_that_was_never_finished() {
    if skipped_without_root() {
        return;
    }
    for step in ["checkpoints.moved", "checkpoints.sync", "tree.write"]
        .iter()
        .flat_map(|s| [(*s).to_owned(), format!("{s}:kill")])
    {
        println!("{step}");
        let mut host = prepared(&step);
        assert!(!host.cli(["checkpoint", "box", "--fs-only", "--durable"]).status.success(), "{step}");
        if step.ends_with(":kill") {
            host.wait_daemon();
        }
        let host = host.restart_without_faults();
        assert_eq!(head(&host), "c1", "{step}");
        assert_eq!(read(&host), "new", "{step}");
        let next = host.checkpoint("box");
        assert_eq!(node(&host, &next)["parent"], "c1", "{step}");
        assert!(host.cli(["tree", "box"]).ok().contains(&next), "{step}");
        host.rollback("box", "c1");
        assert_eq!(read(&host), "old", "{step}");
        host.rollback("box", &next);
        assert_eq!(read(&host), "new", "{step}");
    }
}

#[test]
fn a_finished_checkpoint_is_what_its_sandbox_comes_from_whenever_the_engine_dies() {
    if skipped_without_root() {
        return;
    }
    let mut host = prepared("");
    for _ in 0..2 {
        // One that freezes a layer, and one of what has not changed.
        let id = host.checkpoint("box");
        host.end_daemon(Signal::SIGKILL);
        host.start_daemon();
        assert_eq!(head(&host), id.as_str());
    }
    assert_eq!(node(&host, &host.checkpoint("box"))["parent"], "c3");
    host.cli(["rm", "box@c4"]).ok();
    host.rollback("box", "c1");
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    assert_eq!(head(&host), "c1");
    host.cli(["rm", "box@c1"]).ok();
    host.end_daemon(Signal::SIGKILL);
    host.start_daemon();
    assert_eq!(head(&host), Value::Null);
    assert_eq!(read(&host), "old");
}

#[test]
fn a_rollback_that_cannot_be_written_down_has_taken_place_all_the_same() {
    if skipped_without_root() {
        return;
    }
    for step in ["checkpoints.moved", "checkpoints.moved:kill"] {
        println!("{step}");
        let mut host = prepared(step);
        let rolled = host.cli(["rollback", "box", "c1", "--fs-only"]);
        if step.ends_with(":kill") {
            host.wait_daemon();
        } else {
            rolled.ok();
            assert_eq!(read(&host), "old", "{step}");
            host.cli(["gc"]).ok();
        }
        let host = host.restart_without_faults();
        assert_eq!((head(&host), read(&host)), (Value::from("c1"), "old".to_owned()), "{step}");
        write(&host, "other");
        let other = host.checkpoint("box");
        assert_eq!(node(&host, &other)["parent"], "c1", "{step}");
        host.cli(["gc"]).ok();
        assert_eq!(n_layers(&host), 3, "{step}");
    }
}

#[test]
fn a_sandbox_that_dies_with_its_engine_keeps_its_checkpoints_and_nothing_else() {
    if skipped_without_root() {
        return;
    }
    for (command, steps) in [
        (
            ["checkpoint", "box", "--fs-only"].as_slice(),
            ["checkpoints.arm:kill", "switch.seal:kill", "tree.write:kill"],
        ),
        (
            &["rollback", "box", "c1", "--fs-only"],
            ["checkpoints.arm:kill", "switch.pivot:kill", "checkpoints.moved:kill"],
        ),
    ] {
        for step in steps {
            println!("{command:?} {step}");
            let mut host = prepared(step);
            end_after(&mut host, command);
            let host = host.restart_without_faults();
            assert_eq!(host.inspect("box")["state"], "dead", "{step}");
            assert_eq!(head(&host), "c1", "{step}");
            let disk = host.cli(["inspect", "box", "--json"]).json()["disk"].clone();
            assert!(disk["own_bytes"].is_u64(), "{step}: {disk}");
            // What was written lies in the live layer, or right below it.
            let live = host.inspect("box")["live_layer"].as_str().expect("a path").to_owned();
            assert!(fs::exists(&live).expect("look"), "{step}: {live}");
            let code = host.cli(["checkpoint", "box", "--fs-only", "--json"]).error()["code"].clone();
            assert_eq!(code, "dead", "{step}");
            host.cli(["gc"]).ok();
            assert!(n_layers(&host) <= 3, "{step}");
            host.cli(["rm", "box"]).ok();
            assert_eq!(n_layers(&host), 0, "{step}");
        }
    }
}

/// The engine dies in the middle of `command`, then the sandbox.
fn end_after(host: &mut Host, command: &[&str]) {
    let init = host.init("box");
    assert!(!host.cli(command).status.success());
    host.wait_daemon();
    kill(init, Signal::SIGKILL).expect("kill init");
}

#[test]
fn a_move_that_an_engine_cannot_finish_is_finished_by_a_later_one() {
    if skipped_without_root() {
        return;
    }
    for command in [["checkpoint", "box"].as_slice(), &["rollback", "box", "c1"]] {
        println!("{command:?}");
        let mut host = prepared("rebase.give:kill");
        assert!(!host.cli(command.iter().chain(&["--fs-only"])).status.success());
        host.wait_daemon();
        let host = host.restart_with(&[("DELTABOX_FAULT", "rebase.give")]);
        let n_before = n_layers(&host);
        for again in [["checkpoint", "box"].as_slice(), &["rollback", "box", "c1"]] {
            let error = host.cli(again.iter().chain(&["--fs-only", "--json"])).error();
            assert_eq!(error["code"], "torn", "{error}");
        }
        // Both layers are in use.
        host.cli(["gc"]).ok();
        assert_eq!(n_layers(&host), n_before);
        let host = host.restart_without_faults();
        host.rollback("box", "c1");
        assert_eq!(read(&host), "old");
        write(&host, "other");
        let other = host.checkpoint("box");
        assert_eq!(node(&host, &other)["parent"], "c1");
    }
}

/// A sandbox whose checkpoint `c1` has 479 layers, made by hand: empty ones upon the first.
fn with_479_layers(merge_above: &str) -> Host {
    let mut host = Host::start();
    host.cli(["create", "box", "--merge-above", merge_above]).ok();
    write(&host, "old");
    host.checkpoint("box");
    host.end_daemon(Signal::SIGTERM);
    let layers = host.store().join("layers");
    let json = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).expect("read")).expect("JSON") };
    let record = json(&layers.join("1/layer.json"));
    for id in 3..=480 {
        let dir = layers.join(id.to_string());
        fs::create_dir_all(dir.join("work")).expect("make a layer");
        fs::create_dir(dir.join("upper")).expect("make a layer");
        let mut record = record.clone();
        (record["id"], record["parent"]) = (Value::from(id), Value::from(if id == 3 { 1 } else { id - 1 }));
        record["depth"] = Value::from(id - 2);
        fs::write(dir.join("layer.json"), record.to_string()).expect("write a record");
    }
    let file = host.store().join("sandboxes/box/checkpoints/c1.json");
    let mut first = json(&file);
    first["top"] = Value::from(480);
    fs::write(&file, first.to_string()).expect("write a checkpoint");
    host.start_daemon();
    assert_eq!(node(&host, "c1")["n_layers"], 479);
    host.rollback("box", "c1");
    assert_eq!(read(&host), "old");
    host
}

#[test]
fn a_stack_takes_480_layers_and_no_more() {
    if skipped_without_root() {
        return;
    }
    let host = with_479_layers("480");
    // Nothing to freeze, so there is room for it.
    host.checkpoint("box");
    write(&host, "new");
    let refused = host.cli(["checkpoint", "box", "--fs-only", "--json"]);
    assert_eq!(refused.code(), 3, "{refused:?}");
    assert!(refused.error()["hint"].as_str().expect("a hint").contains("roll back"));
    assert_eq!(read(&host), "new");
    host.rollback("box", "c1");
    assert_eq!(read(&host), "old");
}

#[test]
fn a_checkpoint_without_room_waits_for_a_merge() {
    if skipped_without_root() {
        return;
    }
    let host = with_479_layers("32");
    for n in 0..3 {
        write(&host, &n.to_string());
        host.checkpoint("box");
    }
    assert_eq!(read(&host), "2");
    host.rollback("box", "c1");
    assert_eq!(read(&host), "old");
}

#[test]
fn a_damaged_layer_costs_the_checkpoints_that_stand_on_it_and_tree_says_which() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    for text in ["one", "two", "three"] {
        write(&host, text);
        host.checkpoint("box");
    }
    host.rollback("box", "c1");
    let record = host.store().join("layers/2/layer.json");
    let whole = fs::read(&record).expect("read a record");
    fs::write(&record, &whole[..whole.len() / 2]).expect("damage a record");
    let is_damaged = |id: &str| node(&host, id)["damage"].is_string();
    assert_eq!([is_damaged("c1"), is_damaged("c2"), is_damaged("c3")], [false, true, true]);
    assert!(host.cli(["tree", "box"]).ok().contains("layer 2"));
    host.cli(["inspect", "box"]).ok();
    host.cli(["gc"]).ok();
    assert_eq!(host.cli(["rollback", "box", "c3", "--fs-only", "--json"]).error()["code"], "damaged_layer");
    host.rollback("box", "c1");
    assert_eq!(read(&host), "one");
    fs::write(&record, whole).expect("mend it");
    host.rollback("box", "c3");
    assert_eq!(read(&host), "three");
}

#[test]
fn a_disk_that_fails_is_an_error_that_says_so_and_the_programs_run_on() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make("ext4");
    let host = Host::start_in(disk.dir(), &[]);
    host.create("box");
    write(&host, "old");
    let first = host.checkpoint("box");
    write(&host, "new");
    // Read-only from here on, as after an error of the disk.
    output(std::process::Command::new("mount").args(["-o", "remount,abort"]).arg(disk.path())).ok();
    for command in [["checkpoint", "box"].as_slice(), &["checkpoint", "box", "--durable"], &["rollback", "box", &first]]
    {
        let error = host.cli(command.iter().chain(&["--fs-only", "--json"])).error();
        assert!(error["message"].as_str().expect("a message").contains("Read-only"), "{error}");
    }
    assert_eq!(read(&host), "new");
    assert_eq!(head(&host), first.as_str());
    assert_eq!(node(&host, &first)["damage"], Value::Null);
    end_init(&host);
}

#[test]
fn nested_deeper_than_any_path_is_no_obstacle() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let dig = "import os\nos.chdir('/srv')\nfor i in range(5000): os.mkdir('d'); os.chdir('d')\nopen('deep', 'w').write('x' * 300000)";
    host.cli(["exec", "box", "--", "python3", "-c", dig]).ok();
    let live = host.cli(["inspect", "box", "--json"]).json()["disk"]["live_bytes"].as_u64().expect("bytes");
    assert!(live >= 300_000, "{live}");
    host.cli(["checkpoint", "box", "--fs-only", "--durable"]).ok();
    assert!(node(&host, "c1")["own_bytes"].as_u64().is_some());
}

#[test]
fn stats_tell_where_the_time_of_checkpoints_and_rollbacks_went() {
    if skipped_without_root() {
        return;
    }
    let host = prepared("");
    let id = host.cli(["checkpoint", "box", "--fs-only", "--durable"]).ok();
    host.rollback("box", &id);
    let table = host.cli(["stats", "box"]).ok();
    for (operation, phase) in [("checkpoint", "pivot"), ("checkpoint", "sync"), ("rollback", "rebase")] {
        let rows = table.lines().skip_while(|line| !line.starts_with(operation)).skip(1);
        let mut rows = rows.take_while(|line| line.starts_with(' '));
        assert!(rows.any(|line| line.trim_start().starts_with(phase)), "{operation} {phase}: {table}");
    }
}
