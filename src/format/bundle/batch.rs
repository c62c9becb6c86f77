//! Descriptor pages: what the chunks of a batch are, ahead of their payloads.
//!
//! Guarantees: parsing accepts exactly what encoding writes: ascending disjoint chunks inside the
//! volume, payloads packed in order without gaps or overlaps, lengths within the limits. So a
//! descriptor that parsed may be trusted for allocation and arithmetic, though not for its bytes.
//! Does not know: files, payloads.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Hash;
use super::checks::Checks;
use super::page::{PAGE_BYTES, Page, check, expect_zero, padded, seal};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::{BUNDLE_BATCH_BYTES_MAX, BUNDLE_BATCH_PAGES_MAX, BUNDLE_CHUNK_BYTES_MAX};
use crate::units::Geometry;

const MAGIC: [u8; 4] = *b"DRBT";
/// Where a descriptor page has its checks.
const CHECK_AT: usize = 28;
const PAGE_HEAD_BYTES: usize = 64;
/// Descriptors in one page.
pub const DESCRIPTORS_PER_PAGE: usize =
    (PAGE_BYTES - PAGE_HEAD_BYTES) / size_of::<DescriptorFields>();

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeadFields {
    magic: [u8; 4],
    segment: U32,
    batch: U32,
    page: U16,
    pages: U16,
    descriptors: U32,
    payload_pages: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct DescriptorFields {
    offset: U64,
    length: U64,
    kind: u8,
    reserved: [u8; 3],
    stored_bytes: U32,
    payload_page: U32,
    crc32c: U32,
    hash: Hash,
}

const _: () = assert!(size_of::<HeadFields>() == CHECK_AT && size_of::<DescriptorFields>() == 64);

/// How a chunk's bytes are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkKind {
    /// As they are.
    Data,
    /// As one zstd frame.
    Zstd,
    /// All zero; nothing is stored.
    Zero,
    /// The source could not be read there; nothing is known of them.
    Unreadable,
}

impl ChunkKind {
    fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Zstd => 2,
            Self::Zero => 3,
            Self::Unreadable => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Data, Self::Zstd, Self::Zero, Self::Unreadable]
            .into_iter()
            .find(|kind| kind.code() == code)
    }

    #[must_use]
    pub fn is_stored(self) -> bool {
        matches!(self, Self::Data | Self::Zstd)
    }
}

/// One chunk of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes of the volume.
    pub range: ByteRange,
    pub kind: ChunkKind,
    /// Length and checksum of the stored form; both 0 if nothing is stored.
    pub stored_bytes: u32,
    pub crc32c: u32,
    /// BLAKE3 of the chunk's own bytes, or what `Checks` makes of it; zeros if nothing is stored.
    pub hash: Hash,
    /// Where the stored form begins, counted from the start of the batch's payload.
    pub payload_offset: u32,
}

/// All descriptor pages of a batch, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub batch: u32,
    pub pages: u16,
    pub payload_bytes: u32,
    pub descriptors: Vec<Descriptor>,
}

/// What each descriptor page says of its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHead {
    pub segment: u32,
    pub batch: u32,
    pub page: u16,
    pub pages: u16,
    pub descriptors: u32,
    pub payload_bytes: u32,
}

/// Pages that so many descriptors take.
#[must_use]
pub fn pages_for(descriptors: usize) -> u16 {
    u16::try_from(descriptors.div_ceil(DESCRIPTORS_PER_PAGE)).expect("within the batch limit")
}

