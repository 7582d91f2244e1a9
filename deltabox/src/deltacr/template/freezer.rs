//! A frozen cgroup for one template. Its name is how the template is found again.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libc::pid_t;

use super::error::TemplateError;
use crate::deltacr::tasks;
use crate::sandbox::cgroup::remove_tree;

/// A cgroup in which nothing runs.
///
/// After a cgroup.kill nothing can be born into it any more: the kernel (6.18, cgroup_css_set_fork) compares how often
/// the maker's group was killed with how often this one was, and kills the newborn if that differs.
#[derive(Debug)]
pub struct Freezer {
    path: PathBuf,
    directory: OwnedFd,
}

impl Freezer {
    /// Makes the group `name` below `above`, which also holds the group of the process that is to be copied.
    ///
    /// CLONE_INTO_CGROUP asks for what that process itself may do, whatever its user: so `cgroup.procs` of the group and
    /// of `above` become writable for all. Nothing of the sandbox sees these files, and others lack the right at the
    /// groups that they come from.
    ///
    /// # Errors
    /// There is no such group.
    pub fn create(above: &Path, name: &str) -> Result<Self, TemplateError> {
        let path = above.join(name);
        group("create", &path, fs::create_dir(&path))?;
        let made = Self::prepare(above, path.clone());
        if made.is_err() {
            // The first failure is the one to report.
            let _ = fs::remove_dir(&path);
        }
        made
    }

    fn prepare(above: &Path, path: PathBuf) -> Result<Self, TemplateError> {
        let freeze = path.join("cgroup.freeze");
        group("write", &freeze, fs::write(&freeze, "1"))?;
        for procs in [above.join("cgroup.procs"), path.join("cgroup.procs")] {
            group("allow writing to", &procs, allow_writing(&procs))?;
        }
        Self::open(path)
    }

    /// One that is there.
    ///
    /// # Errors
    /// It is not there, or not frozen.
    pub fn open(path: PathBuf) -> Result<Self, TemplateError> {
        let freeze = path.join("cgroup.freeze");
        let state = group("read", &freeze, fs::read_to_string(&freeze))?;
        if state.trim() != "1" {
            return group("use", &path, Err(io::Error::other("it is not frozen")));
        }
        let directory = group("open", &path, File::open(&path))?.into();
        Ok(Self { path, directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to be born into.
    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Lets its process run. After an engine's death a group that is not frozen tells that its template is dead.
    pub(super) fn thaw(&self) -> Result<(), TemplateError> {
        self.write("0")
    }

    /// Nothing runs in it any more: tasks that a tracer holds neither, once it lets go of them.
    pub(super) fn freeze(&self) -> Result<(), TemplateError> {
        self.write("1")
    }

    fn write(&self, state: &str) -> Result<(), TemplateError> {
        let freeze = self.path.join("cgroup.freeze");
        group("write", &freeze, fs::write(&freeze, state))
    }

    /// Who is in it; host PIDs.
    pub fn processes(&self) -> Result<Vec<pid_t>, TemplateError> {
        let lists = tasks::Lists::open(&self.path).and_then(|lists| lists.processes());
        lists.map_err(|(path, source)| TemplateError::Group { op: "read", path, source })
    }

    /// Removes the group, which must be empty.
    ///
    /// # Errors
    /// Something still lives in it.
    pub fn remove(self) -> Result<(), TemplateError> {
        remove_tree(&self.path).map_err(|error| TemplateError::Group {
            op: "remove",
            path: self.path,
            source: io::Error::other(error),
        })
    }
}

pub(super) fn allow_writing(procs: &Path) -> io::Result<()> {
    const ALL: u32 = 0o666;
    if fs::metadata(procs)?.permissions().mode() & ALL == ALL {
        return Ok(());
    }
    fs::set_permissions(procs, Permissions::from_mode(ALL))
}

fn group<T>(op: &'static str, path: &Path, result: io::Result<T>) -> Result<T, TemplateError> {
    result.map_err(|source| TemplateError::Group { op, path: path.to_owned(), source })
}
