//! A live volume as the target of a merge: the same pipeline as offline, with the machine's claims.
//!
//! Guarantees: nothing is written once another generation has begun: what a bundle of the one
//! before holds may be older than what was written since (law 7). Of a bundle of an earlier
//! generation only blocks are written that the backup vouches for, and only while the session lasts
//! in which it did (`asking.rs`); the others are left missing, and counted.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::asking::Vouched;
use super::driver::Driver;
use super::event::Event;
use super::state::Primary;
use super::volume::PrimaryVolume;
use crate::bitmap::Bitmap;
use crate::bundle::PieceSource;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BlockRange;
use crate::format::frames::CutName;
use crate::map::MapIdentity;
use crate::merge::{Claim, MergeTarget, TargetIdentity};
use crate::units::{Cut, Geometry};
use crate::volume::primary::Caller;
use crate::volume::service::Command;

/// See the module.
pub struct LiveTarget {
    volume: Arc<PrimaryVolume>,
    device: Arc<dyn Device>,
    /// As when the merge began.
    identity: MapIdentity,
    /// For a bundle of an earlier generation.
    older: Option<Older>,
}

struct Older {
    cut: CutName,
    vouched: Vouched,
    /// Blocks that were wanted and not vouched for, of all sources of the merge.
    stale: Arc<Bitmap>,
}

impl fmt::Debug for LiveTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveTarget").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl LiveTarget {
    /// Refuses a volume that waits for the operator's word.
    pub fn new(volume: Arc<PrimaryVolume>) -> Result<Self> {
        let driver = volume.driver_or_refuse()?;
        let (identity, device) = (driver.map().identity(), Arc::clone(&driver.device));
        Ok(Self { volume, device, identity, older: None })
    }

    /// For each of these sources: of a bundle of an earlier generation the backup is asked what it
    /// may supply, once for all media of it.
    pub fn for_sources(
        volume: &Arc<PrimaryVolume>,
        sources: &[&dyn PieceSource],
    ) -> Result<Vec<Arc<Self>>> {
        let stale = Arc::new(Bitmap::new(volume.geometry.blocks(), false));
        let mut targets: Vec<Arc<Self>> = Vec::new();
        for source in sources {
            let of_cut = |target: &&Arc<Self>| target.older.as_ref().map(|older| older.cut);
            let mut target = Self::new(Arc::clone(volume))?;
            let (found, held) = (source.identity(), target.identity);
            // Others are right, or refused by the merge.
            if found.volume == held.volume && found.generation < held.generation {
                let cut = source.cut_name();
                if let Some(known) = targets.iter().find(|one| cut.is_some() && of_cut(one) == cut)
                {
                    targets.push(Arc::clone(known));
                    continue;
                }
                let driver = volume.driver_or_refuse()?;
                let all = held.geometry.all_blocks();
                let first = driver.map().current().next(all, false).unwrap_or(all.end);
                let missing = [BlockRange::new(first, all.end)];
                let asked = if first < all.end { &missing[..] } else { &[] };
                let vouched = vouched_for(&driver, *source, asked)?;
                let cut = cut.expect("the backup was asked by its name");
                target.older = Some(Older { cut, vouched, stale: Arc::clone(&stale) });
            }
            targets.push(Arc::new(target));
        }
        Ok(targets)
    }

    /// An error if another life of the volume has begun. To be asked where none can begin.
    fn check_generation(&self, now: MapIdentity) -> Result<()> {
        if (now.volume, now.generation) == (self.identity.volume, self.identity.generation) {
            return Ok(());
        }
        Err(Error::identity(format!(
            "expected volume {} of generation {}, which the merge began with, found generation {}: \
             a loss was declared meanwhile; merge a bundle of a snapshot taken since",
            self.identity.volume, self.identity.generation, now.generation
        )))
    }
}

/// What the backup says a bundle of an earlier generation may supply of these blocks.
pub(super) fn vouched_for(
    driver: &Driver,
    source: &dyn PieceSource,
    blocks: &[BlockRange],
) -> Result<Vouched> {
    let (found, held) = (source.identity().generation, driver.map().identity().generation);
    let refused = |words: &str| {
        Err(Error::identity(format!(
            "expected a bundle of generation {held}, found one of generation {found}, made before \
             the volume was lost: {words}"
        )))
    };
    let Some(cut) = source.cut_name() else {
        return refused(
            "it does not say of which snapshot it was made, so that the backup cannot say what of \
             it is still right; make one of a snapshot taken since",
        );
    };
    match driver.unchanged_since(cut, blocks) {
        Ok(vouched) => Ok(vouched),
        Err(error) if error.kind() == ErrorKind::Link => refused(&format!(
            "only the backup knows what of it is still right ({error}); try again when the link is \
             up, or make one of a snapshot taken since"
        )),
        Err(error) if error.kind() == ErrorKind::Identity => refused(&error.to_string()),
        Err(error) => Err(error),
    }
}

