//! Files that are open and have no name: their content is the checkpoint's again at every rollback.

use deltabox_tests::disk::Disk;
use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use serde_json::{Value, json};

use crate::{checkpoint, refusal, roll_back};

fn start() -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask(ABOUT);
    Some((host, worker))
}

/// All that a program can see of its files `fs`: content, position, status flags, size, owner, mode, times.
const ABOUT: &str = "import fcntl, mmap, tempfile, time
def about(fs):
    def one(f):
        look = os.fstat(f)
        content = None
        if fcntl.fcntl(f, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY: content = os.pread(f, 1 << 20, 0).decode()
        flags = fcntl.fcntl(f, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK)
        return [content, os.lseek(f, 0, 1), flags, look.st_size, look.st_uid, oct(look.st_mode), look.st_mtime_ns]
    return [one(f) for f in fs]";

/// Rolls back twice, with `change` before each, and asks the program what it has.
fn holds_through(host: &Host, worker: &mut Worker, look: &str, changes: &[&str]) {
    let before = worker.ask(look);
    let id = checkpoint(host);
    assert_eq!(worker.ask(look), before, "after the checkpoint");
    for change in changes {
        for _ in 0..2 {
            worker.ask(change);
            roll_back(host, &id);
            assert_eq!(worker.ask(look), before, "after {change}");
        }
    }
}

#[test]
fn a_file_without_a_name_is_what_it_was_however_it_lost_it() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "t = tempfile.TemporaryFile(dir='/srv'); t.write(b'temporary'); t.flush(); t = os.dup(t.fileno())
u = os.open('/srv/u', os.O_RDWR | os.O_CREAT, 0o640); os.write(u, b'unlinked'); os.lseek(u, 3, 0); os.unlink('/srv/u')
o = os.open('/tmp', os.O_TMPFILE | os.O_RDWR, 0o600); os.write(o, b'never linked'); os.fchown(o, 1000, 1000); os.fchmod(o, 0o4750)
os.utime(o, ns=(1_000_000_007, 2_000_000_009))
a = os.open(f'/proc/self/fd/{u}', os.O_WRONLY | os.O_APPEND); r = os.open(f'/proc/self/fd/{u}', os.O_RDONLY); os.lseek(r, 5, 0)
fs = [t, u, o, a, r]",
    );
    holds_through(
        &host,
        &mut worker,
        "about(fs)",
        &[
            "os.write(t, b' and more'); os.write(u, b'XX'); os.pwrite(o, b'N', 0); os.write(a, b' appended'); os.lseek(r, 0, 0)",
            "[os.ftruncate(f, 2) for f in (t, u, o)]; fcntl.fcntl(a, fcntl.F_SETFL, os.O_NONBLOCK); os.fchmod(o, 0o600)",
            "os.truncate(f'/proc/self/fd/{t}', 1 << 21); [os.close(f) for f in fs]; [os.open('/dev/zero', 0) for _ in range(40)]",
        ],
    );
    // The descriptions of one file are of one file.
    worker.ask("os.write(a, b'!'); os.pwrite(u, b'U', 0)");
    assert_eq!(
        worker.ask("[os.pread(r, 99, 0).decode(), os.pread(u, 99, 0).decode()]"),
        json!(["Unlinked!", "Unlinked!"])
    );
    assert!(worker.end().success());
}

#[test]
fn a_file_that_lost_its_name_since_has_its_name_and_content_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("f = os.open('/srv/f', os.O_RDWR | os.O_CREAT); os.write(f, b'named')");
    holds_through(
        &host,
        &mut worker,
        "about([f]) + [os.readlink(f'/proc/self/fd/{f}'), os.stat('/srv/f').st_ino == os.fstat(f).st_ino, open('/srv/f').read()]",
        &[
            "os.pwrite(f, b'N', 0); os.unlink('/srv/f')",
            "os.unlink('/srv/f'); open('/srv/f', 'w').write('another'); os.write(f, b'x')",
        ],
    );
    assert!(worker.end().success());
}

#[test]
fn a_new_file_of_the_same_name_stays_another_file() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "old = os.open('/srv/f', os.O_RDWR | os.O_CREAT); os.write(old, b'old'); os.unlink('/srv/f')
new = os.open('/srv/f', os.O_RDWR | os.O_CREAT); os.write(new, b'new')",
    );
    holds_through(
        &host,
        &mut worker,
        "about([old, new]) + [open('/srv/f').read(), os.path.sameopenfile(old, new)]",
        &["os.write(old, b'er'); os.write(new, b'er')", "os.unlink('/srv/f'); os.close(old)"],
    );
    assert!(worker.end().success());
}

