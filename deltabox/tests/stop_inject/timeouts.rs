//! Calls whose timeout every stop makes begin anew end all the same, not early, and are not mistaken for each other.

use std::time::{Duration, Instant};

use deltabox::deltacr::stop::{Tracer, while_stopped};

use crate::target::{Target, n_rounds};

/// Far more often than the 300 ms that the programs wait.
const PERIOD: Duration = Duration::from_millis(20);

fn ends(mode: &str) {
    let target = Target::start("timeouts", mode);
    let mut tracer = Tracer::new();
    let mut n_stops = 0;
    let end = Instant::now() + Duration::from_secs(60);
    while !target.speaks_within(PERIOD) {
        assert!(Instant::now() < end, "{mode} does not end");
        // With injected calls and without.
        if n_stops % 2 == 0 {
            target.disturb_by(&mut tracer);
        } else {
            tracer.while_stopped(target.group.request(Duration::from_secs(30)), |_| ()).expect("stop");
        }
        n_stops += 1;
    }
    assert!(n_stops > 3, "{n_stops} stops");
    assert_eq!(target.finish(), "ok", "{mode} after {n_stops} stops");
}

macro_rules! timeouts {
    ($($test:ident $mode:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            ends($mode);
        })+
    };
}

timeouts! {
    an_epoll_wait_ends_in_time "epoll",
    an_epoll_pwait2_ends_in_time "epoll_pwait2",
    a_select_that_cannot_write_its_timeout_back_ends_in_time "pselect",
    a_poll_that_cannot_write_its_timeout_back_ends_in_time "ppoll",
    a_sigtimedwait_ends_in_time "sigtimedwait",
    a_semtimedop_ends_in_time "semtimedop",
    a_recv_ends_in_time "recv",
    a_read_of_a_socket_ends_in_time "read",
    a_send_ends_in_time "send",
    an_accept_ends_in_time "accept",
    a_connect_ends_in_time "connect",
}

#[test]
fn calls_of_a_loop_are_not_mistaken_for_one_that_waits_long() {
    let mut target = Target::start("timeouts", "loop");
    let mut tracer = Tracer::new();
    for _ in 0..n_rounds() {
        assert!(!target.speaks_within(Duration::from_millis(7)), "{}", target.line());
        assert!(target.disturb_by(&mut tracer), "the program ended");
    }
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn stops_without_memory_begin_a_timeout_anew() {
    let target = Target::start("timeouts", "epoll");
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(700) {
        assert!(!target.speaks_within(PERIOD), "it ended, or saw the stop");
        while_stopped(target.group.request(Duration::from_secs(30)), |_| ()).expect("stop");
    }
    assert_eq!(target.finish(), "ok");
}
