//! A finished bundle in a folder: checked when opened, read chunk by chunk.
//!
//! Guarantees: an open bundle has every segment that its manifest names, each of the stated size
//! and with a header that agrees on whose bytes they are or is damaged; what lies in the coverage
//! of a segment and has no readable descriptor is given as missing, never as zero (law 8).
//! Does not know: targets.

use std::collections::VecDeque;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::members::{BEGIN_NAME, KEY_NAME, MANIFEST_NAME, is_needed};
use super::pieces::{Content, Piece, PieceSource};
use super::segment_reader::{SegmentReader, read_header};
use super::source::{Identity, Lineage};
use super::trust::Trust;
use crate::device::{FileFolder, Folder, FolderFile, TarIndex};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    BeginManifest, BundleKey, Checks, Manifest, Run, SegmentEntry, SegmentHeader, locked,
};
use crate::format::frames::CutName;
use crate::limits::{
    BUNDLE_KEY_FILE_BYTES_MAX, BUNDLE_MANIFEST_BYTES_MAX, BUNDLE_SELECTION_RUNS_MAX,
};
use crate::units::{Cut, Geometry};

/// Separate runs that a segment may describe: those of its coverage, and what damage adds to them.
const FOUND_RUNS_MAX: usize = 2 * BUNDLE_SELECTION_RUNS_MAX;

/// See the module.
#[derive(Clone, Debug)]
pub struct Bundle {
    folder: Arc<dyn Folder>,
    manifest: Manifest,
    geometry: Geometry,
    trust: Trust,
}

