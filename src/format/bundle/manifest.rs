//! The two manifests: what is known when a bundle is begun, and what it turned out to hold.
//!
//! Guarantees: parsing accepts exactly the fields written; the file ends with a CRC32C and a
//! BLAKE3 of all text before them, so any flipped bit is noticed; runs are ascending, disjoint
//! and inside the volume.
//! Does not know: files.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Hash;
use super::base::{BaseCut, check_base};
use super::bounded::{at_most, name};
use super::key::{BundleKey, locked};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::{
    BUNDLE_FEATURES_MAX, BUNDLE_MANIFEST_LISTS_MAX, BUNDLE_MEDIA_MAX, BUNDLE_SEGMENT_BYTES_MAX,
    BUNDLE_SEGMENTS_MAX, BUNDLE_SELECTION_RUNS_MAX, REPORT_RUNS_MAX,
};
use crate::units::{BlockSize, Geometry};

const BEGIN_FORMAT: &str = "dualrestore bundle, begun";
const FORMAT: &str = "dualrestore bundle";
const VERSION: u32 = 1;
const SEGMENTS_MAX: usize = BUNDLE_SEGMENTS_MAX as usize;
/// What a chunk takes in a segment at the least.
const DESCRIPTOR_BYTES: u64 = 64;
const ENCRYPTED: &str = "encrypted";
const INCREMENTAL: &str = "incremental";
const CIPHER: &str = "AES-256-GCM";
/// The features that this version knows.
const FEATURES: [&str; 2] = [ENCRYPTED, INCREMENTAL];

/// A run of bytes: first, and first after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run(pub u64, pub u64);

impl From<ByteRange> for Run {
    fn from(range: ByteRange) -> Self {
        Self(range.offset, range.end())
    }
}

impl From<Run> for ByteRange {
    /// The run has been checked: its end is not before its start.
    fn from(run: Run) -> Self {
        Self::new(run.0, run.1 - run.0)
    }
}

/// `manifest.begin.json`: identity and selection, written before the first segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginManifest {
    pub format: String,
    pub version: u32,
    /// Names of features that a reader must know.
    #[serde(deserialize_with = "at_most::<_, _, BUNDLE_FEATURES_MAX>")]
    pub features: Vec<String>,
    pub bundle: UuidText,
    /// Absent: made from a plain image, bound to no volume.
    pub volume: Option<UuidText>,
    pub generation: u64,
    pub cut: u64,
    /// Of which it was made; absent if of none. What a backup knows the cut by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<UuidText>,
    pub size: u64,
    pub block_size: u32,
    #[serde(deserialize_with = "name")]
    pub compression: String,
    /// Seconds since 1970, 0 if the maker had no clock.
    pub created_unix_s: u64,
    #[serde(deserialize_with = "name")]
    pub software: String,
    /// What was to be included, whole blocks.
    #[serde(deserialize_with = "at_most::<_, _, BUNDLE_SELECTION_RUNS_MAX>")]
    pub selection: Vec<Run>,
    /// Whether holes of the source were left out of the selection.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allocated_only: bool,
    /// With the feature "incremental".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseCut>,
    /// With the feature "encrypted".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
}

/// How the chunks are encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encryption {
    #[serde(deserialize_with = "name")]
    pub cipher: String,
    /// Tells the right key from others; see `BundleKey::check`.
    pub key_check: HexHash,
}

/// One segment of a finished bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentEntry {
    #[serde(deserialize_with = "name")]
    pub name: String,
    pub number: u32,
    pub bytes: u64,
    pub header_hash: HexHash,
    pub root: HexHash,
    pub chunks: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
    pub unreadable_bytes: u64,
    pub stored_bytes: u64,
    /// The part of the selection that it speaks of.
    #[serde(deserialize_with = "at_most::<_, _, BUNDLE_SELECTION_RUNS_MAX>")]
    pub coverage: Vec<Run>,
    /// Of an encrypted segment; also in its header, which may be damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt: Option<HexHash>,
}

