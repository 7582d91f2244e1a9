//! Reports of differences against whole trees, as the kernel shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::deltafs::testing::{Grown, Look, Opened, layers, op, run_cases, skipped_without_root};

/// The report from the stack `from` to the stack `to`, which have the last `n_common` directories in common.
fn report(from: &[PathBuf], to: &[PathBuf], n_common: usize, options: Options) -> Vec<Change> {
    let (from, to) = (Opened::new(from), Opened::new(to));
    let (from, to) = (from.fds(), to.fds());
    let (from, common) = from.split_at(from.len() - n_common);
    diff(&Stacks { from, to: &to[..to.len() - n_common], common }, options).unwrap()
}

/// What happened since the topmost layer of `grown` was made.
fn last(grown: &Grown, options: Options) -> Vec<Change> {
    report(&grown.dirs[1..], &grown.dirs, grown.dirs.len() - 1, options)
}

/// A change in one line.
fn line(change: &Change) -> String {
    let mut text = format!("{:?} {}", change.change, change.path);
    if let Some(from) = &change.from {
        text += &format!(" from {from}");
    }
    if change.content {
        text += " content";
    }
    if let Some(mode) = &change.mode {
        text += &format!(" {}>{}", mode.from, mode.to);
    }
    if let Some(owner) = &change.owner {
        text += &format!(" {}>{}", owner.from, owner.to);
    }
    if let Some(target) = &change.target {
        text += &format!(" {}>{}", target.from, target.to);
    }
    if let Some(was) = change.was {
        text += &format!(" was {was:?}");
    }
    for name in &change.xattrs {
        text += &format!(" {name}");
    }
    text
}

fn lines(changes: &[Change]) -> Vec<String> {
    changes.iter().map(line).collect()
}

/// What must be told of an entry that was `old` and is `new`, if anything.
fn expected(old: &Look, new: &Look) -> Vec<&'static str> {
    let kind = |look: &Look| look.mode & libc::S_IFMT;
    if kind(old) != kind(new) {
        return vec!["type"];
    }
    let xattrs = |look: &Look| {
        let xattrs = look.xattrs.iter().filter(|(name, _)| !name.as_encoded_bytes().starts_with(b"trusted."));
        xattrs.map(|(name, value)| (name.clone(), value.clone())).collect::<Vec<_>>()
    };
    let is_link = kind(old) == libc::S_IFLNK;
    let differing = [
        ("content", !is_link && old.content != new.content),
        ("mode", old.mode != new.mode),
        ("owner", old.owner != new.owner),
        ("target", is_link && old.content != new.content),
        ("xattrs", xattrs(old) != xattrs(new)),
    ];
    differing.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect()
}

fn told(change: &Change) -> Vec<&'static str> {
    let told = [
        ("type", change.change == What::TypeChanged),
        ("content", change.content),
        ("mode", change.mode.is_some()),
        ("owner", change.owner.is_some()),
        ("target", change.target.is_some()),
        ("xattrs", !change.xattrs.is_empty()),
    ];
    told.iter().filter(|(_, is_told)| *is_told).map(|(name, _)| *name).collect()
}

