//! One NBD connection as a state machine on bytes.
//!
//! | phase | bytes that arrive | next |
//! |---|---|---|
//! | `ClientFlags` | 4: the client's flags | `Options`; unknown flag: `Ended` |
//! | `Options` | an option | by `handshake`: `Options`, `Requests`, `TlsBegins`, `Ended` |
//! | `SkipOption` | payload of an option that is too long, thrown away | `Options` |
//! | `Requests` | a request, whole unless a large write | itself, `Payload`, `Drain`, `Ended` |
//! | `Payload` | payload of a large write, straight into its buffer | `Requests` |
//! | `Drain` | payload of a refused write, thrown away | `Requests` |
//! | `TlsBegins` | none before TLS is established | `Options`, by `tls_established` |
//! | `Ended` | none | |
//!
//! The driver puts bytes into `space` and reports them with `received`, asks `next_event` until it
//! has none, gives every ticket back with an answer, sends `outgoing`, and closes when `finished`.
//!
//! Guarantees: one answer for each request; the stream stays in step through every refusal; at
//! most `NBD_IN_FLIGHT_MAX` requests and `NBD_IN_FLIGHT_BYTES_MAX` bytes are handed out at a time;
//! a client that does not read its replies is not served further; memory is bounded by these.
//! Does not know: sockets, the clock, threads.

use std::io::IoSlice;
use std::sync::Arc;

use super::exports::{Export, ExportTable};
use super::handshake::{Handshake, Step, Surroundings};
use super::identity::ClientIdentity;
use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::transmission::{Statuses, Ticket, Transmission, Verdict};
use crate::device::{AlignedBuffer, Payload};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::nbd as protocol;
use crate::format::nbd::{OptionHeader, Request, Style};
use crate::limits;
use crate::volume::service::{Command, Outcome, StatusContext};

/// Whether the bytes of a session travel in TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// In the clear, by policy: `STARTTLS` is refused.
    Off,
    /// In the clear until `STARTTLS`, and nothing else is answered before it.
    Required,
    /// What the session sees was inside TLS.
    Done,
}

/// What a session wants of its driver.
#[derive(Debug)]
pub enum Event {
    /// Give the command to the volume and the outcome to `answer`. A read may be answered at
    /// once with `answer_in_place`.
    Request { ticket: Ticket, command: Command },
    /// Ask the volume for each of the contexts and give the lists to `answer_status`.
    Status { ticket: Ticket, contexts: Vec<StatusContext>, range: ByteRange, limit: usize },
    /// Send what is outgoing, then speak TLS, and tell with `tls_established` when that is done:
    /// nothing agreed so far holds inside.
    StartTls,
}

/// Payloads up to this size are gathered among the incoming bytes and copied once into a buffer of
/// their own; larger ones are received into theirs.
const GATHER_BYTES: usize = 32 << 10;
/// While payloads are large, so many bytes of the next are gathered with its header at most.
const NARROW_BYTES: usize = 4 << 10;

#[derive(Debug)]
enum Phase {
    ClientFlags,
    Options,
    SkipOption { left: u32 },
    Requests,
    Payload(Partial),
    Drain { left: u32 },
    TlsBegins,
    Ended,
}

/// A large write of which a part has arrived.
#[derive(Debug)]
struct Partial {
    ticket: Ticket,
    offset: u64,
    force_unit_access: bool,
    buffer: AlignedBuffer,
    filled: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    exports: Arc<ExportTable>,
    tls: Tls,
    client: Option<ClientIdentity>,
    phase: Phase,
    handshake: Handshake,
    transmission: Option<Transmission>,
    incoming: Incoming,
    outgoing: Outgoing,
    /// How many bytes the next receive may gather.
    window: usize,
    options: u32,
    handshake_bytes: u64,
    requests: u64,
    in_flight: usize,
    in_flight_bytes: usize,
    stopping: bool,
    input_over: bool,
    output_over: bool,
}

/// What one step through the stream came to.
enum Turn {
    Event(Event),
    /// On to the next message.
    Went,
    /// More bytes, or answers, come first.
    Waits,
}

