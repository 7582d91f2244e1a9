//! Random file operations, checkpoints, rollbacks and deaths of the engine, against a tree in memory.
//!
//! A failure prints its seed: `cargo xtask test --seed N --cases 1` repeats it. `--cases N` sets how many (default 8; 100 in
//! soak).

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test: a broken assumption ends it")]

mod model;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use deltabox_tests::{Host, count, skipped_without_root};
use model::{Files, Kind, Model};
use nix::sys::signal::Signal;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use serde_json::{Value, json};

const AGENT: &str = include_str!("agent.py");

/// What to do next; the numbers choose among what there is.
#[derive(Clone, Debug)]
enum Op {
    Create(u16, u8),
    Put(u16, u8, String),
    Append(u16, String),
    Truncate(u16, u8),
    Rename(u16, u16, u8),
    RenameDir(u16, u16, u8),
    Link(u16, u16, u8),
    Symlink(u16, u8, String),
    Unlink(u16),
    Mkdir(u16, u8),
    Rmdir(u16),
    Chmod(u16, u16),
    Chown(u16, u8),
    Xattr(u16, u8, String),
    Open(u16, u8),
    Close(u16),
    Share(u16),
    Write(u16, bool, String),
    Seek(u16, bool, u8),
    Ftruncate(u16, u8),
    Map(u16),
    Store(u16, u8),
    Unmap(u16),
    Checkpoint,
    Rollback(u16),
    KillEngine,
}

fn op() -> impl Strategy<Value = Op> {
    let word = "[a-z]{1,12}";
    let (n, small) = (any::<u16>, any::<u8>);
    prop_oneof![
        6 => (n(), small()).prop_map(|(a, b)| Op::Create(a, b)),
        5 => (n(), 0..40_u8, word).prop_map(|(a, b, c)| Op::Put(a, b, c)),
        3 => (n(), word).prop_map(|(a, b)| Op::Append(a, b)),
        2 => (n(), 0..50_u8).prop_map(|(a, b)| Op::Truncate(a, b)),
        4 => (n(), n(), small()).prop_map(|(a, b, c)| Op::Rename(a, b, c)),
        4 => (n(), n(), small()).prop_map(|(a, b, c)| Op::RenameDir(a, b, c)),
        3 => (n(), n(), small()).prop_map(|(a, b, c)| Op::Link(a, b, c)),
        2 => (n(), small(), word).prop_map(|(a, b, c)| Op::Symlink(a, b, c)),
        4 => n().prop_map(Op::Unlink),
        4 => (n(), small()).prop_map(|(a, b)| Op::Mkdir(a, b)),
        3 => n().prop_map(Op::Rmdir),
        2 => (n(), 0..0o777_u16).prop_map(|(a, b)| Op::Chmod(a, b | 0o700)),
        2 => (n(), small()).prop_map(|(a, b)| Op::Chown(a, b)),
        2 => (n(), 0..3_u8, word).prop_map(|(a, b, c)| Op::Xattr(a, b, c)),
        6 => (n(), 0..3_u8).prop_map(|(a, b)| Op::Open(a, b)),
        2 => n().prop_map(Op::Close),
        2 => n().prop_map(Op::Share),
        7 => (n(), any::<bool>(), word).prop_map(|(a, b, c)| Op::Write(a, b, c)),
        2 => (n(), any::<bool>(), 0..40_u8).prop_map(|(a, b, c)| Op::Seek(a, b, c)),
        1 => (n(), 0..50_u8).prop_map(|(a, b)| Op::Ftruncate(a, b)),
        2 => n().prop_map(Op::Map),
        4 => (n(), small()).prop_map(|(a, b)| Op::Store(a, b)),
        1 => n().prop_map(Op::Unmap),
        7 => Just(Op::Checkpoint),
        4 => n().prop_map(Op::Rollback),
        1 => Just(Op::KillEngine),
    ]
}

struct Agent {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What was done, for the message of a failure.
    done: Vec<String>,
}

impl Agent {
    fn start(host: &Host) -> Self {
        let args = ["exec", "-i", "--on-disconnect", "leave", "box", "--", "/usr/bin/python3", "-c", AGENT];
        let mut child = host.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output, done: Vec::new() }
    }

    fn ask(&mut self, op: &Value) -> Value {
        writeln!(self.input, "{op}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{op}: {line:?}: {error}"));
        assert_eq!(answer.get("error"), None, "{op} after {:#?}", self.done);
        if op["op"] != "look" && op["op"] != "content" && op["op"] != "position" {
            self.done.push(op.to_string());
        }
        answer["ok"].clone()
    }
}

