//! Coming back to a moment.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;

use libc::pid_t;

use super::error::{MomentError, process};
use super::family::{Family, look_at_zombies};
use super::plan::{Ended, How, Live, Plan, plan};
use super::{Identity, Moment, Past, end};
use crate::deltacr::descriptors::Opened;
use crate::deltacr::shared::Present;
use crate::deltacr::state::{Person, StateError, n_filters};
use crate::deltacr::stop::Stopped;
use crate::deltacr::template::{
    self, Files, First, Source, Tree, check_fork, check_rebuild, plan_in_place, rebuild, rebuild_orphan,
    restore_as_planned, restore_by_fork,
};
use crate::fault;
use crate::sandbox::root::Root;
use crate::sys::process::set_soft_limit;

/// The way back of stopped processes.
#[derive(Debug)]
pub struct Return<'a> {
    moment: &'a Moment,
    plan: Plan,
    opened: Opened<'a>,
    shared: Present<'a>,
    sources: Vec<Source>,
    /// What is to be done first to the memory of those that stay, in the plan's order.
    firsts: Vec<Option<First>>,
    /// What the processes are now, in the plan's order; those that are to be made are not.
    now: Vec<Option<Person>>,
    /// Host PIDs of those that are so still.
    zombies: Vec<pid_t>,
    /// Whom job control had stopped since.
    continued: Vec<Identity>,
    made: Vec<(Identity, Identity)>,
}

