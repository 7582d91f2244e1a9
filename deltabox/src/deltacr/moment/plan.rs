//! Who comes back how. Pure.
//!
//! ```text
//! in place   lives, in its session, under its parent, and can become what it was
//! fork       has to be made; was a child of init that led its session
//! rebuild    has to be made; its parent makes it, in a session of its own or the parent's
//! orphan     has to be made; its parent was init, its session another's: a member of that makes it and gives it away
//! ```
//! Whoever has to be made takes along who depends on it: a child loses its parent, and the number of a session is free
//! only when nobody is in it. Of a process group it is enough to step out for a while.

use std::collections::BTreeSet;

use libc::pid_t;

use super::Identity;

/// A process that lives now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Which.
    pub identity: Identity,
    /// Whether it can become what it was, as far as it is one of the moment's.
    pub can_stay: bool,
}

/// One that had ended, for whose status its parent had not yet asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// As it was.
    pub identity: Identity,
    /// Whether it is so still.
    pub is_there: bool,
}

/// A way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It lives: what has changed in it is put back.
    InPlace,
    /// It is made: its template makes it again, a child of init that leads its session.
    Fork,
    /// It is made: by its parent.
    Rebuild,
    /// It is made: by this member (PID inside) of its session, for init; if there is none, by its template, through a
    /// leader of that session which ends at once.
    Orphan(Option<pid_t>),
}