impl Session {
    /// A session that has greeted its client: the greeting is outgoing already.
    #[must_use]
    pub fn new(exports: Arc<ExportTable>, tls: Tls) -> Self {
        let mut outgoing = Outgoing::default();
        outgoing.push(&protocol::greeting());
        Self {
            exports,
            tls,
            client: None,
            phase: Phase::ClientFlags,
            handshake: Handshake::default(),
            transmission: None,
            incoming: Incoming::new(),
            outgoing,
            window: limits::NBD_INCOMING_BYTES,
            options: 0,
            handshake_bytes: 0,
            requests: 0,
            in_flight: 0,
            in_flight_bytes: 0,
            stopping: false,
            input_over: false,
            output_over: false,
        }
    }

    /// Where the next bytes of the client go; empty while none are wanted.
    pub fn space(&mut self) -> &mut [u8] {
        match &mut self.phase {
            _ if self.input_over => &mut [],
            Phase::Payload(partial) => &mut partial.buffer[partial.filled..],
            Phase::Ended | Phase::TlsBegins => &mut [],
            _ => self.incoming.space(self.window),
        }
    }

    /// `count` bytes were put into `space`.
    pub fn received(&mut self, count: usize) {
        match &mut self.phase {
            Phase::Payload(partial) => {
                partial.filled += count;
                assert!(partial.filled <= partial.buffer.len(), "more than there was space");
            }
            _ => self.incoming.received(count),
        }
    }

    /// From now on the bytes are those inside TLS. `client` is who the client has shown to be.
    pub fn tls_established(&mut self, client: Option<ClientIdentity>) {
        assert!(matches!(self.phase, Phase::TlsBegins), "the session asked for TLS");
        self.tls = Tls::Done;
        self.client = client;
        self.handshake = self.handshake.inside_tls();
        self.phase = Phase::Options;
    }

    /// The client sends nothing more. What it has sent is still answered.
    pub fn input_ended(&mut self) {
        self.input_over = true;
        if matches!(self.phase, Phase::TlsBegins) {
            self.end();
        }
    }

    /// From now on everything is refused as shutting down; what is in flight is still answered.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// The next thing to do. `None`: receive, answer or send first.
    pub fn next_event(&mut self) -> Option<Event> {
        while self.outgoing.pending() < limits::NBD_OUTGOING_BYTES {
            let turn = match self.phase {
                Phase::ClientFlags => self.client_flags(),
                Phase::Options => self.option(),
                Phase::SkipOption { .. } | Phase::Drain { .. } => self.throw_away(),
                Phase::Requests => self.request(),
                Phase::Payload(_) => self.payload(),
                Phase::TlsBegins | Phase::Ended => return None,
            };
            match turn {
                Turn::Went => {}
                Turn::Event(event) => return Some(event),
                Turn::Waits if self.input_over && self.answers_due() == 0 => self.end(),
                Turn::Waits => return None,
            }
        }
        None
    }

    /// Answers a request. The bytes of a read come in the outcome.
    pub fn answer(&mut self, ticket: Ticket, outcome: Outcome) {
        self.landed(&ticket);
        self.transmitting().answer(ticket, outcome);
    }

    /// Answers a read by letting `fill` write into the reply; gives the ticket back when `fill`
    /// could not.
    pub fn answer_in_place(
        &mut self,
        ticket: Ticket,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<Ticket> {
        if !self.transmitting().read_in_place(&ticket, fill) {
            return Some(ticket);
        }
        self.landed(&ticket);
        None
    }

    /// Answers a block status with the runs of each context that it asked for.
    pub fn answer_status(&mut self, ticket: Ticket, outcome: Result<Statuses>) {
        self.landed(&ticket);
        self.transmitting().answer_status(ticket, outcome);
    }

    /// The export, once it is chosen.
    #[must_use]
    pub fn export(&self) -> Option<&Arc<Export>> {
        self.transmission.as_ref().map(|transmission| &transmission.export)
    }

    /// Bytes that wait to be sent.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.outgoing.pending()
    }

