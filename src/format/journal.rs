//! The journal of a backup's preservation, byte by byte (drawn in `docs/formats.md`).
//!
//! A record is one or more header pages of 4 KiB that list runs of blocks, then the old bytes of
//! those runs that say so, padded to 4 KiB.
//!
//! Guarantees: encoding is total; decoding never panics, refuses what a newer program wrote, and
//! takes for damaged whatever its checksum does not cover. Does not know: devices, where a record
//! lies, which records still count.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::extent::BlockRange;

/// The unit in which records are laid out.
pub const JOURNAL_PAGE_BYTES: usize = 4096;
/// Runs that one record lists.
pub const JOURNAL_RUNS_MAX: usize =
    (HEADER_PAGES_MAX * JOURNAL_PAGE_BYTES - HEAD_BYTES) / RUN_BYTES;

const HEADER_PAGES_MAX: usize = 64;
const HEAD_BYTES: usize = 128;
const RUN_BYTES: usize = 16;
const MAGIC: [u8; 8] = *b"\x89DRJ\r\n\x1a\n";
const VERSION: u16 = 1;

/// What a record says of a run of blocks. All of them were about to be overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalKind {
    /// Changed since the latest cut.
    Changed = 1,
    /// The same, and the record holds the old bytes.
    Held = 2,
    /// The same, and the old bytes are durable in the snapshot's store.
    Stored = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalRun {
    pub kind: JournalKind,
    pub blocks: BlockRange,
}

/// A record without its old bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalRecord {
    pub backup: Uuid,
    /// The snapshot that preserves; nil if nothing is preserved.
    pub snapshot: Uuid,
    /// Counts records.
    pub sequence: u64,
    /// What every record up to this one says is durable elsewhere.
    pub settled: u64,
    /// Number of the map of changed blocks that the record speaks of.
    pub changed: u64,
    pub runs: Vec<JournalRun>,
    /// Bytes of the runs that are held, in their order, and their CRC32C.
    pub payload_bytes: u64,
    pub payload_crc: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U16,
    pages: U16,
    features: U32,
    backup: [u8; 16],
    snapshot: [u8; 16],
    sequence: U64,
    settled: U64,
    changed: U64,
    payload_bytes: U64,
    payload_crc: U32,
    runs: U32,
    reserved: [u8; 36],
    /// Of all header pages, with this field zero.
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRun {
    start: U64,
    blocks: U32,
    kind: u8,
    reserved: [u8; 3],
}

const _: () = {
    assert!(size_of::<RawHead>() == HEAD_BYTES);
    assert!(size_of::<RawRun>() == RUN_BYTES);
};

/// What lies at a place of the journal.
#[derive(Debug)]
pub enum Found {
    /// No record, or one that was torn.
    Nothing,
    Record(JournalRecord),
    /// Written by a newer program.
    Unknown(Error),
}

impl JournalRecord {
    /// Bytes of the header pages of a record with so many runs.
    #[must_use]
    pub fn header_bytes(runs: usize) -> usize {
        (HEAD_BYTES + runs * RUN_BYTES).next_multiple_of(JOURNAL_PAGE_BYTES)
    }

