//! Many sandboxes at once: several clients make them all, run a command in each, and remove them all.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use deltabox_tests::bench::{Row, Samples};
use serde_json::{Value, json};

use crate::floor::{Bare, Floor, Trivial};
use crate::measure::settle;
use crate::product::Product;
use crate::visit::{Visit, visit};

pub(crate) const N_SANDBOXES: usize = 64;
const N_CLIENTS: usize = 8;
/// Chosen: enough for a median of wall times.
const N_REPEATS: usize = 5;

const PHASES: [&str; 6] = ["create", "exec", "bare exec", "rm", "bare create", "bare rm"];

/// Rows of single operations under this load, and wall times of the phases.
pub(crate) fn run(floor: &Floor) -> anyhow::Result<(Vec<Row>, Value)> {
    let mut rows = vec![
        Row::measured("64: create", "64: bare create", "as create, 64 made by 8 concurrent clients"),
        Row::measured("64: exec", "64: bare exec", "as exec, one in each of 64 sandboxes, by 8 concurrent clients"),
        Row::floor("64: bare exec", "as bare exec, one in each of 64 sandboxes, by 8 concurrent visitors"),
        Row::measured("64: rm", "64: bare rm", "as rm, 64 removed by 8 concurrent clients"),
        Row::floor("64: bare create", "as bare create, 64 made by 8 threads and kept"),
        Row::floor("64: bare rm", "as bare rm, by 8 threads; making the 64 is not in the clock, but in the load"),
    ];
    let mut walls: [Vec<Duration>; 6] = Default::default();
    for _ in 0..N_REPEATS {
        let (inits, kept) = (Mutex::new(HashMap::new()), Mutex::new(Vec::new()));
        let create = |product: &Product, name: &str| {
            let begun = Instant::now();
            let report = product.create(name)?;
            let took = begun.elapsed();
            lock(&inits)?.insert(name.to_owned(), report.init_pid.context("a running sandbox has an init")?);
            Ok(took)
        };
        let bare_create = |_: &Product, _: &str| {
            let (took, bare) = floor.create(Trivial::Exit)?;
            lock(&kept)?.push(bare);
            Ok(took)
        };
        let bare_exec = |_: &Product, name: &str| {
            let init = lock(&inits)?.get(name).copied().context("a sandbox made before")?;
            visit(init, Visit::True)
        };
        let steps: [Step<'_>; 6] = [
            &create,
            &|product, name| timed(|| product.exec(name, Visit::True)),
            &bare_exec,
            &|product, name| timed(|| product.remove(name)),
            &bare_create,
            &|_, _| floor.remove(),
        ];
        let mut calm = settle(floor)?;
        for ((step, row), walls) in steps.into_iter().zip(&mut rows).zip(&mut walls) {
            let (samples, wall) = all(step)?;
            row.samples.merge(&samples);
            walls.push(wall);
            if row.name == "64: rm" {
                calm.extend(settle(floor)?);
            }
        }
        calm.into_iter().chain(lock(&kept)?.drain(..)).try_for_each(Bare::remove)?;
    }
    let mut value = json!({ "n_sandboxes": N_SANDBOXES, "n_clients": N_CLIENTS, "n_repeats": N_REPEATS });
    for (name, mut walls) in PHASES.into_iter().zip(walls) {
        walls.sort_unstable();
        let us: Vec<u128> = walls.iter().map(Duration::as_micros).collect();
        value[name] = json!({ "wall_us": us, "median_wall_us": us[us.len() / 2] });
    }
    Ok((rows, value))
}

/// The wall times for people.
pub(crate) fn text(walls: &Value) -> String {
    let mut text = format!("{N_SANDBOXES} sandboxes, {N_CLIENTS} clients, median wall of {N_REPEATS}:");
    for name in PHASES {
        let ms = walls[name]["median_wall_us"].as_f64().unwrap_or(0.0) / 1e3;
        let _ = write!(text, "  {name} {ms:.1} ms");
    }
    text + "\n(of bare exec: with the visitors' start; of bare rm: with the making)\n"
}

type Step<'a> = &'a (dyn Fn(&Product, &str) -> anyhow::Result<Duration> + Sync);

/// Does one step for all sandboxes with all clients; what each took, and all together.
fn all(step: Step<'_>) -> anyhow::Result<(Samples, Duration)> {
    let next = AtomicUsize::new(0);
    let samples = Mutex::new(Samples::default());
    let client = || -> anyhow::Result<()> {
        let product = Product::new()?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= N_SANDBOXES {
                return Ok(());
            }
            let took = step(&product, &format!("many-{number}"))?;
            lock(&samples)?.record(took);
        }
    };
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..N_CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| client.join().map_err(|_| anyhow!("a client panicked"))?)
    })?;
    let wall = begun.elapsed();
    Ok((samples.into_inner().map_err(|_| anyhow!("a client panicked"))?, wall))
}

fn lock<T>(mutex: &Mutex<T>) -> anyhow::Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| anyhow!("another client panicked"))
}

fn timed(act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    act().map(|()| begun.elapsed())
}
