//! Coming back to a moment.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;

use libc::pid_t;

use super::error::{MomentError, process};
use super::plan::{How, Live, Plan, plan};
use super::{Identity, Moment, Past, end};
use crate::deltacr::descriptors::Opened;
use crate::deltacr::shared::Present;
use crate::deltacr::state::{Person, StateError};
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::read_identity;
use crate::deltacr::template::{self, Files, Source, Tree, restore_by_fork, restore_in_place};
use crate::fault;
use crate::sandbox::root::Root;

/// The way back of stopped processes.
#[derive(Debug)]
pub struct Return<'a> {
    moment: &'a Moment,
    plan: Plan,
    opened: Opened<'a>,
    shared: Present<'a>,
    sources: Vec<Source>,
    /// What the processes are now, in the plan's order; those that are to be made are not.
    now: Vec<Option<Person>>,
    made: Vec<(Identity, Identity)>,
}

impl<'a> Return<'a> {
    /// Finds out what is to be done, and opens all that it takes: files on `to`.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn prepare(stopped: &mut Stopped, moment: &'a Moment, to: &Root, init: pid_t) -> Result<Self, MomentError> {
        if let Some(inside) = moment.lost_template() {
            return Err(MomentError::Lost { inside });
        }
        let mut live = Vec::with_capacity(stopped.processes().len());
        for one in stopped.processes() {
            live.push(Live { identity: read_identity(one.pid).map_err(process("identify", one.pid))? });
        }
        let past: Vec<Identity> = moment.processes.iter().map(|past| past.identity).collect();
        let plan = plan(&past, &live);
        if let Some((inside, what)) = plan.missing.first() {
            return Err(MomentError::Missing { inside: *inside, what });
        }
        let mut now = Vec::with_capacity(plan.back.len());
        for (identity, how) in &plan.back {
            let is = match how {
                How::InPlace => Some(Person::read(stopped, identity.host)?),
                How::Fork => None,
            };
            if let (Some(past), Some(is)) = (moment.past(identity.inside), &is) {
                check(stopped, past, is, identity.host)?;
            }
            now.push(is);
        }
        let open =
            |past: &Past| Source::of(&past.template).map_err(process("open the template of", past.identity.inside));
        let sources = moment.processes.iter().map(open).collect::<Result<_, _>>()?;
        let staying = staying(&plan);
        let shared = moment.shared.open(&staying).map_err(|source| MomentError::Shared { op: "find", source })?;
        let opened = moment.held.open(stopped, to, init, &shared)?;
        fault::point("moment.prepare").map_err(process("prepare the return of", 0))?;
        Ok(Self { moment, plan, opened, shared, sources, now, made: Vec::new() })
    }

    /// Host PIDs of the processes that stay.
    pub fn staying(&self) -> Vec<pid_t> {
        staying(&self.plan)
    }

    /// Who was made again: as it was, and as it is now.
    pub fn made(&self) -> &[(Identity, Identity)] {
        &self.made
    }

    /// Streams that led out of the sandbox to where nobody is any more: whose (PID inside), and the end to read from.
    pub fn take_streams(&mut self) -> Vec<(pid_t, OwnedFd)> {
        self.opened.take_streams()
    }

    /// What becomes of whom.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Ends who has to go. From here on no process outlives the engine.
    ///
    /// # Errors
    /// There is no way but on: some have ended.
    pub fn end(&self, stopped: &mut Stopped) -> Result<(), MomentError> {
        stopped.bind().map_err(process("bind", 0))?;
        end::end_all(stopped, &self.plan.ending)
    }

    /// Gives all processes what they had; `now` is the device of the root that they came from, `to` the root that they
    /// are on, `live` the cgroup of the processes.
    ///
    /// # Errors
    /// Some are neither what they were nor what they should be.
    pub fn restore(&mut self, stopped: &mut Stopped, now: u64, to: &Root, live: &Path) -> Result<(), MomentError> {
        self.shared.put_back().map_err(|source| MomentError::Shared { op: "put back", source })?;
        // First: limits may hinder the rest.
        for ((identity, _), now) in self.plan.back.iter().zip(&self.now) {
            let Some(now) = now else { continue };
            end::reap_children(stopped, identity.host, &[])?;
            if let Some((past, _)) = self.past(identity.inside)
                && past.threads.are_those_of(stopped, identity.host)?
            {
                past.person.put_back_from(now, stopped, identity.host)?;
            }
        }
        let mut hosts = BTreeMap::new();
        let tree = Tree { then: self.moment.tree, now, root: to };
        for at in 0..self.plan.back.len() {
            let host = self.put_memory(stopped, at, tree, live)?;
            hosts.insert(self.plan.back[at].0.inside, host);
        }
        self.opened.settle(|inside| hosts.get(&inside).copied())?;
        let mut tables = BTreeSet::new();
        for (inside, host) in &hosts {
            let with_table = self.opened.table(*inside).is_some_and(|table| tables.insert(table));
            self.opened.give(stopped, *host, *inside, with_table)?;
        }
        for (identity, how) in &self.plan.back {
            if let Some(host) = hosts.get(&identity.inside) {
                self.opened.finish(stopped, *host, identity.inside, *how == How::Fork)?;
            }
        }
        // Last: what happened so far may have made signals.
        for ((identity, _), now) in self.plan.back.iter().zip(&self.now) {
            if let (Some((past, _)), Some(now), Some(host)) =
                (self.past(identity.inside), now, hosts.get(&identity.inside))
            {
                past.person.signals.put_back_from(&now.signals, stopped, *host)?;
            }
        }
        self.opened.announce_windows();
        Ok(())
    }

    /// Gives a process its memory and its threads; where it has ended, makes it. Its host PID.
    fn put_memory(
        &mut self,
        stopped: &mut Stopped,
        at: usize,
        tree: Tree<'_>,
        live: &Path,
    ) -> Result<pid_t, MomentError> {
        let (identity, how) = self.plan.back[at];
        let missing = || MomentError::Missing { inside: identity.inside, what: "has no record" };
        let (past, source) = self.past(identity.inside).ok_or_else(missing)?;
        fault::point("moment.restore").map_err(process("restore", identity.host))?;
        let what = template::Past {
            memory: &past.memory,
            source,
            threads: &past.threads,
            files: Some(Files { tree, shared: &self.shared }),
        };
        let host = match how {
            How::InPlace => {
                let had_others = !past.threads.are_those_of(stopped, identity.host)?;
                restore_in_place(stopped, identity.host, &what)?;
                if !had_others {
                    return Ok(identity.host);
                }
                identity.host
            }
            How::Fork => restore_by_fork(stopped, &past.template, &what, live)?,
        };
        // Threads that were just made are not yet who they were.
        let now = Person::read(stopped, host)?;
        past.person.put_back_from(&now, stopped, host)?;
        if how == How::Fork {
            let made = read_identity(host).map_err(process("identify", host))?;
            self.made.push((identity, made));
        }
        self.now[at] = Some(now);
        Ok(host)
    }

    fn past(&self, inside: pid_t) -> Option<(&Past, &Source)> {
        self.moment.processes.iter().zip(&self.sources).find(|(past, _)| past.identity.inside == inside)
    }
}

impl Moment {
    fn past(&self, inside: pid_t) -> Option<&Past> {
        self.processes.iter().find(|past| past.identity.inside == inside)
    }
}

fn staying(plan: &Plan) -> Vec<pid_t> {
    plan.back.iter().filter(|(_, how)| *how == How::InPlace).map(|(identity, _)| identity.host).collect()
}

/// Whether a process that lives can be what it was. What only threads that have ended can tell is not known.
fn check(stopped: &Stopped, past: &Past, is: &Person, host: pid_t) -> Result<(), MomentError> {
    past.threads.check(stopped, host)?;
    if past.threads.are_those_of(stopped, host)? {
        past.person.can_be_put_back(is).map_err(StateError::from)?;
    }
    Ok(())
}