/// Which of the media of a bundle a manifest lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MediumEntry {
    /// From 1.
    pub number: u32,
    pub last: bool,
}

/// `manifest.json`: written last; without it a bundle, or a medium of it, is unfinished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    pub begin: BeginManifest,
    /// BLAKE3 of the bytes of `manifest.begin.json`.
    pub begin_hash: HexHash,
    /// BLAKE3 of the roots of all segments in order.
    pub root: HexHash,
    /// Absent: the only medium. Of several, each lists its own segments, whose numbers go on from
    /// medium to medium.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<MediumEntry>,
    #[serde(deserialize_with = "at_most::<_, _, SEGMENTS_MAX>")]
    pub segments: Vec<SegmentEntry>,
    /// What the source could not read, up to a limit; the descriptors say all of it.
    #[serde(deserialize_with = "at_most::<_, _, REPORT_RUNS_MAX>")]
    pub unreadable: Vec<Run>,
    /// Of an encrypted bundle: HMAC-SHA256 of all text before it. Stands last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<HexHash>,
}

/// 32 bytes as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HexHash(pub Hash);

impl From<HexHash> for String {
    fn from(hash: HexHash) -> Self {
        blake3::Hash::from_bytes(hash.0).to_hex().to_string()
    }
}

impl TryFrom<String> for HexHash {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let hash = blake3::Hash::from_hex(&text).map_err(|_| format!("not a hash: {text:?}"))?;
        let same = Self(*hash.as_bytes());
        if String::from(same) == text { Ok(same) } else { Err(format!("not lower-case: {text:?}")) }
    }
}

/// A UUID in its usual lower-case form with hyphens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UuidText(pub Uuid);

impl From<UuidText> for String {
    fn from(uuid: UuidText) -> Self {
        uuid.0.hyphenated().to_string()
    }
}

impl TryFrom<String> for UuidText {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let uuid = Uuid::try_parse(&text).map_err(|_| format!("not a UUID: {text:?}"))?;
        if uuid.hyphenated().to_string() == text {
            Ok(Self(uuid))
        } else {
            Err(format!("not a UUID in its usual form: {text:?}"))
        }
    }
}

/// The file name of a segment.
#[must_use]
pub fn segment_name(number: u32) -> String {
    format!("seg-{number:08}.drs")
}

impl BeginManifest {
    /// With the format, version and features filled in; the rest is for the maker to say.
    #[must_use]
    pub fn new(bundle: Uuid, volume: Uuid, geometry: Geometry, generation: u64, cut: u64) -> Self {
        Self {
            format: BEGIN_FORMAT.into(),
            version: VERSION,
            features: Vec::new(),
            bundle: UuidText(bundle),
            volume: (!volume.is_nil()).then_some(UuidText(volume)),
            generation,
            cut,
            snapshot: None,
            size: geometry.size(),
            block_size: geometry.block_size().bytes_u32(),
            compression: String::new(),
            created_unix_s: 0,
            software: String::new(),
            selection: Vec::new(),
            allocated_only: false,
            base: None,
            encryption: None,
        }
    }

    /// Says that its chunks are encrypted with that key.
    pub fn encrypt(&mut self, key: &BundleKey) {
        self.features.push(ENCRYPTED.into());
        let key_check = HexHash(key.check());
        self.encryption = Some(Encryption { cipher: CIPHER.into(), key_check });
    }

    /// Says that it holds only what changed since a cut.
    pub fn go_on_from(&mut self, base: BaseCut) {
        self.features.push(INCREMENTAL.into());
        self.base = Some(base);
    }

