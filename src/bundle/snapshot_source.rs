//! A snapshot as the source of a bundle.

use uuid::Uuid;

use super::source::{Identity, Source};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::snapshot::SnapshotView;

impl Source for SnapshotView {
    fn identity(&self) -> Identity {
        let cut = self.cut();
        Identity {
            volume: self.volume(),
            geometry: self.geometry(),
            generation: cut.generation,
            cut: cut.sequence,
        }
    }

    fn snapshot(&self) -> Option<Uuid> {
        Some(self.cut().snapshot)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        Self::read_at(self, offset, buffer)
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let size = self.geometry().size();
        let mut at = offset;
        while at < size {
            let extent = self.extent_at(at, size)?;
            if extent.data {
                return Ok(Some(extent.range));
            }
            at = extent.range.end();
        }
        Ok(None)
    }
}
