//! The threads that read attached media for a driver.
//!
//! Guarantees: a medium has threads of its own, for one that stalls must not keep a device thread;
//! nobody waits for them, neither to detach nor to close. What was queued when a medium is
//! detached is answered to nobody.
//! Does not know: which blocks may come from a medium.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::asking::Vouched;
use super::driver::{Caller, Driver};
use super::event::Event;
use super::media::{MediumId, Supply};
use crate::bundle::RandomReader;
use crate::device::{AlignedBuffer, Payload};
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::format::frames::CutName;
use crate::limits::{MEDIUM_IN_FLIGHT_MAX, MEDIUM_THREADS};
use crate::volume::content::Content;
use crate::volume::engine::spawn_apart;

type Job = (u64, ByteRange);

/// The way to the threads of each medium; where it is dropped, they end.
#[derive(Debug, Default)]
pub(super) struct MediaReaders {
    jobs: HashMap<MediumId, Sender<Job>>,
    older: HashMap<MediumId, Older>,
}

/// A medium of an earlier generation: what to ask the backup in each session.
#[derive(Clone, Debug)]
struct Older {
    cut: CutName,
    coverage: Vec<BlockRange>,
    /// Why it did not vouch for it in this session.
    problem: Option<Error>,
}

impl MediaReaders {
    pub(super) fn ask(&self, medium: MediumId, token: u64, range: ByteRange) {
        if let Some(jobs) = self.jobs.get(&medium) {
            // Full only of reads that were given up: the medium has stalled, as the machine will
            // find, and this one with it.
            let _stalled = jobs.try_send((token, range));
        }
    }

    pub(super) fn remove(&mut self, medium: MediumId) {
        self.jobs.remove(&medium);
        self.older.remove(&medium);
    }
}

impl Driver {
    /// Reads missing blocks from this bundle too, from now on.
    /// `older`: its cut, if that is of an earlier generation.
    pub(super) fn attach(
        &self,
        reader: &Arc<RandomReader>,
        supply: Supply,
        older: Option<CutName>,
    ) -> Result<MediumId> {
        let (sender, jobs) = bounded(4 * MEDIUM_IN_FLIGHT_MAX);
        let mut state = self.lock();
        state.next_id += 1;
        let medium = state.next_id;
        for _ in 0..MEDIUM_THREADS {
            let (driver, reader, jobs) =
                (Arc::downgrade(&self.own()), Arc::clone(reader), jobs.clone());
            spawn_apart("medium", move || serve(&driver, medium, &reader, &jobs))?;
        }
        state.media.jobs.insert(medium, sender);
        if let Some(cut) = older {
            let coverage = supply.coverage.clone();
            state.media.older.insert(medium, Older { cut, coverage, problem: None });
        }
        let mut actions = Vec::new();
        state.machine.attach(medium, supply, &mut actions);
        self.settle_elsewhere(state, actions);
        Ok(medium)
    }

    /// The backup vouched for these blocks of a medium; without effect if that session is over.
    pub(super) fn vouch(&self, medium: MediumId, vouched: Vouched) {
        let mut state = self.lock();
        let mut actions = Vec::new();
        if state.expect_session(&vouched.session).is_ok() {
            state.machine.vouch(medium, vouched.unchanged, &mut actions);
        }
        if let Some(older) = state.media.older.get_mut(&medium) {
            older.problem = None;
        }
        self.settle_elsewhere(state, actions);
    }

    /// Why the backup does not vouch for a medium, if it said so.
    pub(super) fn medium_problem(&self, medium: MediumId) -> Option<Error> {
        self.lock().media.older.get(&medium).and_then(|older| older.problem.clone())
    }

    /// A session has begun: asks what the media of earlier generations may supply in it. The answer
    /// takes its time, and nobody waits for it.
    pub(super) fn ask_for_media(&self) {
        let older = self.lock().media.older.clone();
        if older.is_empty() {
            return;
        }
        let driver = Arc::downgrade(&self.own());
        let asked = spawn_apart("media-ask", move || {
            for (medium, Older { cut, coverage, .. }) in older {
                let Some(driver) = driver.upgrade() else { return };
                match driver.unchanged_since(cut, &coverage) {
                    Ok(vouched) => driver.vouch(medium, vouched),
                    Err(error) => driver.note_medium_problem(medium, error),
                }
            }
        });
        // Without a thread they stay unvouched for, and `attach` asks again.
        drop(asked);
    }

    fn note_medium_problem(&self, medium: MediumId, error: Error) {
        if let Some(older) = self.lock().media.older.get_mut(&medium) {
            older.problem = Some(error);
        }
    }

    pub(super) fn detach(&self, medium: MediumId) {
        let mut state = self.lock();
        state.media.remove(medium);
        let mut actions = Vec::new();
        state.machine.detach(medium, &mut actions);
        self.settle_elsewhere(state, actions);
    }
}

fn serve(driver: &Weak<Driver>, medium: MediumId, reader: &RandomReader, jobs: &Receiver<Job>) {
    for (token, range) in jobs {
        let result = read(reader, range);
        let Some(driver) = driver.upgrade() else { return };
        driver.event(Event::MediumRead { medium, token, result }, Caller::Other);
    }
}

fn read(reader: &RandomReader, range: ByteRange) -> Result<Content> {
    let mut buffer = AlignedBuffer::zeroed(range.length as usize);
    let data = reader.read_at(range.offset, &mut buffer)?;
    Ok(if data { Content::Bytes(Payload::new(buffer)) } else { Content::Zeros(range.length) })
}