    /// The bytes to send, as at most `count` slices.
    #[must_use]
    pub fn outgoing(&self, count: usize) -> Vec<IoSlice<'_>> {
        self.outgoing.slices(count)
    }

    /// The first `count` bytes of `outgoing` are sent.
    pub fn sent(&mut self, count: usize) {
        self.outgoing.sent(count);
    }

    /// Requests handed out and not yet answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Requests that have arrived so far, refused ones among them.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// The client takes no more replies: none are kept for it.
    pub fn output_ended(&mut self) {
        self.end();
        self.output_over = true;
    }

    /// Nothing has happened for a while: gives back memory that a burst needed.
    pub fn rest(&mut self) {
        self.outgoing.rest();
    }

    /// Whether the connection can be closed: nothing more is taken, in flight or to be sent.
    #[must_use]
    pub fn finished(&self) -> bool {
        let removed = self.export().is_some_and(|export| export.removed());
        let over = matches!(self.phase, Phase::Ended) || self.stopping || removed;
        let sent = self.outgoing.pending() == 0 || self.output_over;
        over && self.answers_due() == 0 && sent
    }

    /// Whether no export is chosen yet.
    #[must_use]
    pub fn handshaking(&self) -> bool {
        self.transmission.is_none()
    }

    /// Requests that the volume is working on.
    fn answers_due(&self) -> usize {
        self.in_flight - usize::from(matches!(self.phase, Phase::Payload(_)))
    }

    fn end(&mut self) {
        if let Phase::Payload(partial) = std::mem::replace(&mut self.phase, Phase::Ended) {
            self.landed(&partial.ticket);
        }
        self.incoming.clear();
    }

    /// Takes `N` bytes off the stream, if they are there.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.incoming.readable().first_chunk::<N>()?;
        self.incoming.consume(N);
        Some(bytes)
    }

    fn throw_away(&mut self) -> Turn {
        let (Phase::SkipOption { left } | Phase::Drain { left }) = &mut self.phase else {
            unreachable!("only these phases throw bytes away")
        };
        let step = self.incoming.readable().len().min(*left as usize);
        self.incoming.consume(step);
        *left -= step as u32;
        if *left > 0 {
            return Turn::Waits;
        }
        let skipped_option = matches!(self.phase, Phase::SkipOption { .. });
        self.phase = if skipped_option { Phase::Options } else { Phase::Requests };
        Turn::Went
    }

    fn client_flags(&mut self) -> Turn {
        let Some(bytes) = self.take::<{ protocol::CLIENT_FLAGS_BYTES }>() else {
            return Turn::Waits;
        };
        let flags = u32::from_be_bytes(bytes);
        let (fixed, no_zeroes) =
            (u32::from(protocol::FIXED_NEWSTYLE), u32::from(protocol::NO_ZEROES));
        if flags & !(fixed | no_zeroes) != 0 {
            return self.hang_up();
        }
        self.handshake.fixed = flags & fixed != 0;
        self.handshake.no_zeroes = flags & no_zeroes != 0;
        self.phase = Phase::Options;
        Turn::Went
    }

    fn option(&mut self) -> Turn {
        let readable = self.incoming.readable();
        let Some(header) = readable.first_chunk() else { return Turn::Waits };
        let Some(OptionHeader { option, length }) = OptionHeader::decode(header) else {
            return self.hang_up();
        };
        let bytes = protocol::OPTION_HEADER_BYTES as u64 + u64::from(length);
        let fits = self.handshake_bytes.saturating_add(bytes) <= limits::NBD_HANDSHAKE_BYTES_MAX;
        let known = self.handshake.fixed || option == protocol::OPT_EXPORT_NAME;
        if !fits || !known || self.options >= limits::NBD_OPTIONS_MAX {
            return self.hang_up();
        }
        if length > limits::NBD_OPTION_BYTES_MAX {
            if option == protocol::OPT_EXPORT_NAME {
                return self.hang_up();
            }
            self.incoming.consume(protocol::OPTION_HEADER_BYTES);
            self.count_option(bytes);
            Handshake::too_long(option, self.tls, &mut self.outgoing);
            self.phase = Phase::SkipOption { left: length };
            return Turn::Went;
        }
        let whole = protocol::OPTION_HEADER_BYTES + length as usize;
        let Some(payload) = readable.get(protocol::OPTION_HEADER_BYTES..whole) else {
            return Turn::Waits;
        };
        let exports = self.exports.seen_by(self.client.as_ref());
        let around = Surroundings { exports, tls: self.tls, stopping: self.stopping };
        let step = self.handshake.option(option, payload, &around, &mut self.outgoing);
        self.incoming.consume(whole);
        self.count_option(bytes);
        self.follow(step)
    }

    fn count_option(&mut self, bytes: u64) {
        self.options += 1;
        self.handshake_bytes += bytes;
    }

    fn follow(&mut self, step: Step) -> Turn {
        match step {
            Step::Stay => {}
            Step::End => self.end(),
            Step::Transmit(chosen) => {
                self.transmission = Some(Transmission::new(chosen));
                self.phase = Phase::Requests;
            }
            // Bytes sent in the clear behind STARTTLS would pass for bytes from inside TLS.
            Step::StartTls if !self.incoming.readable().is_empty() => return self.hang_up(),
            Step::StartTls => {
                self.phase = Phase::TlsBegins;
                return Turn::Event(Event::StartTls);
            }
        }
        Turn::Went
    }

    /// The client broke the protocol, or asks too much: nothing more of it is read.
    fn hang_up(&mut self) -> Turn {
        self.end();
        Turn::Went
    }

    /// The next request; `None` if it is not all there, `Some(None)` if it is none.
    fn decode(&self) -> Option<Option<Request>> {
        let readable = self.incoming.readable();
        match self.transmission().style {
            Style::Extended => readable.first_chunk().map(Request::decode_extended),
            Style::Simple | Style::Structured => readable.first_chunk().map(Request::decode),
        }
    }

    fn request(&mut self) -> Turn {
        let Some(decoded) = self.decode() else { return Turn::Waits };
        let Some(request) = decoded else { return self.hang_up() };
        let transmission = self.transmission();
        let extended = transmission.style == Style::Extended;
        if extended && request.payload > u64::from(limits::NBD_REQUEST_BYTES_MAX) {
            return self.hang_up();
        }
        if !self.may_take(&request) {
            return Turn::Waits;
        }
        let header = Request::header_bytes(transmission.style);
        let (payload, payload_max) = (request.payload as usize, transmission.filter_bytes_max());
        let filtered = extended
            && request.command == protocol::CMD_BLOCK_STATUS
            && (1..=payload_max).contains(&payload);
        let verdict = if filtered {
            let Some(filter) = self.incoming.readable().get(header..header + payload) else {
                return Turn::Waits;
            };
            transmission.judge_filtered(&request, filter, self.stopping)
        } else {
            transmission.judge(&request, self.stopping)
        };
        if let Verdict::Write { ticket, force_unit_access } = verdict {
            return self.write(&request, ticket, force_unit_access);
        }
        self.incoming.consume(if filtered { header + payload } else { header });
        self.requests += 1;
        let left = if filtered { 0 } else { request.payload };
        self.follow_verdict(&request, verdict, left)
    }

    /// Does what was found about a request that is no write to be done. `left` bytes of its
    /// payload have not been taken off the stream.
    fn follow_verdict(&mut self, request: &Request, verdict: Verdict, left: u64) -> Turn {
        let transmission = self.transmission.as_ref().expect("requests follow the handshake");
        match verdict {
            Verdict::Do(ticket, command) => {
                self.took(&ticket);
                return Turn::Event(Event::Request { ticket, command });
            }
            Verdict::Status { ticket, contexts, range, limit } => {
                self.took(&ticket);
                return Turn::Event(Event::Status { ticket, contexts, range, limit });
            }
            Verdict::Succeed => transmission.succeed(request, &mut self.outgoing),
            Verdict::Refuse(refusal) => {
                transmission.refuse(request, refusal, &mut self.outgoing);
            }
            Verdict::Disconnect => self.end(),
            Verdict::Write { .. } => unreachable!("handled before"),
        }
        if left > u64::from(limits::NBD_DRAIN_BYTES_MAX) {
            return self.hang_up();
        }
        if left > 0 && !matches!(self.phase, Phase::Ended) {
            self.phase = Phase::Drain { left: left as u32 };
        }
        Turn::Went
    }

    fn transmission(&self) -> &Transmission {
        self.transmission.as_ref().expect("requests follow the handshake")
    }

    fn write(&mut self, request: &Request, ticket: Ticket, force_unit_access: bool) -> Turn {
        let header = Request::header_bytes(self.transmission().style);
        let arrived = &self.incoming.readable()[header..];
        let length = request.length as usize;
        let whole = arrived.get(..length);
        if whole.is_none() && length <= GATHER_BYTES {
            return Turn::Waits;
        }
        let filled = arrived.len().min(length);
        let buffer = match whole {
            Some(whole) => AlignedBuffer::from_slice(whole),
            None => {
                let mut buffer = AlignedBuffer::zeroed(length);
                buffer[..filled].copy_from_slice(&arrived[..filled]);
                buffer
            }
        };
        self.incoming.consume(header + filled);
        self.requests += 1;
        self.took(&ticket);
        self.window = if length > GATHER_BYTES { NARROW_BYTES } else { limits::NBD_INCOMING_BYTES };
        let partial = Partial { ticket, offset: request.offset, force_unit_access, buffer, filled };
        if filled < length {
            self.phase = Phase::Payload(partial);
            return Turn::Went;
        }
        Turn::Event(partial.into_event())
    }

    fn payload(&mut self) -> Turn {
        if !matches!(&self.phase, Phase::Payload(partial) if partial.filled == partial.buffer.len())
        {
            return Turn::Waits;
        }
        match std::mem::replace(&mut self.phase, Phase::Requests) {
            Phase::Payload(partial) => Turn::Event(partial.into_event()),
            phase => unreachable!("{phase:?} was looked at above"),
        }
    }

    /// Whether one more request fits beside those in flight. The first always does.
    fn may_take(&self, request: &Request) -> bool {
        let carries = matches!(request.command, protocol::CMD_READ | protocol::CMD_WRITE);
        let bytes = if carries { request.length as usize } else { 0 };
        let fits = self.in_flight_bytes.saturating_add(bytes) <= limits::NBD_IN_FLIGHT_BYTES_MAX;
        self.in_flight == 0 || (self.in_flight < limits::NBD_IN_FLIGHT_MAX && fits)
    }

    fn took(&mut self, ticket: &Ticket) {
        self.in_flight += 1;
        self.in_flight_bytes += ticket.payload_bytes();
    }

    fn landed(&mut self, ticket: &Ticket) {
        assert!(self.in_flight > 0, "an answer belongs to a request in flight");
        self.in_flight -= 1;
        self.in_flight_bytes -= ticket.payload_bytes();
    }

    fn transmitting(&mut self) -> Answering<'_> {
        let transmission = self.transmission.as_ref().expect("tickets come from transmission");
        Answering { transmission, out: &mut self.outgoing }
    }
}

/// The two halves that an answer needs.
struct Answering<'a> {
    transmission: &'a Transmission,
    out: &'a mut Outgoing,
}

impl Answering<'_> {
    fn answer(self, ticket: Ticket, outcome: Outcome) {
        self.transmission.answer(ticket, outcome, self.out);
    }

    fn read_in_place(self, ticket: &Ticket, fill: impl FnOnce(&mut [u8]) -> bool) -> bool {
        self.transmission.read_in_place(ticket, fill, self.out)
    }

    fn answer_status(self, ticket: Ticket, outcome: Result<Statuses>) {
        self.transmission.answer_status(&ticket, outcome, self.out);
    }
}

impl Partial {
    fn into_event(self) -> Event {
        let command = Command::Write {
            offset: self.offset,
            data: Payload::new(self.buffer),
            force_unit_access: self.force_unit_access,
        };
        Event::Request { ticket: self.ticket, command }
    }
}
