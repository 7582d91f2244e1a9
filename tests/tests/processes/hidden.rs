//! Templates are out of reach of whatever runs inside, and out of its sight. After each attempt the program that was
//! attacked, or made again, says what it remembers.

use std::fs;
use std::process::Command;

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use serde_json::{Value, json};

use crate::{checkpoint, roll_back};

const STEADY: &str = include_str!("programs/steady.py");
const REACH: &str = include_str!("programs/reach.py");
const EVERYONE: &str = include_str!("programs/everyone.py");
/// Numbers from here on are no program's.
const FIRST_HIDDEN: u64 = 1 << 20;

/// A program that needs nobody outside, so that it can be made again.
struct Steady {
    host: Host,
    n_asked: usize,
}

impl Steady {
    fn start() -> Option<Self> {
        Self::start_with(&[], "0")
    }

    fn start_with(env: &[(&str, &str)], user: &str) -> Option<Self> {
        if skipped_without_root() {
            return None;
        }
        let host = Host::start_with(env);
        host.create("box");
        host.sh("box", "chmod 777 /srv").ok();
        host.cli(["exec", "-d", "-u", user, "box", "--", "/usr/bin/python3", "-c", STEADY]).ok();
        let mut steady = Self { host, n_asked: 0 };
        assert_eq!(steady.ask("n = 1", "n"), json!(1));
        Some(steady)
    }

    /// Tells it something and asks for something.
    fn ask(&mut self, told: &str, asked: &str) -> Value {
        self.n_asked += 1;
        let question = json!([self.n_asked, told, asked]).to_string();
        let put = "printf '%s\\n' \"$1\" > /srv/question.new && mv /srv/question.new /srv/question";
        self.host.cli(["exec", "box", "--", "sh", "-c", put, "sh", &question]).ok();
        let mut answer = Value::Null;
        wait_within(60, "an answer", || {
            let text = fs::read(self.host.inside("box", "/srv/answer")).unwrap_or_default();
            answer = serde_json::from_slice(&text).unwrap_or_default();
            answer[0] == json!(self.n_asked)
        });
        answer[1].clone()
    }

    /// Runs Python inside.
    fn python(&self, program: &str) -> deltabox_tests::Output {
        self.host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", program])
    }

    /// Attacks, rolls back, and asks the program.
    #[track_caller]
    fn outlives(&mut self, id: &str, how: &str, attack: impl FnOnce(&Host)) {
        assert_eq!(self.ask("n += 1", "n"), json!(2));
        attack(&self.host);
        if how == "fork" {
            // Killed is not ended yet.
            wait_within(60, "all have ended but init", || n_processes(&self.host) == 1);
        }
        let report = roll_back(&self.host, id);
        assert_eq!(report["processes"][0]["how"], json!(how), "{report}");
        assert_eq!(self.ask("", "n"), json!(1));
    }
}

fn n_processes(host: &Host) -> usize {
    host.cli(["--json", "ps", "box"]).json()["processes"].as_array().expect("processes").len()
}

/// Numbers of all that shows in `/proc` inside, as the sandbox's own programs see it.
fn hidden(host: &Host) -> Vec<u64> {
    let listed = host.sh("box", "ls /proc").ok();
    let numbers = listed.lines().filter_map(|name| name.parse().ok());
    numbers.filter(|number| *number >= FIRST_HIDDEN).collect()
}

#[test]
fn a_kill_of_everyone_ends_all_programs_and_no_template() {
    let Some(mut steady) = Steady::start() else { return };
    let id = checkpoint(&steady.host);
    for _ in 0..3 {
        steady.outlives(&id, "fork", |host| {
            host.cli(["exec", "-d", "box", "--", "sh", "-c", "sleep 1000 & sleep 1000"]).ok();
            host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", "import os; os.kill(-1, 9)"]).ok();
        });
    }
}

#[test]
fn tools_that_kill_by_name_find_the_program_and_no_template() {
    let Some(mut steady) = Steady::start() else { return };
    let id = checkpoint(&steady.host);
    for words in [&["pkill", "-9", "-f", "srv/question"][..], &["pkill", "-9", "python3"], &["killall5", "-9"]] {
        steady.outlives(&id, "fork", |host| {
            let words = ["exec", "box", "--"].iter().chain(words);
            let code = host.cli(words).code();
            assert!([0, 128 + 9].contains(&code), "{code}");
        });
    }
}