    /// Bytes of the whole record.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let payload = self.payload_bytes.next_multiple_of(JOURNAL_PAGE_BYTES as u64);
        Self::header_bytes(self.runs.len()) as u64 + payload
    }

    /// Writes the header pages into the front of `bytes`.
    pub fn encode(&self, bytes: &mut [u8]) {
        assert!(self.runs.len() <= JOURNAL_RUNS_MAX, "{} runs", self.runs.len());
        let length = Self::header_bytes(self.runs.len());
        let bytes = &mut bytes[..length];
        bytes.fill(0);
        for (place, run) in bytes[HEAD_BYTES..].chunks_exact_mut(RUN_BYTES).zip(&self.runs) {
            let blocks = u32::try_from(run.blocks.count()).expect("a run is short");
            let raw = RawRun {
                start: run.blocks.start.into(),
                blocks: blocks.into(),
                kind: run.kind as u8,
                reserved: [0; 3],
            };
            place.copy_from_slice(raw.as_bytes());
        }
        let mut head = RawHead {
            magic: MAGIC,
            version: VERSION.into(),
            pages: ((length / JOURNAL_PAGE_BYTES) as u16).into(),
            features: 0.into(),
            backup: *self.backup.as_bytes(),
            snapshot: *self.snapshot.as_bytes(),
            sequence: self.sequence.into(),
            settled: self.settled.into(),
            changed: self.changed.into(),
            payload_bytes: self.payload_bytes.into(),
            payload_crc: self.payload_crc.into(),
            runs: (self.runs.len() as u32).into(),
            reserved: [0; 36],
            crc: 0.into(),
        };
        bytes[..HEAD_BYTES].copy_from_slice(head.as_bytes());
        head.crc = crc32c::crc32c(bytes).into();
        bytes[..HEAD_BYTES].copy_from_slice(head.as_bytes());
    }

    /// Reads the record whose header pages `bytes` begins with; `bytes` may go on after them.
    /// `blocks` is what the volume has.
    #[must_use]
    pub fn decode(bytes: &[u8], blocks: u64) -> Found {
        let Ok((head, _)) = RawHead::read_from_prefix(bytes) else { return Found::Nothing };
        let pages = usize::from(head.pages.get());
        let length = pages * JOURNAL_PAGE_BYTES;
        if head.magic != MAGIC || pages == 0 || length > bytes.len() {
            return Found::Nothing;
        }
        let crc = crc32c::crc32c(&bytes[..HEAD_BYTES - 4]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &bytes[HEAD_BYTES..length]);
        if crc != head.crc.get() {
            return Found::Nothing;
        }
        if head.version != VERSION || head.features != 0 {
            return Found::Unknown(Error::format(format!(
                "expected a preservation journal of version {VERSION} without features, found \
                 version {} with features {:#x}: use the program that wrote it, or a newer one",
                head.version, head.features
            )));
        }
        Self::checked(&head, &bytes[..length], blocks).map_or(Found::Nothing, Found::Record)
    }

    fn checked(head: &RawHead, bytes: &[u8], blocks: u64) -> Option<Self> {
        let count = head.runs.get() as usize;
        let fits = count <= JOURNAL_RUNS_MAX && Self::header_bytes(count) == bytes.len();
        if !fits || head.reserved != [0; 36] || head.settled.get() >= head.sequence.get() {
            return None;
        }
        let mut runs = Vec::with_capacity(count);
        for place in bytes[HEAD_BYTES..].chunks_exact(RUN_BYTES).take(count) {
            let raw = RawRun::read_from_bytes(place).ok()?;
            let kind = match raw.kind {
                1 => JournalKind::Changed,
                2 => JournalKind::Held,
                3 => JournalKind::Stored,
                _ => return None,
            };
            let start = raw.start.get();
            let end = start.checked_add(u64::from(raw.blocks.get()))?;
            if raw.reserved != [0; 3] || raw.blocks == 0 || end > blocks {
                return None;
            }
            runs.push(JournalRun { kind, blocks: BlockRange::new(start, end) });
        }
        Some(Self {
            backup: Uuid::from_bytes(head.backup),
            snapshot: Uuid::from_bytes(head.snapshot),
            sequence: head.sequence.get(),
            settled: head.settled.get(),
            changed: head.changed.get(),
            runs,
            payload_bytes: head.payload_bytes.get(),
            payload_crc: head.payload_crc.get(),
        })
    }

    /// Refuses a record of another backup.
    pub fn check_backup(&self, backup: Uuid) -> Result<()> {
        if self.backup == backup {
            return Ok(());
        }
        Err(Error::identity(format!(
            "expected the preservation journal of backup {backup}, found that of {}: bring the \
             right file back",
            self.backup
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(runs: u64) -> JournalRecord {
        let kinds = [JournalKind::Changed, JournalKind::Held, JournalKind::Stored];
        let runs = (0..runs).map(|at| JournalRun {
            kind: kinds[at as usize % 3],
            blocks: BlockRange::new(at * 7, at * 7 + 1 + at % 5),
        });
        JournalRecord {
            backup: Uuid::from_u128(1),
            snapshot: Uuid::from_u128(2),
            sequence: 9,
            settled: 4,
            changed: 3,
            runs: runs.collect(),
            payload_bytes: 8192,
            payload_crc: 77,
        }
    }

    fn encoded(record: &JournalRecord) -> Vec<u8> {
        let mut bytes = vec![0xee; JournalRecord::header_bytes(record.runs.len())];
        record.encode(&mut bytes);
        bytes
    }

    #[test]
    fn what_was_encoded_decodes_to_the_same_whatever_follows() {
        for runs in [0, 1, 248, 249, JOURNAL_RUNS_MAX as u64] {
            let record = sample(runs);
            let mut bytes = encoded(&record);
            bytes.extend([0x5a; 4096]);
            let Found::Record(found) = JournalRecord::decode(&bytes, 1 << 20) else {
                panic!("{runs} runs")
            };
            assert_eq!(found, record);
            assert_eq!(record.bytes(), bytes.len() as u64 - 4096 + 8192);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_no_record() {
        let whole = encoded(&sample(3));
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                let found = JournalRecord::decode(&flipped, 1 << 20);
                assert!(matches!(found, Found::Nothing), "bit {bit} of byte {at}");
            }
            assert!(matches!(JournalRecord::decode(&whole[..at], 1 << 20), Found::Nothing));
        }
    }

    #[test]
    fn a_run_outside_the_volume_is_no_record_and_a_newer_version_is_refused() {
        let record = sample(3);
        assert!(matches!(JournalRecord::decode(&encoded(&record), 5), Found::Nothing));
        let mut newer = encoded(&record);
        newer[8] = 2;
        newer[HEAD_BYTES - 4..HEAD_BYTES].fill(0);
        let crc = crc32c::crc32c(&newer).to_le_bytes();
        newer[HEAD_BYTES - 4..HEAD_BYTES].copy_from_slice(&crc);
        let Found::Unknown(error) = JournalRecord::decode(&newer, 1 << 20) else {
            panic!("not refused")
        };
        assert!(error.to_string().contains("version 2"), "{error}");
        assert!(record.check_backup(Uuid::from_u128(1)).is_ok());
        assert!(record.check_backup(Uuid::from_u128(5)).is_err());
    }
}