/// Writes the descriptor pages into `out` (whole pages, as many as `pages_for` says) and adds
/// their hashes to `root`.
pub fn encode_batch(
    (segment, batch): (u32, u32),
    descriptors: &[Descriptor],
    checks: &Checks,
    out: &mut [u8],
    root: &mut blake3::Hasher,
) {
    let pages = pages_for(descriptors.len());
    let payload: u64 = descriptors.iter().map(|one| padded(one.stored_bytes.into())).sum();
    assert!((1..=BUNDLE_BATCH_PAGES_MAX).contains(&pages), "{pages} pages in a batch");
    assert!(payload <= BUNDLE_BATCH_BYTES_MAX.into(), "{payload} bytes in a batch");
    let (places, rest) = out.as_chunks_mut::<PAGE_BYTES>();
    assert!(places.len() == usize::from(pages) && rest.is_empty(), "room for the pages");
    let parts = descriptors.chunks(DESCRIPTORS_PER_PAGE);
    for ((number, place), part) in (0u16..).zip(places).zip(parts) {
        place.fill(0);
        let head = HeadFields {
            magic: MAGIC,
            segment: segment.into(),
            batch: batch.into(),
            page: number.into(),
            pages: pages.into(),
            descriptors: (descriptors.len() as u32).into(),
            payload_pages: ((payload / PAGE_BYTES as u64) as u32).into(),
            reserved: 0.into(),
        };
        place[..CHECK_AT].copy_from_slice(head.as_bytes());
        for (slot, descriptor) in place[PAGE_HEAD_BYTES..].chunks_exact_mut(64).zip(part) {
            slot.copy_from_slice(&descriptor.encode());
        }
        root.update(&seal(place, CHECK_AT, checks));
    }
}

impl Descriptor {
    /// As it stands in a descriptor page.
    pub(super) fn encode(&self) -> [u8; 64] {
        let fields = DescriptorFields {
            offset: self.range.offset.into(),
            length: self.range.length.into(),
            kind: self.kind.code(),
            reserved: [0; 3],
            stored_bytes: self.stored_bytes.into(),
            payload_page: (self.payload_offset / PAGE_BYTES as u32).into(),
            crc32c: self.crc32c.into(),
            hash: self.hash,
        };
        let mut bytes = [0; 64];
        bytes.copy_from_slice(fields.as_bytes());
        bytes
    }
}

/// Checks one page and reads its head.
pub fn parse_page_head(page: &Page, checks: &Checks) -> Result<PageHead> {
    Ok(checked_head(page, checks)?.0)
}

fn checked_head(page: &Page, checks: &Checks) -> Result<(PageHead, Hash)> {
    let fields = HeadFields::ref_from_bytes(&page[..CHECK_AT])
        .map_err(|_| Error::format("a descriptor page is too short"))?;
    if fields.magic != MAGIC {
        return Err(Error::format("expected a descriptor page, found other bytes"));
    }
    let hash = check(page, CHECK_AT, checks, "descriptor page")?;
    let (pages, descriptors) = (fields.pages.get(), fields.descriptors.get());
    let sane = fields.reserved == 0
        && (1..=BUNDLE_BATCH_PAGES_MAX).contains(&pages)
        && fields.page < pages
        && fields.payload_pages <= BUNDLE_BATCH_BYTES_MAX / PAGE_BYTES as u32
        && (descriptors as usize).div_ceil(DESCRIPTORS_PER_PAGE) == usize::from(pages);
    if !sane {
        return Err(Error::format("a descriptor page states what no batch can hold"));
    }
    let head = PageHead {
        segment: fields.segment.get(),
        batch: fields.batch.get(),
        page: fields.page.get(),
        pages,
        descriptors,
        payload_bytes: fields.payload_pages.get() * PAGE_BYTES as u32,
    };
    Ok((head, hash))
}

