//! The terminal of a session in a real sandbox, read and put back by the library under a shell that runs on: its master is
//! init's, its node belongs to a user namespace, its numbers are those of a PID namespace.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use deltabox::deltacr::objects::terminal::{Pair, Place, Terminal, index_of};
use deltabox::deltacr::objects::{ObjectError, ObjectKind, ObjectRefusal, kind_of};
use deltabox::deltacr::stop::{Request, while_stopped};
use deltabox::kernel::cgroups::Hierarchies;
use deltabox::sys::process::{pidfd_getfd, pidfd_open};
use deltabox::sys::tty::window_size;
use deltabox_tests::terminal::Terminal as Screen;
use deltabox_tests::{Host, skipped_without_root};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

const SHELL: [&str; 9] = ["exec", "-t", "-i", "--env", "PS1=ready$((1+1))> ", "a", "--", "bash", "--norc"];
const PROMPT: &str = "ready2> ";

/// Host PID and PID inside of the process with this command line.
fn find(host: &Host, command: &str) -> (i32, i32) {
    let report = host.cli(["ps", "--json", "a"]).json();
    let found = report["processes"].as_array().expect("processes").iter().find(|one| one["command"] == command);
    let found = found.expect("the process");
    let number = |key: &str| i32::try_from(found[key].as_i64().expect(key)).expect(key);
    (number("host_pid"), number("pid"))
}

/// Copies of a process's descriptors of a kind.
fn copies(pid: i32, kind: ObjectKind) -> Vec<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    let pidfd = pidfd_open(pid).expect("a process");
    let numbers = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    let numbers = numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_one = |number: &i32| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).expect("a link");
        let fdinfo = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).expect("fdinfo");
        kind_of(link.as_os_str().as_bytes(), &fdinfo) == kind
    };
    numbers.filter(is_one).map(|number| pidfd_getfd(pidfd.as_fd(), number).expect("a descriptor")).collect()
}

/// Stops everything but init and works on the shell's terminal.
fn at_terminal<R: Send>(host: &Host, shell: i32, work: impl FnOnce(Pair<'_>) -> R + Send) -> R {
    let init = host.init("a").as_raw();
    let own = fs::read_to_string(format!("/proc/{shell}/cgroup")).expect("cgroup");
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("a cgroup of version 2");
    let group: PathBuf = Hierarchies::find().expect("cgroups").unified.join(own);
    let deadline = Instant::now() + Duration::from_secs(30);
    let request = Request { group: &group, excluded: &[init], deadline };
    while_stopped(request, |_| {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let devpts = host.inside("a", "/dev/pts");
        let devpts = nix::fcntl::open(&devpts, flags, Mode::empty()).expect("/dev/pts");
        let slave = copies(shell, ObjectKind::Terminal).remove(0);
        let index = index_of(slave.as_fd()).expect("a terminal");
        let mut masters = copies(init, ObjectKind::TerminalMaster);
        masters.retain(|master| index_of(master.as_fd()).is_ok_and(|found| found == index));
        work(Pair { devpts: devpts.as_fd(), master: masters[0].as_fd(), slave: Some(slave.as_fd()) })
    })
    .expect("stop")
}

/// The number inside of a host PID.
fn inside(host_pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{host_pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("numbers");
    line.split_whitespace().last().expect("a number").parse().ok()
}

#[test]
fn what_was_typed_ahead_in_a_sandbox_outlives_a_look_and_comes_back() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let mut screen = Screen::run(&mut host.command(SHELL));
    screen.until(PROMPT);
    let (shell, shell_inside) = find(&host, "bash --norc");
    screen.type_in("cat\r");
    screen.until("\r\n");
    deltabox_tests::wait_within(60, "cat", || host.cli(["ps", "a"]).ok().contains("cat"));
    let (_, cat) = find(&host, "cat");
    screen.type_in("half");
    screen.until("half");
    let record = at_terminal(&host, shell, |pair| Terminal::read(pair, Place::Outside, inside).expect("a terminal"));
    assert_eq!((record.session(), record.foreground()), (Some(shell_inside), Some(cat)));
    // It is still the line that is being typed.
    screen.type_in("\x7f\x7fnd\r");
    screen.until("\r\nhand\r\n");
    screen.type_in("never");
    screen.until("never");
    screen.resize(30, 100);
    // Seen by init and not by the shell alone: its size is the terminal's.
    let is_resized = |pair: Pair<'_>| window_size(pair.master).is_ok_and(|size| size == (30, 100));
    deltabox_tests::wait_within(60, "a size", || at_terminal(&host, shell, is_resized));
    at_terminal(&host, shell, |pair| {
        let taken = record.make(pair.devpts).map(drop);
        assert!(matches!(taken, Err(ObjectError::Refused(ObjectRefusal::TerminalTaken { index: 0 }))));
        record.put_back(pair).expect("put back");
        record.announce_window(pair.master).expect("announce");
    });
    screen.type_in(" a line\r");
    screen.until("\r\nhalf a line\r\n");
    screen.type_in("\x04");
    screen.until(PROMPT);
    screen.type_in("stty -a | grep -c ' echo '; tty; stty size\r");
    screen.until("\r1\r\n/dev/pts/0\r\n30 100\r\n");
    screen.until(PROMPT);
    screen.type_in("exit 3\r");
    assert_eq!(screen.wait().code(), Some(3));
}