impl MergeTarget for LiveTarget {
    fn geometry(&self) -> Geometry {
        self.identity.geometry
    }

    fn identity(&self) -> TargetIdentity {
        let MapIdentity { volume, generation, .. } = self.identity;
        // What of an earlier generation is not right is not wanted.
        let generation = self.older.as_ref().map_or(generation, |older| older.cut.generation);
        TargetIdentity { volume, generation, span: None, takes_unbound: false }
    }

    fn bind(&self, _: Uuid, _: Cut) -> Result<()> {
        unreachable!("a live volume has an identity")
    }

    fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange> {
        let Some(driver) = self.volume.live() else { return Vec::new() };
        let wanted = driver.map().wanted(blocks);
        let Some(older) = &self.older else { return wanted };
        let unchanged = &older.vouched.unchanged;
        for run in &wanted {
            for stale in unchanged.runs(*run, false) {
                older.stale.fill(stale, true);
            }
        }
        wanted.into_iter().flat_map(|run| unchanged.runs(run, true)).collect()
    }

    fn in_doubt(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.volume.live().map_or_else(Vec::new, |driver| driver.map().in_doubt(blocks))
    }

    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.device)
    }

    fn claim(&self, blocks: BlockRange) -> Result<Claim> {
        let driver = self.volume.driver_or_refuse()?;
        // A new generation begins only while nothing holds a claim and none is given.
        let vouched = self.older.as_ref().map(|older| &older.vouched);
        let claim = |machine: &mut Primary| {
            self.check_generation(driver.map().identity())?;
            machine.claim_for_merge(blocks, vouched.map(|vouched| &*vouched.unchanged))
        };
        let claimed = match vouched {
            Some(vouched) => driver.with_machine_in_session(&vouched.session, claim),
            None => driver.with_open_machine(claim),
        }?;
        Ok(claimed.map_or_else(Claim::nothing, |(number, runs)| Claim { number, runs }))
    }

    fn settle(&self, claim: Claim, result: &Result<()>) {
        if claim.runs.is_empty() {
            return;
        }
        // A life does not end while a claim is held.
        if let Some(driver) = self.volume.live() {
            let event = Event::MergeWritten { claim: claim.number, result: result.clone() };
            driver.event(event, Caller::Other);
        }
    }

    fn bytes_stale(&self) -> u64 {
        let (Some(older), Some(driver)) = (&self.older, self.volume.live()) else { return 0 };
        let geometry = self.identity.geometry;
        let stale = older.stale.runs(geometry.all_blocks(), true);
        let missing = stale.flat_map(|run| driver.map().wanted(run));
        missing.map(|run| geometry.bytes_of(run).length).sum()
    }

    fn commit(&self) -> Result<()> {
        self.volume.driver_or_refuse()?.commit()
    }

    /// The link brings what the bundle cannot, if it is up.
    fn repair(&self, blocks: BlockRange) -> bool {
        let Ok(driver) = self.volume.driver_or_refuse() else { return false };
        if !driver.with_machine(|machine, _, _| machine.link_is_up()) {
            return false;
        }
        let range = self.geometry().bytes_of(blocks);
        driver.wait_for(Command::Cache { range }).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{FileDirectory, RamDevice};
    use crate::units::BlockSize;
    use crate::volume::engine::Engine;
    use crate::volume::primary::{Lost, MirrorPolicy, Options};

    #[test]
    fn a_merge_that_began_before_a_loss_was_declared_writes_nothing_after_it() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let device = Arc::new(RamDevice::from_bytes(vec![7; 1 << 20]));
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: false,
            strict: false,
            missing_deadline_ms: 1000,
        };
        let volume = PrimaryVolume::open(
            "v",
            Arc::new(FileDirectory::open(home.path(), true).expect("opened")),
            Arc::clone(&device) as Arc<dyn Device>,
            true,
            Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid"),
            options,
            Engine::new().expect("started"),
        )
        .expect("opened");
        let patience = std::time::Duration::from_secs(10);
        volume.restore(&Lost::All, patience).expect("declared");
        let target = LiveTarget::new(Arc::clone(&volume)).expect("live");
        assert_eq!(target.fill(BlockRange::one(0), None).expect("filled"), 4096);
        volume.restore(&Lost::All, patience).expect("declared");
        let refused = target.fill(BlockRange::one(1), None).expect_err("another generation");
        assert_eq!(refused.kind(), ErrorKind::Identity);
        assert_eq!(device.contents()[4096], 7, "nothing was written");
        assert!(!target.wanted(BlockRange::new(0, 2)).is_empty(), "nothing is current");
    }
}
