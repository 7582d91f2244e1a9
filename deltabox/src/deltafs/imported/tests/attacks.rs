//! Archives and trees made to write, read or steer something outside the base.

use super::*;

#[test]
fn no_entry_is_written_through_a_planted_link() {
    let store = Store::new();
    let target = store.path("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("victim"), b"untouched").unwrap();
    let target_text = target.to_str().unwrap();
    let planted = || Tar::default().symlink("a", target_text);
    for evil in [
        planted().file("a/evil", b"x"),
        planted().file("a/victim", b"x"),
        planted().dir("a/evil"),
        planted().symlink("a/evil", "x"),
        planted().raw(b'3', "a/evil", "", b""),
        planted().file("a/deeper/evil", b"x"),
        planted().file("a/.wh.victim", b""),
        planted().file("a/.wh..wh..opq", b""),
        planted().link("stolen", "a/victim"),
        planted().link("a/evil", "a"),
        Tar::default().dir("d").symlink("d/up", "..").file("d/up/evil", b""),
        Tar::default().symlink("self", ".").file("self/evil", b""),
        Tar::default().symlink("proc", "/proc/self/root").file("proc/tmp/evil", b""),
    ] {
        store.assert_refused(&evil.end(), "symbolic link");
    }
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    assert_eq!(fs::read(target.join("victim")).unwrap(), b"untouched");

    // A directory in place of the link is made afresh; the link's target stays as it is.
    store.import_bytes(&planted().dir("a").file("a/fine", b"").file("b", b"").end()).unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    assert!(store.tree("img").join("a/fine").exists());
}

#[test]
fn no_file_is_written_through_a_link_of_the_same_name() {
    let store = Store::new();
    let victim = store.path("victim");
    fs::write(&victim, b"untouched").unwrap();
    let tar = Tar::default().symlink("a", victim.to_str().unwrap()).file("a", b"evil").symlink("b", "/").link("c", "b");
    store.import_bytes(&tar.end()).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    let seen = look_at(&store.tree("img"), 100_000);
    assert_eq!((seen[Path::new("a")].kind, seen[Path::new("c")].kind), ('f', 'l'));
}

#[test]
fn paths_that_climb_are_refused() {
    let store = Store::new();
    for evil in ["../evil", "a/../../evil", "a/..", "..", "/../evil"] {
        store.assert_refused(&Tar::default().dir("a").file(evil, b"").end(), "`..`");
    }
    store.assert_refused(&Tar::default().pax(&[("path", b"../evil")]).file("f", b"").end(), "`..`");
    store.assert_refused(&Tar::default().pax(&[("path", b"a\0b")]).file("f", b"").end(), "zero byte");
    store.assert_refused(&Tar::default().raw(b'L', "L", "", b"../../evil\0").file("f", b"").end(), "`..`");
    // What a whiteout names is a path too.
    store.assert_refused(&Tar::default().file("a/.wh...", b"").end(), "names no file");
    store.assert_refused(&Tar::default().file(".wh..", b"").end(), "names no file");
    store.assert_refused(&Tar::default().file(".wh.", b"").end(), "names no file");
    store.assert_refused(&Tar::default().symlink("/", "/tmp").end(), "root");
    store.assert_refused(&Tar::default().file("f", b"").file("f/below", b"").end(), "not a directory");
    // As tar does it, an absolute path means one in the tree.
    store.import_bytes(&Tar::default().file("/etc/deltabox-test-absolute", b"").end()).unwrap();
    assert!(store.tree("img").join("etc/deltabox-test-absolute").exists());
    assert!(!Path::new("/etc/deltabox-test-absolute").exists());
}

#[test]
fn hard_links_reach_only_earlier_entries() {
    let store = Store::new();
    for target in ["/etc/shadow", "later", "missing/dir/f", "../../../../etc/shadow", "..", "", "/", "d"] {
        let tar = Tar::default().file("f", b"").dir("d").link("stolen", target).file("later", b"");
        store.assert_refused(&tar.end(), "hard link");
    }
    store.assert_refused(&Tar::default().file("f", b"").link("stolen", "f/x").end(), "not a directory");
    // The link's own place is cleared first: its target may have been in there.
    store.assert_refused(&Tar::default().file("d/f", b"").link("d", "d/f").end(), "hard link");
    let planted = Tar::default().symlink("etc", "/etc").link("stolen", "etc/shadow");
    store.assert_refused(&planted.end(), "symbolic link");
}

#[test]
fn nothing_in_an_archive_steers_an_overlay() {
    let store = Store::new();
    let tar = Tar::default()
        .pax(&[
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("LIBARCHIVE.xattr.trusted.overlay.origin", b"AAAA"),
            ("SCHILY.xattr.%74rusted.overlay.metacopy", b""),
        ])
        .dir("d")
        .pax(&[("SCHILY.devmajor", b"0")])
        .file("d/f", b"");
    let mut bytes = tar.0;
    // A character device 0:0 is a whiteout.
    let whiteout = bytes.len();
    bytes.extend(Tar::default().raw(b'3', "whiteout", "", b"").0);
    let mut header = ::tar::Header::from_byte_slice(&bytes[whiteout..whiteout + 512]).clone();
    header.set_device_major(0).unwrap();
    header.set_device_minor(0).unwrap();
    header.set_cksum();
    bytes[whiteout..].copy_from_slice(header.as_bytes());
    let manifest = store.import_bytes(&Tar(bytes).end()).unwrap();
    let seen = look_at(&store.tree("img"), 100_000);
    assert!(seen.values().all(|entry| entry.xattrs.is_empty()));
    assert_eq!(seen.keys().filter_map(|path| path.to_str()).collect::<Vec<_>>(), ["", "d", "d/f"]);
    assert_eq!(manifest.notes.len(), 3, "{:?}", manifest.notes);
}

#[test]
fn extension_headers_cannot_take_unbounded_memory() {
    let store = Store::new();
    let mut header = ::tar::Header::new_ustar();
    header.set_size(1 << 40);
    for kind in [b'L', b'K', b'x', b'g'] {
        header.set_entry_type(::tar::EntryType::new(kind));
        header.set_cksum();
        store.assert_refused(&[header.as_bytes().as_slice(), &[0; 4096]].concat(), "1 MiB");
    }
    let mut many = Tar::default();
    for _ in 0..3 {
        let value = vec![b'v'; 500_000];
        let record = [b"500011 key=".as_slice(), &value[..499_999], b"\n"].concat();
        many = many.raw(b'g', "g", "", &record);
    }
    store.assert_refused(&many.file("f", b"").end(), "1 MiB");
}

#[test]
fn links_in_a_directory_source_are_copied_and_never_followed() {
    let store = Store::new();
    let (source, secret) = (store.path("source"), store.path("secret"));
    fs::create_dir_all(source.join("d")).unwrap();
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), b"secret").unwrap();
    std::os::unix::fs::symlink(&secret, source.join("dir-link")).unwrap();
    std::os::unix::fs::symlink(secret.join("key"), source.join("d/file-link")).unwrap();
    std::os::unix::fs::symlink("/proc/self/root", source.join("root")).unwrap();
    set_xattr(&source.join("d"), c"trusted.overlay.opaque", b"y");
    nix::sys::stat::mknod(&source.join("whiteout"), nix::sys::stat::SFlag::S_IFCHR, no_mode(), 0).unwrap();
    let manifest = store.bases.import("img", &source).unwrap();
    let seen = look_at(&store.tree("img"), 100_000);
    assert_eq!(
        seen.iter().map(|(path, entry)| (path.to_str().unwrap(), entry.kind)).collect::<Vec<_>>(),
        [("", 'd'), ("d", 'd'), ("d/file-link", 'l'), ("dir-link", 'l'), ("root", 'l')]
    );
    assert!(seen.values().all(|entry| entry.xattrs.is_empty()));
    assert_eq!(manifest.notes.len(), 2, "{:?}", manifest.notes);
}

#[test]
fn a_directory_that_turns_into_a_link_during_the_import_leads_nowhere() {
    let store = Store::new();
    let (source, secret) = (store.path("source"), store.path("secret"));
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), b"secret").unwrap();
    for i in 0..20 {
        fs::create_dir_all(source.join(format!("d{i}/sub"))).unwrap();
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (flip, aside) = (source.join("d7/sub"), source.join("d7/aside"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::rename(&flip, &aside);
                let _ = std::os::unix::fs::symlink(&secret, &flip);
                let _ = fs::remove_file(&flip);
                let _ = fs::rename(&aside, &flip);
            }
        });
        for _ in 0..60 {
            if store.bases.import("img", &source).is_ok() {
                let seen = look_at(&store.tree("img"), 100_000);
                assert!(!seen.keys().any(|path| path.ends_with("key")), "the link was followed");
                store.bases.remove("img").unwrap();
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    store.assert_empty();
}
