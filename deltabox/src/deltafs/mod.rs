//! The file system of a sandbox: bases and layers.

pub mod imported;
