//! Unix sockets between programs of a sandbox.

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
    let worker = Worker::start(&host, "box");
    Some((host, worker))
}

#[test]
fn pairs_and_what_waits_in_them_go_back() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import fcntl, struct, time
from socket import *
def pair(kind):
    a, b = socketpair(AF_UNIX, kind)
    a.setblocking(False); b.setblocking(False)
    return a, b
s, t = pair(SOCK_STREAM); s.send(b'to t'); t.send(b'x' * 50000); n = 50000
d, e = pair(SOCK_DGRAM); d.send(b'one'); d.send(b'two' * 1000); e.send(b'back')
p, q = pair(SOCK_SEQPACKET); p.send(b'1'); p.send(b'22'); q.send(b'333')
h, i = pair(SOCK_STREAM); h.send(b'half'); h.shutdown(SHUT_WR)
lone, gone = pair(SOCK_STREAM); gone.send(b'last words'); gone.close()
reset, gone = pair(SOCK_STREAM); reset.send(b'unread'); gone.close()
idle, other = pair(SOCK_STREAM); other.close()
fresh = socket(AF_UNIX, SOCK_STREAM); shared = s.dup(); s.setsockopt(SOL_SOCKET, SO_SNDBUF, 30000); s.set_inheritable(True)
def drain(f):
    got = []
    while True:
        try: m = f.recv(100000)
        except BlockingIOError: return got + ['waits']
        except OSError as x: got.append(type(x).__name__); continue
        if not m: return got + ['end']
        got.append(m.decode() if len(m) < 20 else len(m))
def look():
    blocking, size = shared.getblocking(), s.getsockopt(SOL_SOCKET, SO_SNDBUF)
    s.setblocking(True); shares = shared.fileno() != s.fileno() and not fcntl.fcntl(shared, 3) & os.O_NONBLOCK; s.setblocking(False)
    creds = struct.unpack('3i', t.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)) == (os.getpid(), os.getuid(), os.getgid())
    try: i.send(b'still'); writes = drain(h)
    except OSError as x: writes = str(x)
    answer = [drain(f) for f in (s, t, d, e, p, q, i, lone, reset, idle)] + [writes, shares, blocking, size, creds, s.get_inheritable()]
    shared.send(b'alive'); answer.append(drain(t))
    try: fresh.connect('/nowhere')
    except OSError as x: answer.append(type(x).__name__)
    return answer",
    );
    let wanted = json!([
        [50000, "waits"],
        ["to t", "waits"],
        ["back", "waits"],
        ["one", 3000, "waits"],
        ["333", "waits"],
        ["1", "22", "waits"],
        ["half", "end"],
        ["last words", "end"],
        ["ConnectionResetError", "end"],
        ["end"],
        ["still", "waits"],
        true,
        false,
        60000,
        true,
        true,
        ["alive", "waits"],
        "FileNotFoundError"
    ]);
    let id = checkpoint(&host);
    for change in [
        "pass",
        "look()",
        "s.close(); shared.close(); i.close(); h.close(); lone.close(); d.close()",
        "[os.close(f.fileno()) for f in (s, t, d, e, p, q, h, i, lone, reset, idle, fresh)]",
        "t.send(b'more'); p.send(b'more'); d.send(b'more'); s.shutdown(SHUT_RDWR); e.close()",
    ] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            // What a checkpoint has looked at is all there.
            checkpoint(&host);
            assert_eq!(worker.ask("look()"), wanted, "after {change}");
        }
    }
    assert!(worker.end().success());
}

#[test]
fn a_child_and_its_parent_go_on_talking() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import select, struct, time
from socket import *
ours, theirs = socketpair()
theirs.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
child = os.fork()
if child == 0:
    os.close(1); ours.close(); poll = select.epoll(); poll.register(theirs, select.EPOLLIN)
    total = 0
    while True:
        if total % 2: poll.poll()
        m, creds, _, _ = theirs.recvmsg(1, CMSG_SPACE(12))
        if not m: os._exit(7)
        total += m[0]
        theirs.send(b'%d %d\\n' % (total, struct.unpack('3i', creds[0][2])[0] == os.getppid()))
