//! Unsent blocks are compared with the backup before they are sent: after an outage or a crash it
//! often holds what it is presumed to lack.
//!
//! | a piece is | event | next |
//! |---|---|---|
//! | chosen | comparing pays: the backup is asked for its digest | asked |
//! | chosen | of late nothing was equal: only one in some is compared | different |
//! | asked | the backup's digest is there | answered |
//! | asked | the backup cannot read it | different |
//! | answered | few are being read: it is read here | reading |
//! | reading | equal | as if it had been sent now |
//! | reading | differs | its parts are chosen; a smallest part is different |
//! | reading | could not be read here | unsent as before, tried again later |
//! | asked to reading | a write there begins | different, whatever the digests say |
//! | different | pushed (`resync.rs`) | |
//! | any | the link is lost | unsent as before, begun anew in the next session |
//!
//! Guarantees: the backup's digest is of a state that holds everything sent before it was asked; an
//! equal piece counts as sent, not as durable: the next flush that the backup acknowledges settles
//! it (law 10). No claim is held meanwhile, so that no write waits for the link.

use std::collections::{BTreeMap, VecDeque};

use super::event::{Action, OutgoingMessage};
use super::requests::Pending;
use super::state::Primary;
use crate::error::Result;
use crate::extent::{BlockRange, ExtentMap, subtract};
use crate::limits::{
    COMPARISON_PART_BYTES, COMPARISON_READS_MAX, COMPARISONS_MAX, DIFFERENT_RUNS_MAX,
    LINK_PIECE_BYTES,
};

/// After so many bytes of which nothing was equal, comparing does not pay.
const FUTILE_BYTES: u64 = 4 << 20;
/// One piece in so many is compared all the same, lest it begin to pay unnoticed.
const PROBE_EVERY: u32 = 16;

pub(super) type Digest = [u8; 32];

#[derive(Debug)]
struct Comparison {
    blocks: BlockRange,
    theirs: Option<Digest>,
    touched: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Differences {
    comparisons: BTreeMap<u64, Comparison>,
    /// The blocks of those, by tag.
    compared: ExtentMap<u64>,
    /// Of pieces that differ.
    parts: VecDeque<BlockRange>,
    answered: VecDeque<u64>,
    /// Being read here, also for a session that is over.
    reading: usize,
    /// To be pushed.
    different: ExtentMap<()>,
    /// Since something was equal.
    bytes_different: u64,
    chosen_futilely: u32,
}

impl Differences {
    pub(super) fn end_session(&mut self) {
        *self = Self { reading: self.reading, ..Self::default() };
    }

    /// A write to these blocks begins.
    pub(super) fn touch(&mut self, blocks: BlockRange) {
        let tags: Vec<u64> = self.compared.overlapping(blocks).map(|(_, tag)| tag).collect();
        for tag in tags {
            self.comparisons.get_mut(&tag).expect("its blocks are held").touched = true;
        }
    }

    /// Whether nothing is being compared, nor to be.
    pub(super) fn is_idle(&self) -> bool {
        self.comparisons.is_empty() && self.parts.is_empty()
    }

    /// The parts of `run` of which nothing is known, and nothing asked.
    fn unknown(&self, run: BlockRange) -> Vec<BlockRange> {
        let asked = self.compared.overlapping(run).map(|(held, _)| held);
        let parts = subtract(run, asked).into_iter();
        let known = |part: BlockRange| self.different.overlapping(part).map(|(held, ())| held);
        parts.flat_map(|part| subtract(part, known(part))).collect()
    }

    fn pays(&mut self) -> bool {
        if self.bytes_different < FUTILE_BYTES {
            return true;
        }
        self.chosen_futilely = (self.chosen_futilely + 1) % PROBE_EVERY;
        self.chosen_futilely == 0
    }

    fn end(&mut self, tag: u64) -> Option<Comparison> {
        let comparison = self.comparisons.remove(&tag)?;
        self.compared.remove(comparison.blocks);
        Some(comparison)
    }
}

impl Primary {
    /// Chooses what to compare, as much as may be under way.
    pub(super) fn pump_comparisons(&mut self, actions: &mut Vec<Action>) {
        while self.mirror.differences.reading < COMPARISON_READS_MAX {
            let Some(tag) = self.mirror.differences.answered.pop_front() else { break };
            let Some(comparison) = self.mirror.differences.comparisons.get(&tag) else { continue };
            let range = self.geometry.bytes_of(comparison.blocks);
            self.mirror.differences.reading += 1;
            let token = self.token(Pending::Digest { tag });
            actions.push(Action::DigestLocal { token, range });
        }
        while self.mirror.differences.comparisons.len() < COMPARISONS_MAX
            && self.mirror.differences.different.len() < DIFFERENT_RUNS_MAX
        {
            if let Some(part) = self.mirror.differences.parts.pop_front() {
                self.compare(part, true, actions);
            } else if let Some(run) = self.next_unknown() {
                self.mirror.cursor = run.end;
                let pays = self.mirror.differences.pays();
                self.compare(run, pays, actions);
            } else {
                break;
            }
        }
    }

