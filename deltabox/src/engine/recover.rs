//! What an engine finds when it starts: sandboxes that ran on without it, dead ones, and half-made ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deltabox_common::init::ToInit;

use super::create::{drive_to_the_end, register};
use super::driver::{Life, Mail};
use super::manifest::Manifest;
use super::store::{DAMAGED, REMOVING, SandboxDir};
use super::switch::{Purpose, finish};
use super::tree::{CheckpointId, Tree};
use super::{Engine, Error};
use crate::deltacr::moment::{self, FoundTemplates, Moment};
use crate::deltafs::layer::{LayerId, Record};
use crate::deltafs::remove::remove_tree;
use crate::sandbox::cgroup::{self, Cgroups};
use crate::sandbox::link::InitLink;
use crate::sandbox::{self, SandboxId, root};
use crate::sys::process::{self, Child};

/// How long processes of a half-made sandbox may take to die.
const DEADLINE: Duration = Duration::from_secs(30);

/// How long requests wait for an init to tell what it holds (chosen: it only ever blocks in poll; one that was stopped
/// by somebody is slow, not dead).
const LIST_DEADLINE: Duration = Duration::from_secs(10);

/// Goes through the store and the store's cgroups. A sandbox that cannot be recovered never keeps others from it.
pub(super) fn recover(engine: &Engine) -> Result<(), Error> {
    let sandboxes = engine.0.store.sandboxes();
    let io = |op| {
        let path = sandboxes.clone();
        move |source| Error::Io { op, path, source }
    };
    let mut frames = BTreeSet::new();
    for entry in fs::read_dir(&sandboxes).map_err(io("list"))? {
        let name = entry.map_err(io("list"))?.file_name().to_string_lossy().into_owned();
        if name.starts_with(REMOVING) {
            let finished = remove_tree(&sandboxes.join(&name));
            log_failure(&name, "finish its removal", finished.map_err(io("finish removing in")));
            continue;
        }
        if name.starts_with(DAMAGED) {
            continue;
        }
        let Ok(id) = name.parse::<SandboxId>() else {
            tracing::warn!(name, "left alone: not the name of a sandbox");
            continue;
        };
        match Manifest::load(engine.0.store.sandbox(&id).path()) {
            Ok(manifest) => {
                frames.extend(manifest.frame.clone());
                log_failure(&name, "take it up", take_up(engine, manifest));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!(sandbox = name, "cleaning up: half made");
                log_failure(&name, "clean it up", clean(engine, &id));
            }
            Err(error) if error.kind() != io::ErrorKind::Unsupported => {
                tracing::error!(sandbox = name, %error, "damaged: its manifest cannot be read; set aside");
                log_failure(&name, "set it aside", set_aside(engine, &id));
            }
            // A later deltabox's: not ours to touch.
            Err(error) => tracing::error!(sandbox = name, %error, "left alone: its manifest cannot be read"),
        }
    }
    clean_cgroups(engine)?;
    clean_layers(engine)?;
    clean_frames(&engine.0.store.frames(), &frames)
}

/// One sandbox's trouble is its own: the others are recovered all the same, and the next start tries again.
fn log_failure(sandbox: &str, what: &'static str, result: Result<(), Error>) {
    if let Err(error) = result {
        tracing::error!(sandbox, %error, "failed to {what}");
    }
}

/// A sandbox on record: its init still runs, or it is dead.
fn take_up(engine: &Engine, mut manifest: Manifest) -> Result<(), Error> {
    let id = manifest.id.clone();
    let dir = engine.0.store.sandbox(&id);
    let at = |op| {
        let path = dir.path().to_owned();
        move |source| Error::Io { op, path, source }
    };
    let tree = Tree::load(&dir.checkpoints()).map_err(at("read the checkpoints in"))?;
    super::driver::tops(&manifest, &tree).into_iter().for_each(|layer| engine.0.layers.keep_clear_of(layer));
    let listener = engine.0.store.sandbox(&id).listener();
    let life = match reach(&manifest, &listener) {
        Ok(life) => Some(life),
        Err(error) => {
            tracing::warn!(sandbox = %id, %error, "dead");
            // What is left of it (init gone, others not yet) goes as well.
            manifest.cgroups.kill(None, DEADLINE)?;
            None
        }
    };
    let (moments, cleaned) = find_moments(&manifest, &dir, &tree);
    log_failure(id.as_str(), "remove templates that belong to no checkpoint", cleaned);
    let settled = settle(engine, &mut manifest, &tree, life.as_ref());
    let io = |source| Error::Io { op: "recover", path: listener.clone(), source };
    let mail = Arc::new(Mail::new().map_err(|errno| io(errno.into()))?);
    let mut driver = register(engine, manifest, tree, life, mail);
    driver.set_moments(moments);
    if let Err(error) = settled {
        tracing::error!(sandbox = %id, %error, "in the middle of a switch; it cannot be finished");
        driver.set_torn(format!("its move to another root cannot be finished: {error}"));
    }
    let (engine, name) = (engine.clone(), id.clone());
    let drive = move || {
        driver.hear_the_list(LIST_DEADLINE);
        drive_to_the_end(&engine, &name, driver);
    };
    std::thread::Builder::new().name(format!("sb-{id}")).spawn(drive).map(drop).map_err(io)
}