theirs.close()
def say(n):
    ours.send(bytes([n])); text = b''
    while not text.endswith(b'\\n'): text += ours.recv(100)
    return text.decode()",
    );
    assert_eq!(worker.ask("say(1)"), "1 1\n");
    let id = checkpoint(&host);
    let die = "os.kill(child, 9); os.waitpid(child, 0)[1]";
    for change in ["say(4)", die, "ours.close()", "say(1); say(2)"] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("[say(2), say(3)]"), json!(["3 1\n", "6 1\n"]), "after {change}");
        }
    }
    // Nobody else has an end.
    worker.ask("ours.close()");
    assert_eq!(worker.ask("os.waitpid(child, 0)[1] >> 8"), 7);
    assert!(worker.end().success());
}

#[test]
fn descriptors_on_their_way_are_waited_for_then_refused_by_name() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("from socket import *\na, b = socketpair(); a.send(b'x'); send_fds(a, [b'y'], [0])");
    let refused = crate::refusal(&host);
    assert!(refused.contains("a Unix socket with 1 descriptors on their way"), "{refused}");
    // Nothing was taken.
    assert_eq!(worker.ask("[b.recv(1).decode(), len(recv_fds(b, 9, 9)[1])]"), json!(["x", 1]));
    checkpoint(&host);
    assert!(worker.end().success());
}

#[test]
fn what_sends_descriptors_all_the_time_is_held() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import threading, time
from socket import *
a, b = socketpair(); laps = 0; goes = True
def run():
    global laps
    while goes:
        send_fds(a, [b'y'], [0]); [os.close(f) for f in recv_fds(b, 9, 9)[1]]; laps += 1; time.sleep(0.0005)
thread = threading.Thread(target=run); thread.start()",
    );
    let mut last = 0;
    for _ in 0..5 {
        let id = checkpoint(&host);
        roll_back(&host, &id);
        wait_within(60, "it goes on", || {
            let laps = worker.ask("laps").as_u64().expect("a number");
            std::mem::replace(&mut last, laps) < laps
        });
        last = 0;
    }
    worker.ask("goes = False; thread.join()");
    assert!(worker.end().success());
}

#[test]
fn python_multiprocessing_over_pipes_of_sockets() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import multiprocessing
fork = multiprocessing.get_context('fork')
here, there = fork.Pipe()
def serve():
    os.close(1); said = []
    while True: said.append(there.recv()); there.send(said)
served = fork.Process(target=serve, daemon=True); served.start()
def ask(what): here.send(what); return here.recv()",
    );
    assert_eq!(worker.ask("ask('a')"), json!(["a"]));
    // An answer waits.
    worker.ask("here.send('b')");
    let id = checkpoint(&host);
    for change in ["ask('c'); ask('d')", "served.kill(); served.join()"] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("[here.recv(), ask('e')]"), json!([["a", "b"], ["a", "b", "e"]]), "after {change}");
        }
    }
    worker.ask("served.kill(); served.join()");
    assert!(worker.end().success());
}

/// Listeners, with connections that were accepted: `path` is of a file, or begins with a zero byte.
const SERVED: &str = "import selectors, struct, threading, time
from socket import *
os.makedirs('/srv/run', exist_ok=True); os.chdir('/srv/run')
l = socket(AF_UNIX, SOCK_STREAM); l.bind(PATH); l.listen(7)
child = os.fork()
if child == 0:
    os.close(1); l.close(); os.chdir('/')
    c = socket(AF_UNIX, SOCK_STREAM); c.connect(PATH if PATH[0] == '\\0' else '/srv/run/s')
    c.send(b'hello'); total = 0
    while True:
        m = c.recv(1)
        if not m: os._exit(9)
        total += m[0]; c.send(b'%d\\n' % total)