#[test]
fn each_of_several_checkpoints_has_its_own_content() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("t = os.open('/srv', os.O_TMPFILE | os.O_RDWR)");
    let mut ids = Vec::new();
    for n in 0..4 {
        worker.ask(&format!("os.write(t, b'{n}'); open('/srv/f', 'w').write('{n}')"));
        ids.push(checkpoint(&host));
        // And one in which no file with a name has changed.
        worker.ask("os.write(t, b'.')");
        ids.push(checkpoint(&host));
    }
    for at in [7, 0, 3, 4, 1, 7, 2, 5, 6] {
        roll_back(&host, &ids[at]);
        let expected = &"0.1.2.3."[..=at];
        assert_eq!(worker.ask("[os.pread(t, 99, 0).decode(), os.lseek(t, 0, 1)]"), json!([expected, at + 1]));
        worker.ask("os.write(t, b'later')");
    }
    assert!(worker.end().success());
}

#[test]
fn locks_on_a_file_without_a_name_are_held_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "import subprocess, struct
f = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(f, b'0123456789')
g = os.open(f'/proc/self/fd/{f}', os.O_RDWR)
fcntl.flock(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_EX, 3, 1)
fcntl.fcntl(g, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 8, 1, 0))
def free():
    other = f'''
import fcntl, os
f = os.open(\"/proc/{os.getpid()}/fd/{f}\", os.O_RDWR)
free = \"\"
for name, take in (\"flock\", lambda: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)), (\"lockf\", lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2)), (\"ofd\", lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 8)), (\"rest\", lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 9)):
    try: take(); free += name
    except OSError: pass
print(free, end=\"\")'''
    return subprocess.run([sys.executable, '-c', other], stdout=subprocess.PIPE, text=True).stdout",
    );
    assert_eq!(worker.ask("free()"), json!("rest"));
    holds_through(&host, &mut worker, "free()", &["os.close(f); os.close(g)", "fcntl.flock(f, fcntl.LOCK_UN)"]);
    assert!(worker.end().success());
}

/// A child that shares description `f` and does what it reads from a pipe: `c` writes, `e` ends.
const CHILD: &str = "ask, told = os.pipe(); say, heard = os.pipe()
child = os.fork()
if child == 0:
    os.close(1)
    while True:
        what = os.read(ask, 1)
        if what == b'e' or not what: os._exit(0)
        os.write(f, b'child '); os.write(heard, b'.')
def told_child(): os.write(told, b'c'); os.read(say, 1)";

#[test]
fn a_description_that_processes_share_stays_shared_in_place() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("f = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(f, b'begin ')");
    worker.ask(CHILD);
    let id = checkpoint(&host);
    for _ in 0..2 {
        worker.ask("told_child(); os.write(f, b'parent '); told_child()");
        assert_eq!(worker.ask("os.pread(f, 99, 0).decode()"), json!("begin child parent child "));
        roll_back(&host, &id);
        assert_eq!(worker.ask("[os.pread(f, 99, 0).decode(), os.lseek(f, 0, 1)]"), json!(["begin ", 6]));
    }
    worker.ask("os.write(told, b'e'); os.waitpid(child, 0)");
    assert!(worker.end().success());
}

#[test]
fn a_child_that_is_rebuilt_shares_file_mapping_and_fifo_with_its_parent_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "f = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(f, b'begin ')
k = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.ftruncate(k, 4096); m = mmap.mmap(k, 4096); m[:1] = b'a'
os.mkfifo('/srv/fifo'); b = os.open('/srv/fifo', os.O_RDWR | os.O_NONBLOCK); os.write(b, b'held')",
    );
    worker.ask(&CHILD.replace("os.write(heard", "m[0] = m[0] + 1; os.write(b, b' child'); os.write(heard"));
    let look = "[os.pread(f, 99, 0).decode(), m[:1].decode(), os.pread(k, 1, 0).decode()]";
    let id = checkpoint(&host);
    for _ in 0..2 {
        for (change, how) in
            [("told_child()", "in place"), ("os.kill(child, 9); os.waitpid(child, 0); m[0] = 90", "rebuild")]
        {
            worker.ask(change);
            let report = roll_back(&host, &id);
            let child = worker.ask("child");
            let processes = report["processes"].as_array().expect("processes");
            let is_child = |one: &&Value| one["pid"] == child;
            assert_eq!(processes.iter().find(is_child).expect("the child")["how"], json!(how), "{report}");
            assert_eq!(worker.ask(look), json!(["begin ", "a", "a"]));
            worker.ask("told_child(); os.write(f, b'parent '); told_child()");
            assert_eq!(worker.ask(look), json!(["begin child parent child ", "c", "c"]));
            assert_eq!(worker.ask("os.read(b, 99).decode()"), json!("held child child"));
        }
    }
    assert!(worker.end().success());
}

