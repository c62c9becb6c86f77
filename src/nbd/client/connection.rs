//! Many requests in flight on one wire, each by a thread that waits for it.
//!
//! | of the threads that wait | does what |
//! |---|---|
//! | one, the leader | receives: its own bytes into their place, those of others into buffers |
//! | the others | sleep until their reply is whole, or they are to lead |
//!
//! The leader goes once its own reply is whole, and wakes the one that has waited longest; a server
//! that answers in order so has every byte received by the thread that wants it.
//!
//! Guarantees: every length is checked before it is used; after a breach of the protocol or a loss
//! of the wire every request fails, with the same error, and none is sent any more.
//! Does not know: what bytes are for, how many threads there are.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver as Turns, Sender, bounded};

use super::handshake::{Agreed, ClientHandshake};
use super::reply::{Asked, Reply, StatusRun};
use super::wire::{Wire, lost};
use crate::device::AlignedBuffer;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::nbd as protocol;
use crate::format::nbd::client::{
    HOLE_BYTES, ReplyHead, decode_error, decode_hole, decode_status, request,
};
use crate::limits::{NBD_ERROR_BYTES_MAX, NBD_HANDSHAKE_MS, NBD_SILENCE_MS, NBD_STATUS_BYTES_MAX};

/// Received ahead, so that headers cost no system call each.
const CARRY_BYTES: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    wire: Box<dyn Wire>,
    agreed: Agreed,
    /// The leader's.
    incoming: Mutex<Incoming>,
    sending: Mutex<()>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    cookie: u64,
    requests: BTreeMap<u64, Request>,
    /// Whether some thread receives, or has been told to.
    led: bool,
    /// Why nothing is possible any more.
    lost: Option<Error>,
}

#[derive(Debug)]
struct Request {
    reply: Reply,
    /// For bytes that come while another thread leads.
    buffer: Option<AlignedBuffer>,
    turn: Sender<Turn>,
}

#[derive(Debug)]
enum Turn {
    Lead,
    Ended(Result<Answer>),
}

/// What has come for a thread that did not lead.
#[derive(Debug, Default)]
struct Answer {
    buffer: Option<AlignedBuffer>,
    runs: Vec<StatusRun>,
}

/// A chunk without its body.
struct Chunk {
    cookie: u64,
    kind: u16,
    length: u32,
    done: bool,
}

impl Connection {
    /// Speaks the handshake. `greeted`: as of `ClientHandshake`.
    pub(super) fn open(wire: Box<dyn Wire>, export: &str, greeted: bool) -> Result<Self> {
        let mut incoming = Incoming::default();
        let (mut handshake, mut said) = ClientHandshake::new(export, greeted)?;
        let agreed = loop {
            wire.send(&said)?;
            if let Some(agreed) = handshake.agreed() {
                break agreed.clone();
            }
            let mut bytes = vec![0; handshake.wants()];
            incoming.fill(&*wire, &mut bytes, NBD_HANDSHAKE_MS)?;
            said = handshake.receive(&bytes)?;
        };
        let incoming = Mutex::new(incoming);
        let (sending, waiting) = (Mutex::default(), Mutex::default());
        Ok(Self { wire, agreed, incoming, sending, waiting })
    }

    pub(super) fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    pub(super) fn interrupt(&self) {
        self.wire.interrupt();
    }

