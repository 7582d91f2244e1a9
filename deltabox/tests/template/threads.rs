//! Threads that have started or ended since: the set of them comes back, with numbers, names and what each had.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use deltabox::deltacr::stop::{Request as Stop, while_stopped};
use deltabox::deltacr::template::{
    Freezer, Memory, Past, Report, Source, Template, TemplateError, TemplateRefusal, Threads, restore_in_place,
};

use crate::{PATIENCE, Subject};

/// Rolled back after each of `changes`, which are letters for the program, and asked each time.
fn comes_back(n: &str, changes: &[&str]) -> Vec<Report> {
    let mut subject = Subject::run_inside("crew", n, &[]);
    let point = subject.checkpoint();
    let mut reports = Vec::new();
    for letters in changes {
        letters.bytes().for_each(|letter| subject.tell(letter));
        reports.push(subject.roll_back_and(&point, |_, _| {}).expect("a rollback"));
        subject.tell(b'c');
    }
    subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    subject.tell(b'j');
    subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    subject.tell(b'c');
    point.template.remove(PATIENCE).expect("remove a template");
    reports
}

#[test]
fn threads_that_were_started_since_end() {
    let reports = comes_back("4", &["m", "mt", "mm", ""]);
    let ended: Vec<_> = reports.iter().map(|report| (report.n_made_threads, report.n_ended_threads)).collect();
    assert_eq!(ended, [(0, 3), (0, 3), (0, 6), (0, 0)]);
}

#[test]
fn threads_that_have_ended_since_are_made_again() {
    let reports = comes_back("5", &["e", "te", "et", ""]);
    let made: Vec<_> = reports.iter().map(|report| (report.n_made_threads, report.n_ended_threads)).collect();
    assert_eq!(made, [(3, 0), (3, 0), (3, 0), (0, 0)]);
}

#[test]
fn threads_are_made_and_ended_at_once() {
    let reports = comes_back("6", &["em", "me", "emt", "jm", "n", "nenm"]);
    assert_eq!((reports[0].n_made_threads, reports[0].n_ended_threads), (3, 4));
    assert_eq!(reports[3].n_made_threads, 6);
    assert!(reports.iter().all(|report| report.n_threads == 7));
}

#[test]
fn sixty_four_threads_come_back() {
    let reports = comes_back("64", &["j", "em", "e"]);
    assert_eq!((reports[0].n_made_threads, reports[1].n_ended_threads), (64, 33));
}

/// What was refused, and that the program is as it was.
fn refusal(subject: &Subject, point: &crate::restored::Point) -> TemplateRefusal {
    let before = fs::read_dir(format!("/proc/{}/task", subject.0.pid())).expect("threads").count();
    let error = subject.roll_back_and(point, |_, _| {}).expect_err("a rollback");
    let after = fs::read_dir(format!("/proc/{}/task", subject.0.pid())).expect("threads").count();
    assert_eq!(before, after);
    let text = error.to_string();
    let refusal = if let TemplateError::Refused(refusal) = error { Some(refusal) } else { None };
    refusal.expect(&text)
}

#[test]
fn a_number_that_somebody_else_has_is_refused_and_the_program_goes_on() {
    let mut subject = Subject::run_inside("crew", "5", &[]);
    let point = subject.checkpoint();
    subject.tell(b'e');
    // The program's threads have 3 and on; the first of them has ended, or is about to.
    let end = Instant::now() + PATIENCE;
    while fs::read_dir(format!("/proc/{}/task", subject.0.pid())).expect("threads").count() > 3 {
        assert!(Instant::now() < end, "a thread does not end");
        std::thread::yield_now();
    }
    let taken = clone_inside(subject.keeper(), 3);
    assert_eq!(refusal(&subject, &point), TemplateRefusal::NumberTaken { number: 3 });
    subject.tell(b't');
    drop(taken);
    subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    subject.tell(b'c');
    point.template.remove(PATIENCE).expect("remove a template");
}

/// A process in the PID namespace of `init` with a number of choice, until it is dropped.
struct Inside(Child);

