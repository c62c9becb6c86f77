//! What a primary volume offers to applications.
//!
//! Guarantees: a range that is wholly current is read without a lock; block status speaks of the
//! map as it is at the moment. Does not know: NBD.

use std::sync::PoisonError;

use super::driver::Driver;
use super::volume::PrimaryVolume;
use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, subtract};
use crate::volume::service::{BlockService, Command, Completion, StatusContext, StatusExtent};

impl BlockService for PrimaryVolume {
    fn size(&self) -> u64 {
        self.geometry.size()
    }

    fn sector_size(&self) -> u32 {
        self.device.sector_size()
    }

    fn preferred_size(&self) -> u32 {
        self.geometry.block_size().bytes_u32().max(self.device.sector_size())
    }

    fn read_only(&self) -> bool {
        false
    }

    fn contexts(&self) -> Vec<StatusContext> {
        vec![StatusContext::Allocation, StatusContext::Missing, StatusContext::Unsent]
    }

    fn read_now(&self, range: ByteRange, buffer: &mut [u8]) -> Option<Result<()>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).as_ref()?.read_now(range, buffer)
    }

    fn zeroes_fast(&self, range: ByteRange) -> bool {
        let Some(driver) = self.live() else { return false };
        let edges = subtract(self.geometry.touched(range), [self.geometry.covered(range)]);
        let no_fetch = |edge: &BlockRange| driver.map.current().all_equal(*edge, true);
        self.device.zeroes_fast() && edges.iter().all(no_fetch)
    }

    fn submit(&self, command: Command, completion: Completion) {
        match self.driver_or_refuse() {
            Ok(driver) => driver.submit(command, completion),
            Err(error) => completion(Err(error)),
        }
    }

    fn submit_all(&self, requests: &mut Vec<(Command, Completion)>) {
        match self.driver_or_refuse() {
            Ok(driver) => driver.submit_all(requests),
            Err(error) => {
                requests.drain(..).for_each(|(_, completion)| completion(Err(error.clone())));
            }
        }
    }

    fn status(
        &self,
        context: StatusContext,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<StatusExtent>> {
        let driver = self.driver_or_refuse()?;
        match context {
            StatusContext::Allocation => self.allocation(&driver, range, limit),
            StatusContext::Missing => Ok(self.marked(range, limit, driver.map.current(), false)),
            StatusContext::Unsent => Ok(self.marked(range, limit, driver.map.unsent(), true)),
            StatusContext::Changed => Err(Error::usage("a primary keeps no changed map")),
        }
    }
}

impl PrimaryVolume {
    /// Runs of blocks whose bit equals `value` are marked.
    fn marked(
        &self,
        range: ByteRange,
        limit: usize,
        bits: &Bitmap,
        value: bool,
    ) -> Vec<StatusExtent> {
        let blocks = self.geometry.touched(range);
        let mut extents = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end && extents.len() < limit {
            let marked = bits.get(at) == value;
            let rest = BlockRange::new(at, blocks.end);
            let end = bits.next(rest, value != marked).unwrap_or(blocks.end);
            let bytes = self.geometry.bytes_of(BlockRange::new(at, end));
            let length = bytes.intersect(range).map_or(0, |part| part.length);
            extents.push(StatusExtent { length, hole: false, zero: false, marked });
            at = end;
        }
        extents
    }

    /// Holes are told only of current blocks, where this device is the truth.
    fn allocation(
        &self,
        driver: &Driver,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<StatusExtent>> {
        let mut extents: Vec<StatusExtent> = Vec::new();
        let mut at = range.offset;
        while at < range.end() && extents.len() < limit {
            let rest = self.geometry.touched(ByteRange::new(at, range.end() - at));
            let block = BlockRange::one(rest.start);
            let missing_from = driver.map.current().next(rest, false);
            let (end, hole) = if missing_from == Some(block.start) {
                let after = driver.map.current().next(rest, true).unwrap_or(rest.end);
                (self.geometry.bytes_of(BlockRange::new(rest.start, after)).end(), false)
            } else {
                let current_end = missing_from.unwrap_or(rest.end);
                let known = self.geometry.bytes_of(BlockRange::new(rest.start, current_end)).end();
                match self.device.next_data(at)? {
                    Some(data) if data.offset <= at => (data.end().min(known), false),
                    Some(data) => (data.offset.min(known), true),
                    None => (known, true),
                }
            };
            let end = end.min(range.end());
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.length += end - at,
                _ => {
                    extents.push(StatusExtent { length: end - at, hole, zero: hole, marked: false })
                }
            }
            at = end;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::event::{MirrorPolicy, Options};
    use super::super::volume::Lost;
    use super::*;
    use crate::device::{Device, FileDevice, FileDirectory, OpenOptions, RamDevice};
    use crate::units::{BlockSize, Geometry};
    use crate::volume::engine::Engine;

    const MIB: u64 = 1 << 20;

    fn volume(home: &std::path::Path, device: Arc<dyn Device>) -> Arc<PrimaryVolume> {
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: false,
            strict: false,
            missing_deadline_ms: 1000,
        };
        PrimaryVolume::open(
            "v",
            Arc::new(FileDirectory::open(home.join("state"), true).expect("opened")),
            device,
            true,
            Geometry::new(MIB, BlockSize::DEFAULT).expect("valid"),
            options,
            Engine::new().expect("started"),
        )
        .expect("opened")
    }

    #[test]
    fn zeroing_is_fast_where_the_device_makes_holes_and_no_edge_is_missing() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let made = OpenOptions { create_size: Some(MIB), ..OpenOptions::default() };
        let file = FileDevice::open(home.path().join("disk"), made).expect("made");
        let volume = volume(home.path(), Arc::new(file));
        let (whole, within) = (ByteRange::new(0, MIB), ByteRange::new(4608, 8192));
        assert!(volume.zeroes_fast(whole) && volume.zeroes_fast(within), "all is current");
        let patience = std::time::Duration::from_secs(1);
        let lost = Lost::Ranges(vec![ByteRange::new(8192, 4096)]);
        volume.restore(&lost, patience).expect("declared");
        assert!(volume.zeroes_fast(within), "the missing block is wholly zeroed");
        assert!(!volume.zeroes_fast(ByteRange::new(4608, 4096)), "an edge must be fetched");
        assert!(volume.zeroes_fast(whole));
    }

    #[test]
    fn zeroing_of_a_device_that_writes_zeros_is_not_fast() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let volume = volume(home.path(), Arc::new(RamDevice::new(MIB)));
        assert!(!volume.zeroes_fast(ByteRange::new(0, MIB)));
    }
}
