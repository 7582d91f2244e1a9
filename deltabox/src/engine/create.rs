//! `create`: from a request to a driver that serves a sandbox. One straight line; whatever was made before a
//! failure is removed again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::api::{CreateRequest, Reply, SandboxReport, SandboxState};
use super::driver::{Driver, DriverParts, Life, MAX_LAYERS, Mail, Shown, mounted_over, tops};
use super::footing::Footing;
use super::manifest::{InitIdentity, Manifest};
use super::store::{SandboxDir, random_hex};
use super::tree::Tree;
use super::{Engine, Error, Handle, lock, unix_ms};
use crate::deltafs::layer::{LayerId, RootLook};
use crate::deltafs::layers::Stack;
use crate::latency::{Operation, Phase, Span};
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::spawn::{self, Parts, SpawnError};
use crate::sandbox::{BaseRef, SandboxId, SandboxSpec};

/// Reserves the name and starts the driver thread, which does the rest and replies.
pub(super) fn create(engine: &Engine, request: CreateRequest, reply: Reply<SandboxReport>) {
    let span = Span::begin(Operation::Create);
    let reserved = check(&request.spec).and_then(|()| reserve(engine, &request));
    let (id, mail) = match reserved {
        Ok(reserved) => reserved,
        Err(error) => return reply(Err(error)),
    };
    let theirs = (engine.clone(), id.clone());
    let reply = Arc::new(Mutex::new(Some(reply)));
    let answer = Arc::clone(&reply);
    let drive = move || {
        let (engine, id) = theirs;
        let made = make(&engine, &id, request.spec, span);
        let Some(reply) = lock(&answer).take() else { return };
        match made {
            Ok((manifest, tree, life)) => {
                let driver = register(&engine, manifest, tree, Some(life), mail);
                reply(engine.inspect(&id));
                drive_to_the_end(&engine, &id, driver);
            }
            Err(error) => {
                engine.sandboxes().remove(&id);
                reply(Err(error));
            }
        }
    };
    if let Err(source) = std::thread::Builder::new().name(format!("sb-{id}")).spawn(drive) {
        engine.sandboxes().remove(&id);
        let path = engine.0.store.sandbox(&id).path().to_owned();
        if let Some(reply) = lock(&reply).take() {
            reply(Err(Error::Io { op: "start the driver thread of", path, source }));
        }
    }
}

fn check(spec: &SandboxSpec) -> Result<(), Error> {
    let invalid = |what, why: &str| Err(Error::Invalid { what, why: why.to_owned() });
    if spec.env.iter().any(|pair| !pair.contains('=') || pair.contains('\0')) {
        return invalid("env", "give KEY=VALUE");
    }
    if spec.limits.memory_bytes.is_some_and(|bytes| bytes < 4 << 20) {
        return invalid("memory", "at least 4 MiB");
    }
    if !(2..=MAX_LAYERS).contains(&spec.merge_above) {
        return invalid("merge_above", "2 to 480 layers");
    }
    if spec.limits.n_pids.is_some_and(|n| n < 2) {
        return invalid("pids", "at least 2: init and one command");
    }
    Ok(())
}

fn reserve(engine: &Engine, request: &CreateRequest) -> Result<(SandboxId, Arc<Mail>), Error> {
    let io = |op| move |source| Error::Io { op, path: PathBuf::from("sandbox"), source };
    let mail = Arc::new(Mail::new().map_err(|errno| io("make the inbox of a")(errno.into()))?);
    let mut sandboxes = engine.sandboxes();
    let image = engine.take_image(&request.spec.base, &sandboxes)?;
    let id = match request.name.clone() {
        Some(id) if sandboxes.contains_key(&id) => {
            return Err(Error::Exists { what: "sandbox", name: id.to_string() });
        }
        Some(id) => id,
        None => loop {
            let name = format!("box-{}", random_hex(3).map_err(io("name a"))?);
            match name.parse() {
                Ok(id) if !sandboxes.contains_key(&id) => break id,
                _ => {}
            }
        },
    };
    sandboxes.insert(id.clone(), Handle { mail: Arc::clone(&mail), image, shown: None });
    Ok((id, mail))
}

