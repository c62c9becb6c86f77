//! What a request must satisfy, and how each kind of it is answered.
//!
//! | command | flags | outside the volume | read-only export |
//! |---|---|---|---|
//! | read | FUA, DF | `EINVAL` | |
//! | write | FUA | `ENOSPC` | `EPERM` |
//! | write zeroes | FUA, NO_HOLE | `ENOSPC` | `EPERM` |
//! | trim | FUA | `EINVAL` | `EPERM` |
//! | cache | FUA | `EINVAL` | `EPERM` |
//! | block status | FUA, REQ_ONE | `EINVAL` | |
//! | flush | FUA | offset and length must be zero | |
//!
//! FUA means nothing to a command that writes nothing, but the specification has it accepted
//! everywhere. Any other flag or command, and a range that is not a multiple of the sector size, is
//! `EINVAL`. A request of no bytes is answered with success and does nothing.
//!
//! Guarantees: a request handed on lies inside the volume and is aligned and not empty.
//! Does not know: how requests are framed, what is in flight.

use std::sync::Arc;

use super::contexts;
use super::exports::Export;
use super::handshake::Chosen;
use super::outgoing::Outgoing;
use crate::device::AlignedBuffer;
use crate::error::{Error, ErrorKind};
use crate::extent::ByteRange;
use crate::format::nbd as protocol;
use crate::format::nbd::Request;
use crate::limits;
use crate::volume::service::{Command, StatusContext, StatusExtent};

/// A request that waits for its answer. Given back with the answer, so each is answered once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request that is not answered stays in flight for ever"]
pub struct Ticket {
    cookie: u64,
    kind: Kind,
    offset: u64,
    length: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Status,
    /// Answered by success or an error alone.
    Plain,
}

impl Ticket {
    /// Bytes of payload that the request holds until it is answered.
    pub(super) fn payload_bytes(&self) -> usize {
        self.length as usize
    }
}

/// What becomes of a request.
pub(super) enum Verdict {
    Do(Ticket, Command),
    /// Its payload, `length` bytes, follows on the stream.
    Write {
        ticket: Ticket,
        force_unit_access: bool,
    },
    Status {
        ticket: Ticket,
        range: ByteRange,
        limit: usize,
    },
    /// Nothing to do.
    Succeed,
    Refuse(Refusal),
    Disconnect,
}

