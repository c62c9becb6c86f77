//! The life of a write.
//!
//! It passes these gates; at each it may wait, and after waiting it begins at the first again:
//!
//! | gate | waits for | why |
//! |---|---|---|
//! | edges | a fetch of each missing block that it covers in part | R7: fetch, overlay, write |
//! | claims | whoever holds its blocks; fetches on the wire are taken over | R6, laws 1 and 4 |
//! | window | room among the bytes sent and not applied; `async`: less lag | both are bounded |
//! | intent | its hot extents to be durable | R3: before it leaves for either side |
//! | go | `unsent` is set, then local write and send side by side | trap 17 |
//! | ack | by policy: local write, or applied there too; FUA: as a flush | design, durable order |
//!
//! The claim ends with the local write: the mirror stream keeps the order of overlapping writes
//! on the backup (I7), since the sequence is given while the claim is held.
//! A trim is a write of zeros to the whole blocks that it covers.

use super::claims::{ClaimId, ClaimKind};
use super::event::{Action, FetchClass, MirrorPolicy};
use super::flushes::Flush;
use super::hot::Pin;
use super::requests::{Operation, Pending};
use super::resync::ZERO_MESSAGE_BYTES;
use super::state::Primary;
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, subtract};
use crate::map::UNSENT;
use crate::volume::content::Content;

/// Larger requests are done in segments of this length, so that a trim of gigabytes neither needs
/// more hot extents than there are nor holds its claim for long.
const SEGMENT_BYTES: u64 = 32 << 20;

#[derive(Debug)]
pub(super) struct Write {
    /// The part being done, and what is left after it.
    segment: ByteRange,
    rest: Content,
    force_unit_access: bool,
    stage: Stage,
    pinned: bool,
    claim: ClaimId,
    /// Sequence in the mirror stream, if it was sent.
    sequence: Option<u64>,
    deadline: Instant,
    failure: Option<Error>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Preparing,
    Writing,
    AwaitingApplied,
}

impl Write {
    pub(super) fn new(offset: u64, content: Content, fua: bool, deadline: Instant) -> Self {
        Self {
            segment: ByteRange::new(offset, content.len().min(SEGMENT_BYTES)),
            rest: content,
            force_unit_access: fua,
            stage: Stage::Preparing,
            pinned: false,
            claim: 0,
            sequence: None,
            deadline,
            failure: None,
        }
    }

    pub(super) fn expired(&self, now: Instant) -> bool {
        self.stage == Stage::Preparing && now >= self.deadline
    }

    /// Fails it when it is looked at next, unless its local part has begun.
    pub(super) fn fail(&mut self, error: &Error) {
        if self.stage == Stage::Preparing {
            self.failure = Some(error.clone());
        }
    }

    fn wire_bytes(&self) -> u64 {
        match &self.rest {
            Content::Bytes(_) => self.segment.length,
            Content::Zeros(_) => ZERO_MESSAGE_BYTES,
        }
    }
}

impl Primary {
    pub(super) fn advance_write(&mut self, id: u64, mut write: Write, actions: &mut Vec<Action>) {
        match write.stage {
            Stage::Preparing => {}
            Stage::Writing => {
                self.operations.insert(id, Operation::Write(write));
                return;
            }
            Stage::AwaitingApplied => return self.acknowledge(id, write, actions),
        }
        if write.segment.length == 0 {
            return self.acknowledge(id, write, actions);
        }
        if let Some(error) = write.failure.take().or_else(|| self.poisoned.clone()) {
            return self.abandon(id, &write, error, actions);
        }
        let blocks = self.geometry.touched(write.segment);
        if let Some(edge) = self.edges_wait(id, write.segment) {
            if self.now >= write.deadline {
                let error = self.too_late(edge);
                return self.abandon(id, &write, error, actions);
            }
        } else if !self.claims_wait(id, blocks)
            && !self.window_waits(id, &write)
            && !self.intent_waits(id, &mut write, actions)
        {
            self.go(id, &mut write, actions);
        }
        self.operations.insert(id, Operation::Write(write));
    }

    /// Brings the missing blocks that the write covers in part; one of them while any is missing.
    fn edges_wait(&mut self, id: u64, segment: ByteRange) -> Option<BlockRange> {
        let blocks = self.geometry.touched(segment);
        let whole = self.geometry.covered(segment);
        let holes = if whole.is_empty() { vec![] } else { vec![whole] };
        let mut waits = None;
        for edge in subtract(blocks, holes) {
            let missing: Vec<_> = self.map.current().runs(edge, false).collect();
            for run in missing {
                self.bring(id, run, FetchClass::Demand);
                waits = Some(run);
            }
        }
        waits
    }

    /// Waits for whoever holds these blocks, but for fetches; whether anybody does.
    pub(super) fn claims_wait(&mut self, id: u64, blocks: BlockRange) -> bool {
        let held: Vec<_> = self
            .claims
            .on(blocks)
            .filter(|(_, _, kind)| *kind != ClaimKind::Fetch)
            .map(|(_, claim, _)| claim)
            .collect();
        for claim in &held {
            self.claims.wait(*claim, id);
        }
        !held.is_empty()
    }

