//! A view of a stack against what the kernel's overlayfs shows of it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::deltafs::testing::{Grown, Look, Opened, layers, run_cases, skipped_without_root};

/// Everything that the view shows, in the words of the comparison.
fn look(view: &View<'_>) -> BTreeMap<PathBuf, Look> {
    let mut queue = vec![(PathBuf::new(), view.root())];
    let mut found = BTreeMap::new();
    while let Some((path, node)) = queue.pop() {
        for name in view.list(&node).unwrap() {
            queue.push((path.join(&name), view.find_in(&node, &name).unwrap().unwrap()));
        }
        found.insert(path, view.open(&node).unwrap().unwrap());
    }
    let mut firsts = BTreeMap::new();
    let look = |(path, entry): (PathBuf, Entry)| {
        let mut content = entry.target().unwrap().map_or(Vec::new(), |target| target.as_bytes().to_vec());
        if entry.kind == Kind::File {
            entry.content().unwrap().read_to_end(&mut content).unwrap();
        }
        let first_link = match entry.kind {
            Kind::Directory => path.clone(),
            _ => firsts.entry(entry.identity).or_insert_with(|| path.clone()).clone(),
        };
        let kind = nix::sys::stat::fstat(entry.fd()).unwrap().st_mode & libc::S_IFMT;
        assert_eq!(Kind::of(kind), entry.kind);
        let look = Look {
            mode: kind | entry.mode,
            owner: (entry.uid, entry.gid),
            size: if entry.kind == Kind::Directory { 0 } else { entry.size },
            mtime: entry.mtime,
            content,
            xattrs: entry.xattrs().unwrap(),
            first_link,
        };
        (path, look)
    };
    found.into_iter().map(look).collect()
}

/// What the inside sees of a tree that the host sees.
fn inside(tree: BTreeMap<PathBuf, Look>) -> BTreeMap<PathBuf, Look> {
    let translate = |(path, mut look): (PathBuf, Look)| {
        look.owner = (entry::inside(look.owner.0), entry::inside(look.owner.1));
        look.xattrs.retain(|name, _| !name.as_bytes().starts_with(b"trusted."));
        (path, look)
    };
    tree.into_iter().map(translate).collect()
}

fn assert_same(view: &BTreeMap<PathBuf, Look>, kernel: &BTreeMap<PathBuf, Look>) {
    let mut paths: Vec<_> = view.keys().chain(kernel.keys()).collect();
    paths.sort();
    for path in paths {
        assert_eq!(view.get(path), kernel.get(path), "{path:?}: the view (left) and the kernel (right)");
    }
}

#[test]
fn a_view_shows_what_the_kernel_shows_of_any_layers() {
    if skipped_without_root() {
        return;
    }
    run_cases(40, layers(1..7), |layers| {
        let grown = Grown::new(&layers);
        let opened = Opened::new(&grown.dirs);
        let fds = opened.fds();
        assert_same(&look(&View::new(&fds, 0)), &inside(opened.look()));
    });
}

