//! What is recorded of a backup volume: whose it is, its cuts, and which files are theirs.
//!
//! One record, replaced whole, so that a cut is there with everything that belongs to it or not at
//! all. A line of text (format, version, CRC32C and length of the rest), then JSON.
//!
//! Guarantees: decoding refuses another format, an unknown version or field, a length or checksum
//! that does not match, and numbers that contradict each other; it never panics.
//! Does not know: files, maps.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::selection::Selection;
use crate::error::{Error, Result};
use crate::extent::BlockRange;
use crate::limits::{CUTS_KEPT_MAX, LABEL_BYTES_MAX, SELECTION_RANGES_MAX};
use crate::units::{BlockSize, Geometry};

const FORMAT: &str = "dualrestore-backup-catalogue";
const VERSION: u32 = 1;

/// One cut: the instant, and the snapshot of it for as long as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutRecord {
    pub snapshot: Uuid,
    pub label: String,
    /// Generation of the volume and sequence of the last operation before the cut.
    pub generation: u64,
    pub sequence: u64,
    /// Milliseconds since 1970, as told by whoever ordered the cut.
    pub created_ms: u64,
    pub selection: Selection,
    /// Number of the map file of the blocks that changed since the cut before.
    pub changed: u64,
    /// Whether there is a preservation store: false once the snapshot was deleted.
    pub kept: bool,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalogue {
    /// Which backup this is: drawn when it was created.
    pub backup: Uuid,
    /// Nil until a primary has said whose backup this is.
    pub volume: Uuid,
    pub generation: u64,
    pub geometry: Geometry,
    /// Number of the map file of the blocks that changed since the latest cut.
    pub changed: u64,
    /// Whether there is a journal, whose records say more than the maps.
    pub journal: bool,
    /// Oldest first.
    pub cuts: Vec<CutRecord>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCut {
    snapshot: String,
    label: String,
    generation: u64,
    sequence: u64,
    created_ms: u64,
    selection: Vec<[u64; 2]>,
    changed: u64,
    kept: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCatalogue {
    backup: String,
    volume: String,
    generation: u64,
    size: u64,
    block_size: u32,
    changed: u64,
    /// Absent where there is none, so that a program that knows no journal refuses one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    journal: bool,
    cuts: Vec<RawCut>,
}

impl Catalogue {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawCatalogue {
            backup: self.backup.to_string(),
            volume: self.volume.to_string(),
            generation: self.generation,
            size: self.geometry.size(),
            block_size: self.geometry.block_size().bytes_u32(),
            changed: self.changed,
            journal: self.journal,
            cuts: self.cuts.iter().map(RawCut::from).collect(),
        };
        let body = serde_json::to_vec_pretty(&raw).expect("plain values have a JSON form");
        let checksum = crc32c::crc32c(&body);
        let head = format!("{FORMAT} {VERSION} {checksum:08x} {}\n", body.len());
        [head.as_bytes(), &body].concat()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let end = bytes.iter().take(128).position(|byte| *byte == b'\n');
        let head = end.and_then(|end| std::str::from_utf8(&bytes[..end]).ok());
        let fields: Vec<&str> = head.unwrap_or_default().split(' ').collect();
        let (&[FORMAT, version, checksum, length], Some(end)) = (&fields[..], end) else {
            return Err(Error::format(format!(
                "expected a record of format {FORMAT} in the catalogue, found another: bring the \
                 file back"
            )));
        };
        if version != VERSION.to_string() {
            return Err(Error::format(format!(
                "expected a backup catalogue of version {VERSION}, found version {version}: \
                 use the program that wrote it, or a newer one"
            )));
        }
        let body = &bytes[end + 1..];
        let found = format!("{:08x}", crc32c::crc32c(body));
        if length != body.len().to_string() || checksum != found {
            return Err(Error::integrity(format!(
                "the backup catalogue is damaged: expected {length} bytes with checksum \
                 {checksum}, found {} with {found}; bring the file back",
                body.len()
            )));
        }
        let raw: RawCatalogue = serde_json::from_slice(body)
            .map_err(|error| Error::format(format!("backup catalogue: {error}")))?;
        Self::try_from(raw)
    }

    /// The cuts whose snapshots are kept, oldest first.
    pub fn kept(&self) -> impl Iterator<Item = &CutRecord> {
        self.cuts.iter().filter(|cut| cut.kept)
    }

    /// Forgets the oldest cuts beyond what is remembered; never one whose snapshot is kept.
    pub fn forget_oldest(&mut self) {
        while self.cuts.len() > CUTS_KEPT_MAX {
            match self.cuts.first() {
                Some(oldest) if !oldest.kept => drop(self.cuts.remove(0)),
                _ => return,
            }
        }
    }
}

impl From<&CutRecord> for RawCut {
    fn from(cut: &CutRecord) -> Self {
        Self {
            snapshot: cut.snapshot.to_string(),
            label: cut.label.clone(),
            generation: cut.generation,
            sequence: cut.sequence,
            created_ms: cut.created_ms,
            selection: cut.selection.runs().iter().map(|run| [run.start, run.end]).collect(),
            changed: cut.changed,
            kept: cut.kept,
        }
    }
}

impl TryFrom<RawCatalogue> for Catalogue {
    type Error = Error;

    fn try_from(raw: RawCatalogue) -> Result<Self> {
        let geometry = BlockSize::new(raw.block_size)
            .and_then(|block_size| Geometry::new(raw.size, block_size))
            .ok_or_else(|| {
                Error::format(format!(
                    "backup catalogue: a volume of {} bytes in blocks of {} is impossible",
                    raw.size, raw.block_size
                ))
            })?;
        let cuts = raw.cuts.into_iter().map(|cut| cut.checked(geometry));
        let cuts = cuts.collect::<Result<Vec<_>>>()?;
        let mut names: Vec<Uuid> = cuts.iter().map(|cut| cut.snapshot).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::format("backup catalogue: a snapshot is listed twice"));
        }
        Ok(Self {
            backup: parse_uuid(&raw.backup)?,
            volume: parse_uuid(&raw.volume)?,
            generation: raw.generation,
            geometry,
            changed: raw.changed,
            journal: raw.journal,
            cuts,
        })
    }
}

