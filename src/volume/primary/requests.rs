//! The life of a request.
//!
//! A write passes these gates; at each it may wait, and after waiting it begins at the first again:
//!
//! | gate | waits for | why |
//! |---|---|---|
//! | edges | a fetch of each missing block that it covers in part | R7: fetch, overlay, write |
//! | claims | whoever holds its blocks; fetches on the wire are taken over | R6, laws 1 and 4 |
//! | window | room among the bytes sent and not applied | bounded lag |
//! | intent | its hot extents to be durable | R3: before it leaves for either side |
//! | go | `unsent` is set, then local write and send side by side | trap 17 |
//! | ack | by policy: local write, or applied there too; FUA: as a flush | design, durable order |
//!
//! The claim ends with the local write: the mirror stream keeps the order of overlapping writes
//! on the backup (I7), since the sequence is given while the claim is held.

use uuid::Uuid;

use super::claims::{ClaimId, ClaimKind};
use super::event::{Action, FetchClass, MirrorPolicy, OutgoingMessage};
use super::hot::Pin;
use super::resync::ZERO_MESSAGE_BYTES;
use super::state::Primary;
use crate::clock::Instant;
use crate::device::AlignedBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange, ExtentMap, subtract};
use crate::map::UNSENT;
use crate::volume::content::Content;
use crate::volume::service::Command;

/// Larger requests are done in segments of this length, so that a trim of gigabytes neither needs
/// more hot extents than there are nor holds its claim for long.
const SEGMENT_BYTES: u64 = 32 << 20;

#[derive(Debug)]
pub(super) enum Operation {
    Read(Read),
    Write(Write),
    Flush(Flush),
    Cut(Cut),
}

#[derive(Debug)]
pub(super) struct Read {
    range: ByteRange,
    /// Only bring the blocks, return nothing.
    cache: bool,
    pieces: Vec<(ByteRange, Content)>,
    delivered: ExtentMap<bool>,
    reading: bool,
    healed: bool,
    deadline: Instant,
}

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