/// Makes the sandbox shown to everybody; from here its driver answers.
pub(super) fn register(engine: &Engine, manifest: Manifest, tree: Tree, life: Option<Life>, mail: Arc<Mail>) -> Driver {
    let dir = engine.0.store.sandbox(&manifest.id);
    let state = match &life {
        Some(_) => SandboxState::Running,
        None => SandboxState::Dead { reason: "its processes ended while no engine was running".to_owned() },
    };
    let report = SandboxReport {
        id: manifest.id.clone(),
        state,
        spec: manifest.spec.clone(),
        created_unix_ms: manifest.created_unix_ms,
        init_pid: life.as_ref().map(|life| life.init.pid),
        cgroup: manifest.cgroups.unified.clone(),
        live_layer: engine.0.layers.path(manifest.live),
        head: manifest.head.map(|id| id.to_string()),
        epoch: manifest.epoch,
        create_us: manifest.create_us,
    };
    let (live, next, tops) = (manifest.live, manifest.next, tops(&manifest, &tree));
    let held = mounted_over(engine, &manifest);
    let execs = Vec::new();
    engine.0.pool.open(&manifest.id, manifest.spec.pool);
    let shown = Shown { report, execs, tree: Arc::new(tree.clone()), live, next, tops, held };
    let shown = Arc::new(Mutex::new(shown));
    let image = match &manifest.spec.base {
        BaseRef::Image { name } => Some(name.clone()),
        BaseRef::Host { .. } | BaseRef::Dir { .. } => None,
    };
    let handle = Handle { mail: Arc::clone(&mail), image, shown: Some(Arc::clone(&shown)) };
    engine.sandboxes().insert(manifest.id.clone(), handle);
    let (logs, retired) = (engine.0.logs.clone(), Arc::clone(&engine.0.retired));
    let book = Arc::clone(&engine.0.book);
    let engine = engine.clone();
    Driver::new(DriverParts { engine, tree, manifest, dir, mail, shown, logs, retired, book }, life)
}

/// Runs a driver; its sandbox's name is free before the removal is answered.
pub(super) fn drive_to_the_end(engine: &Engine, id: &SandboxId, driver: Driver) {
    let reply = driver.run();
    engine.0.book.forget(id.as_str());
    engine.0.pool.close(id);
    engine.sandboxes().remove(id);
    reply(Ok(()));
}

/// Removes what a failed creation has made, unless it is told to keep it.
struct Scraps {
    engine: Engine,
    layer: Option<LayerId>,
    dir: SandboxDir,
    cgroups: Option<Cgroups>,
    keep: bool,
}

impl Drop for Scraps {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Some(cgroups) = &self.cgroups
            && let Err(error) = cgroups.kill(None, std::time::Duration::from_secs(10)).and_then(|()| cgroups.remove())
        {
            tracing::error!(%error, "cgroups of a failed creation remain until the next start");
        }
        if let Err(error) = self.dir.remove() {
            tracing::error!(%error, path = %self.dir.path().display(), "files of a failed creation remain until the next start");
        }
        if let Some(Err(error)) = self.layer.map(|layer| self.engine.0.layers.remove(layer)) {
            tracing::error!(%error, "the layer of a failed creation remains until the next start");
        }
    }
}

fn make(engine: &Engine, id: &SandboxId, spec: SandboxSpec, mut span: Span) -> Result<(Manifest, Tree, Life), Error> {
    span.end_of(Phase::Queue);
    let inner = &engine.0;
    let dir = inner.store.sandbox(id);
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Create { id: id.clone(), source };
    let io = |op, path: PathBuf| move |source| Error::Io { op, path, source };

    let footing = Footing::new(engine, &spec.base)?;
    let binds = footing.binds()?;
    span.end_of(Phase::Base);
    dir.create().map_err(io("create", dir.path().to_owned()))?;
    let mut scraps = Scraps { engine: engine.clone(), dir: dir.clone(), layer: None, cgroups: None, keep: false };
    let store = inner.store.layers();
    let layer = inner
        .layers
        .create(&Stack::default(), id, None, RootLook::first())
        .map_err(io("create a layer in", store.clone()))?;
    scraps.layer = Some(layer.record().id);
    span.end_of(Phase::Layer);
    crate::fault::point("create.mount").map_err(io("mount", store))?;
    let root = footing.mount(engine, &Stack::default(), &layer).map_err(|error| failed(error.into()))?;
    span.end_of(Phase::Mount);
    crate::fault::point("create.cgroup").map_err(io("create the cgroups of", dir.path().to_owned()))?;
    let cgroups = Cgroups::create(&inner.hosts, inner.store.tag(), id, &spec.limits)?;
    scraps.cgroups = Some(cgroups.clone());
    span.end_of(Phase::Cgroup);
    let dev = inner.fixtures.dev().map_err(io("clone the mount of", PathBuf::from("/dev")))?;
    let listener = dir.listener();
    let parts = Parts { id, net: spec.net, root, dev, binds, cgroups: &cgroups, listener: &listener };
    let spawned = spawn::spawn(parts, &mut span).map_err(|error| match error {
        SpawnError::Cgroup(error) => Error::from(error),
        other => failed(other.into()),
    })?;

    let tree = Tree::load(&dir.checkpoints()).map_err(io("read", dir.checkpoints()))?;
    let init = InitIdentity::of(spawned.init.pid).map_err(io("identify init in", PathBuf::from("/proc")))?;
    let create_us = u64::try_from(span.total().as_micros()).unwrap_or(u64::MAX);
    let manifest =
        Manifest::new(id.clone(), spec, unix_ms(), create_us, cgroups, layer.record().id, footing.frame(), init);
    manifest.save(dir.path(), false).map_err(io("write the manifest in", dir.path().to_owned()))?;
    scraps.keep = true;
    let backstage = Some(Arc::new(spawned.backstage));
    let life = Life { init: spawned.init, link: spawned.link, backstage };
    span.end_of(Phase::Manifest);
    inner.book.record(id.as_str(), &span);
    Ok((manifest, tree, life))
}
