//! The place of deltabox's eBPF programs. It holds none yet: the crate is empty and is built for the host,
//! so that `cargo xtask build-ebpf` and CI have it in their hands.
#![no_std]
