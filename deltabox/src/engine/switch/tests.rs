//! Programs in a real sandbox, switched from root to root.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::deltafs::layer::{LiveLayer, open_dir};
use crate::deltafs::overlay::mount_stack;
use crate::engine::{Config, CreateRequest, Engine, ExecRequest, OnDisconnect, Stdio};
use crate::latency::Operation;
use crate::sandbox::SandboxId;
use std::os::fd::AsFd;

struct Sandbox {
    engine: Engine,
    id: SandboxId,
    store: tempfile::TempDir,
    /// Frozen layers' directories, the lowest first, then the live one's.
    layers: Vec<PathBuf>,
}

impl Sandbox {
    fn new() -> Self {
        let store = tempfile::TempDir::with_prefix("deltabox-test-").unwrap();
        let engine = Engine::open(&Config { store: store.path().to_owned() }).unwrap();
        let (tell, told) = mpsc::channel();
        engine.create(CreateRequest::default(), Box::new(move |result| tell.send(result.unwrap()).unwrap()));
        let report = told.recv().unwrap();
        Self { engine, id: report.id, store, layers: vec![report.live_layer.join("upper")] }
    }

    /// Starts a program that prints "ready" once it is, and "ok" (or what is wrong) in the end.
    fn start(&self, program: &str) -> Program<'_> {
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
        let (over, end) = mpsc::channel();
        let on_exit = Box::new(move |exit| drop(over.send(exit)));
        self.engine.exec(&self.id, request, on_exit, Box::new(move |result| drop(tell.send(result.unwrap()))));
        let attachment = told.recv().unwrap();
        let log =
            self.store.path().join("sandboxes").join(self.id.as_str()).join(format!("logs/{}.log", attachment.pid));
        let program = Program { sandbox: self, log, end, _attachment: attachment };
        program.wait_for("ready");
        program
    }

    fn switch(&mut self, purpose: Purpose) -> Result<Switched, SwitchError> {
        let report = self.engine.inspect(&self.id).unwrap();
        let dir = self.store.path().join(format!("next-{}", self.layers.len()));
        let layer = LiveLayer::create(&dir).unwrap();
        let base = self.engine.host_base(&[]).unwrap();
        let below = if purpose == Purpose::Discard { &self.layers[..self.layers.len() - 1] } else { &self.layers[..] };
        let frozen: Vec<_> = below.iter().rev().map(|upper| open_dir(upper).unwrap()).collect();
        let mut lowers: Vec<_> = frozen.iter().map(AsFd::as_fd).collect();
        lowers.push(self.engine.0.fixtures.skeleton().as_fd());
        lowers.push(base.tree.as_fd());
        let mount = mount_stack(&lowers, Some(layer.top())).unwrap();
        let ground = Ground {
            init: report.init_pid.unwrap(),
            group: &report.cgroup.join("live"),
            deadline: Instant::now() + Duration::from_secs(20),
        };
        let mut span = Span::begin(Operation::Checkpoint);
        let switched = switch(&ground, purpose, || Ok(Some(mount)), &mut span);
        for (phase, took) in span.phases() {
            println!("{phase}: {} us", took.as_micros());
        }
        if switched.is_ok() {
            if purpose == Purpose::Discard {
                self.layers.pop();
            }
            self.layers.push(dir.join("upper"));
        }
        switched
    }

    fn freeze(&mut self) {
        match self.switch(Purpose::Freeze).unwrap() {
            Switched::Moved { old, .. } => old.drop_slowly(),
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

struct Program<'a> {
    sandbox: &'a Sandbox,
    log: PathBuf,
    end: mpsc::Receiver<crate::engine::Exit>,
    _attachment: crate::engine::Attachment,
}

impl Program<'_> {
    fn wait_for(&self, word: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            if text.lines().any(|line| line == word) {
                return;
            }
            assert!(Instant::now() < end, "no `{word}` but: {text}");
            std::thread::sleep(Duration::from_millis(2));
        }
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
    let text = format!("{WAIT}\n{program}\nprint('ok', flush=True)");
    let (log, end, attachment) = {
        let Program { log, end, _attachment, .. } = sandbox.start(&text);
        (log, end, _attachment)
    };
    for purpose in purposes {
        match sandbox.switch(*purpose).unwrap() {
            Switched::Moved { old, .. } => old.drop_slowly(),
            Switched::Unchanged { .. } => panic!("not moved"),
        }
    }
    fs::write(sandbox.inside("/tmp/go"), "").unwrap();
    let program = Program { sandbox: &sandbox, log, end, _attachment: attachment };
    program.wait_for("ok");
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
fn what_was_frozen_never_changes() {
    let mut sandbox = Sandbox::new();
    let program = format!(
        "{WAIT}
fd = os.open('/tmp/log', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
print('ready', flush=True)
n = 0
while True: os.write(fd, b'%d\\n' % n); n += 1"
    );
    drop(sandbox.start(&program).end);
    for _ in 0..20 {
        sandbox.freeze();
    }
    let mut sizes = Vec::new();
    for upper in &sandbox.layers[..20] {
        let text = fs::read_to_string(upper.join("tmp/log")).unwrap();
        let lines: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(lines, (0..lines.len()).collect::<Vec<_>>(), "lines are lost or twice in {upper:?}");
        sizes.push(text.len());
    }
    assert!(sizes.is_sorted());
}