impl Bundle {
    /// Opens the bundle in a directory, or in a tar (a file, or a disk that it was written to). It
    /// must not be encrypted.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, None)
    }

    /// The same: with its key if it is encrypted, and only then.
    pub fn open_with(path: &Path, key: Option<&BundleKey>) -> Result<Self> {
        Self::open_in_with(folder_at(path)?, key)
    }

    /// Whether it is a tar in which no manifest was found: one that was cut off.
    pub fn is_cut_off(path: &Path) -> Result<bool> {
        if path.is_dir() || !TarIndex::is_one(path)? {
            return Ok(false);
        }
        Ok(!TarIndex::open(path, is_needed)?.has(MANIFEST_NAME))
    }

    /// What wraps the key of the bundle in a tar; `None`: it is no tar, or has none.
    pub fn key_of_tar(path: &Path) -> Result<Option<Vec<u8>>> {
        if path.is_dir() || !TarIndex::is_one(path)? {
            return Ok(None);
        }
        let tar = TarIndex::open(path, is_needed)?;
        if !tar.has(KEY_NAME) {
            return Ok(None);
        }
        read_member(&tar, KEY_NAME, BUNDLE_KEY_FILE_BYTES_MAX).map(Some)
    }

    pub fn open_in(folder: Arc<dyn Folder>) -> Result<Self> {
        Self::open_in_with(folder, None)
    }

    pub fn open_in_with(folder: Arc<dyn Folder>, key: Option<&BundleKey>) -> Result<Self> {
        Self::open_in_trusting(folder, Trust::of_key(key))
    }

    /// Opens the bundle in a directory or a tar, and holds it to what is known of it.
    pub fn open_trusting(path: &Path, trust: Trust) -> Result<Self> {
        Self::open_in_trusting(folder_at(path)?, trust)
    }

    pub fn open_in_trusting(folder: Arc<dyn Folder>, trust: Trust) -> Result<Self> {
        let (manifest, bytes) = read_manifest(folder.as_ref())?;
        let within = |error: Error| error.within(&folder.path().join(MANIFEST_NAME));
        trust.check(&manifest, &bytes).map_err(within)?;
        Self::checked(folder, manifest, trust)
    }

    /// To look at what its manifest says: the chunks of an encrypted one cannot be had, and nothing
    /// proves who wrote it.
    pub fn look(path: &Path) -> Result<Self> {
        let folder = folder_at(path)?;
        let (manifest, _) = read_manifest(folder.as_ref())?;
        Self::checked(folder, manifest, Trust::default())
    }

    fn checked(folder: Arc<dyn Folder>, manifest: Manifest, trust: Trust) -> Result<Self> {
        let geometry = manifest.begin.geometry()?;
        let bundle = Self { folder, manifest, geometry, trust };
        for segment in &bundle.manifest.segments {
            bundle.check_segment(segment)?;
        }
        Ok(bundle)
    }

    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.manifest.begin.bundle.0
    }

    /// What it was to include, ascending.
    #[must_use]
    pub fn selection(&self) -> Vec<ByteRange> {
        self.manifest.begin.selection.iter().map(|run| ByteRange::from(*run)).collect()
    }

    #[must_use]
    pub fn segments(&self) -> &[SegmentEntry] {
        &self.manifest.segments
    }

    #[must_use]
    pub fn folder(&self) -> &dyn Folder {
        self.folder.as_ref()
    }

    /// Whether only what its manifest vouches for is believed.
    pub(super) fn is_signed(&self) -> bool {
        self.trust.is_signed()
    }

    /// The header that a segment should have, the salt left out.
    fn expected_header(&self, number: u32) -> SegmentHeader {
        let identity = self.identity();
        SegmentHeader {
            bundle: self.uuid(),
            volume: identity.volume,
            geometry: identity.geometry,
            generation: identity.generation,
            cut: identity.cut,
            base_cut: self.manifest.begin.base.as_ref().map(|base| base.cut),
            segment: number,
            begin_hash: self.manifest.begin_hash.0,
            salt: None,
        }
    }

    fn check_segment(&self, entry: &SegmentEntry) -> Result<()> {
        let path = self.folder.path().join(&entry.name);
        let located = |error: Error| error.at_path(&path);
        let file = self.open_segment(entry)?;
        let length = file.length()?;
        if length != entry.bytes {
            return Err(located(Error::integrity(format!(
                "expected a segment of {} bytes, found {length}: it was cut off or changed; \
                 copy it from the medium again",
                entry.bytes
            ))));
        }
        let (header, hash) = match read_header(file.as_ref()) {
            Ok(found) => found,
            // Nothing of it is needed: every page of the segment names it by its hash, which the
            // manifest knows. Of an encrypted one it has the salt of the keys.
            Err(error) if is_damage(&error) && !self.manifest.begin.is_encrypted() => return Ok(()),
            Err(error) => return Err(located(error)),
        };
        let expected = self.expected_header(entry.number);
        if header.salt.is_some() != self.manifest.begin.is_encrypted() {
            let state = |encrypted| if encrypted { "an encrypted" } else { "a plain" };
            return Err(located(Error::identity(format!(
                "expected {} segment, found {} one: it is not of this bundle",
                state(self.manifest.begin.is_encrypted()),
                state(header.salt.is_some())
            ))));
        }
        if (SegmentHeader { salt: None, ..header }) != expected {
            return Err(located(Error::identity(format!(
                "expected segment {} of bundle {} of volume {}, generation {}, cut {}; \
                 found segment {} of bundle {} of volume {}, generation {}, cut {}",
                expected.segment,
                expected.bundle,
                expected.volume,
                expected.generation,
                expected.cut,
                header.segment,
                header.bundle,
                header.volume,
                header.generation,
                header.cut
            ))));
        }
        if hash != entry.header_hash.0 {
            return Err(located(Error::identity(
                "the header of the segment is not the one that the manifest vouches for: bring \
                 the segment that belongs to this manifest",
            )));
        }
        Ok(())
    }

    /// Whether the header of a segment can be read and is the one that the manifest vouches for.
    pub fn check_header(&self, entry: &SegmentEntry) -> Result<()> {
        let (_, hash) = read_header(self.open_segment(entry)?.as_ref())?;
        let same = hash == entry.header_hash.0;
        if same { Ok(()) } else { Err(Error::integrity("it is not of this bundle")) }
    }

    fn open_segment(&self, entry: &SegmentEntry) -> Result<Arc<dyn FolderFile>> {
        self.folder.open(&entry.name).map_err(|error| {
            if error.errno() == Some(2) {
                let words =
                    "a segment that the manifest names is not there: copy it from the medium";
                Error::integrity(words).at_path(&self.folder.path().join(&entry.name))
            } else {
                error
            }
        })
    }

    /// Goes through the batches of one segment.
    pub fn read_segment(&self, entry: &SegmentEntry) -> Result<SegmentReader> {
        let file = self.open_segment(entry)?;
        let checks = Arc::new(self.checks_of(entry)?);
        let reader = SegmentReader::open(file, entry.number, self.geometry, checks)?;
        Ok(if self.trust.is_signed() { reader.held_to(entry.root.0) } else { reader })
    }

    pub(super) fn checks_of(&self, entry: &SegmentEntry) -> Result<Checks> {
        let hash = entry.header_hash.0;
        match (&entry.salt, &self.trust.key) {
            (None, _) => Ok(Checks::plain(hash)),
            (Some(salt), Some(key)) => Ok(Checks::encrypted(hash, key, &salt.0, entry.number)),
            (Some(_), None) => Err(locked("the bundle was opened without its key")),
        }
    }

    /// Whether `manifest.begin.json` is the one that the bundle was begun with.
    pub fn check_begin(&self) -> Result<()> {
        let bytes = read_member(self.folder.as_ref(), BEGIN_NAME, BUNDLE_MANIFEST_BYTES_MAX)?;
        let begin = BeginManifest::parse(&bytes)?;
        let same = *blake3::hash(&bytes).as_bytes() == self.manifest.begin_hash.0
            && begin == self.manifest.begin;
        if same { Ok(()) } else { Err(Error::integrity("it is not of this bundle")) }
    }
}

