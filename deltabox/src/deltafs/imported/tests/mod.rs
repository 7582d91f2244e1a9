//! Imports into real directories, as root: what goes in is compared with what comes out, owners shifted.

mod archives;
mod attacks;
mod crashes;
mod damage;
mod directories;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::*;
use crate::sys;

/// A store of its own, removed with it.
struct Store {
    dir: tempfile::TempDir,
    bases: ImportedBases,
}

impl Store {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "importing bases needs root: run the tests as root");
        let dir = tempfile::tempdir().unwrap();
        let bases = ImportedBases::at(&dir.path().join("store/bases"));
        Self { dir, bases }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tree(&self, name: &str) -> PathBuf {
        self.path("store/bases").join(name).join("tree")
    }

    /// Imports archive bytes as `img`.
    fn import_bytes(&self, bytes: &[u8]) -> Result<BaseManifest, ImportError> {
        let path = self.path("archive");
        fs::write(&path, bytes).unwrap();
        self.bases.import("img", &path)
    }

    /// Nothing is in the directory of bases, hidden or not.
    #[track_caller]
    fn assert_empty(&self) {
        let left: Vec<_> = fs::read_dir(self.path("store/bases"))
            .map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    /// The archive is refused, with `why` in the text, and leaves nothing.
    #[track_caller]
    fn assert_refused(&self, bytes: &[u8], why: &str) {
        let error = self.import_bytes(bytes).expect_err("the archive was taken").to_string();
        assert!(error.contains(why), "`{error}` does not say `{why}`");
        self.assert_empty();
    }
}

/// Everything of an entry that an import is to keep, owners as in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: char,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    rdev: u64,
    len: u64,
    content: Vec<u8>,
    /// The first path of the same inode, if there are several.
    same_as: Option<PathBuf>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

/// The tree at `root`; `shift` is taken off the owners. The root itself is the empty path.
fn look_at(root: &Path, shift: u32) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        // Without the trailing slash that `root.join("")` would have: a link must not be followed.
        let full = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(&path) };
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.file_type();
        if kind.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&full).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            pending.extend(names.into_iter().rev().map(|name| path.join(name)));
        }
        let (kind, content) = match () {
            () if kind.is_dir() => ('d', Vec::new()),
            () if kind.is_symlink() => ('l', fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec()),
            () if kind.is_file() && meta.len() < 50_000_000 => ('f', fs::read(&full).unwrap()),
            () if kind.is_file() => ('f', Vec::new()),
            () if kind.is_fifo() => ('p', Vec::new()),
            () if kind.is_char_device() => ('c', Vec::new()),
            () if kind.is_block_device() => ('b', Vec::new()),
            () => ('s', Vec::new()),
        };
        let same_as =
            (kind != 'd' && meta.nlink() > 1).then(|| inodes.entry(meta.ino()).or_insert_with(|| path.clone()).clone());
        let entry = Seen {
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid().checked_sub(shift).unwrap(),
            gid: meta.gid().checked_sub(shift).unwrap(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            rdev: meta.rdev(),
            len: if kind == 'd' { 0 } else { meta.len() },
            content,
            same_as,
            xattrs: xattrs_of(&full),
        };
        seen.insert(path, entry);
    }
    seen
}

fn no_mode() -> nix::sys::stat::Mode {
    nix::sys::stat::Mode::empty()
}

fn path_fd(path: &Path) -> std::os::fd::OwnedFd {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, no_mode()).unwrap()
}

fn xattrs_of(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let object = path_fd(path);
    let mut names = vec![0; sys::fs::XATTR_MAX_BYTES];
    let len = sys::fs::list_xattrs(object.as_fd(), &mut names).unwrap();
    let mut found = BTreeMap::new();
    for name in names[..len].split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).unwrap();
        let mut value = vec![0; sys::fs::XATTR_MAX_BYTES];
        let len = sys::fs::get_xattr(object.as_fd(), name, &mut value).unwrap();
        found.insert(name.to_str().unwrap().to_owned(), value[..len].to_vec());
    }
    found
}

fn set_xattr(path: &Path, name: &CStr, value: &[u8]) {
    sys::fs::set_xattr(path_fd(path).as_fd(), name, value).unwrap();
}

fn set_mtime(path: &Path, secs: i64, nanos: u32) {
    sys::fs::set_mtime(path_fd(path).as_fd(), secs, nanos).unwrap();
}

