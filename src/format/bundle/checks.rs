//! What the pages and chunks of one segment are checked with: hashes over the segment's header in a
//! plain bundle, keys derived for this segment alone in an encrypted one.
//!
//! | | plain | encrypted |
//! |---|---|---|
//! | page | BLAKE3 of header hash, page | HMAC-SHA256 of the same |
//! | stored bytes | as they are | AES-256-GCM, nonce from the chunk's place |
//! | descriptor's hash | BLAKE3 of the chunk | tag, keyed BLAKE3 of (that BLAKE3, range) |
//!
//! The tag covers descriptor and header as well.
//!
//! Guarantees: a chunk opens only in its place in its segment of its bundle; a nonce repeats only
//! if a segment is sealed twice with one salt, which callers never do.
//! Does not know: files, compression.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use zeroize::Zeroizing;

use super::Hash;
use super::batch::Descriptor;
use super::key::{BundleKey, Salt};
use crate::error::{Error, Result};

const TAG_BYTES: usize = 16;
const ASSOCIATED_BYTES: usize = 64 + 32;

/// See the module.
pub struct Checks {
    /// `None` for the header page itself.
    header_hash: Option<Hash>,
    keys: Option<Keys>,
}

struct Keys {
    chunk: LessSafeKey,
    page: hmac::Key,
    mark: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.keys.is_some() { "Checks(encrypted)" } else { "Checks(plain)" })
    }
}

/// Where a chunk stands in its segment: number of its batch, of its descriptor in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub batch: u32,
    pub descriptor: u32,
}

impl Place {
    fn nonce(self) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&self.batch.to_le_bytes());
        nonce[4..8].copy_from_slice(&self.descriptor.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

impl Checks {
    /// Of a header page, which has nothing before it.
    pub(super) const OF_HEADER: Self = Self { header_hash: None, keys: None };

    /// Of a segment that is not encrypted.
    #[must_use]
    pub fn plain(header_hash: Hash) -> Self {
        Self { header_hash: Some(header_hash), keys: None }
    }

    /// Of an encrypted segment.
    #[must_use]
    pub fn encrypted(header_hash: Hash, key: &BundleKey, salt: &Salt, segment: u32) -> Self {
        let keys = key.segment_keys(salt, segment);
        let chunk = UnboundKey::new(&AES_256_GCM, &keys[..32]).expect("a key of 32 bytes");
        let mut mark = Zeroizing::new([0; 32]);
        mark.copy_from_slice(&keys[64..]);
        let keys = Keys {
            chunk: LessSafeKey::new(chunk),
            page: hmac::Key::new(hmac::HMAC_SHA256, &keys[32..64]),
            mark,
        };
        Self { header_hash: Some(header_hash), keys: Some(keys) }
    }

    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.keys.is_some()
    }

    /// The hash of a page, given in the two parts around its checks.
    pub(super) fn of_page(&self, before: &[u8], after: &[u8]) -> Hash {
        let context = self.header_hash.as_ref().map_or(&[][..], |hash| hash);
        if let Some(keys) = &self.keys {
            let mut signer = hmac::Context::with_key(&keys.page);
            signer.update(context);
            signer.update(before);
            signer.update(after);
            let mut hash = [0; 32];
            hash.copy_from_slice(signer.sign().as_ref());
            hash
        } else {
            let mut hasher = blake3::Hasher::new();
            hasher.update(context).update(before).update(after);
            *hasher.finalize().as_bytes()
        }
    }

    /// Encrypts the stored bytes of a chunk in their place. The descriptor, complete but for its
    /// CRC32C, has the BLAKE3 of the chunk's own bytes; it leaves with what a reader compares.
    pub fn seal(&self, place: Place, descriptor: &mut Descriptor, stored: &mut [u8]) {
        if let Some(keys) = &self.keys {
            let mark = keys.mark_of(descriptor, &descriptor.hash);
            descriptor.hash = [0; 32];
            descriptor.hash[TAG_BYTES..].copy_from_slice(&mark);
            let associated = Aad::from(self.associated(descriptor));
            let tag = keys
                .chunk
                .seal_in_place_separate_tag(place.nonce(), associated, stored)
                .expect("a chunk is far shorter than AES-GCM allows");
            descriptor.hash[..TAG_BYTES].copy_from_slice(tag.as_ref());
            descriptor.crc32c = crc32c::crc32c(stored);
        }
    }

    /// Decrypts the stored bytes of a chunk in their place. After an error they are of no use.
    pub fn open(&self, place: Place, descriptor: &Descriptor, stored: &mut [u8]) -> Result<()> {
        let Some(keys) = &self.keys else { return Ok(()) };
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&descriptor.hash[..TAG_BYTES]);
        let associated = Aad::from(self.associated(descriptor));
        keys.chunk
            .open_in_place_separate_tag(place.nonce(), associated, tag.into(), stored, 0..)
            .map(|_| ())
            .map_err(|_| {
                Error::integrity(
                    "a chunk is damaged, or was not written here: its tag does not match",
                )
                .at_offset(descriptor.range.offset)
            })
    }

    /// Whether the chunk's own bytes are those that the descriptor vouches for.
    #[must_use]
    pub fn vouches(&self, descriptor: &Descriptor, bytes: &[u8]) -> bool {
        let hash = *blake3::hash(bytes).as_bytes();
        match &self.keys {
            Some(keys) => descriptor.hash[TAG_BYTES..] == keys.mark_of(descriptor, &hash),
            None => descriptor.hash == hash,
        }
    }

    /// The descriptor without tag and CRC32C, and the segment's header: so a chunk is bound to its
    /// range, volume, generation, cut, bundle and segment.
    fn associated(&self, descriptor: &Descriptor) -> [u8; ASSOCIATED_BYTES] {
        let mut bound = *descriptor;
        bound.crc32c = 0;
        bound.hash[..TAG_BYTES].fill(0);
        let mut bytes = [0; ASSOCIATED_BYTES];
        bytes[..64].copy_from_slice(&bound.encode());
        bytes[64..].copy_from_slice(&self.header_hash.expect("a chunk has a segment"));
        bytes
    }
}

