//! What a tree of files is, in memory. It knows one thing of overlays: a file with several names that lies in a frozen
//! layer is copied up by the first change under one of them, and that name goes its own way from there (index=off;
//! `docs/checkpoints.md`).

use std::collections::BTreeMap;

use serde_json::{Value, json};

pub(crate) type Node = u32;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File(Vec<u8>),
    Dir,
    Link(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) xattrs: BTreeMap<String, String>,
    /// Lies in a frozen layer.
    frozen: bool,
}

/// An open file description.
#[derive(Clone, Debug)]
pub(crate) struct Fd {
    pub(crate) node: Node,
    /// The name it was opened under, wherever that was moved; none once that is gone.
    pub(crate) name: Option<String>,
    pub(crate) writable: bool,
    pub(crate) append: bool,
    pub(crate) position: usize,
    /// The second process has it too.
    pub(crate) shared: bool,
    pub(crate) mapped: bool,
    /// It stays on a mount that was left: what it leads to is nobody else's any more.
    apart: bool,
}

/// What a checkpoint holds: names and files, no descriptors.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files {
    pub(crate) names: BTreeMap<String, Node>,
    pub(crate) inodes: BTreeMap<Node, Inode>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) files: Files,
    pub(crate) fds: BTreeMap<u32, Fd>,
    next: Node,
}

impl Model {
    pub(crate) fn new() -> Self {
        let mut model = Self::default();
        model.make("", Kind::Dir, 0o777);
        model
    }

    pub(crate) fn of_kind(&self, wanted: impl Fn(&Kind) -> bool) -> Vec<String> {
        let is_wanted = |(name, node): (&String, &Node)| wanted(&self.files.inodes[node].kind).then(|| name.clone());
        self.files.names.iter().filter_map(is_wanted).collect()
    }

    pub(crate) fn is_empty_dir(&self, path: &str) -> bool {
        let below = format!("{path}/");
        !self.files.names.keys().any(|name| name.starts_with(&below))
    }

    pub(crate) fn make(&mut self, path: &str, kind: Kind, mode: u32) {
        let node = self.fresh(Inode { kind, mode, uid: 0, gid: 0, xattrs: BTreeMap::new(), frozen: false });
        self.files.names.insert(path.to_owned(), node);
    }

    fn fresh(&mut self, inode: Inode) -> Node {
        self.next += 1;
        self.files.inodes.insert(self.next, inode);
        self.next
    }

    fn n_names(&self, node: Node) -> usize {
        self.files.names.values().filter(|other| **other == node).count()
    }

    /// The file behind a name that is about to be changed under it.
    pub(crate) fn change(&mut self, path: &str) -> &mut Inode {
        let node = self.split(path);
        self.files.inodes.get_mut(&node).expect("an inode")
    }

    /// Copies up: of several names in a frozen layer this one gets a file of its own.
    fn split(&mut self, path: &str) -> Node {
        let node = self.files.names[path];
        let inode = &self.files.inodes[&node];
        if !inode.frozen || !matches!(inode.kind, Kind::File(_)) {
            return node;
        }
        let several = self.n_names(node) > 1;
        if !several {
            self.files.inodes.get_mut(&node).expect("an inode").frozen = false;
            return node;
        }
        let copy = Inode { frozen: false, ..inode.clone() };
        let new = self.fresh(copy);
        self.files.names.insert(path.to_owned(), new);
        for fd in self.fds.values_mut().filter(|fd| !fd.apart && fd.name.as_deref() == Some(path)) {
            fd.node = new;
        }
        new
    }

    pub(crate) fn link(&mut self, path: &str, to: &str) {
        let node = self.split(path);
        self.files.names.insert(to.to_owned(), node);
    }

    pub(crate) fn unlink(&mut self, path: &str) {
        // In a frozen layer each name has an inode of its own as soon as somebody looks: who has it open keeps that.
        let is_open = |fd: &Fd| !fd.apart && fd.name.as_deref() == Some(path);
        if self.fds.values().any(is_open) {
            self.split(path);
        }
        self.files.names.remove(path);
        self.lose_name(path);
    }

    fn lose_name(&mut self, path: &str) {
        for fd in self.fds.values_mut().filter(|fd| !fd.apart && fd.name.as_deref() == Some(path)) {
            fd.name = None;
        }
    }

    pub(crate) fn rename(&mut self, path: &str, to: &str) {
        if path == to {
            return;
        }
        let node = self.files.names[path];
        let same = self.files.names.get(to) == Some(&node);
        if same && !self.files.inodes[&node].frozen {
            // rename(2): both names of one file, nothing is done. (In a frozen layer they are two.)
            return;
        }
        if self.files.names.contains_key(to) {
            self.unlink(to);
        }
        self.split(path);
        let moved = |name: &str| match name.strip_prefix(path) {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => Some(format!("{to}{rest}")),
            _ => None,
        };
        let names = std::mem::take(&mut self.files.names);
        self.files.names = names.into_iter().map(|(name, node)| (moved(&name).unwrap_or(name), node)).collect();
        for fd in self.fds.values_mut().filter(|fd| !fd.apart) {
            fd.name = fd.name.take().map(|name| moved(&name).unwrap_or(name));
        }
    }