fn clone_inside(init: libc::pid_t, number: libc::pid_t) -> Inside {
    let last = number - 1;
    let script = format!("echo {last} >/proc/sys/kernel/ns_last_pid; sleep 60 & echo $!; read x; kill $!; wait");
    let mut child = Command::new("nsenter")
        .args(["-t", &init.to_string(), "-p", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nsenter");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("its output")).read_line(&mut line).expect("a number");
    assert_eq!(line.trim(), number.to_string());
    Inside(child)
}

impl Drop for Inside {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_program_of_another_user_may_not_choose_numbers_and_goes_on() {
    let mut subject = Subject::run_inside("crew", "4", &[("USER_NUMBER", "64331")]);
    let point = subject.checkpoint();
    // Too many threads are no hindrance.
    subject.tell(b'm');
    subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    subject.tell(b'c');
    subject.tell(b'e');
    assert_eq!(refusal(&subject, &point), TemplateRefusal::Denied { pid: subject.0.pid() });
    subject.tell(b't');
    point.template.remove(PATIENCE).expect("remove a template");
}

#[test]
fn a_program_whose_first_thread_has_ended_is_refused_by_name() {
    let mut subject = Subject::run_inside("crew", "4", &[("NO_LEADER", "1")]);
    assert_eq!(subject.0.line(), "ok");
    let pid = subject.0.pid();
    let end = Instant::now() + PATIENCE;
    while subject.0.state() != "Z" {
        assert!(Instant::now() < end, "it lives");
        std::thread::yield_now();
    }
    let error = subject.0.group.stopped(|stopped| Threads::read(stopped, pid).expect_err("threads"));
    assert!(
        matches!(error, TemplateError::Refused(TemplateRefusal::LeaderEnded { pid: other }) if other == pid),
        "{error}"
    );
}

#[test]
fn records_outlive_the_engine_that_wrote_them() {
    let mut subject = Subject::run_inside("crew", "5", &[]);
    let mut point = subject.checkpoint();
    let bytes = serde_json::to_vec(&point.threads).expect("written");
    let threads: Threads = serde_json::from_slice(&bytes).expect("read");
    assert_eq!(threads, point.threads);
    point.threads = threads;
    subject.tell(b'j');
    subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    subject.tell(b'c');
    point.template.remove(PATIENCE).expect("remove a template");
}

#[test]
fn threads_of_python_come_back() {
    const CODE: &str = r#"
import sys, threading, queue, time
answers, orders, counts = queue.Queue(), {}, {}
own = threading.local()
def work(k):
    own.value = 100 * k
    while True:
        try: order = orders[k].get(timeout=0.01)
        except queue.Empty: continue
        if order == 'q': return
        own.value += 1
        counts[k] = own.value
        answers.put(k)
def start(n):
    for k in range(len(orders), len(orders) + n):
        orders[k] = queue.Queue()
        counts[k] = None
        threads.append(threading.Thread(target=work, args=(k,), daemon=True))
        threads[-1].start()
threads = []
start(5)
print('ready', flush=True)
while True:
    letter = sys.stdin.read(1)
    if letter == 'm': start(3)
    elif letter == 'e':
        for k in (0, 2, 4): orders[k].put('q'); threads[k].join()
    elif letter == 'c':
        assert threading.active_count() == 6 and all(count is None for count in counts.values())
        for k in orders: orders[k].put('t')
        for k in orders: answers.get(timeout=60)
        assert counts == {k: 100 * k + 1 for k in range(5)}, counts
    else: break
    print('ok', flush=True)
"#;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("crew.py");
    fs::write(&path, CODE).expect("write a program");
    let mut subject = Subject::python(path.to_str().expect("a path"));
    let point = subject.checkpoint();
    for (letters, made) in [("e", 3), ("m", 0), ("em", 3), ("me", 3)] {
        letters.bytes().for_each(|letter| subject.tell(letter));
        let report = subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
        assert_eq!(report.n_made_threads, made, "{letters}");
        subject.tell(b'c');
        subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    }
    subject.tell(b'c');
    point.template.remove(PATIENCE).expect("remove a template");
}

/// Not a test: the engine that is killed by the next ones.
#[test]
fn engine_that_will_be_killed() {
    let (Some(group), Ok(records), Ok(pid)) = (
        std::env::var_os("DELTABOX_TEST_GROUP"),
        std::env::var("DELTABOX_RECORDS"),
        std::env::var("DELTABOX_TEST_PID"),
    ) else {
        return;
    };
    let (group, pid) = (Path::new(&group), pid.parse().expect("a pid"));
    let records = fs::read(records).expect("records");
    let (memory, threads): (Memory, Threads) = serde_json::from_slice(&records).expect("records");
    let freezer = Freezer::open(group.join("t1")).expect("a group");
    let source = Source::of(&Template::find(freezer).expect("look").expect("a template")).expect("pages");
    let stop = Stop { group, excluded: &[], deadline: Instant::now() + PATIENCE };
    let past = Past { memory: &memory, source: &source, threads: &threads, files: None };
    while_stopped(stop, |stopped| restore_in_place(stopped, pid, &past)).expect("stop").expect("a rollback");
}

/// Threads 0, 2 and 4 of five have ended, and three others have started. `is_unchanged`: it stays so.
fn goes_on_after(point_name: &str, action: &str, is_unchanged: bool) {
    let mut subject = Subject::run_inside("crew", "5", &[]);
    let pid = subject.0.pid();
    let point = subject.checkpoint();
    "em".bytes().for_each(|letter| subject.tell(letter));
    let records = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("threads-{}-{pid}", std::process::id()));
    fs::write(&records, serde_json::to_vec(&(&point.memory, &point.threads)).expect("records")).expect("write");
    let status = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "threads::engine_that_will_be_killed", "--nocapture"])
        .env("DELTABOX_TEST_GROUP", &subject.0.group.0)
        .env("DELTABOX_RECORDS", &records)
        .env("DELTABOX_TEST_PID", pid.to_string())
        .env("DELTABOX_FAULT", format!("{point_name}:{action}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("run an engine");
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, (action == "kill").then_some(9), "{point_name}: the engine ended with {status}");
    assert!(!status.success(), "nothing happened to the engine");
    fs::remove_file(records).expect("remove the records");
    if is_unchanged {
        // Those that were made end without a trace.
        let end = Instant::now() + PATIENCE;
        while fs::read_dir(format!("/proc/{pid}/task")).expect("threads").count() != 6 {
            assert!(Instant::now() < end, "other threads than before");
            std::thread::yield_now();
        }
        subject.tell(b't');
    }
    // A later engine brings it back.
    subject.roll_back_and(&point, |_, _| {}).expect("a rollback");
    subject.tell(b'c');
    point.template.remove(PATIENCE).expect("remove a template");
}

#[test]
fn a_program_is_unchanged_after_an_engine_that_has_only_made_threads() {
    goes_on_after("threads.born", "kill", true);
    goes_on_after("threads.born", "error", true);
}

#[test]
fn a_program_comes_back_after_an_engine_that_has_ended_threads() {
    goes_on_after("threads.parted", "kill", false);
    goes_on_after("threads.parted", "error", false);
}
