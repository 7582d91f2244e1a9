//! Memory, threads, signals and timers of a program.

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root};
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
fn files_and_memory_go_back_together_to_any_node_any_number_of_times() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("import random, hashlib; random.seed(7); heap = [bytes([n % 256]) * 5000 for n in range(2000)]");
    worker.ask("def look(): return [open('/srv/n').read(), n, random.getstate()[1][:5], hashlib.sha256(b''.join(heap)).hexdigest()]");
    let step = "open('/srv/n', 'w').write(str(n)); heap[random.randrange(2000)] = random.randbytes(9000); heap.append(b'x' * n)";
    let mut nodes = Vec::new();
    for n in 0..5 {
        worker.ask(&format!("n = {n}"));
        worker.ask(step);
        let look = worker.ask("look()");
        nodes.push((checkpoint(&host), look));
    }
    for at in [2, 2, 4, 0, 1, 4, 3, 0] {
        let (id, look) = &nodes[at];
        let report = roll_back(&host, id);
        assert_eq!(report["processes"], json!([{"pid": 2, "how": "in place"}]));
        assert_eq!(worker.ask("look()"), *look, "at {id}");
        // Lost at the next rollback.
        worker.ask("n = 77");
        worker.ask(step);
        worker.ask("heap = heap[:10]; del look");
    }
    roll_back(&host, &nodes[1].0);
    assert_eq!(worker.ask("look()"), nodes[1].1);
    assert!(worker.end().success());
}

#[test]
fn a_program_goes_on_where_it_was_while_it_computes() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import threading, time
count, go_on, phase = [0] * 4, True, 'before'
def run(k):
    while go_on:
        count[k] += 1
        if count[k] % 1000 == 0: time.sleep(0.001)
threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(4)]
for thread in threads: thread.start()",
    );
    let before = worker.ask("count[:]");
    let id = checkpoint(&host);
    for change in ["phase = 'later'", "phase = 'later'; go_on = False; [thread.join() for thread in threads]"] {
        for _ in 0..5 {
            worker.ask(change);
            roll_back(&host, &id);
            assert_eq!(worker.ask("phase"), json!("before"));
            for k in 0..4 {
                let [first, then, last] = [&before, &worker.ask("count[:]"), &worker.ask("time.sleep(0.1); count[:]")]
                    .map(|counts| counts[k].as_u64().expect("a count"));
                assert!(first <= then && then < last, "thread {k}: {first} <= {then} < {last}");
            }
        }
    }
    worker.ask("go_on = False; [thread.join() for thread in threads]");
    assert!(worker.end().success());
}

#[test]
fn handlers_timers_and_waiting_signals_go_back() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import signal
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append('one'))
signal.signal(signal.SIGUSR2, lambda *_: got.append('two'))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
os.kill(os.getpid(), signal.SIGUSR2)
signal.setitimer(signal.ITIMER_REAL, 1000, 5)",
    );
    let id = checkpoint(&host);
    for _ in 0..2 {
        worker.ask(
            "signal.setitimer(signal.ITIMER_REAL, 0)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
os.kill(os.getpid(), signal.SIGHUP)",
        );
        assert_eq!(worker.ask("got"), json!(["two"]));
        roll_back(&host, &id);
        assert_eq!(worker.ask("[got, sorted(signal.sigpending())]"), json!([[], [12]]));
        assert_eq!(worker.ask("signal.getitimer(signal.ITIMER_REAL)[0] > 900"), json!(true));
        worker.ask("os.kill(os.getpid(), signal.SIGUSR1)");
        assert_eq!(worker.ask("got"), json!(["one"]));
        roll_back(&host, &id);
    }
    assert!(worker.end().success());
}

#[test]
fn memory_that_processes_share_goes_back_for_all_of_them() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import mmap, time
shared = mmap.mmap(-1, 1 << 20); memfd = os.memfd_create('named'); os.truncate(memfd, 8192)
named = mmap.mmap(memfd, 8192); os.lseek(memfd, 5, 0)
shared[:5] = b'first'; shared[700000:700005] = b'later'; named[:3] = b'old'
child = os.fork()
if child == 0:
    os.close(1)
    while True:
        # Answers in the shared memory itself, and keeps one word of its own.
        if shared[100] == 1: shared[200:205] = shared[:5]; shared[205:208] = named[:3]; shared[100] = 2
        time.sleep(0.001)
