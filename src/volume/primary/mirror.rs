//! One backup as the primary sees it: what was sent, applied, durable.
//!
//! `unsent` is set before a write is sent and cleared when the backup has made *that* write
//! durable and none newer was sent for the block (trap 19). Nothing here survives the session:
//! after a reconnect everything unsent is sent again.

use std::collections::{BTreeMap, VecDeque};

use super::differences::Differences;
use crate::clock::Instant;
use crate::extent::{BlockRange, ExtentMap};
use crate::limits::MIRROR_WINDOW_BYTES;

/// What the backup has not made durable of the writes of this session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    pub writes: usize,
    /// On the wire: zeros count what their message takes.
    pub bytes: u64,
    /// When the oldest was sent.
    pub since: Option<Instant>,
}

#[derive(Debug, Default)]
pub struct MirrorLeg {
    pub up: bool,
    /// Sequence of the latest message of any session.
    sequence: u64,
    applied: u64,
    durable: u64,
    not_applied: VecDeque<(u64, u64)>,
    /// Writes that did not leave, each with the one that covers it and was not applied yet; and
    /// the same the other way round.
    superseded: BTreeMap<u64, u64>,
    carried: BTreeMap<u64, Vec<u64>>,
    not_durable: VecDeque<(u64, BlockRange)>,
    /// Per block the latest sequence sent in this session and not yet durable.
    latest: ExtentMap<u64>,
    in_flight_bytes: u64,
    /// Writes of this session, without pushes, that are not durable there: sequence, bytes on the
    /// wire, when each was sent.
    lagging: VecDeque<(u64, u64, Instant)>,
    lag_bytes: u64,
    /// A write waits for the lag to become less.
    pub held_back: bool,
    /// Sequence of the latest flush sent.
    flush_sent: u64,
    /// Sequence of the latest message of this session, 0 if there was none.
    sent: u64,
    /// Unsent blocks may exist that were not sent in this session (R10: no flush is mirrored).
    pub backlog: bool,
    /// Where the search for them goes on.
    pub cursor: u64,
    pub differences: Differences,
    /// When an unsent block could not be read here; until it is time to try again, the search
    /// ends where the blocks do. Once it happened, blocks are pushed one by one.
    pub unreadable: Option<Instant>,
    pub one_by_one: bool,
}

impl MirrorLeg {
    pub fn begin_session(&mut self, backlog: bool) {
        self.end_session();
        self.up = true;
        self.unreadable = None;
        self.one_by_one = false;
        self.backlog = backlog;
        self.applied = self.sequence;
        self.durable = self.sequence;
        self.flush_sent = self.sequence;
    }

