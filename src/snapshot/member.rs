//! One snapshot: a preservation store with the volume's own offsets, and the map of what is in it.
//!
//! In its directory: `store`, `preserved.map` (plane 0 preserved, plane 1 released), `intact`, a
//! record that is removed to break the snapshot, because removing needs no free space, and from the
//! moment that its deletion begins `leaving`.
//!
//! | plane 0 | plane 1 | the block's bytes at the cut are |
//! |---|---|---|
//! | 0 | 0 | in a newer snapshot that preserved it, else on the mirror |
//! | 1 | 0 | in the store |
//! | 1 | 1 | given back: they were written to a bundle, nobody may ask again |
//!
//! Guarantees: a bit of plane 0 is set, in memory and durably, only after the block's bytes are
//! durable in the store; a broken snapshot never becomes intact again.
//! Does not know: other snapshots.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use uuid::Uuid;

use super::catalogue::CutRecord;
use super::copying::{Copier, Memory, Room};
use super::selection::Selection;
use crate::bitmap::Bitmap;
use crate::device::{Device, Directory, is_zero};
use crate::error::{Error, Result};
use crate::extent::BlockRange;
use crate::limits::STORE_RESERVE_BYTES;
use crate::map::{MapFile, MapIdentity, MapRole};
use crate::units::Geometry;

pub(super) const PRESERVED: usize = 0;
pub(super) const RELEASED: usize = 1;

const STORE: &str = "store";
const MAP: &str = "preserved.map";
const INTACT: &str = "intact";
const LEAVING: &str = "leaving";

/// Whether a snapshot can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    Intact,
    /// Old bytes were lost; the reason. Its store may still serve older snapshots.
    Broken(String),
    /// Its deletion has begun; older snapshots may still read from its store.
    Leaving,
}

const IS_INTACT: u8 = 0;
const IS_BROKEN: u8 = 1;
const IS_LEAVING: u8 = 2;

#[derive(Debug)]
pub(super) struct Storage {
    pub store: Arc<dyn Device>,
    /// The same past the page cache.
    direct: Arc<dyn Device>,
    pub map: MapFile,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Snapshot {
    record: CutRecord,
    geometry: Geometry,
    directory: Arc<dyn Directory>,
    /// Absent when it could not be opened: the snapshot is broken and serves nobody.
    storage: Option<Storage>,
    condition: AtomicU8,
    reason: OnceLock<String>,
    /// What a bundle holds durably: ascending, disjoint, not given back yet.
    offered: Mutex<VecDeque<BlockRange>>,
}

impl Snapshot {
    /// Makes the files of a new snapshot, durable when it returns.
    pub fn create(
        directory: Arc<dyn Directory>,
        identity: MapIdentity,
        record: CutRecord,
    ) -> Result<Self> {
        let geometry = identity.geometry;
        let store = directory.create(STORE, geometry.size())?;
        let map = directory.create(MAP, MapFile::bytes_needed(geometry, MapRole::Preserved))?;
        let map = MapFile::create(map, identity, MapRole::Preserved)?;
        directory.replace(INTACT, b"")?;
        let direct = directory.open_direct(STORE)?;
        let storage = Some(Storage { store, direct, map });
        Ok(Self::assemble(record, geometry, directory, storage))
    }

    /// Opens a snapshot that the catalogue names. What cannot be opened becomes a broken one.
    pub fn open(
        directory: Arc<dyn Directory>,
        identity: MapIdentity,
        record: CutRecord,
    ) -> Result<Self> {
        let geometry = identity.geometry;
        let intact = directory.read(INTACT, 0)?.is_some();
        let leaving = directory.read(LEAVING, 0)?.is_some();
        let (storage, failure) = match open_storage(&*directory, identity) {
            Ok(storage) => (Some(storage), None),
            Err(error) => (None, Some(error)),
        };
        let snapshot = Self::assemble(record, geometry, directory, storage);
        if leaving {
            snapshot.leave_as(IS_LEAVING)?;
        } else if let Some(error) = failure {
            snapshot.break_off(&format!("its files cannot be read: {error}"))?;
        } else if !intact {
            snapshot.break_off("it was broken before the last start")?;
        }
        Ok(snapshot)
    }

    fn assemble(
        record: CutRecord,
        geometry: Geometry,
        directory: Arc<dyn Directory>,
        storage: Option<Storage>,
    ) -> Self {
        Self {
            record,
            geometry,
            directory,
            storage,
            condition: AtomicU8::new(IS_INTACT),
            reason: OnceLock::new(),
            offered: Mutex::default(),
        }
    }

