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

    /// What is not selected is never asked for, and cannot be looked at.
    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let geometry = self.geometry();
        let runs = self.selection().runs();
        let next = runs.partition_point(|run| geometry.bytes_of(*run).end() <= offset);
        for run in &runs[next..] {
            let bytes = geometry.bytes_of(*run);
            let mut at = bytes.offset.max(offset);
            while at < bytes.end() {
                let extent = self.extent_at(at, bytes.end())?;
                if extent.data {
                    return Ok(Some(extent.range));
                }
                at = extent.range.end();
            }
        }
        Ok(None)
    }
}