/// An error of the protocol and words for a person.
pub(super) type Refusal = (u32, &'static str);

const SHUT_DOWN: Refusal = (protocol::ESHUTDOWN, "the export is being shut down");

/// The transmission phase of one connection.
#[derive(Debug)]
pub(super) struct Transmission {
    pub(super) export: Arc<Export>,
    pub(super) contexts: Vec<StatusContext>,
    structured: bool,
    size: u64,
    sector_size: u32,
    read_only: bool,
}

impl Transmission {
    pub(super) fn new(chosen: Chosen) -> Self {
        let service = chosen.export.service();
        Self {
            size: service.size(),
            sector_size: service.sector_size(),
            read_only: service.read_only(),
            export: chosen.export,
            contexts: chosen.contexts,
            structured: chosen.structured,
        }
    }

    pub(super) fn judge(&self, request: &Request, stopping: bool) -> Verdict {
        if request.command == protocol::CMD_DISC {
            return Verdict::Disconnect;
        }
        if stopping || self.export.removed() {
            return Verdict::Refuse(SHUT_DOWN);
        }
        match self.check(request) {
            Err(refusal) => Verdict::Refuse(refusal),
            Ok(()) if request.command == protocol::CMD_FLUSH => {
                Verdict::Do(ticket(request, Kind::Plain, 0), Command::Flush)
            }
            Ok(()) if request.length == 0 => Verdict::Succeed,
            Ok(()) => accept(request),
        }
    }

    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let (allowed, writes) = self.rules(request.command)?;
        if request.flags & !(allowed | protocol::CMD_FLAG_FUA) != 0 {
            return Err((protocol::EINVAL, "a flag is not known for this command"));
        }
        if writes && self.read_only {
            return Err((protocol::EPERM, "the export is read-only"));
        }
        if request.command == protocol::CMD_FLUSH {
            let empty = request.offset == 0 && request.length == 0;
            return if empty { Ok(()) } else { Err((protocol::EINVAL, "a flush has no range")) };
        }
        let sized = matches!(request.command, protocol::CMD_READ | protocol::CMD_WRITE);
        if sized && request.length > limits::NBD_REQUEST_BYTES_MAX {
            let reads = self.structured && request.command == protocol::CMD_READ;
            let error = if reads { protocol::EOVERFLOW } else { protocol::EINVAL };
            return Err((error, "the request is longer than the maximum block size"));
        }
        let end = request.offset.checked_add(u64::from(request.length));
        if end.is_none_or(|end| end > self.size) {
            let grows = matches!(request.command, protocol::CMD_WRITE | protocol::CMD_WRITE_ZEROES);
            let error = if grows { protocol::ENOSPC } else { protocol::EINVAL };
            return Err((error, "the range lies outside the export"));
        }
        let sector = u64::from(self.sector_size);
        if (request.offset | u64::from(request.length)) & (sector - 1) != 0 {
            return Err((protocol::EINVAL, "the range is not aligned to the minimum block size"));
        }
        Ok(())
    }

    /// The flags a command may carry, and whether it changes the volume.
    fn rules(&self, command: u16) -> Result<(u16, bool), Refusal> {
        match command {
            protocol::CMD_READ if self.structured => Ok((protocol::CMD_FLAG_DF, false)),
            protocol::CMD_READ | protocol::CMD_FLUSH => Ok((0, false)),
            protocol::CMD_WRITE | protocol::CMD_TRIM | protocol::CMD_CACHE => Ok((0, true)),
            protocol::CMD_WRITE_ZEROES => Ok((protocol::CMD_FLAG_NO_HOLE, true)),
            protocol::CMD_BLOCK_STATUS if self.contexts.is_empty() => {
                Err((protocol::EINVAL, "no metadata context was selected"))
            }
            protocol::CMD_BLOCK_STATUS => Ok((protocol::CMD_FLAG_REQ_ONE, false)),
            _ => Err((protocol::EINVAL, "this command is not known here")),
        }
    }

    pub(super) fn succeed(&self, request: &Request, out: &mut Outgoing) {
        match (self.structured, request.command) {
            (true, protocol::CMD_READ) => out.push(&none_chunk(request.cookie)),
            (true, protocol::CMD_BLOCK_STATUS) => {
                self.refuse(request.cookie, (protocol::EINVAL, "the range is empty"), out);
            }
            _ => out.push(&protocol::simple_reply(request.cookie, 0)),
        }
    }

    pub(super) fn refuse(&self, cookie: u64, (error, words): Refusal, out: &mut Outgoing) {
        if !self.structured {
            return out.push(&protocol::simple_reply(cookie, error));
        }
        let length = 6 + words.len() as u32;
        let done = protocol::REPLY_FLAG_DONE;
        out.push(&protocol::chunk_header(done, protocol::REPLY_ERROR, cookie, length));
        out.push(&error.to_be_bytes());
        out.push(&(words.len() as u16).to_be_bytes());
        out.push(words.as_bytes());
    }

    /// Lets `fill` put the bytes of a read into the reply. False leaves no trace.
    pub(super) fn read_in_place(
        &self,
        ticket: &Ticket,
        fill: impl FnOnce(&mut [u8]) -> bool,
        out: &mut Outgoing,
    ) -> bool {
        assert_eq!(ticket.kind, Kind::Read, "only a read has bytes to fill");
        let header = self.read_header(ticket, out);
        let filled = fill(out.reserve(ticket.length as usize));
        if !filled {
            out.take_back(ticket.length as usize);
            out.take_back(header);
        }
        filled
    }

    /// Answers anything but a block status.
    pub(super) fn answer(
        &self,
        ticket: Ticket,
        outcome: crate::error::Result<Option<AlignedBuffer>>,
        out: &mut Outgoing,
    ) {
        match (ticket.kind, outcome) {
            (_, Err(error)) => self.refuse(ticket.cookie, translate(&error), out),
            (Kind::Read, Ok(Some(bytes))) => {
                assert_eq!(bytes.len(), ticket.length as usize, "a read answers what was asked");
                self.read_header(&ticket, out);
                out.push_buffer(bytes);
            }
            (Kind::Plain, Ok(_)) => out.push(&protocol::simple_reply(ticket.cookie, 0)),
            (kind, Ok(_)) => unreachable!("{kind:?} was answered without its contents"),
        }
    }

    /// Header of a successful read; returns its length.
    fn read_header(&self, ticket: &Ticket, out: &mut Outgoing) -> usize {
        if !self.structured {
            out.push(&protocol::simple_reply(ticket.cookie, 0));
            return protocol::SIMPLE_REPLY_BYTES;
        }
        let (done, data) = (protocol::REPLY_FLAG_DONE, protocol::REPLY_OFFSET_DATA);
        out.push(&protocol::chunk_header(done, data, ticket.cookie, ticket.length + 8));
        out.push(&ticket.offset.to_be_bytes());
        protocol::CHUNK_HEADER_BYTES + 8
    }

    /// Answers a block status with one list of runs for each selected context, in their order.
    pub(super) fn answer_status(
        &self,
        ticket: &Ticket,
        outcome: crate::error::Result<Vec<Vec<StatusExtent>>>,
        out: &mut Outgoing,
    ) {
        let lists = match outcome {
            Ok(lists) => lists,
            Err(error) => return self.refuse(ticket.cookie, translate(&error), out),
        };
        assert_eq!(lists.len(), self.contexts.len(), "one list for each context");
        for (index, (&context, extents)) in self.contexts.iter().zip(&lists).enumerate() {
            let runs = runs(context, extents, ticket.length);
            let done = if index + 1 == lists.len() { protocol::REPLY_FLAG_DONE } else { 0 };
            let length = 4 + 8 * runs.len() as u32;
            let kind = protocol::REPLY_BLOCK_STATUS;
            out.push(&protocol::chunk_header(done, kind, ticket.cookie, length));
            out.push(&contexts::identifier(context).to_be_bytes());
            for (run, flags) in runs {
                out.push(&run.to_be_bytes());
                out.push(&flags.to_be_bytes());
            }
        }
    }
}

