//! Attached media: bundles that missing blocks are read from, ahead of the link.
//!
//! | medium | event | next |
//! |---|---|---|
//! | attached | a read answered | attached; what it brought is kept as a fetch's content is |
//! | attached | a chunk was damaged | attached; those blocks come over the link from now on |
//! | attached | reads failed, or one was not answered in time | gone |
//! | attached, must be vouched for | the link is lost | unvouched: it supplies nothing |
//! | unvouched | `vouch` | attached |
//! | any | `detach` | forgotten |
//!
//! Guarantees: a block is taken from a medium only if it is missing, not link-only (law 5), in the
//! coverage of the medium, and vouched for if the medium needs that (law 7); asked when the read
//! is sent and again when it is answered. A fetch that a medium fails is begun anew, and the
//! medium is not asked for those blocks again, so that it ends.
//! Does not know: bundles, files, who vouches.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::claims::ClaimId;
use super::event::{Action, FetchClass};
use super::state::Primary;
use crate::bitmap::Bitmap;
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ExtentMap, subtract};
use crate::limits::{
    MEDIUM_DAMAGED_MAX, MEDIUM_FAILURES_MAX, MEDIUM_IN_FLIGHT_MAX, MEDIUM_STALL_MS,
};
use crate::volume::content::Content;

pub type MediumId = u64;

/// What a medium may supply at all.
#[derive(Clone, Debug)]
pub struct Supply {
    /// Whole blocks, ascending, disjoint.
    pub coverage: Vec<BlockRange>,
    /// It is of an earlier generation: only blocks that were vouched for come from it.
    pub needs_vouching: bool,
}

/// What is known of a medium.
#[derive(Clone, Debug)]
pub enum MediumCondition {
    Attached,
    /// It needs vouching, and the session in which that was given is over.
    Unvouched,
    Gone(Error),
}

#[derive(Debug)]
struct Medium {
    supply: Supply,
    vouched: Option<Arc<Bitmap>>,
    damaged: ExtentMap<bool>,
    /// Reads in a row that failed.
    failures: u32,
    gone: Option<Error>,
    bytes_supplied: u64,
    reads_damaged: u64,
}

/// A read that was sent to a medium.
#[derive(Debug)]
struct Reading {
    medium: MediumId,
    tag: ClaimId,
    since: Instant,
}

/// What the machine tells of one medium.
#[derive(Clone, Debug)]
pub struct MediumStatus {
    pub condition: MediumCondition,
    pub bytes_supplied: u64,
    pub reads_damaged: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Media {
    media: BTreeMap<MediumId, Medium>,
    reading: BTreeMap<u64, Reading>,
    demand: VecDeque<ClaimId>,
    bulk: VecDeque<ClaimId>,
    token: u64,
}

impl Medium {
    fn condition(&self) -> MediumCondition {
        match &self.gone {
            Some(error) => MediumCondition::Gone(error.clone()),
            None if self.supply.needs_vouching && self.vouched.is_none() => {
                MediumCondition::Unvouched
            }
            None => MediumCondition::Attached,
        }
    }