struct World {
    host: Host,
    agent: Agent,
    model: Model,
    /// Id, files, and what was seen (with times) of each checkpoint.
    checkpoints: Vec<(String, Files, Value)>,
    next_fd: u32,
    serial: u32,
}

impl World {
    fn new() -> Self {
        let host = Host::start();
        host.cli(["create", "box", "--merge-above", "2"]).ok();
        let agent = Agent::start(&host);
        let mut world = Self { host, agent, model: Model::new(), checkpoints: Vec::new(), next_fd: 0, serial: 0 };
        world.agent.ask(&json!({"op": "chmod", "path": "", "mode": 0o777}));
        world
    }

    fn pick<T: Clone>(among: &[T], number: u16) -> Option<T> {
        (!among.is_empty()).then(|| among[usize::from(number) % among.len()].clone())
    }

    fn file(&self, number: u16) -> Option<String> {
        Self::pick(&self.model.of_kind(|kind| matches!(kind, Kind::File(_))), number)
    }

    fn dir(&self, number: u16) -> Option<String> {
        Self::pick(&self.model.of_kind(|kind| *kind == Kind::Dir), number)
    }

    fn fd(&self, number: u16) -> Option<u32> {
        Self::pick(&self.model.fds.keys().copied().collect::<Vec<_>>(), number)
    }

    /// A name in a directory: few different ones, so that they meet again after deletions and rollbacks.
    fn name(&self, dir: u16, name: u8) -> Option<String> {
        Some(format!("{}/{}", self.dir(dir)?, char::from(b'a' + name % 8)))
    }

    fn free_name(&self, dir: u16, name: u8) -> Option<String> {
        self.name(dir, name).filter(|path| !self.model.files.names.contains_key(path))
    }

