//! Missing blocks on their way here: fetches over the link, and the claims of a merge.
//!
//! | fetch | next | then |
//! |---|---|---|
//! | queued | sent, when the link is up and fewer than the limit are | |
//! | queued | reading, if an attached medium is to supply it (`media.rs`) | |
//! | reading | answered: as if sent; failed: gone, whoever waited asks again | filling |
//! | sent | answered: readers are served at once; blocks it still claims are written | filling |
//! | sent | link lost: queued again | |
//! | filling | written: current, claim ends | gone |
//!
//! One fetch per missing block, however many wait (trap 7): later ones join the claim.

use std::collections::{HashMap, VecDeque};

use super::claims::{ClaimId, ClaimKind};
use super::event::{Action, FetchClass, OutgoingMessage};
use super::media::MediumId;
use super::requests::Pending;
use super::state::Primary;
use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, subtract};
use crate::limits::{BULK_IN_FLIGHT_MAX, FETCH_IN_FLIGHT_MAX, LINK_PIECE_BYTES};
use crate::map::UNSENT;
use crate::volume::content::Content;

#[derive(Debug)]
struct Fetch {
    blocks: BlockRange,
    class: FetchClass,
    /// Whence it is to come; the link where none.
    medium: Option<MediumId>,
    state: FetchState,
}

#[derive(Debug)]
enum FetchState {
    Queued,
    Reading,
    Sent,
    Filling { writes: usize, failure: Option<Error> },
}

/// Fetches by tag; the tag is the claim.
#[derive(Debug, Default)]
pub(super) struct Fetches {
    by_tag: HashMap<ClaimId, Fetch>,
    demand: VecDeque<ClaimId>,
    bulk: VecDeque<ClaimId>,
    sent_demand: usize,
    sent_bulk: usize,
    pub hydrate: bool,
    cursor: u64,
}

impl Fetches {
    /// The link is gone: what was on the wire is asked for again.
    pub(super) fn requeue_sent(&mut self) {
        let mut again: Vec<_> = self
            .by_tag
            .iter_mut()
            .filter(|(_, fetch)| matches!(fetch.state, FetchState::Sent))
            .map(|(tag, fetch)| {
                fetch.state = FetchState::Queued;
                (*tag, fetch.class)
            })
            .collect();
        again.sort_unstable_by_key(|(tag, _)| std::cmp::Reverse(*tag));
        for (tag, class) in again {
            match class {
                FetchClass::Demand => self.demand.push_front(tag),
                FetchClass::Bulk => self.bulk.push_front(tag),
            }
        }
        self.sent_demand = 0;
        self.sent_bulk = 0;
    }

    fn is_queued(&self, tag: ClaimId) -> bool {
        self.by_tag.get(&tag).is_some_and(|fetch| matches!(fetch.state, FetchState::Queued))
    }

    fn count_answer(&mut self, class: FetchClass) {
        match class {
            FetchClass::Demand => self.sent_demand -= 1,
            FetchClass::Bulk => self.sent_bulk -= 1,
        }
    }
}

impl Primary {
    /// Makes `id` wait until these missing blocks were brought, by whoever holds them or by a new
    /// fetch.
    pub(super) fn bring(&mut self, id: u64, blocks: BlockRange, class: FetchClass) {
        let held: Vec<_> = self.claims.on(blocks).map(|(run, claim, _)| (run, claim)).collect();
        for (_, claim) in &held {
            self.claims.wait(*claim, id);
        }
        for gap in subtract(blocks, held.into_iter().map(|(run, _)| run)) {
            for (run, medium) in self.sources(gap) {
                if medium.is_none() && !self.options.backup {
                    // Only a bundle or a write can bring it.
                    self.waiting.missing.push(id);
                    continue;
                }
                for piece in self.fetch_pieces(run) {
                    let tag = self.new_fetch(piece, class, medium);
                    self.claims.wait(tag, id);
                }
            }
        }
    }

