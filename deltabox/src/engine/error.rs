//! What the engine answers when it does not do what was asked, with the aftermath in the text.

use std::io;
use std::path::PathBuf;

use crate::deltafs::hostbase::HostBaseError;
use crate::deltafs::layers::StackError;
use crate::sandbox::SandboxId;
use crate::sandbox::cgroup::CgroupError;

/// How a failure is to be taken by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request itself is wrong.
    Invalid,
    /// What it names does not exist.
    NotFound,
    /// What it wants to make exists already, or is in the wrong state for this.
    Conflict,
    /// Understood and possible in principle, but not here or not now.
    Refused,
    /// The machine failed us.
    Failed,
}

/// A request that was not carried out. Unless the text says otherwise everything is as before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the request makes no sense.
    #[error("{what}: {why}")]
    Invalid {
        /// Which field.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// No such sandbox.
    #[error("no sandbox `{id}`")]
    NoSandbox {
        /// What was named.
        id: String,
    },
    /// No such command in the sandbox.
    #[error("sandbox `{id}` holds no command with pid {pid}")]
    NoExec {
        /// The sandbox.
        id: SandboxId,
        /// PID inside.
        pid: u32,
    },
    /// No such checkpoint.
    #[error("sandbox `{id}` has no checkpoint `{checkpoint}`")]
    NoCheckpoint {
        /// The sandbox.
        id: SandboxId,
        /// What was named.
        checkpoint: String,
    },
    /// Some of its processes see the files of another state: the machine failed in the middle of a switch, and again
    /// on the way back.
    #[error("sandbox `{id}` is torn: {why}")]
    Torn {
        /// The sandbox.
        id: SandboxId,
        /// What happened.
        why: String,
    },
    /// Half way back to a checkpoint the machine failed: the files are the checkpoint's, and no process is left.
    #[error("sandbox `{id}` has the files of {checkpoint}, and lost its processes on the way back: {why}")]
    Lost {
        /// The sandbox.
        id: SandboxId,
        /// Where it was to go.
        checkpoint: String,
        /// What happened.
        why: String,
    },
    /// A layer that is needed is not whole. The sandbox is as before.
    #[error(transparent)]
    Layer(#[from] StackError),
    /// A switch to another root failed; the sandbox is as before.
    #[error("{what}: {source}")]
    Switch {
        /// What was being done, up to the step.
        what: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// No such imported base.
    #[error("no image `{name}`")]
    NoBase {
        /// What was named.
        name: String,
    },
    /// The name is taken.
    #[error("{what} `{name}` exists already")]
    Exists {
        /// A sandbox or an image.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The sandbox has no processes.
    #[error("sandbox `{id}` is dead: {reason}")]
    Dead {
        /// The sandbox.
        id: SandboxId,
        /// What ended it.
        reason: String,
    },
    /// The command could not be started; the sandbox is as before.
    #[error("start `{program}` in `{id}`: {step}: {source}")]
    Start {
        /// The sandbox.
        id: SandboxId,
        /// The program asked for.
        program: String,
        /// The step that failed: `execve`, `chdir`, `setuid`, ...
        step: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// Not possible here; `hint` says what would make it so.
    #[error("{what}: {why}")]
    Refused {
        /// What was asked.
        what: String,
        /// Why not.
        why: String,
        /// What to do.
        hint: String,
    },
    /// A sandbox could not be brought to life; nothing of it is left.
    #[error("create `{id}`: {source}")]
    Create {
        /// Its name.
        id: SandboxId,
        /// What failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The cgroups of a sandbox.
    #[error(transparent)]
    Cgroup(CgroupError),
    /// A system call or file operation failed.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// The driver thread of the sandbox is gone.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

impl Error {
    /// How it is to be taken.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } | Self::Start { .. } => Kind::Invalid,
            Self::NoSandbox { .. } | Self::NoExec { .. } | Self::NoCheckpoint { .. } | Self::NoBase { .. } => {
                Kind::NotFound
            }
            Self::Exists { .. } | Self::Dead { .. } => Kind::Conflict,
            Self::Refused { .. } => Kind::Refused,
            Self::Io { .. }
            | Self::Create { .. }
            | Self::Cgroup(_)
            | Self::Torn { .. }
            | Self::Lost { .. }
            | Self::Layer(_)
            | Self::Switch { .. }
            | Self::ShuttingDown => Kind::Failed,
        }
    }

    /// A stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::NoSandbox { .. } => "no_sandbox",
            Self::NoExec { .. } => "no_exec",
            Self::NoCheckpoint { .. } => "no_checkpoint",
            Self::Torn { .. } => "torn",
            Self::Lost { .. } => "lost",
            Self::Layer(_) => "damaged_layer",
            Self::Switch { .. } => "switch_failed",
            Self::NoBase { .. } => "no_image",
            Self::Exists { .. } => "exists",
            Self::Dead { .. } => "dead",
            Self::Start { .. } => "start_failed",
            Self::Refused { .. } => "refused",
            Self::Io { .. } => "io",
            Self::Create { .. } => "create_failed",
            Self::Cgroup(_) => "cgroup",
            Self::ShuttingDown => "shutting_down",
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Invalid { .. } => "see `deltabox help`".to_owned(),
            Self::NoSandbox { .. } => "`deltabox ls` shows the sandboxes".to_owned(),
            Self::NoExec { .. } => "`deltabox inspect SANDBOX` shows its commands".to_owned(),
            Self::NoCheckpoint { .. } => "`deltabox tree SANDBOX` shows its checkpoints".to_owned(),
            Self::Torn { .. } => {
                "its checkpoints are whole; a daemon that is started again tries to mend it, `deltabox rm` ends it"
                    .to_owned()
            }
            Self::Lost { .. } => "its checkpoints are whole; roll back to one, or kill it".to_owned(),
            Self::NoBase { .. } => "`deltabox image ls` shows the images".to_owned(),
            Self::Exists { what, .. } => format!("choose another name, or remove that {what} first"),
            Self::Dead { .. } => "its files are still there; `deltabox rm` removes it".to_owned(),
            Self::Start { .. } => "check the program, working directory and user; the sandbox is as before".to_owned(),
            Self::Refused { hint, .. } => hint.clone(),
            Self::Layer(_) => "other checkpoints may be whole: `deltabox tree` shows them".to_owned(),
            Self::Switch { .. } => "its programs run on and nothing has changed; try again".to_owned(),
            Self::Create { .. } | Self::Cgroup(_) | Self::Io { .. } => {
                "see the daemon's log in the store directory; `deltabox doctor` checks the machine".to_owned()
            }
            Self::ShuttingDown => "try again".to_owned(),
        }
    }
}

impl From<CgroupError> for Error {
    fn from(error: CgroupError) -> Self {
        match error {
            CgroupError::NoController { what, controller } => Self::Refused {
                what: format!("limit {what}"),
                why: format!("no cgroup hierarchy of this host has the controller `{controller}`"),
                hint: "leave the limit out, or mount a hierarchy with that controller".to_owned(),
            },
            other => Self::Cgroup(other),
        }
    }
}

/// Why a base cannot be used, for the sandbox that wanted it.
pub(super) fn base_refused(base: &str, error: HostBaseError) -> Error {
    let hint = match &error {
        HostBaseError::BadPath { .. } => "see `deltabox help create`",
        HostBaseError::NotIdmappable { .. } => "import it instead: `deltabox image import NAME DIR`",
        HostBaseError::Mount(_) | HostBaseError::Io { .. } => "`deltabox doctor` checks what a base needs",
    };
    Error::Refused { what: format!("use the base {base}"), why: error.to_string(), hint: hint.to_owned() }
}
