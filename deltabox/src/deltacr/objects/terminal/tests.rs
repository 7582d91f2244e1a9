use super::*;
use crate::sys::tty::modes;

/// A devpts of its own would need a namespace: the machine's.
fn devpts() -> OwnedFd {
    nix::fcntl::open("/dev/pts", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
}

struct Both {
    devpts: OwnedFd,
    master: OwnedFd,
    slave: OwnedFd,
}

impl Both {
    fn new() -> Self {
        let devpts = devpts();
        let master = open_master(devpts.as_fd()).unwrap();
        order(master.as_fd(), Order::Lock(false)).unwrap();
        let slave = open_slave(master.as_fd(), libc::O_RDWR | libc::O_NONBLOCK).unwrap();
        Self { devpts, master, slave }
    }

    fn pair(&self) -> Pair<'_> {
        Pair { devpts: self.devpts.as_fd(), master: self.master.as_fd(), slave: Some(self.slave.as_fd()) }
    }

    fn read(&self, place: Place) -> Terminal {
        Terminal::read(self.pair(), place, |_| panic!("nobody's terminal")).unwrap()
    }

    /// Another pair in the place of this one, and the record's state.
    fn again(record: &Terminal) -> Self {
        let mut made = Self::new();
        // Its name is free or not, which is another test's matter.
        record.put_back(made.pair()).unwrap();
        if record.master.as_ref().is_some_and(|master| master.is_locked) {
            order(made.master.as_fd(), Order::Lock(false)).unwrap();
        }
        made.slave = open_slave(made.master.as_fd(), libc::O_RDWR | libc::O_NONBLOCK).unwrap();
        made
    }

    fn type_in(&self, bytes: &[u8]) {
        assert_eq!(nix::unistd::write(&self.master, bytes).unwrap(), bytes.len());
        // The kernel looks at it now, unless there is something to be read already.
        has(self.slave.as_fd(), PollFlags::POLLIN).unwrap();
    }

    /// What has been shown, once it is so much.
    fn shows(&self, n: usize) -> Vec<u8> {
        let mut all = self.shown();
        while all.len() < n {
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(5000_u16)), Ok(1), "{all:?}");
            all.extend(self.shown());
        }
        all
    }

    /// What a program that reads gets, one entry for each read.
    fn reads(&self) -> Vec<Vec<u8>> {
        let (mut all, mut buffer) = (Vec::new(), [0; 5000]);
        while has(self.slave.as_fd(), PollFlags::POLLIN).unwrap() {
            let n = nix::unistd::read(&self.slave, &mut buffer).unwrap();
            all.push(buffer[..n].to_vec());
        }
        all
    }

    /// What has been shown.
    fn shown(&self) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), [0; 5000]);
        while has(self.master.as_fd(), PollFlags::POLLIN).unwrap() {
            let n = nix::unistd::read(&self.master, &mut buffer).unwrap();
            all.extend(&buffer[..n]);
        }
        all
    }

    fn change(&self, change: impl FnOnce(&mut Modes)) {
        let mut modes = modes(self.master.as_fd()).unwrap();
        change(&mut modes);
        tty::set_modes(self.slave.as_fd(), &modes).unwrap();
    }
}

/// Waits until the other side is closed: a child of another test has it until its exec.
fn is_left_alone(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::from(5000_u16)).unwrap();
    fds[0].revents().unwrap().contains(PollFlags::POLLHUP)
}

fn raw(modes: &mut Modes) {
    modes.input = 0;
    modes.local &= !(libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN);
}

#[test]
fn lines_ends_and_the_line_being_typed_are_still_there_and_come_back() {
    let both = Both::new();
    both.type_in(b"one\rtwo\x04\x04lit\x16\x04eral\npart");
    let echo = b"one\r\ntwolit^\x08^Deral\r\npart";
    assert_eq!(both.shows(echo.len()), echo);
    let record = both.read(Place::Inside);
    // Nothing was echoed again, and nothing typed is missing.
    assert!(both.shown().is_empty());
    let expected = [&b"one\n"[..], b"two", b"", b"lit\x04eral\n"];
    let made = Both::again(&record);
    for both in [&both, &made] {
        assert_eq!(both.reads(), expected);
        both.type_in(b"\x7fy\n");
        assert_eq!(both.reads(), [b"pary\n"]);
        assert_eq!(both.shown(), b"\x08 \x08y\r\n");
    }
}

