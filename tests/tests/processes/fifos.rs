//! FIFOs that are open: all who hold one, and who comes by its name, meet on it again.

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use serde_json::json;

use crate::{checkpoint, roll_back};

fn start() -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask(
        "import fcntl, select
os.mkfifo('/srv/fifo')
def opened(how): return os.open('/srv/fifo', how | os.O_NONBLOCK)
def flags(*fs): return [fcntl.fcntl(f, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK) for f in fs]
def polled(f):
    p = select.poll(); p.register(f, select.POLLIN | select.POLLOUT); return sum(e for _, e in p.poll(0))
def taken(f):
    try: return os.read(f, 1 << 20).decode()
    except BlockingIOError: return None",
    );
    Some((host, worker))
}

#[test]
fn content_ends_flags_and_size_are_those_of_the_checkpoint() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "r = opened(os.O_RDONLY); w = opened(os.O_WRONLY); b = opened(os.O_RDWR); fcntl.fcntl(w, fcntl.F_SETFL, 0)
fcntl.fcntl(w, 1031, 1 << 17); os.write(w, b'held')
def look(): return flags(r, w, b) + [fcntl.fcntl(r, 1032), os.readlink(f'/proc/self/fd/{r}')]",
    );
    let before = worker.ask("look()");
    let id = checkpoint(&host);
    assert_eq!(worker.ask("look()"), before);
    for change in [
        "taken(r); os.write(w, b'other'); fcntl.fcntl(r, fcntl.F_SETFL, 0); fcntl.fcntl(r, 1031, 4096)",
        "[os.close(f) for f in (r, w, b)]",
        "os.write(w, b' and more'); os.unlink('/srv/fifo')",
    ] {
        for _ in 0..2 {
            worker.ask(change);
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), before, "after {change}");
            // A newcomer meets them, and each end the others.
            let met = host.sh("box", "printf ' newcomer' > /srv/fifo");
            assert_eq!(met.code(), 0);
            assert_eq!(worker.ask("os.write(b, b' both'); taken(r)"), json!("held newcomer both"), "after {change}");
            roll_back(&host, &id);
        }
    }
    assert!(worker.end().success());
}

#[test]
fn a_full_fifo_and_one_without_its_other_end_stay_so() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("r = opened(os.O_RDONLY); w = opened(os.O_WRONLY); n = os.write(w, bytes(i % 251 for i in range(1 << 16))); import hashlib");
    let id = checkpoint(&host);
    for _ in 0..2 {
        worker.ask("os.close(r); os.close(w)");
        roll_back(&host, &id);
        assert_eq!(worker.ask("polled(w) & select.POLLOUT"), json!(0));
        assert_eq!(
            worker.ask("data = os.read(r, 1 << 20); [len(data), data == bytes(i % 251 for i in range(1 << 16))]"),
            json!([65536, true])
        );
    }
    worker.ask("os.write(w, b'last'); os.close(w)");
    let id = checkpoint(&host);
    for _ in 0..2 {
        assert_eq!(worker.ask("[os.read(r, 9).decode(), os.read(r, 9).decode()]"), json!(["last", ""]));
        roll_back(&host, &id);
    }
    worker.ask("os.read(r, 9); w = opened(os.O_WRONLY); os.close(r)");
    let id = checkpoint(&host);
    for _ in 0..2 {
        assert_eq!(
            worker.ask("try: os.write(w, b'x'); how = 'written'\nexcept BrokenPipeError: how = 'broken'\nhow"),
            json!("broken")
        );
        roll_back(&host, &id);
    }
    assert!(worker.end().success());
}

#[test]
fn a_reader_that_waits_for_its_first_writer_goes_on_waiting() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("r = opened(os.O_RDONLY)");
    assert_eq!(worker.ask("polled(r)"), json!(0), "no POLLHUP before the first writer");
    let id = checkpoint(&host);
    for _ in 0..2 {
        assert_eq!(worker.ask("polled(r)"), json!(0));
        worker.ask("w = opened(os.O_WRONLY); os.close(w)");
        assert_eq!(worker.ask("polled(r)"), json!(16));
        roll_back(&host, &id);
    }
    // The same when only files are held.
    host.cli(["checkpoint", "box", "--fs-only"]).ok();
    worker.ask("open('/srv/f', 'w').close()");
    host.cli(["checkpoint", "box", "--fs-only"]).ok();
    assert_eq!(worker.ask("polled(r)"), json!(0));
    assert!(worker.end().success());
}

#[test]
fn processes_on_both_sides_meet_again() {
    let Some((host, mut worker)) = start() else { return };
    let mut other = Worker::start(&host, "box");
    worker.ask("b = opened(os.O_RDWR)");
    other.ask("w = os.open('/srv/fifo', os.O_WRONLY)");
    worker.ask("r = os.open('/srv/fifo', os.O_RDONLY); os.close(b)");
    other.ask("os.write(w, b'first ')");
    let id = checkpoint(&host);
    for change in [
        "os.close(r)",
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_NONBLOCK); taken(r)",
        "os.unlink('/srv/fifo'); os.mkfifo('/srv/fifo')",
    ] {
        worker.ask(change);
        roll_back(&host, &id);
        other.ask("os.write(w, b'second ')");
        host.sh("box", "printf third > /srv/fifo").ok();
        assert_eq!(worker.ask("os.read(r, 100).decode()"), json!("first second third"));
    }
    assert!(other.end().success());
    assert_eq!(worker.ask("os.read(r, 100).decode()"), json!(""));
    assert!(worker.end().success());
}

