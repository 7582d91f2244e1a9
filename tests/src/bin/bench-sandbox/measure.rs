//! The measuring process: the single operations one after the other, then many at once, then memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use deltabox_tests::bench::{Row, machine, report};
use serde_json::json;

use crate::floor::{self, Bare, Floor, Trivial};
use crate::product::{self, Product};
use crate::visit::{Visit, visit};
use crate::{many, memory};

/// The medians that the product is to stay within.
const TARGET_RATIO: f64 = 4.0;

/// Where to measure, told by the keeper.
#[derive(clap::Args)]
pub(crate) struct Place {
    #[arg(long)]
    scratch: PathBuf,
    #[arg(long)]
    store: PathBuf,
    #[arg(long)]
    daemon: i32,
    #[arg(long)]
    keeper: u32,
}

pub(crate) fn run(place: &Place, n_rounds: u32, file: Option<&Path>) -> anyhow::Result<()> {
    let machine = machine::describe(&place.store);
    let floor = Floor::new(&place.scratch, floor::group(place.keeper)?)?;
    let product = Product::new()?;
    let mut rows = Vec::new();
    println!("bench sandbox: {n_rounds} rounds each on {machine}\n");
    eprintln!("create, first exec, rm ...");
    lifecycle(&product, "one").and_then(|_| product.remove("one")).context("prepare the base")?;
    rows.extend(lifecycles(&product, &floor, n_rounds)?);
    rows.extend(churn(&product, &floor, n_rounds)?);
    eprintln!("exec ...");
    rows.extend(execs(&product, n_rounds)?);
    eprintln!("command line ...");
    rows.extend(processes(&floor, n_rounds)?);
    eprintln!("{} at once ...", many::N_SANDBOXES);
    let (many_rows, walls) = many::run(&floor)?;
    rows.extend(many_rows);
    eprintln!("memory ...");
    let memory = memory::run(&product, place.daemon, place.keeper)?;

    println!("{}", report::table(&rows));
    println!("{}", many::text(&walls));
    println!("{}", memory::text(&memory));
    let worst = rows.iter().filter_map(|row| Some((report::ratio(row, &rows)?, row.name)));
    if let Some((ratio, name)) = worst.max_by(|a, b| a.0.total_cmp(&b.0)) {
        let word = if ratio <= TARGET_RATIO { "met" } else { "missed" };
        println!("target: medians at most {TARGET_RATIO} times the floor: {word} (worst: {name}, {ratio:.2})");
    }
    let load_after = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load after: {}", load_after.trim());
    let Some(file) = file else { return Ok(()) };
    let value = json!({
        "bench": "sandbox",
        "machine": machine,
        "load_after": load_after.trim(),
        "rounds": n_rounds,
        "target_ratio": TARGET_RATIO,
        "rows": report::json(&rows),
        "many": walls,
        "memory": memory,
    });
    let text = serde_json::to_string_pretty(&value)?;
    std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
}