    /// The bytes of these blocks are right here.
    pub(super) fn became_current(&mut self, blocks: BlockRange) {
        self.map.mark_current(blocks);
        self.push_what_was_written(blocks);
        self.ready.extend(std::mem::take(&mut self.waiting.missing));
    }

    fn fetch_pieces(&self, run: BlockRange) -> impl Iterator<Item = BlockRange> + use<> {
        let per_fetch = (LINK_PIECE_BYTES >> self.geometry.block_size().shift()).max(1);
        (run.start..run.end)
            .step_by(per_fetch as usize)
            .map(move |start| BlockRange::new(start, (start + per_fetch).min(run.end)))
    }

    fn new_fetch(
        &mut self,
        blocks: BlockRange,
        class: FetchClass,
        medium: Option<MediumId>,
    ) -> ClaimId {
        let tag = self.claims.take(&[blocks], ClaimKind::Fetch);
        let fetch = Fetch { blocks, class, medium, state: FetchState::Queued };
        self.fetches.by_tag.insert(tag, fetch);
        match class {
            _ if medium.is_some() => self.media.queue(tag, class),
            FetchClass::Demand => self.fetches.demand.push_back(tag),
            FetchClass::Bulk => self.fetches.bulk.push_back(tag),
        }
        tag
    }

    /// The blocks of a fetch that is queued, and whence they are to come.
    pub(super) fn queued_fetch(&self, tag: ClaimId) -> Option<(BlockRange, Option<MediumId>)> {
        let fetch = self.fetches.by_tag.get(&tag)?;
        matches!(fetch.state, FetchState::Queued).then_some((fetch.blocks, fetch.medium))
    }

    pub(super) fn begin_reading(&mut self, tag: ClaimId) {
        self.fetches.by_tag.get_mut(&tag).expect("it was queued").state = FetchState::Reading;
    }

    pub(super) fn fetch_of(&self, tag: ClaimId) -> (BlockRange, FetchClass) {
        let fetch = &self.fetches.by_tag[&tag];
        (fetch.blocks, fetch.class)
    }

    /// Ends a fetch that brought nothing; whoever waited for it looks for its blocks again.
    pub(super) fn forget_fetch(&mut self, tag: ClaimId) {
        let fetch = self.fetches.by_tag.remove(&tag).expect("a fetch is forgotten once");
        let waiters = self.claims.release(tag, fetch.blocks);
        self.ready.extend(waiters);
    }

    /// For when there is another source than there was: fetches that were not begun are begun anew.
    pub(super) fn forget_queued_fetches(&mut self) {
        let queued = self.fetches.by_tag.iter();
        let queued = queued.filter(|(_, fetch)| matches!(fetch.state, FetchState::Queued));
        let mut tags: Vec<ClaimId> = queued.map(|(tag, _)| *tag).collect();
        tags.sort_unstable();
        for tag in tags {
            self.forget_fetch(tag);
        }
    }

    pub(super) fn pump_fetches(&mut self, actions: &mut Vec<Action>) {
        while self.mirror.up && self.fetches.sent_demand < FETCH_IN_FLIGHT_MAX {
            let Some(tag) = self.fetches.demand.pop_front() else { break };
            if !self.was_overtaken(tag) {
                self.fetches.sent_demand += 1;
                self.send_fetch(tag, actions);
            }
        }
        while self.mirror.up && self.fetches.sent_bulk < BULK_IN_FLIGHT_MAX {
            let Some(tag) = self.fetches.bulk.pop_front() else { break };
            if !self.was_overtaken(tag) {
                self.fetches.sent_bulk += 1;
                self.send_fetch(tag, actions);
            }
        }
    }

    /// Whether writes or merges took everything over that a queued fetch was to bring; then it is
    /// gone.
    fn was_overtaken(&mut self, tag: ClaimId) -> bool {
        let Some((blocks, _)) = self.queued_fetch(tag) else { return true };
        let overtaken = self.claims.held_by(tag, blocks).is_empty();
        if overtaken {
            self.forget_fetch(tag);
        }
        overtaken
    }

