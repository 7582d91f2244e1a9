//! Programs put back in place: they themselves confirm that all is as it was.

use deltabox::deltacr::template::{
    Mapping, Memory, Past, Report, Source, Template, TemplateError, Threads, restore_in_place,
};

use crate::{Subject, bytes, mappings, remove};

/// What is needed to come back.
pub(crate) struct Point {
    pub(crate) template: Template,
    pub(crate) memory: Memory,
    pub(crate) threads: Threads,
}

impl Subject {
    pub(crate) fn checkpoint(&self) -> Point {
        let pid = self.0.pid();
        let mut threads = None;
        let request = self.request();
        let (template, memory) = self
            .make_and(&request, |stopped, _, _| threads = Some(Threads::read(stopped, pid).expect("threads")))
            .expect("a template");
        Point { template, memory, threads: threads.expect("threads") }
    }

    pub(crate) fn roll_back(&self, point: &Point) -> Result<Report, TemplateError> {
        self.roll_back_and(point, |pid, point| is_as_it_was(pid, point, 0))
    }

    /// `look`s at it before anything runs.
    pub(crate) fn roll_back_and(
        &self,
        point: &Point,
        look: impl FnOnce(libc::pid_t, &Point) + Send,
    ) -> Result<Report, TemplateError> {
        let source = Source::of(&point.template).expect("pages");
        let pid = self.0.pid();
        let past = Past { memory: &point.memory, source: &source, threads: &point.threads, files: None };
        self.0.group.stopped(|stopped| {
            let report = restore_in_place(stopped, pid, &past);
            if report.is_ok() {
                look(pid, point);
            }
            report
        })
    }
}

/// All mappings and all bytes of private ones, but for so many; nothing runs.
pub(crate) fn is_as_it_was(pid: libc::pid_t, point: &Point, n_allowed: usize) {
    let mut n_other = 0;
    let present = mappings(pid);
    for mapping in &point.memory.mappings {
        let there = present.iter().find(|one| one.start <= mapping.start && one.end >= mapping.end);
        let text = format!("{:x?} is still there", mapping.range());
        let there = there.expect(&text);
        let look = |one: &Mapping| (one.protection, one.shared, one.inode, one.advice.clone(), one.name.clone());
        assert_eq!(look(there), look(mapping), "{:x?}", mapping.range());
        if !mapping.shared && !mapping.is_kernels() {
            match (bytes(pid, mapping), bytes(point.template.pid(), mapping)) {
                (Some(is), Some(was)) => n_other += is.iter().zip(&was).filter(|(is, was)| is != was).count(),
                (is, was) => assert!(is == was, "no bytes in {:x?}", mapping.range()),
            }
        }
    }
    assert!(n_other <= n_allowed, "{n_other} other bytes");
    let area = &point.memory.area;
    for one in present.iter().filter(|one| one.end <= area.start || one.start >= area.end) {
        let was = point.memory.mappings.iter().any(|was| was.start <= one.start && was.end >= one.start);
        assert!(was, "{:x?} is new", one.range());
    }
}

/// Changed and rolled back twice, and once more with nothing changed.
fn comes_back(kinds: &str) -> [Report; 3] {
    let mut subject = Subject::start(kinds);
    subject.0.disturb();
    let point = subject.checkpoint();
    let reports = ["m", "mm", ""].map(|letters| {
        letters.bytes().take(1).for_each(|letter| subject.tell(letter));
        subject.roll_back(&point).expect("a rollback")
    });
    subject.tell(b'c');
    subject.tell(b's');
    // And again, after the program has gone on from there.
    subject.tell(b'm');
    subject.roll_back(&point).expect("a rollback");
    subject.tell(b'c');
    remove(point.template);
    reports
}

macro_rules! kinds {
    ($($test:ident $kinds:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            comes_back($kinds);
        })+
    };
}

kinds! {
    the_heap_comes_back "heap",
    a_heap_that_grew_comes_back "brk",
    a_heap_that_shrank_comes_back "brk,shrunk",
    a_stack_that_grew_comes_back "stack",
    huge_pages_come_back "huge",
    locked_pages_come_back "locked",
    pages_behind_guards_come_back "guard",
    what_no_child_gets_comes_back "unforked",
    hundreds_of_pieces_that_no_child_gets_come_back "patchy",
    what_a_child_gets_empty_comes_back "wiped",
    what_is_both_comes_back "both",
    what_was_moved_comes_back "moved",
    what_was_unmapped_comes_back "gone",
    what_was_replaced_comes_back "rebuilt",
    pages_of_files_come_back "file",
    named_pages_come_back "named",
    threads_come_back "threads",
    a_filtered_program_comes_back "filtered,heap",
    everything_comes_back
        "heap,huge,locked,guard,unforked,wiped,moved,gone,rebuilt,file,lazy,hole,named,brk,threads,stack",
}

#[test]
fn only_what_was_written_is_copied() {
    let [first, second, again] = comes_back("big");
    // 512 writes, 100 pages apart, of 51200 pages.
    assert!((512..700).contains(&first.n_copied_pages), "{first:?}");
    assert!(first.n_equal_pages > 50_000, "{first:?}");
    // What was copied once is another page from then on.
    for report in [second, again] {
        assert!(
            report.n_copied_pages < 700 && report.n_unmapped + report.n_mapped + report.n_changed == 0,
            "{report:?}"
        );
    }
}

#[test]
fn holes_are_holes_again() {
    let [first, ..] = comes_back("lazy,hole");
    assert!(first.n_dropped_pages >= 63 + 4, "{first:?}");
}

#[test]
fn two_templates_of_one_program_are_apart() {
    let mut subject = Subject::start("heap,hole,gone,threads");
    let first = subject.checkpoint();
    subject.tell(b'm');
    let freezer = subject.freezer("t2");
    let pid = subject.0.pid();
    let request = subject.request();
    let (outline, second, threads) = subject.0.group.stopped(|stopped| {
        let threads = Threads::read(stopped, pid).expect("threads");
        let (template, outline) = Template::make(stopped, pid, freezer, &request).expect("a template");
        (outline, template, threads)
    });
    let second = Point { memory: outline.complete(&second).expect("a description"), template: second, threads };
    for _ in 0..3 {
        subject.roll_back(&first).expect("a rollback");
        subject.roll_back(&second).expect("a rollback");
        subject.roll_back(&first).expect("a rollback");
        subject.tell(b'c');
    }
    remove(second.template);
    remove(first.template);
    subject.tell(b's');
}

#[test]
fn sleeps_that_had_been_interrupted_before_begin_anew() {
    let mut subject = Subject::start("naps");
    let mut tracer = deltabox::deltacr::stop::Tracer::new();
    let pid = subject.0.pid();
    for _ in 0..10 {
        // Stopped twice in one sleep: the second time the kernel's own restart is interrupted.
        for _ in 0..3 {
            assert!(subject.0.disturb_by(&mut tracer), "the program ended");
        }
        let (freezer, request) = (subject.freezer("t1"), subject.request());
        let made = tracer.while_stopped(subject.0.group.request(crate::PATIENCE), |stopped| {
            let threads = Threads::read(stopped, pid).expect("threads");
            (Template::make(stopped, pid, freezer, &request).expect("a template"), threads)
        });
        let ((template, outline), threads) = made.expect("stop");
        let memory = outline.complete(&template).expect("a description");
        let point = Point { template, memory, threads };
        for _ in 0..3 {
            subject.roll_back(&point).expect("a rollback");
            std::thread::sleep(std::time::Duration::from_millis(40));
            subject.tell(b's');
        }
        remove(point.template);
    }
}
