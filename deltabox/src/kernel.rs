//! TBD
pub mod cgroups;
