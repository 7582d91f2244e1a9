//! Who a thread is for the kernel: users, groups, capabilities, and what it has given up for good.
//!
//! Numbers are those of the process's own user namespace. The five sets of capabilities and the count of filters come from
//! `status`, the rest from its own calls.
//!
//! The way back, each step only if needed. Any change of users or groups clears the effective and ambient sets, makes the
//! memory not dumpable and forgets PDEATHSIG; whoever calls puts those two back afterwards.
//!
//! ```text
//! capset       effective = permitted: all that it may have
//! securebits   keep capabilities, no fixups, ambient may rise      (with SETPCAP; else PR_SET_KEEPCAPS alone)
//! setgroups, setresgid, setfsgid, setresuid                        (users last: they may take SETGID away)
//! capset       again; inheritable as it was                        (before the bound shrinks: it may exceed that)
//! setfsuid, bound, ambient, securebits as they were
//! capset       all three as they were                              (last: nothing above needs more)
//! no_new_privs
//! ```

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::batch::{Asked, Batch, Room, words_bytes};
use super::error::StateError;
use super::impossible::Judge;
use super::status::Status;

/// More groups than this in one thread are refused (chosen: they share the scratch room with all other answers).
const N_GROUPS: u16 = 1024;
/// From the kernel (include/uapi/linux/capability.h).
const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;
const CAP_SETPCAP: u64 = 1 << 8;
const CHOOSE_NUMBERS: u64 = 1 << 40 | 1 << 21;
const CAPSET_VERSION: u32 = 0x2008_0522;
/// From the kernel (include/uapi/linux/securebits.h); a bit's lock is the bit above it.
const NO_SETUID_FIXUP: u32 = 1 << 2;
const KEEP_CAPS: u32 = 1 << 4;
const NO_CAP_AMBIENT_RAISE: u32 = 1 << 6;
const LOCKS: u32 = 0xaaaa_aaaa;
/// PR_CAP_AMBIENT and what it is asked to do.
const AMBIENT: u64 = libc::PR_CAP_AMBIENT.cast_unsigned() as u64;
const AMBIENT_RAISE: u64 = 2;
const AMBIENT_LOWER: u64 = 3;

/// Those of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Credentials {
    users: Ids,
    groups: Ids,
    /// Sorted by the kernel.
    supplementary: Vec<u32>,
    sets: Sets,
    securebits: u32,
    no_new_privs: bool,
    seccomp_mode: u32,
    n_filters: u32,
}

/// One kind of ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Ids {
    real: u32,
    effective: u32,
    saved: u32,
    /// For files.
    fs: u32,
}

/// Sets of capabilities, by bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sets {
    pub(super) inheritable: u64,
    pub(super) permitted: u64,
    pub(super) effective: u64,
    pub(super) bounding: u64,
    pub(super) ambient: u64,
}

/// What was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Questions {
    users: (Asked, Asked, Room),
    groups: (Asked, Asked, Room),
    supplementary: (Asked, Room),
    securebits: Asked,
    keyrings: Asked,
}

impl Ids {
    fn of(batch: &Batch, (three, fs, room): (Asked, Asked, Room)) -> Result<Self, StateError> {
        batch.answer(three)?;
        let words = batch.words(room);
        // Ids are no errors, though the highest look like some.
        let fs = u32::try_from(batch.result(fs) & 0xffff_ffff).unwrap_or(u32::MAX);
        Ok(Self { real: words[0], effective: words[1], saved: words[2], fs })
    }

    fn three(self) -> [u32; 3] {
        [self.real, self.effective, self.saved]
    }

    /// As `status` has them.
    fn text(self) -> String {
        list(&[self.real, self.effective, self.saved, self.fs])
    }
}

