//! What a big process writes is watched: whatever way it changes its memory, it has it back, and little is copied for it.

use deltabox_tests::count;
use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root};
use serde_json::{Value, json};

use crate::{checkpoint, roll_back};

fn start() -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask(include_str!("programs/watched.py"));
    Some((host, worker))
}

/// Whether each mapping of the region is watched.
fn is_watched(worker: &mut Worker) -> bool {
    worker.ask("all('uw' in flags for flags, _ in mappings())") == json!(true)
}

#[test]
fn every_way_to_change_memory_is_undone() {
    let Some((host, mut worker)) = start() else { return };
    let first = (checkpoint(&host), worker.ask("digest()"));
    assert!(is_watched(&mut worker), "big mappings are watched after a checkpoint");
    let n_ways = worker.ask("len(ways)").as_u64().expect("a count");
    for way in 0..n_ways {
        let name = worker.ask(&format!("ways[{way}].__name__"));
        let before = (checkpoint(&host), worker.ask("digest()"));
        // The second time they come from what the first rollback left, and to where more has changed since.
        for to in [&before, &before, &first, &before] {
            worker.ask(&format!("ways[{way}](); ways[{way}](); reset()"));
            roll_back(&host, &to.0);
            assert_eq!(worker.ask("digest()"), to.1, "{name}, back to {}", to.0);
        }
        worker.ask(&format!("reset(); ways[{way}](); reset()"));
        host.cli(["rm", &format!("box@{}", before.0)]).ok();
    }
    roll_back(&host, &first.0);
    assert_eq!(worker.ask("digest()"), first.1);
    assert!(is_watched(&mut worker), "whatever was done to them, in between");
    assert!(worker.end().success());
}

#[test]
fn any_node_of_a_tree_is_reached_from_any_other() {
    let Some((host, mut worker)) = start() else { return };
    let mut random = 11_u64;
    let mut dice = move |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        usize::try_from(random >> 33).expect("31 bits") % below
    };
    let n_ways = worker.ask("len(ways)").as_u64().and_then(|n| usize::try_from(n).ok()).expect("a count");
    let mut nodes: Vec<(String, Value)> = vec![(checkpoint(&host), worker.ask("digest()"))];
    for step in 0..count(60, 3000) {
        for _ in 0..1 + dice(3) {
            worker.ask(&format!("reset(); ways[{}]()", dice(n_ways)));
        }
        match dice(4) {
            0 if nodes.len() > 1 => {
                let node = nodes.swap_remove(dice(nodes.len()));
                host.cli(["rm", &format!("box@{}", node.0)]).ok();
            }
            1 | 2 => nodes.push((checkpoint(&host), worker.ask("digest()"))),
            _ => {}
        }
        if dice(2) == 0 {
            let node = &nodes[dice(nodes.len())];
            roll_back(&host, &node.0);
            assert_eq!(worker.ask("digest()"), node.1, "step {step}: {}", node.0);
        }
        if nodes.len() > 8 {
            let node = nodes.swap_remove(dice(nodes.len()));
            host.cli(["rm", &format!("box@{}", node.0)]).ok();
        }
    }
    assert!(worker.end().success());
}

/// The kernel joins no new mapping to a watched one: without care all of it would be mapped anew, and copied.
#[test]
fn a_mapping_that_fell_to_pieces_is_whole_again_and_little_was_copied() {
    let Some((host, mut worker)) = start() else { return };
    let id = checkpoint(&host);
    let digest = worker.ask("digest()");
    let n_mappings = worker.ask("len(mappings())");
    for _ in 0..3 {
        worker.ask("unmapped_first(); unmapped_first(); mapped_anew()");
        assert_ne!(worker.ask("len(mappings())"), n_mappings);
        roll_back(&host, &id);
        assert_eq!(worker.ask("digest()"), digest);
        assert_eq!(worker.ask("len(mappings())"), n_mappings);
        assert!(is_watched(&mut worker));
        let private = worker.ask("sum(kilobytes for _, kilobytes in mappings())").as_u64().expect("kilobytes");
        assert!(private < 4096, "{private} KiB of the region are not the template's");
    }
    assert!(worker.end().success());
}

#[test]
fn another_program_under_the_same_number_is_not_taken_for_the_one_that_was_watched() {
    let Some((host, mut worker)) = start() else { return };
    let id = checkpoint(&host);
    let digest = worker.ask("digest()");
    for _ in 0..2 {
        // The same addresses, if the kernel likes; other content in any case.
        worker.tell("import os, sys; os.execvp('/usr/bin/python3', ['python3', '-c', 'import time; b = bytearray(30 << 20); time.sleep(1000)'])");
        deltabox_tests::wait_within(30, "the other program", || {
            host.cli(["ps", "box"]).ok().contains("time.sleep(1000)")
        });
        roll_back(&host, &id);
        assert_eq!(worker.ask("digest()"), digest);
        let other = checkpoint(&host);
        worker.ask("stores()");
        roll_back(&host, &other);
        assert_eq!(worker.ask("digest()"), digest);
    }
    assert!(worker.end().success());
}

#[test]
fn an_engine_that_dies_leaves_nothing_of_it_and_begins_anew() {
    let Some((mut host, mut worker)) = start() else { return };
    let id = checkpoint(&host);
    let digest = worker.ask("digest()");
    worker.ask("stores()");
    host.end_daemon(nix::sys::signal::Signal::SIGKILL);
    host.start_daemon();
    assert!(!is_watched(&mut worker), "the kernel takes it back with the descriptor");
    worker.ask("stores(); mapped_anew()");
    roll_back(&host, &id);
    assert_eq!(worker.ask("digest()"), digest);
    checkpoint(&host);
    assert!(is_watched(&mut worker));
    for _ in 0..2 {
        worker.ask("stores(); dropped(); unmapped_first()");
        roll_back(&host, &id);
        assert_eq!(worker.ask("digest()"), digest);
    }
    assert!(worker.end().success());
}