    /// The parts of `run` that it may supply, as far as it is for the medium to say.
    fn supplies(&self, run: BlockRange) -> Vec<BlockRange> {
        if !matches!(self.condition(), MediumCondition::Attached) {
            return Vec::new();
        }
        let coverage = &self.supply.coverage;
        let first = coverage.partition_point(|held| held.end <= run.start);
        coverage[first..]
            .iter()
            .take_while(|held| held.start < run.end)
            .filter_map(|held| held.intersect(run))
            .flat_map(|part| match &self.vouched {
                Some(vouched) if self.supply.needs_vouching => vouched.runs(part, true).collect(),
                _ => vec![part],
            })
            .flat_map(|part| subtract(part, self.damaged.overlapping(part).map(|(held, _)| held)))
            .collect()
    }
}

impl Media {
    pub(super) fn queue(&mut self, tag: ClaimId, class: FetchClass) {
        match class {
            FetchClass::Demand => self.demand.push_back(tag),
            FetchClass::Bulk => self.bulk.push_back(tag),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.media.is_empty()
    }

    /// Reads in the background that wait or are under way.
    pub(super) fn bulk_waiting(&self) -> usize {
        self.bulk.len() + self.reading.len()
    }

    /// The reads that are under way at a medium, taken off the list: nobody awaits them any more.
    fn abandon(&mut self, medium: MediumId) -> Vec<ClaimId> {
        let tokens: Vec<u64> = self
            .reading
            .iter()
            .filter(|(_, reading)| reading.medium == medium)
            .map(|(token, _)| *token)
            .collect();
        tokens.iter().filter_map(|token| self.reading.remove(token)).map(|read| read.tag).collect()
    }
}

impl Primary {
    /// Missing blocks come from this medium too, from now on.
    pub fn attach(&mut self, id: MediumId, supply: Supply, actions: &mut Vec<Action>) {
        let sorted = supply.coverage.windows(2).all(|pair| pair[0].end <= pair[1].start);
        assert!(sorted, "coverage ascends and does not overlap");
        let medium = Medium {
            supply,
            vouched: None,
            damaged: ExtentMap::new(),
            failures: 0,
            gone: None,
            bytes_supplied: 0,
            reads_damaged: 0,
        };
        assert!(self.media.media.insert(id, medium).is_none(), "a medium is attached once");
        self.look_for_sources_again();
        self.settle(actions);
    }

    /// The blocks that a medium of an earlier generation may supply in this session.
    pub fn vouch(&mut self, id: MediumId, vouched: Arc<Bitmap>, actions: &mut Vec<Action>) {
        if let Some(medium) = self.media.media.get_mut(&id).filter(|_| self.mirror.up) {
            medium.vouched = Some(vouched);
            self.look_for_sources_again();
            self.settle(actions);
        }
    }

    /// Nothing comes from this medium any more; what it was asked for is asked of others.
    pub fn detach(&mut self, id: MediumId, actions: &mut Vec<Action>) {
        if self.media.media.remove(&id).is_some() {
            self.give_up_reads(id);
            self.settle(actions);
        }
    }

    #[must_use]
    pub fn medium_status(&self, id: MediumId) -> Option<MediumStatus> {
        self.media.media.get(&id).map(|medium| MediumStatus {
            condition: medium.condition(),
            bytes_supplied: medium.bytes_supplied,
            reads_damaged: medium.reads_damaged,
        })
    }

    /// What was vouched for is good for the session in which it was.
    pub(super) fn withdraw_vouching(&mut self) {
        let needing: Vec<MediumId> = self
            .media
            .media
            .iter_mut()
            .filter_map(|(id, medium)| medium.vouched.take().map(|_| *id))
            .collect();
        for id in needing {
            self.give_up_reads(id);
        }
    }

    fn give_up_reads(&mut self, id: MediumId) {
        for tag in self.media.abandon(id) {
            self.forget_fetch(tag);
        }
    }

    /// Cuts missing blocks up by whence they are to come: a medium, or else the link.
    pub(super) fn sources(&self, run: BlockRange) -> Vec<(BlockRange, Option<MediumId>)> {
        if self.media.is_empty() {
            return vec![(run, None)];
        }
        let mut left = vec![run];
        let mut found = Vec::new();
        for (id, medium) in &self.media.media {
            let parts: Vec<BlockRange> = left
                .iter()
                .flat_map(|part| medium.supplies(*part))
                .flat_map(|part| self.map.wanted(part))
                .collect();
            left = left.into_iter().flat_map(|part| subtract(part, parts.clone())).collect();
            found.extend(parts.into_iter().map(|part| (part, Some(*id))));
        }
        found.extend(left.into_iter().map(|part| (part, None)));
        found.sort_unstable_by_key(|(part, _)| part.start);
        found
    }

    fn may_supply(&self, id: MediumId, blocks: &[BlockRange]) -> bool {
        let Some(medium) = self.media.media.get(&id) else { return false };
        blocks.iter().all(|run| medium.supplies(*run) == [*run] && self.map.wanted(*run) == [*run])
    }

