//! Types that cross a boundary: between the engine and a sandbox's init.
//!
//! Programs on both sides are built apart (init is static and embedded in the engine's binary), so what they
//! say to each other is defined here once. No policy, no system calls.
#![no_std]

extern crate alloc;

pub mod init;
mod wire;

pub use wire::Malformed;
