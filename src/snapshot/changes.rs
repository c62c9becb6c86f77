//! The backup map: which blocks changed between two cuts, one map file for each interval.
//!
//! Guarantees: a map that is damaged says too much, never too little.
//! Does not know: who changes blocks, when a cut is made.

use std::sync::Arc;

use uuid::Uuid;

use super::catalogue::Catalogue;
use super::chain::{SnapshotChain, unknown};
use crate::bitmap::Bitmap;
use crate::device::Directory;
use crate::error::{Error, Result};
use crate::map::{MapFile, MapIdentity, MapRole};

const CHANGED_PREFIX: &str = "changed-";
pub(super) const CHANGED: usize = 0;

impl SnapshotChain {
    /// The blocks changed since the latest cut (since creation where there was none).
    #[must_use]
    pub fn changed(&self) -> Arc<Bitmap> {
        Arc::clone(self.lock().changed.plane(CHANGED))
    }

    /// The blocks that changed between the cut before and this one (seed, map 324). Read from its
    /// file.
    pub fn changed_before(&self, snapshot: Uuid) -> Result<Arc<Bitmap>> {
        let catalogue = self.lock().catalogue.clone();
        let cut = catalogue.cuts.iter().find(|cut| cut.snapshot == snapshot);
        let number = cut.ok_or_else(|| unknown(snapshot))?.changed;
        let map = open_changed(&**self.directory(), &catalogue, number)?;
        Ok(Arc::clone(map.plane(CHANGED)))
    }

    /// Every block changed since that cut, up to now. The cut's snapshot may have been deleted.
    pub fn changed_since(&self, snapshot: Uuid) -> Result<Bitmap> {
        let (later, latest) = {
            let held = self.lock();
            let cuts = &held.catalogue.cuts;
            let at = cuts.iter().position(|cut| cut.snapshot == snapshot);
            let at = at.ok_or_else(|| unknown(snapshot))?;
            let later: Vec<Uuid> = cuts[at + 1..].iter().map(|cut| cut.snapshot).collect();
            (later, Arc::clone(held.changed.plane(CHANGED)))
        };
        let total = Bitmap::new(self.geometry().blocks(), false);
        let add = |bits: &Bitmap| {
            for run in bits.runs(self.geometry().all_blocks(), true) {
                total.fill(run, true);
            }
        };
        for cut in later {
            add(&*self.changed_before(cut)?);
        }
        add(&latest);
        Ok(total)
    }
}

pub(super) fn changed_name(number: u64) -> String {
    format!("{CHANGED_PREFIX}{number}.map")
}

pub(super) fn create_changed(
    directory: &dyn Directory,
    identity: MapIdentity,
    number: u64,
) -> Result<MapFile> {
    let size = MapFile::bytes_needed(identity.geometry, MapRole::Changed);
    let file = directory.create(&changed_name(number), size)?;
    MapFile::create(file, identity, MapRole::Changed)
}

/// Opens a map of changed blocks. Where a page is damaged every block counts as changed: too much
/// is copied again, never too little.
pub(super) fn open_changed(
    directory: &dyn Directory,
    catalogue: &Catalogue,
    number: u64,
) -> Result<MapFile> {
    let file = directory.open(&changed_name(number))?;
    let (map, damage) = MapFile::open_damaged(file, MapRole::Changed)?;
    let found = map.identity();
    let same_volume = found.volume == catalogue.volume || found.volume.is_nil();
    if !same_volume || found.geometry != catalogue.geometry {
        return Err(Error::identity(format!(
            "{} belongs to volume {}, expected {}",
            changed_name(number),
            found.volume,
            catalogue.volume
        )));
    }
    for (_, blocks) in damage.lost.iter().chain(&damage.suspect) {
        map.fill(CHANGED, *blocks, true);
    }
    Ok(map)
}

/// Removes map files of no cut, left by a crash.
pub(super) fn remove_strangers(directory: &dyn Directory, numbers: &[u64]) -> Result<()> {
    let kept: Vec<String> = numbers.iter().map(|number| changed_name(*number)).collect();
    for name in directory.names()? {
        if name.starts_with(CHANGED_PREFIX) && !kept.contains(&name) {
            directory.remove(&name)?;
        }
    }
    Ok(())
}
