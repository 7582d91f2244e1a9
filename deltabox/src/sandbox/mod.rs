//! One sandbox as the kernel sees it: namespaces, cgroup, limits, system call filter, init.
//!
//! Owns how a sandbox comes to life around a root file system that it is given, how commands are
//! started in it, and how it ends. Does not know layers, checkpoints, or the store.

pub mod spec;

pub use spec::{BaseRef, Limits, Net, SandboxId, SandboxSpec};