/// Create, first exec and rm, in batches: nothing is removed while something is made, because making a network
/// namespace waits for every one that is being taken down (for milliseconds; see [`churn`]).
fn lifecycles(product: &Product, floor: &Floor, n_rounds: u32) -> anyhow::Result<Vec<Row>> {
    let mut create = Row::measured(
        "create",
        "bare create",
        "client: connect, POST /v1/sandboxes, until the reply; init is ready for commands",
    );
    let mut engine = Row::measured(
        "create, engine alone",
        "bare create",
        "as the daemon reports it: from the request to init's Ready",
    );
    let mut first = Row::measured(
        "create + first exec",
        "bare create + exec",
        "client: create as above, then /bin/true by exec, until its exit status is here",
    );
    let mut remove =
        Row::measured("rm", "bare rm", "client: connect, DELETE, until the reply; all processes and files are gone");
    let mut bare = Row::floor(
        "bare create",
        "mkdir of a layer, overlay mount of the same stack (left detached), mkdir of a cgroup, clone3 with the same \
         namespaces into it, id map, exec of a static `exit(0)`, wait",
    );
    let mut bare_exec = Row::floor(
        "bare create + exec",
        "the same with /usr/bin/true of the overlay as the program, dynamically linked",
    );
    let mut bare_rm = Row::floor(
        "bare rm",
        "cgroup.kill of a bare sandbox with one waiting process, wait, rmdir of cgroup, rm of layer",
    );
    let mut round = 0;
    while round < n_rounds {
        let n = BATCH.min(n_rounds - round);
        let mut held = settle(floor)?;
        for number in 0..n {
            let ours = || lifecycle(product, &format!("one-{number}"));
            let theirs = || anyhow::Ok([floor.create(Trivial::Exit)?, floor.create(Trivial::True)?]);
            let (ours, theirs) = alternate(number, ours, theirs);
            let [(exit_took, a), (true_took, b)] = theirs?;
            held.extend([a, b]);
            let rows = [&mut create, &mut engine, &mut first, &mut bare, &mut bare_exec];
            for (row, took) in rows.into_iter().zip(ours?.into_iter().chain([exit_took, true_took])) {
                row.samples.record(took);
            }
        }
        for number in 0..n {
            let ours = || {
                let begun = Instant::now();
                product.remove(&format!("one-{number}")).map(|()| begun.elapsed())
            };
            let (ours, theirs) = alternate(number, ours, || floor.remove());
            remove.samples.record(ours?);
            bare_rm.samples.record(theirs?);
        }
        held.into_iter().try_for_each(Bare::remove)?;
        round += n;
    }
    Ok(vec![create, engine, bare, first, bare_exec, remove, bare_rm])
}

/// Chosen: many enough to have few batches, few enough to look like a machine with some sandboxes.
const BATCH: u32 = 25;

/// What create took, what of it the engine, and create with the first exec.
fn lifecycle(product: &Product, name: &str) -> anyhow::Result<[Duration; 3]> {
    let begun = Instant::now();
    let report = product.create(name)?;
    let created = begun.elapsed();
    product.exec(name, Visit::True)?;
    Ok([created, product::engine_time(&report), begun.elapsed()])
}

/// Create right after a removal, and removal right after a creation.
fn churn(product: &Product, floor: &Floor, n_rounds: u32) -> anyhow::Result<Vec<Row>> {
    let window =
        "as create, right after another sandbox was removed and while the kernel takes down its network namespace";
    let mut create = Row::measured("create after rm", "bare create after rm", window);
    let mut remove = Row::measured("rm of a young one", "bare rm", "as rm, right after create and first exec");
    let mut bare = Row::floor("bare create after rm", "as bare create, right after another bare sandbox was removed");
    for round in 0..n_rounds {
        let ours = || {
            let [created, ..] = lifecycle(product, "one")?;
            let begun = Instant::now();
            product.remove("one").map(|()| [created, begun.elapsed()])
        };
        let theirs = || {
            let (took, bare) = floor.create(Trivial::Exit)?;
            bare.remove().map(|()| took)
        };
        let (ours, theirs) = alternate(round, ours, theirs);
        for (row, took) in [&mut create, &mut remove].into_iter().zip(ours?) {
            row.samples.record(took);
        }
        bare.samples.record(theirs?);
    }
    Ok(vec![create, bare, remove])
}

/// Returns when the kernel seems to have taken down what earlier rounds left. There is no event for it: bare sandboxes
/// are made, and kept, until four in a row are
/// about as fast as the fastest. The caller keeps them until its clocks have stopped.
pub(crate) fn settle(floor: &Floor) -> anyhow::Result<Vec<Bare>> {
    let (mut held, mut fastest, mut n_calm) = (Vec::new(), Duration::MAX, 0);
    while n_calm < 4 && held.len() < 64 {
        let (took, bare) = floor.create(Trivial::Exit)?;
        held.push(bare);
        fastest = fastest.min(took);
        n_calm = if took < fastest * 3 / 2 { n_calm + 1 } else { 0 };
    }
    Ok(held)
}

