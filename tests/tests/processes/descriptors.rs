//! What programs hold.

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root};
use serde_json::json;

use crate::{checkpoint, refusal, roll_back};

fn start() -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start();
    host.create("box");
    let worker = Worker::start(&host, "box");
    Some((host, worker))
}

/// What each descriptor of the worker leads to, its own look at them left out.
const LOOK: &str = "def look():
    numbers = sorted(int(n) for n in os.listdir('/proc/self/fd'))
    links = {}
    for n in numbers:
        try: links[n] = os.readlink(f'/proc/self/fd/{n}')
        except OSError: pass
    return links";

#[test]
fn descriptors_are_those_of_the_checkpoint_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(LOOK);
    worker.ask(
        "import fcntl
os.makedirs('/srv/d'); open('/srv/d/f', 'w').write('0123456789')
a = os.open('/srv/d/f', os.O_RDWR); os.lseek(a, 4, 0); b = os.dup2(a, 20, inheritable=False)
c = os.open('/srv/d/f', os.O_WRONLY | os.O_APPEND)
d = os.open('/srv/d', os.O_RDONLY); p = os.open('/srv/d/f', os.O_PATH)
null = os.open('/dev/null', os.O_RDWR); stat = os.open('/proc/self/stat', os.O_RDONLY)
os.chdir('/srv/d'); os.set_inheritable(20, True)
fcntl.flock(c, fcntl.LOCK_EX); fcntl.lockf(a, fcntl.LOCK_EX, 3, 1)",
    );
    let links = worker.ask("look()");
    let id = checkpoint(&host);
    for change in [
        "os.lseek(a, 9, 0); os.write(c, b'more'); os.chdir('/')",
        "[os.close(n) for n in (a, b, c, d, p, null, stat)]",
        "[os.open('/dev/zero', os.O_RDONLY) for _ in range(300)]; os.dup2(null, a); os.set_inheritable(20, False)",
        "os.unlink('f'); os.chdir('..'); os.rmdir('d'); fcntl.fcntl(c, fcntl.F_SETFL, 0)",
    ] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), links, "after {change}");
            assert_eq!(worker.ask("[os.lseek(n, 0, 1) for n in (a, b)] + [os.getcwd()]"), json!([4, 4, "/srv/d"]));
            // One description behind both.
            assert_eq!(worker.ask("os.lseek(b, 7, 0); os.lseek(a, 0, 1)"), json!(7));
            assert_eq!(worker.ask("os.write(c, b'x'); os.pread(a, 20, 0).decode()"), json!("0123456789x"));
            assert_eq!(worker.ask("[os.get_inheritable(n) for n in (a, 20)]"), json!([false, true]));
            assert_eq!(worker.ask("os.listdir(d)"), json!(["f"]));
            let other = "import subprocess
subprocess.run([sys.executable, '-c', '''
import fcntl, os
f = os.open(\"/srv/d/f\", os.O_RDWR)
free = \"\"
for name, take in (\"flock\", lambda: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)), (\"lockf\", lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2)), (\"rest\", lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 9)):
    try: take(); free += name
    except OSError: pass
print(free)'''], stdout=subprocess.PIPE, text=True).stdout";
            assert_eq!(worker.ask(other), json!("rest\n"));
        }
    }
    assert!(worker.end().success());
}

#[test]
fn a_description_that_processes_share_is_shared_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import time
f = os.open('/srv/f', os.O_RDWR | os.O_CREAT)
child = os.fork()
if child == 0:
    os.close(1)
    while True:
        if os.path.exists('/srv/go'): os.write(f, b'c'); os.unlink('/srv/go')
        time.sleep(0.001)",
    );
    let ask = "os.write(f, b'p'); open('/srv/go', 'w').close()
while os.path.exists('/srv/go'): time.sleep(0.001)
os.write(f, b'p'); os.pread(f, 100, 0).decode()";
    assert_eq!(worker.ask(ask), json!("pcp"));
    let id = checkpoint(&host);
    for _ in 0..3 {
        assert_eq!(worker.ask(ask), json!("pcppcp"));
        let report = roll_back(&host, &id);
        assert_eq!(report["processes"].as_array().expect("processes").len(), 2);
    }
    worker.ask("os.kill(child, 9); os.wait()");
    assert!(worker.end().success());
}

