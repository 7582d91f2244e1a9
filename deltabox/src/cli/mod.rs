//! TBD

pub mod doctor;
