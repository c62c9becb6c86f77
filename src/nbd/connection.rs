//! The thread of one connection: moves bytes between a socket and a session, requests between the
//! session and the volume.
//!
//! Guarantees: everything that has arrived is looked at before anything is answered, and all
//! answers that are ready leave in one vectored send; requests that the volume takes time for are
//! given to it together and are in flight together; nothing here blocks but `poll`.
//! Does not know: the protocol (`session`), TLS (`wire`), other connections.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::mailbox::Mailbox;
use super::session::{Event, Session};
use super::transmission::Ticket;
use super::vigil::{Vigil, Watcher};
use super::wire::{Moved, Wire};
use crate::clock::{Instant, MonotonicClock};
use crate::device::ThreadRing;
use crate::limits;
use crate::volume::service::{BlockService, Command, Completion, Outcome};

/// An idle connection gives memory back after this time.
const REST_AFTER_MS: u64 = 1_000;

/// What others may see of a connection while it runs.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) in_flight: AtomicU64,
}

/// See the module.
pub(super) struct Connection {
    wire: Wire,
    session: Session,
    mailbox: Arc<Mailbox>,
    counters: Arc<Counters>,
    stopping: Arc<AtomicBool>,
    clock: MonotonicClock,
    started: Instant,
    stopped: Option<Instant>,
    letters: Vec<(Ticket, Outcome)>,
    /// Requests that are given to the volume together.
    batch: Vec<(Command, Completion)>,
    /// What the volume does beside this thread.
    ring: ThreadRing,
    vigil: Vigil,
    /// Since when there has been nothing to do.
    idle_since_ns: Option<u64>,
    /// The volume, once transmission has begun.
    service: Option<Arc<dyn BlockService>>,
    tls_begins: bool,
    /// The socket takes and gives nothing more: it is not polled any longer.
    lost: bool,
    /// Memory was given back since something last happened.
    rested: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("wire", &self.wire).finish_non_exhaustive()
    }
}

impl Connection {
    /// For the thread that runs it. `bell` is another descriptor of the mailbox's.
    pub(super) fn new(
        wire: Wire,
        session: Session,
        mailbox: Arc<Mailbox>,
        counters: Arc<Counters>,
        stopping: Arc<AtomicBool>,
        bell: OwnedFd,
    ) -> Self {
        let clock = MonotonicClock::default();
        Self {
            ring: ThreadRing::new(bell),
            wire,
            session,
            mailbox,
            counters,
            stopping,
            clock,
            started: clock.now(),
            stopped: None,
            letters: Vec::new(),
            batch: Vec::new(),
            vigil: Vigil::default(),
            idle_since_ns: None,
            service: None,
            tls_begins: false,
            lost: false,
            rested: false,
        }
    }

    /// Runs until the client leaves, breaks the protocol or is told to go.
    pub(super) fn run(mut self) {
        let mut looked = false;
        loop {
            if self.stopping.load(Ordering::Acquire) && self.stopped.is_none() {
                self.session.stop();
                self.stopped = Some(self.clock.now());
            }
            let mut busy = looked || self.look();
            self.work();
            // What was given to the ring is handed over, and perhaps done by now.
            self.ring.turn();
            busy |= self.collect();
            busy |= self.send();
            self.count();
            if self.tls_begins && self.wire.pending(&self.session) == 0 {
                self.tls_begins = false;
                if !self.wire.begin_tls() {
                    return;
                }
            }
            let unsent = !self.lost && self.wire.pending(&self.session) > 0;
            if (self.session.finished() && !unsent) || self.overdue() {
                return;
            }
            if busy {
                self.rested = false;
                looked = false;
            } else {
                looked = self.wait();
            }
        }
    }

    /// Takes what there is of completions and of the client; whether there was anything.
    fn look(&mut self) -> bool {
        let mut any = self.ring.turn();
        any |= self.collect();
        any |= self.receive();
        if any && let Some(since_ns) = self.idle_since_ns.take() {
            self.vigil.waited(self.clock.now_ns() - since_ns);
        }
        any
    }

    /// Nothing is there: looks around for a moment, or else sleeps. Whether it took something.
    fn wait(&mut self) -> bool {
        let now_ns = self.clock.now_ns();
        let until_ns = *self.idle_since_ns.get_or_insert(now_ns) + self.vigil.look_ns();
        if now_ns < until_ns
            && self.wire.pending(&self.session) == 0
            && let Some(_watcher) = Watcher::begin()
        {
            while !self.lost && self.clock.now_ns() < until_ns {
                if self.look() {
                    return true;
                }
                std::thread::yield_now();
            }
        }
        self.sleep();
        false
    }

    /// Hands completions to the session; whether there were any.
    fn collect(&mut self) -> bool {
        self.mailbox.take(&mut self.letters);
        let any = !self.letters.is_empty();
        for (ticket, outcome) in self.letters.drain(..) {
            self.session.answer(ticket, outcome);
        }
        any
    }

