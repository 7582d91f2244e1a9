//! Random layers, made by the kernel's own overlayfs, and whole trees to compare. For the tests of this room.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::sys::stat::{Mode, SFlag, mknod};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::fixtures::path_of;
use super::layer::open_dir;
use super::overlay::{Top, mount_stack};
use super::view::entry::read_xattrs;
use super::view::place;
use crate::sandbox::idmap::HOST_ID_BASE;
use crate::sys::fs::set_xattr;

/// True when the test has to be skipped because somebody asked for that. Fails without root.
pub(super) fn skipped_without_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    if std::env::var_os("DELTABOX_SKIP_PRIVILEGED").is_some() {
        println!("SKIPPED: needs root, and DELTABOX_SKIP_PRIVILEGED is set");
        return true;
    }
    panic!("this test needs root; set DELTABOX_SKIP_PRIVILEGED=1 to skip it");
}

/// One operation of a program; numbers choose among what is there.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Create(u16, u8, u8),
    Append(u16, u8),
    Overwrite(u16, u8),
    Mkdir(u16, u8),
    Rename(u16, u16, u8),
    Unlink(u16),
    /// `rm -r`, and perhaps a fresh directory of that name.
    RemoveDir(u16, bool),
    Link(u16, u16, u8),
    Symlink(u16, u8),
    Chmod(u16, u16),
    Chown(u16, u8),
    Xattr(u16, u8, u8),
    Node(u16, u8, bool),
}

/// Random operations, directories and renames among them often.
pub(super) fn op() -> impl Strategy<Value = Op> {
    let (i, b) = (any::<u16>(), any::<u8>());
    prop_oneof![
        4 => (i, b, b).prop_map(|(at, name, byte)| Op::Create(at, name, byte)),
        2 => (i, b).prop_map(|(at, byte)| Op::Append(at, byte)),
        1 => (i, b).prop_map(|(at, byte)| Op::Overwrite(at, byte)),
        4 => (i, b).prop_map(|(at, name)| Op::Mkdir(at, name)),
        10 => (i, i, b).prop_map(|(from, to, name)| Op::Rename(from, to, name)),
        2 => i.prop_map(Op::Unlink),
        2 => (i, any::<bool>()).prop_map(|(at, again)| Op::RemoveDir(at, again)),
        1 => (i, i, b).prop_map(|(from, to, name)| Op::Link(from, to, name)),
        1 => (i, b).prop_map(|(at, name)| Op::Symlink(at, name)),
        1 => (i, any::<u16>()).prop_map(|(at, mode)| Op::Chmod(at, mode)),
        1 => (i, b).prop_map(|(at, id)| Op::Chown(at, id)),
        1 => (i, b, b).prop_map(|(at, name, value)| Op::Xattr(at, name, value)),
        1 => (i, b, any::<bool>()).prop_map(|(at, name, fifo)| Op::Node(at, name, fifo)),
    ]
}

/// Operations on a base and on each layer above it, from the bottom up.
pub(super) fn layers(n_layers: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Vec<Op>>> {
    let layer = prop::collection::vec(op(), 1..14);
    (prop::collection::vec(op(), 10..40), prop::collection::vec(layer, n_layers)).prop_map(|(base, mut layers)| {
        layers.insert(0, base);
        layers
    })
}

/// Runs `case` as often as `cargo xtask test --cases` says, or `n_cases` times; `--seed` repeats a failure.
pub(super) fn run_cases<S: Strategy>(n_cases: u64, strategy: S, case: impl Fn(S::Value)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let random = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let seed = number("DELTABOX_SEED").unwrap_or_else(|| random.into());
    let n_cases = number("DELTABOX_CASES").unwrap_or(n_cases);
    println!("--seed {seed} --cases {n_cases}");
    for number in 0..n_cases {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&(seed + number).to_le_bytes());
        let config = Config { cases: 1, max_shrink_iters: 400, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let played = runner.run(&strategy, |value| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(value))).map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                TestCaseError::fail(text.unwrap_or_default())
            })
        });
        if let Err(error) = played {
            panic!("--seed {} --cases 1: {error}", seed + number);
        }
    }
}

/// Layers over a base, each written through a mount of what was there before.
pub(super) struct Grown {
    pub(super) scratch: Rc<tempfile::TempDir>,
    /// Uppers and at last the base, the topmost first.
    pub(super) dirs: Vec<PathBuf>,
}

