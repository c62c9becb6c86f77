//! The backup's side of mirroring as a state machine: which step comes next.
//!
//! A *stretch* is what leads of the waiting operations, up to a cut or `STRETCH_BYTES`. Its blocks
//! are *prepared*, that is preserved and marked as changed, as one group (law 6).
//!
//! | phase | event | action, next phase |
//! |---|---|---|
//! | resting | batch of the session | next step |
//! | resting | batch of an older session | refused (R11) |
//! | next step | writes and zeros lead, not prepared | `Prepare` their stretch, preparing |
//! | next step | writes and zeros lead, prepared | `Apply` them, the next stretch too, applying |
//! | next step | flush leads | `FlushDevice`, flushing |
//! | next step | cut leads | `FlushDevice`, settling: a cut survives with all before it |
//! | next step | nothing left | `Rest`, resting |
//! | preparing | done | next step |
//! | applying | done | answer `Applied` through the last, next step |
//! | applying | done, the next stretch failed | answer `Applied`, then `Failed`, failed |
//! | flushing | done | answer `Flushed`, next step |
//! | settling | done | `Cut`, cutting |
//! | cutting | done or failed | answer `CutDone` or `CutFailed`, next step |
//! | preparing, applying, flushing, settling | failed | answer `Failed`, failed |
//! | failed | batch | answer `Failed` for its first operation, failed (law 11) |
//! | resting, failed | new session | its epoch, its base sequence; the older epoch is fenced |
//!
//! Guarantees: nothing is overwritten before its blocks are preserved and marked; operations are
//! applied in their order, flushes are barriers (trap 22); after a failure nothing is applied.
//! Does not know: devices, maps, threads, time.

use std::collections::VecDeque;

use super::operation::{Answer, MirrorOperation};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BlockRange;
use crate::limits::STRETCH_BYTES;
use crate::snapshot::CutOrder;
use crate::units::Geometry;

/// What the driver shall do now; it then calls `finished`.
#[derive(Debug)]
pub enum Action {
    /// Preserve these blocks and mark them as changed.
    Prepare(Vec<BlockRange>),
    /// In this order where they overlap. Beside it, `ahead` is to be prepared: blocks of the
    /// operations that come next.
    Apply {
        operations: Vec<MirrorOperation>,
        ahead: Vec<BlockRange>,
    },
    FlushDevice,
    /// `sequence` is that of the marker.
    Cut {
        sequence: u64,
        order: CutOrder,
    },
    /// Nothing: the batch is done. Not to be answered by `finished`.
    Rest,
}

#[derive(Debug)]
enum Phase {
    Resting,
    /// How many of the waiting operations make the stretch.
    Preparing {
        count: usize,
    },
    Applying {
        first: u64,
        through: u64,
        ahead: usize,
    },
    Flushing {
        sequence: u64,
    },
    Settling {
        sequence: u64,
        order: CutOrder,
    },
    Cutting {
        sequence: u64,
        order: CutOrder,
    },
    Failed(Error),
}

/// See the module.
#[derive(Debug)]
pub struct BackupState {
    geometry: Geometry,
    sector_size: u32,
    epoch: u64,
    /// Sequence of the last operation taken in this session.
    taken: u64,
    /// Sequence up to which everything is on the mirror.
    applied: u64,
    phase: Phase,
    waiting: VecDeque<MirrorOperation>,
    /// How many of the waiting operations, from the first, are prepared.
    prepared: usize,
    answers: Vec<Answer>,
}

impl BackupState {
    #[must_use]
    pub fn new(geometry: Geometry, sector_size: u32) -> Self {
        Self {
            geometry,
            sector_size,
            epoch: 0,
            taken: 0,
            applied: 0,
            phase: Phase::Resting,
            waiting: VecDeque::new(),
            prepared: 0,
            answers: Vec::new(),
        }
    }

    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Everything up to this sequence is on the mirror.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The failure that ended mirroring, if one did.
    #[must_use]
    pub fn failure(&self) -> Option<&Error> {
        match &self.phase {
            Phase::Failed(error) => Some(error),
            _ => None,
        }
    }

    /// Begins a session; operations of older epochs are refused from now on. Operations up to
    /// `base_sequence` are settled: applied, or to be pushed again under newer sequences.
    pub fn begin_session(&mut self, epoch: u64, base_sequence: u64) -> Result<()> {
        if epoch <= self.epoch {
            return Err(Error::identity(format!(
                "session {epoch} is not newer than session {}: connect again",
                self.epoch
            )));
        }
        assert!(matches!(self.phase, Phase::Resting | Phase::Failed(_)), "a batch is in progress");
        self.epoch = epoch;
        self.taken = base_sequence;
        self.applied = base_sequence;
        Ok(())
    }

    /// Takes operations that arrived together. Refused whole if they are of another session, or not
    /// what a primary would send.
    pub fn take(&mut self, epoch: u64, batch: Vec<MirrorOperation>) -> Result<Action> {
        if epoch != self.epoch {
            return Err(Error::identity(format!(
                "operations of session {epoch} are refused: the session is {}",
                self.epoch
            )));
        }
        let mut last = self.taken;
        for operation in &batch {
            if operation.sequence() <= last {
                return Err(Error::link(format!(
                    "expected an operation with a sequence above {last}, found {}",
                    operation.sequence()
                )));
            }
            operation.check(self.geometry, self.sector_size)?;
            last = operation.sequence();
        }
        self.taken = last;
        if let (Phase::Failed(error), Some(first)) = (&self.phase, batch.first()) {
            let error = failed_earlier(error);
            self.answers.push(Answer::Failed { sequence: first.sequence(), error });
            return Ok(Action::Rest);
        }
        assert!(matches!(self.phase, Phase::Resting | Phase::Failed(_)), "a batch is in progress");
        self.waiting.extend(batch);
        Ok(self.next_step())
    }

