//! What a request must satisfy, and what becomes of it.
//!
//! | command | flags | outside the volume | read-only export |
//! |---|---|---|---|
//! | read | FUA, DF | `EINVAL` | |
//! | write | FUA | `ENOSPC` | `EPERM` |
//! | write zeroes | FUA, NO_HOLE, FAST_ZERO | `ENOSPC` | `EPERM` |
//! | trim | FUA | `EINVAL` | `EPERM` |
//! | cache | FUA | `EINVAL` | `EPERM` |
//! | block status | FUA, REQ_ONE | `EINVAL` | |
//! | flush | FUA | offset and length must be zero | |
//!
//! FUA means nothing to a command that writes nothing, but the specification has it accepted
//! everywhere. Any other flag or command is `EINVAL`, and so is a range that is not a multiple of
//! the sector size, but for a read: old clients do not ask for block sizes and read any bytes. A
//! request of no bytes is answered with success and does nothing. In extended style a write has and
//! a block status may have a payload (which names the contexts asked for); any other command with
//! one is `EINVAL`. A fast zeroing that would not be fast is `ENOTSUP`.
//!
//! Guarantees: a request handed on lies inside the volume and is aligned and not empty.
//! Does not know: how requests are framed, how answers are, what is in flight.

use std::sync::Arc;

use super::contexts;
use super::exports::Export;
use super::handshake::Chosen;
use super::outgoing::Outgoing;
use super::replies::{Addressee, Refusal, Replies};
use crate::device::AlignedBuffer;
use crate::error::{Error, ErrorKind};
use crate::extent::ByteRange;
use crate::format::nbd as protocol;
use crate::format::nbd::{Request, StatusFilter, Style};
use crate::limits;
use crate::volume::service::{BlockService, Command, StatusContext, StatusExtent};

/// A request that waits for its answer. Given back with the answer, so each is answered once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request that is not answered stays in flight for ever"]
pub struct Ticket {
    to: Addressee,
    kind: Kind,
    length: u64,
    /// Of a read: the whole sectors that its bytes lie in.
    sectors: ByteRange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Status,
    /// Answered by success or an error alone.
    Plain,
}

impl Ticket {
    fn new(request: &Request, kind: Kind) -> Self {
        Self { to: addressee(request), kind, length: request.length, sectors: range(request) }
    }

    fn is_whole_sectors(&self) -> bool {
        self.sectors == ByteRange::new(self.to.offset, self.length)
    }

    /// Bytes of payload that the request holds until it is answered.
    pub(super) fn payload_bytes(&self) -> usize {
        match self.kind {
            Kind::Read | Kind::Write => self.length as usize,
            Kind::Status | Kind::Plain => 0,
        }
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
        contexts: Vec<StatusContext>,
        range: ByteRange,
        limit: usize,
    },
    /// Nothing to do.
    Succeed,
    Refuse(Refusal),
    Disconnect,
}

const SHUT_DOWN: Refusal = (protocol::ESHUTDOWN, "the export is being shut down");

const WRONG_FILTER: Refusal =
    (protocol::EINVAL, "the payload is no length and list of selected contexts, each once");

/// The runs of each context that was asked for.
pub type Statuses = Vec<(StatusContext, Vec<StatusExtent>)>;

/// The transmission phase of one connection.
#[derive(Debug)]
pub(super) struct Transmission {
    pub(super) export: Arc<Export>,
    pub(super) style: Style,
    contexts: Vec<StatusContext>,
    size: u64,
    sector_size: u32,
    read_only: bool,
    fast_zeroes: bool,
}

impl Transmission {
    pub(super) fn new(chosen: Chosen) -> Self {
        let service = chosen.export.service();
        Self {
            size: service.size(),
            sector_size: service.sector_size(),
            read_only: service.read_only(),
            fast_zeroes: offers_fast_zeroes(service.as_ref()),
            style: chosen.style,
            contexts: chosen.contexts,
            export: chosen.export,
        }
    }

    pub(super) fn judge(&self, request: &Request, stopping: bool) -> Verdict {
        self.judge_status(request, &self.contexts, stopping)
    }

    /// The payload of a block status that is to be of some contexts only: how long it may be. A
    /// longer one is refused without a look at it.
    pub(super) fn filter_bytes_max(&self) -> usize {
        StatusFilter::bytes(self.contexts.len())
    }

