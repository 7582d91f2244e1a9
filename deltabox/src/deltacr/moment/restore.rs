//! Coming back to a moment.

use std::collections::{BTreeMap, BTreeSet};

use libc::pid_t;

use super::error::{MomentError, process};
use super::plan::{How, Live, Plan, plan};
use super::{Identity, Moment, Past, end};
use crate::deltacr::descriptors::Opened;
use crate::deltacr::shared::Present;
use crate::deltacr::state::{Person, StateError};
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::read_identity;
use crate::deltacr::template::{self, Files, Source, Tree, restore_in_place};
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
    /// What the processes that stay are now, in the plan's order.
    now: Vec<Person>,
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
        for (identity, How::InPlace) in &plan.back {
            let is = Person::read(stopped, identity.host)?;
            if let Some(past) = moment.past(identity.inside) {
                past.threads.check(stopped, identity.host)?;
                past.person.can_be_put_back(&is).map_err(StateError::from)?;
            }
            now.push(is);
        }
        let open =
            |past: &Past| Source::of(&past.template).map_err(process("open the template of", past.identity.inside));
        let sources = moment.processes.iter().map(open).collect::<Result<_, _>>()?;
        let staying: Vec<pid_t> = plan.back.iter().map(|(identity, How::InPlace)| identity.host).collect();
        let shared = moment.shared.open(&staying).map_err(|source| MomentError::Shared { op: "find", source })?;
        let opened = moment.held.open(stopped, to, init, &shared)?;
        fault::point("moment.prepare").map_err(process("prepare the return of", 0))?;
        Ok(Self { moment, plan, opened, shared, sources, now })
    }

    /// Host PIDs of the processes that stay.
    pub fn staying(&self) -> Vec<pid_t> {
        self.plan.back.iter().map(|(identity, How::InPlace)| identity.host).collect()
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

    /// Gives all processes what they had; `now` is the root that they came from, `to` the one that they are on.
    ///
    /// # Errors
    /// Some are neither what they were nor what they should be.
    pub fn restore(&mut self, stopped: &mut Stopped, now: u64, to: &Root) -> Result<(), MomentError> {
        self.shared.put_back().map_err(|source| MomentError::Shared { op: "put back", source })?;
        let hosts: BTreeMap<pid_t, pid_t> =
            self.plan.back.iter().map(|(identity, How::InPlace)| (identity.inside, identity.host)).collect();
        self.opened.settle(|inside| hosts.get(&inside).copied())?;
        // First: limits may hinder the rest.
        for ((identity, How::InPlace), now) in self.plan.back.iter().zip(&self.now) {
            end::reap_children(stopped, identity.host, &[])?;
            if let Some((past, _)) = self.past(identity.inside) {
                past.person.put_back_from(now, stopped, identity.host)?;
            }
        }
        let mut tables = BTreeSet::new();
        for (identity, How::InPlace) in &self.plan.back {
            let Some((past, source)) = self.past(identity.inside) else { continue };
            fault::point("moment.restore").map_err(process("restore", identity.host))?;
            let tree = Tree { then: self.moment.tree, now, root: to };
            let what = template::Past {
                memory: &past.memory,
                source,
                threads: &past.threads,
                advice_is_unchanged: false,
                files: Some(Files { tree, shared: &self.shared }),
            };
            restore_in_place(stopped, identity.host, &what)?;
            let with_table = self.opened.table(identity.inside).is_some_and(|table| tables.insert(table));
            self.opened.give(stopped, identity.host, identity.inside, with_table)?;
        }
        for (identity, How::InPlace) in &self.plan.back {
            self.opened.finish(stopped, identity.host, identity.inside)?;
        }
        // Last: what happened so far may have made signals.
        for ((identity, How::InPlace), now) in self.plan.back.iter().zip(&self.now) {
            if let Some((past, _)) = self.past(identity.inside) {
                past.person.signals.put_back_from(&now.signals, stopped, identity.host)?;
            }
        }
        self.opened.announce_windows();
        Ok(())
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