impl<'a> Return<'a> {
    /// Finds out what is to be done, and opens all that it takes; the processes come from root `from` and go to `to`.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn prepare(
        stopped: &mut Stopped,
        moment: &'a Moment,
        (from, to): (&Root, &Root),
        init: pid_t,
    ) -> Result<Self, MomentError> {
        if let Some(inside) = moment.lost_template() {
            return Err(MomentError::Lost { inside });
        }
        let (live, mut persons) = look_at_all(stopped, moment)?;
        let zombies = look_at_zombies(moment);
        let past: Vec<Identity> = moment.processes.iter().map(|past| past.identity).collect();
        let plan = plan(&past, &zombies, &live.iter().map(|(live, _)| *live).collect::<Vec<_>>());
        if let Some((inside, what)) = plan.missing.first() {
            return Err(MomentError::Missing { inside: *inside, what });
        }
        check_makers(moment, &plan, &zombies, init).map_err(|error| {
            // Why it is to be made at all says more.
            live.into_iter().find_map(|(_, why)| why).unwrap_or(error)
        })?;
        let now = plan.back.iter().map(|(identity, how)| match how {
            How::InPlace => persons.remove(&identity.host),
            _ => None,
        });
        let now = now.collect();
        let in_place = |inside: pid_t| plan.back.iter().any(|(is, how)| is.inside == inside && *how == How::InPlace);
        let is_kept = |zombie: &&Ended| zombie.is_there && in_place(zombie.identity.parent);
        let zombies = zombies.iter().filter(is_kept).map(|zombie| zombie.identity.host).collect();
        let open =
            |past: &Past| Source::of(&past.template).map_err(process("open the template of", past.identity.inside));
        let sources = moment.processes.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let staying = staying(&plan);
        let shared = moment.shared.open(&staying, to).map_err(|source| MomentError::Shared { op: "make", source })?;
        let tree = Tree { then: moment.tree, now: from.dev(), root: to };
        let firsts = look_ahead(stopped, moment, &plan, (&sources, Files { tree, shared: &shared }))?;
        let opened = moment.held.open(stopped, to, init, &shared)?;
        fault::point("moment.prepare").map_err(process("prepare the return of", 0))?;
        let (continued, made) = Default::default();
        Ok(Self { moment, plan, opened, shared, sources, firsts, now, zombies, continued, made })
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

    /// Ends all that are there, and finds out how to make everyone: where it did not work with those who lived, they are
    /// made anew. What was opened is of use again.
    ///
    /// # Errors
    /// There is no way to that. Nobody is left, or some are half of what they should be.
    pub fn begin_anew(
        &mut self,
        stopped: &mut Stopped,
        (from, to): (&Root, &Root),
        init: pid_t,
    ) -> Result<(), MomentError> {
        let mut ending = Vec::with_capacity(stopped.processes().len());
        for one in stopped.processes() {
            // One that has ended meanwhile needs no end.
            ending.extend(Identity::read(one.pid).ok());
        }
        ending.sort_by_key(|is| std::cmp::Reverse((is.start, is.host)));
        end::end_all(stopped, &ending)?;
        let zombies = self.moment.zombies.iter();
        let zombies: Vec<Ended> = zombies.map(|zombie| Ended { identity: zombie.identity, is_there: false }).collect();
        let past: Vec<Identity> = self.moment.processes.iter().map(|past| past.identity).collect();
        self.plan = plan(&past, &zombies, &[]);
        if let Some((inside, what)) = self.plan.missing.first() {
            return Err(MomentError::Missing { inside: *inside, what });
        }
        check_makers(self.moment, &self.plan, &zombies, init)?;
        let tree = Tree { then: self.moment.tree, now: from.dev(), root: to };
        let files = Files { tree, shared: &self.shared };
        self.firsts = look_ahead(stopped, self.moment, &self.plan, (&self.sources, files))?;
        self.now = self.plan.back.iter().map(|_| None).collect();
        (self.zombies, self.continued, self.made) = Default::default();
        Ok(())
    }

    /// Gives all processes what they had; `now` is the device of the root that they came from, `to` the root that they
    /// are on, `live` the cgroup of the processes.
    ///
    /// # Errors
    /// Some are neither what they were nor what they should be.
    pub fn restore(&mut self, stopped: &mut Stopped, now: u64, to: &Root, live: &Path) -> Result<(), MomentError> {
        self.shared.put_back().map_err(|source| MomentError::Shared { op: "put back", source })?;
        // First: limits may hinder the rest.
        let mut lifted = Lifted::default();
        let bereft: BTreeSet<pid_t> = self.plan.ending.iter().map(|ended| ended.parent).collect();
        for ((identity, _), now) in self.plan.back.iter().zip(&self.now) {
            let Some(now) = now else { continue };
            if stopped.is_job_stopped(identity.host)
                && self.past(identity.inside).is_some_and(|(past, _)| !past.is_stopped)
            {
                stopped.continue_job(identity.host);
                self.continued.push(*identity);
            }
            if now.has_ended_children() || bereft.contains(&identity.inside) {
                end::reap_children(stopped, identity.host, &self.zombies)?;
            }
            if let Some((past, _)) = self.past(identity.inside)
                && past.threads.are_those_of(stopped, identity.host)?
            {
                past.person.put_back_from(now, stopped, identity.host)?;
            }
            lifted.lift(identity.host)?;
        }
        let in_place = self.plan.back.iter().filter(|(_, how)| *how == How::InPlace);
        let mut family = Family {
            moment: self.moment,
            hosts: in_place.clone().map(|(is, _)| (is.inside, is.host)).collect(),
            groups: in_place.map(|(is, _)| (is.inside, is.group)).collect(),
            kept: self.zombies.clone(),
        };
        for inside in &self.plan.stepping_out {
            family.step_out(stopped, *inside)?;
        }
        let tree = Tree { then: self.moment.tree, now, root: to };
        for at in 0..self.plan.back.len() {
            self.put_memory(stopped, at, tree, live, (&mut family, &mut lifted))?;
        }
        self.made.extend(family.reunite(stopped)?);
        let hosts = family.hosts;
        self.opened.settle(|inside| hosts.get(&inside).copied())?;
        self.opened.make_late_sockets(stopped, |inside| hosts.get(&inside).copied(), to)?;
        let mut tables = BTreeSet::new();
        for (inside, host) in &hosts {
            let with_table = self.opened.table(*inside).is_some_and(|table| tables.insert(table));
            self.opened.give(stopped, *host, *inside, with_table)?;
        }
        for (identity, how) in &self.plan.back {
            if let Some(host) = hosts.get(&identity.inside) {
                self.opened.finish(stopped, *host, identity.inside, *how != How::InPlace)?;
            }
        }
        for child in &self.continued {
            if let Some(parent) = hosts.get(&child.parent) {
                end::forget_continued(stopped, *parent, child.inside)?;
            }
        }
        hosts.values().try_for_each(|host| lifted.lower(*host))?;
        self.shared.seal().map_err(|source| MomentError::Shared { op: "seal", source })?;
        // Last: what happened so far may have made signals. Children first: they may make some for their parents.
        for ((identity, _), now) in self.plan.back.iter().zip(&self.now).rev() {
            if let (Some((past, _)), Some(now), Some(host)) =
                (self.past(identity.inside), now, hosts.get(&identity.inside))
            {
                past.person.signals.put_back_from(&now.signals, stopped, *host)?;
                if past.is_stopped && !stopped.is_job_stopped(*host) {
                    stopped.stop_job(*host);
                }
            }
        }
        self.opened.announce_windows();
        Ok(())
    }

    /// Gives a process its memory and its threads; where it is not there, makes it.
    fn put_memory(
        &mut self,
        stopped: &mut Stopped,
        at: usize,
        tree: Tree<'_>,
        live: &Path,
        (family, lifted): (&mut Family<'_>, &mut Lifted),
    ) -> Result<(), MomentError> {
        let (identity, how) = self.plan.back[at];
        let inside = identity.inside;
        let missing = |what| move || MomentError::Missing { inside, what };
        let first = self.firsts.get_mut(at).and_then(Option::take);
        let (past, source) = self.past(inside).ok_or_else(missing("has no record"))?;
        fault::point("moment.restore").map_err(process("restore", identity.host))?;
        let what = past.what(source, Files { tree, shared: &self.shared });
        let (host, is_done) = match how {
            How::InPlace => {
                let is_done = past.threads.are_those_of(stopped, identity.host)?;
                restore_as_planned(stopped, identity.host, &what, first)?;
                (identity.host, is_done)
            }
            How::Fork | How::Orphan(None) => {
                (restore_by_fork(stopped, &past.template, &what, Some(identity.session), live)?, false)
            }
            How::Rebuild => {
                let parent = *family.hosts.get(&identity.parent).ok_or_else(missing("has no parent"))?;
                let above = self.moment.past(identity.parent).map(|above| &above.memory);
                let made = rebuild(stopped, parent, above, &family.newborn(&identity, identity.parent), &what)?;
                lifted.inherited(made, parent);
                (made, false)
            }
            How::Orphan(Some(member)) => {
                let maker = *family.hosts.get(&member).ok_or_else(missing("has nobody in its session"))?;
                let above = self.moment.past(member).map(|above| &above.memory);
                let made = rebuild_orphan(stopped, maker, above, &family.newborn(&identity, member), &what)?;
                lifted.inherited(made, maker);
                (made, false)
            }
        };
        if is_done {
            return Ok(());
        }
        // Threads that were just made are not yet who they were.
        lifted.lower(host)?;
        let now = Person::read(stopped, host)?;
        past.person.put_back_from(&now, stopped, host)?;
        self.now[at] = Some(now);
        lifted.lift(host)?;
        if how != How::InPlace {
            let made = Identity::read(host).map_err(process("identify", host))?;
            if (made.inside, made.parent, made.session) != (inside, identity.parent, identity.session) {
                return Err(missing("has come to be in another family")());
            }
            family.add(&made);
            self.made.push((identity, made));
        }
        Ok(())
    }

    fn past(&self, inside: pid_t) -> Option<(&Past, &Source)> {
        self.moment.processes.iter().zip(&self.sources).find(|(past, _)| past.identity.inside == inside)
    }
}

impl Past {
    fn what<'a>(&'a self, source: &'a Source, files: Files<'a>) -> template::Past<'a> {
        template::Past { memory: &self.memory, source, threads: &self.threads, files: Some(files) }
    }
}