    /// The next unsent blocks of which nothing is known and that nobody holds, one piece at most.
    fn next_unknown(&self) -> Option<BlockRange> {
        let per_piece = match self.mirror.one_by_one {
            true => 1,
            false => (LINK_PIECE_BYTES >> self.geometry.block_size().shift()).max(1),
        };
        let rest = BlockRange::new(self.mirror.cursor, self.geometry.blocks());
        let free = self.backlog_in(rest).find_map(|run| {
            let held = self.claims.on(run).map(|(held, ..)| held);
            let free = subtract(run, held).into_iter();
            free.flat_map(|part| self.mirror.differences.unknown(part)).next()
        })?;
        // Pieces end where frames do, so that blocks that lie together differ together.
        let piece_end = (free.start / per_piece + 1) * per_piece;
        Some(BlockRange::new(free.start, free.end.min(piece_end)))
    }

    fn compare(&mut self, blocks: BlockRange, pays: bool, actions: &mut Vec<Action>) {
        // A part may have been claimed since its piece was chosen: what is there changes now.
        if !pays || self.claims.on(blocks).next().is_some() {
            self.mirror.differences.different.insert(blocks, ());
            return;
        }
        let range = self.geometry.bytes_of(blocks);
        let tag = self.new_token();
        let comparison = Comparison { blocks, theirs: None, touched: false };
        self.mirror.differences.comparisons.insert(tag, comparison);
        self.mirror.differences.compared.insert(blocks, tag);
        let after_sequence = self.mirror.sent_in_session();
        actions.push(Action::Send(OutgoingMessage::Digest { tag, range, after_sequence }));
    }

    /// The backup told a digest, or could not.
    pub(super) fn digest_told(&mut self, tag: u64, result: Result<Digest>) {
        let differences = &mut self.mirror.differences;
        let Some(comparison) = differences.comparisons.get_mut(&tag) else { return };
        match result {
            Ok(theirs) => {
                comparison.theirs = Some(theirs);
                differences.answered.push_back(tag);
            }
            Err(_) => {
                let blocks = comparison.blocks;
                differences.end(tag);
                differences.different.insert(blocks, ());
            }
        }
    }

    /// The blocks of a comparison were read here, or could not be.
    pub(super) fn digest_read(&mut self, tag: u64, result: Result<Digest>) {
        self.mirror.differences.reading -= 1;
        let Some(comparison) = self.mirror.differences.end(tag) else { return };
        let Comparison { blocks, theirs, touched } = comparison;
        match result {
            _ if touched => self.mirror.differences.different.insert(blocks, ()),
            Ok(ours) if Some(ours) == theirs => self.found_equal(blocks),
            Ok(_) => self.found_different(blocks),
            Err(_) => self.could_not_read(),
        }
    }

    fn found_equal(&mut self, blocks: BlockRange) {
        self.mirror.differences.bytes_different = 0;
        let equal: Vec<BlockRange> = self.backlog_in(blocks).collect();
        for run in equal {
            self.mirror.count_as_sent(run);
            self.counters.bytes_found_equal += self.geometry.bytes_of(run).length;
        }
    }

    fn found_different(&mut self, blocks: BlockRange) {
        let length = self.geometry.bytes_of(blocks).length;
        let per_part = (COMPARISON_PART_BYTES >> self.geometry.block_size().shift()).max(1);
        let differences = &mut self.mirror.differences;
        if blocks.count() <= per_part {
            differences.bytes_different += length;
            differences.different.insert(blocks, ());
            return;
        }
        let parts = (blocks.start..blocks.end).step_by(per_part as usize);
        let parts = parts.map(|at| BlockRange::new(at, (at + per_part).min(blocks.end)));
        differences.parts.extend(parts);
    }

    /// The next blocks to push: different, unsent still, and held by nobody; one message at most.
    pub(super) fn next_different(&mut self) -> Option<BlockRange> {
        let fit = (LINK_PIECE_BYTES >> self.geometry.block_size().shift()).max(1);
        let per_message = if self.mirror.one_by_one { 1 } else { fit };
        let (mut gone, mut found) = (Vec::new(), None);
        for (run, ()) in self.mirror.differences.different.iter() {
            let mut left = self.backlog_in(run).peekable();
            if left.peek().is_none() {
                gone.push(run);
                continue;
            }
            found = left.find_map(|part| {
                let held = self.claims.on(part).map(|(held, ..)| held);
                subtract(part, held).first().copied()
            });
            if found.is_some() {
                break;
            }
        }
        for run in gone {
            self.mirror.differences.different.remove(run);
        }
        let free = found?;
        let run = BlockRange::new(free.start, free.end.min(free.start + per_message));
        self.mirror.differences.different.remove(run);
        Some(run)
    }
}