/// All descriptor pages of a batch of that segment, the hashes of the pages added to `root`.
pub fn parse_batch(
    bytes: &[u8],
    segment: u32,
    geometry: Geometry,
    checks: &Checks,
    root: &mut blake3::Hasher,
) -> Result<Batch> {
    let (pages, rest) = bytes.as_chunks::<PAGE_BYTES>();
    let first = pages.first().ok_or_else(|| Error::format("a batch has no descriptor page"))?;
    let head = parse_page_head(first, checks)?;
    if head.segment != segment || usize::from(head.pages) != pages.len() || !rest.is_empty() {
        return Err(Error::format("descriptor pages of another segment or batch"));
    }
    let mut descriptors = Vec::with_capacity(head.descriptors as usize);
    for (number, page) in (0u16..).zip(pages) {
        let (this, hash) = checked_head(page, checks)?;
        if this != (PageHead { page: number, ..head }) {
            return Err(Error::format("descriptor pages of one batch disagree"));
        }
        root.update(&hash);
        let here = DESCRIPTORS_PER_PAGE.min(head.descriptors as usize - descriptors.len());
        let (used, unused) = page[PAGE_HEAD_BYTES..].split_at(here * 64);
        for slot in used.chunks_exact(64) {
            descriptors.push(parse_descriptor(slot, geometry)?);
        }
        expect_zero(unused, "descriptor page")?;
    }
    expect_packed(&descriptors, head.payload_bytes)?;
    Ok(Batch {
        batch: head.batch,
        pages: head.pages,
        payload_bytes: head.payload_bytes,
        descriptors,
    })
}

fn parse_descriptor(slot: &[u8], geometry: Geometry) -> Result<Descriptor> {
    let fields = DescriptorFields::ref_from_bytes(slot)
        .map_err(|_| Error::format("a descriptor is too short"))?;
    let (offset, length) = (fields.offset.get(), fields.length.get());
    let stored = u64::from(fields.stored_bytes.get());
    let block = geometry.block_size().bytes();
    let kind = ChunkKind::from_code(fields.kind)
        .ok_or_else(|| Error::format(format!("a chunk is of the unknown kind {}", fields.kind)))?;
    let inside = length > 0
        && geometry.contains(ByteRange::new(offset, length))
        && offset.is_multiple_of(block)
        && (offset + length == geometry.size() || (offset + length).is_multiple_of(block));
    let lengths_agree = match kind {
        ChunkKind::Data => stored == length && length <= BUNDLE_CHUNK_BYTES_MAX,
        ChunkKind::Zstd => stored > 0 && stored < length && length <= BUNDLE_CHUNK_BYTES_MAX,
        ChunkKind::Zero | ChunkKind::Unreadable => {
            stored == 0 && fields.crc32c == 0 && fields.payload_page == 0 && fields.hash == [0; 32]
        }
    };
    let small = fields.payload_page <= BUNDLE_BATCH_BYTES_MAX / PAGE_BYTES as u32;
    if !inside || !lengths_agree || !small || fields.reserved != [0; 3] {
        return Err(Error::format(format!(
            "a descriptor states an impossible chunk: {length} bytes at {offset}, {stored} stored"
        )));
    }
    Ok(Descriptor {
        range: ByteRange::new(offset, length),
        kind,
        stored_bytes: fields.stored_bytes.get(),
        crc32c: fields.crc32c.get(),
        hash: fields.hash,
        payload_offset: fields.payload_page.get() * PAGE_BYTES as u32,
    })
}

