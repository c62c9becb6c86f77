//! A cut as it was, read while writes go on.
//!
//! | step of a read | why |
//! |---|---|
//! | find each run: in the first snapshot from this one on that preserved it, else the mirror | |
//! | read them | |
//! | find again, read again where the answer changed | a write overtook the read (trap 25) |
//! | check that the snapshot is still intact | it breaks before an overwrite it cannot survive |
//!
//! The bit is set after the old bytes are in the store and before the overwrite begins, so bytes of
//! the mirror that were read with the bit still clear are old ones.
//!
//! Guarantees: bytes returned are those of the cut; no lock is held while reading.
//! Does not know: who writes.

use std::sync::Arc;

use uuid::Uuid;

use super::catalogue::CutRecord;
use super::chain::{SnapshotChain, unknown};
use super::member::Snapshot;
use super::selection::Selection;
use crate::bitmap::Bitmap;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, subtract};
use crate::units::Geometry;

/// A run of the image that holds data or reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageExtent {
    pub range: ByteRange,
    /// False: a hole; it reads as zeros.
    pub data: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct SnapshotView {
    chain: Arc<SnapshotChain>,
    snapshot: Arc<Snapshot>,
    volume: Uuid,
}

/// Where the bytes of a run are.
#[derive(Clone, Debug)]
enum Source {
    Mirror,
    Store(Arc<Snapshot>),
}

impl Source {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Mirror, Self::Mirror) => true,
            (Self::Store(one), Self::Store(other)) => one.id() == other.id(),
            _ => false,
        }
    }
}

