//! Real programs that know nothing of deltabox, checkpointed and rolled back at random moments under load.
//!
//! ```text
//!   50 times (1,000 in soak)
//!     a checkpoint, or not; one too many is removed
//!     back to one of those that are there: its files, and each program at the lap at which it was taken
//! ```
//! Each program runs laps and says of each what it is by then: [`said`]. It also knows what its files should hold, and
//! ends when they do not: memory and files must be of the same instant.

#![expect(clippy::panic, clippy::print_stdout, reason = "a broken assumption ends the story; counts are for people")]

mod builds;
mod memory;
mod python;
mod runtimes;
mod said;
mod shells;
mod threads;

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use deltabox_tests::leftovers::Leftovers;
use deltabox_tests::{Host, count, skipped_without_root, soak};

use said::{Made, Voice, bracket, last_before, now_ms};

/// What comes before each Python program.
pub(crate) const LAPS: &str = include_str!("../programs/real/laps.py");

/// Checkpoints that are kept.
const N_KEPT: usize = 6;
/// How long a program may take for what it does all the time (chosen: the machine is loaded).
const PATIENCE: Duration = Duration::from_secs(120);

/// A program, and how it is disturbed.
pub(crate) struct Story {
    /// Its command.
    pub(crate) words: Vec<String>,
    /// More words for `create`.
    pub(crate) create: Vec<String>,
    /// Files for `/srv`, executable.
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
    /// Those that speak all the time.
    pub(crate) voices: Vec<String>,
    /// Those that speak now and then.
    pub(crate) seldom: Vec<String>,
    pub(crate) rounds: usize,
    /// Between two steps, on average.
    pub(crate) gap: Duration,
}

impl Story {
    pub(crate) fn new(words: &[&str]) -> Self {
        Self {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            create: Vec::new(),
            files: Vec::new(),
            voices: vec!["0".to_owned()],
            seldom: Vec::new(),
            rounds: count(50, 1000),
            gap: Duration::from_millis(10),
        }
    }

    /// A program in Python that uses [`LAPS`].
    pub(crate) fn python(program: &str) -> Self {
        Self::new(&["/usr/bin/python3", "-c", &format!("{LAPS}\n{program}")])
    }

    /// On a host of its own, under load.
    pub(crate) fn run(&self) {
        if skipped_without_root() {
            return;
        }
        let host = Host::start();
        // In CI the programs and the story beside this one are load enough; `crowd.rs` has more.
        let load = Load::start(count(0, 1));
        self.run_on(&host, "box", 1);
        drop(load);
        let left = Leftovers::of(&host.store());
        assert_eq!((left.processes.len(), left.mounts.len()), (0, 0), "{left:?}");
    }

    /// In a sandbox of that name, which is removed in the end.
    pub(crate) fn run_on(&self, host: &Host, sandbox: &str, seed: u64) {
        let mut rounds = Rounds::start(self, host, sandbox, seed);
        for round in 0..self.rounds {
            if let Err(why) = rounds.one() {
                panic!("{sandbox}, round {round}: {why}; {}", rounds.last_words());
            }
        }
        // In the end it is let go on, to be told what comes of it all.
        if let Err(why) = rounds.wait_for(rounds.voices.len(), now_ms()) {
            panic!("{sandbox}: {why}; {}", rounds.last_words());
        }
        rounds.end();
    }
}

/// Whether a program that CI does not have is there; without it soak fails.
pub(crate) fn is_there(path: &Path) -> bool {
    if path.exists() {
        return true;
    }
    assert!(!soak(), "no {}: run `cargo xtask setup --with-programs`", path.display());
    println!("SKIPPED: no {}; `cargo xtask setup --with-programs` brings it", path.display());
    false
}

/// Threads that compute for nothing.
pub(crate) struct Load {
    go_on: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(n: usize) -> Self {
        let go_on = Arc::new(AtomicBool::new(true));
        let spin = |go_on: Arc<AtomicBool>| {
            move || {
                while go_on.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            }
        };
        let threads = (0..n).map(|_| std::thread::spawn(spin(Arc::clone(&go_on)))).collect();
        Self { go_on, threads }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.go_on.store(false, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A checkpoint, and what was seen of it.
struct Node {
    id: String,
    made: Made,
    /// Names of the files that the host had put into the tree.
    marks: BTreeSet<String>,
    /// Of each voice, the lap that it may end with: first and last.
    laps: Vec<(u64, u64)>,
}

struct Rounds<'a> {
    story: &'a Story,
    host: &'a Host,
    sandbox: String,
    /// The tree, from outside.
    root: PathBuf,
    child: Child,
    voices: Vec<Voice>,
    nodes: Vec<Node>,
    n_marks: usize,
    random: u64,
    n_back: usize,
}

impl<'a> Rounds<'a> {
    fn start(story: &'a Story, host: &'a Host, sandbox: &str, seed: u64) -> Self {
        host.cli(["create", sandbox].into_iter().map(str::to_owned).chain(story.create.iter().cloned())).ok();
        for (name, bytes) in &story.files {
            let script = format!("cat > /srv/{name}; chmod 755 /srv/{name}");
            host.cli_with_input(["exec", "-i", sandbox, "--", "sh", "-c", &script], bytes).ok();
        }
        host.sh(sandbox, "mkdir /srv/marks").ok();
        let root = PathBuf::from(format!("/proc/{}/root", host.init(sandbox)));
        let mut command = host.command(["exec", sandbox, "--"].map(str::to_owned).iter().chain(&story.words));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.expect("start deltabox");
        let voices = story.voices.iter().chain(&story.seldom).map(|name| Voice::new(&root, name)).collect();
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let nodes = Vec::new();
        let mut rounds = Self {
            story,
            host,
            sandbox: sandbox.to_owned(),
            root,
            child,
            voices,
            nodes,
            n_marks: 0,
            random,
            n_back: 0,
        };
        if let Err(why) = rounds.wait_since(0) {
            panic!("{}: {why}; {}", sandbox, rounds.last_words());
        }
        rounds
    }

    fn random(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).unwrap_or(0) % below
    }

    fn one(&mut self) -> Result<(), String> {
        let gap_us = usize::try_from(self.story.gap.as_micros()).unwrap_or(1).max(1);
        if self.nodes.is_empty() || self.random(2) == 0 {
            self.rest(2 * gap_us);
            self.checkpoint()?;
            if self.nodes.len() > N_KEPT {
                let gone = self.random(N_KEPT);
                let gone = self.nodes.remove(gone);
                self.host.cli(["rm", &format!("{}@{}", self.sandbox, gone.id)]).ok();
            }
        }
        self.rest(2 * gap_us);
        self.roll_back()?;
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            ended => Err(format!("it has ended: {ended:?}")),
        }
    }

