//! Giving processes what was opened for them: descriptors in their places, working directories, mappings, locks.

use super::gifts::{gifts, last_calls, needs_work};
use super::open::{Opened, file_error};
use super::{Description, Kind, Plan, RebaseError, Seat};
use crate::deltacr::handover::{Receiver, Session, call, give_denied_directory, unsigned};
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::is_over;
use crate::sandbox::root::Namespace;

/// Of a listener that was made again (chosen: the kernel cuts it to net.core.somaxconn; the old one's is not told).
const BACKLOG: u64 = 4096;

impl Opened {
    /// Gives everything to the processes, then lets go of the old descriptions.
    ///
    /// # Errors
    /// Processes up to some have what is new, the others have not.
    pub fn commit(&mut self, stopped: &mut Stopped, namespace: &Namespace) -> Result<(), RebaseError> {
        let Self { plan: Plan { seats, descriptions }, tables } = self;
        for seat in seats.iter() {
            if !needs_work(seat, descriptions) {
                continue;
            }
            crate::fault::point("rebase.give").map_err(|source| RebaseError::Process {
                op: "give descriptors",
                pid: seat.pid,
                source,
            })?;
            match serve(stopped, seat, descriptions, namespace) {
                // Killed meanwhile: it needs nothing any more.
                Err(_) if is_over(seat.pid) => {}
                other => other?,
            }
        }
        // Closed before events are taken out: closing makes some.
        tables.extend(seats.drain(..).map(|seat| seat.table));
        for description in descriptions {
            description.old = None;
            if let (Kind::Watcher(watcher), Some(instance)) = (&mut description.kind, &description.new) {
                let settled = watcher.settle(instance, description.info.flags);
                settled.map_err(|source| file_error("settle", &description.place, source))?;
            }
        }
        Ok(())
    }

    /// Open file descriptions, of all processes together.
    pub fn n_descriptions(&self) -> usize {
        self.plan.descriptions.len()
    }
}

/// All that one process gets.
fn serve(
    stopped: &mut Stopped,
    seat: &Seat,
    descriptions: &mut [Description],
    namespace: &Namespace,
) -> Result<(), RebaseError> {
    let receiver = Receiver { pid: seat.pid, tid: seat.tid, task: seat.table.pidfd(), numbers: &seat.numbers };
    let mut session = Session::open(stopped, receiver)?;
    for holding in &seat.holdings {
        make(&mut session, &mut descriptions[holding.description], namespace)?;
    }
    let gifts = gifts(seat, descriptions);
    match session.give(&gifts, &last_calls(seat, descriptions)) {
        Err(error) if error.is_denied_directory() => Ok(give_denied_directory(stopped, receiver, &gifts)?),
        given => Ok(given?),
    }
}

/// Makes what only a process can make, and the engine's copy of it.
fn make(session: &mut Session<'_>, description: &mut Description, namespace: &Namespace) -> Result<(), RebaseError> {
    if description.new.is_some() {
        return Ok(());
    }
    let Some(old) = &description.old else { return Ok(()) };
    let (place, flags) = (&description.place, description.info.flags);
    match &mut description.kind {
        Kind::File => {}
        Kind::Listener(listener) if !listener.is_there() => {}
        Kind::Listener(listener) => {
            let kind = unsigned(listener.kind as i32 | libc::SOCK_CLOEXEC);
            let (number, new) =
                session.make_one("socket", call(libc::SYS_socket, &[unsigned(libc::AF_UNIX), kind, 0]))?;
            let taken = listener.take_over(old, &new, place, flags, namespace);
            taken.map_err(|source| file_error("listen again at", place, source))?;
            session.call("listen", call(libc::SYS_listen, &[number, BACKLOG]))?;
            session.close(number)?;
            description.new = Some(new);
        }
        Kind::Watcher(watcher) => {
            let flags = unsigned(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
            let (number, new) = session.make_one("inotify_init1", call(libc::SYS_inotify_init1, &[flags]))?;
            watcher.watch(&new).map_err(|source| file_error("watch again with", place, source))?;
            session.close(number)?;
            description.new = Some(new);
        }
    }
    Ok(())
}
