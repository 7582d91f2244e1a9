//! The root that is made ahead for the next rollback: used, of no use, left by an engine that died.

use std::fs;

use deltabox_tests::{Host, skipped_without_root, wait_within};
use nix::sys::signal::Signal;

/// Numbers of roots that wait.
fn spares(host: &Host) -> Vec<String> {
    let entries = fs::read_dir(host.store().join("spares")).expect("list the roots");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

fn wait_for_spare(host: &Host) -> String {
    wait_within(30, "a root is made ahead", || !spares(host).is_empty());
    spares(host)[0].clone()
}

fn live(host: &Host) -> String {
    let path = host.inspect("box")["live_layer"].as_str().expect("a path").to_owned();
    path.rsplit('/').next().expect("a name").to_owned()
}

fn n_layers(host: &Host) -> usize {
    fs::read_dir(host.store().join("layers")).expect("list layers").count()
}

fn write(host: &Host, text: &str) {
    host.sh("box", &format!("echo {text} > /srv/n; mkdir -p /srv/{text}")).ok();
}

fn listing(host: &Host) -> String {
    host.sh("box", "cat /srv/n; cd /srv; echo *").ok()
}

#[test]
fn a_second_rollback_finds_its_root_made_and_it_is_as_the_first_one_found_it() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    write(&host, "old");
    host.sh("box", "chmod 711 /; touch -d @1000000000 /").ok();
    let first = host.checkpoint("box");
    let before = listing(&host);
    assert_eq!(spares(&host).len(), 0, "nobody has rolled back");
    write(&host, "new");
    host.rollback("box", &first);
    assert_eq!(listing(&host), before);
    for round in 0..5 {
        let made = wait_for_spare(&host);
        write(&host, "newer");
        // It may be in the making still: then the rollback makes its own.
        std::thread::sleep(std::time::Duration::from_millis(200));
        host.rollback("box", &first);
        assert_eq!(live(&host), made, "round {round}");
        assert_eq!(listing(&host), before, "round {round}");
        assert_eq!(host.sh("box", "stat -c '%a %Y' /").ok(), "711 1000000000", "round {round}");
    }
    // Of another stack than the one that it was made for.
    wait_for_spare(&host);
    write(&host, "second");
    let second = host.checkpoint("box");
    write(&host, "third");
    host.rollback("box", &first);
    assert_eq!(listing(&host), before);
    host.rollback("box", &second);
    assert_ne!(listing(&host), before);
    host.cli(["rm", "box"]).ok();
    wait_within(30, "nothing is left of it", || n_layers(&host) == 0 && spares(&host).is_empty());
}

#[test]
fn checkpoints_alone_make_none_and_removals_take_it_away() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    write(&host, "old");
    let first = host.checkpoint("box");
    host.rollback("box", &first);
    wait_for_spare(&host);
    for n in 0..6 {
        write(&host, &format!("n{n}"));
        host.checkpoint("box");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    wait_within(30, "it is given up", || spares(&host).is_empty());
    host.rollback("box", &first);
    wait_for_spare(&host);
    host.cli(["rm", &format!("box@{first}")]).ok();
    wait_within(30, "it goes with its checkpoint", || spares(&host).is_empty());
}

#[test]
fn an_engine_that_dies_with_a_root_made_ahead_or_while_it_takes_it_leaves_nothing_of_it() {
    if skipped_without_root() {
        return;
    }
    for fault in ["", "layers.spare:kill", "switch.pivot:kill"] {
        let host = Host::start();
        host.create("box");
        write(&host, "old");
        let first = host.checkpoint("box");
        let mut host = host.restart_with(&[("DELTABOX_FAULT", fault)]);
        // It may die in it.
        let _ = host.cli(["rollback", "box", &first, "--fs-only"]);
        if fault == "switch.pivot:kill" {
            // At the first one already.
            host.wait_daemon();
        } else {
            wait_for_spare(&host);
            std::thread::sleep(std::time::Duration::from_millis(200));
            write(&host, "new");
            let _ = host.cli(["rollback", "box", &first, "--fs-only"]);
            if fault.is_empty() {
                // On a root that was made ahead, and another one is or comes to be there.
                host.end_daemon(Signal::SIGKILL);
            } else {
                host.wait_daemon();
            }
        }
        let host = host.restart_without_faults();
        assert_eq!(spares(&host).len(), 0, "{fault}");
        host.rollback("box", &first);
        assert_eq!(listing(&host), "old\nn old", "{fault}");
        host.cli(["gc"]).ok();
        wait_within(30, &format!("{fault}: no layer is left over"), || n_layers(&host) == 2);
    }
}

#[test]
fn sandboxes_are_removed_while_a_root_is_made_for_them() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    for _ in 0..20 {
        host.create("box");
        let first = host.checkpoint("box");
        host.rollback("box", &first);
        host.rollback("box", &first);
        host.cli(["rm", "box"]).ok();
    }
    wait_within(30, "nothing is left of them", || n_layers(&host) == 0 && spares(&host).is_empty());
}

#[test]
fn a_failure_with_a_root_made_ahead_changes_nothing() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    write(&host, "old");
    let first = host.checkpoint("box");
    let host = host.restart_with(&[("DELTABOX_FAULT", "layers.spare:once")]);
    host.rollback("box", &first);
    wait_for_spare(&host);
    std::thread::sleep(std::time::Duration::from_millis(200));
    write(&host, "new");
    let failed = host.cli(["rollback", "box", &first, "--fs-only"]);
    assert!(!failed.status.success(), "{failed:?}");
    assert_eq!(listing(&host), "new\nn new old");
    host.rollback("box", &first);
    assert_eq!(listing(&host), "old\nn old");
}
