//! The primary as a pure state machine: events in, actions out. No clock, thread, socket or device.
//!
//! | event | what it does |
//! |---|---|
//! | request | begins an operation; it advances as far as claims, intent, window and map allow |
//! | local write done | its blocks become current, its claim ends, whoever waited goes on |
//! | fetched | readers are answered, blocks still claimed by the fetch are written, then current |
//! | link up | fetches are sent (again), everything unsent is sent again |
//! | link down | nothing current waits; writes go on as unsent; mirrored flushes turn to the map |
//! | committed | flushes that wait for the map are answered, cooled extents may leave the log |
//! | a failed device flush, commit or intent record | poison: writes and flushes fail (law 11) |
//!
//! Guarantees laws 1, 3, 4, 5 and 11 as long as the driver does each action once, in any order,
//! and reports it. Does not know: how actions are done, how the backup is reached.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::claims::{ClaimId, Claims};
use super::event::{Action, Event, MirrorPolicy, Options, OutgoingMessage};
use super::fetch::Fetches;
use super::flushes::Cut;
use super::hot::HotExtents;
use super::media::Media;
use super::mirror::{Lag, MirrorLeg};
use super::requests::{Operation, Pending};
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BlockRange;
use crate::limits::{COMMIT_INTERVAL_MS, COMMIT_PAGES_MAX};
use crate::map::OverwriteMap;
use crate::units::Geometry;
use crate::volume::service::Outcome;

/// What has happened since the volume was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub fetches: u64,
    pub bytes_fetched: u64,
    pub bytes_hydrated: u64,
    pub bytes_merged: u64,
    /// Missing bytes read from attached media.
    pub bytes_from_media: u64,
    pub bytes_resent: u64,
    /// Not sent again, since the backup was found to hold them.
    pub bytes_found_equal: u64,
    pub errors: u64,
}

/// A range that is being compared with the backup.
pub type WatchId = u64;

/// See the module.
#[derive(Debug)]
pub struct Primary {
    pub(super) map: Arc<OverwriteMap>,
    pub(super) geometry: Geometry,
    pub(super) options: Options,
    pub(super) now: Instant,
    pub(super) operations: BTreeMap<u64, Operation>,
    /// Operations to look at again before this event is done with.
    pub(super) ready: VecDeque<u64>,
    pub(super) pending: HashMap<u64, Pending>,
    token: u64,
    pub(super) claims: Claims,
    pub(super) hot: HotExtents,
    pub(super) mirror: MirrorLeg,
    pub(super) fetches: Fetches,
    pub(super) media: Media,
    pub(super) merges: HashMap<ClaimId, Vec<BlockRange>>,
    pub(super) pushes: usize,
    pub(super) commits: Commits,
    pub(super) device_flush: DeviceFlush,
    pub(super) waiting: Waiting,
    pub(super) poisoned: Option<Error>,
    pub(super) counters: Counters,
    watches: HashMap<WatchId, (BlockRange, bool)>,
    last_mirror_flush: Instant,
}

/// Map commits: begun ones are numbered, `whole` is the latest that left nothing waiting.
#[derive(Debug, Default)]
pub(super) struct Commits {
    pub begun: u64,
    pub whole: u64,
    under_way: Option<bool>,
    again: bool,
    last_begun: Instant,
}

/// Device flushes, grouped: requests that come while one is under way share the next.
#[derive(Debug, Default)]
pub(super) struct DeviceFlush {
    pub under_way: Vec<u64>,
    pub next: Vec<u64>,
    pub active: bool,
}

/// Operations that wait for something other than a claim.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub window: Vec<u64>,
    pub intent: Vec<u64>,
    pub room: Vec<u64>,
    pub applied: Vec<u64>,
    pub resync: Vec<u64>,
    /// For blocks that nobody brings.
    pub missing: Vec<u64>,
}

