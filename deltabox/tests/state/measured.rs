//! Numbers of docs/process-state.md: what it costs while all stand still.

#![expect(clippy::print_stdout, reason = "a measurement is printed")]

use std::time::{Duration, Instant};

use deltabox::deltacr::state::{Person, Signals};
use deltabox::deltacr::stop::{Stopped, Tracer};

use crate::target::Target;
use crate::tell;

const N: usize = 300;

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_micros();
    println!("{what:48} p50 {:>6} us  p99 {:>6} us  n {}", at(50), at(99), times.len());
}

/// `work` in one stop after the other, by one tracer.
fn measure_one<R: Send>(target: &mut Target, what: &str, change: bool, work: impl Fn(&mut Stopped) -> R + Send + Sync) {
    let (mut tracer, mut times) = (Tracer::new(), Vec::with_capacity(N));
    for _ in 0..N {
        if change {
            assert_eq!(tell(target, b'm'), "ok");
        }
        let timed = tracer.while_stopped(target.group.request(Duration::from_secs(30)), |stopped| {
            let begin = Instant::now();
            work(stopped);
            begin.elapsed()
        });
        times.push(timed.expect("stop"));
    }
    show(what, times);
}

fn measure_all(kinds: &str) {
    let mut target = Target::start("person", kinds);
    let pid = target.pid();
    let person = target.group.stopped(|stopped| Person::read(stopped, pid).expect("read"));
    println!("{kinds}");
    let close = |stopped: &mut Stopped| stopped.hand(pid).expect("a hand").close().expect("close");
    measure_one(&mut target, "  a hand, closed again", false, close);
    measure_one(&mut target, "  signals read", false, |stopped| Signals::read(stopped, pid).expect("read"));
    measure_one(&mut target, "  all read", false, |stopped| Person::read(stopped, pid).expect("read"));
    measure_one(&mut target, "  all read, judged, nothing to put back", false, |stopped| {
        person.put_back(stopped, pid).expect("put back");
    });
    measure_one(&mut target, "  known to be as it was, not put back", false, |stopped| {
        person.put_back_from(&person, stopped, pid).expect("put back");
        person.signals.put_back_from(&person.signals, stopped, pid).expect("put back");
    });
    measure_one(&mut target, "  all read, judged, put back, looked at again", true, |stopped| {
        person.put_back(stopped, pid).expect("put back");
    });
}

/// Not a test: prints the numbers of docs/process-state.md. Run with `--ignored --nocapture --test-threads 1`.
#[test]
#[ignore = "a measurement"]
fn measure() {
    // 1 thread, 3, and 23.
    measure_all("single,habits,limits,schedule,traits");
    measure_all("habits,limits,schedule,traits,caps");
    measure_all("many,habits,limits,schedule,traits,caps");
}