#[track_caller]
fn assert_same(left: &BTreeMap<PathBuf, Seen>, right: &BTreeMap<PathBuf, Seen>) {
    for path in left.keys().chain(right.keys()) {
        assert_eq!(left.get(path), right.get(path), "{} differs", path.display());
    }
}

const V2_CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// The same, as it is stored: revision 3, root 100000.
fn stored_capability() -> Vec<u8> {
    let mut value = V2_CAPABILITY.to_vec();
    value[3] = 3;
    value.extend_from_slice(&100_000_u32.to_le_bytes());
    value
}

/// A tree with one of everything that is kept as it is (apart from owners and capabilities).
fn make_rich_tree(root: &Path) {
    let own = |path: &Path, uid, gid| std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    let mode = |path: &Path, mode| sys::fs::chmod(path_fd(path).as_fd(), mode).unwrap();
    let node = |path: &Path, kind, dev| nix::sys::stat::mknod(path, kind, nix::sys::stat::Mode::S_IRUSR, dev).unwrap();
    use nix::sys::stat::SFlag;

    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::write(root.join("usr/bin/su"), b"#!setuid").unwrap();
    own(&root.join("usr/bin/su"), 0, 42);
    mode(&root.join("usr/bin/su"), 0o6755);
    fs::write(root.join("usr/bin/ping"), b"capable").unwrap();
    set_xattr(&root.join("usr/bin/ping"), c"security.capability", &V2_CAPABILITY);
    set_xattr(&root.join("usr/bin/ping"), c"user.binary", b"a\nb=\0c");
    fs::hard_link(root.join("usr/bin/ping"), root.join("usr/ping6")).unwrap();
    std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
    own(&root.join("bin"), 1000, 1000);
    set_mtime(&root.join("bin"), 1_000_000_000, 123_456_789);
    std::os::unix::fs::symlink("/etc/shadow", root.join("usr/absolute")).unwrap();
    std::os::unix::fs::symlink("../../../x", root.join("usr/dangling")).unwrap();
    fs::hard_link(root.join("usr/dangling"), root.join("usr/second-name")).unwrap();
    node(&root.join("usr/pipe"), SFlag::S_IFIFO, 0);
    node(&root.join("usr/null"), SFlag::S_IFCHR, libc::makedev(1, 3));
    node(&root.join("usr/disk"), SFlag::S_IFBLK, libc::makedev(259, 70_000));
    fs::create_dir(root.join("tmp")).unwrap();
    mode(&root.join("tmp"), 0o1777);
    set_xattr(&root.join("tmp"), c"user.on-dir", &[7; 300]);
    let long = root.join("n".repeat(200)).join("m".repeat(255));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("o".repeat(100)), b"deep").unwrap();
    fs::write(root.join("-rf \n \u{fc}\"'"), b"odd name").unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    let mut sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all(b"start").unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 5_000_000).unwrap();
    sparse.set_len(20_000_000).unwrap();
    fs::create_dir(root.join("read-only")).unwrap();
    fs::write(root.join("read-only/file"), b"inside").unwrap();
    fs::create_dir(root.join("read-only/none")).unwrap();
    mode(&root.join("read-only/none"), 0);
    mode(&root.join("read-only/file"), 0o444);
    mode(&root.join("read-only"), 0o555);
    own(&root.join("read-only"), 65_535, 65_534);
    for (path, secs) in [("read-only", 5), ("usr/bin", 1_700_000_000), ("usr", 3), ("empty", -7), ("", 1_600_000_000)] {
        set_mtime(&if path.is_empty() { root.to_owned() } else { root.join(path) }, secs, 987_654_321);
    }
}

/// What an import of `source` should hold.
fn expected(source: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = look_at(source, 0);
    for entry in seen.values_mut() {
        if let Some(value) = entry.xattrs.get_mut("security.capability") {
            *value = stored_capability();
        }
    }
    seen
}

