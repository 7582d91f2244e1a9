//! Programs in a real sandbox, switched from root to root.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::deltafs::layer::{LayerId, RootLook};
use crate::engine::footing::Footing;
use crate::engine::{Config, CreateRequest, Engine, ExecRequest, OnDisconnect, Stdio};
use crate::latency::Operation;
use crate::sandbox::{BaseRef, PoolBounds, SandboxId};

struct Sandbox {
    engine: Engine,
    id: SandboxId,
    store: tempfile::TempDir,
    /// Frozen layers, the lowest first, then the live one's.
    layers: Vec<LayerId>,
    patience: Duration,
}

impl Sandbox {
    fn new() -> Self {
        let store = tempfile::TempDir::with_prefix("deltabox-test-").unwrap();
        let engine = Engine::open(&Config { store: store.path().to_owned(), pool: PoolBounds::default() }).unwrap();
        let (tell, told) = mpsc::channel();
        engine.create(CreateRequest::default(), Box::new(move |result| tell.send(result.unwrap()).unwrap()));
        let report = told.recv().unwrap();
        Self {
            engine,
            id: report.id,
            store,
            layers: vec![report.live_layer.file_name().unwrap().to_str().unwrap().parse().unwrap()],
            patience: Duration::from_secs(20),
        }
    }

    /// Starts a program that prints "ready" once it is, and "ok" (or what is wrong) in the end.
    fn start(&self, program: &str) -> Program {
        let request = ExecRequest {
            argv: vec!["/usr/bin/python3".into(), "-u".into(), "-c".into(), program.into()],
            env: Vec::new(),
            cwd: None,
            uid: 0,
            gid: None,
            stdio: Stdio::Log,
            on_disconnect: OnDisconnect::Leave,
        };
        let (tell, told) = mpsc::channel();
        self.engine.exec(&self.id, request, Box::new(|_| {}), Box::new(move |result| drop(tell.send(result.unwrap()))));
        let attachment = told.recv().unwrap();
        let log =
            self.store.path().join("sandboxes").join(self.id.as_str()).join(format!("logs/{}.log", attachment.pid));
        wait_for(&log, "ready", 1);
        Program { log, _attachment: attachment }
    }

    fn switch(&mut self, purpose: Purpose) -> Result<Switched, SwitchError> {
        let report = self.engine.inspect(&self.id).unwrap();
        let below = if purpose == Purpose::Discard { &self.layers[..self.layers.len() - 1] } else { &self.layers[..] };
        let below: Vec<_> = below.iter().rev().copied().collect();
        let layers = &self.engine.0.layers;
        let below = layers.known_stack(below.first().copied()).unwrap();
        let layer = layers.create(&below, &self.id, None, RootLook::first()).unwrap();
        let footing = Footing::new(&self.engine, &BaseRef::default()).unwrap();
        let mount = footing.mount(&self.engine, &below, &layer).unwrap();
        let ground = Ground {
            init: report.init_pid.unwrap(),
            group: &report.cgroup.join("live"),
            deadline: Instant::now() + self.patience,
        };
        let mut span = Span::begin(Operation::Checkpoint);
        let mut standing = Standing::default();
        let walks = Walks::new(Instant::now(), &mut standing);
        let next = || mount.try_clone().map(Some);
        let switched = switch(
            &mut Tracer::new(),
            &ground,
            Errand { purpose, processes: Processes::Kept },
            walks,
            None,
            next,
            &mut span,
        );
        for (phase, took) in span.phases() {
            println!("{phase}: {} us", took.as_micros());
        }
        if switched.is_ok() {
            if purpose == Purpose::Discard {
                self.layers.pop();
            }
            self.layers.push(layer.record().id);
        }
        switched
    }

    fn switch_and_drop(&mut self, purpose: Purpose) {
        match self.switch(purpose).unwrap() {
            Switched::Moved { old, .. } => drop(old.detach()),
            Switched::Unchanged { .. } => panic!("not moved"),
        }
    }

    fn inside(&self, path: &str) -> PathBuf {
        let pid = self.engine.inspect(&self.id).unwrap().init_pid.unwrap();
        PathBuf::from(format!("/proc/{pid}/root{path}"))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let (tell, told) = mpsc::channel();
        self.engine.remove(&self.id, Box::new(move |result| drop(tell.send(result))));
        let _ = told.recv();
    }
}

