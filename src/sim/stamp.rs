//! Sectors as numbers: each sector is one number, repeated.
//!
//! Guarantees: a sector that mixes two numbers is found out. Does not know: what numbers mean.

use std::collections::BTreeMap;

use super::oracle::Value;
use crate::extent::ByteRange;

pub const SECTOR: u64 = 512;
/// What a lost device holds.
pub const GARBAGE: Value = 0xdead_beef_dead_beef;

#[must_use]
pub fn sectors(range: ByteRange) -> std::ops::Range<u64> {
    range.offset / SECTOR..range.end() / SECTOR
}

pub fn fill(buffer: &mut [u8], value: Value) {
    for word in buffer.chunks_exact_mut(8) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Contents of consecutive sectors with these values.
#[must_use]
pub fn bytes(values: impl IntoIterator<Item = Value>) -> Vec<u8> {
    values.into_iter().flat_map(|value| value.to_le_bytes().repeat(SECTOR as usize / 8)).collect()
}

#[must_use]
pub fn value(sector: &[u8]) -> Value {
    let first = &sector[..8];
    assert!(sector.len() == SECTOR as usize, "one sector at a time");
    assert!(sector.chunks_exact(8).all(|word| word == first), "a sector mixes two writes");
    u64::from_le_bytes(first.try_into().expect("eight bytes"))
}

/// The values of the sectors of a range, from a buffer that holds it.
#[must_use]
pub fn values(range: ByteRange, buffer: &[u8]) -> BTreeMap<u64, Value> {
    assert_eq!(buffer.len() as u64, range.length, "the answer has the length asked for");
    let found = buffer.chunks_exact(SECTOR as usize).map(value);
    sectors(range).zip(found).collect()
}