def ask_child():
    shared[100] = 1
    while shared[100] != 2: time.sleep(0.001)
    return shared[200:208].decode()",
    );
    assert_eq!(worker.ask("ask_child()"), "firstold");
    let id = checkpoint(&host);
    for change in [
        "shared[:5] = b'other'; named[:3] = b'new'; shared[300000] = 7; shared[700000:700005] = bytes(5)",
        "shared.close(); named.close(); os.close(memfd); shared = named = mmap.mmap(-1, 4096)",
        "os.truncate(memfd, 4096); os.pwrite(memfd, b'new', 0); os.lseek(memfd, 0, 0)",
        "shared.resize(1 << 19); named[:3] = b'new'",
    ] {
        for _ in 0..2 {
            worker.ask(change);
            roll_back(&host, &id);
            let look = "[shared[:5].decode(), shared[700000:700005].decode(), shared[300000], named[:3].decode()]";
            assert_eq!(worker.ask(look), json!(["first", "later", 0, "old"]), "after {change}");
            assert_eq!(worker.ask("[os.lseek(memfd, 0, 1), os.fstat(memfd).st_size]"), json!([5, 8192]));
            assert_eq!(worker.ask("shared[:5] = b'again'; os.pwrite(memfd, b'O', 0); ask_child()"), "againOld");
            roll_back(&host, &id);
        }
    }
    worker.ask("os.kill(child, 9); os.wait()");
    let other = checkpoint(&host);
    worker.ask("shared[:5] = b'other'");
    roll_back(&host, &other);
    assert_eq!(worker.ask("shared[:5].decode()"), "first");
    assert!(worker.end().success());
}

#[test]
fn a_file_mapped_shared_goes_back_with_the_mapping() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import mmap
f = open('/srv/mapped', 'w+b'); f.write(b'old' + bytes(8189)); f.flush()
shared = mmap.mmap(f.fileno(), 8192)",
    );
    let id = checkpoint(&host);
    for change in
        ["shared[:3] = b'new'", "shared.close(); os.unlink('/srv/mapped')", "shared[4096:4099] = b'new'; f.close()"]
    {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(
            worker.ask("[shared[:3].decode(), open('/srv/mapped', 'rb').read(3).decode()]"),
            json!(["old", "old"])
        );
        worker.ask("shared[4096:4099] = b'mid'; f.seek(4096)");
        assert_eq!(
            worker.ask("[f.read(3).decode(), open('/srv/mapped', 'rb').read()[4096:4099].decode()]"),
            json!(["mid", "mid"])
        );
        roll_back(&host, &id);
        assert_eq!(worker.ask("shared[4096]"), json!(0));
    }
    assert!(worker.end().success());
}

#[test]
fn limits_masks_names_and_priorities_go_back() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import resource, ctypes
prctl = ctypes.CDLL(None).prctl
os.umask(0o027); os.setpriority(os.PRIO_PROCESS, 0, 5); prctl(15, b'named', 0, 0, 0); prctl(1, 10, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300)); os.setgroups([5, 6])
def look():
    name, umask = ctypes.create_string_buffer(16), os.umask(0)
    os.umask(umask); prctl(16, name, 0, 0, 0)
    death = ctypes.c_int(); prctl(2, ctypes.byref(death), 0, 0, 0)
    return [umask, os.nice(0), name.value.decode(), death.value, resource.getrlimit(resource.RLIMIT_NOFILE), os.getgroups(), os.geteuid()]",
    );
    let id = checkpoint(&host);
    let expected = json!([23, 5, "named", 10, [200, 300], [5, 6], 0]);
    for change in [
        "os.umask(0); os.nice(3); prctl(15, b'other', 0, 0, 0); prctl(1, 0, 0, 0, 0); os.setgroups([])",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 300)); os.seteuid(1000)",
    ] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), expected, "after {change}");
        }
    }
    // What a process cannot take back: it is made again.
    worker.ask("os.setgid(1000); os.setuid(1000)");
    let report = roll_back(&host, &id);
    assert_eq!(report["processes"][0]["how"], json!("fork"));
    assert_eq!(worker.ask("look()"), expected);
    assert!(worker.end().success());
}

