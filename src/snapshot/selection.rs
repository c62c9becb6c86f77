//! Which blocks of the volume a snapshot covers.
//!
//! Guarantees: the runs are ascending, disjoint, not adjacent, and inside the volume.
//! Does not know: why they were selected.

use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::limits::SELECTION_RANGES_MAX;
use crate::units::Geometry;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    runs: Vec<BlockRange>,
}

impl Selection {
    /// Every block that the bytes touch; no ranges at all select the whole volume.
    pub fn of_bytes(geometry: Geometry, ranges: &[ByteRange]) -> Result<Self> {
        if ranges.is_empty() {
            return Ok(Self { runs: vec![geometry.all_blocks()] });
        }
        let mut runs = Vec::with_capacity(ranges.len());
        for range in ranges {
            if !geometry.contains(*range) || range.is_empty() {
                return Err(Error::usage(format!(
                    "selected range of {} bytes at {}: empty, or not inside the volume of {} bytes",
                    range.length,
                    range.offset,
                    geometry.size()
                )));
            }
            runs.push(geometry.touched(*range));
        }
        let selection = Self::union(runs);
        if selection.runs.len() > SELECTION_RANGES_MAX {
            return Err(Error::usage(format!(
                "at most {SELECTION_RANGES_MAX} separate ranges can be selected, found {}",
                selection.runs.len()
            )));
        }
        Ok(selection)
    }

    /// The blocks that lie in any of the runs.
    #[must_use]
    pub fn union(mut runs: Vec<BlockRange>) -> Self {
        runs.retain(|run| !run.is_empty());
        runs.sort_unstable();
        let mut merged: Vec<BlockRange> = Vec::with_capacity(runs.len());
        for run in runs {
            match merged.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => merged.push(run),
            }
        }
        Self { runs: merged }
    }

    #[must_use]
    pub fn runs(&self) -> &[BlockRange] {
        &self.runs
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.runs.iter().map(|run| run.count()).sum()
    }

    /// The parts of `range` that are selected, ascending.
    pub fn within(&self, range: BlockRange) -> impl Iterator<Item = BlockRange> + '_ {
        let first = self.runs.partition_point(|run| run.end <= range.start);
        self.runs[first..]
            .iter()
            .take_while(move |run| run.start < range.end)
            .filter_map(move |run| run.intersect(range))
    }

    /// Whether all of `range` is selected.
    #[must_use]
    pub fn covers(&self, range: BlockRange) -> bool {
        range.is_empty() || self.within(range).next() == Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockSize;

    fn geometry() -> Geometry {
        Geometry::new(10 * 4096 + 512, BlockSize::DEFAULT).expect("valid")
    }

    #[test]
    fn no_ranges_select_the_whole_volume_with_its_tail() {
        let all = Selection::of_bytes(geometry(), &[]).expect("valid");
        assert_eq!(all.runs(), [BlockRange::new(0, 11)]);
    }

    #[test]
    fn ranges_are_widened_to_blocks_and_joined() {
        let ranges = [ByteRange::new(9000, 100), ByteRange::new(4096, 512), ByteRange::new(0, 1)];
        let selection = Selection::of_bytes(geometry(), &ranges).expect("valid");
        assert_eq!(selection.runs(), [BlockRange::new(0, 3)]);
        assert!(selection.covers(BlockRange::new(1, 3)));
        assert!(!selection.covers(BlockRange::new(2, 4)));
        let parts: Vec<_> = selection.within(BlockRange::new(2, 9)).collect();
        assert_eq!(parts, [BlockRange::new(2, 3)]);
    }

    #[test]
    fn a_range_outside_the_volume_is_refused() {
        for (offset, length) in [(10 * 4096, 1024), (u64::MAX, 2), (0, 0)] {
            assert!(Selection::of_bytes(geometry(), &[ByteRange::new(offset, length)]).is_err());
        }
    }
}