impl Primary {
    #[must_use]
    pub fn new(map: Arc<OverwriteMap>, options: Options) -> Self {
        Self {
            geometry: map.geometry(),
            map,
            options,
            now: Instant::default(),
            operations: BTreeMap::new(),
            ready: VecDeque::new(),
            pending: HashMap::new(),
            token: 0,
            claims: Claims::default(),
            hot: HotExtents::default(),
            mirror: MirrorLeg::default(),
            fetches: Fetches::default(),
            media: Media::default(),
            merges: HashMap::new(),
            pushes: 0,
            commits: Commits::default(),
            device_flush: DeviceFlush::default(),
            waiting: Waiting::default(),
            poisoned: None,
            counters: Counters::default(),
            watches: HashMap::new(),
            last_mirror_flush: Instant::default(),
        }
    }

    /// Takes one event; what is to be done about it is appended to `actions`.
    pub fn apply(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        self.now = now;
        match event {
            Event::Request { id, command } => self.begin(id, command),
            Event::Cut { id, snapshot, label, selection, timeout_ms } => {
                let deadline = now.plus_ms(timeout_ms);
                self.begin_cut(id, Cut::new(snapshot, label, selection, deadline));
            }
            Event::ReadDone { token, result } => self.read_done(token, result, actions),
            Event::WriteDone { token, result } => self.write_done(token, result, actions),
            Event::DeviceFlushed { result } => self.device_flushed(result, actions),
            Event::Committed { epoch, result } => self.committed(epoch, result, actions),
            Event::IntentRecorded { result } => match result {
                Ok(()) => {
                    self.hot.recorded();
                    self.ready.extend(std::mem::take(&mut self.waiting.intent));
                }
                Err(error) => self.poison(&error),
            },
            Event::LinkUp => self.link_up(),
            Event::LinkDown => self.link_down(actions),
            Event::Fetched { tag, result } => self.fetched(tag, result, actions),
            Event::MediumRead { medium, token, result } => {
                self.medium_read(medium, token, result, actions);
            }
            Event::DigestTold { tag, result } => self.digest_told(tag, result),
            Event::DigestDone { token, result } => self.digest_done(token, result),
            Event::Applied { sequence } => self.backup_applied(sequence),
            Event::Flushed { sequence } => self.backup_flushed(sequence),
            Event::CutAnswered { sequence, result } => self.cut_answered(sequence, result, actions),
            Event::CommitMap { id } => self.begin_commit(id, actions),
            Event::MergeWritten { claim, result } => self.merge_written(claim, &result),
            Event::Hydrate { enabled } => self.fetches.hydrate = enabled,
            Event::Tick => self.tick(actions),
        }
        self.settle(actions);
    }

    /// Lets everything advance that can.
    pub(super) fn settle(&mut self, actions: &mut Vec<Action>) {
        loop {
            // First, so that a block which is written without a pause gets its push too.
            self.pump_resync(actions);
            while let Some(id) = self.ready.pop_front() {
                self.advance(id, actions);
            }
            self.pump_resync(actions);
            self.pump_lag(actions);
            self.pump_hydration();
            self.pump_media(actions);
            self.pump_fetches(actions);
            if let Some(extents) = self.hot.next_record() {
                actions.push(Action::RecordIntent { extents });
            }
            if self.ready.is_empty() {
                break;
            }
        }
    }

    /// A number that nothing had before.
    pub(super) fn new_token(&mut self) -> u64 {
        self.token += 1;
        self.token
    }

    pub(super) fn token(&mut self, pending: Pending) -> u64 {
        let token = self.new_token();
        self.pending.insert(token, pending);
        token
    }

    pub(super) fn complete(&mut self, id: u64, outcome: Outcome, actions: &mut Vec<Action>) {
        self.counters.errors += u64::from(outcome.is_err());
        actions.push(Action::Complete { id, outcome });
    }

