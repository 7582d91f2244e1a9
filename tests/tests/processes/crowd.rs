//! Many sandboxes at once, each with a program of its own, and too few CPUs for all.

use std::time::Duration;

use deltabox_tests::leftovers::Leftovers;
use deltabox_tests::{Host, count, skipped_without_root};

use crate::real::{Load, Story};

#[test]
fn eight_sandboxes_at_once_with_too_few_cpus() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let load = Load::start(cpus);
    let program = |k: usize| {
        let [ring, database, held] = [
            include_str!("programs/real/threaded.py"),
            include_str!("programs/real/database.py"),
            include_str!("programs/real/descriptors.py"),
        ];
        let mut story = Story::python([ring, database, held][k % 3]);
        match k % 3 {
            0 => story.voices = (0..5).map(|voice| voice.to_string()).collect(),
            1 => story.words.push("wal".to_owned()),
            _ => {}
        }
        story.rounds = count(6, 300);
        story.gap = Duration::from_millis(20);
        story
    };
    std::thread::scope(|scope| {
        let run = |k: usize| {
            let host = &host;
            scope.spawn(move || program(k).run_on(host, &format!("box{k}"), k as u64 + 1))
        };
        let threads: Vec<_> = (0..8).map(run).collect();
        for (k, thread) in threads.into_iter().enumerate() {
            assert!(thread.join().is_ok(), "sandbox {k}");
        }
    });
    drop(load);
    let left = Leftovers::of(&host.store());
    assert_eq!((left.processes.len(), left.mounts.len()), (0, 0), "{left:?}");
}
