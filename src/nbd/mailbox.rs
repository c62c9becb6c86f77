//! Where completions wait for the thread of their connection, and what wakes that thread.
//!
//! Guarantees: a completion posted is seen without another one having to follow; posting never
//! blocks; a thread that is awake costs its posters no system call. A request whose service let
//! go of the completion without calling it is answered as shut down.
//! Does not know: sockets, what a completion means.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::transmission::Ticket;
use crate::error::{Error, ErrorKind, Result};
use crate::volume::service::{Completion, Outcome};

/// See the module.
#[derive(Debug)]
pub struct Mailbox {
    letters: Mutex<Vec<(Ticket, Outcome)>>,
    asleep: AtomicBool,
    bell: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> Result<Arc<Self>> {
        let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|errno| Error::device("make a wake-up descriptor", &errno.into()))?;
        Ok(Arc::new(Self { letters: Mutex::default(), asleep: AtomicBool::new(false), bell }))
    }

    /// A completion that posts the answer to `ticket`.
    pub(super) fn completion(self: &Arc<Self>, ticket: Ticket) -> Completion {
        let mut answer = Answer { mailbox: Arc::clone(self), ticket: Some(ticket) };
        Box::new(move |outcome| answer.give(outcome))
    }

    fn post(&self, ticket: Ticket, outcome: Outcome) {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).push((ticket, outcome));
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Wakes the thread, or keeps it from its next sleep.
    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the bell is ringing already.
        let _full = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Moves what has arrived into `taken`, which is empty.
    pub(super) fn take(&self, taken: &mut Vec<(Ticket, Outcome)>) {
        let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *letters, taken);
    }

    /// The thread is about to wait for `bell`; false if something has arrived meanwhile.
    pub(super) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        let empty = self.letters.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if !empty {
            self.asleep.store(false, Ordering::SeqCst);
        }
        empty
    }

    /// The thread is awake again; silences the bell if it rang.
    pub(super) fn rise(&self, rang: bool) {
        self.asleep.store(false, Ordering::SeqCst);
        if rang {
            // Fails only when another wake-up was never counted, and then there is nothing to do.
            let _silent = rustix::io::read(&self.bell, &mut [0u8; 8]);
        }
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Another descriptor of the bell, for whom the thread waits as well.
    pub(super) fn shared_bell(&self) -> Result<OwnedFd> {
        self.bell.try_clone().map_err(|error| Error::device("share a wake-up descriptor", &error))
    }
}

/// Posts once, at the latest when it is dropped.
struct Answer {
    mailbox: Arc<Mailbox>,
    ticket: Option<Ticket>,
}

impl Answer {
    fn give(&mut self, outcome: Outcome) {
        if let Some(ticket) = self.ticket.take() {
            self.mailbox.post(ticket, outcome);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.give(Err(Error::new(
            ErrorKind::Interrupted,
            "the volume was closed while the request was waiting",
        )));
    }
}
