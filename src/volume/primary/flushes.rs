//! The life of a flush, and of a cut.
//!
//! | the link | a flush waits for |
//! |---|---|
//! | up, nothing to resync, not async | device's and backup's flush, side by side (R8, R10) |
//! | else, or lost meanwhile | a commit begun after it: device, then map with what is unsent (R9) |
//! | any, `strict` | that commit as well |
//!
//! A cut is a marker in the mirror stream; it waits until nothing is left to resync, so that it is
//! a state that the volume had.

use uuid::Uuid;

use super::event::{Action, MirrorPolicy, OutgoingMessage};
use super::requests::Operation;
use super::state::Primary;
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::map::UNSENT;

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

impl Flush {
    pub(super) fn new() -> Self {
        Self { fresh: true, local: false, remote: None, commit: None }
    }
}

impl Cut {
    pub(super) fn new(
        snapshot: Uuid,
        label: String,
        selection: Vec<ByteRange>,
        deadline: Instant,
    ) -> Self {
        Self { snapshot, label, selection, sequence: None, deadline }
    }

    pub(super) fn expired(&self, now: Instant) -> bool {
        now >= self.deadline
    }
}

impl Primary {
    pub(super) fn advance_flush(&mut self, id: u64, mut flush: Flush, actions: &mut Vec<Action>) {
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
                if self.mirror.up {
                    actions.push(Action::Send(OutgoingMessage::Barrier));
                }
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

    /// A flush of this side alone, with its map.
    pub(super) fn begin_commit(&mut self, id: u64, actions: &mut Vec<Action>) {
        let commit = Some(self.next_commit());
        let flush = Flush { fresh: false, local: true, remote: None, commit };
        self.operations.insert(id, Operation::Flush(flush));
        self.request_commit(actions);
        self.ready.push_back(id);
    }

    /// Under the policy `async` the backup is asked to make durable what it has before it lags as
    /// far as it may, and at once when a write is held back.
    pub(super) fn pump_lag(&mut self, actions: &mut Vec<Action>) {
        let MirrorPolicy::Async(bound) = self.options.policy else { return };
        let lag = self.mirror.lag();
        let Some(since) = lag.since else { return };
        let half = lag.bytes >= bound.bytes / 2 || self.now.since_ms(since) >= bound.ms / 2;
        if (half || self.mirror.held_back) && self.mirror.wants_flush() {
            self.flush_backup(actions);
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

    pub(super) fn begin_cut(&mut self, id: u64, cut: Cut) {
        self.operations.insert(id, Operation::Cut(cut));
        self.ready.push_back(id);
    }

    pub(super) fn advance_cut(&mut self, id: u64, mut cut: Cut, actions: &mut Vec<Action>) {
        let problem = if !self.mirror.up {
            Some(Error::link("the link to the backup is down"))
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
            let sequence = self.mirror.send();
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