#[test]
fn where_a_directory_lies_below_is_where_its_lower_parts_are() {
    if skipped_without_root() {
        return;
    }
    run_cases(20, layers(2..7), |layers| {
        let grown = Grown::new(&layers);
        let opened = Opened::new(&grown.dirs);
        let fds = opened.fds();
        for n_top in 0..fds.len() {
            let (view, below) = (View::new(&fds, n_top), View::new(&fds[n_top..], 0));
            let mut queue = vec![view.root()];
            while let Some(node) = queue.pop() {
                let names = view.list(&node).unwrap();
                queue.extend(names.iter().map(|name| view.find_in(&node, name).unwrap().unwrap()));
                let lower: Vec<_> = node.parts.iter().filter(|part| part.layer >= n_top && node.is_dir).collect();
                match node.below(&view) {
                    None => assert!(lower.is_empty(), "{node:?}"),
                    Some(path) => {
                        let there = below.find(path).unwrap().expect("below is somewhere");
                        let there: Vec<_> = there.parts.iter().map(|part| (part.layer + n_top, &part.path)).collect();
                        let lower: Vec<_> = lower.iter().map(|part| (part.layer, &part.path)).collect();
                        assert_eq!(there, lower, "{path:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_live_layer_is_seen_as_it_is() {
    if skipped_without_root() {
        return;
    }
    let mut grown = Grown::bare();
    fs::create_dir_all(grown.dirs[0].join("d/sub")).unwrap();
    fs::write(grown.dirs[0].join("d/sub/file"), "x").unwrap();
    grown.with_live(|root, dirs| {
        let opened = Opened::new(dirs);
        let fds = opened.fds();
        let view = View::new(&fds, 1);
        let node = view.find(Path::new("d/sub/file")).unwrap().unwrap();
        fs::rename(root.join("d"), root.join("e")).unwrap();
        fs::write(root.join("e/sub/file"), "more").unwrap();
        assert!(view.find(Path::new("d/sub/file")).unwrap().is_none());
        let entry = view.lookup(Path::new("e/sub/file")).unwrap().unwrap();
        assert_eq!((entry.layer, entry.size), (0, 4));
        assert_eq!(view.find(Path::new("e")).unwrap().unwrap().below(&view), Some(Path::new("d")));
        // What was found before still leads to what was there.
        assert_eq!(view.open(&node).unwrap().unwrap().size, 1);
        fs::remove_dir_all(root.join("e")).unwrap();
        let node = view.root();
        assert!(view.list(&node).unwrap().is_empty());
    });
}

#[test]
fn whiteouts_may_be_attributes() {
    if skipped_without_root() {
        return;
    }
    let mut grown = Grown::bare();
    fs::write(grown.dirs[0].join("gone"), "x").unwrap();
    fs::write(grown.dirs[0].join("kept"), "x").unwrap();
    let layer = grown.scratch.path().join("layer");
    fs::create_dir(&layer).unwrap();
    fs::write(layer.join("gone"), "").unwrap();
    let set = |path: &Path, name, value: &[u8]| {
        let file = fs::File::open(path).unwrap();
        crate::sys::fs::set_xattr(std::os::fd::AsFd::as_fd(&file), name, value).unwrap();
    };
    set(&layer, place::OPAQUE, b"x");
    set(&layer.join("gone"), place::WHITEOUT, b"y");
    grown.dirs.insert(0, layer);
    let opened = Opened::new(&grown.dirs);
    let fds = opened.fds();
    let view = View::new(&fds, 1);
    assert_eq!(view.list(&view.root()).unwrap(), ["kept"]);
    assert_same(&look(&view), &inside(opened.look()));
}

#[test]
fn links_and_dots_in_a_path_lead_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/file"), "x").unwrap();
    std::os::unix::fs::symlink("d", dir.path().join("link")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.path().join("out")).unwrap();
    let opened = Opened::new(&[dir.path().to_owned()]);
    let fds = opened.fds();
    let view = View::new(&fds, 0);
    assert!(view.find(Path::new("d/file")).unwrap().is_some());
    for path in ["link/file", "out/passwd", "d/../../x", "d/file/x", "nothing"] {
        assert!(view.find(Path::new(path)).is_ok_and(|found| found.is_none()), "{path}");
    }
}

#[test]
fn nesting_deeper_than_any_path_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let name = "n".repeat(200);
    let mut at = dir.path().to_owned();
    for _ in 0..15 {
        at.push(&name);
        fs::create_dir(&at).unwrap();
    }
    fs::write(at.join("file"), "x").unwrap();
    // Twice as deep, by moving it under its like.
    let other = tempfile::tempdir().unwrap();
    let mut below = other.path().to_owned();
    for _ in 0..15 {
        below.push(&name);
        fs::create_dir(&below).unwrap();
    }
    fs::rename(dir.path().join(&name), below.join(&name)).unwrap();
    let opened = Opened::new(&[other.path().to_owned()]);
    let fds = opened.fds();
    let view = View::new(&fds, 0);
    let path: PathBuf = std::iter::repeat_n(name.as_str(), 30).chain(["file"]).collect();
    assert_eq!(view.lookup(&path).unwrap().unwrap().size, 1);
}
