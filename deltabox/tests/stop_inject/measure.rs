//! Numbers of docs/stop-and-inject.md.

use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::{Stopped, Tracer};

use crate::target::Target;

const PATIENCE: Duration = Duration::from_secs(30);

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
    // Each program sleeps or not by its own kind of call; "count" has one thread.
    for (mode, n_threads) in [("count", 1), ("read", 2), ("idle4", 4), ("idle32", 32)] {
        let target = Target::start("waits", mode);
        let mut tracer = Tracer::new();
        let (mut whole, mut inside) = (Vec::new(), Vec::new());
        for _ in 0..1000 {
            let begin = Instant::now();
            let work = |stopped: &mut Stopped| {
                assert_eq!(stopped.n_threads(), n_threads);
                Instant::now()
            };
            let stopped = tracer.while_stopped(target.group.request(PATIENCE), work).expect("stop");
            inside.push(stopped - begin);
            whole.push(begin.elapsed());
        }
        show(&format!("to the stop of {n_threads} threads"), inside);
        show("the same + resume, back at the caller", whole);
    }
    let mut first = Vec::new();
    for _ in 0..200 {
        let target = Target::start("waits", "count");
        target.group.stopped(|stopped| {
            let begin = Instant::now();
            stopped.hand(target.pid()).expect("a hand").close().expect("close");
            first.push(begin.elapsed());
        });
    }
    show("first hand in a process, closed again", first);
    let target = Target::start("waits", "read");
    let pid = target.pid();
    let mut tracer = Tracer::new();
    let mut times: [Vec<Duration>; 5] = Default::default();
    for _ in 0..1000 {
        let work = |stopped: &mut Stopped| {
            let mut begin = Instant::now();
            let mut lap = |at: usize| {
                times[at].push(begin.elapsed());
                begin = Instant::now();
            };
            let mut hand = stopped.hand(pid).expect("a hand");
            lap(0);
            let call = Call { nr: libc::SYS_getpid, args: [0; 6] };
            hand.run(&[call]).expect("a call");
            lap(1);
            for _ in 0..4 {
                hand.run(&[call]).expect("a call");
            }
            lap(2);
            hand.run(&[call; 64]).expect("calls");
            lap(3);
            hand.close().expect("close");
            lap(4);
        };
        tracer.while_stopped(target.group.request(PATIENCE), work).expect("stop");
    }
    for (what, times) in ["hand", "first call", "4 more calls", "a batch of 64", "close"].into_iter().zip(times) {
        show(what, times);
    }
}
