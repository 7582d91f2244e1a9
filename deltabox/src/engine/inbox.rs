//! A driver's inbox: a queue that poll(2) can wait for.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Messages for one thread, from any thread.
#[derive(Debug)]
pub(super) struct Inbox<M> {
    queue: Mutex<Queue<M>>,
    wake: EventFd,
}

#[derive(Debug)]
struct Queue<M> {
    messages: VecDeque<M>,
    closed: bool,
}

impl<M> Inbox<M> {
    pub(super) fn new() -> nix::Result<Self> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { queue: Mutex::new(Queue { messages: VecDeque::new(), closed: false }), wake })
    }

    /// Puts a message in; gives it back if nobody will read it any more.
    pub(super) fn post(&self, message: M) -> Result<(), M> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.closed {
            return Err(message);
        }
        queue.messages.push_back(message);
        drop(queue);
        // Fails only when the counter is full, and then the reader is awake anyway.
        let _ = self.wake.write(1);
        Ok(())
    }

    /// Everything that has come, oldest first.
    pub(super) fn take(&self) -> VecDeque<M> {
        let _ = self.wake.read();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut queue.messages)
    }

    /// Refuses messages from now on; what is left in it is the caller's to answer.
    pub(super) fn close(&self) -> VecDeque<M> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        std::mem::take(&mut queue.messages)
    }
}

/// Readable while messages wait.
impl<M> AsFd for Inbox<M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout};

    use super::*;

    fn readable(inbox: &Inbox<u32>) -> bool {
        let mut fds = [PollFd::new(inbox.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn it_is_readable_exactly_while_messages_wait() {
        let inbox = Inbox::new().unwrap();
        assert!(!readable(&inbox));
        inbox.post(1).unwrap();
        inbox.post(2).unwrap();
        assert!(readable(&inbox));
        assert_eq!(inbox.take(), [1, 2]);
        assert!(!readable(&inbox));
    }

    #[test]
    fn a_closed_one_gives_messages_back() {
        let inbox = Inbox::new().unwrap();
        inbox.post(1).unwrap();
        assert_eq!(inbox.close(), [1]);
        assert_eq!(inbox.post(2), Err(2));
    }
}
