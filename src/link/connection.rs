//! One byte stream of the link, either side of it, as a state machine: bytes and the time in,
//! events and bytes out.
//!
//! | state | side | on | then |
//! |---|---|---|---|
//! | `AwaitHello` | backup | a Hello we understand | event `HelloReceived`, `Deciding` |
//! | | | a Hello that requires unknown features | Refuse, `Ended` |
//! | `Deciding` | backup | `accept` | Welcome, `Active` (`Introduced` if its session is 0) |
//! | | | `refuse` | Refuse, `Ended` |
//! | `AwaitWelcome` | primary | a fitting Welcome | event `Welcomed`, `Active` or `Introduced` |
//! | | | one of another volume, size, life | Refuse, event `Failed`, `Ended` |
//! | `Active` | both | a message allowed here that the ledger takes | event `Received` |
//! | | | Ping | Pong |
//! | `Introduced` | both | Ping | Pong (the primary has learnt who it is, and leaves) |
//! | any but `Ended` | both | Refuse, Goodbye | event `Refused` or `Departed`, `Ended` |
//! | | | silence, a handshake too long | event `Dead`, `Ended` |
//! | | | anything else | Goodbye (Refuse before the session), event `Failed`, `Ended` |
//! | `Ended` | both | anything | ignored; the last frame is still to be taken |
//!
//! Guarantees: no message travels before the session is active (Crucible 1519); each frame that
//! arrives was allowed on this connection, from this side, at this time, within the volume, and
//! every answer answers a request that left (`ledger.rs`); after a failure nothing more is parsed.
//! Does not know: sockets, TLS, the clock, which session is right (`Fence`).

use std::collections::VecDeque;

use super::ledger::Ledger;
use super::outgoing::{Batch, Outgoing};
use super::reader::FrameReader;
use super::rules::{State, check_welcome, permit};
use super::{Frame, Message};
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::format::frames::{
    Class, FEATURE_PACKED, Goodbye, GoodbyeReason, Header, Hello, KNOWN_FEATURES, Refusal,
    RefusalCode, Sender, Welcome,
};
use crate::limits::{LINK_HANDSHAKE_MS, LINK_HEARTBEAT_MS, LINK_SILENCE_MS};

/// What a connection tells its driver.
#[derive(Clone, Debug)]
pub enum Event {
    /// Backup: answer with `accept` or `refuse`.
    HelloReceived(Hello),
    /// Primary: the session is active, or only introduced if its epoch is 0.
    Welcomed(Welcome),
    Received(Message),
    /// The peer refused; the connection has ended.
    Refused(Refusal),
    /// The peer is leaving; the connection has ended.
    Departed(Goodbye),
    /// Nothing was heard for too long; the connection has ended.
    Dead,
    /// The peer broke the protocol, or the stream was cut; the connection has ended.
    Failed(Error),
}

#[derive(Debug)]
pub struct Connection {
    is_primary: bool,
    state: State,
    /// Ours or the peer's; there once it was sent or read.
    hello: Option<Hello>,
    /// There once the session is active.
    ledger: Option<Ledger>,
    reader: FrameReader,
    outgoing: Outgoing,
    events: VecDeque<Event>,
    /// When the connection began.
    /// In use, once the session is active.
    features: u64,
    began: Instant,
    /// When bytes last arrived, and when bytes last left.
    heard: Instant,
    spoke: Instant,
    pings: u64,
}

impl Connection {
    /// The primary's side: the Hello is queued.
    pub fn client(hello: Hello, now: Instant) -> Result<Self> {
        hello.check()?;
        let mut connection = Self::new(true, State::AwaitWelcome, now);
        connection.outgoing.push(Frame::Hello(hello.clone()));
        connection.hello = Some(hello);
        Ok(connection)
    }

    /// The backup's side.
    #[must_use]
    pub fn server(now: Instant) -> Self {
        Self::new(false, State::AwaitHello, now)
    }

    fn new(is_primary: bool, state: State, now: Instant) -> Self {
        Self {
            is_primary,
            state,
            hello: None,
            ledger: None,
            reader: FrameReader::new(),
            outgoing: Outgoing::default(),
            events: VecDeque::new(),
            features: 0,
            began: now,
            heard: now,
            spoke: now,
            pings: 0,
        }
    }