    pub fn end_session(&mut self) {
        self.up = false;
        self.not_applied.clear();
        self.superseded.clear();
        self.carried.clear();
        self.not_durable.clear();
        self.latest.clear();
        self.in_flight_bytes = 0;
        self.lagging.clear();
        self.lag_bytes = 0;
        self.held_back = false;
        self.sent = 0;
        self.cursor = 0;
        self.differences.end_session();
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Sequence of a message that is sent now.
    pub fn send(&mut self) -> u64 {
        self.sent = self.next_sequence();
        self.sent
    }

    /// What a digest must see to be of all that was sent.
    pub fn sent_in_session(&self) -> u64 {
        self.sent
    }

    /// Room for a write of this length; one that exceeds the window alone goes when it is empty.
    pub fn has_room(&self, length: u64) -> bool {
        self.in_flight_bytes == 0 || self.in_flight_bytes + length <= MIRROR_WINDOW_BYTES
    }

    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// Accounts for a write that is sent now; returns its sequence. Its acknowledgement settles
    /// the blocks but for those of `except`, of which it holds only a part.
    pub fn send_write(&mut self, blocks: BlockRange, except: &[BlockRange], length: u64) -> u64 {
        assert!(self.up);
        let sequence = self.send();
        self.not_applied.push_back((sequence, length));
        self.not_durable.push_back((sequence, blocks));
        let held_back = except.iter().filter_map(|run| run.intersect(blocks));
        for run in crate::extent::subtract(blocks, held_back) {
            self.latest.insert(run, sequence);
        }
        self.in_flight_bytes += length;
        sequence
    }

    /// The backup holds these blocks as they are here; the next flush makes them durable there.
    pub fn count_as_sent(&mut self, blocks: BlockRange) {
        let sequence = self.next_sequence();
        self.not_durable.push_back((sequence, blocks));
        self.latest.insert(blocks, sequence);
    }

    pub fn send_flush(&mut self) -> u64 {
        let sequence = self.send();
        self.flush_sent = sequence;
        self.held_back = false;
        sequence
    }

    /// Writes were sent since the last flush was.
    pub fn wants_flush(&self) -> bool {
        self.up
            && self.flush_sent <= self.durable
            && self.not_durable.back().is_some_and(|(sequence, _)| *sequence > self.flush_sent)
    }

    /// A write of a guest was sent, its last message with this sequence.
    pub fn lags(&mut self, sequence: u64, bytes: u64, now: Instant) {
        self.lagging.push_back((sequence, bytes, now));
        self.lag_bytes += bytes;
    }

    pub fn lag(&self) -> Lag {
        let since = self.lagging.front().map(|(.., sent)| *sent);
        Lag { writes: self.lagging.len(), bytes: self.lag_bytes, since }
    }

    pub fn applied(&mut self, sequence: u64) {
        self.applied = self.applied.max(sequence);
        while let Some((_, length)) = self.not_applied.pop_front_if(|(held, _)| *held <= sequence) {
            self.in_flight_bytes -= length;
        }
        let later = self.carried.split_off(&(self.applied + 1));
        for carried in std::mem::replace(&mut self.carried, later).into_values().flatten() {
            self.superseded.remove(&carried);
        }
    }

    /// The write `sequence` does not leave: the later one covers it, and what it covered.
    pub fn supersede(&mut self, sequence: u64, by: u64) {
        assert!(self.applied < sequence && sequence < by, "it was on its way");
        let mut carried = self.carried.remove(&sequence).unwrap_or_default();
        carried.push(sequence);
        self.superseded.extend(carried.iter().map(|held| (*held, by)));
        self.carried.entry(by).or_default().extend(carried);
    }

    /// Whether the backup has what the write left, or what a later one left there.
    pub fn is_applied(&self, sequence: u64) -> bool {
        self.applied >= self.superseded.get(&sequence).copied().unwrap_or(sequence)
    }

    /// The backup made everything up to `sequence` durable; returns the blocks that are no longer
    /// unsent.
    pub fn flushed(&mut self, sequence: u64) -> Vec<BlockRange> {
        self.applied(sequence);
        self.durable = self.durable.max(sequence);
        while let Some((_, bytes, _)) = self.lagging.pop_front_if(|(held, ..)| *held <= sequence) {
            self.lag_bytes -= bytes;
        }
        let mut settled = Vec::new();
        while let Some((sent, blocks)) =
            self.not_durable.pop_front_if(|(held, _)| *held <= sequence)
        {
            settled.extend(self.latest.remove_if(blocks, |held| held == sent));
        }
        settled
    }

    /// What was sent for these blocks no longer equals what is here.
    pub fn forget(&mut self, blocks: BlockRange) {
        self.latest.remove(blocks);
        self.search_from(blocks.start);
    }

    /// There is something to push at this block or after it.
    pub fn search_from(&mut self, block: u64) {
        self.backlog = true;
        self.unreadable = None;
        self.cursor = self.cursor.min(block);
    }

    /// The parts of `blocks` with nothing on its way in this session.
    pub fn not_sent(&self, blocks: BlockRange) -> Vec<BlockRange> {
        crate::extent::subtract(blocks, self.latest.overlapping(blocks).map(|(run, _)| run))
    }

    /// The parts of `blocks` with something on its way that is not durable there.
    pub fn on_the_way(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.latest.overlapping(blocks).map(|(run, _)| run).collect()
    }

    /// The latest sequence that concerns these blocks, 0 if none is on its way: a fetch must not
    /// be served before it.
    pub fn latest_for(&self, blocks: BlockRange) -> u64 {
        self.latest.overlapping(blocks).map(|(_, sequence)| sequence).max().unwrap_or(0)
    }

    /// Everything sent is durable there.
    pub fn is_drained(&self) -> bool {
        self.not_durable.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_settles_only_blocks_without_a_newer_write() {
        let mut leg = MirrorLeg::default();
        leg.begin_session(false);
        let first = leg.send_write(BlockRange::new(0, 4), &[], 16384);
        let second = leg.send_write(BlockRange::new(1, 2), &[], 4096);
        let flushed = leg.flushed(first);
        assert_eq!(flushed, [BlockRange::new(0, 1), BlockRange::new(2, 4)]);
        assert!(!leg.is_drained());
        assert_eq!(leg.flushed(second), [BlockRange::new(1, 2)]);
        assert!(leg.is_drained());
        assert_eq!(leg.in_flight_bytes(), 0);
    }

    #[test]
    fn a_write_that_did_not_leave_is_applied_with_the_one_that_covers_it() {
        let mut leg = MirrorLeg::default();
        leg.begin_session(false);
        let [first, other, second, between, third] =
            std::array::from_fn(|_| leg.send_write(BlockRange::new(0, 1), &[], 4096));
        leg.supersede(first, second);
        leg.supersede(second, third);
        for applied in [other, between] {
            leg.applied(applied);
            assert!(leg.is_applied(applied));
            assert!(!leg.is_applied(first) && !leg.is_applied(second));
        }
        leg.applied(third);
        assert!(leg.is_applied(first) && leg.is_applied(second));
        assert!(leg.superseded.is_empty() && leg.carried.is_empty());
    }

    #[test]
    fn a_late_acknowledgement_of_an_older_session_settles_nothing() {
        let mut leg = MirrorLeg::default();
        leg.begin_session(false);
        let old = leg.send_write(BlockRange::new(0, 4), &[], 16384);
        leg.end_session();
        leg.begin_session(true);
        leg.send_write(BlockRange::new(0, 4), &[], 16384);
        assert_eq!(leg.flushed(old), []);
    }
}
