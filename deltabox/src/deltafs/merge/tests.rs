//! Stacks before and after a merge, as the kernel shows them.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::deltafs::diff::{Options, Stacks, What, diff};
use crate::deltafs::layer::open_dir;
use crate::deltafs::testing::{Grown, Look, Opened, layers, look, op, run_cases, skipped_without_root, walk};

static GO_ON: AtomicBool = AtomicBool::new(false);

/// The same stack with those directories merged into one.
fn merged(grown: &Grown, run: Range<usize>) -> (Grown, MergeReport) {
    let into = tempfile::tempdir_in(grown.scratch.path()).unwrap().keep();
    let opened = Opened::new(&grown.dirs);
    let fds = opened.fds();
    let into_fd = open_dir(&into).unwrap();
    let report = merge(&fds[run.clone()], &fds[run.end..], into_fd.as_fd(), &GO_ON).unwrap();
    let mut after = grown.branch();
    after.dirs.splice(run, [into]);
    (after, report)
}

fn assert_same(before: &BTreeMap<PathBuf, Look>, after: &BTreeMap<PathBuf, Look>) {
    let mut paths: Vec<_> = before.keys().chain(after.keys()).collect();
    paths.sort();
    for path in paths {
        assert_eq!(before.get(path), after.get(path), "{path:?}: before (left) and after (right)");
    }
}

/// All of a layer's own directory that a merge must not touch. (To walk it sets times of access of directories and
/// links, here as anywhere.)
fn raw(dir: &Path) -> Vec<(PathBuf, [u64; 2], [i64; 4])> {
    let meta = |path: PathBuf| {
        let meta = fs::symlink_metadata(dir.join(&path)).unwrap();
        let atime = if meta.is_file() { (meta.atime(), meta.atime_nsec()) } else { (0, 0) };
        (path, [meta.ino(), meta.nlink()], [meta.ctime(), meta.ctime_nsec(), atime.0, atime.1])
    };
    walk(dir).into_iter().map(meta).collect()
}

#[test]
fn a_stack_shows_the_same_whichever_run_of_it_was_merged() {
    if skipped_without_root() {
        return;
    }
    run_cases(8, layers(2..6), |layers| {
        let grown = Grown::new(&layers);
        let before = Opened::new(&grown.dirs).look();
        let n_layers = grown.dirs.len() - 1;
        for start in 0..n_layers {
            for end in start + 1..=n_layers {
                let raw_before: Vec<_> = grown.dirs.iter().map(|dir| raw(dir)).collect();
                let (after, _) = merged(&grown, start..end);
                let raw_after: Vec<_> = grown.dirs.iter().map(|dir| raw(dir)).collect();
                assert!(raw_after == raw_before, "a source was changed");
                assert_same(&before, &Opened::new(&after.dirs).look());
            }
        }
    });
}

#[test]
fn programs_go_on_above_a_merged_layer_as_above_its_sources() {
    if skipped_without_root() {
        return;
    }
    let more = || prop::collection::vec(prop::collection::vec(op(), 4..14), 1..4);
    run_cases(12, (layers(2..6), more(), any::<u8>()), |(layers, more, at)| {
        let grown = Grown::new(&layers);
        let n_layers = grown.dirs.len() - 1;
        let start = usize::from(at) % n_layers;
        let (mut after, _) = merged(&grown, start..n_layers);
        let mut before = grown.branch();
        before.grow(&more);
        after.grow(&more);
        let look = |grown: &Grown| {
            let mut tree = Opened::new(&grown.dirs).look();
            // They wrote at different times.
            tree.values_mut().for_each(|look| look.mtime = (0, 0));
            tree
        };
        assert_same(&look(&before), &look(&after));
        // And a merge of merged layers.
        let n_layers = after.dirs.len() - 1;
        let (again, _) = merged(&after, 0..n_layers);
        assert_same(&look(&before), &look(&again));
    });
}

/// A base with a nest of directories, and a layer for each of `acts`.
fn grown(acts: &[&dyn Fn(&Path)]) -> Grown {
    let mut grown = Grown::bare();
    let base = grown.dirs[0].clone();
    for dir in ["x/deep/er", "y", "z"] {
        fs::create_dir_all(base.join(dir)).unwrap();
        fs::write(base.join(dir).join("file"), dir).unwrap();
    }
    for act in acts {
        grown.layer(act);
    }
    grown
}