/// What an incremental bundle goes on from.
pub(super) fn lineage_of(begin: &BeginManifest) -> Option<Lineage> {
    let base = begin.base.as_ref()?;
    let ranges = |runs: &[Run]| runs.iter().map(|run| ByteRange::from(*run)).collect();
    Some(Lineage {
        cut: Cut { generation: begin.generation, sequence: begin.cut },
        base: Cut { generation: base.generation, sequence: base.cut },
        selection: ranges(&begin.selection),
        scope: base.scope.as_ref().map(|runs| ranges(runs)),
    })
}

/// The cut that a bundle is of, as the link knows it.
pub(super) fn cut_name(begin: &BeginManifest) -> Option<CutName> {
    let snapshot = begin.snapshot.filter(|_| begin.volume.is_some())?.0;
    Some(CutName { snapshot, generation: begin.generation, sequence: begin.cut })
}

/// The folder that a bundle lies in.
fn folder_at(path: &Path) -> Result<Arc<dyn Folder>> {
    if !path.is_dir() && TarIndex::is_one(path)? {
        return Ok(Arc::new(TarIndex::open(path, is_needed)?));
    }
    Ok(Arc::new(FileFolder::open(path)?))
}

impl PieceSource for Bundle {
    fn name(&self) -> String {
        format!("bundle {}", self.folder.path().display())
    }

    fn identity(&self) -> Identity {
        let begin = &self.manifest.begin;
        Identity {
            volume: begin.volume.map_or(Uuid::nil(), |volume| volume.0),
            geometry: self.geometry,
            generation: begin.generation,
            cut: begin.cut,
        }
    }

    fn lineage(&self) -> Option<Lineage> {
        lineage_of(&self.manifest.begin)
    }

    fn cut_name(&self) -> Option<CutName> {
        cut_name(&self.manifest.begin)
    }

    fn bytes_total(&self) -> u64 {
        let runs = self.manifest.segments.iter().flat_map(|segment| &segment.coverage);
        runs.map(|run| run.1 - run.0).sum()
    }

    fn answers_at_once(&self) -> bool {
        self.folder.answers_at_once()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let segments = self.manifest.segments.len();
        Box::new(Pieces::of((0..segments).map(move |segment| (self, segment))))
    }
}

/// Whether bytes are damaged or cannot be read, rather than of something else.
fn is_damage(error: &Error) -> bool {
    error.kind() == ErrorKind::Integrity || error.kind() == ErrorKind::Device
}

