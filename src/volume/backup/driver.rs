//! The backup of a volume on real devices: runs the state machine, serves fetches and digests.
//!
//! | who | holds `applying` | waits |
//! |---|---|---|
//! | `apply`, `begin_session`, `snapshot_now` | yes | for a batch in progress |
//! | `read` | no | bounded, until the operations it must see are applied |
//! | views of snapshots, `digest` | no | never |
//!
//! Guarantees: what the state machine says, in its order; a session that began has no operation of
//! an older one after it (R11).
//! Does not know: connections, frames.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::operation::{Answer, MirrorOperation};
use super::state::{Action, BackupState};
use crate::bitmap::Bitmap;
use crate::device::{Device, Directory, WorkerPool, digest};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::format::frames::CutName;
use crate::limits::CUTS_KEPT_MAX;
use crate::snapshot::{CutOrder, SnapshotChain, SnapshotView};
use crate::units::Geometry;

/// Whose backup it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupIdentity {
    /// Of this backup: drawn when it was created.
    pub backup: Uuid,
    /// Nil until a primary has adopted it.
    pub volume: Uuid,
    pub generation: u64,
    pub geometry: Geometry,
}

/// See the module.
#[derive(Debug)]
pub struct BackupVolume {
    device: Arc<dyn Device>,
    chain: Arc<SnapshotChain>,
    applying: Mutex<BackupState>,
    progress: Mutex<Progress>,
    progressed: Condvar,
}

/// What readers wait for; a copy of the state machine's figures, so that they need not wait for a
/// batch.
#[derive(Clone, Debug, Default)]
struct Progress {
    epoch: u64,
    applied: u64,
    failure: Option<Error>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BackupVolume {
    /// A new backup in an empty directory, of a volume that is named by `adopt`; `backup` is its
    /// own UUID, drawn for it.
    pub fn create(
        directory: Arc<dyn Directory>,
        device: Arc<dyn Device>,
        geometry: Geometry,
        backup: Uuid,
    ) -> Result<Self> {
        let chain = SnapshotChain::create(directory, Arc::clone(&device), geometry, backup)?;
        Ok(Self::assemble(device, chain))
    }

    /// Opens a backup that was created here.
    pub fn open(
        directory: Arc<dyn Directory>,
        device: Arc<dyn Device>,
        geometry: Geometry,
    ) -> Result<Self> {
        let chain = SnapshotChain::open(directory, Arc::clone(&device), geometry)?;
        Ok(Self::assemble(device, chain))
    }

    fn assemble(device: Arc<dyn Device>, chain: SnapshotChain) -> Self {
        let state = BackupState::new(chain.geometry(), device.sector_size());
        Self {
            device,
            chain: Arc::new(chain),
            applying: Mutex::new(state),
            progress: Mutex::default(),
            progressed: Condvar::new(),
        }
    }

    /// From now on threads of the pool help where many operations can be under way at a time.
    pub fn set_pool(&self, pool: &Arc<WorkerPool>) {
        self.chain.set_pool(pool);
    }

    #[must_use]
    pub fn identity(&self) -> BackupIdentity {
        BackupIdentity {
            backup: self.chain.backup(),
            volume: self.chain.volume(),
            generation: self.chain.generation(),
            geometry: self.chain.geometry(),
        }
    }

    /// Takes the identity of the primary's volume; see `SnapshotChain::adopt`.
    pub fn adopt(&self, volume: Uuid, generation: u64) -> Result<()> {
        let _no_batch = lock(&self.applying);
        self.chain.adopt(volume, generation)
    }

    /// Why nothing is applied any more, if so (law 11).
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        lock(&self.progress).failure.clone()
    }

    /// The snapshots, to be listed, viewed, released and deleted.
    #[must_use]
    pub fn snapshots(&self) -> &Arc<SnapshotChain> {
        &self.chain
    }

    pub fn view(&self, snapshot: Uuid) -> Result<SnapshotView> {
        self.chain.view(snapshot)
    }

    /// Waits for a batch in progress, makes what it and those before applied durable, then begins a
    /// session. Sequences up to `base_sequence` are settled: whoever asks for them in this session
    /// need not wait.
    ///
    /// Durable first, since the primary takes what it fetches for what the backup holds, and would
    /// not send it again if the backup lost it (law 3).
    pub fn begin_session(&self, epoch: u64, base_sequence: u64) -> Result<()> {
        let mut state = lock(&self.applying);
        match state.failure() {
            None => self.flush_device(&mut state)?,
            // Nothing is applied any more, and what is there can be fetched all the same.
            Some(_) => self.device.flush()?,
        }
        state.begin_session(epoch, base_sequence)?;
        self.publish(&state);
        Ok(())
    }

    /// Applies operations that arrived together and returns what to tell the primary. An error
    /// means that nothing of the batch was applied: it is of another session, or malformed.
    pub fn apply(&self, epoch: u64, batch: Vec<MirrorOperation>) -> Result<Vec<Answer>> {
        let mut state = lock(&self.applying);
        let action = state.take(epoch, batch)?;
        self.run(&mut state, action);
        Ok(state.take_answers())
    }

    /// Cuts here and now, between two batches; durable when it returns.
    pub fn snapshot_now(&self, order: &CutOrder) -> Result<()> {
        let mut state = lock(&self.applying);
        self.flush_device(&mut state)?;
        self.chain.cut(order, state.applied())
    }