/// Has a program that was killed since say what `look` is worth, into a file: it waits for one to be there.
const ANSWERER: &str = "import json
def serve():
    while True:
        if os.path.exists('/srv/ask'):
            text = open('/srv/ask').read(); os.unlink('/srv/ask')
            open('/srv/answer.new', 'w').write(json.dumps(eval(text))); os.rename('/srv/answer.new', '/srv/answer')
        time.sleep(0.002)";

fn ask_by_file(host: &Host, python: &str) -> Value {
    host.sh("box", &format!("rm -f /srv/answer; echo {} > /srv/ask.new; mv /srv/ask.new /srv/ask", quoted(python)))
        .ok();
    wait_within(60, "the program answers", || host.sh("box", "test -e /srv/answer").code() == 0);
    serde_json::from_str(&host.sh("box", "cat /srv/answer").ok()).expect("an answer")
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[test]
fn a_program_that_has_ended_since_has_them_again() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(ANSWERER);
    let pid = worker.ask(
        "t = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(t, b'first'); os.lseek(t, 2, 0)
p = os.open('/srv/p', os.O_RDWR | os.O_CREAT); os.write(p, b'x' * 8192); os.unlink('/srv/p')
m = mmap.mmap(p, 8192); m[4096:4103] = b'through'
r = os.open(f'/proc/self/fd/{p}', os.O_RDONLY); os.mkdir('/srv/d'); d = os.open('/srv/d', os.O_RDONLY); os.rmdir('/srv/d')
os.getpid()",
    );
    worker.tell("serve()");
    let look = "about([t]) + [m[4094:4104].decode(), os.pread(r, 10, 4094).decode(), m[:1].decode(), os.fstat(d).st_nlink, os.listdir(d)]";
    let before = ask_by_file(&host, look);
    let id = checkpoint(&host);
    for round in 0..2 {
        assert_eq!(
            ask_by_file(&host, "[os.write(t, b'later'), m.__setitem__(0, 65), os.pread(r, 1, 0).decode()]"),
            json!([5, null, "A"])
        );
        host.sh("box", &format!("kill -9 {pid}")).ok();
        wait_within(60, "it has ended", || host.sh("box", &format!("test -e /proc/{pid}")).code() == 1);
        let report = roll_back(&host, &id);
        assert_eq!(report["processes"][0]["how"], json!("fork"), "{report}");
        assert_eq!(ask_by_file(&host, look), before, "round {round}");
        // The mapping, the descriptor and the other one are of one file.
        assert_eq!(
            ask_by_file(
                &host,
                "[m.__setitem__(0, 66), os.pread(r, 1, 0).decode(), os.pwrite(p, b'C', 0), m[:1].decode()]"
            ),
            json!([null, "B", 1, "C"])
        );
        roll_back(&host, &id);
        assert_eq!(ask_by_file(&host, look), before, "in place, round {round}");
    }
}

#[test]
fn shared_and_private_mappings_of_a_deleted_file_are_what_they_were() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "def made(name, text):
    f = os.open(name, os.O_RDWR | os.O_CREAT); os.write(f, text.encode().ljust(8192, b'.')); os.unlink(name); return f
