//! The map file and the intent log, byte by byte (drawn in `docs/formats.md`).
//!
//! A map file is two header slots of 4 KiB, then for each plane and page two slots of 4 KiB:
//!
//! ```text
//! 0      header slot 0        4096   header slot 1
//! 8192   plane 0 page 0 slot 0, slot 1; plane 0 page 1 slot 0, slot 1; ...; plane 1 ...
//! ```
//!
//! Guarantees: encoding is total; decoding never panics and names what was expected and found; a
//! slot that a newer program wrote is told apart from a damaged one (law 12).
//! Does not know: devices, which slot is the newer one.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::bitmap::PAGE_WORDS;
use crate::error::{Error, Result};
use crate::units::{BlockSize, CutSpan, Geometry};

/// Bytes of a header slot, a page slot and an intent slot: the unit that is written at once.
pub const SLOT_BYTES: usize = 4096;
pub const PLANES_MAX: usize = 8;
/// Hot extents that one intent slot holds.
pub const INTENT_ENTRIES_MAX: usize = 1000;

const HEADER_MAGIC: [u8; 8] = *b"\x89DRM\r\n\x1a\n";
const INTENT_MAGIC: [u8; 8] = *b"\x89DRI\r\n\x1a\n";
const PAGE_MAGIC: [u8; 4] = *b"DRMP";
const VERSION: u16 = 1;
/// Feature bit: the map says which cuts a replica holds.
const REPLICA: u32 = 1;

/// What a map file records; a file of one role never opens as another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapRole {
    /// Overwrite map of a primary: planes current, link-only, unsent.
    Overwrite = 1,
    /// Backup map: plane 0 = changed since the latest cut.
    Changed = 2,
    /// Snapshot map: plane 0 = old contents are in the preservation store, plane 1 = given back.
    Preserved = 3,
}

impl MapRole {
    const ALL: [Self; 3] = [Self::Overwrite, Self::Changed, Self::Preserved];

    /// Planes of a map of this role.
    #[must_use]
    pub const fn planes(self) -> usize {
        match self {
            Self::Overwrite => 3,
            Self::Changed => 1,
            Self::Preserved => 2,
        }
    }
}

/// Whose map it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapIdentity {
    /// Nil while the map is bound to no volume.
    pub volume: Uuid,
    pub geometry: Geometry,
    pub generation: u64,
}

