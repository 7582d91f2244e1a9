//! What a stack consists of: each layer itself, or a merged one for several.
//!
//! ```text
//!   names, as they were frozen        1 <- 2 <- 3 <- 4 <- 5 <- 6      each layer's record names its parent
//!   directories on disk               1  2  3  4  5  6  7             7 stands for 1 to 4
//!   the stack of 6                    6  5  7
//!   the stack of 3                    3  2  1
//! ```
//! A layer keeps its name when its directory is gone: one is enough that stands for it and some below.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::{LayerId, Layers, Merged, Record, lock};

/// One directory of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The topmost layer that it stands for.
    pub name: LayerId,
    /// The directory.
    pub id: LayerId,
    /// The name of what lies below.
    pub parent: Option<LayerId>,
    /// How many layers it stands for.
    pub n_layers: u64,
    /// How many layers lie below it, each merged one counted as what it stands for.
    pub depth: u64,
}

impl Merged {
    /// What one layer for `run` stands for: consecutive steps, the topmost first. `None` for no steps.
    pub fn of(run: &[Step]) -> Option<Self> {
        let (top, lowest) = (run.first()?, run.last()?);
        Some(Self { top: top.name, n_layers: top.depth + top.n_layers - lowest.depth })
    }
}

/// The directories of a state of files, the topmost first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stack(Vec<Step>);

/// A directory that a stack needs and that is not whole.
#[derive(Debug, thiserror::Error)]
#[error("layer {id}: {source}")]
pub struct StackError {
    /// Which one.
    pub id: LayerId,
    /// What is wrong with it.
    pub source: io::Error,
}

/// Two stacks, and what they share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fork {
    /// What only the first has, the topmost first.
    pub from: Vec<LayerId>,
    /// What only the second has.
    pub to: Vec<LayerId>,
    /// What lies below both.
    pub common: Vec<LayerId>,
}

impl Stack {
    /// Its topmost layer.
    pub fn top(&self) -> Option<LayerId> {
        self.0.first().map(|step| step.name)
    }

    /// Its directories, the topmost first.
    pub fn dirs(&self) -> Vec<LayerId> {
        self.0.iter().map(|step| step.id).collect()
    }

    /// The same with what is known of them.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }

    /// How many directories.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing but skeleton and base.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many layers it stands for.
    pub fn depth(&self) -> u64 {
        self.0.first().map_or(0, |step| step.depth + step.n_layers)
    }
}

/// What is known without looking at the disk.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Directories that were found whole once, by number: their records never change.
    whole: BTreeMap<LayerId, Step>,
    /// Merged layers by the topmost layer they stand for, those of the longest runs first.
    merged: BTreeMap<LayerId, Vec<(u64, LayerId)>>,
}

impl Index {
    pub(super) fn add_merged(&mut self, id: LayerId, merged: Merged) {
        let those = self.merged.entry(merged.top).or_default();
        those.push((merged.n_layers, id));
        those.sort_unstable_by(|a, b| b.cmp(a));
    }

    pub(super) fn remove(&mut self, id: LayerId) {
        self.whole.remove(&id);
        self.merged.retain(|_, those| {
            those.retain(|(_, merged)| *merged != id);
            !those.is_empty()
        });
    }
}

impl Layers {
    /// The stack of a layer, in as few directories as may be. Each was looked at just now.
    pub fn stack(&self, top: Option<LayerId>) -> Result<Stack, StackError> {
        walk(top, None, |name| self.check(name))
    }

    /// The same of layers that are in use: each directory is looked at once in the life of this engine.
    pub fn known_stack(&self, top: Option<LayerId>) -> Result<Stack, StackError> {
        walk(top, None, |name| self.step(name))
    }

    /// Two stacks, and from where on they are one.
    pub fn fork(&self, from: Option<LayerId>, to: Option<LayerId>) -> Result<Fork, StackError> {
        // By single layers where they are there: a merged one may stand for layers on both sides of the fork.
        let fine = |top| {
            let single_first = |name| self.first_known(name, self.directories(name).into_iter().rev(), |_| true);
            walk(top, None, single_first).or_else(|_| self.known_stack(top))
        };
        let (one, other) = (fine(from)?, fine(to)?);
        let names: BTreeSet<_> = one.0.iter().map(|step| step.name).collect();
        let shared = other.0.iter().find(|step| names.contains(&step.name));
        let (name, depth) = (shared.map(|step| step.name), shared.map_or(0, |step| step.depth + step.n_layers));
        let above = |top| {
            let fitting = |at| self.first_known(at, self.directories(at), |step| step.depth >= depth);
            walk(top, name, fitting).map(|stack| stack.dirs())
        };
        Ok(Fork { from: above(from)?, to: above(to)?, common: self.stack(name)?.dirs() })
    }

