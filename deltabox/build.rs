//! Builds init (static, for this machine) and leaves it where `include_bytes!` finds it.
//!
//! A cargo run of its own with its own target directory: other flags, and no lock shared with the outer one.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    for input in ["init", "src/sys/mount.rs", "src/sys/socket.rs", "../deltabox-common", "../Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", package.join(input).display());
    }
    let target_dir = out.join("init-target");
    let target = format!("{}-unknown-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the arch"));
    let status = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"))
        .args(["build", "--package", "deltabox-init", "--profile", "init", "--locked", "--target", &target])
        .arg("--target-dir")
        .arg(&target_dir)
        .current_dir(&package)
        // Static and at a fixed address: nothing to relocate at start, so its pages stay shared between sandboxes.
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Crelocation-model=static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_MAKEFLAGS")
        .env_remove("MAKEFLAGS")
        .status()
        .expect("run cargo for deltabox-init");
    assert!(
        status.success(),
        "building deltabox-init failed: is the static C library there? `cargo xtask setup` checks"
    );
    fs::copy(target_dir.join(&target).join("init/deltabox-init"), out.join("deltabox-init"))
        .expect("copy deltabox-init");
}
