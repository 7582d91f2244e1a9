//! Numbers of docs/objects.md.

#![expect(clippy::print_stdout, reason = "a measurement is printed")]

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use deltabox::deltacr::objects::terminal::{Pair, Place, Terminal, open_slave};
use deltabox::deltacr::objects::{Epoll, Eventfd, Holder, Pidfd, Pipe, Settings, Signalfd, Spare, Timerfd, own_fdinfo};
use deltabox::sys::process::pidfd_open;
use deltabox::sys::{notify, timer};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll as Instance, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::stat::Mode;

const N: usize = 2000;

fn show<R>(what: &str, mut work: impl FnMut() -> R) {
    let mut times: Vec<Duration> = (0..N)
        .map(|_| {
            let begin = Instant::now();
            let result = work();
            let time = begin.elapsed();
            drop(result);
            time
        })
        .collect();
    times.sort_unstable();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_nanos();
    println!("{what:44} p50 {:>8} ns  p99 {:>8} ns", at(50), at(99));
}

/// Not a test: prints the numbers of docs/objects.md. Run with `--ignored --nocapture --test-threads 1`.
#[test]
#[ignore = "a measurement"]
fn measured_costs_of_each_kind() {
    let spare = Spare::new().expect("a pipe");
    for (name, size, n) in
        [("pipe, empty", 1 << 16, 0), ("pipe, 100 B", 1 << 16, 100), ("pipe, 64 KB", 1 << 16, 1 << 16)]
    {
        pipe(name, size, n, OFlag::empty(), &spare);
    }
    pipe("pipe, 1 MB", 1 << 20, 1 << 20, OFlag::empty(), &spare);
    pipe("pipe, 10 packets", 1 << 16, 1000, OFlag::O_DIRECT, &spare);
    let (read, _write) = nix::unistd::pipe().expect("a pipe");
    let settings = Settings::read(read.as_fd(), |_, _| None).expect("settings");
    show("settings: read", || Settings::read(read.as_fd(), |_, _| None).expect("settings"));
    show("settings: set", || settings.set(read.as_fd()).expect("set"));
    let event = EventFd::from_value(5).expect("an eventfd");
    let record = Eventfd::read(event.as_fd()).expect("an eventfd");
    show("fdinfo: read", || own_fdinfo(event.as_fd()).expect("fdinfo"));
    show("eventfd: read, with fdinfo", || Eventfd::read(event.as_fd()).expect("an eventfd"));
    show("eventfd: make", || record.make().expect("an eventfd"));
    let ticking = timer::create(libc::CLOCK_MONOTONIC).expect("a timer");
    let setting = timer::Setting { value: Duration::from_secs(9), interval: Duration::from_secs(9) };
    timer::set(ticking.as_fd(), 0, setting).expect("set");
    let record = Timerfd::read(ticking.as_fd()).expect("a timer");
    show("timer: read, with fdinfo", || Timerfd::read(ticking.as_fd()).expect("a timer"));
    show("timer: make", || record.make().expect("a timer"));
    let signals = notify::signalfd(0x200).expect("a signalfd");
    let record = Signalfd::read(signals.as_fd()).expect("a signalfd");
    show("signalfd: read, with fdinfo", || Signalfd::read(signals.as_fd()).expect("a signalfd"));
    show("signalfd: make", || record.make().expect("a signalfd"));
    epoll();
    let own = pidfd_open(nix::unistd::getpid().as_raw()).expect("a pidfd");
    let record = Pidfd::parse(&own_fdinfo(own.as_fd()).expect("fdinfo"), 0).expect("a pidfd");
    show("pidfd: make", || record.make(record.pid()).expect("a pidfd"));
    show("pidfd of what has ended: make", || record.make(None).expect("a pidfd"));
    for (what, typed) in
        [("terminal, nothing typed", &b""[..]), ("terminal, a command and a half typed", b"make test\nls -l")]
    {
        for place in [Place::Outside, Place::Inside] {
            terminal(&format!("{what}, {place:?}"), typed, place);
        }
    }
}

fn pipe(name: &str, size: i32, n: usize, flags: OFlag, spare: &Spare) {
    let (read, write) = nix::unistd::pipe2(flags | OFlag::O_NONBLOCK).expect("a pipe");
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(size)).expect("a size");
    let portion = if flags.is_empty() { n } else { 100 };
    for _ in 0..n.checked_div(portion).unwrap_or(0) {
        nix::unistd::write(&write, &vec![b'x'; portion]).expect("write");
    }
    let ends = [read.as_fd(), write.as_fd()];
    let record = Pipe::read(&ends, spare).expect("a pipe");
    show(&format!("{name}: read"), || Pipe::read(&ends, spare).expect("a pipe"));
    show(&format!("{name}: make"), || record.make().expect("a pipe"));
}

fn epoll() {
    let instance = Instance::new(EpollCreateFlags::empty()).expect("an epoll instance");
    let events: Vec<EventFd> = (0..10).map(|_| EventFd::new().expect("an eventfd")).collect();
    for event in &events {
        instance.add(event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    }
    let holder = Holder { task: nix::unistd::gettid().as_raw(), number: instance.0.as_raw_fd() };
    let fdinfo = own_fdinfo(instance.0.as_fd()).expect("fdinfo");
    let record = Epoll::read(&fdinfo, &[holder]).expect("an epoll instance");
    show("epoll, 10 targets: fdinfo", || own_fdinfo(instance.0.as_fd()).expect("fdinfo"));
    show("epoll, 10 targets: read", || Epoll::read(&fdinfo, &[holder]).expect("an epoll instance"));
    show("epoll: make", || record.make().expect("an epoll instance"));
}

fn terminal(name: &str, typed: &[u8], place: Place) {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let devpts = nix::fcntl::open("/dev/pts", flags, Mode::empty()).expect("/dev/pts");
    let mut master = std::fs::File::options().read(true).write(true).open("/dev/pts/ptmx").expect("a terminal");
    deltabox::sys::tty::order(master.as_fd(), deltabox::sys::tty::Order::Lock(false)).expect("unlock");
    let slave: OwnedFd = open_slave(master.as_fd(), libc::O_RDWR).expect("a slave");
    master.write_all(typed).expect("write");
    let pair = Pair { devpts: devpts.as_fd(), master: master.as_fd(), slave: Some(slave.as_fd()) };
    let record = Terminal::read(pair, place, |_| None).expect("a terminal");
    show(&format!("{name}: read"), || Terminal::read(pair, place, |_| None).expect("a terminal"));
    show(&format!("{name}: put back"), || record.put_back(pair).expect("put back"));
}