struct Program {
    log: PathBuf,
    _attachment: crate::engine::Attachment,
}

/// Waits until a log has a line `n` times.
fn wait_for(log: &Path, word: &str, n: usize) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let text = fs::read_to_string(log).unwrap_or_default();
        if text.lines().filter(|line| *line == word).count() >= n {
            return;
        }
        assert!(Instant::now() < end, "no `{word}` but: {text}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for the file that the test makes when it wants the program to go on.
const WAIT: &str = "
import os, time, sys, fcntl, struct, mmap, select
def wait(name):
    print('ready', flush=True)
    while not os.path.exists('/tmp/' + name): time.sleep(0.002)
def check(what, got, expected):
    if got != expected: print(what, repr(got), 'is not', repr(expected)); sys.exit(1)
";

fn story(program: &str, purposes: &[Purpose]) {
    let mut sandbox = Sandbox::new();
    let started = sandbox.start(&format!("{WAIT}\n{program}\nprint('ok', flush=True)"));
    for purpose in purposes {
        sandbox.switch_and_drop(*purpose);
    }
    fs::write(sandbox.inside("/tmp/go"), "").unwrap();
    wait_for(&started.log, "ok", 1);
}

#[test]
fn descriptors_go_on_where_they_were() {
    let program = r"
os.makedirs('/tmp/d/e')
w = open('/tmp/d/w', 'wb', 0); w.write(b'before')
a = os.open('/tmp/d/a', os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.write(a, b'one')
r = open('/usr/bin/env', 'rb', 0); head = r.read(4)
shared = os.dup(a)
os.chdir('/tmp/d/e')
d = os.open('.', os.O_RDONLY)
p = os.open('/tmp/d/w', os.O_PATH)
u = os.open('/tmp/d/gone', os.O_CREAT | os.O_RDWR); os.write(u, b'secret'); os.unlink('/tmp/d/gone')
s = os.open('/tmp/d/w', os.O_RDONLY); os.lseek(s, 3, 0)
m = mmap.mmap(os.open('/tmp/d/m', os.O_CREAT | os.O_RDWR), 0) if False else None
f = os.open('/tmp/d/m', os.O_CREAT | os.O_RDWR); os.ftruncate(f, 8192)
m = mmap.mmap(f, 8192); m[0:3] = b'abc'; os.close(f)
wait('go')
w.write(b'+after'); os.write(a, b'two'); os.write(shared, b'three')
check('w', open('/tmp/d/w','rb').read(), b'before+after')
check('a', open('/tmp/d/a','rb').read(), b'onetwothree')
check('head', head + r.read(4), open('/usr/bin/env','rb').read(8))
check('cwd', os.getcwd(), '/tmp/d/e')
open('relative', 'w').write('x'); check('relative', os.path.exists('/tmp/d/e/relative'), True)
check('dir', os.listdir(d), ['relative'])
check('path', os.fstat(p).st_size, 12)
os.write(u, b'!'); check('unlinked', os.pread(u, 99, 0), b'secret!')
check('read', os.read(s, 99), b'ore+after')
m[3:6] = b'def'; check('mapping', open('/tmp/d/m','rb').read(6), b'abcdef')
check('root', os.listdir('/proc/self/root/tmp/d') != [], True)
for fd in (w.fileno(), a, shared, r.fileno(), d, p, u, s):
    check('cloexec', os.get_inheritable(fd), False)
check('sharing', os.lseek(shared, 0, 1), os.lseek(a, 0, 1))
";
    story(program, &[Purpose::Freeze]);
    story(program, &[Purpose::Freeze, Purpose::Freeze, Purpose::Freeze]);
}

#[test]
fn locks_are_held_on_the_next_root_too() {
    let program = r#"
import subprocess
fl = os.open('/tmp/fl', os.O_CREAT | os.O_RDWR); fcntl.flock(fl, fcntl.LOCK_EX)
po = os.open('/tmp/po', os.O_CREAT | os.O_RDWR); po2 = os.open('/tmp/po', os.O_RDONLY)
fcntl.lockf(po, fcntl.LOCK_EX, 10, 5); fcntl.lockf(po2, fcntl.LOCK_SH, 10, 50)
of = os.open('/tmp/of', os.O_CREAT | os.O_RDWR)
F_OFD_SETLK = 37
fcntl.fcntl(of, F_OFD_SETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 7, 3, 0))
wait('go')
other = '''
import os, fcntl, struct
def refused(f):
    try: f()
    except OSError: return True
    return False
fl, po, of = (os.open('/tmp/' + n, os.O_RDWR) for n in ('fl', 'po', 'of'))
print(refused(lambda: fcntl.flock(fl, fcntl.LOCK_SH | fcntl.LOCK_NB)),
  refused(lambda: fcntl.lockf(po, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 5)), refused(lambda: fcntl.lockf(po, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 15)),
  refused(lambda: fcntl.lockf(po, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 50)), refused(lambda: fcntl.lockf(po, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 50)),
  refused(lambda: fcntl.fcntl(of, 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 9, 1, 0))),
  refused(lambda: fcntl.fcntl(of, 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 10, 1, 0))))
'''
seen = subprocess.run([sys.executable, '-c', other], capture_output=True, text=True)
check('refused', (seen.stdout.split(), seen.stderr), ('True True False False True True False'.split(), ''))
"#;
    story(program, &[Purpose::Freeze, Purpose::Freeze]);
}

#[test]
fn fifos_listeners_and_watches_go_on() {
    let program = r"
import socket, ctypes, threading
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs('/tmp/d/sub'); os.chdir('/tmp/d')
os.mkfifo('/tmp/ff'); ff = os.open('/tmp/ff', os.O_RDWR | os.O_NONBLOCK); os.write(ff, b'inside')
s = socket.socket(socket.AF_UNIX); s.bind('/tmp/sock'); os.chmod('/tmp/sock', 0o600); s.listen(3); s.setblocking(False)
rel = socket.socket(socket.AF_UNIX); rel.bind('sub/rel'); rel.listen(1)
ino = libc.inotify_init1(0)
gone = libc.inotify_add_watch(ino, b'/tmp/ff', 0x400); libc.inotify_rm_watch(ino, gone); os.read(ino, 4096)
wd = libc.inotify_add_watch(ino, b'/tmp/d', 0x100)
wf = libc.inotify_add_watch(ino, b'/tmp/ff', 0x2)
ep = select.epoll(); ep.register(ff, select.EPOLLIN); ep.register(s, select.EPOLLIN); ep.register(ino, select.EPOLLIN)
blocked = socket.socket(socket.AF_UNIX); blocked.bind('/tmp/blocked'); blocked.listen(1)
answers = []
def serve():
    while True:
        c, _ = blocked.accept(); c.sendall(c.recv(9)); c.close()
threading.Thread(target=serve, daemon=True).start()
before = os.stat('/tmp/sock')
wait('go')
check('epoll', ep.poll(0), [(ff, select.EPOLLIN)])
check('fifo', os.read(ff, 99), b'inside')
check('no event so far', ep.poll(0), [])
w = os.open('/tmp/ff', os.O_WRONLY); os.write(w, b'by name'); check('fifo by name', os.read(ff, 99), b'by name')
check('file event', struct.unpack('iIII', os.read(ino, 4096))[0:2], (wf, 2))
check('socket mode', (os.stat('/tmp/sock').st_mode, os.stat('/tmp/sock').st_mtime_ns), (before.st_mode, before.st_mtime_ns))
c = socket.socket(socket.AF_UNIX); c.connect('/tmp/sock'); check('listener', ep.poll(1), [(s.fileno(), select.EPOLLIN)]); a, _ = s.accept()
check('peer', struct.unpack('3i', c.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)), (os.getpid(), 0, 0))
c.sendall(b'hi'); check('accepted', a.recv(9), b'hi')
check('name', s.getsockname(), '/tmp/sock'); check('relative name', rel.getsockname(), 'sub/rel')
c = socket.socket(socket.AF_UNIX); c.connect('/tmp/d/sub/rel')
c = socket.socket(socket.AF_UNIX); c.connect('/tmp/blocked'); c.sendall(b'echo'); check('blocked accept', c.recv(9), b'echo')
open('/tmp/d/new', 'w').close()
event = os.read(ino, 4096); check('event', (struct.unpack('iIII', event[:16])[0:2], event[16:].rstrip(b'\0')), ((wd, 0x100), b'new'))
check('next watch', libc.inotify_add_watch(ino, b'/tmp', 0x100), wf + 1)
s.close(); os.unlink('/tmp/sock')
";
    story(program, &[Purpose::Freeze]);
    story(program, &[Purpose::Freeze, Purpose::Freeze]);
}