impl Moment {
    fn past(&self, inside: pid_t) -> Option<&Past> {
        self.processes.iter().find(|past| past.identity.inside == inside)
    }
}

/// Soft limits on descriptors that were lifted, by host PID: handing over takes some, and those that were open when the limit
/// was lowered lie beyond it. These processes are bound to the engine, and die with it.
#[derive(Debug, Default)]
struct Lifted(BTreeMap<pid_t, u64>);

impl Lifted {
    fn lift(&mut self, host: pid_t) -> Result<(), MomentError> {
        let soft = set_soft_limit(host, libc::RLIMIT_NOFILE, u64::MAX).map_err(process("lift the limits of", host))?;
        self.0.insert(host, soft);
        Ok(())
    }

    /// A child has the lifted limit of its maker.
    fn inherited(&mut self, child: pid_t, maker: pid_t) {
        if let Some(soft) = self.0.get(&maker) {
            self.0.insert(child, *soft);
        }
    }

    fn lower(&mut self, host: pid_t) -> Result<(), MomentError> {
        let Some(soft) = self.0.remove(&host) else { return Ok(()) };
        set_soft_limit(host, libc::RLIMIT_NOFILE, soft).map(drop).map_err(process("put back the limits of", host))
    }
}

fn staying(plan: &Plan) -> Vec<pid_t> {
    plan.back.iter().filter(|(_, how)| *how == How::InPlace).map(|(identity, _)| identity.host).collect()
}