    /// The action was done, with this result; returns the next one. `ahead` is that of preparing
    /// beside an `Apply`.
    pub fn finished(&mut self, result: Result<()>, ahead: Result<()>) -> Action {
        let phase = std::mem::replace(&mut self.phase, Phase::Resting);
        match (phase, result) {
            (Phase::Cutting { sequence, order }, result) => {
                let snapshot = order.snapshot;
                self.answers.push(match result {
                    Ok(()) => Answer::CutDone { sequence, snapshot },
                    Err(error) => Answer::CutFailed { sequence, snapshot, error },
                });
                self.applied = sequence;
                self.next_step()
            }
            (phase, Err(error)) => {
                self.fail(&phase, error);
                Action::Rest
            }
            (Phase::Preparing { count }, Ok(())) => {
                self.prepared = count;
                self.next_step()
            }
            (phase @ Phase::Applying { through, ahead: count, .. }, Ok(())) => {
                self.applied = through;
                self.answers.push(Answer::Applied { through });
                if let Err(error) = ahead {
                    self.fail(&phase, error);
                    return Action::Rest;
                }
                self.prepared += count;
                self.next_step()
            }
            (Phase::Flushing { sequence }, Ok(())) => {
                self.applied = sequence;
                self.answers.push(Answer::Flushed { sequence });
                self.next_step()
            }
            (Phase::Settling { sequence, order }, Ok(())) => {
                self.phase = Phase::Cutting { sequence, order: order.clone() };
                Action::Cut { sequence, order }
            }
            (Phase::Resting | Phase::Failed(_), Ok(())) => {
                unreachable!("no action was under way")
            }
        }
    }

    /// The device failed outside a batch: nothing is applied from now on (law 11).
    pub fn stop(&mut self, error: Error) {
        assert!(matches!(self.phase, Phase::Resting | Phase::Failed(_)), "a batch is in progress");
        self.phase = Phase::Failed(error);
    }

    /// What is to be told to the primary, in order.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// The operations after the first `from` that are prepared together, and their blocks.
    fn stretch(&self, from: usize) -> (usize, Vec<BlockRange>) {
        let mut blocks = Vec::new();
        let mut bytes = 0;
        let mut count = 0;
        for next in self.waiting.range(from..) {
            if matches!(next, MirrorOperation::Cut { .. }) || bytes >= STRETCH_BYTES {
                break;
            }
            bytes += next.overwrites().map_or(0, |range| range.length);
            blocks.extend(next.touches(self.geometry));
            count += 1;
        }
        (count, blocks)
    }

    fn next_step(&mut self) -> Action {
        let overwrites = |next: &MirrorOperation| next.overwrites().is_some();
        if self.prepared == 0 && self.waiting.front().is_some_and(overwrites) {
            let (count, blocks) = self.stretch(0);
            self.phase = Phase::Preparing { count };
            return Action::Prepare(blocks);
        }
        let ready = self.waiting.range(..self.prepared).take_while(|next| overwrites(next)).count();
        let operations: Vec<_> = self.waiting.drain(..ready).collect();
        if let (Some(first), Some(last)) = (operations.first(), operations.last()) {
            let (first, through) = (first.sequence(), last.sequence());
            self.prepared -= ready;
            let (ahead, blocks) = match self.prepared {
                0 => self.stretch(0),
                _ => (0, Vec::new()),
            };
            self.phase = Phase::Applying { first, through, ahead };
            return Action::Apply { operations, ahead: blocks };
        }
        self.prepared = self.prepared.saturating_sub(1);
        match self.waiting.pop_front() {
            Some(MirrorOperation::Flush { sequence }) => {
                self.phase = Phase::Flushing { sequence };
                Action::FlushDevice
            }
            Some(MirrorOperation::Cut { sequence, order }) => {
                self.phase = Phase::Settling { sequence, order };
                Action::FlushDevice
            }
            Some(MirrorOperation::Write { .. } | MirrorOperation::Zero { .. }) => {
                unreachable!("these were taken above")
            }
            None => {
                self.phase = Phase::Resting;
                Action::Rest
            }
        }
    }

    fn fail(&mut self, phase: &Phase, error: Error) {
        // The first operation of which it is not known that it was applied: one that waits for its
        // answer, for the primary goes on counting where the session before ended.
        let sequence = match phase {
            Phase::Flushing { sequence } | Phase::Settling { sequence, .. } => *sequence,
            Phase::Applying { first, .. } if *first > self.applied => *first,
            _ => self.waiting.front().expect("what was prepared waits").sequence(),
        };
        self.answers.push(Answer::Failed { sequence, error: error.clone() });
        self.waiting.clear();
        self.prepared = 0;
        self.phase = Phase::Failed(error);
    }
}

fn failed_earlier(cause: &Error) -> Error {
    Error::new(
        ErrorKind::Poisoned,
        format!("the backup stopped after a failure: {cause}; check its disks, then restart it"),
    )
    .with_errno(5)
}