#[test]
fn a_connection_that_waits_is_waited_for_and_one_that_nobody_accepts_is_a_refusal() {
    let program = r"
import socket
s = socket.socket(socket.AF_UNIX); s.bind('/tmp/sock'); s.listen(8)
cs = [socket.socket(socket.AF_UNIX) for _ in range(3)]
for c in cs: c.connect('/tmp/sock'); c.sendall(b'hi')
print('ready', flush=True)
if MODE == 'late': time.sleep(0.3)
while MODE == 'never' and not os.path.exists('/tmp/go'): time.sleep(0.01)
for _ in cs: a, _ = s.accept(); check('accepted', a.recv(9), b'hi')
while not os.path.exists('/tmp/go'): time.sleep(0.002)
c.close(); c = socket.socket(socket.AF_UNIX); c.connect('/tmp/sock'); s.accept()
";
    story(&format!("MODE = 'late'\n{program}"), &[Purpose::Freeze]);
    let mut sandbox = Sandbox::new();
    sandbox.patience = Duration::from_millis(300);
    let started = sandbox.start(&format!("{WAIT}\nMODE = 'never'\n{program}\nprint('ok', flush=True)"));
    match sandbox.switch(Purpose::Freeze) {
        Err(SwitchError::Refused { why, .. }) => assert!(why.contains("not accepted"), "{why}"),
        other => panic!("{other:?}"),
    }
    fs::write(sandbox.inside("/tmp/go"), "").unwrap();
    wait_for(&started.log, "ok", 1);
}