    fn window_waits(&mut self, id: u64, write: &Write) -> bool {
        let length = write.wire_bytes();
        let too_far = self.mirror.up && self.would_lag_too_far(length);
        self.mirror.held_back |= too_far;
        let waits = too_far || (self.mirror.up && !self.mirror.has_room(length));
        if waits {
            self.waiting.window.push(id);
        }
        waits
    }

    /// Whether the backup lags so far already that one more write of this length must wait.
    fn would_lag_too_far(&self, length: u64) -> bool {
        let MirrorPolicy::Async(bound) = self.options.policy else { return false };
        let lag = self.mirror.lag();
        lag.since.is_some_and(|since| {
            lag.bytes + length > bound.bytes || self.now.since_ms(since) >= bound.ms
        })
    }

    fn intent_waits(&mut self, id: u64, write: &mut Write, actions: &mut Vec<Action>) -> bool {
        if !write.pinned {
            match self.hot.pin(write.segment, self.commits.whole, self.now) {
                Pin::Full => {
                    self.waiting.room.push(id);
                    self.request_commit(actions);
                    return true;
                }
                Pin::Ready | Pin::NotRecorded => write.pinned = true,
            }
        }
        let waits = !self.hot.is_recorded(write.segment);
        if waits {
            self.waiting.intent.push(id);
        }
        waits
    }

    fn go(&mut self, id: u64, write: &mut Write, actions: &mut Vec<Action>) {
        let blocks = self.geometry.touched(write.segment);
        write.claim = self.claims.take(&[blocks], ClaimKind::Write);
        self.touch(blocks);
        let content = write.rest.slice(0, write.segment.length);
        write.sequence = None;
        if self.options.backup {
            let unpushed = self.partly_unsent(write.segment);
            self.map.file().fill(UNSENT, blocks, true);
            if self.mirror.up {
                let offset = write.segment.offset;
                let sequence = self.send_content(offset, &content, &unpushed, actions);
                self.mirror.lags(sequence, write.wire_bytes(), self.now);
                write.sequence = Some(sequence);
            }
        }
        write.stage = Stage::Writing;
        let token = self.token(Pending::Write { id });
        actions.push(Action::WriteLocal { token, offset: write.segment.offset, content });
    }

    /// The local part of a write ended.
    pub(super) fn local_part_written(
        &mut self,
        id: u64,
        result: Result<()>,
        actions: &mut Vec<Action>,
    ) {
        let Some(Operation::Write(write)) = self.operations.remove(&id) else {
            unreachable!("a write stays until its local part is done")
        };
        self.written(id, write, result, actions);
    }

    fn written(&mut self, id: u64, mut write: Write, result: Result<()>, out: &mut Vec<Action>) {
        let blocks = self.geometry.touched(write.segment);
        match &result {
            Ok(()) => self.became_current(blocks),
            Err(_) => self.not_written(blocks),
        }
        let waiters = self.claims.release(write.claim, blocks);
        self.ready.extend(waiters);
        self.hot.unpin(write.segment, self.commits.begun, self.now);
        write.pinned = false;
        if let Err(error) = result {
            self.complete(id, Err(error), out);
            return;
        }
        let done = write.segment.length;
        let left = write.rest.len() - done;
        write.rest = write.rest.slice(done, left);
        write.segment = ByteRange::new(write.segment.end(), left.min(SEGMENT_BYTES));
        write.stage = Stage::Preparing;
        if left > 0 {
            write.deadline = self.now.plus_ms(self.options.missing_deadline_ms);
            self.operations.insert(id, Operation::Write(write));
            self.ready.push_back(id);
        } else {
            self.acknowledge(id, write, out);
        }
    }

    /// A local write failed, so its blocks hold anything. The backup may have the write: blocks
    /// that were missing stay so, no bundle may supply them, and a fetch comes after the write;
    /// blocks that were current are still the truth, whatever they hold, and are sent again, even
    /// if the backup already made the write durable (trap 18).
    fn not_written(&mut self, blocks: BlockRange) {
        let missing: Vec<_> = self.map.current().runs(blocks, false).collect();
        for run in missing {
            self.map.demote(run);
            self.map.file().fill(UNSENT, run, false);
        }
        let current: Vec<_> = self.map.current().runs(blocks, true).collect();
        for run in current.into_iter().filter(|_| self.options.backup) {
            self.map.file().fill(UNSENT, run, true);
            self.mirror.forget(run);
        }
    }

    fn abandon(&mut self, id: u64, write: &Write, error: Error, actions: &mut Vec<Action>) {
        if write.pinned {
            self.hot.unpin(write.segment, self.commits.begun, self.now);
        }
        self.complete(id, Err(error), actions);
    }

    /// The local part is done: answer by policy.
    fn acknowledge(&mut self, id: u64, mut write: Write, actions: &mut Vec<Action>) {
        let waits = self.options.policy == MirrorPolicy::Write
            && self.mirror.up
            && write.sequence.is_some_and(|sequence| !self.mirror.is_applied(sequence));
        if waits {
            write.stage = Stage::AwaitingApplied;
            self.waiting.applied.push(id);
            self.operations.insert(id, Operation::Write(write));
        } else if write.force_unit_access {
            self.operations.insert(id, Operation::Flush(Flush::new()));
            self.ready.push_back(id);
        } else {
            self.complete(id, Ok(None), actions);
        }
    }
}