/// Fails unless the report leads from the one tree to the other, tells every difference and nothing else.
fn check(old: &BTreeMap<PathBuf, Look>, new: &BTreeMap<PathBuf, Look>, changes: &[Change], contents: bool) {
    let relative = |path: &str| PathBuf::from(&path[1..]);
    let of = |what: What| changes.iter().filter(move |change| change.change == what);
    let deleted: BTreeSet<_> = of(What::Deleted).map(|change| relative(&change.path)).collect();
    let types: BTreeSet<_> = of(What::TypeChanged).map(|change| relative(&change.path)).collect();
    let added: BTreeSet<_> = of(What::Added).map(|change| relative(&change.path)).collect();
    let renamed: BTreeMap<_, _> =
        changes.iter().filter_map(|change| Some((relative(change.from.as_deref()?), relative(&change.path)))).collect();
    let others: BTreeMap<_, _> = changes
        .iter()
        .filter(|change| !matches!(change.change, What::Added | What::Deleted))
        .map(|change| (relative(&change.path), change))
        .collect();
    assert_eq!(deleted.len() + added.len() + others.len(), changes.len(), "something is told twice");
    // Where everything of the old tree is in the new one.
    let mut places: BTreeMap<&Path, PathBuf> = BTreeMap::new();
    for path in old.keys() {
        let place = match path.parent().zip(path.file_name()) {
            _ if renamed.contains_key(path) => Some(renamed[path].clone()),
            _ if deleted.contains(path) => None,
            None => Some(PathBuf::new()),
            Some((parent, name)) => {
                assert!(!contents || places.contains_key(parent), "{path:?} was in a deleted directory; not told");
                // A directory that has become something else stands for what was in it, too.
                let parent = places.get(parent).filter(|parent| contents || !types.contains(*parent));
                parent.map(|parent| parent.join(name))
            }
        };
        if let Some(place) = place {
            places.insert(path, place);
        }
    }
    let mut explained: BTreeSet<&Path> = BTreeSet::new();
    for (old_path, new_path) in &places {
        assert!(explained.insert(new_path), "two are told to be {new_path:?} now");
        let look = new.get(new_path).unwrap_or_else(|| panic!("{old_path:?} is not {new_path:?} now"));
        let told = others.get(new_path).map(|change| told(change)).unwrap_or_default();
        assert_eq!(told, expected(&old[*old_path], look), "told (left) of {old_path:?}, now {new_path:?}");
    }
    for path in new.keys().filter(|path| !explained.contains(path.as_path())) {
        let is_told =
            added.contains(path) || !contents && path.ancestors().any(|dir| added.contains(dir) || types.contains(dir));
        assert!(is_told, "{path:?} is new; not told");
    }
    for path in added.iter().chain(others.keys()) {
        assert!(new.contains_key(path), "{path:?} is told and not there");
    }
    for path in &added {
        assert!(!explained.contains(path.as_path()), "{path:?} is no new one");
    }
    for path in &deleted {
        assert!(old.contains_key(path), "{path:?} was not there");
    }
}

#[test]
fn a_report_leads_from_one_state_to_any_other() {
    if skipped_without_root() {
        return;
    }
    let branch = || prop::collection::vec(prop::collection::vec(op(), 1..14), 0..4);
    run_cases(25, (layers(0..3), branch(), branch()), |(common, one, other)| {
        let common = Grown::new(&common);
        let (mut from, mut to) = (common.branch(), common.branch());
        from.grow(&one);
        to.grow(&other);
        let (old, new) = (Opened::new(&from.dirs).look(), Opened::new(&to.dirs).look());
        for contents in [true, false] {
            let options = Options { contents, patch: false };
            let n_common = common.dirs.len();
            check(&old, &new, &report(&from.dirs, &to.dirs, n_common, options), contents);
            check(&new, &old, &report(&to.dirs, &from.dirs, n_common, options), contents);
            assert_eq!(report(&to.dirs, &to.dirs, n_common, options), []);
            assert_eq!(report(&to.dirs, &to.dirs, to.dirs.len(), options), []);
        }
    });
}

/// A base with a few files, and a layer on top.
fn changed(act: impl FnOnce(&Path)) -> Grown {
    let mut grown = Grown::bare();
    let base = grown.dirs[0].clone();
    fs::create_dir_all(base.join("dir/sub")).unwrap();
    for name in ["a", "b", "dir/c", "dir/sub/d"] {
        fs::write(base.join(name), format!("{name}\nsecond\nthird\n")).unwrap();
    }
    symlink("a", base.join("link")).unwrap();
    grown.layer(act);
    grown
}

#[test]
fn each_kind_of_change_is_told_as_such() {
    if skipped_without_root() {
        return;
    }
    let grown = changed(|root| {
        fs::write(root.join("new"), "x").unwrap();
        fs::rename(root.join("a"), root.join("dir/moved")).unwrap();
        fs::remove_file(root.join("dir/c")).unwrap();
        fs::rename(root.join("dir"), root.join("other")).unwrap();
        fs::write(root.join("other/sub/d"), "different\n").unwrap();
        fs::remove_file(root.join("link")).unwrap();
        symlink("b", root.join("link")).unwrap();
        fs::remove_file(root.join("b")).unwrap();
        fs::create_dir(root.join("b")).unwrap();
    });
    let told = lines(&last(&grown, Options::default()));
    let expected = [
        "TypeChanged /b 65534:65534>65534:65534 was File",
        "Deleted /dir/c",
        "Modified /link a>b",
        "Added /new",
        "Renamed /other from /dir",
        "Renamed /other/moved from /a",
        "Modified /other/sub/d content",
    ];
    let told: Vec<_> = told.iter().map(|line| line.replace(" 65534:65534>65534:65534", "")).collect();
    let expected = expected.map(|line| line.replace(" 65534:65534>65534:65534", ""));
    assert_eq!(told, expected);
}