/// A header slot, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapHeader {
    pub identity: MapIdentity,
    pub role: MapRole,
    /// Counts header writes; the slot with the higher one is the newer.
    pub sequence: u64,
    /// Pages committed with a sequence up to this one are void: their bits equal `base`.
    pub void_through: u64,
    /// Value of each plane's bits where no valid page says otherwise.
    pub base: [bool; PLANES_MAX],
    /// Of a replica.
    pub span: Option<CutSpan>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U16,
    role: U16,
    features: U32,
    volume: [u8; 16],
    size: U64,
    block_size: U32,
    planes: U32,
    generation: U64,
    sequence: U64,
    void_through: U64,
    base: [u8; PLANES_MAX],
    /// Oldest and newest cut, generation and sequence of each.
    span: [U64; 4],
    reserved: [u8; SLOT_BYTES - 116],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPage {
    magic: [u8; 4],
    crc: U32,
    sequence: U64,
    index: U64,
    plane: U32,
    reserved: U32,
    volume: [u8; 16],
    reserved_tail: [u8; 16],
    words: [U64; PAGE_WORDS],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawIntent {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    features: U32,
    volume: [u8; 16],
    sequence: U64,
    extent_bytes: U64,
    count: U32,
    crc: U32,
    entries: [U32; INTENT_ENTRIES_MAX],
    reserved_tail: [u8; SLOT_BYTES - 56 - 4 * INTENT_ENTRIES_MAX],
}

const _: () = {
    assert!(size_of::<RawHeader>() == SLOT_BYTES);
    assert!(size_of::<RawPage>() == SLOT_BYTES);
    assert!(size_of::<RawIntent>() == SLOT_BYTES);
};

/// What a slot holds, as far as can be told without its neighbour.
#[derive(Debug)]
pub enum Slot<T> {
    /// All zero: never written.
    Empty,
    Valid(T),
    /// Torn, rotten, misdirected or of no format of ours.
    Damaged(Error),
    /// Whole, and not understood: a newer program wrote it. To be refused whatever the neighbour
    /// says, since that may be older than what the newer program promised (law 12).
    Unknown(Error),
}

impl<T> Slot<T> {
    /// A slot that is `whole` (magic and checksum hold), as it is understood.
    fn of_whole(understood: Result<T>) -> Self {
        match understood {
            Ok(value) => Self::Valid(value),
            Err(error) => Self::Unknown(error),
        }
    }
}

fn are_zero(reserved: &[u8]) -> bool {
    reserved.iter().all(|byte| *byte == 0)
}

fn check_version(
    what: &str,
    (version, features, known): (U16, U32, u32),
    reserved: &[&[u8]],
) -> Result<()> {
    if version.get() != VERSION || features.get() & !known != 0 {
        return Err(Error::format(format!(
            "expected {what} of version {VERSION} with known feature bits, found version {version} \
             with feature bits {features:#x}: use the program that wrote it, or a newer one"
        )));
    }
    if !reserved.iter().all(|bytes| are_zero(bytes)) {
        return Err(Error::format(format!(
            "expected zeros in the reserved bytes of {what}, found others: use the program that \
             wrote it, or a newer one"
        )));
    }
    Ok(())
}

impl MapHeader {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut base = [0; PLANES_MAX];
        for (byte, value) in base.iter_mut().zip(self.base) {
            *byte = u8::from(value);
        }
        let geometry = self.identity.geometry;
        let mut raw = RawHeader {
            magic: HEADER_MAGIC,
            version: VERSION.into(),
            role: (self.role as u16).into(),
            features: self.span.map_or(0, |_| REPLICA).into(),
            volume: *self.identity.volume.as_bytes(),
            size: geometry.size().into(),
            block_size: geometry.block_size().bytes_u32().into(),
            planes: u32::try_from(self.role.planes()).expect("at most PLANES_MAX").into(),
            generation: self.identity.generation.into(),
            sequence: self.sequence.into(),
            void_through: self.void_through.into(),
            base,
            span: self.span.map_or([0; 4], CutSpan::numbers).map(U64::new),
            reserved: [0; SLOT_BYTES - 116],
            crc: 0.into(),
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[..SLOT_BYTES - 4]).into();
        raw.as_bytes().to_vec()
    }

    /// Decodes a header slot.
    pub fn decode(bytes: &[u8; SLOT_BYTES]) -> Slot<Self> {
        if are_zero(bytes) {
            return Slot::Empty;
        }
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.magic != HEADER_MAGIC {
            return Slot::Damaged(Error::format(format!(
                "expected a map with magic {HEADER_MAGIC:02x?}, found {:02x?}: this is no map of \
                 dualrestore, or its header is overwritten",
                raw.magic
            )));
        }
        let crc = crc32c::crc32c(&bytes[..SLOT_BYTES - 4]);
        if raw.crc.get() != crc {
            return Slot::Damaged(Error::integrity(format!(
                "the map's header is damaged: expected checksum {:08x}, found {crc:08x}; bring the \
                 file back, or make a new map",
                raw.crc
            )));
        }
        Slot::of_whole(Self::understand(raw))
    }

    fn understand(raw: &RawHeader) -> Result<Self> {
        let is_replica = raw.features.get() & REPLICA != 0;
        let span = if is_replica { &[][..] } else { raw.span.as_bytes() };
        check_version("a map", (raw.version, raw.features, REPLICA), &[span, &raw.reserved])?;
        let role = MapRole::ALL.into_iter().find(|role| *role as u16 == raw.role.get());
        let role = role.ok_or_else(|| {
            Error::format(format!("expected a map role from 1 to 3, found {}", raw.role))
        })?;
        let geometry = BlockSize::new(raw.block_size.get())
            .and_then(|block_size| Geometry::new(raw.size.get(), block_size))
            .ok_or_else(|| {
                Error::format(format!(
                    "the map states an impossible volume: {} bytes in blocks of {}",
                    raw.size, raw.block_size
                ))
            })?;
        if raw.planes.get() as usize != role.planes() {
            return Err(Error::format(format!(
                "expected {} planes in a map of role {role:?}, found {}",
                role.planes(),
                raw.planes
            )));
        }
        let (base, beyond) = raw.base.split_at(role.planes());
        if base.iter().any(|value| *value > 1) || !are_zero(beyond) {
            return Err(Error::format(format!(
                "expected 0 or 1 as the base of each plane of the map, found {:?}",
                raw.base
            )));
        }
        let span = understand_span(raw)?;
        Ok(Self {
            identity: MapIdentity {
                volume: Uuid::from_bytes(raw.volume),
                geometry,
                generation: raw.generation.get(),
            },
            role,
            sequence: raw.sequence.get(),
            void_through: raw.void_through.get(),
            base: raw.base.map(|value| value == 1),
            span,
        })
    }
}

