//! What a merge writes to: a live volume, or a device with a map file.
//!
//! Does not know: bundles.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::lineage::descend;
use super::undo::Undo;
use crate::bundle::Lineage;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange, ExtentMap, subtract};
use crate::limits::COMMIT_PAGES_MAX;
use crate::map::{MapIdentity, OverwriteMap};
use crate::units::{Cut, CutSpan, Geometry};

/// Whose bytes a target takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetIdentity {
    /// Nil: a map that is bound to no volume.
    pub volume: Uuid,
    pub generation: u64,
    /// Of a replica: the cuts that may supply what it lacks.
    pub span: Option<CutSpan>,
    /// Whether it takes what is bound to no volume (plain images): never while it is served.
    pub takes_unbound: bool,
}

/// Runs held by one filler.
#[derive(Debug)]
pub struct Claim {
    /// The target's own name for it; nothing where there are no runs.
    pub number: u64,
    pub runs: Vec<BlockRange>,
}

impl Claim {
    /// Nothing was wanted.
    #[must_use]
    pub fn nothing() -> Self {
        Self { number: 0, runs: Vec::new() }
    }
}

/// See the module. Several threads call it at a time.
pub trait MergeTarget: Sync {
    fn geometry(&self) -> Geometry;

    fn identity(&self) -> TargetIdentity;

    /// Becomes a replica of the first source that has an identity; asked only while its own is nil.
    fn bind(&self, volume: Uuid, cut: Cut) -> Result<()>;

    /// Told when an incremental source was gone through: a replica in which nothing of it is
    /// missing takes earlier cuts from now on.
    fn descend(&self, lineage: &Lineage) -> Result<()> {
        let _any_cut_of_the_generation_is_taken = lineage;
        Ok(())
    }

    /// The runs inside `blocks` that a bundle may still supply: missing and not link-only.
    fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange>;

    /// The runs inside `blocks` that are missing and that no bundle may supply (law 5).
    fn in_doubt(&self, blocks: BlockRange) -> Vec<BlockRange>;

    /// Where a claim's runs are written.
    fn device(&self) -> Arc<dyn Device>;

    /// Takes those runs of the blocks that are still wanted and that nobody else holds. Until it is
    /// settled nobody else writes them (law 4).
    fn claim(&self, blocks: BlockRange) -> Result<Claim>;

    /// The claim's runs were written, and are current from now on; or that failed, and they stay
    /// missing.
    fn settle(&self, claim: Claim, result: &Result<()>);

    /// Claims, writes from `bytes` (of the whole range; `None`: zeros) and settles. Returns the
    /// bytes written.
    fn fill(&self, blocks: BlockRange, bytes: Option<&[u8]>) -> Result<u64> {
        let whole = self.geometry().bytes_of(blocks);
        assert!(bytes.is_none_or(|bytes| bytes.len() as u64 == whole.length), "bytes of the range");
        let claim = self.claim(blocks)?;
        let mut written = 0;
        let mut result = Ok(());
        for run in &claim.runs {
            let ByteRange { offset, length } = self.geometry().bytes_of(*run);
            result = match bytes {
                Some(bytes) => {
                    let start = (offset - whole.offset) as usize;
                    self.device().write_at(offset, &bytes[start..][..length as usize])
                }
                None => self.device().zero_at(offset, length),
            };
            if result.is_err() {
                break;
            }
            written += length;
        }
        self.settle(claim, &result);
        result.map(|()| written)
    }

    /// Bytes that were wanted, and are missing still because the source is too old for them. Of a
    /// merge of several sources each of their targets that says it says it of all of them.
    fn bytes_stale(&self) -> u64 {
        0
    }

    /// Makes everything filled durable: the device's flush, then the map's commit (rule R1).
    fn commit(&self) -> Result<()>;

    /// Told of blocks that the source cannot supply, its bytes being damaged or perhaps too old:
    /// whether the target has brought them another way.
    fn repair(&self, blocks: BlockRange) -> bool {
        let _the_link_is_elsewhere = blocks;
        false
    }
}

/// A device that nobody serves, with its map file.
#[derive(Debug)]
pub struct OfflineTarget {
    device: Arc<dyn Device>,
    map: Arc<OverwriteMap>,
    claims: Mutex<ExtentMap<()>>,
    /// Keeps what is overwritten.
    undo: Option<Undo>,
    /// A commit failed: nothing is known of what was written, so nothing more is committed.
    poisoned: AtomicBool,
}