    /// One operation, in the sandbox and in the model; what makes no sense now is passed over.
    fn apply(&mut self, op: &Op) -> Option<()> {
        let model = &mut self.model;
        match op.clone() {
            Op::Create(dir, name) => {
                let path = self.free_name(dir, name)?;
                self.agent.ask(&json!({"op": "create", "path": path, "mode": 0o640}));
                self.model.make(&path, Kind::File(Vec::new()), 0o640);
            }
            Op::Put(file, at, data) => {
                let path = self.file(file)?;
                self.agent.ask(&json!({"op": "put", "path": path, "at": at, "data": data}));
                self.model.change(&path);
                let node = self.model.files.names[&path];
                self.model.put(node, at.into(), data.as_bytes());
            }
            Op::Append(file, data) => {
                let path = self.file(file)?;
                self.agent.ask(&json!({"op": "append", "path": path, "data": data}));
                self.model.change(&path);
                let node = self.model.files.names[&path];
                let end = self.model.content(node).len();
                self.model.put(node, end, data.as_bytes());
            }
            Op::Truncate(file, size) => {
                let path = self.file(file)?;
                self.agent.ask(&json!({"op": "truncate", "path": path, "size": size}));
                self.model.change(&path);
                let node = self.model.files.names[&path];
                self.model.truncate(node, size.into());
            }
            Op::Rename(file, dir, name) => {
                let path = self.file(file)?;
                let to = self.name(dir, name)?;
                let over = self.model.files.names.get(&to).map(|node| self.model.files.inodes[node].kind.clone());
                if over == Some(Kind::Dir) {
                    return None;
                }
                self.agent.ask(&json!({"op": "rename", "path": path, "to": to}));
                self.model.rename(&path, &to);
            }
            Op::RenameDir(from, dir, name) => {
                let path = self.dir(from).filter(|path| !path.is_empty())?;
                let to = self.free_name(dir, name)?;
                if to.starts_with(&format!("{path}/")) {
                    return None;
                }
                self.agent.ask(&json!({"op": "rename", "path": path, "to": to}));
                self.model.rename(&path, &to);
            }
            Op::Link(file, dir, name) => {
                let (path, to) = (self.file(file)?, self.free_name(dir, name)?);
                self.agent.ask(&json!({"op": "link", "path": path, "to": to}));
                self.model.link(&path, &to);
            }
            Op::Symlink(dir, name, target) => {
                let path = self.free_name(dir, name)?;
                self.agent.ask(&json!({"op": "symlink", "path": path, "data": target}));
                self.model.make(&path, Kind::Link(target), 0o777);
            }
            Op::Unlink(number) => {
                let path = Self::pick(&model.of_kind(|kind| *kind != Kind::Dir), number)?;
                self.agent.ask(&json!({"op": "unlink", "path": path}));
                self.model.unlink(&path);
            }
            Op::Mkdir(dir, name) => {
                let path = self.free_name(dir, name)?;
                self.agent.ask(&json!({"op": "mkdir", "path": path, "mode": 0o755}));
                self.model.make(&path, Kind::Dir, 0o755);
            }
            Op::Rmdir(number) => {
                let path = self.dir(number).filter(|path| !path.is_empty() && self.model.is_empty_dir(path))?;
                self.agent.ask(&json!({"op": "rmdir", "path": path}));
                self.model.unlink(&path);
            }
            Op::Chmod(number, mode) => {
                let path = Self::pick(&model.of_kind(|kind| !matches!(kind, Kind::Link(_))), number)?;
                self.agent.ask(&json!({"op": "chmod", "path": path, "mode": mode}));
                self.model.change(&path).mode = mode.into();
            }
            Op::Chown(number, id) => {
                let path = self.file(number)?;
                self.agent.ask(&json!({"op": "chown", "path": path, "uid": id, "gid": 7}));
                let inode = self.model.change(&path);
                (inode.uid, inode.gid) = (id.into(), 7);
            }
            Op::Xattr(number, name, value) => {
                let path = Self::pick(&model.of_kind(|kind| !matches!(kind, Kind::Link(_))), number)?;
                self.agent.ask(&json!({"op": "setxattr", "path": path, "name": name.to_string(), "data": value}));
                self.model.change(&path).xattrs.insert(format!("user.{name}"), value);
            }
            Op::Open(file, how) => {
                let path = self.file(file)?;
                let how = ["r", "w", "a"][usize::from(how)];
                self.next_fd += 1;
                self.agent.ask(&json!({"op": "open", "fd": self.next_fd, "path": path, "how": how}));
                self.model.open(self.next_fd, &path, how != "r", how == "a");
            }
            Op::Close(number) => {
                let fd = self.fd(number).filter(|fd| !self.model.fds[fd].mapped)?;
                self.agent.ask(&json!({"op": "close", "fd": fd}));
                if self.model.fds[&fd].shared {
                    self.agent.ask(&json!({"op": "close", "fd": fd, "child": true}));
                }
                self.model.fds.remove(&fd);
            }
            Op::Share(number) => {
                let fd = self.fd(number).filter(|fd| !self.model.fds[fd].shared)?;
                self.agent.ask(&json!({"op": "share", "fd": fd}));
                self.model.fds.get_mut(&fd)?.shared = true;
            }
            Op::Write(number, child, data) => {
                let fd = self.fd(number).filter(|fd| self.model.fds[fd].writable)?;
                let state = self.model.fds[&fd].clone();
                self.agent.ask(&json!({"op": "write", "fd": fd, "data": data, "child": child && state.shared}));
                let at = if state.append { self.model.content(state.node).len() } else { state.position };
                self.model.put(state.node, at, data.as_bytes());
                self.model.fds.get_mut(&fd)?.position = at + data.len();
            }
            Op::Seek(number, child, at) => {
                let fd = self.fd(number)?;
                let child = child && self.model.fds[&fd].shared;
                self.agent.ask(&json!({"op": "seek", "fd": fd, "at": at, "child": child}));
                self.model.fds.get_mut(&fd)?.position = at.into();
            }
            Op::Ftruncate(number, size) => {
                // Stores beyond the end of a mapped file would be SIGBUS.
                let is_mapped = |node| self.model.fds.values().any(|fd| fd.node == node && fd.mapped);
                let fits = |fd: &u32| self.model.fds[fd].writable && !is_mapped(self.model.fds[fd].node);
                let fd = self.fd(number).filter(fits)?;
                self.agent.ask(&json!({"op": "ftruncate", "fd": fd, "size": size}));
                let node = self.model.fds[&fd].node;
                self.model.truncate(node, size.into());
            }
            Op::Map(number) => {
                let fits = |fd: &u32| {
                    let state = &self.model.fds[fd];
                    state.writable && !state.mapped && !self.model.content(state.node).is_empty()
                };
                let fd = self.fd(number).filter(fits)?;
                self.agent.ask(&json!({"op": "map", "fd": fd}));
                self.model.fds.get_mut(&fd)?.mapped = true;
            }
            Op::Store(number, byte) => {
                let mapped: Vec<u32> = self.model.fds.iter().filter(|(_, fd)| fd.mapped).map(|(fd, _)| *fd).collect();
                let fd = Self::pick(&mapped, number)?;
                let node = self.model.fds[&fd].node;
                // The first byte is always mapped, if the file still has one: a rollback may have taken it.
                if self.model.content(node).is_empty() {
                    return None;
                }
                let (at, data) = (0, char::from(b'A' + byte % 26).to_string());
                self.agent.ask(&json!({"op": "store", "fd": fd, "at": at, "data": data}));
                self.model.put(node, at, data.as_bytes());
            }
            Op::Unmap(number) => {
                let mapped: Vec<u32> = self.model.fds.iter().filter(|(_, fd)| fd.mapped).map(|(fd, _)| *fd).collect();
                let fd = Self::pick(&mapped, number)?;
                self.agent.ask(&json!({"op": "unmap", "fd": fd}));
                self.model.fds.get_mut(&fd)?.mapped = false;
            }
            Op::Checkpoint => self.checkpoint(),
            Op::Rollback(number) => {
                let (id, files, seen) = Self::pick(&self.checkpoints, number)?;
                self.host.cli(["rollback", "box", &id, "--fs-only"]).ok();
                self.agent.done.push(format!("rollback {id}"));
                self.model.rollback(&files);
                // Opening for writing what is mapped or open copies it up, which shows in link groups alone.
                let now = self.compare("after the rollback");
                assert_eq!(without_links(&now), without_links(&seen), "rolled back to {id}");
            }
            Op::KillEngine => {
                self.host.end_daemon(Signal::SIGKILL);
                self.host.start_daemon();
                self.agent.done.push("engine killed".to_owned());
            }
        }
        Some(())
    }

