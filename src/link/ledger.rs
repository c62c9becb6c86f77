//! Which requests of a connection await which answers. Both sides keep the same book: the primary
//! as requests leave and answers arrive, the backup as requests arrive and answers leave.
//!
//! Guarantees: mirrored sequences ascend; an answer belongs to a request that has left; the bytes
//! that a peer can make us hold are bounded. An answer that nobody awaits is refused, so a late or
//! confused peer cannot mark a write as safe (trap 19).
//!
//! | message | condition | effect |
//! |---|---|---|
//! | Write, Zero, Flush, Cut | sequence above all before | awaits its answer |
//! | Applied n | left already, not below the last Applied | Write and Zero up to n answered |
//! | Flushed n | n is a Flush that awaits | Write, Zero and Flush up to n answered |
//! | CutDone n | n is a Cut of that snapshot that awaits | answered |
//! | Failed n | n is a Flush or Cut that awaits, or above the last Applied | n answered |
//! | Fetch, Digest | a tag that is not in use | awaits its answer |
//! | Data | a Fetch with this tag and range | answered |
//! | DigestReply | a Digest with this tag | answered |
//! | Changes | a tag that is not in use, whole blocks | awaits its answer |
//! | ChangesReply | a Changes with this tag and offset, and no more blocks | answered |
//! | FetchFailed | a Fetch, Digest or Changes with this tag | answered |
//!
//! Does not know: blocks, devices, whether an answer is true.

use std::collections::{HashMap, VecDeque};

use uuid::Uuid;

use super::Message;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::{
    LINK_ANSWER_BYTES, LINK_CHANGES_BYTES_MAX, LINK_REQUESTS_MAX, LINK_UNANSWERED_BYTES_MAX,
};
use crate::units::Geometry;