fn ticket(request: &Request, kind: Kind, length: u32) -> Ticket {
    Ticket { cookie: request.cookie, kind, offset: request.offset, length }
}

/// What a request that was checked asks for.
fn accept(request: &Request) -> Verdict {
    let range = ByteRange::new(request.offset, u64::from(request.length));
    let force_unit_access = request.flags & protocol::CMD_FLAG_FUA != 0;
    let plain = |command| Verdict::Do(ticket(request, Kind::Plain, 0), command);
    match request.command {
        protocol::CMD_READ => {
            Verdict::Do(ticket(request, Kind::Read, request.length), Command::Read { range })
        }
        protocol::CMD_WRITE => {
            let ticket = ticket(request, Kind::Plain, request.length);
            Verdict::Write { ticket, force_unit_access }
        }
        protocol::CMD_TRIM => plain(Command::Trim { range, force_unit_access }),
        protocol::CMD_CACHE => plain(Command::Cache { range }),
        protocol::CMD_WRITE_ZEROES => {
            let may_deallocate = request.flags & protocol::CMD_FLAG_NO_HOLE == 0;
            plain(Command::WriteZeroes { range, may_deallocate, force_unit_access })
        }
        protocol::CMD_BLOCK_STATUS => {
            let one = request.flags & protocol::CMD_FLAG_REQ_ONE != 0;
            let limit = if one { 1 } else { limits::NBD_STATUS_EXTENTS_MAX };
            Verdict::Status { ticket: ticket(request, Kind::Status, request.length), range, limit }
        }
        unknown => unreachable!("command {unknown} was checked before"),
    }
}

/// The runs as they are sent: neighbours of one status joined, clipped to what was asked.
fn runs(context: StatusContext, extents: &[StatusExtent], length: u32) -> Vec<(u32, u32)> {
    assert!(!extents.is_empty(), "a status has one run at least");
    let mut left = u64::from(length);
    let mut runs: Vec<(u32, u32)> = Vec::with_capacity(extents.len());
    for extent in extents {
        assert!(extent.length > 0, "a run has one byte at least");
        let run = extent.length.min(left) as u32;
        left -= u64::from(run);
        let flags = contexts::flags(context, extent);
        match runs.last_mut() {
            Some(last) if last.1 == flags => last.0 += run,
            _ if run > 0 => runs.push((run, flags)),
            _ => {}
        }
    }
    runs
}

/// A failure in words that tell the client nothing about this machine.
fn translate(error: &Error) -> Refusal {
    use rustix::io::Errno;
    const FULL: [Errno; 3] = [Errno::NOSPC, Errno::DQUOT, Errno::FBIG];
    let errno = error.errno().map(Errno::from_raw_os_error);
    match (error.kind(), errno) {
        (_, Some(errno)) if FULL.contains(&errno) => {
            (protocol::ENOSPC, "the volume's device is full")
        }
        (_, Some(Errno::PERM | Errno::ROFS | Errno::ACCESS)) => {
            (protocol::EPERM, "the volume's device may not be written")
        }
        (ErrorKind::Usage, _) => (protocol::EINVAL, "the volume refused the request"),
        (ErrorKind::Interrupted, _) => SHUT_DOWN,
        (ErrorKind::Link | ErrorKind::Timeout, _) => {
            (protocol::EIO, "the link to the backup is down and the blocks are not here")
        }
        (ErrorKind::Poisoned, _) => {
            (protocol::EIO, "an earlier flush of the volume failed: it takes no more writes")
        }
        _ => (protocol::EIO, "the volume's device failed"),
    }
}

fn none_chunk(cookie: u64) -> [u8; protocol::CHUNK_HEADER_BYTES] {
    protocol::chunk_header(protocol::REPLY_FLAG_DONE, protocol::REPLY_NONE, cookie, 0)
}
