//! How a return would go, told without stopping anybody.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::family::look_at_zombies;
use super::plan::{How, Live, plan};
use super::{Identity, Moment};
use crate::deltacr::tasks::Lists;

/// How processes would come back, as far as can be told from outside: what they have given up since (rights, limits) is
/// only known when they stand still.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Outlook {
    /// So many live, and would be put back in place.
    pub n_in_place: usize,
    /// So many would be made by their templates.
    pub n_forked: usize,
    /// So many would be made by their parents, or by others of their sessions.
    pub n_rebuilt: usize,
    /// So many live that were not there then, or have to be made: they would end.
    pub n_ending: usize,
    /// Why it would be refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// How many live in a cgroup with an init; 1 if that cannot be told.
pub fn n_living(group: &Path) -> usize {
    let pids = Lists::open(group).and_then(|lists| lists.processes());
    pids.map_or(1, |pids| pids.len().saturating_sub(1))
}

/// Who lives in a cgroup, but for init.
///
/// # Errors
/// The cgroup cannot be read.
pub fn who_lives(group: &Path, init: libc::pid_t) -> io::Result<Vec<Identity>> {
    let pids = Lists::open(group).and_then(|lists| lists.processes()).map_err(|(_, error)| error)?;
    // Those that end meanwhile are left out.
    Ok(pids.into_iter().filter(|pid| *pid != init).filter_map(|pid| Identity::read(pid).ok()).collect())
}

impl Moment {
    /// How a return to it would go with those who live now.
    pub fn outlook(&self, living: &[Identity]) -> Outlook {
        let stays = |is: &Identity| self.of_now(is).is_none_or(|past| past.memory.is_of(is.host).unwrap_or(false));
        let live: Vec<Live> = living.iter().map(|is| Live { identity: *is, can_stay: stays(is) }).collect();
        let past: Vec<Identity> = self.processes.iter().map(|past| past.identity).collect();
        let plan = plan(&past, &look_at_zombies(self), &live);
        let mut outlook = Outlook { n_ending: plan.ending.len(), ..Outlook::default() };
        for (_, how) in &plan.back {
            *match how {
                How::InPlace => &mut outlook.n_in_place,
                How::Fork | How::Orphan(None) => &mut outlook.n_forked,
                How::Rebuild | How::Orphan(Some(_)) => &mut outlook.n_rebuilt,
            } += 1;
        }
        let missing = plan.missing.first();
        outlook.refused = missing.map(|(inside, why)| format!("process {inside} (inside) {why}"));
        outlook
    }
}