    pub fn id(&self) -> Uuid {
        self.record.snapshot
    }

    pub fn record(&self) -> &CutRecord {
        &self.record
    }

    pub fn storage(&self) -> Option<&Storage> {
        self.storage.as_ref()
    }

    /// The blocks whose bytes at the cut are in the store (or were given back).
    pub fn preserved(&self) -> Option<&Arc<Bitmap>> {
        self.storage.as_ref().map(|storage| storage.map.plane(PRESERVED))
    }

    pub fn released(&self) -> Option<&Arc<Bitmap>> {
        self.storage.as_ref().map(|storage| storage.map.plane(RELEASED))
    }

    pub fn is_intact(&self) -> bool {
        self.condition.load(Ordering::Acquire) == IS_INTACT
    }

    pub fn condition(&self) -> Condition {
        match self.condition.load(Ordering::Acquire) {
            IS_INTACT => Condition::Intact,
            IS_LEAVING => Condition::Leaving,
            _ => Condition::Broken(self.reason.get().cloned().unwrap_or_default()),
        }
    }

    /// An error that says why the snapshot cannot be read, if it cannot.
    pub fn check_intact(&self) -> Result<()> {
        let words = match self.condition() {
            Condition::Intact => return Ok(()),
            Condition::Broken(reason) => format!("is broken: {reason}"),
            Condition::Leaving => "is being deleted".to_owned(),
        };
        let advice = "take a new snapshot";
        Err(Error::integrity(format!("snapshot {} {words}; {advice}", self.id())).with_errno(5))
    }

    /// Breaks the snapshot, for readers at once, durable when it returns.
    pub fn break_off(&self, reason: &str) -> Result<()> {
        let _first = self.reason.set(reason.to_owned());
        self.leave_as(IS_BROKEN)
    }

    /// Begins the deletion: as breaking, in other words. The next start goes on with it, unless
    /// there was no room to say so: then it finds a broken snapshot.
    pub fn leave(&self) -> Result<()> {
        let _said = self.directory.replace(LEAVING, b"");
        self.leave_as(IS_LEAVING)
    }

    fn leave_as(&self, condition: u8) -> Result<()> {
        // A leaving snapshot stays leaving when it is broken as well.
        let _kept = self.condition.fetch_max(condition, Ordering::AcqRel);
        self.directory.remove(INTACT)
    }

    /// Keeps the runs' bytes as `source` holds them: durable in the store, then in the map.
    pub fn preserve(
        &self,
        copier: &Copier,
        source: &Arc<dyn Device>,
        runs: &[BlockRange],
    ) -> Result<()> {
        self.store(copier, source, runs, None)?;
        self.mark(runs);
        self.settle()
    }

    /// Writes the runs' bytes to the store: into `memory` as well, or else durably.
    ///
    /// A place of the store that nothing was written to reads as zeros; one that was written and
    /// not marked before a crash holds these very bytes.
    pub fn store(
        &self,
        copier: &Copier,
        source: &Arc<dyn Device>,
        runs: &[BlockRange],
        memory: Option<Memory>,
    ) -> Result<()> {
        let storage = self.expect_storage();
        let store = if memory.is_some() { &storage.store } else { &storage.direct };
        let ranges = || runs.iter().map(|run| self.geometry.bytes_of(*run));
        // One look at the free space serves the whole group, unless it is nearly used up: then a
        // group that is mostly zeros may still fit.
        let room: Arc<Room> = match check_room(&*self.directory, ranges().map(|r| r.length).sum()) {
            Ok(()) => Arc::new(|_| Ok(())),
            Err(_) => {
                let directory = Arc::clone(&self.directory);
                Arc::new(move |bytes| check_room(&*directory, bytes))
            }
        };
        let durable = memory.is_none();
        copier.copy(source, store, ranges(), memory, room)?;
        if durable { store.flush() } else { Ok(()) }
    }

    /// Tells readers that the runs' bytes are in the store.
    pub fn mark(&self, runs: &[BlockRange]) {
        for run in runs {
            self.expect_storage().map.fill(PRESERVED, *run, true);
        }
    }

    /// Makes durable what is in the store, then what the map says of it.
    pub fn settle(&self) -> Result<()> {
        let Some(storage) = &self.storage else { return Ok(()) };
        storage.store.flush()?;
        storage.map.commit_all()
    }

