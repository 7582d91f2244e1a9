//! deltabox: checkpoint, roll back and fork whole agent sandboxes.
//!
//! `ARCHITECTURE.md` beside this crate has the bird's eye view, the words and the code map.
//! Imports only go down: cli, daemon -> engine -> pool -> deltafs, deltacr -> sandbox -> kernel, fault -> sys.

pub mod cli;
pub mod daemon;
pub mod deltacr;
pub mod deltafs;
pub mod engine;
pub mod fault;
pub mod kernel;
pub mod latency;
pub mod pool;
pub mod sandbox;
pub mod sys;
