//! Numbers of docs/templates.md.

#![expect(clippy::print_stdout, reason = "a measurement is printed")]

use std::time::{Duration, Instant};

use deltabox::deltacr::inject::Call;
use deltabox::deltacr::stop::Tracer;
use deltabox::deltacr::template::{Outline, Past, Request, Source, Template, Threads, read_smaps, restore_in_place};

use crate::{PATIENCE, Subject, reap};

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_micros();
    println!("{what:56} p50 {:>7} us  p90 {:>7} us  max {:>7} us  n {}", at(50), at(90), at(100), times.len());
}

/// Not a test: prints the numbers of docs/templates.md. Run with `--release --ignored --nocapture --test-threads 1`.
#[test]
#[ignore = "a measurement"]
fn measure() {
    for (mb, huge) in [("1", false), ("50", false), ("500", false), ("500", true)] {
        let mut variables = vec![("BIG_MB", mb)];
        variables.extend(huge.then_some(("BIG_HUGE", "1")));
        let subject = Subject::start_as("big", &variables);
        let name = format!("{mb} MB{}", if huge { ", huge pages" } else { "" });
        made(&subject, &name, false);
        made(&subject, &name, true);
        restored(subject, &name, 20);
    }
    let subject = Subject::start("threads,heap");
    made(&subject, "6 threads, 3 MB", false);
    restored(subject, "6 threads, 3 MB", 50);
}

fn made(subject: &Subject, name: &str, careful: bool) {
    let pid = subject.0.pid();
    let mut tracer = Tracer::new();
    let request = Request { careful, ..subject.request() };
    let [mut floor, mut make, mut threads, mut complete, mut remove] = [const { Vec::new() }; 5];
    for _ in 0..50 {
        let freezer = subject.freezer("t1");
        let stopped = tracer.while_stopped(subject.0.group.request(PATIENCE), |stopped| {
            let mut hand = stopped.hand(pid).expect("a hand");
            // A bare fork that ends at once: what any template costs at least. (exit_group is injected code's end.)
            let begin = Instant::now();
            hand.run(&[Call { nr: libc::SYS_getpid, args: [0; 6] }]).expect("a call");
            floor.push(begin.elapsed());
            hand.close().expect("close");
            let begin = Instant::now();
            threads.push({
                Threads::read(stopped, pid).expect("threads");
                begin.elapsed()
            });
            let begin = Instant::now();
            let made = Template::make(stopped, pid, freezer, &request).expect("a template");
            make.push(begin.elapsed());
            made
        });
        let (template, outline): (Template, Outline) = stopped.expect("stop");
        let begin = Instant::now();
        outline.complete(&template).expect("a description");
        complete.push(begin.elapsed());
        let (pid, begin) = (template.pid(), Instant::now());
        template.remove(PATIENCE).expect("remove");
        remove.push(begin.elapsed());
        reap(pid);
    }
    let how = if careful { ", careful" } else { "" };
    show(&format!("{name}: one injected call"), floor);
    show(&format!("{name}: threads read"), threads);
    show(&format!("{name}: template made{how}"), make);
    show(&format!("{name}: described{how}, not in the stop"), complete);
    show(&format!("{name}: removed, not in the stop"), remove);
}

fn restored(mut subject: Subject, name: &str, n: usize) {
    let pid = subject.0.pid();
    let mut tracer = Tracer::new();
    let (freezer, request) = (subject.freezer("t1"), subject.request());
    let ((template, outline), threads) = tracer
        .while_stopped(subject.0.group.request(PATIENCE), |stopped| {
            let threads = Threads::read(stopped, pid).expect("threads");
            (Template::make(stopped, pid, freezer, &request).expect("a template"), threads)
        })
        .expect("stop");
    let memory = outline.complete(&template).expect("a description");
    let source = Source::of(&template).expect("pages");
    for advice_is_unchanged in [false, true] {
        let past = Past { memory: &memory, source: &source, threads: &threads, advice_is_unchanged, files: None };
        let mut reports = Vec::new();
        let mut whole = Vec::new();
        for _ in 0..n {
            subject.tell(b'm');
            let report = tracer.while_stopped(subject.0.group.request(PATIENCE), |stopped| {
                let begin = Instant::now();
                let report = restore_in_place(stopped, pid, &past).expect("a rollback");
                (report, begin.elapsed())
            });
            let (report, time) = report.expect("stop");
            reports.push(report);
            whole.push(time);
        }
        let how = if advice_is_unchanged { "advice known" } else { "advice read" };
        show(&format!("{name}: back in place, {how}"), whole);
        show("    mappings", reports.iter().map(|report| report.mappings).collect());
        show("    comparison", reports.iter().map(|report| report.comparison).collect());
        show("    pages", reports.iter().map(|report| report.pages).collect());
        let last = reports.last().expect("a report");
        println!(
            "    pages copied {}, dropped {}, equal {}",
            last.n_copied_pages, last.n_dropped_pages, last.n_equal_pages
        );
    }
    let begin = Instant::now();
    read_smaps(template.pid()).expect("mappings");
    println!("    smaps read in {} us", begin.elapsed().as_micros());
    subject.tell(b'c');
    crate::remove(template);
}