/// For the worker: calls of the kernel, and a child that makes them too and is ended by its parent.
const CALLS: &str = r"
import ctypes, json, time
libc = ctypes.CDLL(None, use_errno=True); libc.syscall.restype = ctypes.c_long
def call(number, *words):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(word) if isinstance(word, int) else word for word in words])
    if result == -1: raise OSError(ctypes.get_errno(), f'call {number}')
    return result
def room(n_pages, flags=0x22, file=-1): return call(9, 0, n_pages * 4096, 3, flags, file, 0)
def poke(at, value): ctypes.memmove(at, value, len(value))
def peek(at, n): return ctypes.string_at(at, n).decode()
def flags(at):
    found = False
    for line in open('/proc/self/smaps'):
        first = line.split(' ')[0]
        if '-' in first: start, end = (int(one, 16) for one in first.split('-')); found = start <= at < end
        elif found and line.startswith('VmFlags'): return line.split()[1:]
# Asks a child that touches it.
def is_guard(at):
    pid = os.fork()
    if pid == 0: ctypes.string_at(at, 1); os._exit(0)
    return os.waitpid(pid, 0)[1] & 127 == 11
class Child:
    def __init__(self):
        self.from_child, to_parent = os.pipe(); from_parent, self.to_child = os.pipe()
        self.pid = os.fork()
        while self.pid == 0:
            kind, text = json.loads(os.read(from_parent, 65536))
            try: answer = eval(text, globals()) if kind == 'value' else exec(text, globals())
            except BaseException as error: answer = repr(error)
            os.write(to_parent, json.dumps(answer).encode())
    def ask(self, text, kind='value'):
        os.write(self.to_child, json.dumps([kind, text]).encode()); return json.loads(os.read(self.from_child, 65536))
    def do(self, text): assert self.ask(text, 'do') is None
    def end(self): os.kill(self.pid, 9); os.waitpid(self.pid, 0)
child = Child()";

/// Sets up a worker and a child of it by `begin`; in both `look` says the same after each of `changes` and a rollback, and
/// after the child has ended.
fn goes_back(begin: &str, look: &str, changes: &[&str]) {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(CALLS);
    let do_both = |what: &str| format!("child.do({})\n{what}", serde_json::to_string(what).expect("a string"));
    let look_at_both = format!("[{look}, child.ask({})]", serde_json::to_string(look).expect("a string"));
    worker.ask(&do_both(begin));
    let expected = worker.ask(&look_at_both);
    assert_eq!(expected[0], expected[1], "{begin}");
    let mut id = checkpoint(&host);
    for round in 0..2 {
        for change in changes {
            worker.ask(&do_both(change));
            roll_back(&host, &id);
            assert_eq!(worker.ask(&look_at_both), expected, "round {round}, after {change}");
        }
        worker.ask("child.end()");
        roll_back(&host, &id);
        assert_eq!(worker.ask(&look_at_both), expected, "round {round}, after its end");
        // What was made again can be held again.
        id = checkpoint(&host);
    }
    worker.ask("child.end()");
    assert!(worker.end().success());
}

#[test]
fn guard_pages_are_those_of_the_checkpoint_again() {
    // MADV_GUARD_INSTALL and MADV_GUARD_REMOVE.
    goes_back(
        "a = room(20); poke(a, b'x' * 4096 * 20); call(28, a + 4096 * 3, 4096 * 2, 102)",
        "[peek(a, 2), [is_guard(a + 4096 * page) for page in range(8)], peek(a + 4096 * 9, 2)]",
        &[
            "call(28, a, 4096 * 20, 103); poke(a, b'z' * 4096 * 20)",
            "call(28, a + 4096 * 5, 4096, 102)",
            "call(28, a, 4096 * 20, 102)",
            "call(11, a, 4096 * 20)",
            "b = room(4); call(28, b, 4096 * 4, 102)",
        ],
    );
}

