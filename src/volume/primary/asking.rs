//! Questions to the backup that are not the machine's: digests, and what changed since a cut.
//!
//! | the answer | is good |
//! |---|---|
//! | a digest | for the instant |
//! | unchanged since a cut, of a block that is missing here and not link-only | for the session |
//!
//! Why for the session: in it only this primary writes to the backup, and what it writes it makes
//! current or link-only before the write leaves, and neither is taken from a bundle. So whatever
//! else the block's bytes there are at the end of the session, they are what they were at the cut.
//! A session that ended says nothing of what others may do to the backup after it.
//! Does not know: connections, bundles.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::driver::{Driver, Outbox, link_is_down};
use super::state::Primary;
use crate::bitmap::Bitmap;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::format::frames::{ChangedBlocks, CutName};
use crate::volume::engine::Engine;

/// For one piece of an answer; the backup may have to read the maps of many cuts first.
const CHANGES_PATIENCE: Duration = Duration::from_secs(120);

/// Those that were asked and not answered, by tag.
#[derive(Default)]
pub(super) struct Questions {
    digests: HashMap<u64, Sender<Result<[u8; 32]>>>,
    changes: HashMap<u64, Sender<Result<ChangedBlocks>>>,
}

/// What the backup vouches for in a session: blocks whose bytes it still has as at a cut.
#[derive(Clone)]
pub(super) struct Vouched {
    pub session: Arc<dyn Outbox>,
    pub unchanged: Arc<Bitmap>,
}

fn answer<T>(engine: &Engine, receiver: &Receiver<Result<T>>, timeout: Duration) -> Result<T> {
    engine.receive(receiver, Some(timeout)).map_err(|gone| match gone {
        RecvTimeoutError::Timeout => {
            Error::new(ErrorKind::Timeout, "the backup did not answer in time")
        }
        RecvTimeoutError::Disconnected => link_is_down(),
    })?
}

impl Driver {
    pub fn digest_arrived(&self, tag: u64, result: Result<[u8; 32]>) {
        if let Some(waiting) = self.lock().questions.digests.remove(&tag) {
            // The asker may have given up.
            let _gone = waiting.send(result);
        }
    }

    /// The backup's digest of a range.
    pub(super) fn backup_digest(&self, range: ByteRange, timeout: Duration) -> Result<[u8; 32]> {
        let outbox = self.lock().outbox.clone().ok_or_else(link_is_down)?;
        self.ask_digest(&outbox, range)(timeout)
    }

    /// Asks for a digest; the answer is waited for by calling what is returned.
    pub(super) fn ask_digest(
        &self,
        outbox: &Arc<dyn Outbox>,
        range: ByteRange,
    ) -> impl FnOnce(Duration) -> Result<[u8; 32]> + use<> {
        let (sender, receiver) = bounded(1);
        let mut state = self.lock();
        state.next_id += 1;
        let tag = state.next_id;
        state.questions.digests.insert(tag, sender);
        outbox.ask_digest(tag, range);
        let engine = Arc::clone(&self.engine);
        move |timeout| answer(&engine, &receiver, timeout)
    }

    pub fn changes_arrived(&self, tag: u64, result: Result<ChangedBlocks>) {
        if let Some(waiting) = self.lock().questions.changes.remove(&tag) {
            // The asker may have given up.
            let _gone = waiting.send(result);
        }
    }

    /// The session with the backup, if it is up.
    pub(super) fn session(&self) -> Result<Arc<dyn Outbox>> {
        let state = self.lock();
        let up = state.machine.link_is_up();
        state.outbox.clone().filter(|_| up).ok_or_else(link_is_down)
    }

    /// Which blocks of the runs (ascending) the backup still has as at the cut. See the module.
    pub(super) fn unchanged_since(&self, cut: CutName, runs: &[BlockRange]) -> Result<Vouched> {
        let session = self.session()?;
        let geometry = self.map().geometry();
        let unchanged = Bitmap::new(geometry.blocks(), false);
        let end = runs.last().map_or(0, |run| run.end);
        let mut told = 0;
        for run in runs {
            told = told.max(run.start);
            while told < run.end {
                let reply = self.ask_changes(&session, cut, BlockRange::new(told, end))?;
                let spoken_of = reply.spoken_of(told);
                unchanged.fill(spoken_of, true);
                for changed in reply.changed(told) {
                    unchanged.fill(changed, false);
                }
                told = spoken_of.end;
            }
        }
        Ok(Vouched { session, unchanged: Arc::new(unchanged) })
    }

    fn ask_changes(
        &self,
        session: &Arc<dyn Outbox>,
        cut: CutName,
        blocks: BlockRange,
    ) -> Result<ChangedBlocks> {
        let (sender, receiver) = bounded(1);
        let mut state = self.lock();
        state.expect_session(session)?;
        state.next_id += 1;
        let tag = state.next_id;
        if !session.ask_changes(tag, self.map().geometry().bytes_of(blocks), cut) {
            return Err(Error::identity(
                "the program of the backup does not tell what changed since a cut: update it",
            ));
        }
        state.questions.changes.insert(tag, sender);
        drop(state);
        answer(&self.engine, &receiver, CHANGES_PATIENCE)
    }

    /// As `with_open_machine`, refused once the session is over.
    pub(super) fn with_machine_in_session<T>(
        &self,
        session: &Arc<dyn Outbox>,
        change: impl FnOnce(&mut Primary) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.lock();
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        state.expect_session(session)?;
        change(&mut state.machine)
    }
}

impl super::driver::State {
    pub(super) fn expect_session(&self, session: &Arc<dyn Outbox>) -> Result<()> {
        let same = self.outbox.as_ref().is_some_and(|held| Arc::ptr_eq(held, session));
        if same && self.machine.link_is_up() {
            return Ok(());
        }
        Err(Error::link(
            "the session in which the backup vouched for the bundle is over; ask again when the \
             link is up",
        ))
    }
}
