//! Types that cross a boundary: engine to init now, BPF programs to engine later.
#![no_std]
extern crate alloc;
