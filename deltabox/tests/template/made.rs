//! What a template has, and that the program does not notice.

use std::fs;
use std::ops::Range;

use deltabox::deltacr::stop::Stopped;
use deltabox::deltacr::template::{
    Advice, Freezer, Mapping, Numbers, Outline, Request, Template, TemplateError, TemplateRefusal,
};
use deltabox::sys::ptrace::get_rseq_configuration;

use crate::{Subject, bytes, mappings, reap, remove};

const EVERYTHING: &str =
    "heap,huge,locked,guard,unforked,wiped,shared,moved,gone,rebuilt,file,lazy,hole,named,brk,threads";

/// The kernel tells each thread its CPU when it returns to its code, the engine's calls included: not the program's bytes.
fn hide_cpus(stopped: &Stopped, pid: libc::pid_t, mapping: &Mapping, bytes: &mut Option<Vec<u8>>) {
    let Some(bytes) = bytes else { return };
    let processes = stopped.processes().iter().filter(|process| process.pid == pid);
    for thread in processes.flat_map(|process| &process.threads) {
        let area = get_rseq_configuration(thread.tid).expect("a registration").address;
        if area != 0 && mapping.range().contains(&area) {
            // struct rseq: cpu_id_start, cpu_id, rseq_cs, flags, node_id, mm_cid.
            let start = usize::try_from(area - mapping.start).expect("an offset");
            bytes[start..start + 8].fill(0);
            bytes[start + 20..start + 28].fill(0);
        }
    }
}

/// Every private page is the same; nothing else is there.
fn holds_all(stopped: &mut Stopped, template: &Template, outline: &Outline) {
    let pid = outline.pid();
    assert!(stopped.processes().iter().any(|process| process.pid == pid));
    let (own, copied) = (mappings(pid), mappings(template.pid()));
    for mapping in &own {
        let found = copied.iter().any(|copy| copy.start <= mapping.start && copy.end >= mapping.end);
        assert_eq!(found, !mapping.has(Advice::SharedWritable), "{mapping:x?}");
        let is_areas = outline.area().start < mapping.end && mapping.start < outline.area().end;
        if found && !mapping.is_kernels() && !is_areas {
            let [own, copied] = [pid, template.pid()].map(|one| {
                let mut bytes = bytes(one, mapping);
                hide_cpus(stopped, pid, mapping, &mut bytes);
                bytes
            });
            assert!(own == copied, "other bytes in {mapping:x?}");
        }
    }
    assert!(copied.iter().all(|copy| !copy.has(Advice::SharedWritable)));
}

/// What of a mapping lies outside the engine's area, to which the kernel may have joined it.
fn around(mapping: &Mapping, area: &Range<u64>) -> Vec<Mapping> {
    let before = Mapping { end: mapping.end.min(area.start), ..mapping.clone() };
    let after = Mapping { start: mapping.start.max(area.end), ..mapping.clone() };
    [before, after].into_iter().filter(|part| part.start < part.end).collect()
}

fn is_well_made(kinds: &str, request: impl Fn(&mut Request)) {
    let mut subject = Subject::start(kinds);
    let pid = subject.0.pid();
    subject.0.disturb();
    let before = mappings(pid);
    let mut wanted = subject.request();
    request(&mut wanted);
    let (template, memory) = subject.make_and(&wanted, holds_all).expect("a template");
    assert_eq!(mappings(pid), before, "the program's mappings changed");
    // Nothing runs in it, it has nothing but memory, and it leads nobody's group.
    let status = fs::read_to_string(format!("/proc/{}/status", template.pid())).expect("status");
    assert!(status.contains(&format!("PPid:\t{}\n", std::process::id())), "{status}");
    assert!(status.contains("TracerPid:\t0\n") && status.contains("Threads:\t1\n"), "{status}");
    assert_eq!(fs::read_dir(format!("/proc/{}/fd", template.pid())).expect("descriptors").count(), 0);
    let stat = fs::read_to_string(format!("/proc/{}/stat", template.pid())).expect("stat");
    let session = stat[stat.rfind(')').expect("a name")..].split(' ').nth(4).expect("a session").to_owned();
    assert_ne!(session, nix::unistd::getsid(None).expect("a session").to_string());
    let events = fs::read_to_string(template.freezer().path().join("cgroup.events")).expect("events");
    assert!(events.contains("frozen 1") && events.contains("populated 1"), "{events}");
    // The description has what the program had, but for the engine's area.
    let shown = |mapping: &Mapping| format!("{:x?} {:?}", mapping.range(), mapping.advice);
    let described: Vec<_> = memory.mappings.iter().map(shown).collect();
    let had: Vec<_> = before.iter().flat_map(|mapping| around(mapping, &memory.area)).map(|one| shown(&one)).collect();
    assert_eq!(described, had);
    subject.tell(b's');
    subject.tell(b'c');
    remove(template);
    subject.tell(b'm');
}

