//! One connection as its two users see it: the transport, which moves bytes, and a side of a
//! volume, which takes events and sends messages.
//!
//! Guarantees: events are given to the side without the connection's lock, in order, by the thread
//! that received the bytes. Does not know: sockets, volumes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::packing::Packer;
use super::wake::Wake;
use super::{Connection, Event, Message};
use crate::clock::MonotonicClock;
use crate::error::{Error, ErrorKind, Result};
use crate::format::frames::{Goodbye, GoodbyeReason, Hello, Refusal, Welcome};

/// Who takes the events of an endpoint.
pub trait Side: Send + Sync {
    fn event(&self, endpoint: &Arc<Endpoint>, event: Event);
    /// The socket is gone, or the protocol has ended; told once.
    fn closed(&self, endpoint: &Arc<Endpoint>);
}

/// How an endpoint ended, in words for the operator.
#[derive(Clone, Debug)]
struct End {
    words: String,
    refused: bool,
}

pub struct Endpoint {
    id: u64,
    clock: MonotonicClock,
    wake: Arc<Wake>,
    side: Arc<dyn Side>,
    state: Mutex<State>,
    /// Locked before `state`.
    packer: Mutex<Packer>,
}

struct State {
    /// Absent while the hello must wait for the session of the mirror connection.
    connection: Option<Connection>,
    label: String,
    /// Session of a backup's connection, 0 before.
    epoch: u64,
    end: Option<End>,
    closed: bool,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Endpoint {
    #[must_use]
    pub fn new(
        id: u64,
        clock: MonotonicClock,
        wake: Arc<Wake>,
        side: Arc<dyn Side>,
        connection: Option<Connection>,
        label: String,
    ) -> Arc<Self> {
        let state = State { connection, label, epoch: 0, end: None, closed: false };
        let packer = Mutex::default();
        Arc::new(Self { id, clock, wake, side, state: Mutex::new(state), packer })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    // For the transport.

    /// Bytes that the peer sent.
    pub fn receive(self: &Arc<Self>, bytes: &[u8]) {
        let mut state = self.lock();
        if let Some(connection) = &mut state.connection {
            // The failure is told as an event.
            let _told = connection.receive(bytes, self.clock.now());
        }
        self.hand_over(state);
    }

    /// Encoded, and packed where that pays, while others may go on to send.
    pub fn take_outgoing(&self, bytes_max: usize) -> Option<Vec<u8>> {
        // One taker at a time: batches leave in the order in which they are taken.
        let mut packer = self.packer.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let batch = self.lock().connection.as_mut()?.take_batch(bytes_max, now)?;
        Some(packer.encode(&batch, now))
    }

    /// Lets time pass; returns in how many milliseconds it wants to be called again.
    pub fn tick(self: &Arc<Self>) -> Option<u64> {
        let now = self.clock.now();
        let mut state = self.lock();
        let next = state.connection.as_mut().and_then(|connection| {
            connection.tick(now);
            connection.next_deadline()
        });
        self.hand_over(state);
        next.map(|deadline| deadline.since_ms(now))
    }

    /// The socket is gone.
    pub fn close(self: &Arc<Self>) {
        let mut state = self.lock();
        if let Some(connection) = &mut state.connection {
            connection.closed("the connection was lost");
        }
        self.hand_over(state);
        self.tell_closed();
    }

    /// `handshake`, `active`, `failed` (with words) or `closed`.
    #[must_use]
    pub fn state(&self) -> &'static str {
        let state = self.lock();
        match (&state.connection, &state.end) {
            (_, Some(_)) => "failed",
            (Some(connection), None) if connection.is_active() => "active",
            (Some(connection), None) if connection.is_finished() => "closed",
            _ if state.closed => "closed",
            _ => "handshake",
        }
    }

    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.lock().end.as_ref().map(|end| end.words.clone())
    }

    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.lock().end.as_ref().is_some_and(|end| end.refused)
    }

    #[must_use]
    pub fn label(&self) -> String {
        self.lock().label.clone()
    }

    // For the side.

    pub fn set_label(&self, label: String) {
        self.lock().label = label;
    }

    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    /// The hello that had to wait.
    pub fn begin(&self, hello: Hello) -> Result<()> {
        let mut state = self.lock();
        if state.connection.is_none() && !state.closed {
            state.connection = Some(Connection::client(hello, self.clock.now())?);
        }
        drop(state);
        self.wake.name(self.id);
        Ok(())
    }

    /// Queues a message; an error if the session is over, which the side is told by an event.
    /// Returns the sequences of mirrored writes that it supersedes.
    pub fn send(&self, message: Message) -> Result<Vec<u64>> {
        let mut state = self.lock();
        let connection = state.connection.as_mut().ok_or_else(not_open)?;
        let superseded = connection.send(message)?;
        drop(state);
        self.wake.name(self.id);
        Ok(superseded)
    }

    /// What is sent from now on supersedes nothing that was sent before.
    pub fn barrier(&self) {
        if let Some(connection) = &mut self.lock().connection {
            connection.barrier();
        }
    }

    pub fn accept(&self, welcome: &Welcome) -> Result<()> {
        let mut state = self.lock();
        state.epoch = welcome.session_epoch;
        let connection = state.connection.as_mut().ok_or_else(not_open)?;
        connection.accept(welcome, self.clock.now())?;
        drop(state);
        self.wake.name(self.id);
        Ok(())
    }

    pub fn refuse(&self, refusal: Refusal) {
        let mut state = self.lock();
        state.end = Some(End { words: refusal.to_error().to_string(), refused: true });
        if let Some(connection) = &mut state.connection {
            connection.refuse(refusal);
        }
        drop(state);
        self.wake.name(self.id);
    }

    /// The peer is the wrong one, or said why it takes nothing more: trying again soon is useless.
    pub fn give_up(&self, words: &str) {
        let end = End { words: words.to_owned(), refused: true };
        self.lock().end.get_or_insert(end);
        self.depart(GoodbyeReason::Finished, words);
    }

    /// Says goodbye and takes part in nothing any more; what is queued is dropped (R11).
    pub fn depart(&self, reason: GoodbyeReason, words: &str) {
        let mut state = self.lock();
        if let Some(connection) = &mut state.connection {
            connection.depart(Goodbye::new(reason, words));
        }
        state.closed = true;
        drop(state);
        self.wake.name(self.id);
    }

    /// Gives what happened to the side, and remembers how it ended.
    fn hand_over(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let mut events = Vec::new();
        while let Some(event) = state.connection.as_mut().and_then(Connection::next_event) {
            if let Some(end) = End::of(&event) {
                state.end.get_or_insert(end);
            }
            events.push(event);
        }
        let waits = state.connection.as_ref().is_some_and(Connection::is_ready);
        let over = state.end.is_some();
        drop(state);
        if waits || over {
            self.wake.name(self.id);
        }
        for event in events {
            self.side.event(self, event);
        }
        if over {
            self.tell_closed();
        }
    }

    fn tell_closed(self: &Arc<Self>) {
        if !std::mem::replace(&mut self.lock().closed, true) {
            self.side.closed(self);
        }
    }
}

fn not_open() -> Error {
    Error::link("the session of this connection is not open")
}

impl End {
    fn of(event: &Event) -> Option<Self> {
        match event {
            Event::Refused(refusal) => Some(Self {
                words: refusal.to_error().to_string(),
                refused: !refusal.code.is_passing(),
            }),
            Event::Departed(goodbye) => Some(Self { words: goodbye.text.clone(), refused: false }),
            Event::Dead => Some(Self {
                words: "nothing was heard from the peer for too long".to_owned(),
                refused: false,
            }),
            Event::Failed(error) => {
                let refused = matches!(error.kind(), ErrorKind::Identity | ErrorKind::Format);
                Some(Self { words: error.to_string(), refused })
            }
            Event::HelloReceived(_) | Event::Welcomed(_) | Event::Received(_) => None,
        }
    }
}