impl Keys {
    fn mark_of(&self, descriptor: &Descriptor, hash: &Hash) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.mark);
        hasher.update(hash);
        hasher.update(&descriptor.range.offset.to_le_bytes());
        hasher.update(&descriptor.range.length.to_le_bytes());
        let mut mark = [0; 16];
        mark.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ByteRange;
    use crate::format::bundle::ChunkKind;
    use uuid::Uuid;

    const PLACE: Place = Place { batch: 3, descriptor: 4 };

    fn key(number: u8) -> BundleKey {
        BundleKey::new(Uuid::from_u128(7), [number; 32])
    }

    fn checks() -> Checks {
        Checks::encrypted([1; 32], &key(2), &[3; 32], 4)
    }

    fn sealed() -> (Descriptor, Vec<u8>) {
        let mut bytes = b"sealed bytes ".repeat(100);
        let mut descriptor = Descriptor {
            range: ByteRange::new(8192, 4096),
            kind: ChunkKind::Zstd,
            stored_bytes: 1300,
            crc32c: 0,
            hash: *blake3::hash(b"the chunk").as_bytes(),
            payload_offset: 4096,
        };
        checks().seal(PLACE, &mut descriptor, &mut bytes);
        (descriptor, bytes)
    }

    #[test]
    fn a_sealed_chunk_opens_in_its_place_and_vouches_for_its_bytes() {
        let (descriptor, mut bytes) = sealed();
        assert_ne!(bytes, b"sealed bytes ".repeat(100));
        assert_eq!(descriptor.crc32c, crc32c::crc32c(&bytes));
        assert!(checks().vouches(&descriptor, b"the chunk"));
        assert!(!checks().vouches(&descriptor, b"the chunks"));
        checks().open(PLACE, &descriptor, &mut bytes).expect("in its place");
        assert_eq!(bytes, b"sealed bytes ".repeat(100));
    }

    #[test]
    fn a_chunk_in_another_place_or_segment_or_with_another_descriptor_does_not_open() {
        let (descriptor, bytes) = sealed();
        let others = [
            (Checks::encrypted([9; 32], &key(2), &[3; 32], 4), PLACE, descriptor),
            (Checks::encrypted([1; 32], &key(9), &[3; 32], 4), PLACE, descriptor),
            (Checks::encrypted([1; 32], &key(2), &[9; 32], 4), PLACE, descriptor),
            (Checks::encrypted([1; 32], &key(2), &[3; 32], 9), PLACE, descriptor),
            (checks(), Place { batch: 9, ..PLACE }, descriptor),
            (checks(), Place { descriptor: 9, ..PLACE }, descriptor),
            (checks(), PLACE, Descriptor { range: ByteRange::new(4096, 4096), ..descriptor }),
            (checks(), PLACE, Descriptor { range: ByteRange::new(8192, 8192), ..descriptor }),
            (checks(), PLACE, Descriptor { kind: ChunkKind::Data, ..descriptor }),
            (checks(), PLACE, Descriptor { payload_offset: 0, ..descriptor }),
        ];
        for (number, (checks, place, descriptor)) in others.into_iter().enumerate() {
            let mut bytes = bytes.clone();
            assert!(checks.open(place, &descriptor, &mut bytes).is_err(), "{number}");
        }
        for at in 0..32 {
            let mut changed = descriptor;
            changed.hash[at] ^= 1;
            assert!(checks().open(PLACE, &changed, &mut bytes.clone()).is_err(), "{at}");
        }
        for at in (0..bytes.len()).step_by(7) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            assert!(checks().open(PLACE, &descriptor, &mut bytes).is_err(), "{at}");
        }
    }

    #[test]
    fn equal_bytes_look_different_wherever_they_are() {
        let (mut seen, plain) = (std::collections::HashSet::new(), vec![7; 4096]);
        for place in [PLACE, Place { batch: 5, ..PLACE }, Place { descriptor: 5, ..PLACE }] {
            let mut bytes = plain.clone();
            let range = ByteRange::new(u64::from(place.batch * 8 + place.descriptor) * 4096, 4096);
            let hash = *blake3::hash(&plain).as_bytes();
            let mut descriptor = Descriptor {
                range,
                kind: ChunkKind::Data,
                stored_bytes: 4096,
                crc32c: 0,
                hash,
                payload_offset: 0,
            };
            checks().seal(place, &mut descriptor, &mut bytes);
            assert!(seen.insert(bytes) && seen.insert(descriptor.hash.to_vec()));
        }
    }
}