    pub(super) fn poison(&mut self, cause: &Error) {
        if self.poisoned.is_some() {
            return;
        }
        self.poisoned = Some(Error::new(
            ErrorKind::Poisoned,
            format!(
                "the volume takes no more writes, since this failed: {cause}; mend that, then \
                 restart the daemon"
            ),
        ));
        // Requests whose local part has not begun fail now; the others when it ends.
        let all: Vec<u64> = self.operations.keys().copied().collect();
        self.ready.extend(all);
        for id in self.device_flush.under_way.drain(..).chain(self.device_flush.next.drain(..)) {
            self.ready.push_back(id);
        }
        self.commits.again = false;
    }

    fn link_up(&mut self) {
        let backlog = self.map.unsent().any_set(self.geometry.all_blocks());
        self.mirror.begin_session(backlog);
        self.last_mirror_flush = self.now;
        self.ready.extend(std::mem::take(&mut self.waiting.window));
    }

    fn link_down(&mut self, actions: &mut Vec<Action>) {
        if !self.mirror.up {
            return;
        }
        self.mirror.end_session();
        self.fetches.requeue_sent();
        self.withdraw_vouching();
        for list in [&mut self.waiting.window, &mut self.waiting.applied, &mut self.waiting.resync]
        {
            self.ready.extend(std::mem::take(list));
        }
        self.flushes_lose_the_link(actions);
    }

    fn tick(&mut self, actions: &mut Vec<Action>) {
        let expired = self.operations.iter().filter(|(_, operation)| operation.expired(self.now));
        let expired: Vec<u64> = expired.map(|(id, _)| *id).collect();
        self.ready.extend(expired);
        self.tick_media();
        if self.poisoned.is_some() {
            return;
        }
        let tried = self.mirror.unreadable;
        if tried.is_some_and(|tried| self.now.since_ms(tried) >= COMMIT_INTERVAL_MS) {
            self.mirror.unreadable = None;
        }
        self.hot.cool(self.commits.whole, self.now);
        let due = self.now.since_ms(self.commits.last_begun) >= COMMIT_INTERVAL_MS;
        let wanted = self.map.file().has_uncommitted() || self.hot.wants_commit(self.commits.whole);
        if due && wanted {
            self.request_commit(actions);
        }
        if self.mirror.wants_flush()
            && self.now.since_ms(self.last_mirror_flush) >= COMMIT_INTERVAL_MS
        {
            self.flush_backup(actions);
        }
    }

    /// Asks the backup to make durable what it has, for nobody's flush.
    pub(super) fn flush_backup(&mut self, actions: &mut Vec<Action>) {
        self.last_mirror_flush = self.now;
        let sequence = self.mirror.send_flush();
        actions.push(Action::Send(OutgoingMessage::Flush { sequence }));
    }

    /// Begins a commit now, or right after the one under way.
    pub(super) fn request_commit(&mut self, actions: &mut Vec<Action>) {
        if self.commits.under_way.is_some() {
            self.commits.again = true;
            return;
        }
        if self.poisoned.is_some() {
            return;
        }
        let capture = self.map.file().capture(COMMIT_PAGES_MAX);
        let whole = !self.map.file().has_uncommitted();
        self.commits.begun += 1;
        self.commits.last_begun = self.now;
        self.commits.under_way = Some(whole);
        self.commits.again = !whole;
        actions.push(Action::Commit { epoch: self.commits.begun, capture });
    }

    fn committed(&mut self, epoch: u64, result: Result<()>, actions: &mut Vec<Action>) {
        let whole = self.commits.under_way.take().expect("a commit was under way");
        assert_eq!(epoch, self.commits.begun, "one commit at a time");
        if let Err(error) = result {
            self.poison(&error);
            return;
        }
        if whole {
            self.commits.whole = epoch;
            self.ready.extend(std::mem::take(&mut self.waiting.room));
            self.flushes_see_commit();
        }
        if self.commits.again {
            self.request_commit(actions);
        }
    }

