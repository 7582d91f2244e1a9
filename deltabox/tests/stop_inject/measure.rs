//! Numbers of docs/stop-and-inject.md.

use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;

use crate::target::Target;

/// Not a test: prints the numbers of docs/stop-and-inject.md. Run with `--release --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn measure() {
    fn show(what: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_nanos() / 100;
        let us = |tenths: u128| format!("{}.{}", tenths / 10, tenths % 10);
        println!("{what:40} p50 {:>8} us  p99 {:>8} us  n {}", us(at(50)), us(at(99)), times.len());
    }
    for (mode, n_threads) in [("read", 2), ("idle4", 4), ("idle32", 32)] {
        let target = Target::start("waits", mode);
        let (mut whole, mut inside) = (Vec::new(), Vec::new());
        for _ in 0..1000 {
            let begin = Instant::now();
            let stopped = target.group.stopped(|stopped| {
                assert_eq!(stopped.n_threads(), n_threads);
                Instant::now()
            });
            inside.push(stopped - begin);
            whole.push(begin.elapsed());
        }
        show(&format!("thread start + stop, {n_threads} threads"), inside);
        show("the same + resume + thread end", whole);
    }
    let target = Target::start("waits", "read");
    let pid = target.pid();
    let (mut open, mut one, mut many) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..1000 {
        target.group.stopped(|stopped| {
            let begin = Instant::now();
            let mut hand = stopped.hand(pid).expect("a hand");
            open.push(begin.elapsed());
            let call = Call { nr: libc::SYS_getpid, args: [0; 6] };
            let begin = Instant::now();
            hand.run(&[call]).expect("a call");
            one.push(begin.elapsed());
            let begin = Instant::now();
            hand.run(&[call; 64]).expect("calls");
            many.push(begin.elapsed());
        });
    }
    show("hand", open);
    show("one call", one);
    show("64 calls", many);
}