a, _ = l.accept(); a.setblocking(False); l.setblocking(False)
poll = selectors.EpollSelector(); poll.register(l, selectors.EVENT_READ, 'l'); poll.register(a, selectors.EVENT_READ, 'a')
while not poll.select(1): pass
def ready(): return sorted(k.data for k, _ in poll.select(0.02))
def ask(n):
    a.send(bytes([n])); text = b''
    while not text.endswith(b'\\n'):
        try: text += a.recv(1)
        except BlockingIOError: time.sleep(0.001)
    return text.decode()
def look():
    who = [struct.unpack('3i', f.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))[0] for f in (a, l)]
    before = ready()
    said = [a.recv(5).decode(), ask(2), ask(3)]
    mode = os.stat('/srv/run/s').st_mode & 0o7777 if PATH[0] != '\\0' else 0
    c = socket(AF_UNIX, SOCK_STREAM); c.connect(PATH); after = ready(); b, _ = l.accept()
    c.send(b'new'); new = [b.recv(9).decode(), b.getsockname() == l.getsockname() == a.getsockname()]
    b.close(); c.close()
    return [who == [child, os.getpid()], before, said, after, new, mode, a.getblocking()]
";

#[test]
fn listeners_and_their_connections_go_back() {
    for (path, mode) in [("'s'", 0o750), ("'/srv/run/s'", 0o750), ("'\\0name'", 0)] {
        let Some((host, mut worker)) = start() else { return };
        worker.ask(&format!("PATH = {path}"));
        worker.ask(SERVED);
        if mode != 0 {
            worker.ask("os.chmod('/srv/run/s', 0o750)");
        }
        let wanted = json!([true, ["a"], ["hello", "2\n", "5\n"], ["l"], ["new", true], mode, false]);
        let id = checkpoint(&host);
        for change in [
            "pass",
            "ask(9)",
            "os.kill(child, 9); os.waitpid(child, 0)[0] == child",
            "a.close(); l.close(); os.waitpid(child, 0)[1] >> 8",
            "os.unlink(PATH) if PATH[0] != '\\0' else l.close()",
            "l.close(); k = socket(AF_UNIX, SOCK_STREAM); os.path.exists('s') and os.unlink('s'); k.bind(PATH); k.listen()",
        ] {
            worker.ask(change);
            for _ in 0..2 {
                roll_back(&host, &id);
                assert_eq!(worker.ask("look()"), wanted, "{path} after {change}");
            }
        }
        // The connection is theirs alone.
        worker.ask("a.close()");
        assert_eq!(worker.ask("os.waitpid(child, 0)[1] >> 8"), 9);
        assert!(worker.end().success());
    }
}

#[test]
fn programs_that_wait_in_accept_and_datagram_sockets_with_names_go_on() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "from socket import *
import time
child = os.fork()
if child == 0:
    os.close(1)
    l = socket(AF_UNIX, SOCK_SEQPACKET); l.bind('\\0waits'); l.listen()
    d = socket(AF_UNIX, SOCK_DGRAM); d.bind('\\0data')
    n = 0
    while True:
        c, _ = l.accept(); n += 1
        m, who = d.recvfrom(9)
        c.send(b'%d %s' % (n, m)); c.close()
def ask():
    c, d = socket(AF_UNIX, SOCK_SEQPACKET), socket(AF_UNIX, SOCK_DGRAM)
    while True:
        try: c.connect('\\0waits'); break
        except ConnectionRefusedError: time.sleep(0.001)
    d.sendto(b'x', '\\0data'); return c.recv(99).decode()",
    );
    assert_eq!(worker.ask("ask()"), "1 x");
    let id = checkpoint(&host);
    for change in ["ask()", "os.kill(child, 9); os.waitpid(child, 0)[0] == child", "pass"] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("[ask(), ask()]"), json!(["2 x", "3 x"]), "after {change}");
        }
    }
    worker.ask("os.kill(child, 9); os.waitpid(child, 0)[0] == child");
    assert!(worker.end().success());
}

