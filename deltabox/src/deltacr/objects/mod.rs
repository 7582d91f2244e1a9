//! What is behind descriptors that have no file: read at a checkpoint from the engine's own copy of a descriptor, made
//! again at a rollback.
//!
//! ```text
//! stopped process            engine                                 record (beside the checkpoint)
//!   5 --> description <----- pidfd_getfd --> kind_of --> read  ---> capacity, content, count, mask, ...
//!
//!   5 --> new one     <----- SCM_RIGHTS, dup3 <-- make         <---
//!         calls of its own                    <-- last_calls        owner of signals, epoll's targets, session
//! ```
//! What must hold: nobody notices that something was read. All processes of the sandbox are stopped; what others (init, a
//! client) do to the same object meanwhile is not undone. Only a terminal is touched at all, see [`terminal`].
//!
//! One record per *object*. Of most kinds an object has one description; of pipes, memfds and terminals it has
//! several, and they are made together. [`Settings`] are per description, the same for all kinds.
//!
//! PIDs in records are those inside the sandbox. Functions get host PIDs.

mod epoll;
mod error;
mod eventfd;
mod fifo;
mod kind;
mod own;
mod pidfd;
mod pipe;
mod settings;
mod signalfd;
pub mod socket;
pub mod terminal;
mod timerfd;

pub use epoll::{Epoll, Holder, Watched};
pub use error::{ObjectError, ObjectRefusal};
pub use eventfd::Eventfd;
pub use fifo::{End, Fifo, open_ends};
pub use kind::{ObjectKind, kind_of};
pub(super) use own::Permissions;
pub use own::{Access, own_fdinfo, reopen};
pub use pidfd::Pidfd;
pub use pipe::{Pipe, Spare, duplicate, leads_out};
pub use settings::{Owner, Owning, Settings};
pub use signalfd::Signalfd;
pub use timerfd::Timerfd;