    fn send_fetch(&mut self, tag: ClaimId, actions: &mut Vec<Action>) {
        let fetch = self.fetches.by_tag.get_mut(&tag).expect("queued fetches exist");
        fetch.state = FetchState::Sent;
        self.counters.fetches += 1;
        actions.push(Action::Send(OutgoingMessage::Fetch {
            tag,
            class: fetch.class,
            range: self.geometry.bytes_of(fetch.blocks),
            after_sequence: self.mirror.latest_for(fetch.blocks),
        }));
    }

    pub(super) fn fetched(
        &mut self,
        tag: ClaimId,
        result: Result<Content>,
        actions: &mut Vec<Action>,
    ) {
        let Some(fetch) = self.fetches.by_tag.get(&tag) else { return };
        if !matches!(fetch.state, FetchState::Sent) {
            return;
        }
        let (blocks, class) = (fetch.blocks, fetch.class);
        self.fetches.count_answer(class);
        let expected = self.geometry.bytes_of(blocks).length;
        let result = result.and_then(|content| {
            if content.len() == expected {
                Ok(content)
            } else {
                Err(Error::link(format!(
                    "the backup answered a fetch of {expected} bytes with {}",
                    content.len()
                )))
            }
        });
        match result {
            Err(error) => {
                self.fetches.by_tag.remove(&tag);
                if class == FetchClass::Bulk {
                    // Asked for again when someone turns hydration on: never in a tight loop.
                    self.fetches.hydrate = false;
                    self.counters.errors += 1;
                }
                for id in self.claims.release(tag, blocks) {
                    self.fail_waiting(id, &error, actions);
                    self.ready.push_back(id);
                }
            }
            Ok(content) => {
                self.counters.bytes_fetched += content.len();
                self.keep(tag, blocks, class, &content, actions);
            }
        }
    }

    /// Content of a fetch: answers its readers, and writes what it still holds.
    pub(super) fn keep(
        &mut self,
        tag: ClaimId,
        blocks: BlockRange,
        class: FetchClass,
        content: &Content,
        actions: &mut Vec<Action>,
    ) {
        if class == FetchClass::Bulk {
            self.counters.bytes_hydrated += content.len();
        }
        // What a write took over meanwhile is newer: it stays (law 4), and whoever waits for the
        // rest of this fetch may have begun after that write ended (law 1).
        let kept = self.claims.held_by(tag, blocks);
        let from = self.geometry.bytes_of(blocks).offset;
        let slice = |run: BlockRange| {
            let bytes = self.geometry.bytes_of(run);
            content.slice(bytes.offset - from, bytes.length)
        };
        let waiters = self.claims.waiters(tag).to_vec();
        let pieces: Vec<_> = kept.iter().map(|run| (*run, slice(*run))).collect();
        for (run, piece) in &pieces {
            for id in &waiters {
                self.deliver(*id, *run, piece);
            }
        }
        if kept.is_empty() || self.poisoned.is_some() {
            self.forget_fetch(tag);
            return;
        }
        // Content that the backup has not made durable is unsent until it is.
        for run in kept {
            for part in self.mirror.on_the_way(run) {
                self.map.file().fill(UNSENT, part, true);
            }
        }
        self.claims.set_kind(tag, ClaimKind::Fill);
        let fetch = self.fetches.by_tag.get_mut(&tag).expect("it was just answered");
        fetch.state = FetchState::Filling { writes: pieces.len(), failure: None };
        for (run, content) in pieces {
            let offset = self.geometry.bytes_of(run).offset;
            let token = self.token(Pending::Fill { tag, blocks: run });
            actions.push(Action::WriteLocal { token, offset, content });
        }
    }

    /// One run of a fetched range was written here.
    pub(super) fn filled(
        &mut self,
        tag: ClaimId,
        run: BlockRange,
        result: Result<()>,
        actions: &mut Vec<Action>,
    ) {
        match &result {
            Ok(()) => {
                self.became_current(run);
            }
            Err(_) => {
                self.map.file().fill(UNSENT, run, false);
            }
        }
        let fetch = self.fetches.by_tag.get_mut(&tag).expect("it is filling");
        let blocks = fetch.blocks;
        let FetchState::Filling { writes, failure } = &mut fetch.state else {
            unreachable!("only a filling fetch writes")
        };
        *writes -= 1;
        if let Err(error) = result {
            *failure = Some(error);
        }
        if *writes > 0 {
            return;
        }
        let failure = failure.take();
        self.fetches.by_tag.remove(&tag);
        for id in self.claims.release(tag, blocks) {
            if let Some(error) = &failure {
                self.fail_waiting(id, error, actions);
            }
            self.ready.push_back(id);
        }
    }