#[test]
fn what_was_typed_since_is_gone() {
    let both = Both::new();
    both.type_in(b"before\n");
    let record = both.read(Place::Outside);
    both.reads();
    both.type_in(b"rm -rf everything\nmore");
    record.put_back(both.pair()).unwrap();
    assert_eq!(both.reads(), [b"before\n"]);
    both.type_in(b"!\n");
    assert_eq!(both.reads(), [b"!\n"]);
}

#[test]
fn bytes_typed_at_a_program_that_takes_them_one_by_one_come_back_as_they_are() {
    let both = Both::new();
    both.change(raw);
    both.change(|modes| modes.characters[libc::VMIN] = 100);
    let all: Vec<u8> = (0..=255).collect();
    both.type_in(&all);
    let record = both.read(Place::Inside);
    let made = Both::again(&record);
    assert_eq!(modes(made.master.as_fd()).unwrap(), modes(both.master.as_fd()).unwrap());
    for both in [&both, &made] {
        both.change(|modes| modes.characters[libc::VMIN] = 1);
        assert!(both.reads().concat() == all);
    }
}

#[test]
fn nul_bytes_are_no_ends_of_files() {
    let both = Both::new();
    both.type_in(b"a\0b\n\0");
    let made = Both::again(&both.read(Place::Inside));
    made.type_in(b"c\n");
    assert_eq!(made.reads(), [&b"a\0b\n"[..], b"\0c\n"]);
}

#[test]
fn other_characters_that_end_lines_do_so_again() {
    let both = Both::new();
    both.change(|modes| {
        modes.characters[libc::VEOL] = b';';
        modes.characters[libc::VEOL2] = b':';
    });
    both.type_in(b"a;b:c");
    let record = both.read(Place::Inside);
    let made = Both::again(&record);
    made.type_in(b";");
    assert_eq!(made.reads(), [b"a;", b"b:", b"c;"]);
}

