//! What a primary asks of its backup over the mirror connection, and what the backup answers.
//!
//! Guarantees: `check` accepts only whole sectors inside the volume.
//! Does not know: frames, connections.

use uuid::Uuid;

use crate::device::Payload;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::snapshot::CutOrder;
use crate::units::Geometry;

/// One operation in the mirrored order. Sequences ascend within a session.
#[derive(Clone, Debug)]
pub enum MirrorOperation {
    Write {
        sequence: u64,
        offset: u64,
        data: Payload,
    },
    /// The range reads as zeros afterwards.
    Zero {
        sequence: u64,
        range: ByteRange,
    },
    /// Everything before becomes durable.
    Flush {
        sequence: u64,
    },
    /// The in-stream cut marker: the snapshot holds every operation before and none after.
    Cut {
        sequence: u64,
        order: CutOrder,
    },
}

impl MirrorOperation {
    #[must_use]
    pub fn sequence(&self) -> u64 {
        match self {
            Self::Write { sequence, .. }
            | Self::Zero { sequence, .. }
            | Self::Flush { sequence }
            | Self::Cut { sequence, .. } => *sequence,
        }
    }

    /// The bytes it overwrites, if it does.
    #[must_use]
    pub fn overwrites(&self) -> Option<ByteRange> {
        match self {
            Self::Write { offset, data, .. } => Some(ByteRange::new(*offset, data.len() as u64)),
            Self::Zero { range, .. } => Some(*range),
            Self::Flush { .. } | Self::Cut { .. } => None,
        }
    }

    /// Refuses what no primary of this volume would send.
    pub fn check(&self, geometry: Geometry, sector_size: u32) -> Result<()> {
        let Some(range) = self.overwrites() else { return Ok(()) };
        let sector = u64::from(sector_size);
        let whole = range.offset.is_multiple_of(sector) && range.length.is_multiple_of(sector);
        if !range.is_empty() && whole && geometry.contains(range) {
            return Ok(());
        }
        Err(Error::link(format!(
            "operation {}: expected whole sectors of {sector} bytes inside {} bytes, \
             found {} bytes at {}",
            self.sequence(),
            geometry.size(),
            range.length,
            range.offset
        )))
    }

    pub(super) fn touches(&self, geometry: Geometry) -> Option<BlockRange> {
        self.overwrites().map(|range| geometry.touched(range))
    }
}

/// What the backup says to the primary. `Applied` speaks for everything up to its sequence.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Written to the mirror, visible to fetches, not yet durable.
    Applied { through: u64 },
    /// Durable, and everything before it.
    Flushed { sequence: u64 },
    /// The snapshot is there, durably.
    CutDone { sequence: u64, snapshot: Uuid },
    /// There is no such snapshot; mirroring goes on.
    CutFailed { sequence: u64, snapshot: Uuid, error: Error },
    /// This operation and all after it are not applied, and none will be (law 11).
    Failed { sequence: u64, error: Error },
}