fn execs(product: &Product, n_rounds: u32) -> anyhow::Result<Vec<Row>> {
    let window = "client: connect, POST, upgrade, until the exit status is here; a running sandbox";
    let mut pairs = [
        (
            Visit::True,
            Row::measured("exec", "bare exec", window),
            Row::floor(
                "bare exec",
                "a warm single-threaded process: setns to all namespaces of the sandbox, setresuid, posix_spawn of \
                 /bin/true, wait",
            ),
        ),
        (
            Visit::Kib,
            Row::measured("exec, 1 KiB out", "bare exec, 1 KiB out", "the same with printf of 1024 bytes, captured"),
            Row::floor("bare exec, 1 KiB out", "the same with printf of 1024 bytes through a pipe, read to its end"),
        ),
        (
            Visit::Pty,
            Row::measured("exec, pty", "bare exec, pty", "as exec, /bin/true with a terminal of its own"),
            Row::floor(
                "bare exec, pty",
                "as bare exec, with openpty in the sandbox (no session, no controlling terminal)",
            ),
        ),
    ];
    let init = product.create("one")?.init_pid.context("a running sandbox has an init")?;
    for round in 0..n_rounds + N_WARM_UP {
        for (kind, ours, theirs) in &mut pairs {
            let exec = || {
                let begun = Instant::now();
                product.exec("one", *kind).map(|()| begun.elapsed())
            };
            let (took, bare) = alternate(round, exec, || visit(init, *kind));
            let (took, bare) = (took?, bare?);
            if round >= N_WARM_UP {
                ours.samples.record(took);
                theirs.samples.record(bare);
            }
        }
    }
    product.remove("one")?;
    Ok(pairs.into_iter().flat_map(|(_, ours, theirs)| [ours, theirs]).collect())
}

fn processes(floor: &Floor, n_rounds: u32) -> anyhow::Result<Vec<Row>> {
    let window = "whole process: fork and exec of `deltabox exec one -- /bin/true` until its end";
    let mut exec = Row::measured("cli exec", "nsenter", window);
    let window = "whole process: `deltabox run -- /bin/true`, which creates, executes and removes";
    let mut run = Row::measured("cli run", "bare run", window);
    let mut enter = Row::floor(
        "nsenter",
        "whole process: nsenter(1) into the same namespaces of the same sandbox, /bin/true there",
    );
    let mut bare_run = Row::floor(
        "bare run",
        "/bin/true as a process on the host, then bare create + exec and its removal; nothing else is held",
    );
    let mut process = Row::floor("process", "fork (posix_spawn) and exec of /bin/true on the host, wait");
    let product = Product::new()?;
    let init = product.create("one")?.init_pid.context("a running sandbox has an init")?.to_string();
    let clock = |program: &Path, args: &[&str]| {
        let begun = Instant::now();
        product::process(Command::new(program).args(args)).map(|()| begun.elapsed())
    };
    let deltabox = deltabox_tests::binary();
    let visit = ["--target", &init, "--user", "--pid", "--mount", "--net", "--ipc", "--uts", "--cgroup", "/bin/true"];
    for round in 0..n_rounds + N_WARM_UP {
        let ours = || clock(&deltabox, &["exec", "one", "--", "/bin/true"]);
        let theirs = || anyhow::Ok((clock(Path::new("nsenter"), &visit)?, clock(Path::new("/bin/true"), &[])?));
        let (exec_took, floors) = alternate(round, ours, theirs);
        let ours = || clock(&deltabox, &["run", "--", "/bin/true"]);
        let theirs = || {
            let begun = Instant::now();
            product::process(&mut Command::new("/bin/true"))?;
            let (_, bare) = floor.create(Trivial::True)?;
            bare.remove().map(|()| begun.elapsed())
        };
        let (run_took, bare_run_took) = alternate(round, ours, theirs);
        let (enter_took, process_took) = floors?;
        if round >= N_WARM_UP {
            let rows = [&mut exec, &mut enter, &mut process, &mut run, &mut bare_run];
            for (row, took) in rows.into_iter().zip([exec_took?, enter_took, process_took, run_took?, bare_run_took?]) {
                row.samples.record(took);
            }
        }
    }
    product.remove("one")?;
    Ok(vec![exec, enter, process, run, bare_run])
}

/// Rounds before the clock counts: the first sandbox of a daemon prepares its base, and caches are cold.
const N_WARM_UP: u32 = 5;

/// A B in even rounds, B A in odd ones: what one leaves to the kernel's workers then costs both the same.
fn alternate<A, B>(round: u32, ours: impl FnOnce() -> A, theirs: impl FnOnce() -> B) -> (A, B) {
    if round.is_multiple_of(2) {
        let ours = ours();
        (ours, theirs())
    } else {
        let theirs = theirs();
        (ours(), theirs)
    }
}