    fn checkpoint(&mut self) {
        let before = self.compare("before the checkpoint");
        let id = self.host.cli(["checkpoint", "box", "--fs-only"]).ok();
        self.agent.done.push(format!("checkpoint {id}"));
        let saved = self.model.checkpoint();
        let after = self.compare("after the checkpoint");
        assert_eq!(without_links(&after), without_links(&before), "times too");
        self.checkpoints.push((id, saved, after));
    }

    /// Whole trees, and all that is open; what was seen.
    fn compare(&mut self, when: &str) -> Value {
        let seen = self.agent.ask(&json!({"op": "look"}));
        let mut plain: Vec<Value> = seen.as_array().unwrap().clone();
        for entry in &mut plain {
            entry.as_object_mut().unwrap().remove("mtime");
        }
        let mut expected = self.model.look();
        expected.sort_by(|a, b| a["path"].as_str().cmp(&b["path"].as_str()));
        plain.sort_by(|a, b| a["path"].as_str().cmp(&b["path"].as_str()));
        assert_eq!(plain, expected, "{when}");
        let fds: Vec<_> = self.model.fds.iter().map(|(fd, state)| (*fd, state.clone())).collect();
        for (fd, state) in fds {
            for child in [false, true].into_iter().filter(|child| !child || state.shared) {
                let content = self.agent.ask(&json!({"op": "content", "fd": fd, "child": child}));
                let expected = String::from_utf8_lossy(self.model.content(state.node));
                assert_eq!(content, json!(expected), "{when}: descriptor {fd} ({state:?})");
                let position = self.agent.ask(&json!({"op": "position", "fd": fd, "child": child}));
                assert_eq!(position, json!(state.position), "{when}: descriptor {fd} ({state:?})");
            }
        }
        self.serial += 1;
        seen
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.child_end();
    }
}

impl World {
    fn child_end(&mut self) -> std::io::Result<()> {
        self.agent.child.kill()?;
        self.agent.child.wait().map(drop)
    }
}

fn without_links(seen: &Value) -> Vec<Value> {
    let mut seen: Vec<Value> = seen.as_array().unwrap().clone();
    for entry in &mut seen {
        entry.as_object_mut().unwrap().remove("links");
    }
    seen
}

#[test]
fn files_are_at_every_checkpoint_what_they_were() {
    if skipped_without_root() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let random = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let seed = number("DELTABOX_SEED").unwrap_or_else(|| random.into());
    let n_cases = number("DELTABOX_CASES").unwrap_or(count(8, 100) as u64);
    println!("--seed {seed} --cases {n_cases}");
    for case in 0..n_cases {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&(seed + case).to_le_bytes());
        let config = Config { cases: 1, max_shrink_iters: 10, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let run = |ops: Vec<Op>| {
            let mut world = World::new();
            let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for op in &ops {
                    world.apply(op);
                }
                world.checkpoint();
            }));
            played.map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                TestCaseError::fail(text)
            })
        };
        if let Err(error) = runner.run(&prop::collection::vec(op(), 90), run) {
            panic!("--seed {} --cases 1: {error}", seed + case);
        }
    }
}