/// Finds the processes that checkpoints hold, and removes templates and files of others.
fn find_moments(
    manifest: &Manifest,
    dir: &SandboxDir,
    tree: &Tree,
) -> (BTreeMap<CheckpointId, Moment>, Result<(), Error>) {
    let group = &manifest.cgroups.unified;
    let (mut moments, mut found) = (BTreeMap::new(), FoundTemplates::default());
    for one in tree.iter().filter(|one| !one.fs_only) {
        match Moment::load(&dir.processes(one.id), group, &mut found) {
            Ok(moment) => drop(moments.insert(one.id, moment)),
            Err(error) => {
                tracing::warn!(sandbox = %manifest.id, checkpoint = %one.id, %error, "holds files only: its processes are lost");
            }
        }
    }
    let kept = moments.values().flat_map(Moment::template_names).collect();
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { op: "clean up", path, source }
    };
    let removed = moment::remove_templates(group, "t", &kept).map_err(|error| failed(group)(io::Error::other(error)));
    let checkpoints = dir.checkpoints();
    let clean = || {
        for entry in fs::read_dir(&checkpoints).map_err(failed(&checkpoints))?.flatten() {
            let path = entry.path();
            let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            let is_kept = id.is_some_and(|id| moments.contains_key(&id));
            if path.extension().is_some_and(|extension| extension == "memory" || extension == "processes") && !is_kept {
                fs::remove_file(&path).map_err(failed(&path))?;
            }
        }
        Ok(())
    };
    let cleaned = removed.and_then(|()| clean());
    (moments, cleaned)
}

/// Finishes a switch that the last engine was in the middle of: which layer is the live one, and everybody on it. After
/// an error both layers stay on record.
fn settle(engine: &Engine, manifest: &mut Manifest, tree: &Tree, life: Option<&Life>) -> Result<(), Error> {
    let io = |source| Error::Io { op: "finish a switch of", path: manifest.cgroups.unified.clone(), source };
    let load = |id: LayerId| engine.0.layers.load(id).map(|layer| layer.record().clone());
    let next = manifest.next.and_then(|next| load(next).ok());
    // A checkpoint's next layer lies above the live one, a rollback's does not.
    let is_above = next.as_ref().is_some_and(|next| next.parent == Some(manifest.live));
    let live = match life {
        Some(life) => {
            let group = manifest.cgroups.unified.join("live");
            let purpose = if is_above { Purpose::Freeze } else { Purpose::Discard };
            finish(life.init.pid, &group, purpose, Instant::now() + DEADLINE)
                .map_err(|error| io(io::Error::other(error)))?;
            let upper = root::upper_of(life.init.pid).map_err(io)?;
            let layer = upper.parent().and_then(Path::file_name).and_then(|name| name.to_str()?.parse().ok());
            layer.ok_or_else(|| io(io::Error::other(format!("its root writes to {}, no layer", upper.display()))))?
        }
        // Nobody runs, so nobody can tell. With the layer above nothing is lost; one that replaced another is taken if
        // that is gone already.
        None => next.filter(|_| is_above || load(manifest.live).is_err()).map_or(manifest.live, |next| next.id),
    };
    let mut settled = manifest.clone();
    (settled.live, settled.next) = (live, None);
    // Numbers are given once: one may have been given, and its manifest not been written.
    let used = tree.iter().map(|one| one.id.0 + 1).max().unwrap_or(1);
    settled.next_checkpoint = manifest.next_checkpoint.max(used);
    if live != manifest.live {
        // A rollback comes from its target; a checkpoint that does not exist leaves the head as it was.
        let head = load(live).map_err(io)?.head.and_then(|head| head.parse().ok());
        settled.head = head.filter(|head| tree.get(*head).is_some()).or(manifest.head);
        settled.epoch += 1;
    } else if let Some(last) = tree.iter().find(|one| one.epoch + 1 == manifest.epoch) {
        // Each checkpoint and rollback raises the epoch before it is done: this checkpoint was the last of them.
        settled.head = Some(last.id);
    }
    if settled != *manifest
        && let Err(error) = settled.save(engine.0.store.sandbox(&manifest.id).path(), tree.is_durable())
    {
        // Found again by the next engine, if no checkpoint or rollback writes it before.
        tracing::error!(sandbox = %manifest.id, %error, "how a switch ended could not be written down yet");
    }
    *manifest = settled;
    Ok(())
}

