//! A finished bundle in a folder: checked when opened, read chunk by chunk.
//!
//! Guarantees: an open bundle has every segment that its manifest names, each of the stated size
//! and with a header that agrees on whose bytes they are; what lies in the coverage of a segment
//! and has no readable descriptor is given as missing, never as zero (law 8).
//! Does not know: targets.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::members::{BEGIN_NAME, MANIFEST_NAME, is_needed};
use super::pieces::{Content, Piece, PieceSource};
use super::segment_reader::{SegmentReader, read_header};
use super::source::Identity;
use crate::device::{FileFolder, Folder, FolderFile, TarIndex};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    BeginManifest, BundleKey, Checks, Manifest, SegmentEntry, SegmentHeader, locked,
};
use crate::limits::BUNDLE_MANIFEST_BYTES_MAX;
use crate::units::Geometry;

/// See the module.
#[derive(Clone, Debug)]
pub struct Bundle {
    folder: Arc<dyn Folder>,
    manifest: Manifest,
    geometry: Geometry,
    key: Option<BundleKey>,
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

    pub fn open_in(folder: Arc<dyn Folder>) -> Result<Self> {
        Self::open_in_with(folder, None)
    }

    pub fn open_in_with(folder: Arc<dyn Folder>, key: Option<&BundleKey>) -> Result<Self> {
        let (manifest, bytes) = read_manifest(folder.as_ref())?;
        let within = |error: Error| error.within(&folder.path().join(MANIFEST_NAME));
        manifest.begin.expect_key(key).map_err(|error| error.within(folder.path()))?;
        if let Some(key) = key {
            manifest.check_mac(&bytes, key).map_err(within)?;
        }
        Self::checked(folder, manifest, key.cloned())
    }

    /// To look at what its manifest says: the chunks of an encrypted one cannot be had, and nothing
    /// proves who wrote it.
    pub fn look(path: &Path) -> Result<Self> {
        let folder = folder_at(path)?;
        let (manifest, _) = read_manifest(folder.as_ref())?;
        Self::checked(folder, manifest, None)
    }

    fn checked(
        folder: Arc<dyn Folder>,
        manifest: Manifest,
        key: Option<BundleKey>,
    ) -> Result<Self> {
        let geometry = manifest.begin.geometry()?;
        let bundle = Self { folder, manifest, geometry, key };
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

    /// The header that a segment should have, the salt left out.
    fn expected_header(&self, number: u32) -> SegmentHeader {
        let identity = self.identity();
        SegmentHeader {
            bundle: self.uuid(),
            volume: identity.volume,
            geometry: identity.geometry,
            generation: identity.generation,
            cut: identity.cut,
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
        let (header, hash) = read_header(file.as_ref()).map_err(located)?;
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
            return Err(located(Error::integrity(
                "the header of the segment is not the one that the manifest vouches for",
            )));
        }
        Ok(())
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
        let checks = self.checks_of(entry, file.as_ref())?;
        SegmentReader::open(file, entry.number, self.geometry, Arc::new(checks))
    }

    pub(super) fn checks_of(&self, entry: &SegmentEntry, file: &dyn FolderFile) -> Result<Checks> {
        if !self.manifest.begin.is_encrypted() {
            return Ok(Checks::plain(entry.header_hash.0));
        }
        let (header, hash) = read_header(file)?;
        let key =
            self.key.as_ref().ok_or_else(|| locked("the bundle was opened without its key"))?;
        header.checks(hash, Some(key))
    }

    /// Whether `manifest.begin.json` is the one that the bundle was begun with.
    pub fn check_begin(&self) -> Result<()> {
        let bytes = read_member(self.folder.as_ref(), BEGIN_NAME)?;
        let begin = BeginManifest::parse(&bytes)?;
        let same = *blake3::hash(&bytes).as_bytes() == self.manifest.begin_hash.0
            && begin == self.manifest.begin;
        if same { Ok(()) } else { Err(Error::integrity("it is not of this bundle")) }
    }
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

    fn bytes_total(&self) -> u64 {
        let runs = self.manifest.segments.iter().flat_map(|segment| &segment.coverage);
        runs.map(|run| run.1 - run.0).sum()
    }

    fn answers_at_once(&self) -> bool {
        self.folder.answers_at_once()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        Box::new(Pieces {
            bundle: self,
            segments: self.manifest.segments.iter(),
            current: None,
            queue: VecDeque::new(),
            found: Vec::new(),
        })
    }
}

fn read_member(folder: &dyn Folder, name: &str) -> Result<Vec<u8>> {
    let file = folder.open(name)?;
    let length = file.length()?;
    if length > BUNDLE_MANIFEST_BYTES_MAX {
        return Err(Error::format(format!(
            "expected a manifest of at most {BUNDLE_MANIFEST_BYTES_MAX} bytes, found {length}"
        ))
        .at_path(&folder.path().join(name)));
    }
    let mut bytes = vec![0; usize::try_from(length).expect("checked above")];
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

fn read_manifest(folder: &dyn Folder) -> Result<(Manifest, Vec<u8>)> {
    let path = folder.path().join(MANIFEST_NAME);
    match read_member(folder, MANIFEST_NAME) {
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

/// All pieces of a bundle: segment by segment as stored, then what each segment lacks.
struct Pieces<'a> {
    bundle: &'a Bundle,
    segments: std::slice::Iter<'a, SegmentEntry>,
    current: Option<(&'a SegmentEntry, SegmentReader)>,
    queue: VecDeque<Piece>,
    /// Runs of the current segment that have a descriptor.
    found: Vec<ByteRange>,
}

impl Pieces<'_> {
    /// Puts the pieces of the next batch, or the gaps of a finished segment, into the queue.
    /// `false` at the end of the bundle.
    fn refill(&mut self) -> Result<bool> {
        let Some((entry, reader)) = &mut self.current else {
            let Some(entry) = self.segments.next() else { return Ok(false) };
            self.current = Some((entry, self.bundle.read_segment(entry)?));
            return Ok(true);
        };
        if let Some(found) = reader.next_batch() {
            for piece in found.pieces(reader.file()) {
                match self.found.last_mut() {
                    Some(last) if last.end() == piece.range.offset => {
                        last.length += piece.range.length;
                    }
                    _ => self.found.push(piece.range),
                }
                self.queue.push_back(piece);
            }
        } else {
            self.found.sort_unstable();
            let coverage = entry.coverage.iter().map(|run| ByteRange::from(*run));
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

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                return Some(Ok(piece));
            }
            match self.refill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.current = None;
                    self.segments = [].iter();
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