    /// Whether its chunks are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.encryption.is_some()
    }

    /// Refuses a key of another bundle, none where one is needed, one where none is.
    pub fn expect_key(&self, key: Option<&BundleKey>) -> Result<()> {
        match (&self.encryption, key) {
            (None, None) => Ok(()),
            (Some(encryption), Some(key))
                if key.bundle() == self.bundle.0 && key.check() == encryption.key_check.0 =>
            {
                Ok(())
            }
            (Some(_), Some(key)) => Err(locked(format!(
                "expected the key of bundle {}, found another one (of bundle {}): is key.age of \
                 this bundle?",
                self.bundle.0,
                key.bundle()
            ))),
            (Some(_), None) => Err(locked(
                "the bundle is encrypted: name the file of an identity (--identity) or of its \
                 passphrase (--passphrase-file)",
            )),
            (None, Some(_)) => Err(locked(
                "expected an encrypted bundle, found one that is not: it may have been exchanged; \
                 name no identity or passphrase if you trust it",
            )),
        }
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode_checked(self)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let manifest: Self = decode_checked(bytes, BEGIN_FORMAT)?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<()> {
        expect_format(&self.format, self.version, BEGIN_FORMAT)?;
        let unknown = |feature: &&String| !FEATURES.contains(&feature.as_str());
        let unknown: Vec<_> = self.features.iter().filter(unknown).cloned().collect();
        if !unknown.is_empty() {
            return Err(Error::format(format!(
                "the bundle needs features that this version does not know: {}; use the program \
                 that made it, or a newer one",
                unknown.join(", ")
            )));
        }
        let count = |name: &str| self.features.iter().filter(|feature| *feature == name).count();
        let named = count(ENCRYPTED);
        let cipher = self.encryption.as_ref().map(|encryption| encryption.cipher.as_str());
        if !matches!((named, cipher), (0, None) | (1, Some(CIPHER))) {
            return Err(Error::format(format!(
                "expected a bundle that is encrypted with {CIPHER} or not at all, found {cipher:?}"
            )));
        }
        let geometry = self.geometry()?;
        if self.snapshot == Some(UuidText(Uuid::nil())) {
            return Err(Error::format("the snapshot of the bundle is the nil UUID"));
        }
        if self.volume == Some(UuidText(Uuid::nil())) {
            return Err(Error::format("the volume of the bundle is the nil UUID"));
        }
        if self.selection.is_empty() && self.base.is_none() && !self.allocated_only {
            return Err(Error::format("the bundle selects nothing"));
        }
        check_base(self, count(INCREMENTAL), geometry)?;
        expect_runs(&self.selection, geometry, "selection")
    }

    pub fn geometry(&self) -> Result<Geometry> {
        BlockSize::new(self.block_size)
            .and_then(|block| Geometry::new(self.size, block))
            .ok_or_else(|| {
                Error::format(format!(
                    "the bundle states an impossible volume: {} bytes in blocks of {}",
                    self.size, self.block_size
                ))
            })
    }
}

impl Manifest {
    #[must_use]
    pub fn new(begin: BeginManifest, begin_hash: Hash, segments: Vec<SegmentEntry>) -> Self {
        let root = HexHash(root_of(&segments));
        Self {
            format: FORMAT.into(),
            version: VERSION,
            begin,
            begin_hash: HexHash(begin_hash),
            root,
            medium: None,
            segments,
            unreadable: Vec::new(),
            mac: None,
        }
    }

    /// The file; that of an encrypted bundle with the MAC that its key gives.
    #[must_use]
    pub fn encode(&self, key: Option<&BundleKey>) -> Vec<u8> {
        assert_eq!(self.begin.is_encrypted(), key.is_some(), "a key for an encrypted bundle");
        let Some(key) = key else { return encode_checked(self) };
        let unsealed = text_of(&Self { mac: None, ..self.clone() });
        encode_checked(&Self {
            mac: Some(HexHash(key.seal_text(unsealed.as_bytes()))),
            ..self.clone()
        })
    }