macro_rules! kinds {
    ($($test:ident $kinds:expr),+ $(,)?) => {
        $(#[test]
        fn $test() {
            is_well_made($kinds, |_| {});
        })+
    };
}

kinds! {
    a_template_has_the_heap "heap,brk,stack",
    a_template_has_huge_pages "huge",
    a_template_has_locked_pages "locked",
    a_template_has_pages_behind_guards "guard",
    a_template_has_what_no_child_would_get "unforked",
    a_template_has_hundreds_of_pieces_that_no_child_would_get "patchy,wiped,shared",
    a_template_has_what_a_child_would_get_empty "wiped",
    a_template_has_what_is_both "both",
    a_template_shares_no_writable_memory "shared",
    a_template_has_pages_of_files "file",
    a_template_of_threads "threads",
    a_template_of_a_subreaper "reaper",
    a_template_of_a_filtered_program "filtered,heap",
    a_template_of_everything EVERYTHING,
}

#[test]
fn a_careful_template_of_a_plain_program() {
    is_well_made("heap,hole", |request| request.careful = true);
}

#[test]
fn a_template_takes_the_numbers_that_were_named() {
    let subject = Subject::start("heap,unforked");
    let top: i32 = fs::read_to_string("/proc/sys/kernel/pid_max").expect("pid_max").trim().parse().expect("a number");
    // Unforked memory takes two attempts, so something must reap the first.
    let numbers = Numbers { helper: top - 2, template: top - 1 };
    let request = Request { numbers: Some(numbers), careful: true, ..subject.request() };
    let (template, _) = subject.make_and(&request, |_, _, _| {}).expect("a template");
    assert_eq!(template.pid(), top - 1);
    let taken = subject.0.group.stopped(|stopped| {
        let freezer = Freezer::create(&subject.0.group.0, "t2").expect("a cgroup");
        Template::make(stopped, subject.0.pid(), freezer, &request).map(drop)
    });
    // The helper's number is that of the template's session.
    let expected = TemplateRefusal::NumberTaken { number: top - 2 };
    assert!(matches!(taken, Err(TemplateError::Refused(refusal)) if refusal == expected));
    remove(template);
    let request = Request { numbers: Some(Numbers { helper: top - 2, template: top + 1 }), ..request };
    let refused = refusal(&subject, &request);
    assert_eq!(refused, TemplateRefusal::NumberTooHigh { number: top + 1 });
}

/// The refusal of a template, after which the program is as before, and its group empty and gone.
fn refusal(subject: &Subject, request: &Request) -> TemplateRefusal {
    let pid = subject.0.pid();
    subject.0.disturb();
    let before = mappings(pid);
    let error = subject.make_and(request, |_, _, _| {}).expect_err("a template was made");
    assert_eq!(mappings(pid), before);
    assert!(!subject.0.group.0.join("t1").exists(), "the cgroup is still there");
    let text = error.to_string();
    let refusal = if let TemplateError::Refused(refusal) = error { Some(refusal) } else { None };
    refusal.expect(&text)
}

#[test]
fn a_program_at_its_limit_of_processes_is_refused_and_goes_on() {
    let user = [("USER_NUMBER", "64321"), ("LIMIT_PROCESSES", "1")];
    let mut subject = Subject::start_as("heap,unforked,wiped,shared", &user);
    let pid = subject.0.pid();
    assert_eq!(refusal(&subject, &subject.request()), TemplateRefusal::TooManyProcesses { pid });
    subject.tell(b's');
    subject.tell(b'c');
    // The helper may be, the template not.
    let user = [("USER_NUMBER", "64322"), ("LIMIT_PROCESSES", "2")];
    let mut subject = Subject::start_as("heap,unforked,wiped,shared", &user);
    let pid = subject.0.pid();
    assert_eq!(refusal(&subject, &subject.request()), TemplateRefusal::TooManyProcesses { pid });
    subject.tell(b's');
    subject.tell(b'c');
}