    /// The topmost directory of a layer's stack; it may have been looked at before.
    pub fn step(&self, name: LayerId) -> Result<Step, StackError> {
        self.first_known(name, self.directories(name), |_| true)
    }

    /// The topmost directory of a layer's stack, looked at on disk.
    pub fn check(&self, name: LayerId) -> Result<Step, StackError> {
        first_fitting(name, self.directories(name), |id| self.look(name, id), |_| true)
    }

    /// Directories that stand for a layer, and perhaps for some below it: those for the most first, its own last.
    pub fn directories(&self, name: LayerId) -> Vec<LayerId> {
        let merged = lock(&self.index).merged.get(&name).cloned().unwrap_or_default();
        merged.into_iter().map(|(_, id)| id).chain([name]).collect()
    }

    /// The first of these directories that fits; it may have been looked at before.
    fn first_known(
        &self,
        name: LayerId,
        among: impl IntoIterator<Item = LayerId>,
        fits: impl Fn(&Step) -> bool,
    ) -> Result<Step, StackError> {
        let look = |id| {
            let known = lock(&self.index).whole.get(&id).copied();
            // A merged one can be done without: it had better be there.
            let known = known.filter(|step| step.n_layers == 1 || self.upper(id).is_dir());
            known.map_or_else(|| self.look(name, id), Ok)
        };
        first_fitting(name, among, look, fits)
    }

    /// Looks at a directory on disk.
    fn look(&self, name: LayerId, id: LayerId) -> Result<Step, StackError> {
        self.read(name, id).inspect_err(|_| _ = lock(&self.index).whole.remove(&id))
    }

    fn read(&self, name: LayerId, id: LayerId) -> Result<Step, StackError> {
        let failed = |source| StackError { id, source };
        let record = Record::load(&self.path(id)).map_err(failed)?;
        // Layers are made above older ones; anything else is damage that would never end.
        if record.id != id || record.name() != name || name > id || record.parent.is_some_and(|parent| parent >= name) {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "its layer.json is another's")));
        }
        let n_layers = record.merged.map_or(1, |merged| merged.n_layers);
        let step = Step { name, id, parent: record.parent, n_layers, depth: record.depth };
        lock(&self.index).whole.insert(id, step);
        // Last: one that is being removed is never known for longer than its removal takes.
        if self.upper(id).is_dir() { Ok(step) } else { Err(failed(io::ErrorKind::NotFound.into())) }
    }
}