    /// Whether the bytes, already parsed, are what the holder of the key wrote.
    pub fn check_mac(&self, bytes: &[u8], key: &BundleKey) -> Result<()> {
        let mac = self.mac.as_ref().map(|mac| (mac.0, format!("{MAC_START}{}\"", hex(mac))));
        let sealed = mac.is_some_and(|(mac, end)| {
            let length = bytes.len().saturating_sub(CHECK_BYTES);
            let text = bytes[..length].strip_suffix(end.as_bytes());
            text.is_some_and(|text| key.has_sealed_text(text, &mac))
        });
        if sealed {
            return Ok(());
        }
        Err(Error::integrity(
            "the manifest was changed by somebody without the key: its MAC does not match; copy \
             it from the medium again, and ask who had the medium",
        ))
    }

    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let manifest: Self = decode_checked(bytes, FORMAT)?;
        expect_format(&manifest.format, manifest.version, FORMAT)?;
        manifest.begin.check()?;
        if manifest.mac.is_some() != manifest.begin.is_encrypted() {
            return Err(Error::format(
                "expected a MAC in the manifest of an encrypted bundle, and only there",
            ));
        }
        let geometry = manifest.begin.geometry()?;
        expect_runs(&manifest.unreadable, geometry, "list of unreadable runs")?;
        let first = manifest.first_segment()?;
        let mut covered_to = 0;
        for (number, segment) in (first..).zip(&manifest.segments) {
            let sane = segment.number == number
                && number < BUNDLE_SEGMENTS_MAX
                && segment.name == segment_name(number)
                && segment.salt.is_some() == manifest.begin.is_encrypted()
                && segment.bytes <= BUNDLE_SEGMENT_BYTES_MAX;
            if !sane {
                return Err(Error::format(format!(
                    "expected segment {number} of at most 1 GiB in the manifest, found {:?}",
                    segment.name
                )));
            }
            expect_runs(&segment.coverage, geometry, "coverage of a segment")?;
            covered_to = expect_sums(segment, covered_to)?;
        }
        if manifest.root.0 != root_of(&manifest.segments) {
            return Err(Error::integrity("the roots of the segments do not give the root"));
        }
        Ok(manifest)
    }
}

impl Manifest {
    /// The number that its first segment must have.
    fn first_segment(&self) -> Result<u32> {
        let number = self.medium.map_or(1, |medium| medium.number);
        if !(1..=BUNDLE_MEDIA_MAX).contains(&number) {
            return Err(Error::format(format!(
                "expected a medium numbered from 1 to {BUNDLE_MEDIA_MAX}, found {number}"
            )));
        }
        let first = self.segments.first().filter(|_| number > 1);
        Ok(first.map_or(0, |segment| segment.number))
    }
}

fn root_of(segments: &[SegmentEntry]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for segment in segments {
        hasher.update(&segment.root.0);
    }
    *hasher.finalize().as_bytes()
}

/// Counts and coverage of a segment that begins at `covered_to` or later; where it ends.
fn expect_sums(segment: &SegmentEntry, covered_to: u64) -> Result<u64> {
    let covered: u64 = segment.coverage.iter().map(|run| run.1 - run.0).sum();
    let counted = segment
        .data_bytes
        .checked_add(segment.zero_bytes)
        .and_then(|sum| sum.checked_add(segment.unreadable_bytes));
    let start = segment.coverage.first().map_or(covered_to, |run| run.0);
    let sane = counted == Some(covered)
        && start >= covered_to
        && segment.stored_bytes <= segment.bytes
        && segment.chunks <= segment.bytes / DESCRIPTOR_BYTES;
    if !sane {
        return Err(Error::format(format!(
            "the manifest states what segment {} cannot hold, or what another one holds",
            segment.number
        )));
    }
    Ok(segment.coverage.last().map_or(covered_to, |run| run.1))
}

