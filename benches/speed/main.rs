//! Wall time of the core's main jobs, with criterion: map scan, merge, snapshot write path, NBD.
//!
//! Devices are in memory, so that the figures are ours and not a disk's. Shared machines swing
//! twofold: compare figures of one run only. What is gated in CI are ratios to other tools
//! (`benches/peers`) and instruction counts (`benches/instructions.py`).

mod bitmap;
mod merge;
mod nbd;
mod snapshot;

use criterion::{criterion_group, criterion_main};
use dualrestore::units::{BlockSize, Geometry};

/// The volume of every benchmark but the bitmap's.
const VOLUME_BYTES: u64 = 32 << 20;
const BLOCK: u64 = 4096;

fn geometry() -> Geometry {
    Geometry::new(VOLUME_BYTES, BlockSize::DEFAULT).expect("a valid size")
}

/// A directory in memory, where the machine has one.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a directory for temporary files")
}

/// Numbers below `end` that look random and repeat from run to run.
fn scattered(end: u64) -> impl Iterator<Item = u64> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) % end
    })
}

/// Bytes that do not compress and repeat from run to run.
fn noise(bytes: u64) -> Vec<u8> {
    let mut numbers = scattered(256);
    (0..bytes).map(|_| numbers.next().expect("endless") as u8).collect()
}

criterion_group!(benches, bitmap::scan, bitmap::change, merge::merge, snapshot::write, nbd::serve);
criterion_main!(benches);
