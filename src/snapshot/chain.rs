//! All snapshots of a backup volume, oldest to newest, and the backup map.
//!
//! A write preserves old bytes once, in the newest intact snapshot. The bytes of a block at cut `i`
//! are in the first of the snapshots i, i+1, .., newest that preserved it, else on the mirror.
//!
//! | step of a cut | a crash before the last step leaves |
//! |---|---|
//! | make the new store, snapshot map and backup map | files nobody names, removed at a start |
//! | replace the catalogue, which names them; the cut gets the old backup map | old state or new |
//!
//! Guarantees: a cut is there whole or not at all; one change at a time, readers never wait.
//! Does not know: who writes to the mirror; its writer calls `prepare` first, and flushes
//! the mirror before a cut.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use uuid::Uuid;

use super::catalogue::{Catalogue, CutRecord};
use super::changes::{CHANGED, changed_name, create_changed, open_changed, remove_strangers};
use super::copying::Copier;
use super::journal::{JOURNAL, Journal, Replay};
use super::member::{Condition, Snapshot};
use super::selection::Selection;
use super::view::SnapshotView;
use crate::device::{Device, Directory, Space, WorkerPool};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::limits::{CATALOGUE_BYTES_MAX, LABEL_BYTES_MAX, SNAPSHOTS_MAX, STORE_LOW_PERCENT};
use crate::map::{MapFile, MapIdentity};
use crate::units::Geometry;

const CATALOGUE: &str = "catalogue";
const SNAPSHOTS: &str = "snapshots";

/// What a new snapshot shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutOrder {
    pub snapshot: Uuid,
    pub label: String,
    pub created_ms: u64,
    /// Empty: the whole volume.
    pub selection: Vec<ByteRange>,
}

/// What is known of one snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotStatus {
    pub cut: CutRecord,
    pub condition: Condition,
    /// Bytes in its store, those given back not counted.
    pub preserved_bytes: u64,
    /// Bytes that can be read from it no more: a bundle holds them.
    pub released_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct SnapshotChain {
    directory: Arc<dyn Directory>,
    snapshots: Arc<dyn Directory>,
    device: Arc<dyn Device>,
    geometry: Geometry,
    /// Held by whoever changes the chain; `prepare` is a change too.
    pub(super) changing: Mutex<Changing>,
    members: RwLock<Arc<Vec<Arc<Snapshot>>>>,
    copier: Copier,
}

#[derive(Debug)]
pub(super) struct Changing {
    pub catalogue: Catalogue,
    pub changed: Arc<MapFile>,
    /// Absent until the first cut, and after it failed.
    pub journal: Option<Journal>,
    /// The number of the next map file.
    next_number: u64,
    /// Set when it is unknown what the next start would find: nothing may be overwritten then.
    pub uncertain: Option<Error>,
}

impl SnapshotChain {
    /// A new chain without cuts, for a volume nobody has claimed yet (`adopt`).
    pub fn create(
        directory: Arc<dyn Directory>,
        device: Arc<dyn Device>,
        geometry: Geometry,
        backup: Uuid,
    ) -> Result<Self> {
        check_device(&*device, geometry)?;
        if directory.read(CATALOGUE, CATALOGUE_BYTES_MAX)?.is_some() {
            return Err(Error::usage(
                "there is a backup here already: open it, or remove it first",
            ));
        }
        remove_strangers(&*directory, &[])?;
        let catalogue = Catalogue {
            backup,
            volume: Uuid::nil(),
            generation: 0,
            geometry,
            changed: 0,
            journal: false,
            cuts: Vec::new(),
        };
        let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
        let changed = create_changed(&*directory, identity, 0)?;
        let snapshots = directory.directory(SNAPSHOTS)?;
        directory.replace(CATALOGUE, &catalogue.encode())?;
        let changing = Changing {
            catalogue,
            changed: Arc::new(changed),
            journal: None,
            next_number: 1,
            uncertain: None,
        };
        Ok(Self::assemble(directory, snapshots, device, changing, Vec::new()))
    }

    /// Bytes of the volume whose chain `directory` holds, if it holds one.
    pub fn recorded_size(directory: &dyn Directory) -> Result<Option<u64>> {
        let bytes = directory.read(CATALOGUE, CATALOGUE_BYTES_MAX)?;
        let catalogue = bytes.map(|bytes| Catalogue::decode(&bytes)).transpose()?;
        Ok(catalogue.map(|catalogue| catalogue.geometry.size()))
    }