    /// Whether messages may be sent.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.state == State::Active
    }

    /// Whether nothing more will be parsed, and nothing is left to be taken: time to close.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.state == State::Ended && self.outgoing.bytes() == 0
    }

    /// Once known, the class of the connection.
    #[must_use]
    pub fn class(&self) -> Option<Class> {
        self.hello.as_ref().map(|hello| hello.class)
    }

    /// What the connection has to tell, oldest first.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Takes bytes as they arrived. An error is also told as `Event::Failed`.
    pub fn receive(&mut self, mut bytes: &[u8], now: Instant) -> Result<()> {
        if !bytes.is_empty() {
            self.heard = now;
        }
        while !bytes.is_empty() && self.state != State::Ended {
            if let Err(error) = self.receive_some(&mut bytes) {
                self.fail(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    fn receive_some(&mut self, bytes: &mut &[u8]) -> Result<()> {
        let (state, is_primary) = (self.state, self.is_primary);
        let class = self.class();
        let features = self.features;
        let permit = |header: &Header| permit(header, state, is_primary, class, features);
        match self.reader.next(bytes, permit)? {
            Some(frame) => self.apply(frame),
            None => Ok(()),
        }
    }

    fn apply(&mut self, frame: Frame) -> Result<()> {
        match frame {
            Frame::Hello(hello) => self.greet(hello),
            Frame::Welcome(welcome) => self.welcomed(welcome),
            Frame::Refuse(refusal) => self.end(Event::Refused(refusal)),
            Frame::Goodbye(goodbye) => self.end(Event::Departed(goodbye)),
            Frame::Ping { sequence } => self.outgoing.pong(sequence),
            Frame::Pong { .. } => (),
            Frame::Message(message) => {
                self.ledger.as_mut().expect("an active session keeps a ledger").note(&message)?;
                self.events.push_back(Event::Received(message));
            }
        }
        Ok(())
    }

    fn greet(&mut self, hello: Hello) {
        let unknown = hello.features_required & !KNOWN_FEATURES;
        if unknown != 0 {
            let words = format!(
                "the primary requires link features {unknown:#x}, which this backup does not \
                 know: update the backup"
            );
            self.reject(RefusalCode::Feature, Error::format(words));
            return;
        }
        self.hello = Some(hello.clone());
        self.state = State::Deciding;
        self.events.push_back(Event::HelloReceived(hello));
    }

    /// Backup: consents. Before, whatever the decision changed must be durable and the session that
    /// it supersedes drained or discarded (R11). An error if the peer left meanwhile.
    pub fn accept(&mut self, welcome: &Welcome, now: Instant) -> Result<()> {
        if self.state != State::Deciding {
            return Err(self.not_open("a Hello that waits for a decision"));
        }
        let hello = self.hello.as_ref().expect("there is one to decide on");
        assert_eq!(welcome.geometry, hello.geometry, "only the same geometry is accepted");
        assert_eq!(welcome.features & !hello.features_offered, 0, "only offered features");
        self.outgoing.push(Frame::Welcome(welcome.clone()));
        self.heard = now;
        self.open(welcome);
        Ok(())
    }

    /// Backup: declines. Without effect if the peer left meanwhile.
    pub fn refuse(&mut self, refusal: Refusal) {
        if self.state == State::Deciding {
            self.outgoing.push(Frame::Refuse(refusal));
            self.state = State::Ended;
        }
    }

    fn welcomed(&mut self, welcome: Welcome) {
        let hello = self.hello.as_ref().expect("a primary begins with its Hello");
        if let Err(refusal) = check_welcome(hello, &welcome) {
            self.reject(refusal.code, refusal.to_error());
            return;
        }
        self.open(&welcome);
        self.events.push_back(Event::Welcomed(welcome));
    }

    fn open(&mut self, welcome: &Welcome) {
        if welcome.session_epoch == 0 {
            self.state = State::Introduced;
            return;
        }
        self.features = welcome.features;
        self.ledger = Some(Ledger::new(welcome.geometry, welcome.applied_sequence));
        self.state = State::Active;
    }

    /// Queues a message. An error if the session is not active (any more) or the message is not
    /// well formed; it is our own fault, and stops us, to send what only the peer may send.
    ///
    /// Returns the sequences of mirrored writes that it supersedes: they do not leave, and its own
    /// answer is theirs.
    pub fn send(&mut self, message: Message) -> Result<Vec<u64>> {
        if self.state != State::Active {
            return Err(self.not_open("an active session"));
        }
        message.check()?;
        let rule = message.kind().rule();
        let ours = if self.is_primary { Sender::Primary } else { Sender::Backup };
        assert_eq!(rule.sender, ours, "{:?} is sent by the other side", rule.kind);
        let class = self.class().expect("an active session has a class");
        assert!(rule.traffic.travels_on(class), "{:?} does not travel on {class:?}", rule.kind);
        let features = rule.kind.features();
        assert_eq!(features & !self.features, 0, "{:?} is not agreed on", rule.kind);
        Ok(self.outgoing.push(Frame::Message(message)))
    }

    /// What is sent from now on supersedes nothing that was sent before.
    pub fn barrier(&mut self) {
        self.outgoing.barrier();
    }

    /// Says goodbye; what is queued is dropped (R11) and nothing more is read or sent. Who wants it
    /// sent waits for `outgoing_bytes` to be 0 first.
    pub fn depart(&mut self, goodbye: Goodbye) {
        if self.state != State::Ended {
            self.outgoing.discard();
            self.outgoing.push(Frame::Goodbye(goodbye));
            self.state = State::Ended;
        }
    }

    /// The transport found the end of the stream, or an error of its own (`words`).
    pub fn closed(&mut self, words: &str) {
        if self.state == State::Ended {
            return;
        }
        let place = if self.reader.is_inside_frame() { " in the middle of a frame" } else { "" };
        let error = Error::link(format!("the link was closed{place} without a goodbye: {words}"));
        self.end(Event::Failed(error));
    }

    /// Whole frames for the transport, contiguous, up to `bytes_max` but at least one; `None` if
    /// nothing waits, or what waits has to wait for answers.
    pub fn take_outgoing(&mut self, bytes_max: usize, now: Instant) -> Option<Vec<u8>> {
        self.take_batch(bytes_max, now).map(|batch| batch.encode())
    }

    /// The same, to be encoded without the connection's lock.
    pub(super) fn take_batch(&mut self, bytes_max: usize, now: Instant) -> Option<Batch> {
        let ledger = &mut self.ledger;
        let mut batch = self.outgoing.take(bytes_max, |message| {
            let ledger = ledger.as_mut().expect("an active session keeps a ledger");
            let has_room = ledger.has_room(message);
            if has_room {
                ledger.note(message).expect("we keep the protocol that we demand");
            }
            has_room
        })?;
        self.spoke = now;
        batch.may_pack = self.features & FEATURE_PACKED != 0;
        Some(batch)
    }

    /// Whether `take_outgoing` has something to give: when to wake the transport.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let ledger = self.ledger.as_ref();
        self.outgoing.is_ready(|message| ledger.is_none_or(|ledger| ledger.has_room(message)))
    }

    /// Bytes queued and not taken: what back-pressure is measured by.
    #[must_use]
    pub fn outgoing_bytes(&self) -> usize {
        self.outgoing.bytes()
    }

    /// Bytes of requests that left, or arrived, and are not answered.
    #[must_use]
    pub fn unanswered_bytes(&self) -> u64 {
        self.ledger.as_ref().map_or(0, Ledger::unanswered_bytes)
    }

    /// Lets time pass: speaks if we were silent, gives up if the peer was.
    pub fn tick(&mut self, now: Instant) {
        if self.death().is_some_and(|death| now >= death) {
            self.end(Event::Dead);
        } else if self.heartbeat().is_some_and(|due| now >= due) {
            self.pings += 1;
            self.outgoing.ping(self.pings);
        }
    }

    /// When `tick` has something to do, if nothing happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        [self.death(), self.heartbeat()].into_iter().flatten().min()
    }

    fn death(&self) -> Option<Instant> {
        match self.state {
            State::AwaitHello | State::AwaitWelcome | State::Deciding => {
                Some(self.began.plus_ms(LINK_HANDSHAKE_MS))
            }
            State::Active | State::Introduced => Some(self.heard.plus_ms(LINK_SILENCE_MS)),
            State::Ended => None,
        }
    }

    /// Also while messages wait for answers: the peer is to know that we live. None while a Ping
    /// waits to be taken.
    fn heartbeat(&self) -> Option<Instant> {
        let speaks = matches!(self.state, State::Active | State::Introduced);
        (speaks && !self.outgoing.has_ping()).then(|| self.spoke.plus_ms(LINK_HEARTBEAT_MS))
    }

    fn end(&mut self, event: Event) {
        self.state = State::Ended;
        self.outgoing.discard();
        self.events.push_back(event);
    }

    /// Refuses the handshake with the words of the error.
    fn reject(&mut self, code: RefusalCode, error: Error) {
        let refusal = Refusal::new(code, &error.to_string());
        self.end(Event::Failed(error));
        self.outgoing.push(Frame::Refuse(refusal));
    }

    fn fail(&mut self, error: Error) {
        let words = error.to_string();
        let ending = match (self.state, error.kind()) {
            (State::Active | State::Introduced, _) => {
                Frame::Goodbye(Goodbye::new(GoodbyeReason::Protocol, &words))
            }
            (_, ErrorKind::Format) => Frame::Refuse(Refusal::new(RefusalCode::Format, &words)),
            _ => Frame::Refuse(Refusal::new(RefusalCode::Protocol, &words)),
        };
        self.end(Event::Failed(error));
        self.outgoing.push(ending);
    }

    fn not_open(&self, expected: &str) -> Error {
        Error::link(format!("link: expected {expected}, found the connection {:?}", self.state))
    }
}

#[cfg(test)]
mod tests;