    pub(super) fn pump_media(&mut self, actions: &mut Vec<Action>) {
        while self.media.reading.len() < MEDIUM_IN_FLIGHT_MAX {
            let next = self.media.demand.pop_front().or_else(|| self.media.bulk.pop_front());
            let Some(tag) = next else { break };
            let Some((blocks, Some(medium))) = self.queued_fetch(tag) else { continue };
            let kept = self.claims.held_by(tag, blocks);
            if kept.is_empty() || !self.may_supply(medium, &kept) {
                self.forget_fetch(tag);
                continue;
            }
            self.media.token += 1;
            let token = self.media.token;
            self.media.reading.insert(token, Reading { medium, tag, since: self.now });
            self.begin_reading(tag);
            let range = self.geometry.bytes_of(blocks);
            actions.push(Action::ReadMedium { medium, token, range });
        }
    }

    /// A medium answered. Late answers, and those to a machine that is no more, are of no use.
    pub(super) fn medium_read(
        &mut self,
        medium: MediumId,
        token: u64,
        result: Result<Content>,
        actions: &mut Vec<Action>,
    ) {
        let expected = self.media.reading.get(&token).is_some_and(|held| held.medium == medium);
        if !expected {
            return;
        }
        let Reading { tag, .. } = self.media.reading.remove(&token).expect("just seen");
        let (blocks, class) = self.fetch_of(tag);
        let kept = self.claims.held_by(tag, blocks);
        match result {
            Ok(content) if self.may_supply(medium, &kept) => {
                let whole = self.geometry.bytes_of(blocks).length;
                assert_eq!(content.len(), whole, "a medium answers what it was asked");
                let held = self.media.media.get_mut(&medium).expect("it may supply");
                held.failures = 0;
                held.bytes_supplied += content.len();
                self.counters.bytes_from_media += content.len();
                self.keep(tag, blocks, class, &content, actions);
            }
            Ok(_) => self.forget_fetch(tag),
            Err(error) => self.medium_failed(medium, tag, blocks, &error),
        }
    }

    fn medium_failed(&mut self, id: MediumId, tag: ClaimId, blocks: BlockRange, error: &Error) {
        if let Some(medium) = self.media.media.get_mut(&id) {
            medium.reads_damaged += 1;
            medium.damaged.insert(blocks, true);
            let unreadable = error.kind() == ErrorKind::Device;
            medium.failures = if unreadable { medium.failures + 1 } else { 0 };
            let gone = error.says_gone()
                || medium.failures >= MEDIUM_FAILURES_MAX
                || medium.damaged.len() > MEDIUM_DAMAGED_MAX;
            if gone {
                self.medium_is_gone(id, error.clone());
            }
        }
        self.forget_fetch(tag);
    }

    fn medium_is_gone(&mut self, id: MediumId, error: Error) {
        let medium = self.media.media.get_mut(&id).expect("it was asked");
        medium.gone.get_or_insert(error);
        self.give_up_reads(id);
    }

    /// How long a read of a medium may take: its readers have time left for the link.
    fn medium_patience_ms(&self) -> u64 {
        MEDIUM_STALL_MS.min(self.options.missing_deadline_ms / 2)
    }

    pub(super) fn tick_media(&mut self) {
        let patience = self.medium_patience_ms();
        let stalled: Vec<MediumId> = self
            .media
            .reading
            .values()
            .filter(|reading| self.now.since_ms(reading.since) >= patience)
            .map(|reading| reading.medium)
            .collect();
        for id in stalled {
            if self.media.media.contains_key(&id) {
                let words = format!("the medium did not answer within {patience} ms");
                self.medium_is_gone(id, Error::new(ErrorKind::Timeout, words));
            }
        }
    }

    fn look_for_sources_again(&mut self) {
        self.forget_queued_fetches();
        self.ready.extend(std::mem::take(&mut self.waiting.missing));
    }
}
