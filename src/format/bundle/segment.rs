//! Header, index and trailer of a segment file.
//!
//! Guarantees: parsing accepts exactly what encoding writes; a wrong magic, version, feature bit
//! or reserved byte is a format error, a wrong checksum an integrity error.
//! Does not know: files.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Hash;
use super::checks::Checks;
use super::key::{BundleKey, Salt, locked};
use super::page::{CHECK_AT_END, PAGE_BYTES, Page, check, expect_zero, seal};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::{
    BUNDLE_BATCH_PAGES_MAX, BUNDLE_SEGMENT_BYTES_MAX, BUNDLE_SEGMENTS_MAX, VOLUME_BYTES_MAX,
};
use crate::units::{BlockSize, Geometry};

const HEADER_MAGIC: [u8; 8] = *b"\x89DRS\r\n\x1a\n";
const TRAILER_MAGIC: [u8; 8] = *b"DRStrail";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
/// Features that a reader must know, as bits of the header.
const ENCRYPTED: u64 = 1;
const FEATURES: u64 = ENCRYPTED;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeaderFields {
    magic: [u8; 8],
    major: U16,
    minor: U16,
    header_bytes: U32,
    bundle: [u8; 16],
    volume: [u8; 16],
    generation: U64,
    cut: U64,
    base_cut: U64,
    size: U64,
    block_size: U32,
    segment: U32,
    features: U64,
    begin_hash: Hash,
    salt: Salt,
}

/// Whose bytes a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub bundle: Uuid,
    /// Nil: made from a plain image, bound to no volume.
    pub volume: Uuid,
    pub geometry: Geometry,
    pub generation: u64,
    /// Sequence number of the cut within its generation.
    pub cut: u64,
    pub segment: u32,
    /// BLAKE3 of `manifest.begin.json`.
    pub begin_hash: Hash,
    /// Of an encrypted segment: what makes its keys its own.
    pub salt: Option<Salt>,
}

impl SegmentHeader {
    /// The page, and its hash (the context of every other page of the segment).
    #[must_use]
    pub fn encode(&self) -> (Page, Hash) {
        let fields = HeaderFields {
            magic: HEADER_MAGIC,
            major: MAJOR.into(),
            minor: MINOR.into(),
            header_bytes: (PAGE_BYTES as u32).into(),
            bundle: *self.bundle.as_bytes(),
            volume: *self.volume.as_bytes(),
            generation: self.generation.into(),
            cut: self.cut.into(),
            base_cut: 0.into(),
            size: self.geometry.size().into(),
            block_size: self.geometry.block_size().bytes_u32().into(),
            segment: self.segment.into(),
            features: self.salt.map_or(0, |_| ENCRYPTED).into(),
            begin_hash: self.begin_hash,
            salt: self.salt.unwrap_or_default(),
        };
        let mut page = [0; PAGE_BYTES];
        page[..size_of::<HeaderFields>()].copy_from_slice(fields.as_bytes());
        let hash = seal(&mut page, CHECK_AT_END, &Checks::OF_HEADER);
        (page, hash)
    }