#[test]
fn signals_to_every_number_and_every_group_end_no_template() {
    let Some(mut steady) = Steady::start() else { return };
    let id = checkpoint(&steady.host);
    for (signal, how) in [("STOP", "in place"), ("KILL", "fork")] {
        steady.outlives(&id, how, |host| {
            let each = "for (2 .. 1 << 22) {
    next if $_ == $$;
    $n += kill $ARGV[0], $_;
    $n += kill $ARGV[0], -$_ if $_ != getpgrp;
}
print $n";
            let n = host.cli(["exec", "box", "--", "perl", "-e", each, signal]).ok();
            // The program and its group, which may be gone with it.
            assert!(n == "2" || signal == "KILL" && n == "1", "{n} were there");
            // It was stopped twice over, and a stop signal that waits outlives a rollback.
            drop(host.cli(["exec", "box", "--", "pkill", "-CONT", "python3"]));
        });
    }
}

#[test]
fn no_call_reaches_a_template_and_none_is_hurt_by_trying() {
    for user in ["0", "1000"] {
        let Some(mut steady) = Steady::start_with(&[], user) else { return };
        let id = checkpoint(&steady.host);
        steady.outlives(&id, "in place", |host| {
            let tried = host.cli(["exec", "-u", user, "box", "--", "/usr/bin/python3", "-c", REACH]).ok();
            assert_eq!(tried, "done");
            let tried = host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", REACH]).ok();
            assert_eq!(tried, "done");
        });
        if user == "0" {
            // What it is made from is as good as before.
            steady.outlives(&id, "fork", |host| drop(host.cli(["exec", "box", "--", "pkill", "-9", "python3"]).ok()));
        }
    }
}

#[test]
fn nobody_sees_a_template() {
    let Some(mut steady) = Steady::start() else { return };
    let looks = [
        "ps -eo pid,ppid,args | grep -v 'ps -eo' | grep -v 'sh -c' | grep -v grep",
        "pgrep -f [s]rv/question",
        "pgrep -c .",
        "pidof python3",
        "top -b -n 1 | grep -c python3",
        "cat /proc/[0-9]*/comm 2>/dev/null | grep -c python3",
        "cat /proc/[0-9]*/status 2>/dev/null | grep -c ^Name:.python3",
        "df | awk '{print $NF}' | sort",
        "/usr/bin/python3 -c 'import os; print(sum(os.path.exists(f\"/proc/{name}/stat\") for name in os.listdir(\"/proc\") if name.isdigit()))'",
    ];
    let before = looks.map(|look| steady.host.sh("box", look).ok());
    let id = checkpoint(&steady.host);
    for _ in 0..2 {
        checkpoint(&steady.host);
    }
    let numbers = hidden(&steady.host);
    assert_eq!(numbers.len(), 3, "numbers in a listing are all that shows");
    for (look, before) in looks.iter().zip(&before) {
        assert_eq!(&steady.host.sh("box", look).ok(), before, "{look}");
    }
    roll_back(&steady.host, &id);
    assert_eq!(steady.ask("", "n"), json!(1));
    // Their covers go with them.
    let covers = || steady.host.sh("box", "grep -c ' /proc/[0-9]' /proc/self/mounts; true").ok();
    assert_eq!(covers(), "3");
    for id in ["c1", "c2", "c3"] {
        steady.host.cli(["rm", &format!("box@{id}")]).ok();
    }
    wait_within(60, "templates have ended", || hidden(&steady.host).is_empty());
    assert_eq!(covers(), "0");
}

#[test]
fn no_program_waits_for_a_template() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    // It has a subreaper above it, and is one.
    worker.ask("import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.prctl(36, 1)");
    let id = checkpoint(&host);
    let wait = "def wait(options):
    done = libc.wait4(-1, None, options, None)
    return [done, ctypes.get_errno()]
[wait(1), wait(1 | 0x40000000), wait(1 | 0x80000000)]";
    let nobody = json!([[-1, libc_echild()], [-1, libc_echild()], [-1, libc_echild()]]);
    assert_eq!(worker.ask(wait), nobody);
    // With a child it is that child.
    let child = "import subprocess; one = subprocess.Popen(['true']); os.waitpid(-1, 0)[0] == one.pid";
    assert_eq!(worker.ask(child), json!(true));
    roll_back(&host, &id);
    assert_eq!(worker.ask(wait), nobody);
    // Init reaps what it does not know, and knows its commands.
    host.cli(["rm", &format!("box@{id}")]).ok();
    wait_within(60, "the template has ended", || hidden(&host).is_empty());
    assert_eq!(host.sh("box", "exit 7").code(), 7);
    assert!(worker.end().success());
}

