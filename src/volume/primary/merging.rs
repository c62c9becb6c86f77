//! A live volume as the target of a merge: the same pipeline as offline, with the machine's claims.

use super::event::Event;
use super::volume::PrimaryVolume;
use crate::error::Result;
use crate::extent::BlockRange;
use crate::merge::{MergeTarget, TargetIdentity};
use crate::units::Geometry;
use crate::volume::primary::Caller;
use crate::volume::service::Command;

impl MergeTarget for PrimaryVolume {
    fn geometry(&self) -> Geometry {
        Self::geometry(self)
    }

    fn identity(&self) -> TargetIdentity {
        let (volume, generation) = self.hello_identity();
        TargetIdentity { volume, generation, takes_unbound: false }
    }

    fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.live().map_or_else(Vec::new, |driver| driver.map.wanted(blocks))
    }

    fn fill(&self, blocks: BlockRange, bytes: Option<&[u8]>) -> Result<u64> {
        let driver = self.driver_or_refuse()?;
        let whole = Self::geometry(self).bytes_of(blocks);
        assert!(bytes.is_none_or(|bytes| bytes.len() as u64 == whole.length), "bytes of the range");
        let claimed = driver.with_machine(|machine, _, _| machine.claim_for_merge(blocks))?;
        let Some((claim, runs)) = claimed else { return Ok(0) };
        let mut written = 0;
        let mut result = Ok(());
        for run in runs {
            let range = Self::geometry(self).bytes_of(run);
            let start = (range.offset - whole.offset) as usize;
            result = match bytes {
                Some(bytes) => driver
                    .device
                    .write_at(range.offset, &bytes[start..start + range.length as usize]),
                None => driver.device.zero_at(range.offset, range.length),
            };
            if result.is_err() {
                break;
            }
            written += range.length;
        }
        driver.event(Event::MergeWritten { claim, result: result.clone() }, Caller::Other);
        result.map(|()| written)
    }

    fn commit(&self) -> Result<()> {
        self.driver_or_refuse()?.commit()
    }

    /// The link brings what the bundle lost, if it is up.
    fn repair(&self, blocks: BlockRange) -> bool {
        let Ok(driver) = self.driver_or_refuse() else { return false };
        if !driver.with_machine(|machine, _, _| machine.link_is_up()) {
            return false;
        }
        let range = Self::geometry(self).bytes_of(blocks);
        driver.wait_for(Command::Cache { range }).is_ok()
    }
}
