//! Processes: stop all threads of a sandbox, run system calls inside them, let them go on as if nothing had happened.
//!
//! `docs/stop-and-inject.md` has the pictures.

mod alarm;
mod area;
mod births;
pub mod descriptors;
mod error;
mod fdinfo;
mod frame;
mod halt;
mod handover;
mod helper;
pub mod inject;
mod interrupted;
mod locks;
mod marker;
pub mod moment;
pub mod objects;
mod patience;
mod place;
mod position;
pub mod rebase;
mod reopen;
mod rseq;
mod shared;
pub mod state;
pub mod stop;
mod table;
mod tasks;
pub mod template;
mod timed;
mod timeouts;
mod told;
mod waits;
mod whereabouts;

pub use error::{InjectError, InjectRefusal, StopError, StopRefusal};
pub use handover::{HandoverError, LastCall};
pub use whereabouts::Whereabouts;