pub(super) fn read_member(folder: &dyn Folder, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
    let file = folder.open(name)?;
    let length = file.length()?;
    if length > bytes_max {
        return Err(Error::format(format!(
            "expected at most {bytes_max} bytes, found {length}: copy it again"
        ))
        .at_path(&folder.path().join(name)));
    }
    let mut bytes = vec![0; usize::try_from(length).expect("checked above")];
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

pub(super) fn read_manifest(folder: &dyn Folder) -> Result<(Manifest, Vec<u8>)> {
    let path = folder.path().join(MANIFEST_NAME);
    match read_member(folder, MANIFEST_NAME, BUNDLE_MANIFEST_BYTES_MAX) {
        Ok(bytes) => match Manifest::parse(&bytes) {
            Ok(manifest) => Ok((manifest, bytes)),
            Err(error) => Err(error.at_path(&path)),
        },
        Err(error) if error.errno() == Some(2) => {
            let names = folder.names()?;
            let begun = names.iter().any(|name| name == BEGIN_NAME);
            Err(Error::format(if begun {
                "the bundle is unfinished: it was begun, but has no manifest.json yet; \
                 let it finish, or make it again"
            } else {
                "expected a bundle, found a directory without manifest.json: name the directory \
                 that holds it"
            })
            .at_path(folder.path()))
        }
        Err(error) => Err(error),
    }
}

/// Pieces of segments: segment by segment as stored, then what each segment lacks. A segment is
/// named by a bundle and its place in the manifest there.
pub(super) struct Pieces<B, S> {
    segments: S,
    current: Option<(B, usize, SegmentReader)>,
    queue: VecDeque<Piece>,
    /// Runs of the current segment that have a descriptor.
    found: Vec<ByteRange>,
    failed: bool,
}

impl<B: Deref<Target = Bundle>, S: Iterator<Item = (B, usize)>> Pieces<B, S> {
    pub(super) fn of(segments: S) -> Self {
        let (queue, found) = (VecDeque::new(), Vec::new());
        Self { segments, current: None, queue, found, failed: false }
    }

    /// Puts the pieces of the next batch, or the gaps of a finished segment, into the queue.
    /// `false` at the end.
    fn refill(&mut self) -> Result<bool> {
        let Some((bundle, segment, reader)) = &mut self.current else {
            let Some((bundle, segment)) = self.segments.next() else { return Ok(false) };
            let reader = bundle.read_segment(&bundle.segments()[segment])?;
            self.current = Some((bundle, segment, reader));
            return Ok(true);
        };
        if let Some(found) = reader.next_batch() {
            for piece in found.pieces(reader.file()) {
                let full = self.found.len() == FOUND_RUNS_MAX;
                match self.found.last_mut() {
                    Some(last) if last.end() == piece.range.offset => {
                        last.length += piece.range.length;
                    }
                    _ if full => {
                        return Err(Error::format("a segment describes too many separate runs"));
                    }
                    _ => self.found.push(piece.range),
                }
                self.queue.push_back(piece);
            }
        } else {
            reader.check_presence()?;
            self.found.sort_unstable();
            let coverage = &bundle.segments()[*segment].coverage;
            let coverage = coverage.iter().map(|run| ByteRange::from(*run));
            let content = Content::Missing("the page that describes it is damaged");
            for range in gaps(coverage, &self.found) {
                self.queue.push_back(Piece { range, content: content.clone() });
            }
            self.found.clear();
            self.current = None;
        }
        Ok(true)
    }
}

/// The parts of `coverage` that lie in none of `found`; both ascend.
pub(super) fn gaps(
    coverage: impl Iterator<Item = ByteRange>,
    found: &[ByteRange],
) -> Vec<ByteRange> {
    let mut gaps = Vec::new();
    for run in coverage {
        let first = found.partition_point(|one| one.end() <= run.offset);
        let mut at = run.offset;
        for one in found[first..].iter().take_while(|one| one.offset < run.end()) {
            if one.offset > at {
                gaps.push(ByteRange::new(at, one.offset - at));
            }
            at = at.max(one.end());
        }
        if at < run.end() {
            gaps.push(ByteRange::new(at, run.end() - at));
        }
    }
    gaps
}

impl<B: Deref<Target = Bundle>, S: Iterator<Item = (B, usize)>> Iterator for Pieces<B, S> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                return Some(Ok(piece));
            }
            if self.failed {
                return None;
            }
            match self.refill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_no_found_run_covers() {
        let run = |start: u64, end: u64| ByteRange::new(start, end - start);
        let coverage = [run(0, 10), run(20, 30), run(40, 50)];
        let found = [run(2, 5), run(8, 25), run(40, 50)];
        assert_eq!(gaps(coverage.into_iter(), &found), [run(0, 2), run(5, 8), run(25, 30)]);
        assert_eq!(gaps(coverage.into_iter(), &[]), coverage);
    }
}