    fn run(&self, state: &mut BackupState, mut action: Action) {
        loop {
            let mut ahead = Ok(());
            let result = match action {
                Action::Prepare(blocks) => self.chain.prepare(&blocks),
                Action::Apply { operations, ahead: blocks } => {
                    let applied;
                    (applied, ahead) = self.overwrite(operations, blocks);
                    applied
                }
                Action::FlushDevice => self.device.flush(),
                Action::Cut { sequence, order } => self.chain.cut(&order, sequence),
                Action::Rest => break,
            };
            action = state.finished(result, ahead);
            self.publish(state);
        }
        self.publish(state);
    }

    /// Applies the operations; prepares `ahead`, which they do not touch or which is prepared.
    fn overwrite(
        &self,
        operations: Vec<MirrorOperation>,
        ahead: Vec<BlockRange>,
    ) -> (Result<()>, Result<()>) {
        if ahead.is_empty() {
            return (overwrite(&*self.device, &operations), Ok(()));
        }
        let (device, chain) = (Arc::clone(&self.device), Arc::clone(&self.chain));
        let apply = move || overwrite(&*device, &operations);
        self.chain.both(apply, move || chain.prepare(&ahead))
    }

    fn publish(&self, state: &BackupState) {
        *lock(&self.progress) = Progress {
            epoch: state.epoch(),
            applied: state.applied(),
            failure: state.failure().cloned(),
        };
        self.progressed.notify_all();
    }

    /// Fills `buffer` for a fetch of session `epoch` that must see every operation up to
    /// `after_sequence`; waits for those at most `wait`.
    pub fn read(
        &self,
        epoch: u64,
        offset: u64,
        buffer: &mut [u8],
        after_sequence: u64,
        wait: Duration,
    ) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.wait_applied(epoch, after_sequence, wait)?;
        self.device.read_at(offset, buffer)
    }

    /// Whether a fetch of this session that must see everything up to `sequence` would not wait;
    /// true as well if it would be refused.
    #[must_use]
    pub fn has_applied(&self, epoch: u64, sequence: u64) -> bool {
        let progress = lock(&self.progress);
        progress.epoch != epoch || progress.applied >= sequence || progress.failure.is_some()
    }

    fn wait_applied(&self, epoch: u64, sequence: u64, wait: Duration) -> Result<()> {
        let pending = |progress: &mut Progress| {
            progress.epoch == epoch && progress.applied < sequence && progress.failure.is_none()
        };
        let (progress, _) = self
            .progressed
            .wait_timeout_while(lock(&self.progress), wait, pending)
            .unwrap_or_else(PoisonError::into_inner);
        if progress.epoch != epoch {
            return Err(Error::identity(format!(
                "a fetch of session {epoch} is refused: the session is {}",
                progress.epoch
            )));
        }
        if progress.applied >= sequence {
            return Ok(());
        }
        Err(progress.failure.clone().unwrap_or_else(|| {
            Error::new(
                ErrorKind::Timeout,
                format!(
                    "operation {sequence} was not applied in time: the backup is at {}",
                    progress.applied
                ),
            )
        }))
    }

    fn check_range(&self, range: ByteRange) -> Result<()> {
        let sector = u64::from(self.device.sector_size());
        let whole = range.offset.is_multiple_of(sector) && range.length.is_multiple_of(sector);
        if whole && self.chain.geometry().contains(range) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "expected whole sectors of {sector} bytes inside {} bytes, found {} bytes at {}",
            self.chain.geometry().size(),
            range.length,
            range.offset
        ))
        .with_errno(22))
    }

    /// BLAKE3 of the mirror's bytes in the range, read as they are at this moment.
    pub fn digest(&self, range: ByteRange) -> Result<[u8; 32]> {
        self.check_range(range)?;
        digest(&*self.device, range)
    }

    /// Every block changed since that cut, up to now. Refused unless this backup remembers the very
    /// cut: another of the same number says nothing.
    pub fn changed_since(&self, cut: &CutName) -> Result<Bitmap> {
        let cuts = self.chain.cuts();
        let known = cuts.iter().any(|held| {
            (held.snapshot, held.generation, held.sequence)
                == (cut.snapshot, cut.generation, cut.sequence)
        });
        if !known {
            return Err(Error::identity(format!(
                "the backup does not remember the cut of snapshot {} (generation {}, sequence {}): \
                 it keeps the last {CUTS_KEPT_MAX} of its own; make a bundle of a new snapshot",
                cut.snapshot, cut.generation, cut.sequence
            )));
        }
        self.chain.changed_since(cut.snapshot)
    }

    /// Makes everything that was applied durable, and leaves nothing to be replayed.
    pub fn flush(&self) -> Result<()> {
        let mut state = lock(&self.applying);
        self.flush_device(&mut state)?;
        self.chain.settle()
    }

    fn flush_device(&self, state: &mut BackupState) -> Result<()> {
        if let Some(error) = state.failure() {
            return Err(error.clone());
        }
        self.device.flush().inspect_err(|error| {
            state.stop(error.clone());
            self.publish(state);
        })
    }

    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

fn overwrite(device: &dyn Device, operations: &[MirrorOperation]) -> Result<()> {
    for operation in operations {
        match operation {
            MirrorOperation::Write { offset, data, .. } => device.write_at(*offset, data)?,
            MirrorOperation::Zero { range, .. } => device.zero_at(range.offset, range.length)?,
            MirrorOperation::Flush { .. } | MirrorOperation::Cut { .. } => {
                unreachable!("only overwriting operations are applied")
            }
        }
    }
    Ok(())
}