fn expect_format(format: &str, version: u32, expected: &str) -> Result<()> {
    if format == expected && version == VERSION {
        return Ok(());
    }
    Err(Error::format(format!(
        "expected {expected:?} of version {VERSION}, found {format:?} of version {version}: use \
         the program that made it, or a newer one"
    )))
}

pub(super) fn expect_runs(runs: &[Run], geometry: Geometry, what: &str) -> Result<()> {
    let block = geometry.block_size().bytes();
    let mut at = 0;
    for &Run(start, end) in runs {
        let whole_blocks =
            start.is_multiple_of(block) && (end.is_multiple_of(block) || end == geometry.size());
        if start < at || start >= end || end > geometry.size() || !whole_blocks {
            return Err(Error::format(format!(
                "the {what} has an impossible run from {start} to {end}"
            )));
        }
        at = end;
    }
    Ok(())
}

const CHECK_START: &str = ",\n  \"check\": \"";
const CHECK_END: &str = "\"\n}\n";
/// CRC32C, a hyphen, BLAKE3, in hexadecimal digits.
const CHECK_DIGITS: usize = 8 + 1 + 64;
/// What is quoted of an error of the parser.
const WORDS_MAX: usize = 300;
const CHECK_BYTES: usize = CHECK_START.len() + CHECK_DIGITS + CHECK_END.len();
const MAC_START: &str = ",\n  \"mac\": \"";

fn check_of(text: &[u8]) -> String {
    format!("{:08x}-{}", crc32c::crc32c(text), blake3::hash(text).to_hex())
}

fn hex(hash: &HexHash) -> String {
    String::from(*hash)
}

/// All of a manifest before what ends every one.
fn text_of<T: Serialize>(manifest: &T) -> String {
    let mut json = serde_json::to_string_pretty(manifest).expect("plain structures become JSON");
    assert!(json.ends_with("\n}"), "a pretty object ends on a line of its own");
    json.truncate(json.len() - 2);
    json
}

/// A structure as JSON that ends with the checks of its text.
pub(super) fn encode_checked<T: Serialize>(manifest: &T) -> Vec<u8> {
    let text = text_of(manifest);
    format!("{text}{CHECK_START}{}{CHECK_END}", check_of(text.as_bytes())).into_bytes()
}

#[derive(Deserialize)]
struct Preamble {
    #[serde(deserialize_with = "name")]
    format: String,
    version: u32,
}

/// Such JSON, of a format that is named in it.
pub(super) fn decode_checked<T: DeserializeOwned>(bytes: &[u8], expected: &str) -> Result<T> {
    let damaged = || {
        Error::integrity(
            "the manifest is damaged or cut off: it does not end with a checksum that matches it; \
             copy it from the medium again",
        )
    };
    let body = bytes.strip_suffix(CHECK_END.as_bytes()).ok_or_else(damaged)?;
    let at = body.len().checked_sub(CHECK_DIGITS).ok_or_else(damaged)?;
    let (text, check) = body.split_at(at);
    let text = text.strip_suffix(CHECK_START.as_bytes()).ok_or_else(damaged)?;
    if check != check_of(text).as_bytes() {
        return Err(damaged());
    }
    let lists = text.iter().filter(|byte| **byte == b'[').count();
    if lists > BUNDLE_MANIFEST_LISTS_MAX {
        return Err(Error::format(format!(
            "expected a manifest of at most {BUNDLE_MANIFEST_LISTS_MAX} lists, found {lists}"
        )));
    }
    let refused = |error: serde_json::Error| {
        // It may quote the manifest, which may be long.
        let words: String = error.to_string().chars().take(WORDS_MAX).collect();
        Error::format(format!("the manifest is not one of {expected:?}: {words}"))
    };
    let whole = [text, b"\n}"].concat();
    let preamble: Preamble = serde_json::from_slice(&whole).map_err(refused)?;
    expect_format(&preamble.format, preamble.version, expected)?;
    serde_json::from_slice(&whole).map_err(refused)
}

#[cfg(test)]
mod tests;
