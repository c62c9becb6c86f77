//! How far a bundle has come that is not complete: kept on the host that makes it.
//!
//! Guarantees: decoding refuses another format, an unknown version or field, damage, and a begun
//! manifest that is none; it never panics.
//! Does not know: where records are kept, media.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::manifest::{BeginManifest, Manifest, Run, decode_checked, encode_checked};
use crate::error::{Error, Result};
use crate::limits::REPORT_RUNS_MAX;

const FORMAT: &str = "dualrestore bundle, on its way";

/// What is on the media that are finished.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// How many there are; the next medium has the number after it.
    pub media: u32,
    /// The number of the next segment.
    pub segment: u32,
    /// All of the selection before this byte of the volume is on them.
    pub position: u64,
    /// The last medium was written.
    pub sealed: bool,
    pub chunks: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
    pub unreadable_bytes: u64,
    pub stored_bytes: u64,
    /// The first `REPORT_RUNS_MAX`.
    pub unreadable: Vec<Run>,
}

impl Done {
    /// Takes a further finished medium into account.
    pub fn add(&mut self, manifest: &Manifest) {
        self.media += 1;
        self.sealed = manifest.medium.is_none_or(|medium| medium.last);
        for entry in &manifest.segments {
            self.segment = entry.number + 1;
            self.position = entry.coverage.last().map_or(self.position, |run| run.1);
            self.chunks += entry.chunks;
            self.data_bytes += entry.data_bytes;
            self.zero_bytes += entry.zero_bytes;
            self.unreadable_bytes += entry.unreadable_bytes;
            self.stored_bytes += entry.stored_bytes;
        }
        let room = REPORT_RUNS_MAX.saturating_sub(self.unreadable.len());
        self.unreadable.extend(manifest.unreadable.iter().take(room));
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProgressRecord {
    format: String,
    version: u32,
    /// What it is made of, as its maker names it, and what tells that this did not change.
    pub source: String,
    pub mark: String,
    /// The bytes of `manifest.begin.json`, the same on all media.
    pub begin: String,
    pub segment_bytes_max: u64,
    /// Of an encrypted bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed_with: Option<KeptKey>,
    pub done: Done,
}

/// The key of an encrypted bundle. Kept where the bytes lie in the clear anyway, since nobody else
/// could seal the next medium with it: a recipient's own key is not here.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptKey {
    /// Its line, as `key.age` wraps it.
    pub key: String,
    /// The bytes of `key.age`.
    pub wrapped: Vec<u8>,
}

impl fmt::Debug for KeptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeptKey")
    }
}

impl ProgressRecord {
    /// Of a bundle that has just been begun.
    #[must_use]
    pub fn new(source: &str, mark: &str, begin: &[u8], segment_bytes_max: u64) -> Self {
        Self {
            format: FORMAT.into(),
            version: 1,
            source: source.into(),
            mark: mark.into(),
            begin: String::from_utf8_lossy(begin).into_owned(),
            segment_bytes_max,
            sealed_with: None,
            done: Done::default(),
        }
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode_checked(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let record: Self = decode_checked(bytes, FORMAT)?;
        let begin = BeginManifest::parse(record.begin.as_bytes())?;
        if record.done.position > begin.size {
            return Err(Error::format("the record states a position outside the volume"));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::error::ErrorKind;
    use crate::units::{BlockSize, Geometry};

    fn record() -> ProgressRecord {
        let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
        let mut begin = BeginManifest::new(Uuid::from_u128(1), Uuid::nil(), geometry, 0, 0);
        begin.selection = vec![Run(0, 1 << 20)];
        ProgressRecord::new("/srv/disk.img", "1048576 bytes", &begin.encode(), 2 << 20)
    }

    #[test]
    fn a_record_reads_back_and_its_manifest_is_the_same_to_the_byte() {
        let read = ProgressRecord::decode(&record().encode()).expect("whole");
        assert_eq!(read, record());
        BeginManifest::parse(read.begin.as_bytes()).expect("whole");
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_of_a_record_is_noticed() {
        let mut bytes = record().encode();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(ProgressRecord::decode(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for length in 0..bytes.len() {
            assert!(ProgressRecord::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_newer_record_and_an_impossible_position_are_refused() {
        let newer = ProgressRecord { version: 2, ..record() };
        let error = ProgressRecord::decode(&newer.encode()).expect_err("newer");
        assert!(error.to_string().contains("version 2"), "{error}");
        let beyond = Done { position: (1 << 20) + 1, ..Done::default() };
        let error = ProgressRecord::decode(&ProgressRecord { done: beyond, ..record() }.encode());
        assert_eq!(error.expect_err("outside").kind(), ErrorKind::Format);
    }
}