#[derive(Debug)]
pub(super) struct Ledger {
    geometry: Geometry,
    /// The last mirrored operation.
    sequence: u64,
    applied: u64,
    /// Writes and Zeros that await: sequence and cost, ascending.
    operations: VecDeque<(u64, u64)>,
    flushes: VecDeque<u64>,
    cuts: VecDeque<(u64, Uuid)>,
    reads: HashMap<u64, Read>,
    unanswered_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Read {
    range: ByteRange,
    kind: ReadKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadKind {
    Fetch,
    Digest,
    Changes,
}

impl Read {
    fn cost(self) -> u64 {
        LINK_ANSWER_BYTES
            + match self.kind {
                ReadKind::Fetch => self.range.length,
                ReadKind::Digest => 0,
                ReadKind::Changes => LINK_CHANGES_BYTES_MAX as u64,
            }
    }
}

impl Ledger {
    pub fn new(geometry: Geometry, applied_sequence: u64) -> Self {
        Self {
            geometry,
            sequence: applied_sequence,
            applied: applied_sequence,
            operations: VecDeque::new(),
            flushes: VecDeque::new(),
            cuts: VecDeque::new(),
            reads: HashMap::new(),
            unanswered_bytes: 0,
        }
    }

    /// Bytes of requests without an answer.
    pub fn unanswered_bytes(&self) -> u64 {
        self.unanswered_bytes
    }

    /// Whether the message is an answer, or a request that does not exceed the limits.
    pub fn has_room(&self, message: &Message) -> bool {
        let cost = match message {
            Message::Write { data, .. } => LINK_ANSWER_BYTES + data.len() as u64,
            Message::Zero { .. } | Message::Flush { .. } | Message::Cut { .. } => LINK_ANSWER_BYTES,
            Message::Fetch { range, .. } => Read { range: *range, kind: ReadKind::Fetch }.cost(),
            Message::Digest { .. } => LINK_ANSWER_BYTES,
            Message::Changes { range, .. } => {
                Read { range: *range, kind: ReadKind::Changes }.cost()
            }
            _ => return true,
        };
        self.unanswered_bytes + cost <= LINK_UNANSWERED_BYTES_MAX
            && self.reads.len() < LINK_REQUESTS_MAX
    }

    /// Enters a message that leaves or arrives.
    pub fn note(&mut self, message: &Message) -> Result<()> {
        if !self.has_room(message) {
            return Err(Error::link(format!(
                "link {:?}: expected at most {LINK_UNANSWERED_BYTES_MAX} bytes and \
                 {LINK_REQUESTS_MAX} reads without an answer, found more",
                message.kind()
            )));
        }
        if let Some(range) = message.range().filter(|range| !self.geometry.contains(*range)) {
            return Err(Error::link(format!(
                "link {:?}: expected a range within the {} bytes of the volume, found {} bytes \
                 at {}",
                message.kind(),
                self.geometry.size(),
                range.length,
                range.offset
            )));
        }
        match message {
            Message::Write { sequence, data, .. } => {
                self.operation(*sequence, LINK_ANSWER_BYTES + data.len() as u64)
            }
            Message::Zero { sequence, .. } => self.operation(*sequence, LINK_ANSWER_BYTES),
            Message::Flush { sequence } => {
                self.advance(*sequence)?;
                self.flushes.push_back(*sequence);
                self.unanswered_bytes += LINK_ANSWER_BYTES;
                Ok(())
            }
            Message::Cut { sequence, snapshot, selection, .. } => {
                self.cut(*sequence, *snapshot, selection)
            }
            Message::Applied { sequence } => self.applied(*sequence),
            Message::Flushed { sequence } => self.flushed(*sequence),
            Message::CutDone { sequence, snapshot, .. } => {
                let found = self.take_cut(*sequence).filter(|cut| cut == snapshot);
                found.map(drop).ok_or_else(|| unexpected("CutDone", *sequence))
            }
            Message::Failed { sequence, .. } => self.failed(*sequence),
            Message::Fetch { tag, range, .. } => self.read(*tag, *range, ReadKind::Fetch),
            Message::Digest { tag, range, .. } => self.read(*tag, *range, ReadKind::Digest),
            Message::Changes { tag, range, .. } => self.changes(*tag, *range),
            Message::Data { tag, offset, content } => {
                let range = ByteRange::new(*offset, content.length());
                self.answer(*tag, "Data", |read| {
                    read.kind == ReadKind::Fetch && read.range == range
                })
            }
            Message::DigestReply { tag, .. } => {
                self.answer(*tag, "DigestReply", |read| read.kind == ReadKind::Digest)
            }
            Message::ChangesReply { tag, offset, changed } => {
                let geometry = self.geometry;
                self.answer(*tag, "ChangesReply", |read| {
                    read.kind == ReadKind::Changes
                        && read.range.offset == *offset
                        && u64::from(changed.blocks) <= geometry.touched(read.range).count()
                })
            }
            Message::FetchFailed { tag, .. } => self.answer(*tag, "FetchFailed", |_| true),
        }
    }

    fn advance(&mut self, sequence: u64) -> Result<()> {
        if sequence <= self.sequence {
            return Err(Error::link(format!(
                "mirrored operation: expected a sequence above {}, found {sequence}",
                self.sequence
            )));
        }
        self.sequence = sequence;
        Ok(())
    }

    fn operation(&mut self, sequence: u64, cost: u64) -> Result<()> {
        self.advance(sequence)?;
        self.operations.push_back((sequence, cost));
        self.unanswered_bytes += cost;
        Ok(())
    }

    fn cut(&mut self, sequence: u64, snapshot: Uuid, selection: &[ByteRange]) -> Result<()> {
        if let Some(range) = selection.iter().find(|range| !self.geometry.contains(**range)) {
            return Err(Error::link(format!(
                "link Cut: expected ranges within the {} bytes of the volume, found {} bytes at {}",
                self.geometry.size(),
                range.length,
                range.offset
            )));
        }
        self.advance(sequence)?;
        self.cuts.push_back((sequence, snapshot));
        self.unanswered_bytes += LINK_ANSWER_BYTES;
        Ok(())
    }

    fn applied(&mut self, sequence: u64) -> Result<()> {
        if sequence > self.sequence || sequence < self.applied {
            return Err(unexpected("Applied", sequence));
        }
        self.applied = sequence;
        self.release_operations(sequence);
        Ok(())
    }

    fn flushed(&mut self, sequence: u64) -> Result<()> {
        if !self.flushes.contains(&sequence) {
            return Err(unexpected("Flushed", sequence));
        }
        while self.flushes.front().is_some_and(|first| *first <= sequence) {
            self.flushes.pop_front();
            self.unanswered_bytes -= LINK_ANSWER_BYTES;
        }
        self.release_operations(sequence);
        Ok(())
    }

    fn failed(&mut self, sequence: u64) -> Result<()> {
        if let Some(at) = self.flushes.iter().position(|flush| *flush == sequence) {
            self.flushes.remove(at);
            self.unanswered_bytes -= LINK_ANSWER_BYTES;
            return Ok(());
        }
        let is_operation = sequence > self.applied
            && self.operations.binary_search_by_key(&sequence, |(held, _)| *held).is_ok();
        if is_operation || self.take_cut(sequence).is_some() {
            return Ok(());
        }
        Err(unexpected("Failed", sequence))
    }

    fn take_cut(&mut self, sequence: u64) -> Option<Uuid> {
        let at = self.cuts.iter().position(|(held, _)| *held == sequence)?;
        self.unanswered_bytes -= LINK_ANSWER_BYTES;
        self.cuts.remove(at).map(|(_, snapshot)| snapshot)
    }

    fn release_operations(&mut self, sequence: u64) {
        while let Some((_, cost)) = self.operations.front().filter(|(held, _)| *held <= sequence) {
            self.unanswered_bytes -= cost;
            self.operations.pop_front();
        }
    }

    fn changes(&mut self, tag: u64, range: ByteRange) -> Result<()> {
        if self.geometry.bytes_of(self.geometry.touched(range)) != range {
            return Err(Error::link(format!(
                "link Changes: expected a range of whole blocks, found {} bytes at {}",
                range.length, range.offset
            )));
        }
        self.read(tag, range, ReadKind::Changes)
    }

    fn read(&mut self, tag: u64, range: ByteRange, kind: ReadKind) -> Result<()> {
        if self.reads.contains_key(&tag) {
            return Err(Error::link(format!(
                "link {kind:?}: expected a tag that is not in use, found {tag}"
            )));
        }
        let read = Read { range, kind };
        self.unanswered_bytes += read.cost();
        self.reads.insert(tag, read);
        Ok(())
    }

    fn answer(&mut self, tag: u64, kind: &str, fits: impl FnOnce(&Read) -> bool) -> Result<()> {
        let Some(read) = self.reads.get(&tag).copied().filter(fits) else {
            return Err(unexpected(kind, tag));
        };
        self.reads.remove(&tag);
        self.unanswered_bytes -= read.cost();
        Ok(())
    }
}

fn unexpected(kind: &str, number: u64) -> Error {
    Error::link(format!(
        "link {kind} {number}: expected the answer to a request that waits, found none such"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Payload;
    use crate::format::frames::{ChangedBlocks, ChangedForm, Content, CutName, Failure};
    use crate::units::{BlockSize, MIB};

    fn ledger() -> Ledger {
        Ledger::new(Geometry::new(MIB, BlockSize::DEFAULT).expect("valid"), 0)
    }

    fn write(sequence: u64, offset: u64) -> Message {
        Message::Write { sequence, offset, data: Payload::copy_of(&[1; 4096]) }
    }

    fn cut(sequence: u64) -> Message {
        let snapshot = Uuid::from_u128(5);
        Message::Cut { sequence, snapshot, selection: Vec::new(), label: String::new() }
    }

    fn cut_done(sequence: u64, snapshot: u128) -> Message {
        let snapshot = Uuid::from_u128(snapshot);
        Message::CutDone { sequence, snapshot, generation: 1, cut_sequence: 9 }
    }

    fn failure() -> Failure {
        Failure { kind: crate::error::ErrorKind::Device, errno: Some(5), text: "no".to_owned() }
    }

    fn failed(sequence: u64) -> Message {
        Message::Failed { sequence, failure: failure() }
    }

    fn fetch(tag: u64) -> Message {
        Message::Fetch { tag, range: ByteRange::new(4096, 8192), after_sequence: 0 }
    }

    fn zeros(tag: u64, offset: u64, length: u64) -> Message {
        Message::Data { tag, offset, content: Content::Zero(length) }
    }

    fn takes(ledger: &mut Ledger, messages: &[Message]) {
        for message in messages {
            ledger.note(message).expect("allowed");
        }
    }

    fn refuses(ledger: &mut Ledger, message: &Message) {
        assert!(ledger.note(message).is_err(), "{message:?}");
    }

    #[test]
    fn everything_that_was_asked_and_answered_leaves_nothing_behind() {
        let mut ledger = ledger();
        let range = ByteRange::new(0, MIB);
        takes(
            &mut ledger,
            &[
                write(1, 0),
                Message::Zero { sequence: 2, range },
                Message::Flush { sequence: 4 },
                cut(5),
                write(6, 4096),
                fetch(1),
                fetch(2),
                Message::Digest { tag: 3, range, after_sequence: 6 },
            ],
        );
        assert_eq!(ledger.unanswered_bytes(), 2 * 4096 + 2 * 8192 + 8 * LINK_ANSWER_BYTES);
        takes(
            &mut ledger,
            &[
                Message::Applied { sequence: 1 },
                failed(2),
                Message::Flushed { sequence: 4 },
                cut_done(5, 5),
                Message::Applied { sequence: 6 },
                Message::DigestReply { tag: 3, digest: [0; 32] },
                Message::FetchFailed { tag: 2, failure: failure() },
                zeros(1, 4096, 8192),
            ],
        );
        assert_eq!(ledger.unanswered_bytes(), 0);
    }

    #[test]
    fn a_sequence_that_does_not_ascend_is_refused() {
        let mut ledger = ledger();
        takes(&mut ledger, &[write(5, 0)]);
        refuses(&mut ledger, &write(5, 0));
        refuses(&mut ledger, &Message::Flush { sequence: 4 });
        refuses(&mut ledger, &cut(0));
    }

    #[test]
    fn an_answer_that_nobody_awaits_is_refused() {
        let mut ledger = ledger();
        takes(&mut ledger, &[write(1, 0), Message::Flush { sequence: 2 }, cut(3), fetch(7)]);
        refuses(&mut ledger, &Message::Applied { sequence: 4 });
        refuses(&mut ledger, &Message::Flushed { sequence: 1 });
        refuses(&mut ledger, &failed(9));
        refuses(&mut ledger, &zeros(8, 4096, 8192));
        refuses(&mut ledger, &zeros(7, 0, 8192));
        refuses(&mut ledger, &zeros(7, 4096, 4096));
        refuses(&mut ledger, &Message::DigestReply { tag: 7, digest: [0; 32] });
        refuses(&mut ledger, &cut_done(2, 5));
        takes(&mut ledger, &[Message::Flushed { sequence: 2 }, Message::Applied { sequence: 3 }]);
        refuses(&mut ledger, &Message::Flushed { sequence: 2 });
        refuses(&mut ledger, &Message::Applied { sequence: 1 });
        refuses(&mut ledger, &failed(1));
    }

    #[test]
    fn a_cut_is_not_answered_by_another_snapshot() {
        let mut ledger = ledger();
        takes(&mut ledger, &[cut(1)]);
        refuses(&mut ledger, &cut_done(1, 6));
    }

    #[test]
    fn a_tag_in_use_is_not_used_again_until_it_was_answered() {
        let mut ledger = ledger();
        takes(&mut ledger, &[fetch(7)]);
        refuses(&mut ledger, &fetch(7));
        takes(&mut ledger, &[zeros(7, 4096, 8192), fetch(7)]);
    }

    fn changes(tag: u64, offset: u64, length: u64) -> Message {
        let cut = CutName { snapshot: Uuid::from_u128(5), generation: 1, sequence: 2 };
        Message::Changes { tag, range: ByteRange::new(offset, length), cut }
    }

    fn unchanged(tag: u64, offset: u64, blocks: u32) -> Message {
        let changed = ChangedBlocks { blocks, form: ChangedForm::Runs(Vec::new()) };
        Message::ChangesReply { tag, offset, changed }
    }

    #[test]
    fn changes_are_asked_of_whole_blocks_and_answered_for_no_more_of_them() {
        let mut ledger = ledger();
        refuses(&mut ledger, &changes(1, 512, 4096));
        refuses(&mut ledger, &changes(1, 0, MIB + 4096));
        takes(&mut ledger, &[changes(1, 4096, 8192), fetch(2)]);
        refuses(&mut ledger, &unchanged(1, 4096, 3));
        refuses(&mut ledger, &unchanged(1, 0, 2));
        refuses(&mut ledger, &unchanged(2, 4096, 1));
        refuses(&mut ledger, &zeros(1, 4096, 8192));
        takes(&mut ledger, &[unchanged(1, 4096, 1), zeros(2, 4096, 8192)]);
        assert_eq!(ledger.unanswered_bytes(), 0);
    }

    #[test]
    fn ranges_outside_the_volume_are_refused() {
        let mut ledger = ledger();
        refuses(&mut ledger, &write(1, MIB - 512));
        refuses(&mut ledger, &Message::Zero { sequence: 1, range: ByteRange::new(0, MIB + 512) });
        let range = ByteRange::new(MIB, 512);
        refuses(&mut ledger, &Message::Fetch { tag: 1, range, after_sequence: 0 });
        let (snapshot, label) = (Uuid::from_u128(5), String::new());
        let selection = vec![ByteRange::new(0, 512), range];
        refuses(&mut ledger, &Message::Cut { sequence: 1, snapshot, selection, label });
    }

    #[test]
    fn what_a_peer_can_make_us_hold_is_bounded() {
        let mut ledger = ledger();
        for tag in 0..LINK_REQUESTS_MAX as u64 {
            ledger.note(&fetch(tag)).expect("within the limit");
        }
        assert!(!ledger.has_room(&fetch(u64::MAX)));
        refuses(&mut ledger, &fetch(u64::MAX));

        let mut ledger = self::ledger();
        let mut sequence = 0;
        while ledger.has_room(&write(sequence + 1, 0)) {
            sequence += 1;
            ledger.note(&write(sequence, 0)).expect("within the limit");
        }
        assert!(ledger.unanswered_bytes() <= LINK_UNANSWERED_BYTES_MAX);
        refuses(&mut ledger, &write(sequence + 1, 0));
        takes(&mut ledger, &[Message::Applied { sequence: 1 }, write(sequence + 1, 0)]);
    }

    #[test]
    fn the_window_of_the_mirror_fits_however_small_its_writes_are() {
        let writes = crate::limits::MIRROR_WINDOW_BYTES / 512;
        let cost = writes * (512 + LINK_ANSWER_BYTES);
        assert!(cost <= LINK_UNANSWERED_BYTES_MAX, "{cost}");
    }
}
