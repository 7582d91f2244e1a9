//! Archives that are good.

use super::*;

/// Imports the rich tree through the system's tar.
fn round_trip(options: &[&str], has_xattrs: bool, has_nanos: bool) {
    let store = Store::new();
    let (source, archive) = (store.path("source"), store.path("archive"));
    fs::create_dir(&source).unwrap();
    make_rich_tree(&source);
    system_tar(&source, &archive, options);
    let manifest = store.bases.import("img", &archive).unwrap();
    assert_eq!(manifest.notes, Vec::<String>::new());

    let mut expected = expected(&source);
    assert_eq!(manifest.n_entries, expected.len() as u64 - 1);
    for entry in expected.values_mut() {
        if !has_xattrs {
            entry.xattrs.clear();
        }
        if !has_nanos {
            entry.mtime.1 = 0;
        }
    }
    assert_same(&look_at(&store.tree("img"), 100_000), &expected);
    let sparse = fs::metadata(store.tree("img").join("sparse")).unwrap();
    if options.contains(&"-S") {
        assert!(sparse.blocks() * 512 < 100_000, "holes were filled: {} blocks", sparse.blocks());
    }
}

const ALL_XATTRS: [&str; 2] = ["--xattrs", "--xattrs-include=*"];

#[test]
fn a_pax_archive_keeps_everything() {
    round_trip(&["--format=pax", ALL_XATTRS[0], ALL_XATTRS[1]], true, true);
}

#[test]
fn a_gnu_archive_keeps_what_the_format_has() {
    round_trip(&["--format=gnu"], false, false);
}

#[test]
fn sparse_files_of_every_format_keep_their_holes() {
    round_trip(&["--format=gnu", "-S"], false, false);
    for version in ["0.0", "0.1", "1.0"] {
        let version = format!("--sparse-version={version}");
        round_trip(&["--format=pax", "-S", &version, ALL_XATTRS[0], ALL_XATTRS[1]], true, true);
    }
}

#[test]
fn a_sparse_file_of_many_segments_is_whole() {
    let store = Store::new();
    let source = store.path("source");
    fs::create_dir(&source).unwrap();
    let file = File::create(source.join("f")).unwrap();
    for i in 0..200_u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &[u8::try_from(i).unwrap() + 1; 5000], i * 30_000).unwrap();
    }
    for options in [&["--format=gnu", "-S"], &["--format=pax", "-S"]] {
        system_tar(&source, &store.path("archive"), options);
        store.bases.import("img", &store.path("archive")).unwrap();
        assert_eq!(fs::read(source.join("f")).unwrap(), fs::read(store.tree("img").join("f")).unwrap());
        store.bases.remove("img").unwrap();
    }
}

#[test]
fn compressed_archives_are_told_by_their_first_bytes() {
    round_trip(&["--format=pax", "-z", ALL_XATTRS[0], ALL_XATTRS[1]], true, true);
    round_trip(&["--format=pax", "--zstd", ALL_XATTRS[0], ALL_XATTRS[1]], true, true);
    round_trip(&["--format=pax", "-J", ALL_XATTRS[0], ALL_XATTRS[1]], true, true);
}

#[test]
fn archives_of_the_tar_crate_are_read() {
    let store = Store::new();
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o600);
    header.set_uid(5_000_000);
    header.set_gid(1);
    header.set_mtime(1 << 33);
    let path = format!("{}/f", "long-directory/".repeat(20));
    builder.append_data(&mut header, &path, &b"abc"[..]).unwrap();
    header.set_size(0);
    header.set_entry_type(::tar::EntryType::Link);
    builder.append_link(&mut header, "link", &path).unwrap();
    let manifest = store.import_bytes(&builder.into_inner().unwrap()).unwrap();
    assert_eq!((manifest.n_entries, manifest.len_bytes), (22, 3));
    assert_eq!(manifest.notes.len(), 1, "{:?}", manifest.notes);
    let seen = look_at(&store.tree("img"), 100_000);
    let file = &seen[Path::new("link")];
    assert_eq!((file.uid, file.gid, file.mtime.0, file.content.as_slice()), (65_534, 1, 1 << 33, &b"abc"[..]));
    assert_eq!(seen[Path::new("long-directory")].mode, 0o755);
}

#[test]
fn whiteouts_remove_what_earlier_entries_made() {
    let store = Store::new();
    let tar = Tar::default()
        .file("gone", b"x")
        .dir("dir/")
        .file("dir/deep/f", b"yy")
        .file("kept", b"zzz")
        .file(".wh.gone", b"")
        .file(".wh.never-was", b"")
        .file("no/such/.wh.dir", b"")
        .file(".wh.dir", b"")
        .dir("opaque")
        .file("opaque/old/f", b"old")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"new")
        .file(".wh..wh.plnk", b"");
    let manifest = store.import_bytes(&tar.end()).unwrap();
    let seen = look_at(&store.tree("img"), 100_000);
    let names: Vec<_> = seen.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(names, ["", "kept", "opaque", "opaque/new"]);
    assert_eq!((manifest.n_entries, manifest.len_bytes), (3, 6));
    assert_eq!(manifest.notes.len(), 1, "{:?}", manifest.notes);
}