/// What is to be done first to the memory of those that stay; fails if somebody cannot be given what he had.
fn look_ahead(
    stopped: &mut Stopped,
    moment: &Moment,
    plan: &Plan,
    (sources, files): (&[Source], Files<'_>),
) -> Result<Vec<Option<First>>, MomentError> {
    let mut firsts = Vec::with_capacity(plan.back.len());
    for (identity, how) in &plan.back {
        let found = moment.processes.iter().zip(sources).find(|(past, _)| past.identity.inside == identity.inside);
        let Some((past, source)) = found else { continue };
        let what = past.what(source, files);
        firsts.push(match how {
            How::InPlace => Some(plan_in_place(stopped, identity.host, &what)?),
            How::Fork | How::Orphan(None) => check_fork(&past.template, &what).map(|()| None)?,
            How::Rebuild | How::Orphan(Some(_)) => check_rebuild(&what).map(|()| None)?,
        });
    }
    Ok(firsts)
}

type Found = (Vec<(Live, Option<MomentError>)>, BTreeMap<pid_t, Person>);

/// Who lives; why some cannot stay; what those are who can, by host PID.
fn look_at_all(stopped: &mut Stopped, moment: &Moment) -> Result<Found, MomentError> {
    let hosts: Vec<pid_t> = stopped.processes().iter().map(|process| process.pid).collect();
    let (mut live, mut persons) = (Vec::with_capacity(hosts.len()), BTreeMap::new());
    for host in hosts {
        let identity = Identity::read(host).map_err(process("identify", host))?;
        let mut why = None;
        if let Some(past) = moment.processes.iter().find(|past| past.identity.is(&identity)) {
            let person = Person::read(stopped, host)?;
            match check(stopped, past, &person, host) {
                Err(error) if error.is_refusal() => why = Some(error),
                Err(error) => return Err(error),
                Ok(()) => {
                    persons.insert(host, person);
                }
            }
        }
        live.push((Live { identity, can_stay: why.is_none() }, why));
    }
    Ok((live, persons))
}

/// Whether a process that lives can be what it was. What only threads that have ended can tell is not known.
fn check(stopped: &Stopped, past: &Past, is: &Person, host: pid_t) -> Result<(), MomentError> {
    if !past.memory.is_of(host).map_err(process("read the state of", host))? {
        return Err(MomentError::Missing { inside: past.identity.inside, what: "runs another program now" });
    }
    past.threads.check(stopped, host)?;
    if past.threads.are_those_of(stopped, host)? {
        past.person.can_be_put_back(is).map_err(StateError::from)?;
    }
    Ok(())
}

/// Fails unless those who make others may do so, and can give them what they had.
fn check_makers(moment: &Moment, plan: &Plan, zombies: &[Ended], init: pid_t) -> Result<(), MomentError> {
    let person = |inside: pid_t| moment.past(inside).map(|past| &past.person);
    let may = |inside: pid_t, maker: pid_t| match person(maker) {
        Some(maker) if maker.chooses_numbers() => Ok(maker),
        _ => Err(MomentError::Missing { inside, what: "would be made by one without CAP_CHECKPOINT_RESTORE" }),
    };
    for (Identity { inside, parent, .. }, how) in &plan.back {
        let maker = match how {
            How::InPlace => continue,
            How::Fork | How::Orphan(None) => *inside,
            How::Rebuild => *parent,
            How::Orphan(Some(member)) => *member,
        };
        let maker = may(*inside, maker)?;
        if moment.held.shares_table(*inside) {
            return Err(MomentError::Missing { inside: *inside, what: "shares its descriptors with another process" });
        }
        if let (How::Rebuild | How::Orphan(Some(_)), Some(person)) = (how, person(*inside)) {
            person.can_be_made_by(maker, n_filters(init)?).map_err(StateError::from)?;
        }
    }
    for zombie in zombies.iter().filter(|zombie| !zombie.is_there) {
        may(zombie.identity.inside, zombie.identity.parent)?;
    }
    Ok(())
}
