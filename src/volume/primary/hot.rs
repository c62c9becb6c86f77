//! Hot extents: where writes may have reached a disk or the link before the map speaks of them.
//!
//! | state of an extent | may a write there begin |
//! |---|---|
//! | not in the table | no: enter it, record the set |
//! | entered, not recorded | no: wait for the record |
//! | recorded | yes (R3) |
//! | recorded, no write under way, a whole commit began after its last write | may leave (R5) |
//!
//! R5 asks that the map bits of its writes be durable and both devices flushed before an extent
//! leaves. The commit flushes this device and makes `current` durable; `unsent` is set before the
//! send and cleared only by a durable acknowledgement, so what the backup has not flushed stays
//! durably unsent and is sent again: the same guarantee without waiting for the link.

use std::collections::BTreeMap;

use crate::clock::Instant;
use crate::extent::ByteRange;
use crate::limits::{HOT_EXTENT_BYTES, HOT_EXTENTS_MAX};

/// How long an extent that may leave stays, so that a busy one is not recorded over and over.
const COOL_MS: u64 = 3_000;

#[derive(Debug)]
struct Hot {
    writes_under_way: u32,
    /// Commits begun when its last write ended.
    last_write_epoch: u64,
    last_used: Instant,
    recorded: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Pin {
    /// Every extent is durable: go on.
    Ready,
    /// Entered; go on after the next record.
    NotRecorded,
    /// No room until a commit lets extents leave; nothing was pinned.
    Full,
}

#[derive(Debug, Default)]
pub struct HotExtents {
    table: BTreeMap<u32, Hot>,
    /// The set being recorded now.
    recording: Option<Vec<u32>>,
    changed: bool,
}

fn extents_of(range: ByteRange) -> std::ops::RangeInclusive<u32> {
    let first = range.offset / HOT_EXTENT_BYTES;
    let last = (range.end() - 1) / HOT_EXTENT_BYTES;
    u32::try_from(first).expect("volumes are at most 4 PiB")
        ..=u32::try_from(last).expect("volumes are at most 4 PiB")
}

impl HotExtents {
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Enters the extents of a write and keeps them there until `unpin`.
    pub fn pin(&mut self, range: ByteRange, committed: u64, now: Instant) -> Pin {
        let extents = extents_of(range);
        let new = extents.clone().filter(|extent| !self.table.contains_key(extent)).count();
        let over = (self.table.len() + new).saturating_sub(HOT_EXTENTS_MAX);
        if over > 0 && self.remove_oldest(over, extents.clone(), committed) < over {
            return Pin::Full;
        }
        let mut recorded = true;
        for extent in extents {
            let hot = self.table.entry(extent).or_insert_with(|| {
                self.changed = true;
                Hot { writes_under_way: 0, last_write_epoch: 0, last_used: now, recorded: false }
            });
            hot.writes_under_way += 1;
            hot.last_used = now;
            recorded &= hot.recorded;
        }
        if recorded { Pin::Ready } else { Pin::NotRecorded }
    }

    fn remove_oldest(
        &mut self,
        count: usize,
        keep: std::ops::RangeInclusive<u32>,
        committed: u64,
    ) -> usize {
        let mut leaving: Vec<(Instant, u32)> = self
            .table
            .iter()
            .filter(|(extent, hot)| !keep.contains(extent) && hot.may_leave(committed))
            .map(|(extent, hot)| (hot.last_used, *extent))
            .collect();
        leaving.sort_unstable();
        // A few more than needed, so that the next write finds room without another record.
        let count = leaving.len().min(count + HOT_EXTENTS_MAX / 8);
        for (_, extent) in &leaving[..count] {
            self.table.remove(extent);
        }
        self.changed |= count > 0;
        count
    }

    pub fn is_recorded(&self, range: ByteRange) -> bool {
        extents_of(range).all(|extent| self.table.get(&extent).is_some_and(|hot| hot.recorded))
    }

    /// The write has ended here; `begun` counts the commits begun so far.
    pub fn unpin(&mut self, range: ByteRange, begun: u64, now: Instant) {
        for extent in extents_of(range) {
            let hot = self.table.get_mut(&extent).expect("pinned extents stay");
            hot.writes_under_way -= 1;
            hot.last_write_epoch = begun;
            hot.last_used = now;
        }
    }

    /// The set to record now, if it changed and no record is under way.
    pub fn next_record(&mut self) -> Option<Vec<u32>> {
        if !self.changed || self.recording.is_some() {
            return None;
        }
        self.changed = false;
        let set: Vec<u32> = self.table.keys().copied().collect();
        self.recording = Some(set.clone());
        Some(set)
    }

    pub fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    pub fn recorded(&mut self) {
        for extent in self.recording.take().expect("a record was under way") {
            if let Some(hot) = self.table.get_mut(&extent) {
                hot.recorded = true;
            }
        }
    }

    /// Lets extents leave that no write needs; they are gone from the log with the next record.
    pub fn cool(&mut self, committed: u64, now: Instant) {
        let before = self.table.len();
        self.table
            .retain(|_, hot| !(hot.may_leave(committed) && now.since_ms(hot.last_used) >= COOL_MS));
        self.changed |= self.table.len() < before;
    }

    /// Whether some extent waits only for a commit.
    pub fn wants_commit(&self, committed: u64) -> bool {
        self.table
            .values()
            .any(|hot| hot.writes_under_way == 0 && hot.last_write_epoch >= committed)
    }
}

impl Hot {
    fn may_leave(&self, committed: u64) -> bool {
        self.writes_under_way == 0 && self.recorded && self.last_write_epoch < committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_write_to_a_cold_extent_waits_for_the_record() {
        let mut hot = HotExtents::default();
        let range = ByteRange::new(MIB - 512, 1024);
        assert_eq!(hot.pin(range, 0, Instant(0)), Pin::NotRecorded);
        assert_eq!(hot.next_record(), Some(vec![0, 1]));
        assert!(!hot.is_recorded(range));
        hot.recorded();
        assert!(hot.is_recorded(range));
        assert_eq!(hot.pin(range, 0, Instant(0)), Pin::Ready);
        assert_eq!(hot.next_record(), None);
    }

    #[test]
    fn an_extent_leaves_only_after_a_commit_begun_after_its_last_write() {
        let mut hot = HotExtents::default();
        let range = ByteRange::new(0, 512);
        hot.pin(range, 0, Instant(0));
        hot.next_record();
        hot.recorded();
        hot.cool(5, Instant(100_000));
        assert_eq!(hot.len(), 1, "a write is under way");
        hot.unpin(range, 3, Instant(0));
        hot.cool(3, Instant(100_000));
        assert_eq!(hot.len(), 1, "commit 3 began before the write ended");
        hot.cool(4, Instant(100_000));
        assert_eq!(hot.len(), 0);
        assert_eq!(hot.next_record(), Some(vec![]));
    }

    #[test]
    fn a_full_table_evicts_the_least_recently_used_that_may_leave() {
        let mut hot = HotExtents::default();
        for index in 0..HOT_EXTENTS_MAX as u64 {
            let range = ByteRange::new(index * MIB, 512);
            assert_ne!(hot.pin(range, 0, Instant(index)), Pin::Full);
            hot.unpin(range, 0, Instant(index));
        }
        let next = ByteRange::new(5_000 * MIB, 512);
        hot.next_record();
        hot.recorded();
        assert_eq!(hot.pin(next, 0, Instant(9_999)), Pin::Full);
        assert_eq!(hot.pin(next, 1, Instant(9_999)), Pin::NotRecorded);
        assert!(!hot.table.contains_key(&0) && hot.table.contains_key(&999));
    }
}