    pub(super) fn judge_filtered(
        &self,
        request: &Request,
        payload: &[u8],
        stopping: bool,
    ) -> Verdict {
        let Some(filter) = StatusFilter::decode(payload) else {
            return Verdict::Refuse(WRONG_FILTER);
        };
        let asked =
            |context: &StatusContext| filter.contexts.contains(&contexts::identifier(*context));
        let chosen: Vec<_> = self.contexts.iter().copied().filter(asked).collect();
        // Each context is counted once here, so that a number too many is unknown or a repetition.
        if chosen.len() != filter.contexts.len() || chosen.is_empty() {
            return Verdict::Refuse(WRONG_FILTER);
        }
        let flags = request.flags & !protocol::CMD_FLAG_PAYLOAD_LEN;
        let request = Request { flags, length: filter.length, payload: 0, ..*request };
        self.judge_status(&request, &chosen, stopping)
    }

    fn judge_status(
        &self,
        request: &Request,
        contexts: &[StatusContext],
        stopping: bool,
    ) -> Verdict {
        if request.command == protocol::CMD_DISC {
            return Verdict::Disconnect;
        }
        if stopping || self.export.removed() {
            return Verdict::Refuse(SHUT_DOWN);
        }
        match self.check(request) {
            Err(refusal) => Verdict::Refuse(refusal),
            Ok(()) if request.command == protocol::CMD_FLUSH => {
                Verdict::Do(Ticket::new(request, Kind::Plain), Command::Flush)
            }
            Ok(()) if request.length == 0 => Verdict::Succeed,
            Ok(())
                if request.flags & protocol::CMD_FLAG_FAST_ZERO != 0
                    && !self.export.service().zeroes_fast(range(request)) =>
            {
                Verdict::Refuse((protocol::ENOTSUP, "zeroing this is no faster than writing it"))
            }
            Ok(()) => self.accept(request, contexts),
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
        if sized && request.length > u64::from(limits::NBD_REQUEST_BYTES_MAX) {
            let reads = self.style > Style::Simple && request.command == protocol::CMD_READ;
            let error = if reads { protocol::EOVERFLOW } else { protocol::EINVAL };
            return Err((error, "the request is longer than the maximum block size"));
        }
        let end = request.offset.checked_add(request.length);
        if end.is_none_or(|end| end > self.size) {
            let grows = matches!(request.command, protocol::CMD_WRITE | protocol::CMD_WRITE_ZEROES);
            let error = if grows { protocol::ENOSPC } else { protocol::EINVAL };
            return Err((error, "the range lies outside the export"));
        }
        let whole = self.sectors_of(range(request)) == range(request);
        if !whole && request.command != protocol::CMD_READ {
            return Err((protocol::EINVAL, "the range is not aligned to the minimum block size"));
        }
        Ok(())
    }

    /// The whole sectors that the bytes lie in. Sizes are multiples of the sector, so that these
    /// lie inside the volume if the bytes do.
    fn sectors_of(&self, range: ByteRange) -> ByteRange {
        let sector = u64::from(self.sector_size);
        let start = range.offset - range.offset % sector;
        ByteRange::new(start, range.end().next_multiple_of(sector) - start)
    }

    /// The flags a command may carry, and whether it changes the volume.
    fn rules(&self, command: u16) -> Result<(u16, bool), Refusal> {
        match command {
            protocol::CMD_READ if self.style > Style::Simple => Ok((protocol::CMD_FLAG_DF, false)),
            protocol::CMD_READ | protocol::CMD_FLUSH => Ok((0, false)),
            protocol::CMD_WRITE if self.style == Style::Extended => {
                Ok((protocol::CMD_FLAG_PAYLOAD_LEN, true))
            }
            protocol::CMD_WRITE | protocol::CMD_TRIM | protocol::CMD_CACHE => Ok((0, true)),
            protocol::CMD_WRITE_ZEROES => {
                let fast = if self.fast_zeroes { protocol::CMD_FLAG_FAST_ZERO } else { 0 };
                Ok((protocol::CMD_FLAG_NO_HOLE | fast, true))
            }
            protocol::CMD_BLOCK_STATUS if self.contexts.is_empty() => {
                Err((protocol::EINVAL, "no metadata context was selected"))
            }
            protocol::CMD_BLOCK_STATUS => Ok((protocol::CMD_FLAG_REQ_ONE, false)),
            _ => Err((protocol::EINVAL, "this command is not known here")),
        }
    }

    /// What a request that was checked asks for.
    fn accept(&self, request: &Request, contexts: &[StatusContext]) -> Verdict {
        let range = range(request);
        let force_unit_access = request.flags & protocol::CMD_FLAG_FUA != 0;
        let plain = |command| Verdict::Do(Ticket::new(request, Kind::Plain), command);
        match request.command {
            protocol::CMD_READ => {
                let range = self.sectors_of(range);
                let ticket = Ticket { sectors: range, ..Ticket::new(request, Kind::Read) };
                Verdict::Do(ticket, Command::Read { range })
            }
            protocol::CMD_WRITE => {
                Verdict::Write { ticket: Ticket::new(request, Kind::Write), force_unit_access }
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
                let ticket = Ticket::new(request, Kind::Status);
                Verdict::Status { ticket, contexts: contexts.to_vec(), range, limit }
            }
            unknown => unreachable!("command {unknown} was checked before"),
        }
    }

    pub(super) fn succeed(&self, request: &Request, out: &mut Outgoing) {
        let (replies, to) = (Replies(self.style), addressee(request));
        match request.command {
            protocol::CMD_READ => replies.read_nothing(to, out),
            protocol::CMD_BLOCK_STATUS => {
                replies.refuse(to, (protocol::EINVAL, "the range is empty"), out);
            }
            _ => replies.succeed(to, out),
        }
    }

    pub(super) fn refuse(&self, request: &Request, refusal: Refusal, out: &mut Outgoing) {
        Replies(self.style).refuse(addressee(request), refusal, out);
    }

    /// Lets `fill` put the bytes of a read of whole sectors into the reply. False leaves no trace.
    pub(super) fn read_in_place(
        &self,
        ticket: &Ticket,
        fill: impl FnOnce(&mut [u8]) -> bool,
        out: &mut Outgoing,
    ) -> bool {
        assert_eq!(ticket.kind, Kind::Read, "only a read has bytes to fill");
        if !ticket.is_whole_sectors() {
            return false;
        }
        let length = ticket.payload_bytes();
        let header = Replies(self.style).read_header(ticket.to, length, out);
        let filled = fill(out.reserve(length));
        if !filled {
            out.take_back(length);
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
        let replies = Replies(self.style);
        match (ticket.kind, outcome) {
            (_, Err(error)) => replies.refuse(ticket.to, translate(&error), out),
            (Kind::Read, Ok(Some(bytes))) => {
                let sectors = ticket.sectors;
                assert_eq!(bytes.len() as u64, sectors.length, "a read answers what was asked");
                let length = ticket.payload_bytes();
                replies.read_header(ticket.to, length, out);
                let start = (ticket.to.offset - sectors.offset) as usize;
                if ticket.is_whole_sectors() {
                    out.push_buffer(bytes);
                } else {
                    out.push(&bytes[start..start + length]);
                }
            }
            (Kind::Plain | Kind::Write, Ok(_)) => replies.succeed(ticket.to, out),
            (kind, Ok(_)) => unreachable!("{kind:?} was answered without its contents"),
        }
    }

    /// Answers a block status with a list of runs for each context that was asked for.
    pub(super) fn answer_status(
        &self,
        ticket: &Ticket,
        outcome: crate::error::Result<Statuses>,
        out: &mut Outgoing,
    ) {
        assert_eq!(ticket.kind, Kind::Status, "only a block status is answered with runs");
        let replies = Replies(self.style);
        let statuses = match outcome {
            Ok(statuses) => statuses,
            Err(error) => return replies.refuse(ticket.to, translate(&error), out),
        };
        assert!(!statuses.is_empty(), "a status has one context at least");
        for (index, (context, extents)) in statuses.iter().enumerate() {
            let runs = runs(*context, extents, ticket.length);
            let done = index + 1 == statuses.len();
            replies.status(ticket.to, done, contexts::identifier(*context), &runs, out);
        }
    }
}

/// Whether a client may ask for zeroes that are made faster than they could be written.
pub(super) fn offers_fast_zeroes(service: &dyn BlockService) -> bool {
    !service.read_only() && service.zeroes_fast(ByteRange::new(0, service.size()))
}

fn addressee(request: &Request) -> Addressee {
    Addressee { cookie: request.cookie, offset: request.offset }
}

fn range(request: &Request) -> ByteRange {
    ByteRange::new(request.offset, request.length)
}

/// The runs as they are sent: neighbours of one status joined, clipped to what was asked.
fn runs(context: StatusContext, extents: &[StatusExtent], length: u64) -> Vec<(u64, u32)> {
    assert!(!extents.is_empty(), "a status has one run at least");
    let mut left = length;
    let mut runs: Vec<(u64, u32)> = Vec::with_capacity(extents.len());
    for extent in extents {
        assert!(extent.length > 0, "a run has one byte at least");
        let run = extent.length.min(left);
        left -= run;
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