    pub fn parse(page: &Page) -> Result<(Self, Hash)> {
        let (fields, rest) = HeaderFields::ref_from_prefix(page.as_slice())
            .map_err(|_| Error::format("a header page is too short"))?;
        // First of all: checks that match tell another kind of header from a damaged one.
        let hash = check(page, CHECK_AT_END, &Checks::OF_HEADER, "segment header")?;
        if fields.magic != HEADER_MAGIC {
            return Err(Error::format(
                "expected a segment of a dualrestore bundle, found another kind of file: copy it \
                 from the medium again",
            ));
        }
        if (fields.major.get(), fields.minor.get()) != (MAJOR, MINOR) {
            return Err(Error::format(format!(
                "expected a segment of version {MAJOR}.{MINOR}, found {}.{}: use the program that \
                 made it, or a newer one",
                fields.major, fields.minor
            )));
        }
        let features = fields.features.get();
        if features & !FEATURES != 0 {
            return Err(Error::format(format!(
                "the segment needs features that this version does not know: {:#x}; use the \
                 program that made it, or a newer one",
                features & !FEATURES
            )));
        }
        expect_zero(&rest[..CHECK_AT_END - size_of::<HeaderFields>()], "segment header")?;
        let salt = (features & ENCRYPTED != 0).then_some(fields.salt);
        if salt.is_none() {
            expect_zero(&fields.salt, "segment header")?;
        }
        if fields.header_bytes.get() as usize != PAGE_BYTES || fields.base_cut != 0 {
            return Err(Error::format("expected a header of 4096 bytes and no base cut"));
        }
        let geometry = BlockSize::new(fields.block_size.get())
            .and_then(|block_size| Geometry::new(fields.size.get(), block_size))
            .ok_or_else(|| {
                Error::format(format!(
                    "the segment states an impossible volume: {} bytes in blocks of {}",
                    fields.size, fields.block_size
                ))
            })?;
        if fields.segment >= BUNDLE_SEGMENTS_MAX {
            return Err(Error::format(format!("segment number {} is too high", fields.segment)));
        }
        let header = Self {
            bundle: Uuid::from_bytes(fields.bundle),
            volume: Uuid::from_bytes(fields.volume),
            geometry,
            generation: fields.generation.get(),
            cut: fields.cut.get(),
            segment: fields.segment.get(),
            begin_hash: fields.begin_hash,
            salt,
        };
        Ok((header, hash))
    }