fn understand_span(raw: &RawHeader) -> Result<Option<CutSpan>> {
    let span = CutSpan::of_numbers(raw.span.map(U64::get));
    let overwrite = raw.role.get() == MapRole::Overwrite as u16;
    match raw.features.get() & REPLICA != 0 {
        false => Ok(None),
        true if overwrite && span.oldest <= span.newest => Ok(Some(span)),
        true => Err(Error::format(format!("expected the cuts of a replica, found {span:?}"))),
    }
}

/// A page slot, decoded.
#[derive(Debug)]
pub struct MapPage {
    pub plane: usize,
    pub index: usize,
    pub volume: Uuid,
    pub sequence: u64,
    pub words: Box<[u64; PAGE_WORDS]>,
}

impl MapPage {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut raw = RawPage {
            magic: PAGE_MAGIC,
            crc: 0.into(),
            sequence: self.sequence.into(),
            index: (self.index as u64).into(),
            plane: u32::try_from(self.plane).expect("at most PLANES_MAX").into(),
            reserved: 0.into(),
            volume: *self.volume.as_bytes(),
            reserved_tail: [0; 16],
            words: self.words.map(U64::new),
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[8..]).into();
        raw.as_bytes().to_vec()
    }

    /// Decodes the slot that stands where plane `plane`, page `index` belongs: a page of another
    /// place or volume (a misdirected write) counts as damaged.
    pub fn decode(
        bytes: &[u8; SLOT_BYTES],
        plane: usize,
        index: usize,
        volume: Uuid,
    ) -> Slot<Self> {
        if are_zero(bytes) {
            return Slot::Empty;
        }
        let raw: &RawPage = zerocopy::transmute_ref!(bytes);
        let crc = crc32c::crc32c(&bytes[8..]);
        if raw.magic != PAGE_MAGIC || raw.crc.get() != crc {
            return Slot::Damaged(Error::integrity(format!(
                "map page {index} of plane {plane} is damaged: expected checksum {:08x}, found \
                 {crc:08x}",
                raw.crc
            )));
        }
        let placed = raw.plane.get() as usize == plane && raw.index.get() == index as u64;
        if !placed || raw.volume != *volume.as_bytes() {
            return Slot::Damaged(Error::integrity(format!(
                "expected map page {index} of plane {plane}, found page {} of plane {} of \
                 volume {}",
                raw.index,
                raw.plane,
                Uuid::from_bytes(raw.volume)
            )));
        }
        if raw.reserved.get() != 0 || !are_zero(&raw.reserved_tail) {
            return Slot::Unknown(Error::format(format!(
                "expected zeros in the reserved bytes of map page {index} of plane {plane}, found \
                 others: use the program that wrote it, or a newer one"
            )));
        }
        let words = Box::new(raw.words.map(U64::get));
        Slot::Valid(Self { plane, index, volume, sequence: raw.sequence.get(), words })
    }
}

/// The set of hot extents as one slot of the intent log states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntentRecord {
    pub volume: Uuid,
    pub sequence: u64,
    pub extent_bytes: u64,
    /// Indices of hot extents, ascending.
    pub extents: Vec<u32>,
}

