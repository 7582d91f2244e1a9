//! Programs in every kind of wait are stopped, used for injected calls and let go, and must not notice.
//!
//! The programs (`tests/programs/*.c`) judge themselves and say "ok". Each runs in a cgroup of its own.
//! `DELTABOX_SOAK` multiplies the rounds by ten.

mod killed;
mod measure;
mod target;
mod timeouts;
mod trouble;

use std::process::Command;

use deltabox::deltacr::inject::Call;

use target::{Target, n_rounds, program};

fn goes_through(name: &str, mode: &str) {
    let mut target = Target::start(name, mode);
    // A sleep may be over before all rounds are.
    let goes_on = (0..n_rounds()).all(|_| target.disturb());
    if goes_on {
        target.byte();
    }
    assert_eq!(target.finish(), "ok", "{name} {mode}");
}

macro_rules! waits {
    ($($test:ident $mode:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            goes_through("waits", $mode);
        })+
    };
}

waits! {
    a_read_goes_on "read",
    a_recv_goes_on "recv",
    a_recv_with_a_timeout_goes_on "recv-timeout",
    a_poll_goes_on "poll",
    a_select_goes_on "select",
    an_epoll_wait_goes_on "epoll",
    a_wait_for_a_condition_goes_on "cond",
    a_wait_for_a_mutex_goes_on "mutex",
    a_sem_timedwait_goes_on "sem",
    a_semop_goes_on "semop",
    a_pause_goes_on "pause",
    a_sigsuspend_goes_on "sigsuspend",
    a_sigwaitinfo_goes_on "sigwait",
    an_accept_goes_on "accept",
    a_wait_for_a_child_goes_on "wait4",
    a_timed_read_of_a_raw_terminal_goes_on "tty-raw",
    a_read_of_an_eventfd_goes_on "eventfd",
    a_wait_for_a_message_goes_on "msgrcv",
    a_wait_for_a_flock_goes_on "flock",
    a_wait_for_a_record_lock_goes_on "fcntl",
    an_open_of_a_fifo_goes_on "fifo",
    a_write_to_a_full_pipe_goes_on "full",
    a_nanosleep_is_neither_short_nor_interrupted "nanosleep",
    an_absolute_sleep_is_neither_short_nor_interrupted "clock",
    thirty_two_threads_are_stopped_and_woken "idle32",
    threads_that_come_and_go_are_all_stopped "threads",
    processes_that_come_and_go_are_all_stopped "forks",
    a_filtered_process_is_used_and_filtered_again "filtered",
    a_process_without_its_leader_is_used "late-leader",
}

#[test]
fn registers_of_running_code_do_not_change() {
    goes_through("spins", "");
}

#[test]
fn restartable_sequences_lose_no_increment() {
    goes_through("counts", "");
}

#[test]
fn a_filter_holds_again_after_an_injected_call_passed_it() {
    let mut target = Target::start("waits", "filtered");
    let pid = target.pid();
    let result = target.group.stopped(|stopped| {
        let mut hand = stopped.hand(pid).expect("a hand");
        let anonymous = u64::try_from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).expect("flags");
        let at = hand.call(libc::SYS_mmap, [0, 4096, 0, anonymous, u64::MAX, 0]).expect("mmap");
        hand.call(libc::SYS_munmap, [at.cast_unsigned(), 4096, 0, 0, 0, 0]).expect("munmap")
    });
    assert_eq!(result, 0);
    target.byte();
    assert_eq!(target.finish(), "ok");
}

#[test]
fn strings_pass_through_the_scratch_room_and_errors_come_back() {
    let target = Target::start("waits", "read");
    let pid = target.pid();
    target.group.stopped(|stopped| {
        let mut hand = stopped.hand(pid).expect("a hand");
        let scratch = hand.scratch().start;
        hand.write(scratch, b"/no/such/file\0").expect("write");
        assert_eq!(hand.call(libc::SYS_access, [scratch, 0, 0, 0, 0, 0]).expect("access"), -2);
        // More than one batch.
        let calls = vec![Call { nr: libc::SYS_getpid, args: [0; 6] }; 300];
        assert_eq!(hand.run(&calls).expect("calls"), vec![i64::from(pid); 300]);
        let mut bytes = [0; 5];
        hand.read(scratch, &mut bytes).expect("read");
        assert_eq!(&bytes, b"/no/s");
    });
}

#[test]
fn no_signal_is_lost_or_doubled() {
    let mut target = Target::start("waits", "count");
    let n = 100 * n_rounds();
    let mut sender = Command::new(program("sends"))
        .args([target.pid().to_string(), n.to_string()])
        .spawn()
        .expect("start the sender");
    let mut n_stops = 0;
    while sender.try_wait().expect("the sender's state").is_none() || n_stops < n_rounds() {
        assert!(target.disturb(), "the program ended");
        n_stops += 1;
    }
    assert!(sender.wait().expect("reap").success(), "the sender failed");
    target.byte();
    assert_eq!(target.finish(), n.to_string(), "after {n_stops} stops");
}

#[test]
fn a_hand_needs_a_stopped_process() {
    let target = Target::start("waits", "read");
    let error = target.group.stopped(|stopped| stopped.hand(1).map(drop).expect_err("not ours"));
    assert!(error.to_string().contains("process 1 is not among"), "{error}");
}
