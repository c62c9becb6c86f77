//! Runs of bytes and of blocks, and a map from disjoint runs to values.
//!
//! Guarantees: ranges are half-open; an `ExtentMap` never holds two overlapping runs.
//! Does not know: what the runs mean.

use std::collections::BTreeMap;

/// `length` bytes from `offset`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    pub offset: u64,
    pub length: u64,
}

impl ByteRange {
    #[must_use]
    pub const fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }

    /// The first byte after the range. Callers check `offset + length` when it comes from outside.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset + self.length
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.length == 0
    }

    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::new(start, end - start))
    }
}

/// Blocks from `start` up to but not including `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockRange {
    pub start: u64,
    pub end: u64,
}

impl BlockRange {
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// The one block `index`.
    #[must_use]
    pub const fn one(index: u64) -> Self {
        Self { start: index, end: index + 1 }
    }

    #[must_use]
    pub const fn count(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }

    #[must_use]
    pub const fn contains(self, index: u64) -> bool {
        index >= self.start && index < self.end
    }
}

/// Disjoint runs of indices, each with a value. Inserting over existing runs replaces the parts
/// that overlap and keeps the rest.
#[derive(Clone, Debug)]
pub struct ExtentMap<V> {
    runs: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<V: Copy + PartialEq> ExtentMap<V> {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of runs held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// All runs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (BlockRange, V)> + '_ {
        self.runs.iter().map(|(&start, &(end, value))| (BlockRange::new(start, end), value))
    }

    /// The runs that overlap `range`, clipped to it, ascending.
    pub fn overlapping(&self, range: BlockRange) -> impl Iterator<Item = (BlockRange, V)> + '_ {
        let first = self
            .runs
            .range(..=range.start)
            .next_back()
            .filter(|(_, (end, _))| *end > range.start)
            .map_or(range.start, |(&start, _)| start);
        self.runs.range(first..range.end.max(first)).filter_map(move |(&start, &(end, value))| {
            BlockRange::new(start, end).intersect(range).map(|clipped| (clipped, value))
        })
    }

    /// Gives `range` the value, whatever was there.
    pub fn insert(&mut self, range: BlockRange, value: V) {
        if range.is_empty() {
            return;
        }
        self.remove(range);
        self.runs.insert(range.start, (range.end, value));
    }

    /// Takes `range` out, splitting runs at its edges.
    pub fn remove(&mut self, range: BlockRange) {
        self.remove_if(range, |_| true);
    }

    /// Takes out the parts of `range` whose value satisfies `condition`; returns those parts.
    pub fn remove_if(
        &mut self,
        range: BlockRange,
        condition: impl Fn(V) -> bool,
    ) -> Vec<BlockRange> {
        let hits: Vec<(BlockRange, V)> =
            self.overlapping(range).filter(|(_, value)| condition(*value)).collect();
        for &(hit, value) in &hits {
            let (&start, &(end, _)) =
                self.runs.range(..=hit.start).next_back().expect("an overlapping run holds it");
            self.runs.remove(&start);
            if start < hit.start {
                self.runs.insert(start, (hit.start, value));
            }
            if hit.end < end {
                self.runs.insert(hit.end, (end, value));
            }
        }
        hits.into_iter().map(|(run, _)| run).collect()
    }
}

/// A set of bytes as runs, joined where they touch.
#[derive(Clone, Debug, Default)]
pub struct ByteRuns {
    /// Where each begins, and the first byte after it.
    runs: BTreeMap<u64, u64>,
}

