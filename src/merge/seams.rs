//! Blocks of the target that several pieces of the source make up together.
//!
//! A bundle with smaller blocks than the target's may end a piece in the middle of a block. Such
//! a block is put together here and filled once it is whole.
//!
//! Guarantees: a block is given only when every byte of it came from a verified piece; memory is
//! at most `MERGE_SEAMS_MAX` blocks. A block that is dropped for want of room stays missing.
//! Does not know: maps, devices.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::extent::{BlockRange, ByteRange, ExtentMap};
use crate::limits::MERGE_SEAMS_MAX;
use crate::units::Geometry;

/// See the module.
#[derive(Debug)]
pub struct Seams {
    geometry: Geometry,
    begun: Mutex<BTreeMap<u64, Seam>>,
}

#[derive(Debug)]
struct Seam {
    bytes: Vec<u8>,
    /// Bytes that are there, as positions in the block.
    there: ExtentMap<()>,
}

impl Seams {
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self { geometry, begun: Mutex::default() }
    }

    /// Takes the bytes of `range` (`None`: zeros), which lies in one block. The block and its bytes
    /// if they are whole now.
    pub fn add(&self, range: ByteRange, bytes: Option<&[u8]>) -> Option<(BlockRange, Vec<u8>)> {
        let block = range.offset / self.geometry.block_size().bytes();
        let whole = self.geometry.bytes_of(BlockRange::one(block));
        let start = range.offset - whole.offset;
        let part = BlockRange::new(start, start + range.length);
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if !begun.contains_key(&block) && begun.len() >= MERGE_SEAMS_MAX {
            // Pieces mostly ascend: the lowest block has waited longest.
            begun.pop_first();
        }
        let seam = begun.entry(block).or_insert_with(|| Seam {
            bytes: vec![0; usize::try_from(whole.length).expect("a block is at most 1 MiB")],
            there: ExtentMap::new(),
        });
        let place = &mut seam.bytes[part.start as usize..part.end as usize];
        match bytes {
            Some(bytes) => place.copy_from_slice(bytes),
            None => place.fill(0),
        }
        seam.there.insert(part, ());
        let there: u64 = seam.there.iter().map(|(run, ())| run.count()).sum();
        if there < whole.length {
            return None;
        }
        begun.remove(&block).map(|seam| (BlockRange::one(block), seam.bytes))
    }
}

/// A piece of the source as the target's blocks see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub blocks: BlockRange,
    /// Parts of blocks before and after the whole ones.
    pub edges: [Option<ByteRange>; 2],
}

/// Cuts a range of bytes at the block boundaries of the target.
#[must_use]
pub fn cut(range: ByteRange, geometry: Geometry) -> Cut {
    let blocks = geometry.covered(range);
    let part = |start: u64, end: u64| (start < end).then(|| ByteRange::new(start, end - start));
    if blocks.is_empty() {
        let boundary = (range.offset + 1).next_multiple_of(geometry.block_size().bytes());
        let middle = boundary.min(range.end());
        return Cut { blocks, edges: [part(range.offset, middle), part(middle, range.end())] };
    }
    let whole = geometry.bytes_of(blocks);
    Cut { blocks, edges: [part(range.offset, whole.offset), part(whole.end(), range.end())] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockSize;

    fn geometry() -> Geometry {
        let block_size = BlockSize::new(8192).expect("a power of two");
        Geometry::new(8192 * 100 + 512, block_size).expect("valid")
    }

    #[test]
    fn a_block_is_given_when_its_last_part_has_come() {
        let seams = Seams::new(geometry());
        assert_eq!(seams.add(ByteRange::new(8192 + 4096, 4096), Some(&[2; 4096])), None);
        assert_eq!(seams.add(ByteRange::new(8192 + 4096, 4096), Some(&[2; 4096])), None);
        let (block, bytes) = seams.add(ByteRange::new(8192, 4096), None).expect("whole");
        assert_eq!(block, BlockRange::one(1));
        assert!(bytes[..4096].iter().all(|byte| *byte == 0));
        assert!(bytes[4096..].iter().all(|byte| *byte == 2));
    }

    #[test]
    fn no_more_blocks_than_the_limit_are_held() {
        let seams = Seams::new(geometry());
        for block in 0..=MERGE_SEAMS_MAX as u64 {
            assert_eq!(seams.add(ByteRange::new(block * 8192, 4096), None), None);
        }
        assert_eq!(seams.add(ByteRange::new(4096, 4096), None), None, "dropped: begun again");
        assert!(seams.add(ByteRange::new(5 * 8192 + 4096, 4096), None).is_some());
    }

    #[test]
    fn a_range_is_cut_at_block_boundaries() {
        let range = |start: u64, end: u64| ByteRange::new(start, end - start);
        let all = cut(range(4096, 3 * 8192 + 512), geometry());
        assert_eq!(all.blocks, BlockRange::new(1, 3));
        assert_eq!(all.edges, [Some(range(4096, 8192)), Some(range(3 * 8192, 3 * 8192 + 512))]);
        let inner = cut(range(512, 1024), geometry());
        assert!(inner.blocks.is_empty());
        assert_eq!(inner.edges, [Some(range(512, 1024)), None]);
        let across = cut(range(4096, 12_288), geometry());
        assert!(across.blocks.is_empty());
        assert_eq!(across.edges, [Some(range(4096, 8192)), Some(range(8192, 12_288))]);
        let tail = cut(range(100 * 8192, 100 * 8192 + 512), geometry());
        assert_eq!((tail.blocks, tail.edges), (BlockRange::new(100, 101), [None, None]));
    }
}