    /// The commit that a request begun now must wait for.
    pub(super) fn next_commit(&self) -> u64 {
        self.commits.begun + 1
    }

    // Comparison with the backup.

    /// Watches current blocks that nobody is writing and that the backup has durably; `None` when
    /// something is on its way there, so that nothing can be said.
    pub fn begin_watch(&mut self, blocks: BlockRange) -> Option<WatchId> {
        let quiet = !self.claims.busy(blocks)
            && !self.map.unsent().any_set(blocks)
            && self.map.current().all_equal(blocks, true)
            && self.mirror.up;
        quiet.then(|| {
            let watch = self.new_token();
            self.watches.insert(watch, (blocks, false));
            watch
        })
    }

    /// Whether nothing touched the blocks since.
    pub fn end_watch(&mut self, watch: WatchId) -> bool {
        let (_, touched) = self.watches.remove(&watch).expect("watched");
        !touched
    }

    pub(super) fn touch(&mut self, blocks: BlockRange) {
        self.mirror.differences.touch(blocks);
        for (watched, touched) in self.watches.values_mut() {
            *touched |= watched.intersect(blocks).is_some();
        }
    }

    /// The current blocks in the range are sent to the backup again.
    pub fn mark_unsent(&mut self, blocks: BlockRange, now: Instant, actions: &mut Vec<Action>) {
        let current: Vec<_> = self.map.current().runs(blocks, true).collect();
        for run in current {
            self.map.file().fill(crate::map::UNSENT, run, true);
            self.mirror.forget(run);
        }
        self.apply(Event::Tick, now, actions);
    }

    /// Fails every request that waits for something other than this machine's own devices; what
    /// is under way locally ends as usual. For the operator's word on what is lost.
    pub fn fail_waiting_requests(&mut self, error: &Error, actions: &mut Vec<Action>) {
        self.link_down(actions);
        let all: Vec<u64> = self.operations.keys().copied().collect();
        for id in all {
            self.fail_waiting(id, error, actions);
        }
        self.settle(actions);
    }

    // What it looks like from outside.

    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    #[must_use]
    pub fn poisoned(&self) -> Option<&Error> {
        self.poisoned.as_ref()
    }

    #[must_use]
    pub fn link_is_up(&self) -> bool {
        self.mirror.up
    }

    #[must_use]
    pub fn is_resyncing(&self) -> bool {
        self.mirror.up && self.mirror.backlog
    }

    #[must_use]
    pub fn is_hydrating(&self) -> bool {
        self.fetches.hydrate
    }

    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        self.mirror.in_flight_bytes()
    }

    /// Of the writes of this session.
    #[must_use]
    pub fn lag(&self) -> Lag {
        self.mirror.lag()
    }

    /// How long ago the oldest write was sent that the backup has not made durable.
    #[must_use]
    pub fn lag_ms(&self) -> u64 {
        self.lag().since.map_or(0, |since| self.now.since_ms(since))
    }

    #[must_use]
    pub fn hot_extents(&self) -> usize {
        self.hot.len()
    }

    /// No operation, claim, commit or intent record is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.operations.is_empty()
            && self.pending.is_empty()
            && self.commits.under_way.is_none()
            && !self.device_flush.active
            && self.merges.is_empty()
            && !self.hot.is_recording()
    }

    /// Law 10: nothing is missing, nothing is unsent, every queue is drained, and the backup has
    /// acknowledged everything durably.
    #[must_use]
    pub fn is_mirrored(&self) -> bool {
        let all = self.geometry.all_blocks();
        self.poisoned.is_none()
            && self.mirror.up
            && !self.mirror.backlog
            && self.mirror.is_drained()
            && self.map.current().all_equal(all, true)
            && !self.map.unsent().any_set(all)
    }

    pub(super) fn flush_is_mirrored(&self) -> bool {
        self.options.backup
            && !matches!(self.options.policy, MirrorPolicy::Async(_))
            && self.mirror.up
            && !self.mirror.backlog
    }
}
