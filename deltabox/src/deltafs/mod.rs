//! DeltaFS: the root file system of a sandbox, made of layers over a read-only base.
//!
//! Owns what lies in layers, how they are stacked and mounted, and what a base is made of. Does not know
//! processes: a mount made here is handed to the sandbox as a descriptor.

pub mod diff;
pub mod fixtures;
pub mod hostbase;
pub mod imported;
pub mod layer;
pub mod layers;
pub mod merge;
mod origins;
pub mod overlay;
pub mod remove;
pub mod sync;
#[cfg(test)]
mod testing;
pub mod view;
pub mod walk;