    /// Puts back what the journal held for the blocks: what a crash may have taken from the store,
    /// and the map. Blocks that were given back stay so.
    pub fn restore(&self, blocks: BlockRange, bytes: Option<&[u8]>) -> Result<()> {
        let Some(storage) = &self.storage else { return Ok(()) };
        let whole = self.geometry.bytes_of(blocks);
        for run in storage.map.plane(RELEASED).runs(blocks, false) {
            let range = self.geometry.bytes_of(run);
            let bytes = bytes.map(|bytes| {
                &bytes[(range.offset - whole.offset) as usize..][..range.length as usize]
            });
            if let Some(bytes) = bytes.filter(|bytes| !is_zero(bytes)) {
                storage.store.write_at(range.offset, bytes)?;
            }
        }
        storage.map.fill(PRESERVED, blocks, true);
        Ok(())
    }

    fn expect_storage(&self) -> &Storage {
        self.storage.as_ref().expect("an intact snapshot has its files")
    }

    /// Records that the blocks' bytes are needed no more, then gives their space back. What the
    /// journal holds of this snapshot is settled.
    pub fn release(&self, runs: &[BlockRange]) -> Result<()> {
        let Some(storage) = &self.storage else { return Ok(()) };
        for blocks in runs {
            storage.map.fill(RELEASED, *blocks, true);
            storage.map.fill(PRESERVED, *blocks, true);
        }
        storage.map.commit_all()?;
        runs.iter().try_for_each(|blocks| self.punch(*blocks))
    }

    /// From now on the blocks may be given back where there is no room for others.
    pub fn offer(&self, blocks: BlockRange) {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let all = offered.drain(..).chain([blocks]).collect();
        offered.extend(Selection::union(all).runs());
    }

    /// Takes so much of what was offered that about `most` blocks of the store become free.
    pub fn take_offered(&self, most: u64) -> Vec<BlockRange> {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(preserved), Some(released)) = (self.preserved(), self.released()) else {
            return Vec::new();
        };
        let (mut taken, mut freed) = (Vec::new(), 0);
        while let Some(run) = offered.pop_front() {
            let mut end = run.end;
            let kept = preserved.runs(run, true).flat_map(|part| released.runs(part, false));
            for part in kept {
                if freed + part.count() > most {
                    end = part.start + (most - freed);
                    freed = most;
                    break;
                }
                freed += part.count();
            }
            if run.start < end {
                taken.push(BlockRange::new(run.start, end));
            }
            if end < run.end {
                offered.push_front(BlockRange::new(end, run.end));
                break;
            }
        }
        taken
    }

    /// Gives space back that nobody reads any more. The blocks stay marked.
    pub fn punch(&self, blocks: BlockRange) -> Result<()> {
        let Some(storage) = &self.storage else { return Ok(()) };
        let bytes = self.geometry.bytes_of(blocks);
        storage.store.zero_at(bytes.offset, bytes.length)
    }
}

fn check_room(directory: &dyn Directory, bytes: u64) -> Result<()> {
    let Some(space) = directory.space()? else { return Ok(()) };
    let reserve = STORE_RESERVE_BYTES.min(space.total / 16);
    if space.free >= bytes.saturating_add(reserve) {
        return Ok(());
    }
    Err(Error::new(
        crate::error::ErrorKind::Device,
        format!(
            "the preservation store is full: {} bytes are free on its file system, of which \
             {reserve} are kept for maps",
            space.free
        ),
    )
    .with_errno(28))
}

fn open_storage(directory: &dyn Directory, identity: MapIdentity) -> Result<Storage> {
    let store = directory.open(STORE)?;
    let (map, damage) = MapFile::open_damaged(directory.open(MAP)?, MapRole::Preserved)?;
    let found = map.identity();
    let same_volume = found.volume == identity.volume || found.volume.is_nil();
    if !same_volume || found.geometry != identity.geometry {
        return Err(Error::identity("its map belongs to another volume or geometry"));
    }
    if store.size() < identity.geometry.size() {
        return Err(Error::integrity(format!(
            "its store has {} bytes, expected {}",
            store.size(),
            identity.geometry.size()
        )));
    }
    // A page torn in a commit is as the commit before left it, and that is right: what the torn
    // commit stood for was not overwritten yet (law 6). A page that has no valid copy is lost, and
    // with it the knowledge of where the old bytes are.
    match damage.lost.first() {
        None => Ok(Storage { direct: directory.open_direct(STORE)?, store, map }),
        Some((_, blocks)) => Err(Error::integrity(format!(
            "its map is damaged for blocks {} to {}",
            blocks.start, blocks.end
        ))),
    }
}
