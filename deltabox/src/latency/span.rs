//! One operation as it happens.

use std::fmt;
use std::time::{Duration, Instant};

/// What is timed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// From the request to a ready init and a manifest in place.
    Create,
    /// From the request to the program's first instruction (not its end).
    Exec,
    /// From the request to nothing left.
    Remove,
    /// From the request to a manifest in place.
    Checkpoint,
    /// From the request to programs that run on in the target's state.
    Rollback,
    /// Layers become one in the background: from the order to the new one in its place.
    Merge,
}

/// A part of an operation. Every nanosecond of a span belongs to exactly one phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Until the driver thread had the request.
    Queue,
    /// The base's lower directories (made at its first use).
    Base,
    /// Directories of sandbox and layer.
    Layer,
    /// The overlay.
    Mount,
    /// Cgroups and limits.
    Cgroup,
    /// The process in its namespaces, until it has its id map.
    Spawn,
    /// Init's own set-up: mounts, masks, filter.
    Boot,
    /// Written and renamed into place.
    Manifest,
    /// Init: streams, fork, exec.
    Start,
    /// cgroup.kill until nobody is left.
    Kill,
    /// Files of the sandbox.
    Files,
    /// The next root is mounted ahead, while programs run.
    Arm,
    /// All threads are halted. From here to the end of [`Phase::Resume`] the programs stand still.
    Stop,
    /// What leads to the old root is found: descriptors, directories, mappings, locks.
    Plan,
    /// Processes are taken: registers, descriptors, a template of each.
    Take,
    /// It is opened on the next root.
    Open,
    /// The way back is planned, and everything opened that it takes.
    Prepare,
    /// The next root takes the old one's place.
    Pivot,
    /// Processes are given what was opened.
    Rebase,
    /// Processes get back what they had: memory, threads, signals, descriptors.
    Restore,
    /// The old root turns read-only.
    Seal,
    /// All threads are let go.
    Resume,
    /// What templates tell of their processes is read, while those run again.
    Describe,
    /// Written to disk (`--durable`).
    Sync,
    /// What layers hold is copied into one.
    Copy,
}

impl Operation {
    /// Its name in tables, JSON and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Exec => "exec",
            Self::Remove => "rm",
            Self::Checkpoint => "checkpoint",
            Self::Rollback => "rollback",
            Self::Merge => "merge",
        }
    }
}

impl Phase {
    /// Its name in tables, JSON and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Base => "base",
            Self::Layer => "layer",
            Self::Mount => "mount",
            Self::Cgroup => "cgroup",
            Self::Spawn => "spawn",
            Self::Boot => "boot",
            Self::Manifest => "manifest",
            Self::Start => "start",
            Self::Kill => "kill",
            Self::Files => "files",
            Self::Arm => "arm",
            Self::Stop => "stop",
            Self::Plan => "plan",
            Self::Take => "take",
            Self::Open => "open",
            Self::Prepare => "prepare",
            Self::Pivot => "pivot",
            Self::Rebase => "rebase",
            Self::Restore => "restore",
            Self::Seal => "seal",
            Self::Resume => "resume",
            Self::Describe => "describe",
            Self::Sync => "sync",
            Self::Copy => "copy",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Phases of one span at most (chosen: twice the longest operation's).
const MAX_PHASES: usize = 24;

/// A running operation. Lives on the stack of whoever carries it out.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    operation: Operation,
    begun: Instant,
    /// Where the current phase began.
    cut: Instant,
    phases: [(Phase, Duration); MAX_PHASES],
    n: usize,
}

impl Span {
    /// Starts the clock.
    pub fn begin(operation: Operation) -> Self {
        let now = Instant::now();
        Self { operation, begun: now, cut: now, phases: [(Phase::Queue, Duration::ZERO); MAX_PHASES], n: 0 }
    }

    /// Ends the phase that was running since the last call (or the beginning): this is what it was.
    pub fn end_of(&mut self, phase: Phase) {
        self.end_of_at(phase, Instant::now());
    }

    /// The same of a phase that ended a while ago, in the current one.
    pub fn end_of_at(&mut self, phase: Phase, at: Instant) {
        self.add(phase, at.saturating_duration_since(self.cut));
        self.cut = self.cut.max(at);
    }

    /// A span with more phases than fit adds the rest to its last one: no time is lost.
    fn add(&mut self, phase: Phase, took: Duration) {
        match self.phases.get_mut(self.n) {
            Some(slot) => {
                *slot = (phase, took);
                self.n += 1;
            }
            None => self.phases[MAX_PHASES - 1].1 += took,
        }
    }

    /// What is timed.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The phases so far, in order.
    pub fn phases(&self) -> &[(Phase, Duration)] {
        &self.phases[..self.n]
    }

    /// How long the programs stood still: the phases from [`Phase::Stop`] to [`Phase::Resume`].
    pub fn stopped(&self) -> Duration {
        let at = |phase| self.phases().iter().position(|(one, _)| *one == phase);
        let (Some(first), Some(last)) = (at(Phase::Stop), at(Phase::Resume)) else { return Duration::ZERO };
        self.phases().get(first..=last).unwrap_or_default().iter().map(|(_, took)| *took).sum()
    }

    /// From the beginning to the end of the last phase.
    pub fn total(&self) -> Duration {
        self.cut - self.begun
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phases_of_a_span_add_up_to_its_total() {
        let mut span = Span::begin(Operation::Create);
        for phase in [Phase::Queue, Phase::Mount, Phase::Boot] {
            span.end_of(phase);
        }
        let names: Vec<_> = span.phases().iter().map(|(phase, _)| phase.name()).collect();
        assert_eq!(names, ["queue", "mount", "boot"]);
        assert_eq!(span.phases().iter().map(|(_, took)| *took).sum::<Duration>(), span.total());
    }

    #[test]
    fn programs_stand_still_from_stop_to_resume() {
        let mut span = Span::begin(Operation::Checkpoint);
        for phase in [Phase::Queue, Phase::Arm, Phase::Stop, Phase::Pivot, Phase::Resume, Phase::Manifest] {
            span.end_of(phase);
        }
        assert_eq!(span.stopped(), span.phases()[2..5].iter().map(|(_, took)| *took).sum());
    }

    #[test]
    fn a_span_with_too_many_phases_loses_no_time() {
        let mut span = Span::begin(Operation::Exec);
        for _ in 0..MAX_PHASES + 10 {
            span.end_of(Phase::Start);
        }
        assert_eq!(span.phases().len(), MAX_PHASES);
        assert_eq!(span.phases().iter().map(|(_, took)| *took).sum::<Duration>(), span.total());
    }
}