impl How {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::InPlace => "in place",
            Self::Fork | Self::Orphan(None) => "fork",
            Self::Rebuild | Self::Orphan(Some(_)) => "rebuild",
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Who comes back and how, as it is now, or as it was if it has to be made: who makes somebody before whom it makes.
    pub back: Vec<(Identity, How)>,
    /// Who has to go, children before parents.
    pub ending: Vec<Identity>,
    /// Who stays and is in a process group (PID inside) whose number has to be free meanwhile.
    pub stepping_out: Vec<pid_t>,
    /// Who cannot come back, by PID inside, and why.
    pub missing: Vec<(pid_t, &'static str)>,
}

/// PID inside of the sandbox's init.
pub(super) const INIT: pid_t = 1;

/// From the processes of a moment, parents first, its zombies, and those that live.
pub(super) fn plan(past: &[Identity], zombies: &[Ended], live: &[Live]) -> Plan {
    let made = who_is_made(past, live);
    let mut plan = Plan::default();
    let now = |was: &Identity| live.iter().map(|live| live.identity).find(|is| is.is(was));
    let mut waiting: Vec<&Identity> = past.iter().collect();
    while !waiting.is_empty() {
        let is_back = |inside: pid_t| plan.back.iter().any(|(back, _)| back.inside == inside);
        let is_ready = |was: &&&Identity| {
            let has_maker = |how| match how {
                // Rather a member of the session than nobody.
                How::Orphan(_) => past.iter().any(|one| is_back(one.inside) && one.session == was.session),
                _ => true,
            };
            (was.parent == INIT || is_back(was.parent) || !past.iter().any(|one| one.inside == was.parent))
                && (!made.contains(&was.inside) || has_maker(way_of(was, past)))
        };
        // Nobody is ready: an orphan whose session has nobody else, or such whose session comes later.
        let at = waiting.iter().position(|was| is_ready(&was)).unwrap_or(0);
        let was = waiting.remove(at);
        let mut how = if made.contains(&was.inside) { way_of(was, past) } else { How::InPlace };
        if let How::Orphan(maker) = &mut how {
            let member = |one: &&Identity| is_back(one.inside) && one.session == was.session;
            let leader = past.iter().filter(member).find(|one| one.leads_session());
            *maker = leader.or_else(|| past.iter().find(member)).map(|one| one.inside);
        }
        if let Some(why) = why_not(was, how, zombies) {
            plan.missing.push((was.inside, why));
        }
        plan.back.push((now(was).filter(|_| how == How::InPlace).unwrap_or(*was), how));
    }
    let stays = |is: &Identity| plan.back.iter().any(|(back, how)| back.is(is) && *how == How::InPlace);
    let mut ending: Vec<Identity> = live.iter().map(|live| live.identity).filter(|is| !stays(is)).collect();
    // A child has a parent that was there before it, or one that adopted it: whoever is younger goes first.
    ending.sort_by_key(|is| std::cmp::Reverse((is.start, is.host)));
    plan.ending = ending;
    let numbers: BTreeSet<pid_t> =
        made.into_iter().chain(zombies.iter().map(|zombie| zombie.identity.inside)).collect();
    let in_the_way = |(is, how): &&(Identity, How)| *how == How::InPlace && numbers.contains(&is.group);
    plan.stepping_out = plan.back.iter().filter(in_the_way).map(|(is, _)| is.inside).collect();
    plan
}

/// PIDs inside of those that cannot stay.
fn who_is_made(past: &[Identity], live: &[Live]) -> BTreeSet<pid_t> {
    let same = |was: &Identity| live.iter().find(|live| live.identity.is(was));
    let cannot_stay = |was: &&Identity| {
        same(was).is_none_or(|Live { identity, can_stay }| {
            !can_stay || (identity.parent, identity.session) != (was.parent, was.session)
        })
    };
    let mut made: BTreeSet<pid_t> = past.iter().filter(cannot_stay).map(|was| was.inside).collect();
    loop {
        let depends = |was: &&Identity| {
            !made.contains(&was.inside) && (made.contains(&was.parent) || made.contains(&was.session))
        };
        let more: Vec<pid_t> = past.iter().filter(depends).map(|was| was.inside).collect();
        if more.is_empty() {
            return made;
        }
        made.extend(more);
    }
}

/// How one comes back that has to be made; an orphan's maker is not known yet.
fn way_of(was: &Identity, past: &[Identity]) -> How {
    let parent = past.iter().find(|one| one.inside == was.parent);
    match parent {
        Some(parent) if was.leads_session() || was.session == parent.session => How::Rebuild,
        None if was.leads_session() => How::Fork,
        _ => How::Orphan(None),
    }
}

fn why_not(was: &Identity, how: How, zombies: &[Ended]) -> Option<&'static str> {
    let leader = zombies.iter().find(|zombie| zombie.identity.inside == was.session);
    match how {
        How::Orphan(_) if was.parent != INIT => Some("was adopted by a process other than init"),
        // It would have to be alive once more to have a session.
        How::Orphan(None) if leader.is_some() => Some("was in the session of one for which its parent had not waited"),
        // The number of the session is in use.
        How::InPlace if leader.is_some_and(|leader| !leader.is_there) => {
            Some("was in the session of one for which its parent has waited since")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(identities: &[Identity]) -> Vec<Live> {
        identities.iter().map(|identity| Live { identity: *identity, can_stay: true }).collect()
    }

    fn one(inside: pid_t, parent: pid_t, start: u64) -> Identity {
        Identity::of(inside, parent, start)
    }

    /// Who comes back how, by PID inside.
    fn ways(plan: &Plan) -> Vec<(pid_t, How)> {
        plan.back.iter().map(|(identity, how)| (identity.inside, *how)).collect()
    }

    #[test]
    fn who_lives_comes_back_in_place_and_who_is_new_ends_the_youngest_first() {
        let past = [one(2, 1, 10), one(3, 2, 11)];
        let now = [one(2, 1, 10), one(3, 2, 11), one(4, 3, 20), one(5, 4, 30)];
        let plan = plan(&past, &[], &live(&now));
        assert_eq!(plan.back, [(past[0], How::InPlace), (past[1], How::InPlace)]);
        assert_eq!(plan.ending, [now[3], now[2]]);
        assert_eq!((plan.missing, plan.stepping_out), (vec![], vec![]));
    }

    #[test]
    fn a_number_that_was_given_again_is_another_process() {
        let past = [one(2, 1, 10)];
        let again = one(2, 1, 99);
        let plan = plan(&past, &[], &live(&[again]));
        assert_eq!((ways(&plan), plan.ending), (vec![(2, How::Fork)], vec![again]));
    }

    #[test]
    fn a_command_that_has_ended_is_made_again_with_its_family() {
        // Its child has become an orphan, its grandchild lives on under that.
        let past = [one(2, 1, 10), one(3, 2, 11), Identity { session: 2, ..one(4, 3, 12) }];
        let now = [Identity { parent: 1, ..past[1] }, past[2]];
        let plan = plan(&past, &[], &live(&now));
        assert_eq!(ways(&plan), [(2, How::Fork), (3, How::Rebuild), (4, How::Rebuild)]);
        assert_eq!(plan.back[1].0, past[1], "as it was");
        assert_eq!(plan.ending, [now[1], now[0]]);
    }

    #[test]
    fn one_that_cannot_stay_is_made_again_and_its_children_with_it() {
        let past = [one(2, 1, 10), one(3, 2, 11), one(5, 1, 12)];
        let mut now = live(&past);
        now[0].can_stay = false;
        let plan = plan(&past, &[], &now);
        assert_eq!(ways(&plan), [(2, How::Fork), (3, How::Rebuild), (5, How::InPlace)]);
    }

    #[test]
    fn one_that_has_begun_a_session_since_is_made_again() {
        let past = [one(2, 1, 10), one(3, 2, 11)];
        let now = [past[0], Identity { session: 3, group: 3, ..past[1] }];
        assert_eq!(ways(&plan(&past, &[], &live(&now))), [(2, How::InPlace), (3, How::Rebuild)]);
    }

    #[test]
    fn the_number_of_a_session_is_free_only_when_nobody_is_in_it() {
        // 4 was left behind by a child of 2: init's, in the session of 2. And 2 has ended.
        let orphan = Identity { session: 2, group: 2, ..one(4, 1, 12) };
        let past = [orphan, one(2, 1, 10)];
        let plan = plan(&past, &[], &live(&[orphan]));
        assert_eq!(ways(&plan), [(2, How::Fork), (4, How::Orphan(Some(2)))], "its session's leader first");
        assert_eq!(plan.ending, [orphan]);
    }

    #[test]
    fn orphans_are_made_by_their_session_or_begin_it() {
        let orphans = [4, 5].map(|inside| Identity { session: 3, group: 3, ..one(inside, 1, 12) });
        let gone = plan(&orphans, &[], &[]);
        assert_eq!(ways(&gone), [(4, How::Orphan(None)), (5, How::Orphan(Some(4)))]);
        let half = plan(&orphans, &[], &live(&orphans[1..]));
        assert_eq!(ways(&half), [(5, How::InPlace), (4, How::Orphan(Some(5)))]);
        let zombie = |is_there| Ended { identity: Identity { session: 3, ..one(3, 2, 9) }, is_there };
        for (is_there, alive, missing) in [(true, 1, vec![]), (false, 1, vec![5]), (false, 0, vec![4])] {
            let plan = plan(&orphans, &[zombie(is_there)], &live(&orphans[2 - alive..]));
            let refused: Vec<pid_t> = plan.missing.iter().map(|(inside, _)| *inside).collect();
            assert_eq!(refused, missing, "{plan:?}");
        }
    }

    #[test]
    fn who_is_in_a_group_whose_leader_is_made_steps_out() {
        // A pipeline: 3 leads the group, 4 is in it.
        let [shell, leader, member] = [one(2, 1, 10), one(3, 2, 11), one(4, 2, 12)];
        let (leader, member) = (Identity { group: 3, ..leader }, Identity { group: 3, ..member });
        let ended = plan(&[shell, leader, member], &[], &live(&[shell, member]));
        assert_eq!(ways(&ended), [(2, How::InPlace), (3, How::Rebuild), (4, How::InPlace)]);
        assert_eq!(ended.stepping_out, [4]);
        let zombie = [Ended { identity: leader, is_there: false }];
        let zombie = plan(&[shell, member], &zombie, &live(&[shell, member]));
        assert_eq!(zombie.stepping_out, [4]);
    }

    #[test]
    fn one_that_another_than_init_had_adopted_in_its_session_cannot_be_made() {
        let past = [one(2, 1, 10), Identity { session: 9, group: 9, ..one(4, 2, 12) }];
        let plan = plan(&past, &[], &live(&past[..1]));
        assert_eq!(plan.missing.len(), 1);
        assert_eq!(plan.missing[0].0, 4);
    }
}