#[test]
fn a_later_entry_of_the_same_path_wins() {
    let store = Store::new();
    let tar = Tar::default()
        .file("f", b"first")
        .link("other", "f")
        .file("f", b"second!")
        .symlink("s", "/nowhere")
        .file("s", b"no link any more")
        .dir("d")
        .file("d/below", b"")
        .file("d", b"was a directory")
        .file("e", b"was a file")
        .dir("e")
        .file("e/f", b"")
        .dir("e")
        .link("e/g", "e/f")
        .link("e/g", "e/f")
        .link("e/g", "e/g");
    let manifest = store.import_bytes(&tar.end()).unwrap();
    let seen = look_at(&store.tree("img"), 100_000);
    let content = |path: &str| seen[Path::new(path)].content.as_slice();
    assert_eq!((content("f"), content("other")), (&b"second!"[..], &b"first"[..]));
    assert_eq!((content("s"), content("d")), (&b"no link any more"[..], &b"was a directory"[..]));
    assert_eq!(seen[Path::new("e/g")].same_as, Some("e/f".into()));
    assert_eq!(manifest.n_entries, seen.len() as u64 - 1);
    assert_eq!(manifest.len_bytes, 7 + 5 + 16 + 15);
}

#[test]
fn extension_headers_override_and_attributes_are_kept_or_noted() {
    let store = Store::new();
    let long = "x".repeat(120);
    let path = format!("a/{long}/b");
    let tar = Tar::default()
        .pax(&[
            ("path", path.as_bytes()),
            ("uid", b"65535"),
            ("gid", b"70000"),
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.user.k", b"line\nline"),
            ("SCHILY.xattr.security.capability", &V2_CAPABILITY),
            ("SCHILY.xattr.security.selinux", b"label"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.acl.access", b"user::rw-"),
        ])
        .file("short", b"data")
        .raw(b'g', "global", "", b"15 comment=abc\n")
        .raw(b'7', "contiguous", "", b"c")
        .raw(b'0', "old-dir/", "", b"")
        .raw(b'3', "null", "", b"")
        .raw(b'6', "pipe", "", b"")
        .raw(b'V', "label", "", b"");
    let manifest = store.import_bytes(&tar.end()).unwrap();
    let seen = look_at(&store.tree("img"), 100_000);
    let file = &seen[Path::new(&path)];
    assert_eq!((file.uid, file.gid, file.mtime), (65_535, 65_534, (-2, 500_000_000)));
    assert_eq!(file.xattrs["user.k"], b"line\nline");
    assert_eq!(file.xattrs["security.capability"], stored_capability());
    assert_eq!(file.xattrs.len(), 2);
    let kind = |path: &str| seen[Path::new(path)].kind;
    assert_eq!((kind("old-dir"), kind("null"), kind("pipe"), kind("contiguous")), ('d', 'c', 'p', 'f'));
    assert_eq!(seen[Path::new("null")].rdev, libc::makedev(1, 3));
    assert_eq!(manifest.notes.len(), 5, "{:?}", manifest.notes);
}

#[test]
fn the_lists_of_a_directory_do_not_leak_into_what_is_made_in_it() {
    let acl = |tag_id: u32| {
        let mut bytes = 2_u32.to_le_bytes().to_vec();
        for (tag, perm, id) in
            [(1_u16, 7_u16, u32::MAX), (2, 7, tag_id), (4, 5, u32::MAX), (0x10, 7, u32::MAX), (0x20, 0, u32::MAX)]
        {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&perm.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    };
    let store = Store::new();
    let tar = Tar::default()
        .pax(&[
            ("SCHILY.xattr.system.posix_acl_default", &acl(1000)),
            ("SCHILY.xattr.system.posix_acl_access", &acl(7)),
        ])
        .dir("d")
        .file("d/f", b"")
        .dir("d/e");
    store.import_bytes(&tar.end()).unwrap();
    let seen = look_at(&store.tree("img"), 100_000);
    assert_eq!(seen[Path::new("d")].xattrs["system.posix_acl_default"], acl(101_000));
    assert_eq!(seen[Path::new("d")].xattrs["system.posix_acl_access"], acl(100_007));
    for below in ["d/f", "d/e"] {
        assert_eq!(seen[Path::new(below)].xattrs, BTreeMap::new(), "{below}");
    }
    assert_eq!((seen[Path::new("d/f")].mode, seen[Path::new("d/e")].mode), (0o644, 0o755));
}
