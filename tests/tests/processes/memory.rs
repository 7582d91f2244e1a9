//! Memory, threads, signals and timers of a program.

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
count = [0] * 4
def run(k):
    while True:
        count[k] += 1
        if count[k] % 1000 == 0: time.sleep(0.001)
for k in range(4): threading.Thread(target=run, args=(k,), daemon=True).start()",
    );
    let before = worker.ask("count[:]");
    let id = checkpoint(&host);
    let later = worker.ask("time.sleep(0.2); count[:]");
    for _ in 0..10 {
        roll_back(&host, &id);
        let now = worker.ask("count[:]");
        for k in 0..4 {
            let [before, later, now] = [&before, &later, &now].map(|counts| counts[k].as_u64().expect("a count"));
            assert!(before <= now && now < later, "thread {k}: {before} <= {now} < {later}");
        }
        worker.ask("time.sleep(0.3)");
    }
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
fn memory_shared_for_writing_is_refused_and_the_program_goes_on() {
    let Some((host, mut worker)) = start() else { return };
    worker.ask("import mmap; shared = mmap.mmap(-1, 4096); shared[:5] = b'first'");
    assert!(refusal(&host).contains("shares for writing"));
    assert_eq!(worker.ask("shared[:5].decode()"), "first");
    worker.ask("shared.close()");
    checkpoint(&host);
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