#[test]
fn python_socketserver_with_threads_goes_on_serving() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import multiprocessing, socketserver, threading
from socket import *
def serve():
    os.close(1); said = []
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                said.append(line.decode().strip()); self.wfile.write(','.join(said).encode() + b'\\n')
    class Server(socketserver.ThreadingUnixStreamServer): daemon_threads = True
    Server('/srv/server', Handler).serve_forever()
served = multiprocessing.get_context('fork').Process(target=serve, daemon=True); served.start()
import time
def dial():
    while True:
        try: c = socket(AF_UNIX); c.connect('/srv/server'); return c.makefile('rw')
        except (FileNotFoundError, ConnectionRefusedError): time.sleep(0.001)
def say(f, what): f.write(what + '\\n'); f.flush(); return f.readline().strip()
one, two = dial(), dial()",
    );
    assert_eq!(worker.ask("[say(one, 'a'), say(two, 'b')]"), json!(["a", "a,b"]));
    // An answer waits, or is being made.
    worker.ask("one.write('c\\n'); one.flush(); time.sleep(0.05)");
    let id = checkpoint(&host);
    for change in
        ["say(two, 'x')", "served.kill(); served.join()", "one.close(); two.close(); open('/srv/x', 'w').close()"]
    {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            let said = worker.ask("[one.readline().strip(), say(two, 'd'), say(dial(), 'e')]");
            assert_eq!(said, json!(["a,b,c", "a,b,c,d", "a,b,c,d,e"]), "after {change}");
        }
    }
    worker.ask("served.kill(); served.join()");
    assert!(worker.end().success());
}

#[test]
fn connections_that_nobody_has_accepted_wait_again_in_their_order() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "from socket import *
l = socket(AF_UNIX); l.bind('\\0queue'); l.listen(); l.settimeout(5)
one, two = socket(AF_UNIX), socket(AF_UNIX); one.connect('\\0queue'); two.connect('\\0queue')
def look():
    first, _ = l.accept(); second, _ = l.accept(); one.send(b'1'); two.send(b'2'); second.send(b'back')
    return [first.recv(9).decode(), second.recv(9).decode(), two.recv(9).decode()]",
    );
    let id = checkpoint(&host);
    for change in ["pass", "one.close()", "l.close(); two.close()"] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), json!(["1", "2", "back"]), "after {change}");
        }
    }
    // What was sent to it nobody can look at before it is accepted.
    roll_back(&host, &id);
    worker.ask("one.send(b'early')");
    let refused = crate::refusal(&host);
    assert!(refused.contains("nobody has accepted yet"), "{refused}");
    assert_eq!(worker.ask("l.accept()[0].recv(9).decode()"), "early");
    assert!(worker.end().success());
}

#[test]
fn an_engine_that_dies_in_a_checkpoint_has_taken_nothing_out_of_sockets() {
    if skipped_without_root() {
        return;
    }
    for fault in ["moment.take:kill", "switch.pivot:kill"] {
        let mut host = Host::start_with(&[("DELTABOX_FAULT", fault)]);
        host.create("box");
        let mut worker = Worker::start_as(&host, "box", &["/usr/bin/python3"]);
        worker.ask(
            "from socket import *
a, b = socketpair(AF_UNIX, SOCK_DGRAM); a.send(b'one'); a.send(b'two'); s, t = socketpair(); s.send(b'bytes')
l = socket(AF_UNIX); l.bind('/srv/l'); l.listen(); c = socket(AF_UNIX); open('/srv/f', 'w').close()",
        );
        assert_ne!(host.cli(["checkpoint", "box"]).code(), 0, "{fault}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        let look = "c.connect('/srv/l'); [b.recv(9).decode(), b.recv(9).decode(), t.recv(9).decode(), l.accept()[0].fileno() > 0]";
        assert_eq!(worker.ask(look), json!(["one", "two", "bytes", true]), "{fault}");
        checkpoint(&host);
        assert!(worker.end().success());
    }
}
