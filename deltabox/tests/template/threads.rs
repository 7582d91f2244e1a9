//! Threads that have started or ended since: the set of them comes back, with numbers, names and what each had.

use deltabox::deltacr::template::Report;

use crate::{Subject, remove};

/// Rolled back after each of `changes`, which are letters for the program, and asked each time.
fn comes_back(n: &str, changes: &[&str]) -> Vec<Report> {
    let mut subject = Subject::run("crew", n, &[]);
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
    remove(point.template);
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