fn xattr(dir: &Path, path: &str, name: &std::ffi::CStr) -> Option<String> {
    let fd = open_dir(&dir.join(path)).unwrap();
    place::read_xattr(fd.as_fd(), name).unwrap().map(|value| String::from_utf8(value).unwrap())
}

#[test]
fn redirects_are_composed_to_where_the_content_lies_below_the_run() {
    if skipped_without_root() {
        return;
    }
    let rename =
        |from: &'static str, to: &'static str| move |root: &Path| fs::rename(root.join(from), root.join(to)).unwrap();
    let acts = (rename("x", "a"), rename("a/deep", "y/d"), rename("y", "b"), rename("b/d/er", "a/er"));
    let grown = grown(&[&acts.0, &acts.1, &acts.2, &acts.3]);
    let (after, report) = merged(&grown, 0..4);
    let layer = &after.dirs[0];
    let redirect = |path| xattr(layer, path, place::REDIRECT);
    assert_eq!(redirect("a").as_deref(), Some("/x"));
    assert_eq!(redirect("b").as_deref(), Some("/y"));
    assert_eq!(redirect("b/d").as_deref(), Some("/x/deep"));
    assert_eq!(redirect("a/er").as_deref(), Some("/x/deep/er"));
    // x, y; a/deep; b/d/er. What was hidden in between and is not below needs none.
    assert_eq!(report, MergeReport { n_entries: 4, n_whiteouts: 4, n_shared: 0, copied_bytes: 0 });
    assert_same(&Opened::new(&grown.dirs).look(), &Opened::new(&after.dirs).look());
}

#[test]
fn a_directory_that_came_back_to_its_place_needs_no_redirect() {
    if skipped_without_root() {
        return;
    }
    let go = |root: &Path| fs::rename(root.join("x"), root.join("a")).unwrap();
    let back = |root: &Path| fs::rename(root.join("a"), root.join("x")).unwrap();
    let grown = grown(&[&go, &back]);
    let (after, report) = merged(&grown, 0..2);
    assert_eq!(xattr(&after.dirs[0], "x", place::REDIRECT), None);
    assert_eq!(report, MergeReport { n_entries: 1, ..MergeReport::default() });
    assert_same(&Opened::new(&grown.dirs).look(), &Opened::new(&after.dirs).look());
}

#[test]
fn whiteouts_stay_only_over_something_and_opaque_directories_hide_what_is_below() {
    if skipped_without_root() {
        return;
    }
    let first = |root: &Path| {
        fs::write(root.join("fleeting"), "x").unwrap();
        fs::create_dir(root.join("new")).unwrap();
        fs::remove_dir_all(root.join("x")).unwrap();
        fs::create_dir(root.join("x")).unwrap();
        fs::write(root.join("x/fresh"), "x").unwrap();
    };
    let second = |root: &Path| {
        fs::remove_file(root.join("fleeting")).unwrap();
        fs::remove_file(root.join("x/fresh")).unwrap();
        fs::remove_dir_all(root.join("y")).unwrap();
    };
    let grown = grown(&[&first, &second]);
    let (after, report) = merged(&grown, 0..2);
    assert_eq!((report.n_entries, report.n_whiteouts), (2, 1));
    assert_eq!(xattr(&after.dirs[0], "x", place::OPAQUE).as_deref(), Some("y"));
    assert!(fs::symlink_metadata(after.dirs[0].join("y")).unwrap().file_type().is_char_device());
    assert_same(&Opened::new(&grown.dirs).look(), &Opened::new(&after.dirs).look());
}

#[test]
fn redirects_may_be_longer_than_the_kernel_makes_them() {
    if skipped_without_root() {
        return;
    }
    let mut grown = Grown::bare();
    let name = "n".repeat(150);
    // The kernel refuses a path of more than 256 bytes, but each of these is within the parent.
    let deep: PathBuf = std::iter::repeat_n(name.as_str(), 6).collect();
    fs::create_dir_all(grown.dirs[0].join(&deep)).unwrap();
    fs::write(grown.dirs[0].join(&deep).join("file"), "x").unwrap();
    grown.layer(|root| fs::rename(root.join(&deep), deep_sibling(root, &deep, "m")).unwrap());
    grown.layer(|root| fs::rename(root.join(&name), root.join("short")).unwrap());
    let rest: PathBuf = deep.iter().skip(1).collect();
    grown.layer(|root| {
        let short = root.join("short");
        let from = deep_sibling(&short, &rest, "m");
        fs::rename(&from, short.join("up")).map_or_else(
            // What the kernel refuses, mv does by copying.
            |error| assert_eq!(error.raw_os_error(), Some(libc::EXDEV)),
            drop,
        );
    });
    let (after, _) = merged(&grown, 0..3);
    let at = deep_sibling(Path::new("short"), &rest, "m");
    let redirect = xattr(&after.dirs[0], at.to_str().unwrap(), place::REDIRECT).unwrap();
    assert!(redirect.len() > 800, "{redirect}");
    assert_same(&Opened::new(&grown.dirs).look(), &Opened::new(&after.dirs).look());
}

