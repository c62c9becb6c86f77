//! Units as types: a block index, a block size and a byte offset never mix by accident.
//!
//! Guarantees: a `BlockSize` is a power of two between 512 B and 1 MiB; a `Geometry` has a size
//! that is a positive multiple of 512 bytes and at most `limits::VOLUME_BYTES_MAX`.
//! Does not know: devices, files, errors of the outside world beyond a refused number.

use std::fmt;

use crate::extent::{BlockRange, ByteRange};

/// The smallest unit any volume, request or device is counted in: one sector of 512 bytes.
pub const SECTOR_BYTES: u64 = 512;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// The unit of tracking, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockSize {
    shift: u32,
}

impl BlockSize {
    pub const MIN: u32 = 512;
    pub const MAX: u32 = 1 << 20;
    /// 4 KiB.
    pub const DEFAULT: Self = Self { shift: 12 };

    /// `None` unless `bytes` is a power of two from 512 to 1 MiB.
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        let valid = bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes);
        valid.then(|| Self { shift: bytes.trailing_zeros() })
    }

    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }

    #[must_use]
    pub fn bytes_u32(self) -> u32 {
        1 << self.shift
    }

    #[must_use]
    pub fn shift(self) -> u32 {
        self.shift
    }
}

impl fmt::Debug for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.bytes())
    }
}

/// Size and block size of a volume. The last block may be shorter than the others (the *tail*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    block_size: BlockSize,
}

impl Geometry {
    /// `None` unless `size` is a positive multiple of 512 and at most 2^63 - 512.
    #[must_use]
    pub fn new(size: u64, block_size: BlockSize) -> Option<Self> {
        let valid = size > 0
            && size.is_multiple_of(SECTOR_BYTES)
            && size <= crate::limits::VOLUME_BYTES_MAX;
        valid.then_some(Self { size, block_size })
    }

    /// Bytes of the volume.
    #[must_use]
    pub fn size(self) -> u64 {
        self.size
    }

    #[must_use]
    pub fn block_size(self) -> BlockSize {
        self.block_size
    }

    /// Whether every block, also a short tail, is whole sectors of a device.
    #[must_use]
    pub fn is_whole_sectors(self, sector_bytes: u32) -> bool {
        let sector = u64::from(sector_bytes);
        self.block_size.bytes().is_multiple_of(sector) && self.size.is_multiple_of(sector)
    }

    /// Number of blocks, a short tail counted as one.
    #[must_use]
    pub fn blocks(self) -> u64 {
        self.size.div_ceil(self.block_size.bytes())
    }

    /// Whether the bytes lie inside the volume (an empty range at the end does).
    #[must_use]
    pub fn contains(self, range: ByteRange) -> bool {
        range.offset.checked_add(range.length).is_some_and(|end| end <= self.size)
    }

    /// Every block that the bytes touch.
    #[must_use]
    pub fn touched(self, range: ByteRange) -> BlockRange {
        if range.length == 0 {
            let at = range.offset >> self.block_size.shift;
            return BlockRange::new(at, at);
        }
        let shift = self.block_size.shift;
        BlockRange::new(range.offset >> shift, ((range.end() - 1) >> shift) + 1)
    }

    /// Every block that the bytes cover whole; a short tail is whole when the range reaches the
    /// end of the volume.
    #[must_use]
    pub fn covered(self, range: ByteRange) -> BlockRange {
        let shift = self.block_size.shift;
        let start = range.offset.div_ceil(self.block_size.bytes());
        let end = if range.end() >= self.size { self.blocks() } else { range.end() >> shift };
        BlockRange::new(start, end.max(start))
    }

    /// The bytes of a run of blocks, clipped to the end of the volume.
    #[must_use]
    pub fn bytes_of(self, blocks: BlockRange) -> ByteRange {
        let start = (blocks.start << self.block_size.shift).min(self.size);
        let end = (blocks.end << self.block_size.shift).min(self.size);
        ByteRange::new(start, end - start)
    }

    /// All blocks of the volume.
    #[must_use]
    pub fn all_blocks(self) -> BlockRange {
        BlockRange::new(0, self.blocks())
    }

    /// All bytes of the volume.
    #[must_use]
    pub fn all_bytes(self) -> ByteRange {
        ByteRange::new(0, self.size)
    }
}

/// An instant of a volume: after so many operations of a life of it. Later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    pub generation: u64,
    pub sequence: u64,
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "generation {}, cut {}", self.generation, self.sequence)
    }
}

/// Which cuts a replica holds: one that was filled from bundles. Its current blocks are as at the
/// newest cut, and those that are missing did not change from the oldest to the newest: any cut
/// between, these two included, supplies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutSpan {
    pub oldest: Cut,
    pub newest: Cut,
}

impl CutSpan {
    /// Generation and sequence of the oldest, then of the newest.
    #[must_use]
    pub fn numbers(self) -> [u64; 4] {
        let Self { oldest, newest } = self;
        [oldest.generation, oldest.sequence, newest.generation, newest.sequence]
    }

    #[must_use]
    pub fn of_numbers([from, first, to, last]: [u64; 4]) -> Self {
        Self {
            oldest: Cut { generation: from, sequence: first },
            newest: Cut { generation: to, sequence: last },
        }
    }

    #[must_use]
    pub fn contains(&self, cut: Cut) -> bool {
        self.oldest <= cut && cut <= self.newest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_size_is_a_power_of_two_in_range() {
        assert!(BlockSize::new(4096).is_some());
        for bad in [0, 256, 4097, 1 << 21] {
            assert!(BlockSize::new(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_short_tail_is_covered_only_when_the_range_reaches_the_end() {
        let geometry = Geometry::new(10 * 512, BlockSize::DEFAULT).expect("valid");
        assert_eq!(geometry.blocks(), 2);
        assert_eq!(geometry.covered(ByteRange::new(4096, 1024)), BlockRange::new(1, 2));
        assert_eq!(geometry.covered(ByteRange::new(4096, 512)), BlockRange::new(1, 1));
        assert_eq!(geometry.bytes_of(BlockRange::new(1, 2)), ByteRange::new(4096, 1024));
    }

    #[test]
    fn blocks_and_tail_must_be_whole_sectors() {
        let geometry = |size| Geometry::new(size, BlockSize::DEFAULT).expect("valid");
        assert!(geometry(8192).is_whole_sectors(4096));
        assert!(geometry(8192 + 512).is_whole_sectors(512));
        assert!(!geometry(8192 + 512).is_whole_sectors(4096));
        let small = BlockSize::new(512).expect("valid");
        assert!(!Geometry::new(8192, small).expect("valid").is_whole_sectors(4096));
    }

    #[test]
    fn touched_and_covered_differ_at_partial_edges() {
        let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
        let range = ByteRange::new(512, 8192);
        assert_eq!(geometry.touched(range), BlockRange::new(0, 3));
        assert_eq!(geometry.covered(range), BlockRange::new(1, 2));
        assert_eq!(geometry.covered(ByteRange::new(512, 1024)), BlockRange::new(1, 1));
    }
}
