//! Unsent blocks on their way to the backup, and what it has acknowledged.
//!
//! After a reconnect every unsent block that this session has not sent and that the backup does
//! not hold already (`differences.rs`) is read and sent, in the same stream as live writes and
//! under a claim, so that it never overtakes or undoes one. Until none is left, no flush counts as
//! mirrored (R10).

use super::claims::{ClaimId, ClaimKind};
use super::event::{Action, MirrorPolicy, OutgoingMessage};
use super::requests::Pending;
use super::state::Primary;
use crate::device::{AlignedBuffer, Payload};
use crate::error::Result;
use crate::extent::{BlockRange, ByteRange, subtract};
use crate::limits::{BULK_IN_FLIGHT_MAX, LINK_PIECE_BYTES, MIRROR_WINDOW_BYTES};
use crate::volume::content::Content;

/// What a message without payload counts for in the mirror window.
pub(super) const ZERO_MESSAGE_BYTES: u64 = 64;

impl Primary {
    /// Blocks that the range covers in part and that are unsent with nothing on the way: sending
    /// the range does not settle them, they are still to be pushed whole.
    pub(super) fn partly_unsent(&self, range: ByteRange) -> Vec<BlockRange> {
        let whole = self.geometry.covered(range);
        let holes = if whole.is_empty() { vec![] } else { vec![whole] };
        let edges = subtract(self.geometry.touched(range), holes);
        let unsent = edges.into_iter().flat_map(|edge| self.map.unsent().runs(edge, true));
        unsent.flat_map(|run| self.mirror.not_sent(run)).collect()
    }

    /// A write has ended here. It may have begun in an earlier session or without one, when no
    /// push of its blocks could begin: then it is part of the backlog (R10).
    pub(super) fn push_what_was_written(&mut self, blocks: BlockRange) {
        let mut unsent = self.map.unsent().runs(blocks, true);
        let left = unsent.find_map(|run| self.mirror.not_sent(run).first().copied());
        if let Some(run) = left
            && self.mirror.up
        {
            self.mirror.search_from(run.start);
        }
    }

    /// Sends content in pieces that nothing waits long behind; returns the last sequence.
    pub(super) fn send_content(
        &mut self,
        offset: u64,
        content: &Content,
        except: &[BlockRange],
        actions: &mut Vec<Action>,
    ) -> u64 {
        let piece = LINK_PIECE_BYTES.max(self.geometry.block_size().bytes());
        let mut done = 0;
        let mut last = 0;
        while done < content.len() {
            let at = offset + done;
            let left = content.len() - done;
            let (length, cost) = match content {
                // Cut where blocks end, so that a block is rarely in two pieces.
                Content::Bytes(_) => {
                    let length = left.min(piece - at % piece);
                    (length, length)
                }
                Content::Zeros(_) => (left, ZERO_MESSAGE_BYTES),
            };
            let blocks = self.geometry.touched(ByteRange::new(at, length));
            last = self.mirror.send_write(blocks, except, cost);
            actions.push(Action::Send(OutgoingMessage::Write {
                sequence: last,
                offset: at,
                content: content.slice(done, length),
            }));
            done += length;
        }
        last
    }

    pub(super) fn pump_resync(&mut self, actions: &mut Vec<Action>) {
        while self.mirror.up && self.mirror.backlog {
            self.pump_pushes(actions);
            self.pump_comparisons(actions);
            if !self.mirror.differences.is_idle() || self.mirror.unreadable.is_some() {
                return;
            }
            if self.mirror.cursor > 0 {
                // Once more from the beginning, for what is behind.
                self.mirror.cursor = 0;
            } else if self.pushes == 0 && !self.is_anything_unsent() {
                self.mirror.backlog = false;
                self.ready.extend(std::mem::take(&mut self.waiting.resync));
            } else {
                return;
            }
        }
    }

    fn pump_pushes(&mut self, actions: &mut Vec<Action>) {
        // Live writes keep the larger part of the window, and nearly all of it while there are any.
        let share = if self.mirror.lag().writes > 0 { 8 } else { 2 };
        while self.pushes < BULK_IN_FLIGHT_MAX
            && self.mirror.in_flight_bytes() <= MIRROR_WINDOW_BYTES / share
        {
            let Some(run) = self.next_different() else { return };
            self.begin_push(run, actions);
        }
    }

    fn is_anything_unsent(&self) -> bool {
        self.backlog_in(self.geometry.all_blocks()).next().is_some()
    }

    /// Unsent current blocks that this session has not sent.
    pub(super) fn backlog_in(&self, blocks: BlockRange) -> impl Iterator<Item = BlockRange> {
        let unsent = self.map.unsent().runs(blocks, true);
        let not_sent = unsent.flat_map(|run| self.mirror.not_sent(run));
        not_sent.flat_map(|part| self.map.current().runs(part, true))
    }

    fn begin_push(&mut self, run: BlockRange, actions: &mut Vec<Action>) {
        let claim = self.claims.take(&[run], ClaimKind::Push);
        self.pushes += 1;
        let range = self.geometry.bytes_of(run);
        let token = self.token(Pending::Push { claim, blocks: run });
        actions.push(Action::ReadLocal { token, range, parts: vec![range] });
    }

    pub(super) fn push_read(
        &mut self,
        claim: ClaimId,
        blocks: BlockRange,
        result: Result<AlignedBuffer>,
        actions: &mut Vec<Action>,
    ) {
        self.pushes -= 1;
        match result {
            Ok(buffer) if self.mirror.up => {
                let range = self.geometry.bytes_of(blocks);
                let content = if buffer.iter().all(|byte| *byte == 0) {
                    Content::Zeros(range.length)
                } else {
                    Content::Bytes(Payload::new(buffer))
                };
                self.send_content(range.offset, &content, &[], actions);
                self.counters.bytes_resent += range.length;
            }
            Ok(_) => {}
            Err(_) => self.could_not_read(),
        }
        let waiters = self.claims.release(claim, blocks);
        self.ready.extend(waiters);
    }

    /// Neither side has these unsent bytes for sure: they stay unsent and the backlog stays. The
    /// others are pushed, these are tried again later.
    pub(super) fn could_not_read(&mut self) {
        self.counters.errors += 1;
        self.mirror.unreadable = Some(self.now);
        self.mirror.one_by_one = true;
    }

    /// These writes did not leave: the one that was sent just now covers them. No flush stands
    /// between, so only who waits until a write is applied need know.
    pub fn superseded(&mut self, sequences: &[u64], by: u64) {
        if self.options.policy == MirrorPolicy::Write {
            for sequence in sequences {
                self.mirror.supersede(*sequence, by);
            }
        }
    }

    pub(super) fn backup_applied(&mut self, sequence: u64) {
        if !self.mirror.up {
            return;
        }
        self.mirror.applied(sequence);
        self.ready.extend(std::mem::take(&mut self.waiting.window));
        self.ready.extend(std::mem::take(&mut self.waiting.applied));
    }
}
