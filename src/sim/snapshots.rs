//! Snapshots of a life: asked for through the primary, read at the backup, compared ever after.
//!
//! | a cut | then |
//! |---|---|
//! | asked for | it is awaited, and the oracle knows which values it may have |
//! | answered as done | the snapshot is read, once the backup runs, and that is its image |
//! | image taken | it reads the same whatever happens, until it is deleted (law 6) |
//!
//! Does not know: when cuts are made.

use std::collections::BTreeMap;

use crossbeam_channel::{Receiver, TryRecvError};
use uuid::Uuid;

use super::rare::RareState;
use super::stamp::{self, SECTOR};
use super::world::World;
use crate::device::AlignedBuffer;
use crate::error::Result;
use crate::snapshot::SnapshotView;

/// As the backup holds at a time, at the most.
const SNAPSHOTS_MAX: usize = 6;

struct Pending {
    id: Uuid,
    read: u64,
    answer: Receiver<Result<(u64, u64)>>,
}

/// A snapshot whose image is known.
pub struct Imaged {
    pub id: Uuid,
    pub image: Vec<u8>,
    /// The backup lost power since.
    crashed: bool,
}

/// See the module.
#[derive(Default)]
pub struct Snapshots {
    pending: Vec<Pending>,
    /// Done, and not yet read.
    done: Vec<(Uuid, u64)>,
    pub imaged: Vec<Imaged>,
}

impl Snapshots {
    pub fn forget_pending(&mut self) {
        self.pending.clear();
    }

    pub fn has_crashed(&mut self) {
        self.imaged.iter_mut().for_each(|held| held.crashed = true);
    }
}

impl World {
    /// Asks for a snapshot of everything.
    pub fn cut(&mut self) {
        let held = self.snapshots.pending.len() + self.snapshots.imaged.len();
        let Some(driver) = self.primary.driver().filter(|_| held < SNAPSHOTS_MAX) else { return };
        let read = self.new_id();
        let id = Uuid::from_u128(u128::from(read));
        if self.writes_under_way() {
            self.rare.note(RareState::SnapshotCutInFlight);
        }
        let window = self.setting.window.clone();
        self.oracle.begin_read(read, window.into_iter());
        match driver.begin_cut(id, String::new(), Vec::new(), 30_000) {
            Ok(answer) => {
                self.note(|| format!("cut {read}"));
                self.snapshots.pending.push(Pending { id, read, answer });
            }
            Err(_) => self.oracle.read_failed(read),
        }
        self.look();
    }

    /// Takes the answers that have come.
    pub fn look_at_cuts(&mut self) {
        let mut at = 0;
        while at < self.snapshots.pending.len() {
            let pending = &self.snapshots.pending[at];
            let (id, read) = (pending.id, pending.read);
            match pending.answer.try_recv() {
                Err(TryRecvError::Empty) => {
                    at += 1;
                    continue;
                }
                Ok(Ok(_)) => {
                    self.note(|| format!("snapshot {read} is there"));
                    self.snapshots.done.push((id, read));
                }
                Ok(Err(_)) | Err(TryRecvError::Disconnected) => {
                    self.note(|| format!("no snapshot {read}"));
                    self.oracle.read_failed(read);
                }
            }
            self.snapshots.pending.remove(at);
        }
        if self.backup.running.is_some() && !self.backup.power.is_off() {
            for (id, read) in std::mem::take(&mut self.snapshots.done) {
                self.take_image(id, read);
            }
        }
    }

    fn take_image(&mut self, id: Uuid, read: u64) {
        let Some(image) = self.read_snapshot(id) else {
            self.oracle.read_failed(read);
            return;
        };
        let found: BTreeMap<u64, u64> = self
            .setting
            .window
            .iter()
            .map(|at| {
                let start = (at * SECTOR) as usize;
                (*at, stamp::value(&image[start..start + SECTOR as usize]))
            })
            .collect();
        self.note(|| format!("    it holds {found:?}"));
        self.oracle.cut_done(read, &found);
        self.snapshots.imaged.push(Imaged { id, image, crashed: false });
    }

    /// All of a snapshot; `None` if it broke, for which there must be a reason.
    fn read_snapshot(&mut self, id: Uuid) -> Option<Vec<u8>> {
        let volume = self.backup.volume().expect("the backup runs");
        let mut image = AlignedBuffer::zeroed(self.setting.geometry.size() as usize);
        let read = volume.view(id).and_then(|view| view.read_at(0, &mut image));
        match read {
            Ok(()) => Some(image.to_vec()),
            Err(_) if self.setting.store_bytes.is_some() => {
                self.rare.note(RareState::SnapshotBrokenByFullStore);
                None
            }
            Err(_) if self.has_store_trouble() => None,
            Err(error) => panic!("snapshot {id} is gone, and nothing has failed: {error}"),
        }
    }

    fn has_store_trouble(&mut self) -> bool {
        self.note_troubles();
        self.stores_troubled || self.backup.power.is_off()
    }

    /// Each snapshot is what it was.
    pub fn check_snapshots(&mut self) {
        if self.backup.running.is_none() || self.backup.power.is_off() {
            return;
        }
        let mut kept = Vec::new();
        for held in std::mem::take(&mut self.snapshots.imaged) {
            let Some(image) = self.read_snapshot(held.id) else { continue };
            let moved = image.chunks(512).zip(held.image.chunks(512)).position(|(a, b)| a != b);
            if let Some(sector) = moved {
                let value = |bytes: &[u8]| stamp::value(&bytes[sector * 512..][..512]);
                panic!(
                    "snapshot {} moved: sector {sector} held {} and holds {}",
                    held.id,
                    value(&held.image),
                    value(&image)
                );
            }
            if held.crashed {
                self.rare.note(RareState::SnapshotSurvivedCrash);
            }
            self.check_changes(&held);
            kept.push(held);
        }
        self.snapshots.imaged = kept;
    }

    /// The backup knows of every block that it changed since the cut (law 7).
    fn check_changes(&self, held: &Imaged) {
        let volume = self.backup.volume().expect("the backup runs");
        let Ok(changed) = volume.snapshots().changed_since(held.id) else { return };
        let now = self.backup.disk.contents();
        let geometry = self.setting.geometry;
        for block in 0..geometry.blocks() {
            let bytes = geometry.bytes_of(crate::extent::BlockRange::one(block));
            let span = bytes.offset as usize..bytes.end() as usize;
            let same = now[span.clone()] == held.image[span];
            assert!(same || changed.get(block), "a change of block {block} is forgotten");
        }
    }

    pub fn view(&mut self, id: Uuid) -> Option<SnapshotView> {
        self.backup.volume().and_then(|volume| volume.view(id).ok())
    }

    /// Deletes one of the snapshots.
    pub fn delete_snapshot(&mut self) {
        if self.snapshots.imaged.is_empty() {
            return;
        }
        let Some(volume) = self.backup.volume().cloned() else { return };
        let at = self.chance.index(self.snapshots.imaged.len());
        let held = self.snapshots.imaged.remove(at);
        self.note(|| format!("snapshot {} is deleted", held.id));
        // One that fails stays on its way out, and nobody may read it.
        let _left = volume.snapshots().delete(held.id);
        self.look();
    }
}
