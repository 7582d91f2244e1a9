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
//! [`restore_in_place`], [`restore_by_fork`], [`rebuild`] and [`rebuild_orphan`] are ways back. `docs/templates.md` has the details and the numbers.

mod advise;
mod compare;
mod error;
mod face;
mod fork;
mod freezer;
mod gauge;
mod ground;
mod kin;
mod make;
mod mapping;
mod memory;
mod pages;
mod plan;
mod ranges;
mod reapers;
mod rebuild;
mod remove;
mod restore;
mod second;
mod source;
mod thread;
mod threads;
mod unchanged;
mod wares;
mod watch;
mod zombie;

pub use error::{TemplateError, TemplateRefusal};
pub(super) use fork::check_fork;
pub use fork::restore_by_fork;
pub use freezer::Freezer;
pub use gauge::Gauge;
pub use kin::Kin;
pub use make::{Numbers, Request};
pub(super) use mapping::read_maps;
pub use mapping::{Advice, Mapping, read_smaps};
pub use memory::{Memory, Outline, Sections};
pub use rebuild::{rebuild, rebuild_orphan};
pub use remove::Template;
pub use restore::{Files, Past, Report, restore_in_place};
pub(super) use restore::{First, Tree, check_rebuild, plan_in_place, restore_as_planned};
pub use source::Source;
pub use threads::Threads;
pub(super) use unchanged::outline_if_unchanged;
pub(super) use watch::Watches;
pub use zombie::{End, make_zombie};