    /// What the rest of the segment is checked with, the header's hash given.
    pub fn checks(&self, hash: Hash, key: Option<&BundleKey>) -> Result<Checks> {
        match (&self.salt, key) {
            (None, None) => Ok(Checks::plain(hash)),
            (Some(salt), Some(key)) => Ok(Checks::encrypted(hash, key, salt, self.segment)),
            (Some(_), None) => Err(locked(
                "the segment is encrypted, and no key was given: name the identity or passphrase",
            )),
            (None, Some(_)) => Err(locked(
                "expected an encrypted segment, found one that is not: it may have been exchanged",
            )),
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct IndexFields {
    start: U64,
    end: U64,
    position_pages: U32,
    pages: U16,
    reserved: U16,
    descriptors: U32,
    reserved_too: U32,
}

const INDEX_ENTRY_BYTES: usize = size_of::<IndexFields>();

/// One batch of a segment: where it lies and which bytes of the volume it speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// From the first byte described to the last; not every byte between need be described.
    pub span: ByteRange,
    /// Position of its first descriptor page in the file.
    pub position: u64,
    pub pages: u16,
    pub descriptors: u32,
}

/// The entries, padded to whole pages.
#[must_use]
pub fn encode_index(entries: &[IndexEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(index_bytes(entries.len() as u64) as usize);
    for entry in entries {
        let fields = IndexFields {
            start: entry.span.offset.into(),
            end: entry.span.end().into(),
            position_pages: page_number(entry.position).into(),
            pages: entry.pages.into(),
            reserved: 0.into(),
            descriptors: entry.descriptors.into(),
            reserved_too: 0.into(),
        };
        bytes.extend_from_slice(fields.as_bytes());
    }
    bytes.resize(index_bytes(entries.len() as u64) as usize, 0);
    bytes
}

/// Bytes of an index of so many batches.
#[must_use]
pub const fn index_bytes(batches: u64) -> u64 {
    (batches * INDEX_ENTRY_BYTES as u64).next_multiple_of(PAGE_BYTES as u64)
}

fn page_number(position: u64) -> u32 {
    u32::try_from(position / PAGE_BYTES as u64).expect("a segment is at most 1 GiB")
}

/// The entries of an index that its trailer vouches for.
pub fn parse_index(bytes: &[u8], trailer: &Trailer) -> Result<Vec<IndexEntry>> {
    let used = trailer.batches as usize * INDEX_ENTRY_BYTES;
    if bytes.len() as u64 != index_bytes(trailer.batches.into()) {
        return Err(Error::format("the index has another length than its trailer states"));
    }
    if crc32c::crc32c(bytes) != trailer.index_crc32c
        || *blake3::hash(bytes).as_bytes() != trailer.index_hash
    {
        return Err(Error::integrity("the index is damaged: its checksums do not match"));
    }
    expect_zero(&bytes[used..], "index")?;
    let mut entries = Vec::with_capacity(trailer.batches as usize);
    let mut at = PAGE_BYTES as u64;
    for entry in bytes[..used].chunks_exact(INDEX_ENTRY_BYTES) {
        let fields = IndexFields::ref_from_bytes(entry)
            .map_err(|_| Error::format("an index entry is too short"))?;
        let (start, end) = (fields.start.get(), fields.end.get());
        let position = u64::from(fields.position_pages.get()) * PAGE_BYTES as u64;
        let pages_end = position + u64::from(fields.pages.get()) * PAGE_BYTES as u64;
        let sane = start < end
            && end <= VOLUME_BYTES_MAX
            && position >= at
            && (1..=BUNDLE_BATCH_PAGES_MAX).contains(&fields.pages.get())
            && pages_end <= trailer.index_position
            && fields.reserved == 0
            && fields.reserved_too == 0;
        if !sane {
            return Err(Error::format("an index entry lies outside its segment"));
        }
        at = pages_end;
        entries.push(IndexEntry {
            span: ByteRange::new(start, end - start),
            position,
            pages: fields.pages.get(),
            descriptors: fields.descriptors.get(),
        });
    }
    Ok(entries)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct TrailerFields {
    magic: [u8; 8],
    segment: U32,
    batches: U32,
    index_position: U64,
    chunks: U64,
    data_bytes: U64,
    zero_bytes: U64,
    unreadable_bytes: U64,
    stored_bytes: U64,
    index_crc32c: U32,
    reserved: U32,
    index_hash: Hash,
    root: Hash,
}

/// The last page of a closed segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trailer {
    pub segment: u32,
    pub batches: u32,
    pub index_position: u64,
    pub chunks: u64,
    /// Bytes of the volume that are stored, that are zero, that the source could not read.
    pub data_bytes: u64,
    pub zero_bytes: u64,
    pub unreadable_bytes: u64,
    /// Bytes that the stored ones take in the segment, padding not counted.
    pub stored_bytes: u64,
    pub index_crc32c: u32,
    pub index_hash: Hash,
    /// BLAKE3 of the hashes of all descriptor pages in order.
    pub root: Hash,
}

impl Trailer {
    #[must_use]
    pub fn encode(&self, checks: &Checks) -> Page {
        let fields = TrailerFields {
            magic: TRAILER_MAGIC,
            segment: self.segment.into(),
            batches: self.batches.into(),
            index_position: self.index_position.into(),
            chunks: self.chunks.into(),
            data_bytes: self.data_bytes.into(),
            zero_bytes: self.zero_bytes.into(),
            unreadable_bytes: self.unreadable_bytes.into(),
            stored_bytes: self.stored_bytes.into(),
            index_crc32c: self.index_crc32c.into(),
            reserved: 0.into(),
            index_hash: self.index_hash,
            root: self.root,
        };
        let mut page = [0; PAGE_BYTES];
        page[..size_of::<TrailerFields>()].copy_from_slice(fields.as_bytes());
        seal(&mut page, CHECK_AT_END, checks);
        page
    }

    pub fn parse(page: &Page, checks: &Checks) -> Result<Self> {
        let (fields, rest) = TrailerFields::ref_from_prefix(page.as_slice())
            .map_err(|_| Error::format("a trailer page is too short"))?;
        if fields.magic != TRAILER_MAGIC {
            return Err(Error::format("the segment has no trailer: it was not closed"));
        }
        check(page, CHECK_AT_END, checks, "trailer")?;
        expect_zero(&rest[..CHECK_AT_END - size_of::<TrailerFields>()], "trailer")?;
        let index_position = fields.index_position.get();
        let sane = fields.reserved == 0
            && index_position.is_multiple_of(PAGE_BYTES as u64)
            && index_position <= BUNDLE_SEGMENT_BYTES_MAX
            && u64::from(fields.batches.get()) * (PAGE_BYTES as u64) < index_position;
        if !sane {
            return Err(Error::format("the trailer states what no segment can hold"));
        }
        Ok(Self {
            segment: fields.segment.get(),
            batches: fields.batches.get(),
            index_position,
            chunks: fields.chunks.get(),
            data_bytes: fields.data_bytes.get(),
            zero_bytes: fields.zero_bytes.get(),
            unreadable_bytes: fields.unreadable_bytes.get(),
            stored_bytes: fields.stored_bytes.get(),
            index_crc32c: fields.index_crc32c.get(),
            index_hash: fields.index_hash,
            root: fields.root,
        })
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.index_position + index_bytes(self.batches.into()) + PAGE_BYTES as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn header() -> SegmentHeader {
        SegmentHeader {
            bundle: Uuid::from_u128(1),
            volume: Uuid::from_u128(2),
            geometry: Geometry::new(12_800, BlockSize::DEFAULT).expect("valid"),
            generation: 3,
            cut: 4,
            segment: 5,
            begin_hash: [6; 32],
            salt: None,
        }
    }

    #[test]
    fn header_index_and_trailer_read_back() {
        let encrypted = SegmentHeader { salt: Some([7; 32]), ..header() };
        let (page, hash) = encrypted.encode();
        assert_eq!(SegmentHeader::parse(&page).expect("whole"), (encrypted, hash));
        let (page, hash) = header().encode();
        assert_eq!(SegmentHeader::parse(&page).expect("whole"), (header(), hash));
        let checks = Checks::plain(hash);
        let entries: Vec<IndexEntry> = (0..130)
            .map(|n| IndexEntry {
                span: ByteRange::new(n * 4096, 4096),
                position: (1 + n) * 4096,
                pages: 1,
                descriptors: 1,
            })
            .collect();
        let index = encode_index(&entries);
        let trailer = Trailer {
            segment: 5,
            batches: 130,
            index_position: 131 * 4096,
            index_crc32c: crc32c::crc32c(&index),
            index_hash: *blake3::hash(&index).as_bytes(),
            ..Trailer::default()
        };
        let read = Trailer::parse(&trailer.encode(&checks), &checks).expect("whole");
        assert_eq!(read, trailer);
        assert_eq!(parse_index(&index, &read).expect("whole"), entries);
        assert_eq!(trailer.file_bytes(), 131 * 4096 + 8192 + 4096);
    }

    #[test]
    fn every_flipped_bit_of_header_and_trailer_is_refused() {
        let (mut page, hash) = header().encode();
        let checks = Checks::plain(hash);
        for bit in 0..PAGE_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            let kind = SegmentHeader::parse(&page).expect_err("flipped").kind();
            assert!(matches!(kind, ErrorKind::Format | ErrorKind::Integrity), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        let mut page = Trailer { index_position: 4096, ..Trailer::default() }.encode(&checks);
        for bit in 0..PAGE_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(Trailer::parse(&page, &checks).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_salt_without_its_feature_and_a_key_without_a_salt_are_refused() {
        let (mut page, hash) = SegmentHeader { salt: Some([7; 32]), ..header() }.encode();
        page[88] = 0;
        seal(&mut page, CHECK_AT_END, &Checks::OF_HEADER);
        assert_eq!(SegmentHeader::parse(&page).expect_err("left over").kind(), ErrorKind::Format);
        let key = BundleKey::new(Uuid::from_u128(1), [1; 32]);
        let salted = SegmentHeader { salt: Some([7; 32]), ..header() };
        for (header, key) in [(header(), Some(&key)), (salted, None)] {
            let error = header.checks(hash, key).expect_err("they do not fit");
            assert_eq!(error.kind(), ErrorKind::Locked);
        }
        assert!(salted.checks(hash, Some(&key)).expect("they fit").is_encrypted());
        assert!(!header().checks(hash, None).expect("they fit").is_encrypted());
    }

    #[test]
    fn unknown_versions_and_features_are_refused_even_with_good_checksums() {
        for (at, what) in [(8, "version"), (10, "version"), (88, "features")] {
            let (mut page, _) = header().encode();
            page[at] ^= 0x40;
            seal(&mut page, CHECK_AT_END, &Checks::OF_HEADER);
            let error = SegmentHeader::parse(&page).expect_err("unknown");
            assert_eq!(error.kind(), ErrorKind::Format);
            assert!(error.to_string().contains(what), "{error}");
        }
    }
}