    /// Opens what `create` made, as of the last change before whatever ended it.
    pub fn open(
        directory: Arc<dyn Directory>,
        device: Arc<dyn Device>,
        geometry: Geometry,
    ) -> Result<Self> {
        let Some(bytes) = directory.read(CATALOGUE, CATALOGUE_BYTES_MAX)? else {
            return Err(Error::usage("there is no backup here: create it first"));
        };
        let catalogue = Catalogue::decode(&bytes)?;
        if catalogue.geometry != geometry {
            return Err(Error::identity(format!(
                "expected a backup of {} bytes in blocks of {}, as configured, found one of {} \
                 bytes in blocks of {}: mend the configuration",
                geometry.size(),
                geometry.block_size().bytes(),
                catalogue.geometry.size(),
                catalogue.geometry.block_size().bytes()
            )));
        }
        check_device(&*device, geometry)?;
        let snapshots = directory.directory(SNAPSHOTS)?;
        let mut numbers: Vec<u64> = catalogue.cuts.iter().map(|cut| cut.changed).collect();
        numbers.push(catalogue.changed);
        remove_strangers(&*directory, &numbers)?;
        let kept: Vec<String> = catalogue.kept().map(|cut| cut.snapshot.to_string()).collect();
        for name in snapshots.names()? {
            if !kept.contains(&name) {
                snapshots.remove(&name)?;
            }
        }
        let next_number = numbers.iter().max().map_or(0, |greatest| greatest + 1);
        let changed = Arc::new(open_changed(&*directory, &catalogue, catalogue.changed)?);
        let mut members = Vec::new();
        for cut in catalogue.kept() {
            let home = snapshots.directory(&cut.snapshot.to_string())?;
            members.push(Arc::new(Snapshot::open(home, identity_of(&catalogue), cut.clone())?));
        }
        let (journal, replay) = open_journal(&*directory, &catalogue)?;
        let changing = Changing { catalogue, changed, journal, next_number, uncertain: None };
        let chain = Self::assemble(directory, snapshots, device, changing, members);
        chain.replay(replay)?;
        chain.break_those_without_supply()?;
        Ok(chain)
    }

    fn assemble(
        directory: Arc<dyn Directory>,
        snapshots: Arc<dyn Directory>,
        device: Arc<dyn Device>,
        changing: Changing,
        members: Vec<Arc<Snapshot>>,
    ) -> Self {
        Self {
            directory,
            snapshots,
            device,
            geometry: changing.catalogue.geometry,
            changing: Mutex::new(changing),
            members: RwLock::new(Arc::new(members)),
            copier: Copier::default(),
        }
    }

    /// From now on threads of the pool help to keep old bytes.
    pub fn set_pool(&self, pool: &Arc<WorkerPool>) {
        self.copier.set_pool(pool);
    }

    pub(super) fn directory(&self) -> &Arc<dyn Directory> {
        &self.directory
    }

    pub(super) fn copier(&self) -> &Copier {
        &self.copier
    }