f = made('/srv/shared', 'shared'); s = mmap.mmap(f, 8192); again = mmap.mmap(f, 4096, offset=4096)
g = os.open('/srv/private', os.O_RDWR | os.O_CREAT); os.write(g, b'private'.ljust(8192, b'.'))
g2 = os.open('/srv/private', os.O_RDONLY); os.unlink('/srv/private'); p = mmap.mmap(g2, 8192, flags=mmap.MAP_PRIVATE); p[4096:4099] = b'own'
h = made('/srv/closed', 'closed'); c = mmap.mmap(h, 8192); os.close(h)
k = made('/srv/read', 'read'); r = mmap.mmap(k, 8192, prot=mmap.PROT_READ)
os.mkdir('/srv/other'); b = made('/srv/other/kept', 'kept'); q = mmap.mmap(b, 8192, prot=mmap.PROT_READ)",
    );
    holds_through(
        &host,
        &mut worker,
        "[x[:8].decode() + x[4096:4100].decode() for x in (s, p, c, r, q)] + [again[:4].decode(), os.pread(f, 8, 0).decode(), os.pread(k, 8, 0).decode()]",
        &[
            "s[:3] = b'SSS'; again[:3] = b'AAA'; p[:3] = b'PPP'; c[:3] = b'CCC'; os.pwrite(k, b'RRR', 0); os.pwrite(g, b'GGG', 0)",
            "s.close(); p.close(); c.close(); r.close(); q.close()",
            "again.close(); os.close(f); os.close(k); s[4096:4099] = b'???'",
        ],
    );
    // What is seen through one is seen through the other.
    worker.ask("s[4096:4099] = b'one'; os.pwrite(k, b'two', 0)");
    assert_eq!(
        worker.ask("[again[:3].decode(), os.pread(f, 3, 4096).decode(), r[:3].decode()]"),
        json!(["one", "one", "two"])
    );
    assert!(worker.end().success());
}

#[test]
fn a_program_file_and_a_library_that_were_replaced_go_on() {
    let Some((host, _worker)) = start() else { return };
    host.sh("box", "mkdir /srv/bin; cp /usr/bin/python3 /srv/bin/python; cp -L $(ldd /usr/bin/python3 | awk '/libm.so/ { print $3 }') /srv/bin/libm.so.6").ok();
    let mut worker = Worker::start_as(&host, "box", &["/usr/bin/env", "LD_LIBRARY_PATH=/srv/bin", "/srv/bin/python"]);
    worker
        .ask("import math; maps = lambda: sorted({l.split()[5] for l in open('/proc/self/maps') if '/srv/bin' in l})");
    let library = worker.ask("maps()");
    assert_eq!(library.as_array().expect("a list").len(), 2, "{library}");
    // As a package manager does.
    host.sh("box", "cd /srv/bin; for f in python libm.so.6; do cp $f $f.new; echo more >> $f.new; mv $f.new $f; done")
        .ok();
    worker.ask("n = 1; os.readlink('/proc/self/exe')");
    let id = checkpoint(&host);
    for change in ["n = 2", "n = 3; os.unlink('/srv/bin/python'); os.unlink('/srv/bin/libm.so.6')"] {
        worker.ask(change);
        roll_back(&host, &id);
        assert_eq!(worker.ask("[n, math.exp(0), os.path.exists('/srv/bin/python')]"), json!([1, 1.0, true]));
    }
    checkpoint(&host);
    assert!(worker.end().success());
}

#[test]
fn directories_that_were_removed_stay_removed_and_are_one() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "os.mkdir('/srv/d', 0o710); d = os.open('/srv/d', os.O_RDONLY); e = os.open('/srv/d', os.O_RDONLY); os.chdir('/srv/d'); os.rmdir('/srv/d')
def tried():
    try: os.open('f', os.O_CREAT | os.O_RDWR, dir_fd=d); return 'made'
    except FileNotFoundError: return 'gone'
def look(): return [os.listdir(d), os.fstat(d).st_nlink, oct(os.fstat(d).st_mode), os.path.sameopenfile(d, e), os.stat('.').st_ino == os.fstat(d).st_ino, tried()]",
    );
    holds_through(
        &host,
        &mut worker,
        "look()",
        &["os.close(d); os.chdir('/')", "os.mkdir('/srv/d'); d = os.open('/srv/d', os.O_RDONLY)"],
    );
    assert!(worker.end().success());
}

#[test]
fn a_sparse_file_stays_sparse_and_is_not_copied_by_its_length() {
    let Some((host, mut worker)) = start() else { return };
    worker
        .ask("t = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.ftruncate(t, 1 << 40); os.pwrite(t, b'far', 1 << 39)");
    holds_through(
        &host,
        &mut worker,
        "look = os.fstat(t); [look.st_size, look.st_blocks < 100, os.pread(t, 3, 1 << 39).decode(), os.pread(t, 3, 0).decode()]",
        &["os.pwrite(t, b'near', 0); os.pwrite(t, b'FAR', 1 << 39)", "os.ftruncate(t, 5)"],
    );
    assert!(worker.end().success());
}