#[test]
fn a_process_in_a_directory_that_it_may_not_enter_stays_in_it() {
    let program = r"
os.makedirs('/srv/closed/in', 0o755); os.chmod('/srv/closed', 0o700); os.chdir('/srv/closed')
os.setgid(1000); os.setuid(1000)
wait('go')
check('cwd', os.getcwd(), '/srv/closed')
check('mode', os.stat('/srv/closed').st_mode & 0o7777, 0o700)
try: os.listdir('.'); check('listing', 'done', 'refused')
except PermissionError: pass
";
    story(program, &[Purpose::Freeze, Purpose::Freeze]);
}

#[test]
fn a_process_that_is_killed_while_it_stands_still_hinders_nobody() {
    let mut sandbox = Sandbox::new();
    let _doomed = sandbox.start(&format!("{WAIT}\nf = open('/tmp/doomed', 'w'); os.chdir('/tmp')\nwait('never')"));
    let program = "os.chdir('/tmp'); f = open('/tmp/f', 'w', 1)\nwait('go')\nf.write('x\\n'); check('f', open('f').read(), 'x\\n')";
    let started = sandbox.start(&format!("{WAIT}\n{program}\nprint('ok', flush=True)"));
    let report = sandbox.engine.inspect(&sandbox.id).unwrap();
    let processes = sandbox.engine.processes(&sandbox.id).unwrap();
    let doomed = processes.iter().find(|process| process.command.contains("doomed")).unwrap().host_pid;
    let live = sandbox.layers[0];
    let below = sandbox.engine.0.layers.known_stack(Some(live)).unwrap();
    let layer = sandbox.engine.0.layers.create(&below, &sandbox.id, None, RootLook::first()).unwrap();
    let footing = Footing::new(&sandbox.engine, &BaseRef::default()).unwrap();
    let mount = footing.mount(&sandbox.engine, &below, &layer).unwrap();
    let group = report.cgroup.join("live");
    let deadline = Instant::now() + Duration::from_secs(20);
    let ground = Ground { init: report.init_pid.unwrap(), group: &group, deadline };
    let next = || {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(doomed), nix::sys::signal::Signal::SIGKILL)?;
        mount.try_clone().map(Some)
    };
    let mut span = Span::begin(Operation::Checkpoint);
    let mut standing = Standing::default();
    let walks = Walks::new(Instant::now(), &mut standing);
    let switched = switch(
        &mut Tracer::new(),
        &ground,
        Errand { purpose: Purpose::Freeze, processes: Processes::Kept },
        walks,
        None,
        next,
        &mut span,
    );
    assert!(matches!(switched, Ok(Switched::Moved { .. })), "{switched:?}");
    sandbox.layers.push(layer.record().id);
    fs::write(sandbox.inside("/tmp/go"), "").unwrap();
    wait_for(&started.log, "ok", 1);
}