fn libc_echild() -> i32 {
    nix::errno::Errno::ECHILD as i32
}

#[test]
fn numbers_that_wrap_around_stay_below_those_of_templates() {
    let Some(mut steady) = Steady::start() else { return };
    let first = checkpoint(&steady.host);
    set_last_pid(&steady.host, FIRST_HIDDEN - 20);
    let second = checkpoint(&steady.host);
    let forks = "import os
seen = []
for _ in range(60):
    pid = os.fork()
    if pid == 0: os._exit(0)
    seen.append(os.waitpid(pid, 0)[0])
print(min(seen), max(seen))";
    let seen = steady.python(forks).ok();
    let (low, high) = seen.split_once(' ').expect("two numbers");
    let (low, high): (u64, u64) = (low.parse().expect("a number"), high.parse().expect("a number"));
    assert!(low < 1000 && (FIRST_HIDDEN - 20..FIRST_HIDDEN).contains(&high), "{seen}");
    steady.outlives(&second, "in place", |host| drop(host.cli(["exec", "box", "--", "true"]).ok()));
    // Round they go while a checkpoint is made as well.
    set_last_pid(&steady.host, FIRST_HIDDEN - 3);
    let third = checkpoint(&steady.host);
    assert!(steady.python("import os; print(os.getpid())").ok().parse::<u64>().expect("a number") < FIRST_HIDDEN);
    for id in [&third, &first] {
        steady.outlives(id, "fork", |host| drop(host.cli(["exec", "box", "--", "pkill", "-9", "python3"]).ok()));
    }
}

/// Programs get the next number after this.
fn set_last_pid(host: &Host, last: u64) {
    inside_numbers(host, &format!("echo {last} > /proc/sys/kernel/ns_last_pid"));
}

/// Runs a script in the sandbox's PID namespace, and else on the host.
fn inside_numbers(host: &Host, script: &str) -> String {
    in_pid_namespace(&host.init("box").to_string(), script)
}