    /// Background hydration: the next missing blocks that nobody brings, found anew each time, so
    /// that nothing behind the cursor is forgotten (trap 40).
    pub(super) fn pump_hydration(&mut self) {
        let all = self.geometry.all_blocks();
        while self.fetches.hydrate
            && self.mirror.up
            && self.poisoned.is_none()
            && self.fetches.sent_bulk + self.fetches.bulk.len() + self.media.bulk_waiting()
                < BULK_IN_FLIGHT_MAX
        {
            let rest = BlockRange::new(self.fetches.cursor, all.end);
            match self.next_unclaimed_missing(rest) {
                Some(run) => {
                    let piece = self.fetch_pieces(run).next().expect("a run is not empty");
                    let (piece, medium) = self.sources(piece)[0];
                    self.new_fetch(piece, FetchClass::Bulk, medium);
                    self.fetches.cursor = piece.end;
                }
                None if self.fetches.cursor > 0 => self.fetches.cursor = 0,
                None => {
                    self.fetches.hydrate = self.map.current().next(all, false).is_some();
                    break;
                }
            }
        }
    }

    fn next_unclaimed_missing(&self, within: BlockRange) -> Option<BlockRange> {
        self.map.current().runs(within, false).find_map(|run| {
            let held = self.claims.on(run).map(|(held, _, _)| held);
            subtract(run, held).first().copied()
        })
    }

    /// Claims the blocks of the range that a bundle may supply and nobody brings, if there are any.
    /// A fetch that was not sent, as when the link is down, brings nothing: it is taken over, and
    /// whoever waits for it waits for the merge. Ended by `Event::MergeWritten`.
    ///
    /// `vouched`: of a bundle that may supply only these.
    pub fn claim_for_merge(
        &mut self,
        blocks: BlockRange,
        vouched: Option<&Bitmap>,
    ) -> Result<Option<(ClaimId, Vec<BlockRange>)>> {
        if let Some(error) = &self.poisoned {
            return Err(error.clone());
        }
        let brought = |run: BlockRange| {
            let held = self.claims.on(run).filter(|(_, claim, _)| !self.fetches.is_queued(*claim));
            held.map(|(held, ..)| held).collect::<Vec<_>>()
        };
        let wanted = self.map.wanted(blocks).into_iter().flat_map(|run| match vouched {
            Some(vouched) => vouched.runs(run, true).collect(),
            None => vec![run],
        });
        let runs: Vec<BlockRange> = wanted.flat_map(|run| subtract(run, brought(run))).collect();
        if runs.is_empty() {
            return Ok(None);
        }
        let waiters: Vec<u64> = runs
            .iter()
            .flat_map(|run| self.claims.on(*run))
            .flat_map(|(_, claim, _)| self.claims.waiters(claim).to_vec())
            .collect();
        let claim = self.claims.take(&runs, ClaimKind::Merge);
        for id in waiters {
            self.claims.wait(claim, id);
        }
        self.merges.insert(claim, runs.clone());
        Ok(Some((claim, runs)))
    }

    pub(super) fn merge_written(&mut self, claim: ClaimId, result: &Result<()>) {
        let runs = self.merges.remove(&claim).expect("a merge claim ends once");
        if result.is_ok() {
            for run in &runs {
                self.became_current(*run);
                self.counters.bytes_merged += self.geometry.bytes_of(*run).length;
            }
        }
        let span = BlockRange::new(runs[0].start, runs[runs.len() - 1].end);
        let waiters = self.claims.release(claim, span);
        self.ready.extend(waiters);
    }
}