    /// Fills the buffer. The range must be one that the server takes.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.ask(protocol::CMD_READ, Reply::new(Asked::Bytes, range), buffer).map(drop)
    }

    /// Runs of block status from the beginning of the range.
    pub(super) fn status(&self, context: u32, range: ByteRange) -> Result<Vec<StatusRun>> {
        let reply = Reply::new(Asked::Status(context), range);
        self.ask(protocol::CMD_BLOCK_STATUS, reply, &mut [])
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, command: u16, reply: Reply, place: &mut [u8]) -> Result<Vec<StatusRun>> {
        let range = reply.range;
        let (turn, turns) = bounded(1);
        let cookie = self.register(Request { reply, buffer: None, turn })?;
        let length = u32::try_from(range.length).expect("a request is small");
        let sent = {
            let _whole = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
            self.wire.send(&request(command, cookie, range.offset, length))
        };
        if let Err(error) = sent {
            let _told_by_the_turn = self.lose(&error);
        }
        self.await_turn(cookie, &turns, place)
    }

    fn register(&self, request: Request) -> Result<u64> {
        let mut waiting = self.waiting();
        if let Some(error) = &waiting.lost {
            return Err(error.clone());
        }
        waiting.cookie += 1;
        let cookie = waiting.cookie;
        waiting.requests.insert(cookie, request);
        Ok(cookie)
    }

    fn await_turn(
        &self,
        cookie: u64,
        turns: &Turns<Turn>,
        place: &mut [u8],
    ) -> Result<Vec<StatusRun>> {
        let leads = {
            let mut waiting = self.waiting();
            let free = !waiting.led && waiting.requests.contains_key(&cookie);
            waiting.led |= free;
            free
        };
        let turn = if leads { Turn::Lead } else { turns.recv().expect("a request ends once") };
        match turn {
            Turn::Lead => {
                let led = self.lead(cookie, place).map_err(|error| self.lose(&error))?;
                self.hand_on();
                led
            }
            Turn::Ended(ended) => {
                let Answer { buffer, runs } = ended?;
                if let Some(buffer) = buffer {
                    place.copy_from_slice(&buffer);
                }
                Ok(runs)
            }
        }
    }

    /// The one that has waited longest receives from now on.
    fn hand_on(&self) {
        let mut waiting = self.waiting();
        waiting.led = match waiting.requests.first_key_value() {
            // It waits for exactly one turn.
            Some((_, next)) => next.turn.send(Turn::Lead).is_ok(),
            None => false,
        };
    }

    /// Nothing more is possible. Gives the first error for which it is not.
    fn lose(&self, error: &Error) -> Error {
        let mut waiting = self.waiting();
        let error = waiting.lost.get_or_insert_with(|| error.clone()).clone();
        for (_, request) in std::mem::take(&mut waiting.requests) {
            // One that leads hears of it by its own reading.
            let _leads = request.turn.try_send(Turn::Ended(Err(error.clone())));
        }
        error
    }

    /// Receives until the reply to `cookie` is whole. The outer error ends the connection.
    fn lead(&self, cookie: u64, place: &mut [u8]) -> Result<Result<Vec<StatusRun>>> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &self.waiting().lost {
            return Err(error.clone());
        }
        loop {
            let chunk = self.head(&mut incoming)?;
            self.body(&mut incoming, &chunk, cookie, place)?;
            if !chunk.done {
                continue;
            }
            let Request { reply, buffer, turn } =
                self.waiting().requests.remove(&chunk.cookie).ok_or_else(foreign)?;
            let ended = reply.finish()?;
            if chunk.cookie == cookie {
                if let (Some(buffer), true) = (buffer, ended.is_ok()) {
                    place.copy_from_slice(&buffer);
                }
                return Ok(ended);
            }
            let ended = ended.map(|runs| Answer { buffer, runs });
            // It waits for exactly one turn.
            let _heard = turn.send(Turn::Ended(ended));
        }
    }

    fn head(&self, incoming: &mut Incoming) -> Result<Chunk> {
        let mut head = [0; protocol::SIMPLE_REPLY_BYTES];
        incoming.fill(&*self.wire, &mut head, NBD_SILENCE_MS)?;
        match ReplyHead::decode(&head).ok_or_else(foreign)? {
            ReplyHead::Chunk { cookie, flags, kind } if self.agreed.structured => {
                let mut length = [0; 4];
                incoming.fill(&*self.wire, &mut length, NBD_SILENCE_MS)?;
                let (length, done) =
                    (u32::from_be_bytes(length), flags & protocol::REPLY_FLAG_DONE != 0);
                Ok(Chunk { cookie, kind, length, done })
            }
            ReplyHead::Chunk { .. } => Err(foreign()),
            ReplyHead::Simple { cookie, error } => self.simple(cookie, error),
        }
    }

    /// A simple reply as the chunk that it would be.
    fn simple(&self, cookie: u64, error: u32) -> Result<Chunk> {
        let mut waiting = self.waiting();
        let request = waiting.requests.get_mut(&cookie).ok_or_else(foreign)?;
        let mut chunk = Chunk { cookie, kind: protocol::REPLY_NONE, length: 0, done: true };
        if error != 0 {
            request.reply.failed(error, String::new());
        } else if request.reply.asked == Asked::Bytes && !self.agreed.structured {
            chunk.kind = SIMPLE_DATA;
        } else {
            return Err(foreign());
        }
        Ok(chunk)
    }

    /// Takes the body of a chunk.
    fn body(
        &self,
        incoming: &mut Incoming,
        chunk: &Chunk,
        own: u64,
        place: &mut [u8],
    ) -> Result<()> {
        let length = chunk.length as usize;
        self.with(chunk, Reply::count_chunk)?;
        let wire = &*self.wire;
        match chunk.kind {
            protocol::REPLY_NONE if length == 0 && chunk.done => Ok(()),
            SIMPLE_DATA => {
                let range = self.with(chunk, |reply| Ok(reply.range))?;
                self.bytes(incoming, chunk, range, (own, place))
            }
            protocol::REPLY_OFFSET_DATA if length > 8 => {
                let mut offset = [0; 8];
                incoming.fill(wire, &mut offset, NBD_SILENCE_MS)?;
                let range = (u64::from_be_bytes(offset), (length - 8) as u64);
                self.bytes(incoming, chunk, ByteRange::new(range.0, range.1), (own, place))
            }
            protocol::REPLY_OFFSET_HOLE if length == HOLE_BYTES => {
                let mut body = [0; HOLE_BYTES];
                incoming.fill(wire, &mut body, NBD_SILENCE_MS)?;
                let (offset, count) = decode_hole(&body);
                self.zeros(chunk, ByteRange::new(offset, count.into()), (own, place))
            }
            protocol::REPLY_BLOCK_STATUS if length <= NBD_STATUS_BYTES_MAX => {
                let body = incoming.short(wire, length)?;
                let (context, runs) = decode_status(&body).ok_or_else(foreign)?;
                self.with(chunk, |reply| reply.status(context, &runs))
            }
            kind if kind & protocol::REPLY_ERROR_BIT != 0 && length <= NBD_ERROR_BYTES_MAX => {
                let body = incoming.short(wire, length)?;
                let (number, words) = decode_error(&body).ok_or_else(foreign)?;
                self.with(chunk, |reply| {
                    reply.failed(number, words);
                    Ok(())
                })
            }
            _ => Err(foreign()),
        }
    }

    /// The reply that a chunk belongs to.
    fn with<T>(&self, chunk: &Chunk, work: impl FnOnce(&mut Reply) -> Result<T>) -> Result<T> {
        let mut waiting = self.waiting();
        work(&mut waiting.requests.get_mut(&chunk.cookie).ok_or_else(foreign)?.reply)
    }

    fn bytes(
        &self,
        incoming: &mut Incoming,
        chunk: &Chunk,
        range: ByteRange,
        (own, place): (u64, &mut [u8]),
    ) -> Result<()> {
        let (at, buffer) = self.take_place(chunk, range, own)?;
        match buffer {
            None => incoming.fill(&*self.wire, &mut place[at], NBD_SILENCE_MS),
            Some(mut buffer) => {
                incoming.fill(&*self.wire, &mut buffer[at], NBD_SILENCE_MS)?;
                self.give_place(chunk, buffer)
            }
        }
    }

    fn zeros(&self, chunk: &Chunk, range: ByteRange, (own, place): (u64, &mut [u8])) -> Result<()> {
        let (at, buffer) = self.take_place(chunk, range, own)?;
        match buffer {
            None => place[at].fill(0),
            Some(mut buffer) => {
                buffer[at].fill(0);
                self.give_place(chunk, buffer)?;
            }
        }
        Ok(())
    }

    /// Where bytes of a chunk go: `None` is the leader's own place.
    fn take_place(
        &self,
        chunk: &Chunk,
        range: ByteRange,
        own: u64,
    ) -> Result<(std::ops::Range<usize>, Option<AlignedBuffer>)> {
        let mut waiting = self.waiting();
        let request = waiting.requests.get_mut(&chunk.cookie).ok_or_else(foreign)?;
        let at = request.reply.place(range.offset, range.length)?;
        let buffer = match request.buffer.take() {
            None if chunk.cookie == own => None,
            None => {
                // Bounded by what we asked for.
                let length = usize::try_from(request.reply.range.length).expect("small");
                Some(AlignedBuffer::zeroed(length))
            }
            held => held,
        };
        Ok((at, buffer))
    }

    fn give_place(&self, chunk: &Chunk, buffer: AlignedBuffer) -> Result<()> {
        let mut waiting = self.waiting();
        let request = waiting.requests.get_mut(&chunk.cookie).ok_or_else(foreign)?;
        request.buffer = Some(buffer);
        Ok(())
    }
}