/// An archive made header by header, so that it can be wrong.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn raw(mut self, kind: u8, path: &str, link: &str, data: &[u8]) -> Self {
        let mut header = ::tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(::tar::EntryType::new(kind));
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.raw(b'0', path, "", data)
    }

    fn dir(self, path: &str) -> Self {
        self.raw(b'5', path, "", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.raw(b'2', path, target, b"")
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.raw(b'1', path, target, b"")
    }

    /// Extension records for the next entry.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let len = (1..9).map(|digits| rest + digits).find(|len| len.to_string().len() + rest == *len).unwrap();
            bytes.extend_from_slice(format!("{len} {key}=").as_bytes());
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        self.raw(b'x', "PaxHeaders/x", "", &bytes)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// The system's tar, as an independent writer of archives.
fn system_tar(source: &Path, archive: &Path, options: &[&str]) {
    let output = std::process::Command::new("tar")
        .args(options)
        .args(["--sort=name", "-cf"])
        .arg(archive)
        .arg("-C")
        .arg(source)
        .arg(".")
        .output()
        .expect("run tar: GNU tar must be installed");
    assert!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn bases_are_listed_by_name_opened_and_removed() {
    let store = Store::new();
    assert_eq!(store.bases.list().unwrap(), []);
    let archive = store.path("a.tar");
    fs::write(&archive, Tar::default().file("f", b"1234").end()).unwrap();
    for name in ["zeta", "alpha"] {
        let manifest = store.bases.import(name, &archive).unwrap();
        assert_eq!((manifest.n_entries, manifest.len_bytes, manifest.notes), (1, 4, Vec::new()));
        assert_eq!(manifest.source, archive.display().to_string());
    }
    fs::create_dir(store.path("store/bases/.import-abcdef")).unwrap();
    let names = || store.bases.list().unwrap().into_iter().map(|base| base.name).collect::<Vec<_>>();
    assert_eq!(names(), ["alpha", "zeta"]);
    let tree = store.bases.tree("zeta").unwrap();
    assert_eq!(beneath::stat_at(&tree, OsStr::new("f")).unwrap().st_size, 4);
    store.bases.remove("zeta").unwrap();
    assert_eq!(names(), ["alpha"]);
    assert!(matches!(store.bases.remove("zeta"), Err(ImportError::NotFound { .. })));
    assert!(matches!(store.bases.tree("zeta"), Err(ImportError::NotFound { .. })));
    store.bases.remove("alpha").unwrap();
    assert_eq!(store.bases.clean().unwrap(), 1);
    store.assert_empty();
    let mode = fs::metadata(store.path("store/bases")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700, "others could reach set-user-id files of images");
}

#[test]
fn a_name_that_is_bad_reserved_or_taken_is_refused() {
    let store = Store::new();
    let archive = store.path("a.tar");
    fs::write(&archive, Tar::default().file("f", b"").end()).unwrap();
    for bad in ["../x", "", ".hidden", "a/b", "UPPER"] {
        assert!(matches!(store.bases.import(bad, &archive), Err(ImportError::Name(_))), "{bad:?}");
        assert!(matches!(store.bases.remove(bad), Err(ImportError::Name(_))), "{bad:?}");
        assert!(matches!(store.bases.tree(bad), Err(ImportError::Name(_))), "{bad:?}");
    }
    assert!(matches!(store.bases.import("host", &archive), Err(ImportError::Reserved { .. })));
    store.bases.import("img", &archive).unwrap();
    assert!(matches!(store.bases.import("img", &archive), Err(ImportError::Exists { .. })));
    store.bases.remove("img").unwrap();
    store.assert_empty();
}

#[test]
fn of_concurrent_imports_of_one_name_one_wins() {
    let store = Store::new();
    let archive = store.path("a.tar");
    fs::write(&archive, Tar::default().file("f", &[1; 300_000]).end()).unwrap();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| store.bases.import("img", &archive))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert!(results.iter().all(|result| matches!(result, Ok(_) | Err(ImportError::Exists { .. }))), "{results:?}");
    assert_eq!(store.bases.clean().unwrap(), 0);
    assert_eq!(fs::read_dir(store.path("store/bases")).unwrap().count(), 1);
}

#[test]
fn a_source_of_the_wrong_kind_is_refused() {
    let store = Store::new();
    assert!(matches!(store.bases.import("img", Path::new("/dev/null")), Err(ImportError::Source { .. })));
    assert!(matches!(store.bases.import("img", &store.path("missing")), Err(ImportError::Io { .. })));
    let fifo = store.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(matches!(store.bases.import("img", &fifo), Err(ImportError::Source { .. })));
    store.assert_refused(b"", "empty");
    store.assert_refused(b"BZh9....", "bzip2");
    store.assert_refused(b"PK\x03\x04", "zip");
    store.assert_refused(&[b'x'; 2048], "not a tar archive");
    store.assert_refused(&[0; 10_240], "no entry");
}
