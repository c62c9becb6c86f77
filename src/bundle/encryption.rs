//! Sealing on the way into a bundle: a fresh salt for every segment, a batch at a time, on several
//! threads.
//!
//! Guarantees: no two segments, also of one number, are sealed with the same keys, so that a
//! segment that is written again after it did not close repeats no nonce.
//! Does not know: age, how the key came here.

use std::num::NonZeroUsize;
use std::thread;

use ring::rand::{SecureRandom, SystemRandom};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bundle::{BundleKey, Checks, Descriptor, KEY_BYTES, Place, Salt, padded};

/// Less than this is sealed before another thread has begun.
const THREAD_BYTES_MIN: usize = 2 << 20;

/// What an encrypted bundle is made with.
#[derive(Clone, Debug)]
pub struct Encryption {
    pub key: BundleKey,
    /// `key.age`: the key's text, wrapped for whoever may open the bundle.
    pub wrapped_key: Vec<u8>,
    /// Where the salt of a segment comes from. Only tests name another than `random_salt`.
    pub salts: fn() -> Result<Salt>,
}

/// A salt that was never there before.
pub fn random_salt() -> Result<Salt> {
    let mut bytes = [0; 32];
    fill(&mut bytes)?;
    Ok(bytes)
}

/// A new key for that bundle.
pub fn generate_key(bundle: Uuid) -> Result<BundleKey> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    fill(bytes.as_mut())?;
    Ok(BundleKey::new(bundle, *bytes))
}

fn fill(bytes: &mut [u8]) -> Result<()> {
    SystemRandom::new()
        .fill(bytes)
        .map_err(|_| Error::new(ErrorKind::Device, "the system gave no random bytes"))
}

/// Threads that seal a batch: the caller's, and others where there are processors for them.
fn threads_for(payload: usize) -> usize {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    processors.min(payload / THREAD_BYTES_MIN).max(1)
}

/// Seals all chunks of a batch whose places in `payload` are given.
pub fn seal_batch(checks: &Checks, batch: u32, descriptors: &mut [Descriptor], payload: &mut [u8]) {
    if !checks.is_encrypted() {
        return;
    }
    let share = payload.len().div_ceil(threads_for(payload.len()));
    thread::scope(|scope| {
        let (mut descriptors, mut payload) = (descriptors, payload);
        let mut first = 0;
        while !descriptors.is_empty() {
            let (count, bytes) = part_of(descriptors, share);
            let (these, later) = descriptors.split_at_mut(count);
            let (stored, rest) = payload.split_at_mut(bytes);
            let mut work =
                move || seal_part(checks, Place { batch, descriptor: first }, these, stored);
            first += u32::try_from(count).expect("a batch has few descriptors");
            (descriptors, payload) = (later, rest);
            if descriptors.is_empty() {
                work();
            } else {
                scope.spawn(work);
            }
        }
    });
}

/// How many descriptors have `share` bytes of payload, and how many they have.
fn part_of(descriptors: &[Descriptor], share: usize) -> (usize, usize) {
    let (mut count, mut bytes) = (0, 0);
    for descriptor in descriptors {
        count += 1;
        bytes += padded(descriptor.stored_bytes.into()) as usize;
        if bytes >= share && bytes > 0 {
            break;
        }
    }
    (count, bytes)
}

fn seal_part(checks: &Checks, first: Place, descriptors: &mut [Descriptor], mut stored: &mut [u8]) {
    for (number, descriptor) in (first.descriptor..).zip(descriptors) {
        if !descriptor.kind.is_stored() {
            continue;
        }
        let length = padded(descriptor.stored_bytes.into()) as usize;
        let (these, rest) = stored.split_at_mut(length);
        let place = Place { descriptor: number, ..first };
        checks.seal(place, descriptor, &mut these[..descriptor.stored_bytes as usize]);
        stored = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ByteRange;
    use crate::format::bundle::ChunkKind;

    #[test]
    fn a_batch_sealed_on_several_threads_opens_chunk_by_chunk() {
        let key = generate_key(Uuid::from_u128(1)).expect("random");
        let checks = Checks::encrypted([0; 32], &key, &random_salt().expect("random"), 0);
        let (mut descriptors, mut at) = (Vec::new(), 0);
        for number in 0..100 {
            let stored_bytes = if number % 7 == 3 { 0 } else { 90_000 + number };
            let kind = if stored_bytes == 0 { ChunkKind::Zero } else { ChunkKind::Zstd };
            let range = ByteRange::new(u64::from(number) << 20, 1 << 20);
            let hash = if stored_bytes == 0 { [0; 32] } else { [number as u8; 32] };
            let payload_offset = if stored_bytes == 0 { 0 } else { at };
            descriptors.push(Descriptor {
                range,
                kind,
                stored_bytes,
                crc32c: 0,
                hash,
                payload_offset,
            });
            at += padded(stored_bytes.into()) as u32;
        }
        let plain: Vec<u8> = (0..at).map(|at| (at / 4096 * 31) as u8).collect();
        let mut payload = plain.clone();
        seal_batch(&checks, 5, &mut descriptors, &mut payload);
        for (number, descriptor) in (0..).zip(&descriptors) {
            if !descriptor.kind.is_stored() {
                assert_eq!((descriptor.hash, descriptor.crc32c), ([0; 32], 0));
                continue;
            }
            let at = descriptor.payload_offset as usize;
            let run = at..at + descriptor.stored_bytes as usize;
            let mut bytes = payload[run.clone()].to_vec();
            assert!(bytes != plain[run.clone()]);
            let place = Place { batch: 5, descriptor: number };
            checks.open(place, descriptor, &mut bytes).expect("whole");
            assert!(bytes == plain[run]);
        }
    }

    #[test]
    fn parts_share_the_payload_evenly_and_end_with_the_batch() {
        let chunk = |stored_bytes| Descriptor {
            range: ByteRange::new(0, 4096),
            kind: ChunkKind::Data,
            stored_bytes,
            crc32c: 0,
            hash: [0; 32],
            payload_offset: 0,
        };
        let descriptors = [4096, 0, 4097, 1, 8192].map(chunk);
        assert_eq!(part_of(&descriptors, 8192), (3, 12_288));
        assert_eq!(part_of(&descriptors[3..], 1 << 20), (2, 12_288));
        assert_eq!(part_of(&[chunk(0), chunk(0)], 0), (2, 0));
    }
}