#[derive(Debug)]
pub(super) struct Flush {
    /// Not yet begun.
    fresh: bool,
    local: bool,
    /// The sequence to be acknowledged by the backup.
    remote: Option<u64>,
    /// The commit to be waited for.
    commit: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Cut {
    snapshot: Uuid,
    label: String,
    selection: Vec<ByteRange>,
    sequence: Option<u64>,
    deadline: Instant,
}

/// What a device action was for.
#[derive(Debug)]
pub(super) enum Pending {
    Read { id: u64 },
    Write { id: u64 },
    Fill { tag: u64, blocks: BlockRange },
    Push { claim: ClaimId, blocks: BlockRange },
}

impl Operation {
    pub(super) fn expired(&self, now: Instant) -> bool {
        match self {
            Self::Read(read) => !read.reading && now >= read.deadline,
            Self::Write(write) => write.stage == Stage::Preparing && now >= write.deadline,
            Self::Flush(_) => false,
            Self::Cut(cut) => now >= cut.deadline,
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
                Self::read(range, false, deadline)
            }
            Command::Cache { range } => Self::read(range, true, deadline),
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
                Operation::Flush(Flush { fresh: true, local: false, remote: None, commit: None })
            }
        };
        self.operations.insert(id, operation);
        self.ready.push_back(id);
    }

    fn read(range: ByteRange, cache: bool, deadline: Instant) -> Operation {
        Operation::Read(Read {
            range,
            cache,
            pieces: Vec::new(),
            delivered: ExtentMap::new(),
            reading: false,
            healed: false,
            deadline,
        })
    }

    fn write(&mut self, offset: u64, content: Content, fua: bool, deadline: Instant) -> Operation {
        self.counters.writes += 1;
        self.counters.bytes_written += content.len();
        Operation::Write(Write {
            segment: ByteRange::new(offset, content.len().min(SEGMENT_BYTES)),
            rest: content,
            force_unit_access: fua,
            stage: Stage::Preparing,
            pinned: false,
            claim: 0,
            sequence: None,
            deadline,
            failure: None,
        })
    }

    pub(super) fn begin_cut(
        &mut self,
        id: u64,
        snapshot: Uuid,
        label: String,
        selection: Vec<ByteRange>,
    ) {
        let deadline = self.now.plus_ms(self.options.missing_deadline_ms);
        let cut = Cut { snapshot, label, selection, sequence: None, deadline };
        self.operations.insert(id, Operation::Cut(cut));
        self.ready.push_back(id);
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
            Some(Operation::Read(read)) if !read.reading => {
                self.operations.remove(&id);
                self.complete(id, Err(error.clone()), actions);
            }
            Some(Operation::Write(write)) if write.stage == Stage::Preparing => {
                write.failure = Some(error.clone());
                self.ready.push_back(id);
            }
            _ => {}
        }
    }

    fn too_late(&self, blocks: BlockRange) -> Error {
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

    // Reads.

    fn advance_read(&mut self, id: u64, mut read: Read, actions: &mut Vec<Action>) {
        if read.reading {
            self.operations.insert(id, Operation::Read(read));
            return;
        }
        let blocks = self.geometry.touched(read.range);
        let missing: Vec<BlockRange> = self
            .map
            .current()
            .runs(blocks, false)
            .flat_map(|run| subtract(run, read.delivered.overlapping(run).map(|(held, _)| held)))
            .collect();
        if missing.is_empty() {
            self.read_rest(id, read, actions);
        } else if self.now >= read.deadline {
            let error = self.too_late(missing[0]);
            self.complete(id, Err(error), actions);
        } else {
            for run in missing {
                self.bring(id, run, FetchClass::Demand);
            }
            read.reading = false;
            self.operations.insert(id, Operation::Read(read));
        }
    }

    /// Everything is here or was delivered: read what is here, lay the rest over it.
    fn read_rest(&mut self, id: u64, mut read: Read, actions: &mut Vec<Action>) {
        if read.cache {
            self.complete(id, Ok(None), actions);
            return;
        }
        let blocks = self.geometry.touched(read.range);
        let parts: Vec<ByteRange> =
            subtract(blocks, read.delivered.overlapping(blocks).map(|(run, _)| run))
                .into_iter()
                .filter_map(|run| self.geometry.bytes_of(run).intersect(read.range))
                .collect();
        if parts.is_empty() {
            let mut buffer = AlignedBuffer::zeroed(read.range.length as usize);
            read.lay_over(&mut buffer);
            self.complete(id, Ok(Some(buffer)), actions);
            return;
        }
        read.reading = true;
        let token = self.token(Pending::Read { id });
        actions.push(Action::ReadLocal { token, range: read.range, parts });
        self.operations.insert(id, Operation::Read(read));
    }

    /// A fetch brought these blocks: the readers that wait for them take their part.
    pub(super) fn deliver(&mut self, id: u64, blocks: BlockRange, content: &Content) {
        let from = self.geometry.bytes_of(blocks);
        if let Some(Operation::Read(read)) = self.operations.get_mut(&id)
            && !read.reading
            && let Some(part) = from.intersect(read.range)
        {
            if !read.cache {
                let piece = content.slice(part.offset - from.offset, part.length);
                read.pieces.push((part, piece));
            }
            read.delivered.insert(blocks, true);
            self.ready.push_back(id);
        }
    }

    pub(super) fn read_done(
        &mut self,
        token: u64,
        result: Result<AlignedBuffer>,
        actions: &mut Vec<Action>,
    ) {
        match self.pending.remove(&token).expect("each token is answered once") {
            Pending::Push { claim, blocks } => self.push_read(claim, blocks, result, actions),
            Pending::Read { id } => {
                let Some(Operation::Read(read)) = self.operations.remove(&id) else {
                    unreachable!("a read stays until its local part is done")
                };
                match result {
                    Ok(mut buffer) => {
                        read.lay_over(&mut buffer);
                        self.complete(id, Ok(Some(buffer)), actions);
                    }
                    Err(error) => self.heal(id, read, error, actions),
                }
            }
            Pending::Write { .. } | Pending::Fill { .. } => unreachable!("those are writes"),
        }
    }

    /// A read of current blocks failed: the backup has them too, unless they are unsent (trap 36).
    fn heal(&mut self, id: u64, mut read: Read, error: Error, actions: &mut Vec<Action>) {
        let blocks = self.geometry.touched(read.range);
        let current: Vec<_> = self.map.current().runs(blocks, true).collect();
        let possible = self.mirror.up
            && !read.healed
            && !self.map.unsent().any_set(blocks)
            && !self.claims.busy(blocks);
        if !possible {
            self.complete(id, Err(error), actions);
            return;
        }
        for run in current {
            self.touch(run);
            self.map.demote(run);
        }
        read.healed = true;
        read.reading = false;
        self.operations.insert(id, Operation::Read(read));
        self.ready.push_back(id);
    }

    // Writes.

    fn advance_write(&mut self, id: u64, mut write: Write, actions: &mut Vec<Action>) {
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

    fn claims_wait(&mut self, id: u64, blocks: BlockRange) -> bool {
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
        let waits = self.mirror.up && !self.mirror.has_room(write.wire_bytes());
        if waits {
            self.waiting.window.push(id);
        }
        waits
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
                write.sequence = Some(self.send_content(offset, &content, &unpushed, actions));
            }
        }
        write.stage = Stage::Writing;
        let token = self.token(Pending::Write { id });
        actions.push(Action::WriteLocal { token, offset: write.segment.offset, content });
    }

    pub(super) fn write_done(&mut self, token: u64, result: Result<()>, actions: &mut Vec<Action>) {
        match self.pending.remove(&token).expect("each token is answered once") {
            Pending::Fill { tag, blocks } => self.filled(tag, blocks, result, actions),
            Pending::Write { id } => {
                let Some(Operation::Write(write)) = self.operations.remove(&id) else {
                    unreachable!("a write stays until its local part is done")
                };
                self.written(id, write, result, actions);
            }
            Pending::Read { .. } | Pending::Push { .. } => unreachable!("those are reads"),
        }
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
            let flush = Flush { fresh: true, local: false, remote: None, commit: None };
            self.operations.insert(id, Operation::Flush(flush));
            self.ready.push_back(id);
        } else {
            self.complete(id, Ok(None), actions);
        }
    }

    // Flushes (R8, R9, R10).

    fn advance_flush(&mut self, id: u64, mut flush: Flush, actions: &mut Vec<Action>) {
        if let Some(error) = self.poisoned.clone() {
            self.complete(id, Err(error), actions);
            return;
        }
        if flush.fresh {
            flush.fresh = false;
            if self.flush_is_mirrored() {
                let sequence = self.mirror.send_flush();
                flush.remote = Some(sequence);
                actions.push(Action::Send(OutgoingMessage::Flush { sequence }));
                self.device_flush.next.push(id);
                self.begin_device_flush(actions);
            } else {
                flush.local = true;
            }
            if flush.remote.is_none() || self.options.strict {
                flush.commit = Some(self.next_commit());
                self.request_commit(actions);
            }
        }
        let committed = flush.commit.is_none_or(|epoch| self.commits.whole >= epoch);
        if flush.local && flush.remote.is_none() && committed {
            self.complete(id, Ok(None), actions);
        } else {
            self.operations.insert(id, Operation::Flush(flush));
        }
    }

    fn begin_device_flush(&mut self, actions: &mut Vec<Action>) {
        if !self.device_flush.active && !self.device_flush.next.is_empty() {
            self.device_flush.active = true;
            self.device_flush.under_way = std::mem::take(&mut self.device_flush.next);
            actions.push(Action::FlushLocal);
        }
    }

    pub(super) fn device_flushed(&mut self, result: Result<()>, actions: &mut Vec<Action>) {
        self.device_flush.active = false;
        if let Err(error) = result {
            self.poison(&error);
            return;
        }
        for id in std::mem::take(&mut self.device_flush.under_way) {
            if let Some(Operation::Flush(flush)) = self.operations.get_mut(&id) {
                flush.local = true;
                self.ready.push_back(id);
            }
        }
        self.begin_device_flush(actions);
    }

    pub(super) fn backup_flushed(&mut self, sequence: u64) {
        if !self.mirror.up {
            return;
        }
        for run in self.mirror.flushed(sequence) {
            self.map.file().fill(UNSENT, run, false);
        }
        self.backup_applied(sequence);
        for (id, operation) in &mut self.operations {
            if let Operation::Flush(flush) = operation
                && flush.remote.is_some_and(|awaited| awaited <= sequence)
            {
                flush.remote = None;
                self.ready.push_back(*id);
            }
        }
    }

    /// Flushes that waited for the backup are answered once the map says what it lacks (R9).
    pub(super) fn flushes_lose_the_link(&mut self, actions: &mut Vec<Action>) {
        let epoch = self.next_commit();
        let mut any = false;
        for operation in self.operations.values_mut() {
            if let Operation::Flush(flush) = operation
                && flush.remote.take().is_some()
            {
                flush.commit = Some(epoch);
                any = true;
            }
        }
        let cuts = self.operations.iter().filter(|(_, held)| matches!(held, Operation::Cut(_)));
        let cuts: Vec<u64> = cuts.map(|(id, _)| *id).collect();
        self.ready.extend(cuts);
        if any {
            self.request_commit(actions);
        }
    }

    pub(super) fn flushes_see_commit(&mut self) {
        let waiting = self.operations.iter().filter_map(|(id, operation)| match operation {
            Operation::Flush(flush) if flush.commit.is_some() => Some(*id),
            _ => None,
        });
        self.ready.extend(waiting.collect::<Vec<_>>());
    }

    // Cuts.

    fn advance_cut(&mut self, id: u64, mut cut: Cut, actions: &mut Vec<Action>) {
        let problem = if !self.mirror.up {
            Some(Error::link("a snapshot needs the link to the backup, which is down"))
        } else if self.now >= cut.deadline {
            Some(Error::new(ErrorKind::Timeout, "the backup did not answer the cut in time"))
        } else {
            None
        };
        if let Some(error) = problem {
            actions.push(Action::CutDone { id, result: Err(error) });
            return;
        }
        // Not before the backup has what it lacks: the cut is to be a state the volume had.
        if self.mirror.backlog {
            self.waiting.resync.push(id);
        } else if cut.sequence.is_none() {
            let sequence = self.mirror.next_sequence();
            cut.sequence = Some(sequence);
            actions.push(Action::Send(OutgoingMessage::Cut {
                sequence,
                snapshot: cut.snapshot,
                label: std::mem::take(&mut cut.label),
                selection: std::mem::take(&mut cut.selection),
            }));
        }
        self.operations.insert(id, Operation::Cut(cut));
    }

    pub(super) fn cut_answered(
        &mut self,
        sequence: u64,
        result: Result<(u64, u64)>,
        actions: &mut Vec<Action>,
    ) {
        let found = self.operations.iter().find_map(|(id, operation)| match operation {
            Operation::Cut(cut) if cut.sequence == Some(sequence) => Some(*id),
            _ => None,
        });
        if let Some(id) = found {
            self.operations.remove(&id);
            actions.push(Action::CutDone { id, result });
        }
    }
}

impl Read {
    fn lay_over(&self, buffer: &mut AlignedBuffer) {
        for (part, content) in &self.pieces {
            let start = (part.offset - self.range.offset) as usize;
            content.copy_to(&mut buffer[start..start + part.length as usize]);
        }
    }
}

impl Write {
    fn wire_bytes(&self) -> u64 {
        match &self.rest {
            Content::Bytes(_) => self.segment.length,
            Content::Zeros(_) => ZERO_MESSAGE_BYTES,
        }
    }
}
