//! Bitmaps, the merge's filter over an overwrite map, the commit of map pages.

use std::sync::Arc;

use dualrestore::bitmap::Bitmap;
use dualrestore::device::RamDevice;
use dualrestore::extent::BlockRange;
use dualrestore::map::{MapIdentity, OverwriteMap};
use dualrestore::units::{BlockSize, Geometry};
use uuid::Uuid;

use crate::measured;

const BITS: u64 = 1 << 20;
const ALL: BlockRange = BlockRange::new(0, BITS);

/// One bit of `period` is set.
fn every(period: u64) -> Bitmap {
    let map = Bitmap::new(BITS, false);
    for at in (0..BITS).step_by(usize::try_from(period).expect("small")) {
        map.fill(BlockRange::one(at), true);
    }
    map
}

fn sum_of_runs(map: &Bitmap) -> u64 {
    map.runs(ALL, true).map(BlockRange::count).sum()
}

pub fn runs_sparse() -> u64 {
    let map = every(4096);
    measured(&|| sum_of_runs(&map))
}

pub fn runs_alternating() -> u64 {
    let map = every(2);
    measured(&|| sum_of_runs(&map))
}

pub fn count() -> u64 {
    let map = every(3);
    measured(&|| (1..64).map(|at| map.count_set(BlockRange::new(at, 30_000))).sum())
}

pub fn fill() -> u64 {
    let map = every(4096);
    let range = |at: u64| BlockRange::new(at * 300 + 7, at * 300 + 263);
    measured(&|| (0..1000).map(|at| map.fill(range(at), true)).sum())
}

fn overwrite_map() -> OverwriteMap {
    let size = BITS * BlockSize::DEFAULT.bytes();
    let geometry = Geometry::new(size, BlockSize::DEFAULT).expect("a valid size");
    let device = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
    let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
    OverwriteMap::create(device, identity).expect("memory does not fail")
}

/// What the merge asks for each chunk of 1 MiB: which blocks are missing and may be supplied.
/// Half of the blocks are current in runs of 32, and some of the rest is link-only.
pub fn merge_filter() -> u64 {
    const CHUNK: u64 = 256;
    let map = overwrite_map();
    for start in (0..BITS).step_by(64) {
        map.mark_current(BlockRange::new(start, start + 32));
    }
    map.demote(BlockRange::new(96, 224));
    let wanted = |chunk: u64| map.wanted(BlockRange::new(chunk * CHUNK, (chunk + 1) * CHUNK));
    measured(&|| (0..BITS / CHUNK).flat_map(wanted).map(BlockRange::count).sum())
}

/// Every page of two planes changed: copied, encoded, written, flushed.
pub fn page_commit() -> u64 {
    let map = overwrite_map();
    map.demote(ALL);
    map.mark_current(BlockRange::new(5, BITS));
    measured(&|| {
        let mut pages = 0;
        while map.file().has_uncommitted() {
            let capture = map.file().capture(1);
            map.file().commit(&capture).expect("memory does not fail");
            pages += 1;
        }
        pages
    })
}