#[test]
fn what_a_checkpoint_cannot_hold_is_refused_by_name() {
    let Some((host, mut worker)) = start() else { return };
    for (make, name) in [
        ("import socket; made = socket.socket(socket.AF_INET)", "a socket (socket:["),
        (
            "import ctypes; made = os.fdopen(ctypes.CDLL(None).inotify_init(), 'rb', buffering=0)",
            "an inotify instance (anon_inode:inotify)",
        ),
        (
            "made = os.fdopen(ctypes.CDLL(None).mq_open(b'/queue', 0o102, 0o600, None), 'rb', buffering=0)",
            "a POSIX message queue (/queue)",
        ),
        (
            "class Context:
    def __init__(self): self.at = ctypes.c_ulong(); assert ctypes.CDLL(None).syscall(206, 4, ctypes.byref(self.at)) == 0
    def __del__(self): ctypes.CDLL(None).syscall(207, self.at)
made = Context()",
            "an asynchronous I/O context (io_setup(2))",
        ),
        (
            "class Timer:
    def __init__(self): self.number = ctypes.c_int(); assert ctypes.CDLL(None).syscall(222, 0, None, ctypes.byref(self.number)) == 0
    def __del__(self): ctypes.CDLL(None).syscall(226, self.number)
made = Timer()",
            "a timer of timer_create(2)",
        ),
        // No file has changed, so nothing has to be handed to it now: on the way back it would have to.
        (
            "import resource
class Limit:
    def __init__(self): self.was = resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NOFILE, (5, self.was[1]))
    def __del__(self): resource.setrlimit(resource.RLIMIT_NOFILE, self.was)
made = Limit()",
            "has all descriptors open that its limit of 5 allows",
        ),
    ] {
        worker.ask(make);
        let refused = refusal(&host);
        assert!(refused.contains(name) && refused.contains("process"), "{refused}");
        worker.ask("del made");
        checkpoint(&host);
    }
    assert!(worker.end().success());
}

#[test]
fn pipes_and_what_waits_in_them_go_back() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import fcntl, time
r, w = os.pipe(); os.write(w, b'first'); os.set_blocking(r, False)
big, bigw = os.pipe(); fcntl.fcntl(bigw, 1031, 1 << 19); os.set_blocking(bigw, False)
n = os.write(bigw, b'x' * (1 << 20))
eof, gone = os.pipe(); os.write(gone, b'last'); os.close(gone)
gone, broken = os.pipe(); os.close(gone)
child = os.fork()
if child == 0:
    os.close(1)
    back, line = os.open('/srv/back', os.O_WRONLY | os.O_CREAT | os.O_APPEND), b''
    os.set_blocking(r, True)
    while True: os.write(back, os.read(r, 1))
while os.path.getsize('/srv/back') < 5 if os.path.exists('/srv/back') else True: time.sleep(0.001)",
    );
    let id = checkpoint(&host);
    let look = "def look():
    os.write(w, b'next')
    while os.path.getsize('/srv/back') < 9: time.sleep(0.001)
    try: os.write(broken, b'x'); epipe = False
    except BrokenPipeError: epipe = True
    return [open('/srv/back').read(), len(os.read(big, 1 << 20)), fcntl.fcntl(big, 1032), os.read(eof, 100).decode(), os.read(eof, 1).decode(), epipe]
look()";
    for change in
        ["pass", "[os.close(k) for k in (r, w, big, bigw, eof, broken)]", "os.write(w, b'unwanted'); time.sleep(0.05)"]
    {
        worker.ask(change);
        roll_back(&host, &id);
        let size = 1 << 19;
        assert_eq!(worker.ask(look), json!(["firstnext", size, size, "last", "", true]), "after {change}");
        roll_back(&host, &id);
    }
    worker.ask("os.kill(child, 9); os.wait()");
    assert!(worker.end().success());
}

