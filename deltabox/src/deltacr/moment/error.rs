//! Why a moment was not taken, or not come back to.

use std::io;

use libc::pid_t;

use crate::deltacr::descriptors::DescriptorError;
use crate::deltacr::objects::ObjectError;
use crate::deltacr::state::StateError;
use crate::deltacr::template::TemplateError;
use crate::deltacr::{InjectError, StopError};

/// A failure.
#[derive(Debug, thiserror::Error)]
pub enum MomentError {
    /// Descriptors.
    #[error(transparent)]
    Descriptors(#[from] DescriptorError),
    /// A template, memory or threads.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Signals and the like.
    #[error(transparent)]
    State(#[from] StateError),
    /// No call could be made inside a process.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A process could not be stopped or ended.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// A step outside of a process failed.
    #[error("{op} process {pid}: {source}")]
    Process {
        /// What was being done.
        op: &'static str,
        /// The process.
        pid: pid_t,
        /// The kernel's word.
        source: io::Error,
    },
    /// Memory that processes share, and files without a name.
    #[error("{op} what processes share: {source}")]
    Shared {
        /// What was being done.
        op: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// A process of the checkpoint has ended since.
    #[error("process {inside} (inside) of the checkpoint {what}, and cannot be made again")]
    Missing {
        /// Its PID inside.
        inside: pid_t,
        /// What became of it.
        what: &'static str,
    },
    /// It has a POSIX timer.
    #[error("process {pid} has a timer of timer_create(2), which a checkpoint cannot hold")]
    Timers {
        /// The process.
        pid: pid_t,
    },
    /// There are more processes than templates may be made.
    #[error("it needs more than {room} new templates, and there is room for no more")]
    Room {
        /// How many may be made.
        room: usize,
    },
    /// A template was lost: killed from outside, or for lack of memory.
    #[error("the template of process {inside} (inside) is gone")]
    Lost {
        /// Its PID inside.
        inside: pid_t,
    },
}

impl MomentError {
    /// Whether something about the processes stands in the way, and no failure of the machine.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Descriptors(DescriptorError::Refused(_)) | Self::Template(TemplateError::Refused(_)) => true,
            Self::Descriptors(DescriptorError::Handover(error)) => error.is_refusal(),
            Self::Descriptors(DescriptorError::Object { source: ObjectError::Refused(_), .. }) => true,
            Self::Inject(InjectError::Refused(_)) | Self::Template(TemplateError::Inject(InjectError::Refused(_))) => {
                true
            }
            Self::State(error) => error.is_refusal(),
            Self::Missing { .. } | Self::Lost { .. } | Self::Room { .. } | Self::Timers { .. } => true,
            _ => false,
        }
    }

    /// Whether what stands in the way passes as soon as the programs have run a little.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Descriptors(DescriptorError::Object { source: ObjectError::Refused(why), .. }) if why.is_passing())
    }
}

pub(super) fn process(op: &'static str, pid: pid_t) -> impl Fn(io::Error) -> MomentError + Copy {
    move |source| MomentError::Process { op, pid, source }
}