fn deep_sibling(root: &Path, path: &Path, name: &str) -> PathBuf {
    root.join(path).with_file_name(name)
}

#[test]
fn files_are_copied_with_their_holes_links_and_origins() {
    if skipped_without_root() {
        return;
    }
    let first = |root: &Path| {
        let file = fs::File::create(root.join("sparse")).unwrap();
        file.set_len(64 << 20).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"middle", 32 << 20).unwrap();
        fs::hard_link(root.join("sparse"), root.join("z/other")).unwrap();
        fs::rename(root.join("y/file"), root.join("y/moved")).unwrap();
    };
    let second = |root: &Path| fs::rename(root.join("y/moved"), root.join("again")).unwrap();
    let grown = grown(&[&first, &second]);
    let (after, report) = merged(&grown, 0..2);
    let sparse = fs::metadata(after.dirs[0].join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "the hole was filled");
    assert!(report.copied_bytes < 1 << 20, "{report:?}");
    assert_eq!((sparse.nlink(), sparse.ino()), (2, fs::metadata(after.dirs[0].join("z/other")).unwrap().ino()));
    assert_same(&Opened::new(&grown.dirs).look(), &Opened::new(&after.dirs).look());
    // What it is a copy of is still known.
    let opened = Opened::new(&after.dirs);
    let fds = opened.fds();
    let changes = diff(&Stacks { from: &[], to: &fds[..1], common: &fds[1..] }, Options::default()).unwrap();
    let renamed: Vec<_> = changes.iter().filter(|change| change.change == What::Renamed).collect();
    assert_eq!((renamed[0].path.as_str(), renamed[0].from.as_deref()), ("/again", Some("/y/file")));
}

#[test]
fn a_redirect_that_is_no_path_is_an_error() {
    if skipped_without_root() {
        return;
    }
    let grown = grown(&[&|root: &Path| fs::rename(root.join("x"), root.join("d")).unwrap()]);
    let dir = open_dir(&grown.dirs[0].join("d")).unwrap();
    for bad in [&b"//bad"[..], b"/x/../y", b"/", b"a/b", b"..", b""] {
        set_xattr(dir.as_fd(), place::REDIRECT, bad).unwrap();
        let into = tempfile::tempdir().unwrap();
        let into = open_dir(into.path()).unwrap();
        let opened = Opened::new(&grown.dirs);
        let fds = opened.fds();
        let error = merge(&fds[..1], &fds[1..], into.as_fd(), &GO_ON).unwrap_err();
        assert!(matches!(&error, MergeError::Io { path, .. } if path == Path::new("d")), "{bad:?}: {error}");
    }
}

#[test]
fn a_full_disk_is_an_error_and_the_sources_stay() {
    if skipped_without_root() {
        return;
    }
    let write = |root: &Path| fs::write(root.join("large"), vec![1; 4 << 20]).unwrap();
    let grown = grown(&[&write]);
    let before = look(&grown.dirs[0]);
    let small = crate::sys::mount::fsopen(c"tmpfs").unwrap();
    crate::sys::mount::fsconfig_string(small.as_fd(), c"size", c"1m").unwrap();
    crate::sys::mount::fsconfig_create(small.as_fd()).unwrap();
    let small = crate::sys::mount::fsmount(small.as_fd(), 0).unwrap();
    let opened = Opened::new(&grown.dirs);
    let fds = opened.fds();
    let error = merge(&fds[..1], &fds[1..], small.as_fd(), &GO_ON).unwrap_err();
    assert_eq!(error.to_string(), "copy /large: No space left on device (os error 28)");
    assert_same(&before, &look(&grown.dirs[0]));
}
