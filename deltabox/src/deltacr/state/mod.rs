//! What a process is apart from memory, registers and descriptors: read at a checkpoint, put back at a rollback.

mod batch;
mod credentials;
mod error;
mod habits;
mod impossible;
mod limits;
mod membership;
mod person;
mod schedule;
mod signals;
mod status;
mod threads;
mod traits;

pub use error::StateError;
pub use impossible::Impossible;
pub use person::Person;
pub use signals::Signals;
