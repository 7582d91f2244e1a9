//! Templates: copies of stopped processes that share their memory copy-on-write and never run.
//!
//! ```text
//! process P (stopped)   one batch: [advice] clone3(H); wait4(H); [advice back]
//!   H: P's memory, P's descriptor table    close_range(UNSHARE); setsid; socketpair; (engine: cgroup's descriptor)
//!        clone3(T, into the frozen cgroup); close_range; exit        its end makes init the parent of T
//!   T: a copy of the memory, no descriptor, a session of its own; frozen before its first instruction: exit_group
//! ```
//!
//! What must hold: P is as it was, whatever fails and whenever the engine dies. T shares nothing that P can write: shared
//! writable mappings are left out of it ([`Memory`] lists them). A template is found again by its cgroup's name.
//!
//! [`restore_in_place`] and [`restore_by_fork`] are ways back. `docs/templates.md` has the details and the numbers.

mod advise;
mod error;
mod face;
mod fork;
mod freezer;
mod make;
mod mapping;
mod memory;
mod pages;
mod plan;
mod reapers;
mod remove;
mod restore;
mod source;
mod thread;
mod threads;
mod wares;

pub use error::{TemplateError, TemplateRefusal};
pub use fork::restore_by_fork;
pub use freezer::Freezer;
pub use make::{Numbers, Request};
pub(super) use mapping::read_maps;
pub use mapping::{Advice, Mapping, read_smaps};
pub use memory::{Memory, Outline, Sections};
pub use remove::Template;
pub(super) use restore::Tree;
pub use restore::{Files, Past, Report, restore_in_place};
pub use source::Source;
pub use threads::Threads;
