//! Requests: how each begins, and to whom the end of a device action belongs.
//!
//! An operation that has to wait is looked at again from its beginning when something it waits for
//! has happened (`reads.rs`, `writes.rs`, `flushes.rs`).

use super::claims::ClaimId;
use super::differences::Digest;
use super::event::Action;
use super::flushes::{Cut, Flush};
use super::reads::Read;
use super::state::Primary;
use super::writes::Write;
use crate::clock::Instant;
use crate::device::AlignedBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BlockRange;
use crate::volume::content::Content;
use crate::volume::service::Command;

#[derive(Debug)]
pub(super) enum Operation {
    Read(Read),
    Write(Write),
    Flush(Flush),
    Cut(Cut),
}

/// What a device action was for.
#[derive(Debug)]
pub(super) enum Pending {
    Read { id: u64 },
    Write { id: u64 },
    Fill { tag: u64, blocks: BlockRange },
    Push { claim: ClaimId, blocks: BlockRange },
    Digest { tag: u64 },
}

impl Operation {
    pub(super) fn expired(&self, now: Instant) -> bool {
        match self {
            Self::Read(read) => read.expired(now),
            Self::Write(write) => write.expired(now),
            Self::Flush(_) => false,
            Self::Cut(cut) => cut.expired(now),
        }
    }
}

impl Primary {
    pub(super) fn begin(&mut self, id: u64, command: Command) {
        let deadline = self.now.plus_ms(self.options.missing_deadline_ms);
        let operation = match command {
            Command::Read { range } => {
                self.counters.reads += 1;
                self.counters.bytes_read += range.length;
                Operation::Read(Read::new(range, false, deadline))
            }
            Command::Cache { range } => Operation::Read(Read::new(range, true, deadline)),
            Command::Write { offset, data, force_unit_access } => {
                self.write(offset, Content::Bytes(data), force_unit_access, deadline)
            }
            Command::WriteZeroes { range, force_unit_access, .. } => {
                self.write(range.offset, Content::Zeros(range.length), force_unit_access, deadline)
            }
            Command::Trim { range, force_unit_access } => {
                let whole = self.geometry.bytes_of(self.geometry.covered(range));
                let zeros = Content::Zeros(whole.length);
                self.write(whole.offset, zeros, force_unit_access, deadline)
            }
            Command::Flush => {
                self.counters.flushes += 1;
                Operation::Flush(Flush::new())
            }
        };
        self.operations.insert(id, operation);
        self.ready.push_back(id);
    }

    fn write(&mut self, offset: u64, content: Content, fua: bool, deadline: Instant) -> Operation {
        self.counters.writes += 1;
        self.counters.bytes_written += content.len();
        Operation::Write(Write::new(offset, content, fua, deadline))
    }

    pub(super) fn advance(&mut self, id: u64, actions: &mut Vec<Action>) {
        match self.operations.remove(&id) {
            None => {}
            Some(Operation::Read(read)) => self.advance_read(id, read, actions),
            Some(Operation::Write(write)) => self.advance_write(id, write, actions),
            Some(Operation::Flush(flush)) => self.advance_flush(id, flush, actions),
            Some(Operation::Cut(cut)) => self.advance_cut(id, cut, actions),
        }
    }

    /// Ends an operation that waits for a fetch or a fill which failed.
    pub(super) fn fail_waiting(&mut self, id: u64, error: &Error, actions: &mut Vec<Action>) {
        match self.operations.get_mut(&id) {
            Some(Operation::Read(read)) if read.is_reading() => {}
            Some(Operation::Read(_)) => {
                self.operations.remove(&id);
                self.complete(id, Err(error.clone()), actions);
            }
            Some(Operation::Write(write)) => {
                write.fail(error);
                self.ready.push_back(id);
            }
            Some(Operation::Flush(_) | Operation::Cut(_)) | None => {}
        }
    }

    pub(super) fn too_late(&self, blocks: BlockRange) -> Error {
        let range = self.geometry.bytes_of(blocks);
        let state = if self.mirror.up { "slow" } else { "down" };
        Error::new(
            ErrorKind::Timeout,
            format!(
                "{} bytes are missing here and the link to the backup is {state}: not fetched \
                 within {} ms",
                range.length, self.options.missing_deadline_ms
            ),
        )
        .at_offset(range.offset)
    }

    pub(super) fn read_done(
        &mut self,
        token: u64,
        result: Result<AlignedBuffer>,
        actions: &mut Vec<Action>,
    ) {
        match self.pending.remove(&token).expect("each token is answered once") {
            Pending::Push { claim, blocks } => self.push_read(claim, blocks, result, actions),
            Pending::Read { id } => self.local_part_read(id, result, actions),
            _ => unreachable!("those are no reads"),
        }
    }

    pub(super) fn write_done(&mut self, token: u64, result: Result<()>, actions: &mut Vec<Action>) {
        match self.pending.remove(&token).expect("each token is answered once") {
            Pending::Fill { tag, blocks } => self.filled(tag, blocks, result, actions),
            Pending::Write { id } => self.local_part_written(id, result, actions),
            _ => unreachable!("those are no writes"),
        }
    }

    pub(super) fn digest_done(&mut self, token: u64, result: Result<Digest>) {
        match self.pending.remove(&token).expect("each token is answered once") {
            Pending::Digest { tag } => self.digest_read(tag, result),
            _ => unreachable!("those are no digests"),
        }
    }
}