/// The first of the directories for layer `name` that is whole and fits; else what is wrong with the first that is not.
fn first_fitting(
    name: LayerId,
    among: impl IntoIterator<Item = LayerId>,
    look: impl Fn(LayerId) -> Result<Step, StackError>,
    fits: impl Fn(&Step) -> bool,
) -> Result<Step, StackError> {
    let mut first = None;
    for id in among {
        match look(id) {
            Ok(step) if fits(&step) => return Ok(step),
            Ok(_) => {}
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or(StackError { id: name, source: io::ErrorKind::NotFound.into() }))
}

fn walk(
    top: Option<LayerId>,
    until: Option<LayerId>,
    step: impl Fn(LayerId) -> Result<Step, StackError>,
) -> Result<Stack, StackError> {
    let (mut steps, mut next, mut depth) = (Vec::new(), top, None);
    while let Some(name) = next.filter(|name| Some(*name) != until) {
        let step = step(name)?;
        let is_in_place = depth.is_none_or(|depth| depth == step.depth + step.n_layers);
        if !is_in_place || (step.parent.is_none() && step.depth > 0) {
            let source = io::Error::new(io::ErrorKind::InvalidData, "its depth is that of another stack");
            return Err(StackError { id: step.id, source });
        }
        (next, depth) = (step.parent, Some(step.depth));
        steps.push(step);
    }
    Ok(Stack(steps))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deltafs::layer::RootLook;

    /// A chain of layers 1 to `n`, and a merged one for each of `runs`: from which to which.
    fn store(n: u64, runs: &[(u64, u64)]) -> (tempfile::TempDir, Layers) {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path()).unwrap();
        let sandbox = "a".parse().unwrap();
        let mut top = None;
        for _ in 0..n {
            let stack = layers.known_stack(top).unwrap();
            top = Some(layers.create(&stack, &sandbox, None, RootLook::first()).unwrap().record().id);
        }
        for (first, last) in runs {
            let (mut single, mut next) = (Vec::new(), Some(LayerId(*last)));
            while next.is_some_and(|next| next.0 >= *first) {
                let step = layers.look(next.unwrap(), next.unwrap()).unwrap();
                single.push(step);
                next = step.parent;
            }
            let draft = layers.draft(&single, &sandbox).unwrap();
            layers.publish(draft.finish().unwrap(), false).unwrap();
        }
        (dir, layers)
    }

    fn dirs(layers: &Layers, top: u64) -> Vec<u64> {
        layers.stack(Some(LayerId(top))).unwrap().0.iter().map(|step| step.id.0).collect()
    }

    #[test]
    fn a_stack_takes_the_longest_merged_layers_that_end_where_it_is() {
        let (dir, layers) = store(6, &[(1, 2), (3, 4), (1, 4)]);
        assert_eq!(dirs(&layers, 6), [6, 5, 9]);
        assert_eq!(dirs(&layers, 4), [9]);
        assert_eq!(dirs(&layers, 3), [3, 7]);
        assert_eq!(dirs(&layers, 1), [1]);
        assert_eq!(layers.stack(Some(LayerId(6))).unwrap().depth(), 6);
        // What a later engine finds.
        assert_eq!(dirs(&Layers::open(dir.path()).unwrap(), 6), [6, 5, 9]);
        // Single ones do not have to be there.
        for id in [4, 3, 2, 1] {
            layers.remove(LayerId(id)).unwrap();
        }
        assert_eq!(dirs(&layers, 6), [6, 5, 9]);
        layers.remove(LayerId(9)).unwrap();
        assert_eq!(dirs(&layers, 6), [6, 5, 8, 7]);
        layers.remove(LayerId(8)).unwrap();
        assert_eq!(layers.stack(Some(LayerId(6))).unwrap_err().id, LayerId(4));
        assert_eq!(layers.known_stack(Some(LayerId(6))).unwrap_err().id, LayerId(4));
    }

    #[test]
    fn a_damaged_merged_layer_is_passed_over_while_there_are_others() {
        let (_dir, layers) = store(4, &[(1, 4)]);
        std::fs::remove_dir_all(layers.upper(LayerId(5))).unwrap();
        assert_eq!(dirs(&layers, 4), [4, 3, 2, 1]);
        layers.remove(LayerId(4)).unwrap();
        assert_eq!(layers.stack(Some(LayerId(4))).unwrap_err().id, LayerId(5));
    }

    #[test]
    fn a_fork_is_found_within_what_was_merged() {
        let (_dir, layers) = store(8, &[(1, 4), (5, 8)]);
        let ids = |ids: &[u64]| ids.iter().copied().map(LayerId).collect::<Vec<_>>();
        let fork = |from, to| layers.fork(Some(LayerId(from)), Some(LayerId(to))).unwrap();
        let expected = Fork { from: ids(&[2]), to: ids(&[7, 6, 5, 4, 3, 2]), common: ids(&[1]) };
        assert_eq!(Fork { from: Vec::new(), ..fork(1, 7) }, Fork { from: Vec::new(), ..expected });
        assert_eq!(fork(4, 8), Fork { from: vec![], to: ids(&[10]), common: ids(&[9]) });
        assert_eq!(fork(8, 8), Fork { from: vec![], to: vec![], common: ids(&[10, 9]) });
        // Layers of one side are gone: more than needed is compared, never less.
        for id in [4, 3] {
            layers.remove(LayerId(id)).unwrap();
        }
        assert_eq!(fork(2, 6), Fork { from: ids(&[2, 1]), to: ids(&[6, 5, 9]), common: vec![] });
        assert_eq!(layers.fork(None, Some(LayerId(4))).unwrap().to, ids(&[9]));
    }
}