impl SnapshotView {
    pub(super) fn new(chain: Arc<SnapshotChain>, snapshot: Arc<Snapshot>) -> Self {
        let volume = chain.volume();
        Self { chain, snapshot, volume }
    }

    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.chain.geometry()
    }

    /// Smallest unit of a read.
    #[must_use]
    pub fn sector_size(&self) -> u32 {
        self.chain.device().sector_size()
    }

    /// The volume it is a cut of; nil if no primary had adopted the backup.
    #[must_use]
    pub fn volume(&self) -> Uuid {
        self.volume
    }

    /// The cut: snapshot id, label, generation, sequence, selection.
    #[must_use]
    pub fn cut(&self) -> &CutRecord {
        self.snapshot.record()
    }

    #[must_use]
    pub fn selection(&self) -> &Selection {
        &self.snapshot.record().selection
    }

    /// The blocks that changed since the cut before this one.
    pub fn changed(&self) -> Result<Arc<Bitmap>> {
        self.chain.changed_before(self.snapshot.id())
    }

    /// The cut `base`, and the blocks that changed since then.
    pub fn changed_since(&self, base: Uuid) -> Result<(CutRecord, Bitmap)> {
        self.chain.changed_between(base, self.snapshot.id())
    }

    /// An error if the snapshot was broken or deleted meanwhile.
    pub fn check(&self) -> Result<()> {
        self.snapshot.check_intact()?;
        self.resolve(BlockRange::new(0, 0)).map(drop)
    }

    /// Gives back what of the range is preserved; see `SnapshotChain::release`.
    pub fn release(&self, range: ByteRange) -> Result<()> {
        self.chain.release(self.snapshot.id(), range)
    }

    /// Gives it back once there is no room for more; see `SnapshotChain::offer`.
    pub fn offer(&self, range: ByteRange) -> Result<()> {
        self.chain.offer(self.snapshot.id(), range)
    }

    /// An error that says why nothing can be given back now, if nothing can.
    pub fn check_releasable(&self) -> Result<()> {
        self.chain.check_releasable(self.snapshot.id())
    }

    /// Whether reads usually return without waiting for a disk.
    #[must_use]
    pub fn answers_at_once(&self) -> bool {
        self.chain.device().answers_at_once()
    }

    /// Fills `buffer` with the bytes at `offset` as they were at the cut. The range must lie in the
    /// selection and consist of whole sectors.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let blocks = self.checked(range)?;
        let mut todo = if blocks.is_empty() { Vec::new() } else { vec![blocks] };
        while let Some(run) = todo.pop() {
            for (part, source) in self.resolve(run)? {
                let bytes = self.geometry().bytes_of(part).intersect(range);
                let bytes = bytes.expect("a touched block shares bytes with the range");
                let start = (bytes.offset - offset) as usize;
                self.read_from(
                    &source,
                    bytes.offset,
                    &mut buffer[start..][..bytes.length as usize],
                )?;
                let again = self.resolve(part)?;
                let moved = again.into_iter().filter(|(_, now)| !now.is(&source));
                todo.extend(moved.map(|(part, _)| part));
            }
        }
        self.check_released(blocks)?;
        self.snapshot.check_intact()
    }

    /// The run of data or zeros that begins at `offset`, as long as is known, at most to `end`.
    /// What was given back was data, for all that anybody knows: to read it fails, it is not zero.
    pub fn extent_at(&self, offset: u64, end: u64) -> Result<ImageExtent> {
        let range = ByteRange::new(offset, end.saturating_sub(offset));
        let blocks = self.checked(range)?;
        if blocks.is_empty() {
            return Err(Error::usage("an empty range has no extents"));
        }
        loop {
            let (part, source) =
                self.resolve(blocks)?.into_iter().next().expect("a range has a first part");
            let (part, released) = self.until_release_changes(part);
            let bytes = self.geometry().bytes_of(part).intersect(range);
            let bytes = bytes.expect("a touched block shares bytes with the range");
            if released {
                let range = ByteRange::new(offset, bytes.length);
                return Ok(ImageExtent { range, data: true });
            }
            let data = self.device_of(&source).next_data(bytes.offset)?;
            let (length, holds) = match data.and_then(|data| data.intersect(bytes)) {
                None => (bytes.length, false),
                Some(data) if data.offset > bytes.offset => (data.offset - bytes.offset, false),
                Some(data) => (data.length, true),
            };
            let again = self.resolve(part)?;
            let kept = self.until_release_changes(part) == (part, false);
            if kept && again.len() == 1 && again[0].1.is(&source) {
                self.snapshot.check_intact()?;
                return Ok(ImageExtent { range: ByteRange::new(offset, length), data: holds });
            }
        }
    }

    fn checked(&self, range: ByteRange) -> Result<BlockRange> {
        let geometry = self.geometry();
        let sector = u64::from(self.sector_size());
        let whole = range.offset.is_multiple_of(sector) && range.length.is_multiple_of(sector);
        if !geometry.contains(range) || !whole {
            return Err(Error::usage(format!(
                "expected whole sectors of {sector} bytes inside {} bytes, found {} bytes at {}",
                geometry.size(),
                range.length,
                range.offset
            ))
            .with_errno(22));
        }
        let blocks = geometry.touched(range);
        if !self.selection().covers(blocks) {
            return Err(Error::usage(format!(
                "{} bytes at {} are not in the snapshot's selection",
                range.length, range.offset
            ))
            .with_errno(22));
        }
        Ok(blocks)
    }

    /// As many blocks of the run, from its start, as are all given back or all not.
    fn until_release_changes(&self, run: BlockRange) -> (BlockRange, bool) {
        let Some(bits) = self.snapshot.released() else { return (run, false) };
        let released = bits.get(run.start);
        let end = bits.next(run, !released).unwrap_or(run.end);
        (BlockRange::new(run.start, end), released)
    }

    fn check_released(&self, blocks: BlockRange) -> Result<()> {
        match self.snapshot.released().and_then(|bits| bits.next(blocks, true)) {
            None => Ok(()),
            Some(block) => Err(Error::usage(format!(
                "block {block} of snapshot {} was given back after it was written to a bundle: use \
                 that one, or take a new snapshot",
                self.snapshot.id()
            ))
            .with_errno(22)),
        }
    }

    /// Where the bytes of each part of `blocks` are at this moment, ascending.
    fn resolve(&self, blocks: BlockRange) -> Result<Vec<(BlockRange, Source)>> {
        let members = self.chain.members();
        let own = members.iter().position(|member| member.id() == self.snapshot.id());
        let own = own.ok_or_else(|| unknown(self.snapshot.id()))?;
        let mut parts = Vec::new();
        let mut rest = if blocks.is_empty() { Vec::new() } else { vec![blocks] };
        for member in &members[own..] {
            let Some(bits) = member.preserved() else { continue };
            let mut left = Vec::new();
            for run in rest {
                let held: Vec<BlockRange> = bits.runs(run, true).collect();
                left.extend(subtract(run, held.iter().copied()));
                parts.extend(held.into_iter().map(|run| (run, Source::Store(Arc::clone(member)))));
            }
            rest = left;
        }
        parts.extend(rest.into_iter().map(|run| (run, Source::Mirror)));
        parts.sort_unstable_by_key(|(run, _)| *run);
        Ok(parts)
    }

    fn device_of<'a>(&'a self, source: &'a Source) -> &'a dyn Device {
        match source {
            Source::Mirror => &**self.chain.device(),
            Source::Store(member) => {
                &*member.storage().expect("a snapshot that preserved has a store").store
            }
        }
    }

    fn read_from(&self, source: &Source, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.device_of(source).read_at(offset, buffer)
    }
}