/// Chunks ascend without overlap; payloads follow each other from 0 to the end.
fn expect_packed(descriptors: &[Descriptor], payload_bytes: u32) -> Result<()> {
    let (mut at, mut payload_at) = (0, 0);
    for descriptor in descriptors {
        let packed =
            !descriptor.kind.is_stored() || u64::from(descriptor.payload_offset) == payload_at;
        if descriptor.range.offset < at || !packed {
            return Err(Error::format("descriptors of a batch overlap or leave gaps"));
        }
        at = descriptor.range.end();
        payload_at += padded(descriptor.stored_bytes.into());
    }
    if payload_at != u64::from(payload_bytes) {
        return Err(Error::format("descriptors of a batch do not account for its payload"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockSize;
    use proptest::prelude::*;

    fn checks() -> Checks {
        Checks::plain([9; 32])
    }

    fn geometry() -> Geometry {
        Geometry::new((64 << 20) + 512, BlockSize::DEFAULT).expect("valid")
    }

    fn data(offset: u64, length: u64, payload_offset: u32) -> Descriptor {
        Descriptor {
            range: ByteRange::new(offset, length),
            kind: ChunkKind::Data,
            stored_bytes: length as u32,
            crc32c: 1,
            hash: [2; 32],
            payload_offset,
        }
    }

    fn nothing(kind: ChunkKind, offset: u64, length: u64) -> Descriptor {
        let range = ByteRange::new(offset, length);
        Descriptor { range, kind, stored_bytes: 0, crc32c: 0, hash: [0; 32], payload_offset: 0 }
    }

    fn encoded(descriptors: &[Descriptor]) -> Vec<u8> {
        let mut out = vec![0xff; usize::from(pages_for(descriptors.len())) * PAGE_BYTES];
        encode_batch((3, 8), descriptors, &checks(), &mut out, &mut blake3::Hasher::new());
        out
    }

    fn parsed(bytes: &[u8]) -> Result<Batch> {
        parse_batch(bytes, 3, geometry(), &checks(), &mut blake3::Hasher::new())
    }

    #[test]
    fn batches_of_one_and_of_several_pages_read_back() {
        let mixed = vec![
            data(0, 4096, 0),
            nothing(ChunkKind::Zero, 8192, 40 << 20),
            Descriptor { kind: ChunkKind::Zstd, stored_bytes: 77, ..data(50 << 20, 8192, 4096) },
            nothing(ChunkKind::Unreadable, 60 << 20, 4096),
            data(64 << 20, 512, 8192),
        ];
        let read = parsed(&encoded(&mixed)).expect("whole");
        assert_eq!((read.descriptors, read.payload_bytes, read.batch), (mixed, 3 * 4096, 8));
        let many: Vec<_> = (0..200).map(|n| data(n * 8192, 4096, n as u32 * 4096)).collect();
        let read = parsed(&encoded(&many)).expect("whole");
        assert_eq!((read.descriptors, read.pages), (many, 4));
    }

    #[test]
    fn impossible_chunks_are_refused_even_with_good_checksums() {
        let bad = [
            vec![data(512, 4096, 0)],
            vec![data(0, 2048, 0)],
            vec![data(64 << 20, 4096, 0)],
            vec![data(u64::MAX - 4095, 4096, 0)],
            vec![data(0, 2 << 20, 0)],
            vec![data(0, 4096, 4096)],
            vec![data(0, 8192, 0), data(4096, 4096, 8192)],
            vec![data(0, 4096, 0), data(4096, 4096, 0)],
            vec![Descriptor { kind: ChunkKind::Zstd, ..data(0, 4096, 0) }],
            vec![Descriptor { crc32c: 5, ..nothing(ChunkKind::Zero, 0, 4096) }],
            vec![Descriptor { stored_bytes: 100, ..data(0, 4096, 0) }],
        ];
        for descriptors in bad {
            assert!(parsed(&encoded(&descriptors)).is_err(), "{descriptors:?}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_descriptor_page_is_noticed() {
        let mut bytes = encoded(&[data(0, 4096, 0), nothing(ChunkKind::Zero, 8192, 4096)]);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(parsed(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(mut page in prop::collection::vec(any::<u8>(), 4096)) {
            page[..4].copy_from_slice(&MAGIC);
            let place: &mut Page = page.as_mut_slice().try_into().expect("a page");
            seal(place, CHECK_AT, &checks());
            let _refused_or_not = parsed(&page);
            page[4..8].copy_from_slice(&3u32.to_le_bytes());
            page[12..24].copy_from_slice(&[0, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0]);
            page[24..28].fill(0);
            let place: &mut Page = page.as_mut_slice().try_into().expect("a page");
            seal(place, CHECK_AT, &checks());
            prop_assert!(parsed(&page).is_err());
        }
    }
}