#[test]
fn a_copy_that_differs_in_nothing_is_no_change_and_attributes_are() {
    if skipped_without_root() {
        return;
    }
    let grown = changed(|root| {
        let file = fs::File::options().append(true).open(root.join("a")).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        fs::set_permissions(root.join("b"), fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(root.join("dir"), Some(100_005), Some(100_006)).unwrap();
        let file = fs::File::open(root.join("dir/c")).unwrap();
        crate::sys::fs::set_xattr(std::os::fd::AsFd::as_fd(&file), c"user.x", b"1").unwrap();
    });
    let told = lines(&last(&grown, Options::default()));
    assert_eq!(told, ["Modified /b 0644>0600", "Modified /dir 65534:65534>5:6", "Modified /dir/c user.x"]);
}

#[test]
fn a_deleted_directory_stands_for_its_contents_unless_they_are_asked_for() {
    if skipped_without_root() {
        return;
    }
    let grown = changed(|root| {
        fs::rename(root.join("dir/c"), root.join("c")).unwrap();
        fs::remove_dir_all(root.join("dir")).unwrap();
    });
    assert_eq!(lines(&last(&grown, Options::default())), ["Added /c", "Deleted /dir"]);
    let told = lines(&last(&grown, Options { contents: true, patch: false }));
    assert_eq!(told, ["Renamed /c from /dir/c", "Deleted /dir", "Deleted /dir/sub", "Deleted /dir/sub/d"]);
}

#[test]
fn a_file_without_a_note_of_its_origin_is_known_by_its_content_if_only_one_has_it() {
    if skipped_without_root() {
        return;
    }
    let grown = changed(|root| {
        fs::copy(root.join("a"), root.join("copy")).unwrap();
        fs::remove_file(root.join("a")).unwrap();
    });
    assert_eq!(lines(&last(&grown, Options::default())), ["Renamed /copy from /a"]);
    let grown = changed(|root| {
        fs::copy(root.join("a"), root.join("copy")).unwrap();
        fs::copy(root.join("a"), root.join("copy2")).unwrap();
        fs::remove_file(root.join("a")).unwrap();
    });
    assert_eq!(lines(&last(&grown, Options::default())), ["Deleted /a", "Added /copy", "Added /copy2"]);
}

#[test]
fn a_file_renamed_in_every_layer_is_one_rename() {
    if skipped_without_root() {
        return;
    }
    let mut grown = changed(|root| fs::rename(root.join("a"), root.join("a1")).unwrap());
    for n in 1..4 {
        grown.layer(|root| {
            fs::rename(root.join(format!("a{n}")), root.join(format!("a{}", n + 1))).unwrap();
            fs::write(root.join(format!("a{}", n + 1)), format!("{n}")).unwrap();
        });
    }
    let told = report(&grown.dirs[4..], &grown.dirs, 1, Options::default());
    assert_eq!(lines(&told), ["Renamed /a4 from /a content"]);
}

#[test]
fn a_patch_is_what_patch_takes() {
    if skipped_without_root() {
        return;
    }
    let grown = changed(|root| {
        fs::write(root.join("a"), "a\nchanged\nthird\nno end").unwrap();
        fs::rename(root.join("b"), root.join("moved")).unwrap();
        fs::write(root.join("moved"), "b\nsecond\nthird\nfourth\n").unwrap();
        fs::remove_file(root.join("dir/c")).unwrap();
        fs::write(root.join("new"), "1\n2\n").unwrap();
        fs::write(root.join("binary"), b"\0\xff").unwrap();
        fs::write(root.join("large"), vec![b'x'; 2 << 20]).unwrap();
        fs::write(root.join("odd\nname"), "x\n").unwrap();
        fs::write(root.join("empty"), "").unwrap();
    });
    let changes = last(&grown, Options { contents: false, patch: true });
    let patch: BTreeMap<_, _> = changes.iter().map(|change| (&change.path[1..], change.patch.as_deref())).collect();
    let a = "--- a/a\n+++ b/a\n@@ -1,3 +1,4 @@\n a\n-second\n+changed\n third\n+no end\n\\ No newline at end of file\n";
    assert_eq!(patch["a"], Some(a));
    let moved = "--- a/b\n+++ b/moved\n@@ -1,3 +1,4 @@\n b\n second\n third\n+fourth\n";
    assert_eq!(patch["moved"], Some(moved));
    let deleted = "--- a/dir/c\n+++ /dev/null\n@@ -1,3 +0,0 @@\n-dir/c\n-second\n-third\n";
    assert_eq!(patch["dir/c"], Some(deleted));
    assert_eq!(patch["new"], Some("--- /dev/null\n+++ b/new\n@@ -0,0 +1,2 @@\n+1\n+2\n"));
    assert_eq!(patch["binary"], Some("Binary files /dev/null and b/binary differ\n"));
    assert_eq!(patch["large"], Some("Files /dev/null and b/large differ; larger than 1048576 bytes\n"));
    assert_eq!(patch["odd\nname"], Some("--- /dev/null\n+++ \"b/odd\\nname\"\n@@ -0,0 +1 @@\n+x\n"));
    assert_eq!(patch["empty"], None);
}

#[test]
fn the_base_is_not_walked() {
    if skipped_without_root() {
        return;
    }
    let mut grown = Grown::bare();
    let base = grown.dirs[0].clone();
    for n in 0..300 {
        let dir = base.join(format!("d{n}/sub"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), "x").unwrap();
    }
    grown.layer(|root| {
        fs::rename(root.join("d1"), root.join("moved")).unwrap();
        fs::write(root.join("moved/sub/new"), "x").unwrap();
        fs::remove_dir_all(root.join("d2")).unwrap();
    });
    // A directory of the base that must not be read cannot be.
    let fds = Opened::new(&grown.dirs);
    let fds = fds.fds();
    let side = pairs::Side::read(&fds, 1).unwrap();
    let other = pairs::Side::read(&fds[1..], 0).unwrap();
    let found = pairs::find(&other, &side, false).unwrap();
    assert!(found.both.len() + found.added.len() + found.deleted.len() < 12, "{found:?}");
    let told = lines(&last(&grown, Options::default()));
    assert_eq!(told, ["Deleted /d2", "Renamed /moved from /d1", "Added /moved/sub/new"]);
}

#[test]
fn nesting_without_end_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let (layer, base) = (scratch.path().join("layer"), scratch.path().join("base"));
    fs::create_dir(&base).unwrap();
    fs::create_dir(&layer).unwrap();
    // From the inside out: what is there so far moves into a new directory.
    for _ in 0..5000 {
        fs::create_dir(layer.join("n")).unwrap();
        if layer.join("d").exists() {
            fs::rename(layer.join("d"), layer.join("n/d")).unwrap();
        }
        fs::rename(layer.join("n"), layer.join("d")).unwrap();
    }
    let opened = Opened::new(&[layer.clone(), base]);
    let fds = opened.fds();
    let stacks = Stacks { from: &[], to: &fds[..1], common: &fds[1..] };
    let error = diff(&stacks, Options::default()).unwrap_err();
    assert_eq!(error.source.kind(), std::io::ErrorKind::InvalidFilename);
    crate::deltafs::remove::remove_tree(&layer).unwrap();
}

#[test]
fn a_live_layer_is_read_while_programs_write_to_it() {
    if skipped_without_root() {
        return;
    }
    let mut grown = changed(|_| {});
    grown.with_live(|root, dirs| {
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for n in 0..2 {
                let (stop, root) = (&stop, &root);
                scope.spawn(move || {
                    let at = root.join(format!("busy{n}"));
                    let mut round = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        round += 1;
                        fs::create_dir_all(at.join("x/y")).unwrap();
                        fs::write(at.join("x/y/file"), vec![b'x'; round % 5000]).unwrap();
                        fs::rename(at.join("x/y"), at.join("z")).unwrap();
                        symlink("/etc", at.join("x/y")).unwrap();
                        fs::remove_dir_all(&at).unwrap();
                    }
                });
            }
            for _ in 0..200 {
                report(&dirs[1..], dirs, 2, Options { contents: true, patch: true });
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    });
}