impl IntentRecord {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.extents.len() <= INTENT_ENTRIES_MAX, "one slot holds the set");
        let mut raw = RawIntent {
            magic: INTENT_MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
            features: 0.into(),
            volume: *self.volume.as_bytes(),
            sequence: self.sequence.into(),
            extent_bytes: self.extent_bytes.into(),
            count: u32::try_from(self.extents.len()).expect("checked above").into(),
            crc: 0.into(),
            entries: [U32::ZERO; INTENT_ENTRIES_MAX],
            reserved_tail: [0; SLOT_BYTES - 56 - 4 * INTENT_ENTRIES_MAX],
        };
        for (entry, extent) in raw.entries.iter_mut().zip(&self.extents) {
            *entry = (*extent).into();
        }
        raw.crc = crc32c::crc32c(raw.as_bytes()).into();
        raw.as_bytes().to_vec()
    }

    pub fn decode(bytes: &[u8; SLOT_BYTES]) -> Slot<Self> {
        if are_zero(bytes) {
            return Slot::Empty;
        }
        let raw: &RawIntent = zerocopy::transmute_ref!(bytes);
        if raw.magic != INTENT_MAGIC {
            return Slot::Damaged(Error::format(format!(
                "expected an intent log with magic {INTENT_MAGIC:02x?}, found {:02x?}",
                raw.magic
            )));
        }
        let mut unsigned = *bytes;
        unsigned[52..56].fill(0);
        let crc = crc32c::crc32c(&unsigned);
        if raw.crc.get() != crc {
            return Slot::Damaged(Error::integrity(format!(
                "a slot of the intent log is damaged: expected checksum {:08x}, found {crc:08x}",
                raw.crc
            )));
        }
        Slot::of_whole(Self::understand(raw))
    }

    fn understand(raw: &RawIntent) -> Result<Self> {
        let count = raw.count.get() as usize;
        let entries = &raw.entries[..count.min(INTENT_ENTRIES_MAX)];
        let rest = raw.entries[entries.len()..].as_bytes();
        let reserved = [raw.reserved.as_bytes(), rest, &raw.reserved_tail];
        check_version("an intent log", (raw.version, raw.features, 0), &reserved)?;
        let extents: Vec<u32> = entries.iter().map(|entry| entry.get()).collect();
        if count > INTENT_ENTRIES_MAX || !extents.is_sorted_by(|a, b| a < b) {
            return Err(Error::format(format!(
                "expected at most {INTENT_ENTRIES_MAX} ascending extents in the intent log, found \
                 {count}, or others"
            )));
        }
        Ok(Self {
            volume: Uuid::from_bytes(raw.volume),
            sequence: raw.sequence.get(),
            extent_bytes: raw.extent_bytes.get(),
            extents,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Cut;

    fn header() -> MapHeader {
        MapHeader {
            identity: MapIdentity {
                volume: Uuid::from_u128(7),
                geometry: Geometry::new(10 << 20, BlockSize::DEFAULT).expect("valid"),
                generation: 3,
            },
            role: MapRole::Overwrite,
            sequence: 9,
            void_through: 4,
            base: [true, false, false, false, false, false, false, false],
            span: None,
        }
    }

    #[test]
    fn the_cuts_of_a_replica_read_back_and_are_refused_in_a_wrong_order() {
        let cut = |sequence| Cut { generation: 3, sequence };
        let span = Some(CutSpan { oldest: cut(4), newest: cut(9) });
        let replica = MapHeader { span, ..header() };
        let Slot::Valid(read) = MapHeader::decode(slot(&replica.encode())) else { panic!("whole") };
        assert_eq!(read, replica);
        let span = Some(CutSpan { oldest: cut(9), newest: cut(4) });
        let wrong = MapHeader { span, ..header() };
        assert!(matches!(MapHeader::decode(slot(&wrong.encode())), Slot::Unknown(_)));
    }

    fn slot(bytes: &[u8]) -> &[u8; SLOT_BYTES] {
        bytes.try_into().expect("one slot")
    }

    #[test]
    fn a_header_decodes_to_what_was_encoded() {
        let bytes = header().encode();
        let Slot::Valid(decoded) = MapHeader::decode(slot(&bytes)) else { panic!("valid") };
        assert_eq!(decoded, header());
    }

    #[test]
    fn every_flipped_bit_of_a_header_page_or_intent_slot_is_noticed() {
        let page = MapPage {
            plane: 1,
            index: 5,
            volume: Uuid::from_u128(7),
            sequence: 2,
            words: Box::new([0x55; PAGE_WORDS]),
        };
        let intent = IntentRecord {
            volume: Uuid::from_u128(7),
            sequence: 3,
            extent_bytes: 1 << 20,
            extents: vec![1, 5, 9],
        };
        for (name, bytes) in
            [("header", header().encode()), ("page", page.encode()), ("intent", intent.encode())]
        {
            for bit in 0..SLOT_BYTES * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let noticed = match name {
                    "header" => matches!(MapHeader::decode(slot(&flipped)), Slot::Damaged(_)),
                    "page" => matches!(
                        MapPage::decode(slot(&flipped), 1, 5, Uuid::from_u128(7)),
                        Slot::Damaged(_)
                    ),
                    _ => matches!(IntentRecord::decode(slot(&flipped)), Slot::Damaged(_)),
                };
                assert!(noticed, "{name}: bit {bit}");
            }
        }
    }

    #[test]
    fn a_misdirected_page_is_damaged() {
        let page = MapPage {
            plane: 0,
            index: 5,
            volume: Uuid::nil(),
            sequence: 2,
            words: Box::new([0; PAGE_WORDS]),
        };
        let bytes = page.encode();
        assert!(matches!(MapPage::decode(slot(&bytes), 0, 5, Uuid::nil()), Slot::Valid(_)));
        for (plane, index, volume) in
            [(1, 5, Uuid::nil()), (0, 4, Uuid::nil()), (0, 5, Uuid::from_u128(1))]
        {
            assert!(matches!(
                MapPage::decode(slot(&bytes), plane, index, volume),
                Slot::Damaged(_)
            ));
        }
    }

    /// The slot with some bytes changed and its checksum made right: what a newer program writes.
    fn forged(mut bytes: Vec<u8>, crc_at: usize, at: usize, with: &[u8]) -> Vec<u8> {
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes[crc_at..crc_at + 4].fill(0);
        let summed = if crc_at == 52 { &bytes[..] } else { &bytes[..crc_at] };
        let crc = crc32c::crc32c(summed).to_le_bytes();
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc);
        bytes
    }

    #[test]
    fn a_whole_header_that_is_not_understood_is_unknown_and_not_damaged() {
        for (at, with, words) in [
            (8, &[2, 0][..], "version 2"),
            (10, &[4, 0], "role"),
            (12, &[8, 0, 0, 0], "feature bits 0x8"),
            (32, &[1, 0, 0, 0, 0, 0, 0, 0], "impossible volume: 1 bytes"),
            (40, &[1, 16, 0, 0], "blocks of 4097"),
            (44, &[1, 0, 0, 0], "expected 3 planes"),
            (72, &[2], "base"),
            (75, &[1], "base"),
            (80, &[1], "reserved"),
            (4091, &[1], "reserved"),
        ] {
            let bytes = forged(header().encode(), SLOT_BYTES - 4, at, with);
            let Slot::Unknown(error) = MapHeader::decode(slot(&bytes)) else { panic!("{words}") };
            assert_eq!(error.kind(), crate::error::ErrorKind::Format);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_whole_intent_slot_that_is_not_understood_is_unknown_and_not_damaged() {
        let record = IntentRecord {
            volume: Uuid::from_u128(7),
            sequence: 3,
            extent_bytes: 1 << 20,
            extents: vec![1, 5],
        };
        for (at, with, words) in [
            (8, &[2, 0][..], "version 2"),
            (12, &[1, 0, 0, 0], "feature bits 0x1"),
            (10, &[1], "reserved"),
            (64, &[1], "reserved"),
            (4056, &[1], "reserved"),
            (48, &[0xe9, 3, 0, 0], "at most 1000"),
            (56, &[5], "ascending"),
        ] {
            let bytes = forged(record.encode(), 52, at, with);
            let Slot::Unknown(error) = IntentRecord::decode(slot(&bytes)) else {
                panic!("{words}")
            };
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
