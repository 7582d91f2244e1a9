//! Directories as sources.

use proptest::prelude::*;

use super::*;

#[test]
fn a_directory_keeps_everything() {
    let store = Store::new();
    let source = store.path("source");
    fs::create_dir(&source).unwrap();
    make_rich_tree(&source);
    let manifest = store.bases.import("img", &source).unwrap();
    assert_eq!(manifest.notes, Vec::<String>::new());
    let expected = expected(&source);
    assert_eq!(manifest.n_entries, expected.len() as u64 - 1);
    let imported = look_at(&store.tree("img"), 100_000);
    assert_same(&imported, &expected);
    assert_eq!(fs::metadata(store.tree("img").join("usr/ping6")).unwrap().nlink(), 2);
    assert!(fs::metadata(store.tree("img").join("sparse")).unwrap().blocks() * 512 < 100_000, "holes were filled");
    let len_bytes: u64 = imported
        .iter()
        .filter(|(path, entry)| entry.kind == 'f' && entry.same_as.as_ref().is_none_or(|first| first == *path))
        .map(|(_, entry)| entry.len)
        .sum();
    assert_eq!(manifest.len_bytes, len_bytes);
}

/// Runs `act` in a mount namespace of its own: its mounts end with it.
fn in_mount_namespace<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    use nix::mount::{MsFlags, mount};
    std::thread::scope(|scope| {
        let act = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            act()
        };
        scope.spawn(act).join().unwrap()
    })
}

/// Mounts `what`, of type `fstype` or else as a bind mount, at `at`.
fn mount(what: &str, at: &Path, fstype: Option<&str>, options: &str) {
    use nix::mount::{MsFlags, mount};
    let flags = if fstype.is_some() { MsFlags::empty() } else { MsFlags::MS_BIND };
    mount(Some(what), at, fstype, flags, Some(options)).unwrap();
}

#[test]
fn a_store_that_is_full_gives_a_clear_error_and_its_space_back() {
    let store = Store::new();
    let source = store.path("source");
    fs::create_dir_all(&source).unwrap();
    fs::create_dir_all(store.path("store")).unwrap();
    fs::write(source.join("a-small"), vec![1; 100_000]).unwrap();
    fs::write(source.join("b-large"), vec![1; 3_000_000]).unwrap();
    system_tar(&source, &store.path("archive"), &["--format=gnu"]);
    in_mount_namespace(|| {
        mount("tmpfs", &store.path("store"), Some("tmpfs"), "size=2m");
        for from in [&source, &store.path("archive")] {
            let error = store.bases.import("img", from).unwrap_err().to_string();
            assert!(error.contains("b-large") && error.contains("No space left"), "{error}");
            store.assert_empty();
        }
        fs::remove_file(source.join("b-large")).unwrap();
        store.bases.import("img", &source).unwrap();
    });
}

#[test]
fn sockets_and_other_mounts_are_noted_and_left_out() {
    let store = Store::new();
    let source = store.path("source");
    fs::create_dir_all(source.join("mnt")).unwrap();
    fs::write(source.join("file-mount"), b"below").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(source.join("socket")).unwrap();
    let manifest = in_mount_namespace(|| {
        mount("tmpfs", &source.join("mnt"), Some("tmpfs"), "");
        fs::write(source.join("mnt/hidden"), b"").unwrap();
        mount("/etc/passwd", &source.join("file-mount"), None, "");
        store.bases.import("img", &source).unwrap()
    });
    assert_eq!(manifest.notes.len(), 2, "{:?}", manifest.notes);
    let seen = look_at(&store.tree("img"), 100_000);
    assert_eq!(seen.keys().filter_map(|path| path.to_str()).collect::<Vec<_>>(), ["", "mnt"]);
}

#[test]
fn a_source_that_overlaps_the_store_is_refused() {
    let store = Store::new();
    fs::create_dir_all(store.path("store/layers/x")).unwrap();
    std::os::unix::fs::symlink(store.path("store/layers"), store.path("alias")).unwrap();
    for source in ["store", "store/layers", "store/bases", "alias", ""] {
        let error = store.bases.import("img", &store.path(source)).unwrap_err();
        assert!(matches!(error, ImportError::Source { .. }), "{source}: {error}");
    }
    store.assert_empty();
}

#[test]
fn a_file_that_changes_while_it_is_copied_fails_the_import() {
    let store = Store::new();
    let source = store.path("source");
    fs::create_dir(&source).unwrap();
    let mut growing = File::create(source.join("growing.log")).unwrap();
    growing.write_all(&vec![1; 64 << 20]).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                growing.write_all(b"line").unwrap();
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        });
        let error = store.bases.import("img", &source).expect_err("a torn file was taken").to_string();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(error.contains("growing.log") && error.contains("changed"), "{error}");
    });
    store.assert_empty();
}

#[test]
fn a_tree_as_deep_as_paths_allow_is_imported_and_removed() {
    let store = Store::new();
    let deep = "d/".repeat(1_990);
    let tar = Tar::default().pax(&[("path", format!("{deep}f").as_bytes())]).file("f", b"deep");
    let manifest = store.import_bytes(&tar.end()).unwrap();
    assert_eq!(manifest.n_entries, 1_991);
    // And as a directory: out of the store with it, then in again.
    fs::rename(store.tree("img"), store.path("source")).unwrap();
    store.bases.remove("img").unwrap();
    let copied = store.bases.import("copy", &store.path("source")).unwrap();
    assert_eq!(copied.n_entries, 1_991);
    store.bases.remove("copy").unwrap();
    // Not left to the temporary directory, which would hold a descriptor for each level.
    beneath::delete(File::open(store.dir.path()).unwrap(), OsStr::new("source"), |_| {}).unwrap();
    store.assert_empty();
    let longer = "d/".repeat(2_001);
    store.assert_refused(&Tar::default().pax(&[("path", longer.as_bytes())]).dir("d").end(), "4000");
}