    /// Receives what is there, once; whether anything was.
    fn receive(&mut self) -> bool {
        match self.wire.receive(&mut self.session) {
            Moved::Nothing => return false,
            Moved::Bytes(count) => {
                self.counters.bytes_received.fetch_add(count as u64, Ordering::Relaxed);
            }
            Moved::Ended => self.session.input_ended(),
            Moved::Lost => self.lose(),
        }
        true
    }

    fn lose(&mut self) {
        self.session.input_ended();
        self.session.output_ended();
        self.lost = true;
    }

    /// Does everything the session asks for.
    fn work(&mut self) {
        while let Some(event) = self.session.next_event() {
            match event {
                Event::Request { ticket, command } => self.request(ticket, command),
                Event::Status { ticket, contexts, range, limit } => {
                    let service = self.service();
                    let list = |context| Ok((context, service.status(context, range, limit)?));
                    let statuses = contexts.into_iter().map(list).collect();
                    self.session.answer_status(ticket, statuses);
                }
                Event::StartTls => self.tls_begins = true,
            }
        }
        if !self.batch.is_empty() {
            let service = self.service.as_ref().expect("looked up for the first request");
            service.submit_all(&mut self.batch);
        }
        if self.service.is_none() && !self.session.handshaking() {
            self.service();
        }
    }

    /// The volume behind the export; wakes us when the export is removed.
    fn service(&mut self) -> &Arc<dyn BlockService> {
        let (session, mailbox) = (&self.session, &self.mailbox);
        self.service.get_or_insert_with(|| {
            let export = session.export().expect("a request has an export");
            export.watch(mailbox);
            Arc::clone(export.service())
        })
    }

    fn request(&mut self, ticket: Ticket, command: Command) {
        self.service();
        let service = self.service.as_ref().expect("looked up above");
        let mut waiting = Some(ticket);
        if let Command::Read { range } = command {
            let ticket = waiting.take().expect("just put there");
            waiting = self.session.answer_in_place(ticket, |buffer| {
                matches!(service.read_now(range, buffer), Some(Ok(())))
            });
        }
        if let Some(ticket) = waiting {
            self.batch.push((command, self.mailbox.completion(ticket)));
        }
    }

    /// Sends what is ready, as far as the socket takes it; whether it took anything.
    fn send(&mut self) -> bool {
        match self.wire.send(&mut self.session) {
            Moved::Bytes(count) => {
                self.counters.bytes_sent.fetch_add(count as u64, Ordering::Relaxed);
                true
            }
            Moved::Nothing | Moved::Ended => false,
            Moved::Lost => {
                self.lose();
                false
            }
        }
    }

    fn count(&self) {
        self.counters.requests.store(self.session.requests(), Ordering::Relaxed);
        self.counters.in_flight.store(self.session.in_flight() as u64, Ordering::Relaxed);
    }

    /// Whether a deadline has passed: that of the handshake, or that of a stop.
    fn overdue(&self) -> bool {
        self.deadline().is_some_and(|deadline| self.clock.now() >= deadline)
    }

    fn deadline(&self) -> Option<Instant> {
        let handshaking = self.session.handshaking();
        let handshake = handshaking.then(|| self.started.plus_ms(limits::NBD_HANDSHAKE_MS));
        self.stopped.map(|stopped| stopped.plus_ms(limits::NBD_SHUTDOWN_GRACE_MS)).or(handshake)
    }

    /// Waits for the socket, the mailbox or a deadline.
    fn sleep(&mut self) {
        if !self.mailbox.fall_asleep() {
            return;
        }
        let mut interest = PollFlags::empty();
        if self.wire.wants_input(&mut self.session) {
            interest |= PollFlags::IN;
        }
        if self.wire.pending(&self.session) > 0 {
            interest |= PollFlags::OUT;
        }
        let timeout = self.patience();
        let mut descriptors = [
            PollFd::from_borrowed_fd(self.mailbox.bell(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wire.as_fd(), interest),
        ];
        let watched = if self.lost { 1 } else { 2 };
        let ready = poll(&mut descriptors[..watched], timeout.as_ref());
        let rang = !descriptors[0].revents().is_empty();
        let gone = descriptors[1].revents().intersects(PollFlags::ERR | PollFlags::HUP);
        self.mailbox.rise(rang);
        // With interest in bytes the socket's own calls tell; without, only this does.
        if gone && interest.is_empty() {
            self.lose();
        }
        if ready == Ok(0) {
            self.session.rest();
            self.rested = true;
        }
    }

    /// How long to wait at most: to the deadline, or until it is time to give memory back.
    fn patience(&self) -> Option<Timespec> {
        let left = self.deadline().map(|at| at.since_ms(self.clock.now()));
        let rest = (!self.rested).then_some(REST_AFTER_MS);
        let wait_ms = [left, rest].into_iter().flatten().min()?;
        let wait = std::time::Duration::from_millis(wait_ms);
        Some(Timespec::try_from(wait).expect("seconds fit"))
    }
}