#[test]
fn a_checkpoint_after_guard_pages_came_and_went_is_one() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(CALLS);
    // Small enough to be compared with its template.
    worker.ask(&format!("child.do({:?})", "a = room(20); poke(a, b'x' * 4096 * 20)"));
    for advice in [102, 103, 102] {
        worker.ask(&format!("child.do('call(28, a, 4096, {advice})')"));
        let id = checkpoint(&host);
        worker.ask(&format!("child.do('call(28, a, 4096 * 9, {})')", 205 - advice));
        roll_back(&host, &id);
        assert_eq!(worker.ask("child.ask('is_guard(a)')"), json!(advice == 102));
        assert_eq!(worker.ask("child.ask('is_guard(a + 4096)')"), json!(false));
    }
    worker.ask("child.end()");
    assert!(worker.end().success());
}

#[test]
fn locks_and_seals_on_memory_are_those_of_the_checkpoint_again() {
    // mlock2 with MLOCK_ONFAULT, mlock, mseal.
    goes_back(
        "a = room(8); call(325, a, 4096 * 8, 1); b = room(4); call(149, b, 4096 * 4); c = room(4); poke(c, b'was'); call(462, c, 4096 * 4, 0)",
        "[sorted({'lo', 'lf', 'sl'} & set(flags(at))) for at in (a, b, c)] + [peek(c, 3)]",
        &[
            "call(150, a, 4096 * 8); call(150, b, 4096 * 4); poke(c, b'is ')",
            "call(149, a, 4096 * 8); call(325, b, 4096 * 4, 1)",
        ],
    );
}

#[test]
fn memory_files_with_seals_go_back() {
    // Seals: 2 against shrinking, 4 growing, 8 writing, 16 later writers. Mappings made before the last kind still write.
    goes_back(
        "
import fcntl
def sealed(seals, late=0):
    file = os.memfd_create('sealed', 2); os.write(file, b'was'); os.ftruncate(file, 4096)
    fcntl.fcntl(file, 1033, seals & ~16); at = 0 if seals & 8 else room(1, 1, file)
    fcntl.fcntl(file, 1033, seals)
    return file, at
files = [sealed(seals) for seals in (6, 22, 16, 14, 8, 4, 2)]",
        "[[os.pread(file, 3, 0).decode(), os.fstat(file).st_size, fcntl.fcntl(file, 1034), oct(os.fstat(file).st_mode)] for file, at in files] \
            + [peek(at, 3) for _, at in files if at]",
        &[
            "for file, at in files: at and poke(at, b'is ')",
            "for file, at in files: os.fchmod(file, 0o600)\nos.ftruncate(files[4][0], 9); os.ftruncate(files[5][0], 9); os.ftruncate(files[6][0], 9000)",
        ],
    );
}

#[test]
fn a_program_executed_from_a_memory_file_that_is_open_goes_on() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import subprocess
file = os.memfd_create('program', 1); os.write(file, open('/bin/sleep', 'rb').read())
child = subprocess.Popen([f'/proc/self/fd/{file}', '1000'], pass_fds=[file])",
    );
    let look = "[os.fstat(file).st_size == os.path.getsize('/bin/sleep'), child.poll()]";
    let id = checkpoint(&host);
    for change in ["pass", "child.kill(); child.wait()", "child.kill(); child.wait(); os.ftruncate(file, 5)"] {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(worker.ask(look), json!([true, null]), "after {change}");
    }
    worker.ask("child.kill(); child.wait()");
    assert!(worker.end().success());
}

#[test]
fn files_whose_names_are_any_bytes_are_mapped_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import mmap
names = [b'/srv/caf\\xe9\\xff', b'/srv/a\\nb', '/srv/\\uf7e9'.encode()]
shared = []
for n, name in enumerate(names):
    with open(name, 'w+b') as one: one.write(b'%d' % n + bytes(4095)); one.flush(); shared.append(mmap.mmap(one.fileno(), 4096))
def look(): return [one[:1].decode() for one in shared]",
    );
    let id = checkpoint(&host);
    for change in ["for one in shared: one[:1] = b'x'", "for one in shared: one.close()"] {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(worker.ask("look()"), json!(["0", "1", "2"]), "after {change}");
        assert_eq!(worker.ask("[open(name, 'rb').read(1).decode() for name in names]"), json!(["0", "1", "2"]));
    }
    assert!(worker.end().success());
}