#[test]
fn after_a_rollback_descriptors_see_the_target_or_an_unlinked_file() {
    let program = r"
os.makedirs('/tmp/d'); both = os.open('/tmp/d/both', os.O_CREAT | os.O_RDWR); os.write(both, b'old')
wait('one')
os.write(both, b'+new')
only = os.open('/tmp/d/only', os.O_CREAT | os.O_RDWR); os.write(only, b'mine')
os.makedirs('/tmp/later/x'); os.chdir('/tmp/later/x'); later = os.open('.', os.O_RDONLY); open('f', 'w').close()
wait('go')
check('both', os.pread(both, 99, 0), b'old')
check('position', os.lseek(both, 0, 1), 7)
check('only', os.pread(only, 99, 0), b'mine'); os.write(only, b'!'); check('only', os.pread(only, 99, 0), b'mine!')
check('name', os.path.exists('/tmp/d/only'), False)
check('directory', os.path.exists('/tmp/later'), False)
check('listing', (os.listdir(later), os.listdir('.')), ([], []))
try: open('g', 'w'); check('create', 'done', 'refused')
except FileNotFoundError: pass
try: check('cwd', os.getcwd(), None)
except FileNotFoundError: pass
check('root', sorted(os.listdir('/tmp')), ['d', 'go'])
";
    let mut sandbox = Sandbox::new();
    let started = sandbox.start(&format!("{WAIT}\n{program}\nprint('ok', flush=True)"));
    let log = started.log;
    sandbox.switch_and_drop(Purpose::Freeze);
    fs::write(sandbox.inside("/tmp/one"), "").unwrap();
    wait_for(&log, "ready", 2);
    sandbox.switch_and_drop(Purpose::Discard);
    fs::write(sandbox.inside("/tmp/go"), "").unwrap();
    wait_for(&log, "ok", 1);
}

/// Overlay inodes in the kernel's cache (`/proc/slabinfo`): other tests have some too.
fn n_overlay_inodes() -> u64 {
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap();
    let line = slabs.lines().find(|line| line.starts_with("ovl_inode ")).expect("overlayfs's inodes");
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn an_old_root_is_torn_down_though_a_program_s_text_lies_on_it() {
    const N: u64 = 30_000;
    let mut sandbox = Sandbox::new();
    let program = format!(
        "{WAIT}
os.makedirs('/tmp/many')
for i in range({N}): open('/tmp/many/%d' % i, 'w').close()
wait('go')"
    );
    let _started = sandbox.start(&program);
    let before = n_overlay_inodes();
    match sandbox.switch(Purpose::Freeze).unwrap() {
        Switched::Moved { old, .. } => old.detach().tear_down().unwrap(),
        Switched::Unchanged { .. } => panic!("not moved"),
    }
    let after = n_overlay_inodes();
    assert!(after + N / 2 < before, "{before} inodes before, {after} after");
}

#[test]
fn what_was_frozen_never_changes() {
    let mut sandbox = Sandbox::new();
    let program = format!(
        "{WAIT}
fd = os.open('/tmp/log', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
print('ready', flush=True)
n = 0
while True: os.write(fd, b'%d\\n' % n); n += 1"
    );
    let _started = sandbox.start(&program);
    for _ in 0..20 {
        sandbox.switch_and_drop(Purpose::Freeze);
    }
    let mut sizes = Vec::new();
    for upper in &sandbox.layers[..20] {
        let text = fs::read_to_string(sandbox.engine.0.layers.upper(*upper).join("tmp/log")).unwrap();
        let lines: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(lines, (0..lines.len()).collect::<Vec<_>>(), "lines are lost or twice in {upper:?}");
        sizes.push(text.len());
    }
    assert!(sizes.is_sorted());
}