/// One step in the making of a random tree; numbers choose among what exists.
#[derive(Debug, Clone)]
enum Step {
    Dir { under: usize, name: u8, mode: u32 },
    File { under: usize, name: u8, mode: u32, len: usize, hole: u64 },
    Symlink { under: usize, name: u8, target: String },
    Link { under: usize, name: u8, to: usize },
    Fifo { under: usize, name: u8 },
    Own { path: usize, uid: u32, gid: u32 },
    Xattr { path: usize, name: u8, value: Vec<u8> },
    Touch { path: usize, secs: i64, nanos: u32 },
}

fn any_step() -> impl Strategy<Value = Step> {
    let place = || (0..1000_usize, 0..40_u8);
    prop_oneof![
        (place(), 0..0o10000_u32).prop_map(|((under, name), mode)| Step::Dir { under, name, mode }),
        (place(), 0..0o10000_u32, 0..20_000_usize, 0..100_000_u64)
            .prop_map(|((under, name), mode, len, hole)| Step::File { under, name, mode, len, hole }),
        (place(), "[a-z./]{1,200}").prop_map(|((under, name), target)| Step::Symlink { under, name, target }),
        (place(), 0..1000_usize).prop_map(|((under, name), to)| Step::Link { under, name, to }),
        place().prop_map(|(under, name)| Step::Fifo { under, name }),
        (0..1000_usize, 0..65_536_u32, 0..65_536_u32).prop_map(|(path, uid, gid)| Step::Own { path, uid, gid }),
        (0..1000_usize, 0..4_u8, proptest::collection::vec(any::<u8>(), 0..100))
            .prop_map(|(path, name, value)| Step::Xattr { path, name, value }),
        (0..1000_usize, -1_000_000..2_000_000_000_i64, 0..1_000_000_000_u32)
            .prop_map(|(path, secs, nanos)| Step::Touch { path, secs, nanos }),
    ]
}

/// Makes the tree; a step that makes no sense there is left out.
fn make_tree(root: &Path, steps: &[Step]) {
    let (mut dirs, mut paths) = (vec![root.to_owned()], vec![root.to_owned()]);
    let mut touches = Vec::new();
    for step in steps {
        let place = |under: usize, name: u8| dirs[under % dirs.len()].join(format!("n{name}"));
        let chmod = |path: &Path, mode| sys::fs::chmod(path_fd(path).as_fd(), mode).unwrap();
        let made = match step {
            Step::Dir { under, name, mode } => {
                let path = place(*under, *name);
                fs::create_dir(&path).ok().map(|()| {
                    chmod(&path, *mode);
                    dirs.push(path.clone());
                    path
                })
            }
            Step::File { under, name, mode, len, hole } => {
                let path = place(*under, *name);
                File::create_new(&path).ok().map(|file| {
                    std::os::unix::fs::FileExt::write_all_at(&file, &vec![b'c'; *len], *hole).unwrap();
                    file.set_len(hole + *len as u64 + hole / 2).unwrap();
                    chmod(&path, *mode);
                    path
                })
            }
            Step::Symlink { under, name, target } => {
                let path = place(*under, *name);
                std::os::unix::fs::symlink(target, &path).ok().map(|()| path)
            }
            Step::Link { under, name, to } => {
                let path = place(*under, *name);
                fs::hard_link(&paths[to % paths.len()], &path).ok().map(|()| path)
            }
            Step::Fifo { under, name } => {
                let path = place(*under, *name);
                nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).ok().map(|()| path)
            }
            Step::Own { path, uid, gid } => {
                std::os::unix::fs::lchown(&paths[path % paths.len()], Some(*uid), Some(*gid)).unwrap();
                None
            }
            Step::Xattr { path, name, value } => {
                let name = std::ffi::CString::new(format!("user.x{name}")).unwrap();
                let _ = sys::fs::set_xattr(path_fd(&paths[path % paths.len()]).as_fd(), &name, value);
                None
            }
            Step::Touch { path, secs, nanos } => {
                touches.push((paths[path % paths.len()].clone(), *secs, *nanos));
                None
            }
        };
        paths.extend(made);
    }
    for (path, secs, nanos) in touches {
        set_mtime(&path, secs, nanos);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_out_as_it_went_in(steps in proptest::collection::vec(any_step(), 0..80)) {
        let store = Store::new();
        let (source, archive) = (store.path("source"), store.path("archive.tar"));
        fs::create_dir(&source).unwrap();
        make_tree(&source, &steps);
        let expected = expected(&source);
        let by_dir = store.bases.import("by-dir", &source).unwrap();
        assert_same(&look_at(&store.tree("by-dir"), 100_000), &expected);
        system_tar(&source, &archive, &["--format=pax", "-S", "--xattrs", "--xattrs-include=*"]);
        let by_tar = store.bases.import("by-tar", &archive).unwrap();
        // GNU tar stores every name of a FIFO as one of its own.
        let without_fifo_groups = |mut tree: BTreeMap<PathBuf, Seen>| {
            tree.values_mut().filter(|entry| entry.kind == 'p').for_each(|entry| entry.same_as = None);
            tree
        };
        assert_same(&without_fifo_groups(look_at(&store.tree("by-tar"), 100_000)), &without_fifo_groups(expected));
        prop_assert_eq!((by_dir.n_entries, by_dir.len_bytes), (by_tar.n_entries, by_tar.len_bytes));
        prop_assert_eq!(by_dir.notes, Vec::<String>::new());
    }
}