impl Grown {
    /// Plays the first operations on a plain directory, the others each through a layer of its own.
    pub(super) fn new(layers: &[Vec<Op>]) -> Self {
        let mut grown = Self::bare();
        for op in &layers[0] {
            // An operation that makes no sense here fails, as it does for a program.
            let _ = op.play(&grown.dirs[0]);
        }
        grown.grow(&layers[1..]);
        grown
    }

    /// Adds a layer for each of the lists of operations.
    pub(super) fn grow(&mut self, layers: &[Vec<Op>]) {
        for ops in layers {
            self.layer(|root| {
                for op in ops {
                    let _ = op.play(root);
                }
            });
        }
    }

    /// Another state that has all layers in common so far.
    pub(super) fn branch(&self) -> Self {
        Self { scratch: Rc::clone(&self.scratch), dirs: self.dirs.clone() }
    }

    /// An empty base.
    pub(super) fn bare() -> Self {
        let scratch = Rc::new(tempfile::tempdir().unwrap());
        let base = scratch.path().join("base");
        fs::create_dir(&base).unwrap();
        lchown(&base, Some(HOST_ID_BASE), Some(HOST_ID_BASE)).unwrap();
        Self { scratch, dirs: vec![base] }
    }

    /// Another layer on top, written by `act`, which gets the root of the mount.
    pub(super) fn layer(&mut self, act: impl FnOnce(&Path)) {
        self.with_live(|root, _| act(root));
    }

    /// The same; `act` gets the directories too, the live one first.
    pub(super) fn with_live(&mut self, act: impl FnOnce(&Path, &[PathBuf])) {
        let layer = tempfile::tempdir_in(self.scratch.path()).unwrap().keep();
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        lchown(&upper, Some(HOST_ID_BASE), Some(HOST_ID_BASE)).unwrap();
        let lowers = Opened::new(&self.dirs);
        let (upper_fd, work_fd) = (open_dir(&upper).unwrap(), open_dir(&work).unwrap());
        let top = Top { upper: upper_fd.as_fd(), work: work_fd.as_fd() };
        let mount = mount_stack(&lowers.fds(), Some(top)).unwrap();
        self.dirs.insert(0, upper);
        act(&path_of(&mount), &self.dirs);
    }
}

/// Directories of a stack, opened.
pub(super) struct Opened(Vec<OwnedFd>);

impl Opened {
    pub(super) fn new(dirs: &[PathBuf]) -> Self {
        Self(dirs.iter().map(|dir| open_dir(dir).unwrap()).collect())
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }

    /// What the kernel shows of them.
    pub(super) fn look(&self) -> BTreeMap<PathBuf, Look> {
        let mut fds = self.fds();
        // Overlayfs wants two layers at least.
        let empty = tempfile::tempdir().unwrap();
        let empty = open_dir(empty.path()).unwrap();
        fds.push(empty.as_fd());
        let mount = mount_stack(&fds, None).unwrap();
        look(&path_of(&mount))
    }
}

fn is_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

/// Everything below a directory and itself, by relative path.
pub(super) fn walk(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    let mut next = 0;
    while let Some(path) = found.get(next).cloned() {
        next += 1;
        if next == 1 || is_dir(&root.join(&path)) {
            let mut names: Vec<_> =
                fs::read_dir(root.join(&path)).unwrap().map(|entry| path.join(entry.unwrap().file_name())).collect();
            names.sort();
            found.extend(names);
        }
    }
    found
}