    /// Lets it run for up to so long: the moments are to be random.
    fn rest(&mut self, at_most_us: usize) {
        let us = self.random(at_most_us);
        std::thread::sleep(Duration::from_micros(us.try_into().unwrap_or(0)));
    }

    fn checkpoint(&mut self) -> Result<(), String> {
        let mark = format!("{}", self.n_marks);
        self.n_marks += 1;
        fs::write(self.root.join("srv/marks").join(&mark), &mark).map_err(|error| format!("mark {mark}: {error}"))?;
        let marks = self.marks()?;
        let begun_ms = now_ms();
        let output = self.host.cli(["checkpoint", &self.sandbox]);
        let made = Made { begun_ms, done_ms: now_ms() };
        if !output.status.success() {
            return Err(format!("checkpoint: {output:?}"));
        }
        let mut laps = Vec::with_capacity(self.voices.len());
        for voice in &mut self.voices {
            laps.push(bracket(&voice.hear()?, made));
        }
        self.nodes.push(Node { id: output.stdout.trim().to_owned(), made, marks, laps });
        Ok(())
    }

    fn roll_back(&mut self) -> Result<(), String> {
        // Often the last one: so it gets ahead.
        let last = self.nodes.len() - 1;
        let at = if self.random(2) == 0 { last } else { self.random(self.nodes.len()) };
        // What is said in the branch that is left counts too.
        self.hear()?;
        let back_ms = now_ms();
        let id = self.nodes[at].id.clone();
        let output = self.host.cli(["rollback", &self.sandbox, &id]);
        if !output.status.success() {
            return Err(format!("rollback to {id}: {output:?}"));
        }
        self.n_back += 1;
        let marks = self.marks()?;
        if marks != self.nodes[at].marks {
            return Err(format!("{id} has marks {:?}, had {:?}", marks, self.nodes[at].marks));
        }
        self.wait_since(back_ms)?;
        let node = &mut self.nodes[at];
        for (at, voice) in self.voices.iter_mut().enumerate() {
            let laps = voice.hear()?;
            let last =
                last_before(&laps, node.made, back_ms).map_err(|why| format!("{id}: {}: {why}", voice.name()))?;
            let (first, end) = node.laps[at];
            if !(first..=end).contains(&last) {
                return Err(format!("{id}: {} goes on after lap {last}, not {first} to {end}", voice.name()));
            }
            // From now on it is known.
            node.laps[at] = (last, last);
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<(), String> {
        self.voices.iter_mut().try_for_each(|voice| voice.hear().map(drop))
    }

    /// Waits until each voice that always speaks has said something that is younger.
    fn wait_since(&mut self, ms: u64) -> Result<(), String> {
        self.wait_for(self.story.voices.len(), ms)
    }

    /// The same for the first `n_voices`.
    fn wait_for(&mut self, n_voices: usize, ms: u64) -> Result<(), String> {
        let end = Instant::now() + PATIENCE;
        for voice in &mut self.voices[..n_voices] {
            while voice.hear()?.last().is_none_or(|lap| lap.ms < ms) {
                if let Ok(Some(status)) = self.child.try_wait() {
                    return Err(format!("it has ended: {status:?}"));
                }
                if Instant::now() > end {
                    return Err(format!("{} says nothing more", voice.name()));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    fn marks(&self) -> Result<BTreeSet<String>, String> {
        let entries = fs::read_dir(self.root.join("srv/marks")).map_err(|error| format!("marks: {error}"))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    fn end(mut self) {
        let laps: Vec<_> = self.voices.iter().map(Voice::n_known).collect();
        println!("{}: {} back, laps {laps:?}", self.sandbox, self.n_back);
        self.host.cli(["rm", &self.sandbox]).ok();
        self.child.wait().expect("wait for deltabox");
    }

    /// What it says at its end, which comes now if it has not come by itself.
    fn last_words(&mut self) -> String {
        std::thread::sleep(Duration::from_millis(500));
        let ended = self.child.try_wait();
        let ps = self.host.cli(["ps", &self.sandbox]).stdout;
        // A command line can be a whole program.
        let ps: Vec<_> = ps.lines().map(|line| line.chars().take(100).collect::<String>()).collect();
        let _ = self.host.cli(["kill", &self.sandbox]);
        let mut told = String::new();
        if let (Some(out), Some(err)) = (&mut self.child.stdout, &mut self.child.stderr) {
            let _ = out.read_to_string(&mut told);
            let _ = err.read_to_string(&mut told);
        }
        format!("{} back; ended: {ended:?}; says `{told}`; ps: {ps:#?}", self.n_back)
    }
}