impl ByteRuns {
    pub fn add(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.offset, range.end());
        while let Some((&first, &after)) = self.runs.range(..=end).next_back() {
            if after < start {
                break;
            }
            self.runs.remove(&first);
            (start, end) = (start.min(first), end.max(after));
        }
        self.runs.insert(start, end);
    }

    /// Number of runs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// All runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.runs.iter().map(|(&start, &end)| ByteRange::new(start, end - start))
    }

    /// The runs of `range` that are not in the set, ascending.
    #[must_use]
    pub fn gaps(&self, range: ByteRange) -> Vec<ByteRange> {
        let before = self.runs.range(..=range.offset).next_back();
        let first = before.map_or(range.offset, |(&start, _)| start);
        let holes = self.runs.range(first..).map(|(&start, &end)| BlockRange::new(start, end));
        let gaps = subtract(BlockRange::new(range.offset, range.end()), holes);
        gaps.into_iter().map(|gap| ByteRange::new(gap.start, gap.count())).collect()
    }
}

/// The parts of `range` that lie in none of `holes` (ascending, disjoint).
#[must_use]
pub fn subtract(range: BlockRange, holes: impl IntoIterator<Item = BlockRange>) -> Vec<BlockRange> {
    let mut rest = Vec::new();
    let mut at = range.start;
    for hole in holes {
        if hole.start >= range.end {
            break;
        }
        if hole.start > at {
            rest.push(BlockRange::new(at, hole.start.min(range.end)));
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        rest.push(BlockRange::new(at, range.end));
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn inserting_over_a_run_splits_it() {
        let mut map = ExtentMap::new();
        map.insert(BlockRange::new(0, 10), 'a');
        map.insert(BlockRange::new(3, 5), 'b');
        let runs: Vec<_> = map.iter().collect();
        assert_eq!(
            runs,
            [
                (BlockRange::new(0, 3), 'a'),
                (BlockRange::new(3, 5), 'b'),
                (BlockRange::new(5, 10), 'a')
            ]
        );
        assert_eq!(map.overlapping(BlockRange::new(4, 6)).count(), 2);
    }

    #[test]
    fn runs_that_touch_are_one_and_the_rest_are_gaps() {
        let range = |start: u64, end: u64| ByteRange::new(start, end - start);
        let mut runs = ByteRuns::default();
        for (start, end) in [(10, 20), (30, 40), (20, 22), (50, 60), (5, 5), (39, 50), (0, 3)] {
            runs.add(range(start, end));
        }
        assert_eq!(runs.iter().collect::<Vec<_>>(), [range(0, 3), range(10, 22), range(30, 60)]);
        assert_eq!(runs.gaps(range(2, 70)), [range(3, 10), range(22, 30), range(60, 70)]);
        runs.add(range(1, 65));
        assert_eq!((runs.len(), runs.gaps(range(0, 65))), (1, vec![]));
    }

    #[test]
    fn subtracting_holes_leaves_the_gaps() {
        let holes = [BlockRange::new(0, 2), BlockRange::new(4, 6)];
        assert_eq!(
            subtract(BlockRange::new(1, 8), holes),
            [BlockRange::new(2, 4), BlockRange::new(6, 8)]
        );
    }

    proptest! {
        #[test]
        fn an_extent_map_equals_an_array(
            steps in prop::collection::vec((0u64..40, 0u64..12, 0u8..4), 1..60)
        ) {
            let mut map = ExtentMap::new();
            let mut array = [None; 64];
            for (start, count, value) in steps {
                let range = BlockRange::new(start, start + count);
                let cells = &mut array[start as usize..(start + count) as usize];
                if value == 3 {
                    map.remove_if(range, |held| held != 1);
                    cells.iter_mut().filter(|cell| **cell != Some(1)).for_each(|cell| *cell = None);
                } else {
                    map.insert(range, value);
                    cells.fill(Some(value));
                }
                let mut seen = [None; 64];
                for (run, held) in map.iter() {
                    for index in run.start..run.end {
                        prop_assert_eq!(seen[index as usize], None);
                        seen[index as usize] = Some(held);
                    }
                }
                prop_assert_eq!(seen, array);
                let part = BlockRange::new(7, 23);
                let clipped: u64 = map.overlapping(part).map(|(run, _)| run.count()).sum();
                prop_assert_eq!(clipped, array[7..23].iter().flatten().count() as u64);
            }
        }
    }
}
