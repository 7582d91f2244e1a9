//! `demo`: the product's main job as a story, with its real output, held against what it should be.
//!
//! It uses a store and a daemon of its own. Both belong to a *keeper*: a second process in a process group of
//! its own, told on its stdin which sandboxes are made. When that closes, because the story is over or its
//! process is gone for whatever reason (Ctrl-C, SIGKILL), the keeper removes sandboxes, daemon and store.

mod keeper;
mod search;
mod times;
mod tour;

use std::env;
use std::fs;
use std::path::PathBuf;

pub(crate) use keeper::{KeeperArgs, keep};

use crate::setup;
use crate::workspace::{Profile, Workspace};
use keeper::{Keeper, Place};
use tour::Story;

pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    setup::ensure(workspace)?;
    let binary = match env::var_os("DELTABOX_BIN") {
        Some(binary) => PathBuf::from(binary),
        None => workspace.build_binary("deltabox", "deltabox", Profile::Release)?,
    };
    let place = Place::make(binary)?;
    let mut story = Story { keeper: Keeper::start(&place)?, place, steps: Vec::new() };
    let told = tour::tell(&mut story);
    println!();
    for (title, duration) in &story.steps {
        println!("{title:<58} {:>9.1} ms", duration.as_secs_f64() * 1e3);
    }
    println!("(from the start of the command to its exit; one run, no statistics)");
    let Story { place, mut keeper, .. } = story;
    let searched = told.and_then(|()| search::run(workspace, &place, &mut keeper));
    let ended = keeper.finish();
    // The keeper has removed it; a command that ran on after the daemon's death may have made it again.
    let _ = fs::remove_dir_all(&place.home);
    searched?;
    ended?;
    println!("demo: everything was as promised");
    Ok(())
}
