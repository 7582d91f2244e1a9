//! Process groups and zombies: what processes are to each other.
//!
//! ```text
//! step out   whose group has the number of one who has to be made: into a group of its own, else the number is taken
//! zombies    those that lead a group are made first: the number is taken once others are in the group
//! groups     leaders, then members; where nobody leads or is in a group any more, a ghost does until somebody else is
//! zombies    all others; ghosts are reaped
//! ```
//! Where all groups are what they were and no zombie is missing nothing is done.

use std::collections::BTreeMap;

use libc::pid_t;

use super::end::reap;
use super::error::{MomentError, process};
use super::plan::Ended;
use super::{Identity, Moment, Zombie};
use crate::deltacr::handover::call;
use crate::deltacr::stop::Stopped;
use crate::deltacr::template::{End, Kin, make_zombie};
use crate::fault;

/// Those of a moment that are there.
#[derive(Debug)]
pub(super) struct Family<'a> {
    pub(super) moment: &'a Moment,
    /// Host PIDs by PID inside.
    pub(super) hosts: BTreeMap<pid_t, pid_t>,
    /// In which group each is, both inside.
    pub(super) groups: BTreeMap<pid_t, pid_t>,
    /// Host PIDs of zombies that need not be made.
    pub(super) kept: Vec<pid_t>,
}

impl Family<'_> {
    /// Has a process (PID inside) lead a group of its own.
    ///
    /// # Errors
    /// It is where it was.
    pub(super) fn step_out(&mut self, stopped: &mut Stopped, inside: pid_t) -> Result<(), MomentError> {
        let Some(host) = self.hosts.get(&inside) else { return Ok(()) };
        self.groups.insert(inside, inside);
        set_group(stopped, *host, 0)
    }

    /// What one that is to be made is at first: in its own group if it leads that, else in that of its maker (PID inside).
    pub(super) fn newborn(&self, identity: &Identity, maker: pid_t) -> Kin {
        let kin = identity.kin();
        let leads = kin.group == kin.pid || kin.session == kin.pid;
        let group = if leads { kin.pid } else { *self.groups.get(&maker).unwrap_or(&kin.group) };
        Kin { group, ..kin }
    }

    /// Takes in one that was made.
    pub(super) fn add(&mut self, identity: &Identity) {
        self.hosts.insert(identity.inside, identity.host);
        self.groups.insert(identity.inside, identity.group);
    }

    /// Makes it whole when all are there: groups, zombies. Which zombies were made: as they were and as they are.
    ///
    /// # Errors
    /// It is neither what it was nor what it should be.
    pub(super) fn reunite(&mut self, stopped: &mut Stopped) -> Result<Vec<(Identity, Identity)>, MomentError> {
        let is_missing = |zombie: &&Zombie| !self.kept.contains(&zombie.identity.host);
        let missing: Vec<&Zombie> = self.moment.zombies.iter().filter(is_missing).collect();
        let (leaders, others): (Vec<_>, Vec<_>) =
            missing.into_iter().partition(|zombie| zombie.identity.group == zombie.identity.inside);
        let mut made = Vec::new();
        for zombie in leaders {
            made.push(self.make(stopped, zombie)?);
        }
        fault::point("family.groups").map_err(process("bring together the family of", 0))?;
        let ghosts = self.regroup(stopped)?;
        fault::point("family.zombies").map_err(process("bring together the family of", 0))?;
        for zombie in others {
            made.push(self.make(stopped, zombie)?);
        }
        for (parent, ghost) in ghosts {
            reap(stopped, parent, &[ghost])?;
        }
        Ok(made)
    }

    fn make(&self, stopped: &mut Stopped, zombie: &Zombie) -> Result<(Identity, Identity), MomentError> {
        let Zombie { identity, end } = zombie;
        let why = MomentError::Missing { inside: identity.inside, what: "has no parent that could make it a zombie" };
        let parent = *self.hosts.get(&identity.parent).ok_or(why)?;
        let host = make_zombie(stopped, parent, &identity.kin(), *end)?;
        Ok((*identity, Identity::read(host).map_err(process("identify", host))?))
    }

    /// Puts all into their groups; the ghosts that it took: host PID of the parent, PID inside.
    fn regroup(&mut self, stopped: &mut Stopped) -> Result<Vec<(pid_t, pid_t)>, MomentError> {
        let mut ghosts = Vec::new();
        let wanted = self.moment.processes.iter().map(|past| past.identity);
        let (leaders, members): (Vec<_>, Vec<_>) = wanted.partition(|one| one.group == one.inside);
        for one in leaders.iter().chain(&members) {
            let (Some(host), Some(group)) = (self.hosts.get(&one.inside), self.groups.get(&one.inside)) else {
                continue;
            };
            if *group == one.group {
                continue;
            }
            if one.group != one.inside && !self.has_group(one.group) {
                let ghost = Kin { pid: one.group, session: one.session, group: one.group, exit_signal: 0 };
                make_zombie(stopped, *host, &ghost, End::Exited(0))?;
                ghosts.push((*host, one.group));
            }
            set_group(stopped, *host, one.group)?;
            self.groups.insert(one.inside, one.group);
        }
        Ok(ghosts)
    }

    fn has_group(&self, group: pid_t) -> bool {
        let zombies = self.moment.zombies.iter().map(|zombie| zombie.identity);
        self.groups.values().any(|other| *other == group)
            || zombies.into_iter().any(|zombie| (zombie.inside, zombie.group) == (group, group))
    }
}

/// Which of the zombies of a moment are so still.
pub(super) fn look_at_zombies(moment: &Moment) -> Vec<Ended> {
    let look = |zombie: &Zombie| {
        let was = zombie.identity;
        let is = Identity::read(was.host).ok().filter(|is| is.is(&was) && is.parent == was.parent);
        let is_there = is.is_some() && matches!(End::read(was.host), Ok(Some(end)) if end == zombie.end);
        Ended { identity: was, is_there }
    };
    moment.zombies.iter().map(look).collect()
}

/// 0: its own.
fn set_group(stopped: &mut Stopped, host: pid_t, group: pid_t) -> Result<(), MomentError> {
    let mut hand = stopped.hand(host)?;
    let result = hand.call(libc::SYS_setpgid, call(0, &[0, i64::from(group).cast_unsigned()]).args)?;
    hand.close()?;
    match i32::try_from(-result) {
        Ok(errno) if errno > 0 => {
            Err(process("set the process group of", host)(std::io::Error::from_raw_os_error(errno)))
        }
        _ => Ok(()),
    }
}
