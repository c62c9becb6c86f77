//! What a bundle is to hold, as it was wished for: ranges and partitions, of those what changed, of
//! that what the source holds as data.
//!
//! Guarantees: every byte of the answer was offered by the source; what is left out by `changed` or
//! `allocated` had not changed, or reads as zeros. Where there are more runs than a manifest takes,
//! the smallest gaps between them are taken in.
//! Does not know: how it is stored.

use super::partitions::select_partitions;
use super::selection::{normalised, zero_grain};
use super::source::Source;
use crate::bitmap::Bitmap;
use crate::error::Result;
use crate::extent::ByteRange;
use crate::limits::BUNDLE_SELECTION_RUNS_MAX;

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// Whole blocks. No ranges and no partitions: all that is offered.
    pub ranges: &'a [ByteRange],
    /// By number.
    pub partitions: &'a [u32],
    /// Only what the source holds as data; holes are left out.
    pub allocated: bool,
    /// Only these blocks.
    pub changed: Option<&'a Bitmap>,
}

/// What was chosen, ascending; nothing, if nothing changed or all is a hole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Of what was wished for, before `changed` and `allocated`.
    pub scope: Vec<ByteRange>,
    pub selection: Vec<ByteRange>,
}

/// `offered`: what of the source can be read, ascending.
pub fn choose(source: &dyn Source, offered: &[ByteRange], wish: &Wish<'_>) -> Result<Chosen> {
    let geometry = source.identity().geometry;
    let mut ranges = wish.ranges.to_vec();
    ranges.extend(select_partitions(source, wish.partitions)?);
    let scope = if ranges.is_empty() { offered.to_vec() } else { normalised(&ranges, geometry)? };
    let mut runs = scope.clone();
    if let Some(changed) = wish.changed {
        let blocks = runs.iter().map(|range| geometry.touched(*range));
        let kept = blocks.flat_map(|blocks| changed.runs(blocks, true).collect::<Vec<_>>());
        runs = thinned(kept.map(|run| geometry.bytes_of(run)), &scope, BUNDLE_SELECTION_RUNS_MAX);
    }
    if wish.allocated {
        let mut found = Vec::new();
        for range in runs {
            add_data(source, range, &mut found)?;
            if found.len() > 2 * BUNDLE_SELECTION_RUNS_MAX {
                found = thinned(found.into_iter(), &scope, BUNDLE_SELECTION_RUNS_MAX);
            }
        }
        runs = thinned(found.into_iter(), &scope, BUNDLE_SELECTION_RUNS_MAX);
    }
    Ok(Chosen { scope, selection: runs })
}

/// Where the source may hold data in a range, in whole grains.
fn add_data(source: &dyn Source, range: ByteRange, found: &mut Vec<ByteRange>) -> Result<()> {
    let grain = zero_grain(source.identity().geometry);
    let mut at = range.offset;
    while at < range.end() {
        let Some(data) = source.next_data(at)? else { return Ok(()) };
        let start = data.offset / grain * grain;
        let end = data.end().next_multiple_of(grain);
        if let Some(run) = ByteRange::new(start, end - start).intersect(range) {
            match found.last_mut() {
                Some(last) if last.end() >= run.offset => {
                    last.length = last.end().max(run.end()) - last.offset;
                }
                _ => found.push(run),
            }
        }
        at = end.max(data.end());
    }
    Ok(())
}

/// Joins ascending runs that touch, and where there are more than `most`, over small gaps of the
/// scope as well.
fn thinned(
    runs: impl Iterator<Item = ByteRange>,
    scope: &[ByteRange],
    most: usize,
) -> Vec<ByteRange> {
    let mut held = joined(runs, scope, 0);
    let mut gap = 4096;
    while held.len() > most && gap < u64::MAX / 4 {
        held = joined(held.into_iter(), scope, gap);
        gap *= 2;
    }
    held
}

fn joined(runs: impl Iterator<Item = ByteRange>, scope: &[ByteRange], gap: u64) -> Vec<ByteRange> {
    let may = |from: u64, to: u64| {
        let place = scope.partition_point(|range| range.end() <= from);
        from == to || scope.get(place).is_some_and(|r| r.offset <= from && to <= r.end())
    };
    let mut held: Vec<ByteRange> = Vec::new();
    for run in runs {
        match held.last_mut() {
            Some(last)
                if run.offset <= last.end() + gap
                    && may(last.end().min(run.offset), run.offset) =>
            {
                last.length = last.end().max(run.end()) - last.offset;
            }
            _ => held.push(run),
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bundle::source::ImageSource;
    use crate::device::RamDevice;
    use crate::extent::BlockRange;
    use crate::units::BlockSize;

    const GRAIN: u64 = 64 << 10;

    fn source(bytes: &[(u64, u8)]) -> ImageSource {
        let mut image = vec![0; 16 * GRAIN as usize];
        for (at, value) in bytes {
            image[*at as usize] = *value;
        }
        ImageSource::new(Arc::new(RamDevice::from_bytes(image)), BlockSize::DEFAULT).expect("sized")
    }

    fn run(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end - start)
    }

    #[test]
    fn holes_are_left_out_if_only_what_is_allocated_is_wished_for() {
        let source = source(&[(5 * GRAIN + 70, 1), (9 * GRAIN, 1)]);
        let all = [run(0, 16 * GRAIN)];
        let wish = Wish { allocated: true, ..Wish::default() };
        let chosen = choose(&source, &all, &wish).expect("chosen");
        assert_eq!(chosen.selection, [run(5 * GRAIN, 6 * GRAIN), run(9 * GRAIN, 10 * GRAIN)]);
        assert_eq!(chosen.scope, all);
        let ranges = [run(5 * GRAIN, 5 * GRAIN + 8192)];
        let chosen = choose(&source, &all, &Wish { ranges: &ranges, ..wish }).expect("chosen");
        assert_eq!(chosen.selection, ranges);
    }

    #[test]
    fn only_changed_blocks_of_what_is_wished_for_are_chosen() {
        let source = source(&[]);
        let all = [run(0, 16 * GRAIN)];
        let changed = Bitmap::new(256, false);
        changed.fill(BlockRange::new(3, 5), true);
        changed.fill(BlockRange::one(200), true);
        let wish = Wish { changed: Some(&changed), ..Wish::default() };
        let chosen = choose(&source, &all, &wish).expect("chosen");
        assert_eq!(chosen.selection, [run(12_288, 20_480), run(819_200, 823_296)]);
        let ranges = [run(0, 16_384)];
        let chosen = choose(&source, &all, &Wish { ranges: &ranges, ..wish }).expect("chosen");
        assert_eq!((chosen.selection, chosen.scope), (vec![run(12_288, 16_384)], ranges.to_vec()));
        let none = Bitmap::new(256, false);
        let wish = Wish { changed: Some(&none), ..Wish::default() };
        assert!(choose(&source, &all, &wish).expect("nothing").selection.is_empty());
    }

    #[test]
    fn too_many_runs_are_joined_over_the_smallest_gaps_of_the_scope() {
        let runs = [run(0, 10), run(10, 20), run(5000, 5010), run(20_000, 20_001)];
        let all = [run(0, 30_000)];
        let few = |most| thinned(runs.into_iter(), &all, most);
        assert_eq!(few(3), [run(0, 20), runs[2], runs[3]]);
        assert_eq!(few(2), [run(0, 5010), runs[3]]);
        assert_eq!(few(1), [run(0, 20_001)]);
        let parts = [run(0, 100), run(4000, 30_000)];
        assert_eq!(thinned(runs.into_iter(), &parts, 1), [run(0, 20), run(5000, 20_001)]);
    }
}
