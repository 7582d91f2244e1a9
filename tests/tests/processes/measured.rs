//! Numbers of docs/templates.md and docs/isolation.md.

use deltabox_tests::bench::Samples;
use deltabox_tests::{Host, skipped_without_root};

const CALLS: &str = include_str!("programs/calls.c");

/// Not a test: prints what the filter costs. Run with `--ignored --nocapture --test-threads 1`.
#[test]
#[ignore = "prints numbers"]
fn measure_the_filter() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    std::fs::write(host.inside("box", "/srv/calls.c"), CALLS).expect("write a program");
    host.sh("box", "cc -O2 -o /srv/calls /srv/calls.c").ok();
    for n in [0, 50] {
        host.sh("box", &format!("for i in $(seq {n}); do setsid sleep 1000 >/dev/null 2>&1 & done")).ok();
        println!("{n} other processes\n{}", host.cli(["exec", "box", "--", "/srv/calls"]).ok());
    }
}

/// Not a test: prints what a checkpoint of small processes costs. Run with `--ignored --nocapture --test-threads 1`.
#[test]
#[ignore = "prints numbers"]
fn measure_small_checkpoints() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    for (name, user, n) in [("one", "0", 1), ("eight", "0", 8), ("user", "1000", 1)] {
        host.create(name);
        for _ in 0..n {
            host.cli(["exec", "-d", "-u", user, name, "--", "sleep", "1000"]).ok();
        }
        let (mut take, mut stopped) = (Samples::default(), Samples::default());
        for _ in 0..100 {
            let made = host.cli(["--json", "checkpoint", name]).json();
            let us = |value: &serde_json::Value| std::time::Duration::from_micros(value.as_u64().expect("a time"));
            take.record(us(&made["phases_us"]["take"]));
            stopped.record(us(&made["stopped_us"]));
            let id = made["id"].as_str().expect("an id");
            host.cli(["rm", &format!("{name}@{id}")]).ok();
        }
        let show = |samples: &Samples| [0.0, 0.5, 0.99].map(|part| samples.quantile_us(part).round());
        println!("{name}: take {:?} us, stopped {:?} us (best, p50, p99; n = 100)", show(&take), show(&stopped));
    }
}