    /// Does two things side by side where a thread is free, else one after the other.
    pub fn both(
        &self,
        first: impl FnOnce() -> Result<()> + Send + 'static,
        second: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> (Result<()>, Result<()>) {
        self.copier.both(first, second)
    }

    /// A snapshot whose files are gone may have held what an older one needs.
    fn break_those_without_supply(&self) -> Result<()> {
        let members = self.members();
        let Some(last) = members.iter().rposition(|member| member.storage().is_none()) else {
            return Ok(());
        };
        for member in members[..last].iter().filter(|member| member.is_intact()) {
            member.break_off("a newer snapshot that held its blocks cannot be read")?;
        }
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Changing> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshots at this moment, oldest first.
    pub(super) fn members(&self) -> Arc<Vec<Arc<Snapshot>>> {
        Arc::clone(&self.members.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_members(&self, members: Vec<Arc<Snapshot>>) {
        *self.members.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(members);
    }

    pub(super) fn write_catalogue(&self, held: &mut Changing, new: Catalogue) -> Result<()> {
        self.directory.replace(CATALOGUE, &new.encode())?;
        held.catalogue = new;
        Ok(())
    }

    pub(super) fn remove_snapshot_files(&self, snapshot: Uuid) -> Result<()> {
        self.snapshots.remove(&snapshot.to_string())
    }

    pub(super) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Which backup this is, of all that a volume may have had.
    #[must_use]
    pub fn backup(&self) -> Uuid {
        self.lock().catalogue.backup
    }

    /// Nil until a primary has adopted the backup.
    #[must_use]
    pub fn volume(&self) -> Uuid {
        self.lock().catalogue.volume
    }

    #[must_use]
    pub fn generation(&self) -> u64 {
        self.lock().catalogue.generation
    }

    /// All cuts that are remembered, oldest first.
    #[must_use]
    pub fn cuts(&self) -> Vec<CutRecord> {
        self.lock().catalogue.cuts.clone()
    }

    /// Takes the identity of a volume for good, or a later generation of it; durable when it
    /// returns. Another volume or an earlier generation is refused (trap 38).
    pub fn adopt(&self, volume: Uuid, generation: u64) -> Result<()> {
        let mut held = self.lock();
        self.settle_all(&mut held)?;
        let old = held.catalogue.clone();
        if !old.volume.is_nil() && old.volume != volume {
            return Err(Error::identity(format!(
                "this is the backup of volume {}, not of {volume}",
                old.volume
            )));
        }
        if generation < old.generation {
            return Err(Error::identity(format!(
                "the backup is at generation {}, the peer at {generation}: its volume was lost or \
                 promoted since; it must not write",
                old.generation
            )));
        }
        if old.volume == volume && old.generation == generation {
            return Ok(());
        }
        let mut new = Catalogue { volume, generation, ..old.clone() };
        if old.volume.is_nil() {
            let number = held.next_number;
            let map = create_changed(&*self.directory, identity_of(&new), number)?;
            held.next_number += 1;
            for run in held.changed.plane(CHANGED).runs(self.geometry.all_blocks(), true) {
                map.fill(CHANGED, run, true);
            }
            map.commit_all()?;
            new.changed = number;
            self.write_catalogue(&mut held, new)?;
            held.changed = Arc::new(map);
            return self.directory.remove(&changed_name(old.changed));
        }
        self.write_catalogue(&mut held, new)
    }

    /// Cuts: from now on writes preserve into a new snapshot of the mirror as it is. `sequence` is
    /// that of the last operation before. The caller lets nothing write meanwhile and has flushed
    /// the mirror.
    pub fn cut(&self, order: &CutOrder, sequence: u64) -> Result<()> {
        let mut held = self.lock();
        self.settle_all(&mut held)?;
        let members = self.members();
        self.check_order(order, &held, members.len())?;
        let number = held.next_number;
        let record = CutRecord {
            snapshot: order.snapshot,
            label: order.label.clone(),
            generation: held.catalogue.generation,
            sequence,
            created_ms: order.created_ms,
            selection: Selection::of_bytes(self.geometry, &order.selection)?,
            changed: held.catalogue.changed,
            kept: true,
        };
        held.next_number += 1;
        let mut new = held.catalogue.clone();
        new.cuts.push(record.clone());
        let forgotten = new.cuts.clone();
        new.forget_oldest();
        new.changed = number;
        let journal = self.new_journal(&held);
        new.journal |= journal.is_some();
        let made = self.make_files(identity_of(&new), record, number);
        let (snapshot, changed) = made.inspect_err(|_| {
            // Nothing half done; what cannot be removed now is removed at the next start.
            let _removed = self.remove_snapshot_files(order.snapshot);
            let _removed = self.directory.remove(&changed_name(number));
            if journal.is_some() {
                let _removed = self.directory.remove(JOURNAL);
            }
        })?;
        if let Err(error) = self.write_catalogue(&mut held, new) {
            // The new catalogue may be there all the same. Then the next start must not take the
            // snapshot for whole, as nothing is preserved into it from now on.
            if let Err(worse) = snapshot.break_off("its cut was not completed") {
                held.uncertain = Some(worse);
            }
            return Err(error);
        }
        held.changed = Arc::new(changed);
        held.journal = journal.or(held.journal.take());
        let mut all = Vec::clone(&members);
        all.push(Arc::new(snapshot));
        self.set_members(all);
        let dropped = forgotten.len() - held.catalogue.cuts.len();
        for cut in &forgotten[..dropped] {
            // What cannot be removed now is removed at the next start.
            let _removed = self.directory.remove(&changed_name(cut.changed));
        }
        Ok(())
    }

    /// A journal, if there never was one. Without it things only go slower.
    fn new_journal(&self, held: &Changing) -> Option<Journal> {
        if held.catalogue.journal {
            return None;
        }
        let made = Journal::create(&*self.directory, held.catalogue.backup, self.geometry);
        if made.is_err() {
            // What it took is room for others again.
            let _removed = self.directory.remove(JOURNAL);
        }
        made.ok()
    }

    fn check_order(&self, order: &CutOrder, held: &Changing, members: usize) -> Result<()> {
        if members >= SNAPSHOTS_MAX {
            return Err(Error::usage(format!(
                "a volume has at most {SNAPSHOTS_MAX} snapshots at a time: delete one first"
            )));
        }
        if order.label.len() > LABEL_BYTES_MAX {
            return Err(Error::usage(format!(
                "a label has at most {LABEL_BYTES_MAX} bytes, found {}",
                order.label.len()
            )));
        }
        if held.catalogue.cuts.iter().any(|cut| cut.snapshot == order.snapshot) {
            return Err(Error::usage(format!("there is a snapshot {} already", order.snapshot)));
        }
        Ok(())
    }

    fn make_files(
        &self,
        identity: MapIdentity,
        record: CutRecord,
        number: u64,
    ) -> Result<(Snapshot, MapFile)> {
        let home = self.snapshots.directory(&record.snapshot.to_string())?;
        let snapshot = Snapshot::create(home, identity, record)?;
        Ok((snapshot, create_changed(&*self.directory, identity, number)?))
    }

    /// What is known of each snapshot, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<SnapshotStatus> {
        let block = self.geometry.block_size().bytes();
        let members = self.members();
        let statuses = members.iter().map(|member| {
            let held = member.preserved().map_or(0, |bits| bits.count_all());
            let given_back = member.released().map_or(0, |bits| bits.count_all());
            SnapshotStatus {
                cut: member.record().clone(),
                condition: member.condition(),
                preserved_bytes: held.saturating_sub(given_back) * block,
                released_bytes: given_back * block,
            }
        });
        statuses.collect()
    }

    /// How each snapshot fares, oldest first; nothing is counted for it.
    #[must_use]
    pub fn conditions(&self) -> Vec<(Uuid, Condition)> {
        self.members().iter().map(|member| (member.id(), member.condition())).collect()
    }

    /// The room that preservation has, and whether it is running low.
    pub fn room(&self) -> Result<Option<(Space, bool)>> {
        let space = self.directory.space()?;
        Ok(space.map(|space| (space, space.free < space.total / 100 * STORE_LOW_PERCENT)))
    }

    /// A snapshot, to be read while writes go on.
    pub fn view(self: &Arc<Self>, snapshot: Uuid) -> Result<SnapshotView> {
        let members = self.members();
        let member = members.iter().find(|member| member.id() == snapshot);
        let member = member.ok_or_else(|| unknown(snapshot))?;
        member.check_intact()?;
        Ok(SnapshotView::new(Arc::clone(self), Arc::clone(member)))
    }
}

pub(super) fn unknown(snapshot: Uuid) -> Error {
    Error::usage(format!(
        "expected a snapshot of this volume, found none called {snapshot}: `snapshot NAME --list` \
         shows them"
    ))
    .with_errno(2)
}

fn identity_of(catalogue: &Catalogue) -> MapIdentity {
    MapIdentity {
        volume: catalogue.volume,
        geometry: catalogue.geometry,
        generation: catalogue.generation,
    }
}

fn open_journal(
    directory: &dyn Directory,
    catalogue: &Catalogue,
) -> Result<(Option<Journal>, Replay)> {
    if !catalogue.journal {
        // What a crash left of the first.
        if directory.names()?.iter().any(|name| name == JOURNAL) {
            directory.remove(JOURNAL)?;
        }
        return Ok((None, Replay::default()));
    }
    let lost = || (None, Replay { damaged: true, ..Replay::default() });
    if !directory.names()?.iter().any(|name| name == JOURNAL) {
        return Ok(lost());
    }
    match Journal::open(directory, catalogue.backup, catalogue.geometry) {
        Ok((journal, replay)) => Ok((Some(journal), replay)),
        Err(error) if error.kind() == ErrorKind::Integrity => Ok(lost()),
        Err(error) => Err(error),
    }
}

fn check_device(device: &dyn Device, geometry: Geometry) -> Result<()> {
    if device.size() >= geometry.size() {
        return Ok(());
    }
    Err(Error::identity(format!(
        "expected a mirror device of at least {} bytes, found {}: give a larger one",
        geometry.size(),
        device.size()
    )))
}

/// Sorts and joins, so that no block is named twice.
pub(super) fn joined(runs: &[BlockRange]) -> Selection {
    Selection::union(runs.to_vec())
}