fn in_pid_namespace(init: &str, script: &str) -> String {
    let output = Command::new("nsenter").args(["-t", init, "-p", "sh", "-c", script]).output().expect("nsenter");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[test]
fn an_engine_that_dies_while_numbers_are_raised_leaves_them_as_they_were() {
    for (fault, user) in [
        ("moment.take:kill", "0"),
        ("template.born:kill", "0"),
        ("template.cloned:kill", "0"),
        ("moment.hidden:kill", "0"),
        ("template.attended:kill", "1000"),
        ("template.cloned:kill", "1000"),
        ("moment.hidden:kill", "1000"),
    ] {
        let Some(mut steady) = Steady::start_with(&[("DELTABOX_FAULT", fault)], user) else { return };
        let init = steady.host.init("box").to_string();
        let pid_max = || in_pid_namespace(&init, "cat /proc/sys/kernel/pid_max");
        assert_ne!(steady.host.cli(["checkpoint", "box"]).code(), 0, "{fault}");
        steady.host.wait_daemon();
        // Nobody has to come for that.
        wait_within(60, "init has put it back", || pid_max() == FIRST_HIDDEN.to_string());
        steady.host = steady.host.restart_without_faults();
        assert_eq!(steady.ask("", "n"), json!(1), "{fault}");
        wait_within(60, "its templates are gone", || hidden(&steady.host).is_empty());
        let own: u64 = steady.host.sh("box", "echo $$").ok().parse().expect("a number");
        assert!(own < FIRST_HIDDEN, "{own} after {fault}");
        let id = checkpoint(&steady.host);
        steady.outlives(&id, "in place", |host| drop(host.cli(["exec", "box", "--", "true"]).ok()));
        assert_eq!(pid_max(), FIRST_HIDDEN.to_string());
    }
}

#[test]
fn templates_stay_hidden_after_a_restart_and_no_number_is_given_twice() {
    let Some(mut steady) = Steady::start() else { return };
    let ids: Vec<_> = (0..3).map(|_| checkpoint(&steady.host)).collect();
    let before = hidden(&steady.host);
    steady.host.end_daemon(nix::sys::signal::Signal::SIGKILL);
    steady.host.start_daemon();
    assert_eq!(hidden(&steady.host), before);
    checkpoint(&steady.host);
    let after = hidden(&steady.host);
    assert_eq!(after.len(), 4, "{after:?}");
    assert_eq!(steady.python(REACH).ok(), "done");
    for id in &ids {
        steady.outlives(id, "fork", |host| drop(host.cli(["exec", "box", "--", "pkill", "-9", "python3"]).ok()));
    }
}

#[test]
fn a_program_without_rights_has_hidden_templates_and_the_next_number_is_the_next() {
    let Some(mut steady) = Steady::start_with(&[], "1000") else { return };
    let before: u64 = steady.host.sh("box", "echo $$").ok().parse().expect("a number");
    let ids: Vec<_> = (0..3).map(|_| checkpoint(&steady.host)).collect();
    let after: u64 = steady.host.sh("box", "echo $$").ok().parse().expect("a number");
    assert!((before + 1..before + 10).contains(&after), "{before} and then {after}");
    assert_eq!(hidden(&steady.host).len(), 3);
    for id in &ids {
        steady.outlives(id, "in place", |host| drop(host.cli(["exec", "box", "--", "true"]).ok()));
    }
}

#[test]
fn a_kill_of_everyone_does_and_says_what_it_does_without_a_filter() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let plain = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "sh", "-c", "/usr/bin/python3 -c \"$1\"; true", "sh", EVERYONE])
        .output()
        .expect("unshare");
    let plain = String::from_utf8(plain.stdout).expect("text");
    assert!(plain.ends_with("alone ESRCH\n"), "{plain}");
    let here = host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", EVERYONE]);
    assert_eq!(here.stdout, plain, "{}", here.stderr);
    // Nor do templates make a difference.
    host.cli(["exec", "-d", "box", "--", "sleep", "1000"]).ok();
    checkpoint(&host);
    host.cli(["exec", "box", "--", "pkill", "sleep"]).ok();
    wait_within(60, "it is alone", || n_processes(&host) == 1);
    let here = host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", EVERYONE]);
    assert_eq!(here.stdout, plain, "{}", here.stderr);
}

#[test]
fn a_kill_of_everyone_that_is_under_way_at_a_stop_is_done_once_and_says_so() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    // Three callers, who count; and one that counts what it gets of one of them.
    worker.ask(
        "import mmap, signal, struct, time
shared = mmap.mmap(-1, 4096)
def add(at, n=1): shared[at*8:at*8+8] = struct.pack('q', look(at) + n)
def look(at): return struct.unpack('q', shared[at*8:at*8+8])[0]
receiver = os.fork()
if receiver == 0:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    shared[4000:4001] = b'r'
    while True:
        signal.sigwaitinfo([signal.SIGRTMIN])
        add(9)
while shared[4000:4001] != b'r': time.sleep(0.001)
signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
callers = []
for me in range(3):
    pid = os.fork()
    if pid == 0:
        while True:
            try:
                if me == 0:
                    os.kill(-1, signal.SIGRTMIN)
                    time.sleep(0.0002)
                else:
                    os.kill(-1, 0)
                add(me)
            except OSError:
                add(me + 3)
    callers.append(pid)",
    );
    let mut counts =
        || -> Vec<i64> { serde_json::from_value(worker.ask("[look(at) for at in range(6)]")).expect("numbers") };
    let mut id = checkpoint(&host);
    for round in 0..30 {
        let before = counts();
        wait_within(60, "each of them goes on", || {
            let now = counts();
            assert_eq!(now[3..], [0, 0, 0], "a call failed, in round {round}");
            now[..3].iter().zip(&before).all(|(now, before)| now > before)
        });
        if round % 3 == 2 {
            roll_back(&host, &id);
        } else {
            id = checkpoint(&host);
        }
    }
    // Each call was heard once: at rest as many have come as were sent.
    let rest = "for pid in callers: os.kill(pid, signal.SIGKILL)
for pid in callers: os.waitpid(pid, 0)
time.sleep(0.3)
[look(0), look(9)]";
    let [sent, heard]: [i64; 2] = serde_json::from_value(worker.ask(rest)).expect("numbers");
    // The last one was heard and not counted, perhaps.
    assert!((sent..=sent + 1).contains(&heard), "{sent} sent, {heard} heard");
    assert!(worker.end().success());
}