#[test]
fn a_program_that_has_ended_since_meets_who_lives() {
    let Some((host, mut worker)) = start() else { return };
    let mut other = Worker::start(&host, "box");
    worker.ask("b = opened(os.O_RDWR)");
    let pid = other.ask("w = os.open('/srv/fifo', os.O_WRONLY); os.write(w, b'before '); os.getpid()");
    worker.ask("r = os.open('/srv/fifo', os.O_RDONLY); os.close(b)");
    other.tell("import time\nwhile not os.path.exists('/srv/go'): time.sleep(0.002)\nos.write(w, b'after')");
    let id = checkpoint(&host);
    for _ in 0..2 {
        host.sh("box", &format!("kill -9 {pid} || true")).ok();
        wait_within(60, "it has ended", || host.sh("box", &format!("test -e /proc/{pid}")).code() == 1);
        roll_back(&host, &id);
        host.sh("box", "touch /srv/go").ok();
        let both = "text = b''\nwhile len(text) < 12: text += os.read(r, 100)\ntext.decode()";
        assert_eq!(worker.ask(both), json!("before after"));
    }
    drop(other);
    roll_back(&host, &id);
    assert!(worker.end().success());
}

#[test]
fn a_fifo_without_a_name_is_held() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "os.chmod('/srv/fifo', 0o620); r = opened(os.O_RDONLY); w = opened(os.O_WRONLY); os.write(w, b'nameless'); os.unlink('/srv/fifo')
def look(): s = os.fstat(r); return [oct(s.st_mode), s.st_nlink, os.fstat(w).st_ino == s.st_ino, '(deleted)' in os.readlink(f'/proc/self/fd/{r}')]",
    );
    let before = worker.ask("look()");
    let id = checkpoint(&host);
    for change in ["taken(r)", "os.close(r); os.close(w)", "os.mkfifo('/srv/fifo')"] {
        for _ in 0..2 {
            worker.ask(change);
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), before);
            assert_eq!(
                worker.ask("os.write(os.open(f'/proc/self/fd/{w}', os.O_WRONLY), b'!'); taken(r)"),
                json!("nameless!")
            );
            assert_eq!(worker.ask("os.path.exists('/srv/fifo')"), json!(false));
        }
    }
    // And of the root that it was restored on.
    roll_back(&host, &id);
    let id = checkpoint(&host);
    worker.ask("taken(r)");
    roll_back(&host, &id);
    assert_eq!(worker.ask("taken(r)"), json!("nameless"));
    assert!(worker.end().success());
}

#[test]
fn who_waits_in_open_for_the_other_side_goes_on_waiting() {
    let Some((host, mut worker)) = start() else { return };
    let mut reader = Worker::start(&host, "box");
    let mut writer = Worker::start(&host, "box");
    worker.ask("os.mkfifo('/srv/other'); n = 1");
    reader.tell("text = open('/srv/fifo').read(); text");
    writer.tell("out = open('/srv/other', 'w'); out.write('written'); out.close(); 'done'");
    let waits = "import glob, time
def waiting():
    n = 0
    for path in glob.glob('/proc/[0-9]*/wchan'):
        try: n += 'wait_for_partner' in open(path).read() or 'fifo' in open(path).read()
        except OSError: pass
    return n";
    worker.ask(waits);
    wait_within(60, "both wait", || worker.ask("waiting()") == json!(2) || worker.ask("waiting()") == json!(0));
    let id = checkpoint(&host);
    for _ in 0..2 {
        assert_eq!(host.sh("box", "printf hello > /srv/fifo; cat /srv/other").ok(), "written");
        assert_eq!(reader.answer(), json!("hello"));
        assert_eq!(writer.answer(), json!("done"));
        roll_back(&host, &id);
    }
    assert_eq!(host.sh("box", "printf again > /srv/fifo; cat /srv/other").ok(), "written");
    assert_eq!(reader.answer(), json!("again"));
    assert_eq!(writer.answer(), json!("done"));
    for one in [worker, reader, writer] {
        assert!(one.end().success());
    }
}

#[test]
fn an_epoll_instance_waits_for_a_fifo_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("r = opened(os.O_RDONLY); e = select.epoll(); e.register(r, select.EPOLLIN)");
    let id = checkpoint(&host);
    for change in ["e.unregister(r)", "e.close(); os.close(r)"] {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(worker.ask("e.poll(0)"), json!([]));
        assert_eq!(
            worker.ask("w = opened(os.O_WRONLY); os.write(w, b'x'); e.poll(5) == [(r, select.EPOLLIN)]"),
            json!(true)
        );
        worker.ask("os.close(w)");
    }
    assert!(worker.end().success());
}