#[test]
fn more_than_fits_into_a_terminal_is_typed_again() {
    let both = Both::new();
    both.change(raw);
    let all: Vec<u8> = (0..9000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    both.type_in(&all);
    let record = both.read(Place::Inside);
    let made = Both::again(&record);
    assert!(both.reads().concat() == all);
    assert!(made.reads().concat() == all);
}

#[test]
fn more_lines_than_fit_into_a_terminal_are_typed_again() {
    let both = Both::new();
    both.change(|modes| modes.local &= !libc::ECHO);
    // As much as it takes at once, and what waits before it.
    let line = [b"x".repeat(99), b"\n".to_vec()].concat();
    for _ in 0..90 {
        both.type_in(&line);
    }
    let record = both.read(Place::Inside);
    let made = Both::again(&record);
    for both in [&both, &made] {
        let lines = both.reads();
        assert!(lines.len() == 90 && lines.iter().all(|one| *one == line), "{} lines", lines.len());
    }
}

#[test]
fn what_was_written_and_not_shown_yet_is_shown_once() {
    let both = Both::new();
    output::send(both.slave.as_fd(), both.master.as_fd(), &b"a line\n".repeat(2000)).unwrap();
    let record = both.read(Place::Inside);
    let shown = both.shown();
    assert!(shown == b"a line\r\n".repeat(2000));
    assert!(Both::again(&record).shown() == shown);
    // On the same pair what was written since is gone.
    nix::unistd::write(&both.slave, b"later").unwrap();
    record.put_back(both.pair()).unwrap();
    assert!(both.shown() == shown);
}

#[test]
fn all_that_fits_into_a_terminal_fits_again() {
    for portion in [1, 7, 80, 998, 1000, 1792, 4096] {
        let both = Both::new();
        both.change(|modes| modes.output &= !libc::OPOST);
        let portion = vec![b'x'; portion];
        let mut n = 0;
        // The kernel moves it on, and makes room, when it likes.
        let end = std::time::Instant::now() + std::time::Duration::from_millis(20);
        while std::time::Instant::now() < end {
            n += nix::unistd::write(&both.slave, &portion).unwrap_or(0);
        }
        let record = both.read(Place::Inside);
        assert_eq!((both.shown().len(), Both::again(&record).shown().len()), (n, n));
    }
}

#[test]
fn what_was_written_stays_for_a_client_outside() {
    let both = Both::new();
    nix::unistd::write(&both.slave, b"before ").unwrap();
    let record = both.read(Place::Outside);
    nix::unistd::write(&both.slave, b"after").unwrap();
    record.put_back(both.pair()).unwrap();
    assert_eq!(both.shown(), b"before after");
}

#[test]
fn output_that_was_stopped_is_stopped_again() {
    let both = Both::new();
    nix::unistd::write(&both.slave, b"shown").unwrap();
    both.type_in(b"\x13");
    let record = both.read(Place::Inside);
    let made = Both::again(&record);
    for both in [&both, &made] {
        assert_eq!(nix::unistd::write(&both.slave, b"x"), Err(Errno::EAGAIN));
        assert_eq!(both.shown(), b"shown");
        both.type_in(b"\x11");
        assert_eq!(nix::unistd::write(&both.slave, b" more").unwrap(), 5);
        assert_eq!(both.shown(), b" more");
    }
    // Stopped since the checkpoint.
    let record = both.read(Place::Outside);
    both.type_in(b"\x13");
    record.put_back(both.pair()).unwrap();
    assert_eq!(nix::unistd::write(&both.slave, b"x"), Ok(1));
}

#[test]
fn modes_size_owner_and_flags_come_back() {
    let both = Both::new();
    both.change(|modes| {
        modes.output &= !libc::ONLCR;
        modes.characters[libc::VINTR] = 7;
        modes.speeds = (9600, 9600);
        modes.control = modes.control & !libc::CBAUD | libc::B9600;
    });
    tty::set_window(both.master.as_fd(), Window { rows: 3, columns: 4, width: 5, height: 6 }).unwrap();
    order(both.slave.as_fd(), Order::Exclusive(true)).unwrap();
    order(both.master.as_fd(), Order::Lock(true)).unwrap();
    nix::unistd::fchown(&both.slave, Some(nix::unistd::Uid::from_raw(1000)), None).unwrap();
    crate::sys::fs::chmod(both.slave.as_fd(), 0o600).unwrap();
    let record = both.read(Place::Inside);
    let made = Both::new();
    record.put_back(made.pair()).unwrap();
    let index = ask(made.master.as_fd(), Ask::Index).unwrap();
    assert_eq!(made.read(Place::Inside), Terminal { index, ..record });
    let asked = |fd: &OwnedFd, what| ask(fd.as_fd(), what).unwrap();
    assert_eq!((asked(&made.slave, Ask::Exclusive), asked(&made.master, Ask::Locked)), (1, 1));
}

#[test]
fn a_window_outside_keeps_its_size() {
    let both = Both::new();
    let record = both.read(Place::Outside);
    let window = Window { rows: 50, columns: 132, width: 0, height: 0 };
    tty::set_window(both.master.as_fd(), window).unwrap();
    record.put_back(both.pair()).unwrap();
    record.announce_window(both.master.as_fd()).unwrap();
    assert_eq!(tty::window(both.slave.as_fd()).unwrap(), window);
}

#[test]
fn packet_mode_comes_back_without_a_word_of_what_was_done() {
    let both = Both::new();
    order(both.master.as_fd(), Order::PacketMode(true)).unwrap();
    nix::unistd::write(&both.slave, b"data").unwrap();
    let record = both.read(Place::Inside);
    let made = Both::again(&record);
    for both in [&both, &made] {
        assert!(!has(both.master.as_fd(), PollFlags::POLLPRI).unwrap());
        assert_eq!(both.shown(), b"\0data");
    }
    // A status that waits cannot be looked at.
    order(both.slave.as_fd(), Order::FlushInput).unwrap();
    let refused = Terminal::read(both.pair(), Place::Inside, |_| None);
    assert!(matches!(refused, Err(ObjectError::Refused(ObjectRefusal::PacketStatus { .. }))));
}

#[test]
fn a_master_without_slaves_keeps_what_it_shows_and_whether_it_was_hung_up() {
    for was_open in [true, false] {
        let devpts = devpts();
        let master = open_master(devpts.as_fd()).unwrap();
        if was_open {
            let slave = open_slave(master.as_fd(), libc::O_RDWR).unwrap();
            nix::unistd::write(&slave, &[b'x'; 6000]).unwrap();
            drop(slave);
            assert!(is_left_alone(&master));
        }
        let pair = Pair { devpts: devpts.as_fd(), master: master.as_fd(), slave: None };
        let record = Terminal::read(pair, Place::Inside, |_| None).unwrap();
        let made = open_master(devpts.as_fd()).unwrap();
        record.put_back(Pair { devpts: devpts.as_fd(), master: made.as_fd(), slave: None }).unwrap();
        for master in [&master, &made] {
            let is_hung_up =
                if was_open { is_left_alone(master) } else { has(master.as_fd(), PollFlags::POLLHUP).unwrap() };
            assert_eq!(is_hung_up, was_open);
            let mut buffer = [0; 5000];
            nix::fcntl::fcntl(master, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
            let mut n = 0;
            while let Ok(more @ 1..) = nix::unistd::read(master, &mut buffer) {
                n += more;
                has(master.as_fd(), PollFlags::POLLIN).unwrap();
            }
            assert_eq!(n, if was_open { 6000 } else { 0 });
            let expected = if was_open { Errno::EIO } else { Errno::EAGAIN };
            assert_eq!(nix::unistd::read(master, &mut buffer), Err(expected));
        }
    }
}

#[test]
fn both_sides_know_which_pair_they_are() {
    let both = Both::new();
    let index = ask(both.master.as_fd(), Ask::Index).unwrap();
    assert_eq!(index_of(both.master.as_fd()).unwrap(), index);
    assert_eq!(index_of(both.slave.as_fd()).unwrap(), index);
    let dead = make_dead(both.devpts.as_fd(), libc::O_RDWR).unwrap();
    assert!(is_left_alone(&dead) && index_of(dead.as_fd()).is_err());
    assert!(index_of(tempfile::tempfile().unwrap().as_fd()).is_err());
}

#[test]
fn a_pair_gets_its_name_back_only_if_it_is_free() {
    let devpts = devpts();
    // Names below may be freed and those above taken by other tests meanwhile.
    let has_shown = |_| {
        let both = Both::new();
        let record = both.read(Place::Inside);
        let taken = record.make(devpts.as_fd());
        let is_refused =
            |index| matches!(taken, Err(ObjectError::Refused(ObjectRefusal::TerminalTaken { index: i })) if i == index);
        assert!(is_refused(record.index()));
        drop(both);
        let Ok(made) = record.make(devpts.as_fd()) else { return false };
        assert_eq!(ask(made.as_fd(), Ask::Index).unwrap(), record.index());
        assert_eq!(ask(made.as_fd(), Ask::Locked).unwrap(), 0);
        true
    };
    assert!((0..100).any(has_shown));
}

#[test]
fn a_terminal_that_was_hung_up_stays_so() {
    let slave = make_dead(devpts().as_fd(), libc::O_RDWR).unwrap();
    assert!(is_left_alone(&slave));
    assert_eq!(nix::unistd::read(&slave, &mut [0; 1]), Ok(0));
    assert_eq!(nix::unistd::write(&slave, b"x"), Err(Errno::EIO));
    let link =
        nix::fcntl::readlink(format!("/proc/thread-self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&slave)).as_str());
    let link = std::os::unix::ffi::OsStringExt::into_vec(link.unwrap());
    assert_eq!(super::super::kind_of(&link, ""), super::super::ObjectKind::DeadTerminal);
}

#[test]
fn calls_of_sessions_say_what_they_do() {
    assert_eq!(take_terminal(3).args, [3, libc::TIOCSCTTY]);
    assert_eq!(bring_forward(3, 17).bytes, 17_i32.to_ne_bytes());
    assert_eq!(join_group(17).args, [0, 17]);
    assert_eq!(lead_session().nr, libc::SYS_setsid);
}