impl OfflineTarget {
    /// The device may be larger than the volume, never smaller.
    pub fn new(device: Arc<dyn Device>, map: Arc<OverwriteMap>) -> Result<Self> {
        let size = map.geometry().size();
        if device.size() < size {
            return Err(Error::identity(format!(
                "expected a target of at least the {size} bytes of its map, found {}: name the \
                 file or device that the map is of",
                device.size()
            )));
        }
        let sector = device.sector_size();
        if !map.geometry().is_whole_sectors(sector) {
            return Err(Error::identity(format!(
                "expected a target whose sectors make up the map's blocks of {} bytes and its size \
                 of {size}, found sectors of {sector}: make the map with larger blocks",
                map.geometry().block_size().bytes()
            )));
        }
        let (claims, poisoned) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { device, map, claims, undo: None, poisoned })
    }

    /// From now on everything is kept there, durably, before it is overwritten.
    #[must_use]
    pub fn keeping(self, undo: Undo) -> Self {
        Self { undo: Some(undo), ..self }
    }

    #[must_use]
    pub fn map(&self) -> &OverwriteMap {
        &self.map
    }

    #[must_use]
    pub fn shared_map(&self) -> &Arc<OverwriteMap> {
        &self.map
    }

    fn claims(&self) -> MutexGuard<'_, ExtentMap<()>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MergeTarget for OfflineTarget {
    fn geometry(&self) -> Geometry {
        self.map.geometry()
    }

    fn identity(&self) -> TargetIdentity {
        let held = self.map.identity();
        let MapIdentity { volume, generation, .. } = held;
        let span = self.map.file().span().filter(|_| !volume.is_nil());
        TargetIdentity { volume, generation, span, takes_unbound: true }
    }

    fn bind(&self, volume: Uuid, cut: Cut) -> Result<()> {
        self.map.bind(volume, cut)
    }

    fn descend(&self, lineage: &Lineage) -> Result<()> {
        descend(&self.map, lineage)
    }

    fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.map.wanted(blocks)
    }

    fn in_doubt(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.map.in_doubt(blocks)
    }

    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.device)
    }

    fn claim(&self, blocks: BlockRange) -> Result<Claim> {
        let mut claims = self.claims();
        let held: Vec<BlockRange> = claims.overlapping(blocks).map(|(run, ())| run).collect();
        let free = subtract(blocks, held);
        let runs: Vec<BlockRange> = free.into_iter().flat_map(|run| self.map.wanted(run)).collect();
        for run in &runs {
            claims.insert(*run, ());
        }
        drop(claims);
        let claim = Claim { number: 0, runs };
        let kept = self.undo.as_ref().map_or(Ok(()), |undo| undo.keep(&*self.device, &claim.runs));
        if let Err(error) = kept {
            self.settle(claim, &Err(error.clone()));
            return Err(error);
        }
        Ok(claim)
    }

    fn settle(&self, claim: Claim, result: &Result<()>) {
        for run in claim.runs {
            if result.is_ok() {
                self.map.mark_current(run);
            }
            self.claims().remove(run);
        }
    }

    fn commit(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "an earlier flush of the target or its map failed; what was merged since the last \
                 successful one will be merged again when the merge is started anew",
            ));
        }
        self.commit_all().inspect_err(|_| self.poisoned.store(true, Ordering::Release))
    }
}

impl OfflineTarget {
    fn commit_all(&self) -> Result<()> {
        while self.map.file().has_uncommitted() {
            let capture = self.map.file().capture(COMMIT_PAGES_MAX);
            self.device.flush()?;
            self.map.file().commit(&capture)?;
            if capture.len() < COMMIT_PAGES_MAX {
                // What was marked meanwhile is for the next commit.
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RamDevice;
    use crate::map::MapIdentity;
    use crate::units::BlockSize;

    fn target() -> (Arc<RamDevice>, OfflineTarget) {
        let geometry = Geometry::new((1 << 20) + 512, BlockSize::DEFAULT).expect("valid");
        let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
        let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
        let map = OverwriteMap::create(map, identity).expect("created");
        let device = Arc::new(RamDevice::from_bytes(vec![7; (1 << 20) + 512]));
        let target =
            OfflineTarget::new(Arc::clone(&device) as _, Arc::new(map)).expect("large enough");
        (device, target)
    }

    #[test]
    fn only_wanted_blocks_are_written_and_then_they_are_current() {
        let (device, target) = target();
        target.map().mark_current(BlockRange::new(1, 2));
        assert_eq!(target.fill(BlockRange::new(0, 3), Some(&[9; 12_288])).expect("filled"), 8192);
        assert_eq!(target.fill(BlockRange::new(255, 257), None).expect("filled"), 4096 + 512);
        assert_eq!(target.fill(BlockRange::new(0, 3), Some(&[1; 12_288])).expect("filled"), 0);
        let bytes = device.contents();
        assert_eq!((bytes[0], bytes[4096], bytes[8192], bytes[1 << 20]), (9, 7, 9, 0));
        target.commit().expect("durable");
        assert!(!target.map().file().has_uncommitted());
    }

    #[test]
    fn blocks_that_another_filler_holds_are_skipped() {
        let (_, target) = target();
        let claim = target.claim(BlockRange::new(0, 2)).expect("claimed");
        assert_eq!(target.fill(BlockRange::new(0, 4), None).expect("filled"), 8192);
        target.settle(claim, &Err(Error::busy("not written")));
        assert_eq!(target.fill(BlockRange::new(0, 4), None).expect("filled"), 8192);
    }

    #[test]
    fn a_target_smaller_than_its_map_is_refused() {
        let (_, target) = target();
        let small = Arc::new(RamDevice::new(4096));
        assert!(OfflineTarget::new(small, target.map).is_err());
    }
}
