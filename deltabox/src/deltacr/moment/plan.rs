//! Who comes back how. Pure.

use libc::pid_t;

use super::Identity;

/// A process that lives now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Which.
    pub identity: Identity,
}

/// A way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It lives: what has changed in it is put back.
    InPlace,
    /// It has ended: its template makes it again, a child of init that leads its session.
    Fork,
}

impl How {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::InPlace => "in place",
            Self::Fork => "fork",
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Who comes back, parents before children, and how: as it is now, or as it was if it has to be made.
    pub back: Vec<(Identity, How)>,
    /// Who has to go, children before parents.
    pub ending: Vec<Identity>,
    /// Who is missing, by PID inside, and what became of it.
    pub missing: Vec<(pid_t, &'static str)>,
}

/// PID inside of the sandbox's init.
const INIT: pid_t = 1;

/// From the processes of a moment, parents first, and those that live.
pub(super) fn plan(past: &[Identity], live: &[Live]) -> Plan {
    let mut plan = Plan::default();
    let alive =
        |was: &Identity| live.iter().map(|live| live.identity).find(|is| (is.host, is.start) == (was.host, was.start));
    for was in past {
        match alive(was) {
            Some(is) if is.parent == was.parent => plan.back.push((is, How::InPlace)),
            Some(_) => plan.missing.push((was.inside, "has lost its parent since")),
            None if was.parent == INIT && was.leads => plan.back.push((*was, How::Fork)),
            None => plan.missing.push((was.inside, "has ended since")),
        }
    }
    let comes_back = |is: &Identity| plan.back.iter().any(|(back, how)| (back, *how) == (is, How::InPlace));
    let mut ending: Vec<Identity> = live.iter().map(|live| live.identity).filter(|is| !comes_back(is)).collect();
    // A child has a parent that was there before it, or one that adopted it: whoever is younger goes first.
    ending.sort_by_key(|is| std::cmp::Reverse((is.start, is.host)));
    plan.ending = ending;
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(inside: pid_t, parent: pid_t, start: u64) -> Identity {
        Identity { inside, parent, host: inside + 1000, start, leads: false }
    }

    fn live(identities: &[Identity]) -> Vec<Live> {
        identities.iter().map(|identity| Live { identity: *identity }).collect()
    }

    #[test]
    fn who_lives_comes_back_in_place_and_who_is_new_ends_the_youngest_first() {
        let past = [one(2, 1, 10), one(3, 2, 11)];
        let now = [one(2, 1, 10), one(3, 2, 11), one(4, 3, 20), one(5, 4, 30)];
        let plan = plan(&past, &live(&now));
        assert_eq!(plan.back, [(past[0], How::InPlace), (past[1], How::InPlace)]);
        assert_eq!(plan.ending, [now[3], now[2]]);
        assert_eq!(plan.missing, []);
    }

    #[test]
    fn a_number_that_was_given_again_is_another_process() {
        let past = [one(2, 1, 10)];
        let again = one(2, 1, 99);
        let plan = plan(&past, &live(&[again]));
        assert_eq!((plan.back.len(), plan.ending), (0, vec![again]));
        assert_eq!(plan.missing, [(2, "has ended since")]);
    }

    #[test]
    fn a_command_that_has_ended_is_made_again_and_its_children_are_missing() {
        let command = Identity { leads: true, ..one(2, 1, 10) };
        let past = [command, one(3, 2, 11), one(4, 1, 12)];
        let orphan = one(3, 1, 11);
        let plan = plan(&past, &live(&[orphan]));
        assert_eq!(plan.back, [(command, How::Fork)]);
        assert_eq!(plan.missing, [(3, "has lost its parent since"), (4, "has ended since")]);
        assert_eq!(plan.ending, [orphan]);
    }

    #[test]
    fn an_orphan_is_missing_and_the_one_that_it_became_ends() {
        let past = [one(2, 1, 10), one(3, 2, 11)];
        let orphan = one(3, 1, 11);
        let plan = plan(&past, &live(&[orphan]));
        assert_eq!(plan.missing, [(2, "has ended since"), (3, "has lost its parent since")]);
        assert_eq!(plan.ending, [orphan]);
    }
}