#[test]
fn a_program_that_may_open_too_few_files_is_refused_and_goes_on() {
    for limit in ["0", "1", "2"] {
        let subject = Subject::start_as("heap,wiped", &[("LIMIT_FILES", limit)]);
        let pid = subject.0.pid();
        assert_eq!(refusal(&subject, &subject.request()), TemplateRefusal::TooFewDescriptors { pid }, "{limit}");
    }
    let mut subject = Subject::start_as("heap", &[("LIMIT_FILES", "3")]);
    let (template, _) = subject.make();
    subject.tell(b'c');
    remove(template);
}

#[test]
fn a_program_of_another_user_gets_a_template_but_may_not_choose_numbers() {
    let mut subject = Subject::start_as("heap,unforked,shared", &[("USER_NUMBER", "64323")]);
    let numbers = Some(Numbers { helper: 30_000, template: 30_001 });
    let refused = refusal(&subject, &Request { numbers, ..subject.request() });
    assert_eq!(refused, TemplateRefusal::Denied { pid: subject.0.pid() });
    let (template, _) = subject.make();
    subject.tell(b's');
    subject.tell(b'c');
    remove(template);
}

#[test]
fn a_parent_that_is_not_the_keeper_is_told() {
    let subject = Subject::start("heap");
    let request = Request { keeper: Some(1), ..Request::default() };
    let parent = std::process::id().try_into().expect("a pid");
    assert_eq!(refusal(&subject, &request), TemplateRefusal::Parent { pid: subject.0.pid(), parent });
}

#[test]
fn a_template_is_found_again_by_its_group_and_a_lost_one_is_told() {
    let mut subject = Subject::start("heap");
    let (template, _) = subject.make();
    let pid = template.pid();
    let path = template.freezer().path().to_owned();
    drop(template);
    let found = Template::find(Freezer::open(path.clone()).expect("a group")).expect("look").expect("a template");
    assert_eq!(found.pid(), pid);
    assert!(found.lives().expect("ask"));
    // Nothing wakes it but a kill.
    for signal in [libc::SIGCONT, libc::SIGTERM, libc::SIGUSR1] {
        let signal = nix::sys::signal::Signal::try_from(signal).expect("a signal");
        if signal != nix::sys::signal::Signal::SIGTERM {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("send");
        }
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
    reap(pid);
    assert!(!found.lives().expect("ask"));
    let empty = Template::find(Freezer::open(path).expect("a group")).expect("look").expect_err("a template");
    empty.remove().expect("remove the group");
    subject.tell(b'c');
}

#[test]
fn a_subreaper_above_sees_no_template() {
    let mut subject = Subject::start("family,heap");
    let procs = fs::read_to_string(subject.0.group.0.join("cgroup.procs")).expect("processes");
    let parent = subject.0.pid().to_string();
    let child: libc::pid_t = procs.lines().find(|pid| *pid != parent).expect("a child").parse().expect("a pid");
    let (first, second) = (subject.freezer("t1"), subject.freezer("t2"));
    let request = subject.request();
    let (first, second) = subject.0.group.stopped(|stopped| {
        let first = Template::make(stopped, child, first, &request).expect("a template");
        let second = Template::make(stopped, child, second, &request).expect("a template");
        (first.0, second.0)
    });
    subject.tell(b's');
    remove(first);
    remove(second);
    subject.tell(b'c');
    let last = subject.0.group.stopped(|stopped| stopped.processes().len());
    assert_eq!(last, 2);
    subject.0.byte();
    assert_eq!(subject.0.finish(), "end");
}

#[test]
fn processes_that_share_their_memory_are_refused() {
    let subject = Subject::start("cloned");
    let error = subject.make_and(&subject.request(), |_, _, _| {}).expect_err("a template was made");
    let TemplateError::Refused(TemplateRefusal::SharedMemory { pid, other }) = error else { panic!("{error}") };
    assert!(pid == subject.0.pid() && other != pid);
}
