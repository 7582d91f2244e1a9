//! A program for the stories, run inside: 64 threads, each with a generator, a heap and a file of its own, and all with
//! one number that they share.
//!
//! `/srv/said.K` gets a line for each lap of thread K: its number, the time, and what the thread is by then
//! (tests/tests/processes/real/said.rs). A thread that finds its file or its share of the common number at another lap
//! than itself says so and ends the program.

#![expect(clippy::print_stdout, reason = "its last words")]

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const N_THREADS: usize = 64;
/// Blocks of a thread's heap.
const N_BLOCKS: usize = 10;

/// What all threads work on: the laps of each, and how many there were.
#[derive(Default)]
struct Common {
    laps: Mutex<(Vec<u64>, u64)>,
    changed: Condvar,
}

fn main() {
    let common = Arc::new(Common { laps: Mutex::new((vec![0; N_THREADS], 0)), ..Common::default() });
    let start = |k| {
        let common = Arc::clone(&common);
        std::thread::spawn(move || run(k, &common))
    };
    let threads: Vec<_> = (1..N_THREADS).map(start).collect();
    let why = run(0, &common);
    println!("{why}");
    drop(threads);
    std::process::exit(3);
}

/// Runs laps until something is not as it should be.
fn run(k: usize, common: &Common) -> String {
    let why = match laps(k, common) {
        Ok(()) => return String::new(),
        Err(why) => format!("thread {k}: {why}"),
    };
    println!("{why}");
    std::process::exit(3);
}

fn laps(k: usize, common: &Common) -> Result<(), String> {
    let path = format!("/srv/said.{k}");
    let mut random = k as u64 + 1;
    let mut heap: Vec<Vec<u64>> = vec![Vec::new(); N_BLOCKS];
    let mut said = String::new();
    for lap in 1_u64.. {
        let held = fs::read_to_string(&path).unwrap_or_default();
        if held.lines().last().unwrap_or_default() != said {
            return Err(format!("is at `{said}` and its file at `{:?}`", held.lines().last()));
        }
        {
            let mut laps = common.laps.lock().map_err(|error| error.to_string())?;
            let (each, all) = &mut *laps;
            if each[k] + 1 != lap || each.iter().sum::<u64>() != *all {
                return Err(format!("is at {lap}, and all are at {each:?}, {all}"));
            }
            each[k] += 1;
            *all += 1;
            common.changed.notify_all();
            // A while in a wait for the others, most of the time.
            let _ = common.changed.wait_timeout(laps, Duration::from_millis(20)).map_err(|error| error.to_string())?;
        }
        // No faster than its files can be read: they hold a thousand laps.
        std::thread::sleep(Duration::from_millis(3));
        let numbers: Vec<u64> = (0..16).map(|_| next(&mut random)).collect();
        for number in &numbers[..3] {
            let len = usize::try_from(number >> 50).unwrap_or(0) % 500;
            heap[usize::try_from(number >> 20).unwrap_or(0) % N_BLOCKS] = (0..len).map(|_| next(&mut random)).collect();
        }
        let state = format!("{} {:016x} {:016x}", lap * 3, hash(&numbers), hash(&heap));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?;
        let (number, ms) = (lap, now.as_millis());
        said = format!("{number} {ms} {state}");
        write(&path, lap, &said).map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(())
}

/// Each thousandth lap begins the file anew.
fn write(path: &str, lap: u64, line: &str) -> std::io::Result<()> {
    if lap.is_multiple_of(1000) {
        fs::rename(path, format!("{path}.old"))?;
    }
    File::options().create(true).append(true).open(path)?.write_all(format!("{line}\n").as_bytes())
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

fn hash(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