/// Connects to a sandbox's init and asks what it holds.
fn reach(manifest: &Manifest, listener: &Path) -> io::Result<Life> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "its init is gone");
    let pidfd = process::pidfd_open(manifest.init.pid).map_err(|_| gone())?;
    // After the pidfd is open, so that the process checked is the process held.
    if !manifest.init.is_alive() {
        return Err(gone());
    }
    let mut link = InitLink::new(sandbox::connect_at(listener)?)?;
    link.send(&ToInit::List, &[])?;
    Ok(Life { init: Child { pid: manifest.init.pid, pidfd }, link, backstage: None })
}

/// Ends what runs of a sandbox whose manifest is damaged, and frees its name. Its files are kept for a human.
fn set_aside(engine: &Engine, id: &SandboxId) -> Result<(), Error> {
    clean_cgroups_of(engine, id)?;
    let dir = engine.0.store.sandbox(id);
    let aside = dir.path().with_file_name(format!("{DAMAGED}{id}-{}", super::unix_ms()));
    let io = |source| Error::Io { op: "set aside", path: dir.path().to_owned(), source };
    fs::rename(dir.path(), &aside).map_err(io)?;
    // With its layers, or a later sandbox of this name would take them for its own.
    fs::create_dir_all(aside.join("layers")).map_err(io)?;
    for layer in engine.0.layers.list().map_err(io)? {
        let path = engine.0.layers.path(layer);
        if Record::load(&path).is_ok_and(|record| record.sandbox == *id) {
            fs::rename(&path, aside.join("layers").join(layer.to_string())).map_err(io)?;
        }
    }
    Ok(())
}

/// Layers that nobody needs: of sandboxes that are no more, of switches that were cut short, half made, made ahead.
fn clean_layers(engine: &Engine) -> Result<(), Error> {
    let spares = engine.0.store.spares();
    let swept = super::driver::sweep(&spares).map_err(|source| Error::Io { op: "clean up", path: spares, source });
    log_failure("gone", "remove layers that nobody used yet", swept);
    let io = |source| Error::Io { op: "clean up", path: engine.0.store.layers(), source };
    for layer in engine.0.layers.list().map_err(io)? {
        // One of a later version is another engine's.
        let record = Record::load(&engine.0.layers.path(layer));
        if record.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            log_failure(&layer.to_string(), "remove a half-made layer", engine.0.layers.remove(layer).map_err(io));
        }
    }
    // What cannot be removed (a failing disk) takes room, and waits for the next start.
    log_failure("gone", "remove the layers of sandboxes", engine.collect_orphans().map(drop));
    let known: Vec<_> = engine.sandboxes().keys().cloned().collect();
    for id in known {
        log_failure(id.as_str(), "remove what it does not need of its layers", engine.collect_of(&id).map(drop));
    }
    Ok(())
}

fn clean(engine: &Engine, id: &SandboxId) -> Result<(), Error> {
    clean_cgroups_of(engine, id)?;
    let dir = engine.0.store.sandbox(id);
    dir.remove().map_err(|source| Error::Io { op: "remove", path: dir.path().to_owned(), source })
}

fn clean_cgroups_of(engine: &Engine, id: &SandboxId) -> Result<(), Error> {
    let tag = engine.0.store.tag();
    let unified = cgroup::store_group(&engine.0.hosts.unified, tag).join(id.as_str());
    let v1 = engine.0.hosts.v1.values().map(|root| cgroup::store_group(root, tag).join(id.as_str())).collect();
    let cgroups = Cgroups { unified, v1 };
    cgroups.kill(None, DEADLINE)?;
    Ok(cgroups.remove()?)
}

/// Groups that no sandbox on record owns.
fn clean_cgroups(engine: &Engine) -> Result<(), Error> {
    let group = cgroup::store_group(&engine.0.hosts.unified, engine.0.store.tag());
    let entries = match fs::read_dir(&group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| Error::Io { op: "list", path: group.clone(), source })?,
    };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(id) = name.parse::<SandboxId>()
            && !engine.0.store.sandbox(&id).path().exists()
        {
            log_failure(&name, "clean up its cgroups", clean(engine, &id));
        }
    }
    Ok(())
}

/// Frames that no sandbox on record stands on.
fn clean_frames(dir: &Path, used: &BTreeSet<String>) -> Result<(), Error> {
    let io = |source| Error::Io { op: "clean", path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        if !used.contains(entry.file_name().to_string_lossy().as_ref()) {
            fs::remove_dir_all(entry.path()).map_err(io)?;
        }
    }
    Ok(())
}