#[test]
fn a_file_that_a_rollback_of_files_left_behind_is_held_too() {
    let Some((host, mut worker)) = start() else { return };
    let first = checkpoint(&host);
    worker.ask("f = os.open('/srv/f', os.O_RDWR | os.O_CREAT); os.write(f, b'behind'); m = mmap.mmap(f, 6)");
    host.cli(["rollback", "box", &first, "--fs-only"]).ok();
    assert_eq!(worker.ask("[os.path.exists('/srv/f'), os.pread(f, 9, 0).decode()]"), json!([false, "behind"]));
    holds_through(
        &host,
        &mut worker,
        "about([f]) + [m[:].decode(), os.path.exists('/srv/f')]",
        &["os.pwrite(f, b'B', 0); m[1:3] = b'EH'", "os.close(f); m.close(); open('/srv/f', 'w').write('new')"],
    );
    assert!(worker.end().success());
}

#[test]
fn a_private_mapping_of_a_file_open_for_writing_is_refused_and_named() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask(
        "f = os.open('/srv/f', os.O_RDWR | os.O_CREAT); os.write(f, b'.' * 4096); t = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(t, b't')
p = mmap.mmap(f, 4096, flags=mmap.MAP_PRIVATE); p[:3] = b'own'",
    );
    let message = refusal(&host);
    assert!(message.contains("maps /srv/f") && message.contains("as its private copy"), "{message}");
    assert_eq!(
        worker.ask("os.write(f, b'on'); os.write(t, b'oo'); [p[:3].decode(), os.pread(t, 9, 0).decode()]"),
        json!(["own", "too"])
    );
    worker.ask("p.close()");
    checkpoint(&host);
    assert!(worker.end().success());
}

#[test]
fn a_full_disk_refuses_a_checkpoint_and_a_rollback_and_changes_nothing() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make_with("tmpfs", "size=96M");
    let host = Host::start_in(disk.dir(), &[]);
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask("t = os.open('/srv', os.O_TMPFILE | os.O_RDWR); r = os.open(f'/proc/self/fd/{t}', os.O_RDONLY); os.write(t, b'a' * (20 << 20)); n = 1");
    worker.ask("os.close(t)");
    let first = checkpoint(&host);
    // All but 8 MB.
    let fill = "cat /dev/zero > /srv/fill 2>/dev/null; truncate -s -8M /srv/fill";
    // Read only, it has not to be copied while the programs stand still.
    host.sh("box", fill).ok();
    for command in [vec!["checkpoint", "box"], vec!["rollback", "box", &first]] {
        let mut args = vec!["--json"];
        args.extend(&command);
        let error = host.cli(&args).error();
        assert!(error["message"].as_str().expect("a message").contains("No space left"), "{error}");
        assert_eq!(worker.ask("n += 1; [os.fstat(r).st_size, os.pread(r, 3, 0).decode()]"), json!([20 << 20, "aaa"]));
    }
    assert_eq!(worker.ask("n"), json!(3));
    host.sh("box", "rm /srv/fill").ok();
    // Somebody writes to it: it has to be copied while the programs stand still, too.
    roll_back(&host, &first);
    worker.ask("w = os.open(f'/proc/self/fd/{r}', os.O_RDWR); os.pwrite(w, b'b', 0)");
    host.sh("box", fill).ok();
    let error = host.cli(["--json", "checkpoint", "box"]).error();
    assert!(error["message"].as_str().expect("a message").contains("No space left"), "{error}");
    assert_eq!(worker.ask("os.pwrite(w, b'c', 1); os.pread(r, 3, 0).decode()"), json!("bca"));
    host.sh("box", "rm /srv/fill").ok();
    roll_back(&host, &first);
    assert_eq!(worker.ask("[n, os.fstat(r).st_size, os.pread(r, 3, 0).decode()]"), json!([1, 20 << 20, "aaa"]));
    assert!(worker.end().success());
}

#[test]
fn what_cannot_be_held_without_a_name_is_refused_and_named() {
    let Some((host, mut worker)) = start() else { return };
    let number = worker
        .ask("os.symlink('x', '/srv/l'); l = os.open('/srv/l', os.O_PATH | os.O_NOFOLLOW); os.unlink('/srv/l'); l");
    let message = refusal(&host);
    assert!(message.contains(&format!("descriptor {number} of process")), "{message}");
    assert!(message.contains("a symbolic link without a name") && message.contains("/srv/l (deleted)"), "{message}");
    worker.ask("os.close(l); t = os.open('/srv', os.O_TMPFILE | os.O_RDWR); os.write(t, b'x')");
    checkpoint(&host);
    assert!(worker.end().success());
}