    pub(crate) fn open(&mut self, fd: u32, path: &str, writable: bool, append: bool) {
        let node = if writable { self.split(path) } else { self.files.names[path] };
        let name = Some(path.to_owned());
        let fd_state = Fd { node, name, writable, append, position: 0, shared: false, mapped: false, apart: false };
        self.fds.insert(fd, fd_state);
    }

    pub(crate) fn content(&self, node: Node) -> &Vec<u8> {
        match &self.files.inodes[&node].kind {
            Kind::File(content) => content,
            other => panic!("not a file: {other:?}"),
        }
    }

    pub(crate) fn put(&mut self, node: Node, at: usize, data: &[u8]) {
        let Some(Inode { kind: Kind::File(content), .. }) = self.files.inodes.get_mut(&node) else { panic!("no file") };
        if content.len() < at + data.len() {
            content.resize(at + data.len(), 0);
        }
        content[at..at + data.len()].copy_from_slice(data);
    }

    pub(crate) fn truncate(&mut self, node: Node, size: usize) {
        let Some(Inode { kind: Kind::File(content), .. }) = self.files.inodes.get_mut(&node) else { panic!("no file") };
        content.resize(size, 0);
    }

    /// Everything there is lies in frozen layers now, and what programs hold was opened again.
    pub(crate) fn checkpoint(&mut self) -> Files {
        let named = |model: &Self, node: Node| model.n_names(node) > 0;
        self.files.inodes.values_mut().for_each(|inode| inode.frozen = true);
        let mut saved = self.files.clone();
        saved.inodes.retain(|node, _| named(self, *node));
        self.reopen();
        saved
    }

    /// Names and files of a checkpoint; descriptors see what has their name there, or keep what they had.
    pub(crate) fn rollback(&mut self, to: &Files) {
        let old = std::mem::replace(&mut self.files, to.clone());
        let mut kept: BTreeMap<Node, Node> = BTreeMap::new();
        let fds: Vec<u32> = self.fds.keys().copied().collect();
        for fd in fds {
            let state = self.fds[&fd].clone();
            let there =
                state.name.as_ref().filter(|_| !state.apart).and_then(|name| self.files.names.get(name)).copied();
            let there = there.filter(|node| matches!(self.files.inodes[node].kind, Kind::File(_)));
            let node = match there {
                Some(node) => node,
                // All that lose the same file keep the same.
                None => match kept.get(&state.node) {
                    Some(node) => *node,
                    None => {
                        let node = self.fresh(old.inodes[&state.node].clone());
                        kept.insert(state.node, node);
                        node
                    }
                },
            };
            let state = self.fds.get_mut(&fd).expect("a descriptor");
            state.node = node;
            if there.is_none() {
                (state.name, state.apart) = (None, true);
            }
        }
        self.reopen();
    }

    /// Opening for writing copies up; a file without a name is copied, so that no other name of it is touched.
    fn reopen(&mut self) {
        let fds: Vec<u32> = self.fds.keys().copied().collect();
        let mut copied: BTreeMap<Node, Node> = BTreeMap::new();
        for fd in fds {
            let state = self.fds[&fd].clone();
            if state.apart {
                continue;
            }
            match &state.name {
                Some(name) if state.writable => {
                    let node = self.split(name);
                    self.fds.get_mut(&fd).expect("a descriptor").node = node;
                }
                Some(_) => {}
                None => {
                    let node = *copied.entry(state.node).or_insert_with(|| {
                        self.next += 1;
                        self.next
                    });
                    let copy = Inode { frozen: false, ..self.files.inodes[&state.node].clone() };
                    self.files.inodes.entry(node).or_insert(copy);
                    self.fds.get_mut(&fd).expect("a descriptor").node = node;
                }
            }
        }
    }

    /// As the agent's look, without times.
    pub(crate) fn look(&self) -> Vec<Value> {
        let mut seen = Vec::new();
        for (path, node) in &self.files.names {
            let inode = &self.files.inodes[node];
            let (bits, content) = match &inode.kind {
                Kind::File(content) => (0o100_000, Some(String::from_utf8_lossy(content).into_owned())),
                Kind::Dir => (0o040_000, None),
                Kind::Link(target) => (0o120_000, Some(target.clone())),
            };
            let mode = if matches!(inode.kind, Kind::Link(_)) { 0o777 } else { inode.mode };
            let mut entry = json!({"path": path, "mode": bits | mode, "uid": inode.uid, "gid": inode.gid});
            if let Some(content) = content {
                entry["content"] = json!(content);
            }
            if !matches!(inode.kind, Kind::Link(_)) {
                entry["xattrs"] = json!(inode.xattrs);
            }
            let names: Vec<_> =
                self.files.names.iter().filter(|(_, other)| *other == node).map(|(name, _)| name).collect();
            if names.len() > 1 {
                entry["links"] = json!(names);
            }
            seen.push(entry);
        }
        seen
    }
}
