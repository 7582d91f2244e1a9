//! What a process is apart from memory, registers and descriptors: read at a checkpoint, put back where it lives on.

mod error;
mod signals;

pub use error::StateError;
pub use signals::Signals;