#[test]
fn events_timers_and_what_waits_for_them_go_back() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import ctypes, select, signal, struct, time
libc = ctypes.CDLL(None, use_errno=True)
e = os.eventfd(7); s = os.eventfd(3, os.EFD_SEMAPHORE)
t = libc.timerfd_create(1, 0); libc.timerfd_settime(t, 0, struct.pack('4q', 1000, 0, 500, 0), None)
d = libc.timerfd_create(1, 0x800); libc.timerfd_settime(d, 0, struct.pack('4q', 0, 0, 0, 1000), None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
g = libc.signalfd(-1, struct.pack('16Q', 1 << 9, *[0] * 15), 0)
p = os.pidfd_open(os.getpid())
r, w = os.pipe()
poll, outer = select.epoll(), select.epoll()
for f in (r, e, g): poll.register(f, select.EPOLLIN)
outer.register(poll.fileno(), select.EPOLLIN)
time.sleep(0.01)
def look():
    left, every = struct.unpack('4q', (lambda b: (libc.timerfd_gettime(t, b), b.raw)[1])(ctypes.create_string_buffer(32)))[2::-2]
    before = sorted(f for f, _ in poll.poll(0))
    os.write(w, b'x'); os.kill(os.getpid(), signal.SIGUSR1)
    after = sorted(f for f, _ in poll.poll(0))
    return [os.eventfd_read(e), os.eventfd_read(s), 400 < left <= 500, every, struct.unpack('Q', os.read(d, 8))[0],
            before == [e], after == sorted([r, e, g]), bool(outer.poll(0)), os.read(g, 128)[:4].hex(), signal.pidfd_send_signal(p, 0)]",
    );
    let id = checkpoint(&host);
    let expected = json!([7, 1, true, 1000, 1, true, true, true, "0a000000", null]);
    for change in [
        "pass",
        "look()",
        "poll.unregister(r); poll.modify(e, 0); [os.close(f) for f in (t, d, g, p, s)]",
        "poll.close(); outer.close(); os.eventfd_write(e, 90); libc.timerfd_settime(t, 0, struct.pack('4q', 0, 0, 0, 0), None)",
    ] {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(worker.ask("look()"), expected, "after {change}");
        roll_back(&host, &id);
    }
    assert!(worker.end().success());
}

#[test]
fn files_in_proc_of_processes_that_have_ended_since_are_open_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import signal
child = os.fork()
if child == 0: signal.pause()
held = [os.open(path, os.O_RDONLY) for path in (f'/proc/{child}/stat', f'/proc/{child}/fd', '/proc/self/comm')]
os.lseek(held[0], 2, 0)
def look():
    at = os.lseek(held[0], 0, 1)
    is_the_childs = os.pread(held[0], 90, 0).split()[0] == b'%d' % child
    return [at, is_the_childs, sorted(os.listdir(held[1])) != [], os.pread(held[2], 16, 0).decode()]",
    );
    let expected = worker.ask("look()");
    let id = checkpoint(&host);
    let end = "os.kill(child, 9); os.wait()";
    for change in ["pass", "os.lseek(held[0], 0, 0)", end, &format!("{end}; [os.close(one) for one in held]")] {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(worker.ask("look()"), expected, "after {change}");
    }
    worker.ask(end);
    assert!(worker.end().success());
}

#[test]
fn descriptors_above_a_limit_that_was_lowered_move_and_go_back() {
    let Some((host, mut worker)) = start() else { return };
    // As a shell has with `ulimit -n`: its script is descriptor 255. A child has more files mapped than it may have open.
    worker.ask(
        "import ctypes, resource, time
map = ctypes.CDLL(None).mmap
map.restype, map.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
f = open('/srv/f', 'w+'); f.write('old'); f.flush(); os.dup2(f.fileno(), 255)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
shared = []
for n in range(40):
    with open('/srv/m%d' % n, 'w+b') as one: one.write(b'%4d' % n + bytes(4092)); one.flush(); shared.append(map(None, 4096, 3, 1, one.fileno(), 0))
def child():
    pid = os.fork()
    while pid == 0: time.sleep(1)
    return pid
pid = child()
def look():
    same = os.lseek(255, 0, 1) == f.tell() == 3
    return [same, os.pread(255, 9, 0).decode(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], [int(ctypes.string_at(one, 4)) for one in shared] == list(range(40)),
            os.path.exists(f'/proc/{pid}/fd/255'), sum('/srv/m' in line for line in open(f'/proc/{pid}/maps'))]",
    );
    let expected = worker.ask("look()");
    assert_eq!(expected, json!([true, "old", 20, true, true, 40]));
    for file in ["'/srv/one'", "'/srv/two'"] {
        // So that the root is another one.
        worker.ask(&format!("open({file}, 'w').close()"));
        let id = checkpoint(&host);
        assert_eq!(worker.ask("look()"), expected);
        for change in [
            "f.write('new'); f.flush(); os.close(255); ctypes.memmove(shared[7], b'8888', 4)",
            "for one in shared: ctypes.CDLL(None).munmap(ctypes.c_void_p(one), ctypes.c_size_t(4096))",
            "os.kill(pid, 9); os.waitpid(pid, 0)",
        ] {
            worker.ask(change);
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), expected, "after {change}");
        }
    }
    worker.ask("os.kill(pid, 9); os.waitpid(pid, 0)");
    assert!(worker.end().success());
}