fn parse_uuid(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text)
        .map_err(|_| Error::format(format!("backup catalogue: {text:?} is no UUID")))
}

impl RawCut {
    fn checked(self, geometry: Geometry) -> Result<CutRecord> {
        let runs: Vec<_> =
            self.selection.iter().map(|[start, end]| BlockRange::new(*start, *end)).collect();
        let valid = runs.iter().all(|run| !run.is_empty() && run.end <= geometry.blocks())
            && runs.len() <= SELECTION_RANGES_MAX
            && self.label.len() <= LABEL_BYTES_MAX;
        let selection = Selection::union(runs.clone());
        if !valid || selection.runs() != runs {
            return Err(Error::format(format!(
                "backup catalogue: the label or selection of snapshot {} is impossible",
                self.snapshot
            )));
        }
        Ok(CutRecord {
            snapshot: parse_uuid(&self.snapshot)?,
            label: self.label,
            generation: self.generation,
            sequence: self.sequence,
            created_ms: self.created_ms,
            selection,
            changed: self.changed,
            kept: self.kept,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn sample() -> Catalogue {
        let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
        let cut = |number: u128, kept| CutRecord {
            snapshot: Uuid::from_u128(number),
            label: "before the truck".to_owned(),
            generation: 3,
            sequence: u64::MAX,
            created_ms: 1_700_000_000_000,
            selection: Selection::union(vec![BlockRange::new(1, 4), BlockRange::new(9, 256)]),
            changed: number as u64,
            kept,
        };
        let cuts = vec![cut(1, false), cut(2, true)];
        let (backup, volume) = (Uuid::from_u128(8), Uuid::from_u128(9));
        Catalogue { backup, volume, generation: 4, geometry, changed: 3, journal: true, cuts }
    }

    #[test]
    fn what_was_encoded_decodes_to_the_same() {
        assert_eq!(Catalogue::decode(&sample().encode()).expect("valid"), sample());
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_refused() {
        let whole = sample().encode();
        for at in 0..whole.len() {
            assert!(Catalogue::decode(&whole[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                assert!(Catalogue::decode(&flipped).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn an_unknown_version_or_field_is_refused_by_name() {
        let text = String::from_utf8(sample().encode()).expect("text");
        let newer = text.replacen("catalogue 1 ", "catalogue 2 ", 1);
        let refused = Catalogue::decode(newer.as_bytes()).expect_err("newer");
        assert_eq!(refused.kind(), ErrorKind::Format);
        assert!(refused.to_string().contains("version 2"), "{refused}");
        let (_, body) = text.split_once('\n').expect("a head");
        let body = body.replacen("\"volume\"", "\"colour\": 1, \"volume\"", 1);
        let checksum = crc32c::crc32c(body.as_bytes());
        let odd = format!("{FORMAT} 1 {checksum:08x} {}\n{body}", body.len());
        let refused = Catalogue::decode(odd.as_bytes()).expect_err("unknown field");
        assert!(refused.to_string().contains("colour"), "{refused}");
    }

    #[test]
    fn the_oldest_cuts_are_forgotten_but_never_a_kept_snapshot() {
        let mut catalogue = sample();
        let (gone, kept) = (catalogue.cuts[0].clone(), catalogue.cuts[1].clone());
        catalogue.cuts = vec![gone; CUTS_KEPT_MAX + 2];
        catalogue.cuts[1] = kept.clone();
        catalogue.forget_oldest();
        assert_eq!(catalogue.cuts.len(), CUTS_KEPT_MAX + 1);
        assert_eq!(catalogue.cuts[0], kept);
    }
}