/// The data of a simple reply: no server says this kind.
const SIMPLE_DATA: u16 = protocol::REPLY_ERROR_BIT - 1;

fn foreign() -> Error {
    Error::format(
        "expected the reply to one of our NBD requests, found something else: the server or the \
         way to it is faulty",
    )
}

/// Bytes received and not yet used.
#[derive(Debug, Default)]
struct Incoming {
    carry: Vec<u8>,
    used: usize,
}

impl Incoming {
    fn fill(&mut self, wire: &dyn Wire, place: &mut [u8], silence_ms: u64) -> Result<()> {
        let held = (self.carry.len() - self.used).min(place.len());
        place[..held].copy_from_slice(&self.carry[self.used..][..held]);
        self.used += held;
        let mut rest = &mut place[held..];
        while !rest.is_empty() {
            if rest.len() >= CARRY_BYTES {
                let count = wire.receive(rest, true, silence_ms)?;
                rest = &mut rest[checked(count)?..];
                continue;
            }
            self.carry.resize(CARRY_BYTES, 0);
            let count = checked(wire.receive(&mut self.carry, false, silence_ms)?)?;
            self.carry.truncate(count);
            self.used = count.min(rest.len());
            rest[..self.used].copy_from_slice(&self.carry[..self.used]);
            rest = &mut rest[self.used..];
        }
        Ok(())
    }

    /// A body whose length has been checked.
    fn short(&mut self, wire: &dyn Wire, length: usize) -> Result<Vec<u8>> {
        let mut body = vec![0; length];
        self.fill(wire, &mut body, NBD_SILENCE_MS)?;
        Ok(body)
    }
}

fn checked(count: usize) -> Result<usize> {
    if count == 0 { Err(lost("the server closed it")) } else { Ok(count) }
}
