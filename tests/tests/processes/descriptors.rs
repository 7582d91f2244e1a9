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
        ("import socket; made = socket.socketpair()", "socket:["),
        ("made = open('/srv/x', 'w'); os.unlink('/srv/x')", "/srv/x (deleted)"),
    ] {
        worker.ask(make);
        let refused = refusal(&host);
        assert!(refused.contains(name) && refused.contains("process"), "{refused}");
        worker.ask("del made");
        checkpoint(&host);
    }
    assert!(worker.end().success());
}