impl Credentials {
    /// Asks a thread.
    pub(super) fn ask(batch: &mut Batch) -> Questions {
        let mut ids = |name, three, fs_name, fs| {
            let room = batch.room(12);
            let asked = batch.add(name, three, &[room.at, room.at + 4, room.at + 8]);
            // -1 is no id: nothing is set, and the present one is told.
            (asked, batch.add(fs_name, fs, &[u64::MAX]), room)
        };
        let users = ids("getresuid", libc::SYS_getresuid, "setfsuid", libc::SYS_setfsuid);
        let groups = ids("getresgid", libc::SYS_getresgid, "setfsgid", libc::SYS_setfsgid);
        let room = batch.room(4 * usize::from(N_GROUPS));
        let supplementary = (batch.add("getgroups", libc::SYS_getgroups, &[N_GROUPS.into(), room.at]), room);
        let securebits = batch.add("prctl", libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.cast_unsigned().into()]);
        // KEYCTL_GET_KEYRING_ID of the thread's own, not to be made. (Of the process's own: Habits. That of the session
        // cannot be asked for without being made.)
        let keyrings = batch.add("keyctl", libc::SYS_keyctl, &[0, (-1_i64).cast_unsigned(), 0]);
        Questions { users, groups, supplementary, securebits, keyrings }
    }

    /// Takes the answers.
    pub(super) fn answer(batch: &Batch, asked: &Questions, status: &Status) -> Result<Self, StateError> {
        let (groups, room) = asked.supplementary;
        let n_groups = usize::try_from(batch.answer(groups)?).unwrap_or(0);
        batch.refuse_keyring(asked.keyrings, "a thread")?;
        Ok(Self {
            users: Ids::of(batch, asked.users)?,
            groups: Ids::of(batch, asked.groups)?,
            supplementary: batch.words(room).into_iter().take(n_groups).collect(),
            sets: status.sets,
            securebits: batch.answer_u32(asked.securebits)?,
            no_new_privs: status.no_new_privs,
            seccomp_mode: status.seccomp_mode,
            n_filters: status.n_filters,
        })
    }

    /// How many system call filters it has.
    pub(super) fn n_filters(&self) -> u32 {
        self.n_filters
    }

    /// CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN: either allows to choose the numbers of threads and processes.
    pub(super) fn chooses_numbers(&self) -> bool {
        self.sets.effective & CHOOSE_NUMBERS != 0
    }

    /// Whether the steps back from `now` change more than a flag: then dumpability and PDEATHSIG are gone.
    pub(super) fn is_other(&self, now: &Self) -> bool {
        Self { no_new_privs: false, ..self.clone() } != Self { no_new_privs: false, ..now.clone() }
    }

    /// Whether there is a way back from `now`.
    pub(super) fn judge(&self, now: &Self, judge: &Judge) -> Result<(), super::Impossible> {
        let may = |capability: u64| now.sets.permitted & capability != 0;
        let hex = |set: u64| format!("{set:#x}");
        let sets = [
            ("permitted capabilities", self.sets.permitted, now.sets.permitted),
            ("the bound of capabilities", self.sets.bounding, now.sets.bounding),
        ];
        for (what, was, is) in sets {
            judge.unless(was & !is == 0, what, hex(was), hex(is))?;
        }
        judge.unless(
            self.no_new_privs || !now.no_new_privs,
            "no_new_privs",
            self.no_new_privs.to_string(),
            now.no_new_privs.to_string(),
        )?;
        let filter = |one: &Self| format!("mode {} with {} filters", one.seccomp_mode, one.n_filters);
        let is_same = (self.seccomp_mode, self.n_filters) == (now.seccomp_mode, now.n_filters);
        judge.unless(is_same, "seccomp", filter(self), filter(now))?;
        judge.unless(
            self.supplementary == now.supplementary || may(CAP_SETGID),
            "supplementary groups",
            list(&self.supplementary),
            list(&now.supplementary),
        )?;
        for (what, was, is, capability) in
            [("users", self.users, now.users, CAP_SETUID), ("groups", self.groups, now.groups, CAP_SETGID)]
        {
            let reaches = |id: u32| is.three().contains(&id);
            let fs_reaches = was.three().contains(&was.fs) || (was.three() == is.three() && was.fs == is.fs);
            let can = was == is || may(capability) || (was.three().into_iter().all(reaches) && fs_reaches);
            judge.unless(can, what, was.text(), is.text())?;
        }
        let (was, is) = (self.sets, now.sets);
        let gained = was.inheritable & !is.inheritable;
        let inherits = gained & !is.permitted == 0 || may(CAP_SETPCAP);
        let inherits = inherits && gained & !is.bounding == 0;
        judge.unless(inherits, "inheritable capabilities", hex(was.inheritable), hex(is.inheritable))?;
        let bounds = was.bounding == is.bounding || may(CAP_SETPCAP);
        judge.unless(bounds, "the bound of capabilities", hex(was.bounding), hex(is.bounding))?;
        let locked = (now.securebits & LOCKS) >> 1;
        let is_locked = locked & (self.securebits ^ now.securebits) != 0
            || now.securebits & LOCKS & !self.securebits != 0
            || (self.securebits | KEEP_CAPS != now.securebits | KEEP_CAPS && !may(CAP_SETPCAP));
        judge.unless(!is_locked, "securebits", hex(self.securebits.into()), hex(now.securebits.into()))?;
        let can_rise = now.securebits & NO_CAP_AMBIENT_RAISE == 0
            || (may(CAP_SETPCAP) && locked & NO_CAP_AMBIENT_RAISE == 0)
            || self.rises(now) == 0;
        judge.unless(can_rise, "ambient capabilities", hex(was.ambient), hex(is.ambient))
    }

    /// Ambient capabilities to be raised: a change of ids takes them all.
    fn rises(&self, now: &Self) -> u64 {
        let stays = self.users == now.users && self.groups == now.groups;
        self.sets.ambient & if stays { !now.sets.ambient } else { u64::MAX }
    }

    /// The steps back from `now`.
    pub(super) fn change(&self, now: &Self, batch: &mut Batch) {
        if self.is_other(now) {
            self.change_ids_and_sets(now, batch);
        }
        if self.no_new_privs && !now.no_new_privs {
            batch.add("prctl", libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS.cast_unsigned().into(), 1, 0, 0, 0]);
        }
    }

    fn change_ids_and_sets(&self, now: &Self, batch: &mut Batch) {
        let all = now.sets.permitted;
        let has_setpcap = all & CAP_SETPCAP != 0;
        let locked = (now.securebits & LOCKS) >> 1;
        let set_bits = |batch: &mut Batch, bits: u32| {
            batch.add("prctl", libc::SYS_prctl, &[libc::PR_SET_SECUREBITS.cast_unsigned().into(), bits.into()]);
        };
        let keep = |batch: &mut Batch, kept: bool| {
            batch.add("prctl", libc::SYS_prctl, &[libc::PR_SET_KEEPCAPS.cast_unsigned().into(), kept.into()]);
        };
        capset(batch, all, all, now.sets.inheritable);
        if has_setpcap {
            let free = ((self.securebits | KEEP_CAPS | NO_SETUID_FIXUP) & !NO_CAP_AMBIENT_RAISE) & !LOCKS & !locked;
            set_bits(batch, free | (now.securebits & (locked | LOCKS)));
        } else if locked & KEEP_CAPS == 0 {
            keep(batch, true);
        }
        if self.supplementary != now.supplementary {
            let at = batch.input(&words_bytes(&self.supplementary));
            batch.add("setgroups", libc::SYS_setgroups, &[self.supplementary.len() as u64, at]);
        }
        if self.groups != now.groups {
            batch.add("setresgid", libc::SYS_setresgid, &self.groups.three().map(u64::from));
            batch.add("setfsgid", libc::SYS_setfsgid, &[self.groups.fs.into()]);
        }
        if self.users != now.users {
            batch.add("setresuid", libc::SYS_setresuid, &self.users.three().map(u64::from));
        }
        capset(batch, all, all, self.sets.inheritable);
        if self.users != now.users {
            batch.add("setfsuid", libc::SYS_setfsuid, &[self.users.fs.into()]);
            // With fixups it takes some of the effective ones.
            capset(batch, all, all, self.sets.inheritable);
        }
        for number in bits(now.sets.bounding & !self.sets.bounding) {
            batch.add("prctl", libc::SYS_prctl, &[libc::PR_CAPBSET_DROP.cast_unsigned().into(), number]);
        }
        for number in bits(now.sets.ambient & !self.sets.ambient) {
            batch.add("prctl", libc::SYS_prctl, &[AMBIENT, AMBIENT_LOWER, number, 0, 0]);
        }
        for number in bits(self.rises(now)) {
            batch.add("prctl", libc::SYS_prctl, &[AMBIENT, AMBIENT_RAISE, number, 0, 0]);
        }
        if has_setpcap {
            set_bits(batch, self.securebits);
        } else if locked & KEEP_CAPS == 0 {
            keep(batch, self.securebits & KEEP_CAPS != 0);
        }
        capset(batch, self.sets.effective, self.sets.permitted, self.sets.inheritable);
    }
}

fn capset(batch: &mut Batch, effective: u64, permitted: u64, inheritable: u64) {
    let half = |set: u64, at: u32| u32::try_from(set >> at & 0xffff_ffff).unwrap_or(0);
    let word = |at| [half(effective, at), half(permitted, at), half(inheritable, at)];
    let header = batch.input(&words_bytes(&[CAPSET_VERSION, 0]));
    let data = batch.input(&words_bytes(&[word(0), word(32)].concat()));
    batch.add("capset", libc::SYS_capset, &[header, data]);
}

fn bits(set: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |bit| set >> bit & 1 != 0)
}

fn list(ids: &[u32]) -> String {
    ids.iter().fold(String::new(), |mut text, id| {
        // A String takes everything.
        let _ = write!(text, "{}{id}", if text.is_empty() { "" } else { " " });
        text
    })
}

#[cfg(test)]
mod tests;