impl Op {
    /// Carries it out below `root`.
    pub(super) fn play(&self, root: &Path) -> io::Result<()> {
        let all = walk(root);
        let dirs: Vec<_> = all.iter().filter(|path| path.as_os_str().is_empty() || is_dir(&root.join(path))).collect();
        let rest = &all[1..];
        let any = |index: u16| match rest.len() {
            0 => Err(io::Error::from(io::ErrorKind::NotFound)),
            n => Ok(root.join(&rest[usize::from(index) % n])),
        };
        let fresh = |dir: u16, name: u8| {
            let name = ["a", "b", "c", "d", "e", "f", "g", "h", "i"][usize::from(name) % 9];
            root.join(dirs[usize::from(dir) % dirs.len()]).join(name)
        };
        let own = |path: &Path| lchown(path, Some(HOST_ID_BASE), Some(HOST_ID_BASE));
        match *self {
            Self::Create(dir, name, byte) => {
                let path = fresh(dir, name);
                File::create_new(&path)?.write_all(&vec![byte; usize::from(byte % 8) * 700])?;
                own(&path)
            }
            Self::Append(at, byte) => File::options().append(true).open(plain(any(at)?)?)?.write_all(&[byte; 10]),
            Self::Overwrite(at, byte) => fs::write(plain(any(at)?)?, [byte; 300]),
            Self::Mkdir(dir, name) => {
                let path = fresh(dir, name);
                fs::create_dir(&path)?;
                own(&path)
            }
            Self::Rename(from, to, name) => fs::rename(any(from)?, fresh(to, name)),
            Self::Unlink(at) => fs::remove_file(any(at)?),
            Self::RemoveDir(at, again) => {
                let path = any(at)?;
                fs::remove_dir_all(&path)?;
                if again {
                    fs::create_dir(&path)?;
                    own(&path)?;
                }
                Ok(())
            }
            Self::Link(from, to, name) => fs::hard_link(any(from)?, fresh(to, name)),
            Self::Symlink(dir, name) => {
                let path = fresh(dir, name);
                symlink(format!("to-{name}"), &path)?;
                own(&path)
            }
            Self::Chmod(at, mode) => {
                let path = any(at)?;
                if path.is_symlink() {
                    return Ok(());
                }
                fs::set_permissions(path, Permissions::from_mode(u32::from(mode) & 0o7777))
            }
            Self::Chown(at, id) => lchown(any(at)?, Some(HOST_ID_BASE + u32::from(id)), Some(HOST_ID_BASE + 7)),
            Self::Xattr(at, name, value) => {
                let path = any(at)?;
                let is_plain = is_dir(&path) || path.symlink_metadata()?.is_file();
                let name = match name % 3 {
                    0 if is_plain => c"user.a",
                    1 if is_plain => c"user.b",
                    // Overlayfs hides its own: this one it stores under another name.
                    2 if is_plain => c"trusted.overlay.opaque",
                    _ => c"trusted.c",
                };
                set_xattr(
                    place::open(
                        open_dir(path.parent().unwrap())?.as_fd(),
                        Path::new(path.file_name().unwrap()),
                        nix::fcntl::OFlag::O_PATH,
                    )?
                    .as_fd(),
                    name,
                    &[value],
                )
            }
            Self::Node(dir, name, fifo) => {
                let path = fresh(dir, name);
                let kind = if fifo { SFlag::S_IFIFO } else { SFlag::S_IFSOCK };
                mknod(&path, kind, Mode::from_bits_truncate(0o640), 0)?;
                own(&path)
            }
        }
    }
}

/// Only a regular file may be opened: a FIFO would wait.
fn plain(path: PathBuf) -> io::Result<PathBuf> {
    if path.symlink_metadata()?.is_file() { Ok(path) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// All of an entry that a program can see, but for numbers of devices and inodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) size: u64,
    pub(super) mtime: (i64, i64),
    pub(super) content: Vec<u8>,
    pub(super) xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first name in order of what is the same file.
    pub(super) first_link: PathBuf,
}

/// A whole tree as the kernel shows it.
pub(super) fn look(root: &Path) -> BTreeMap<PathBuf, Look> {
    let mut firsts = BTreeMap::new();
    let mut tree = BTreeMap::new();
    let mut paths = walk(root);
    paths.sort();
    for path in paths {
        // With a slash at the end, the root is what the descriptor leads to, not the link to it.
        let full = if path.as_os_str().is_empty() { root.join(".") } else { root.join(&path) };
        let meta = fs::symlink_metadata(&full).unwrap();
        let content = if meta.is_file() {
            fs::read(&full).unwrap()
        } else if meta.is_symlink() {
            fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let first_link = if meta.is_dir() {
            path.clone()
        } else {
            firsts.entry((meta.dev(), meta.ino())).or_insert_with(|| path.clone()).clone()
        };
        let dir = open_dir(full.parent().unwrap()).unwrap();
        let name = full.file_name().map_or(Path::new("."), Path::new);
        let xattrs = if path.as_os_str().is_empty() {
            read_xattrs(open_dir(&full).unwrap().as_fd()).unwrap()
        } else {
            let fd = place::open(dir.as_fd(), name, nix::fcntl::OFlag::O_PATH).unwrap();
            read_xattrs(fd.as_fd()).unwrap()
        };
        let look = Look {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            size: if meta.is_dir() { 0 } else { meta.size() },
            mtime: (meta.mtime(), meta.mtime_nsec()),
            content,
            xattrs,
            first_link,
        };
        tree.insert(path, look);
    }
    tree
}
