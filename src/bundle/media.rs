//! One bundle over any number of media: each is begun, filled, finished and durable before the
//! next is asked for.
//!
//! | step on a medium | a crash after it leaves |
//! |---|---|
//! | README, recover.py, `manifest.begin.json` | a medium to go on with, nothing stored |
//! | segments, each durable before the next is begun | the closed ones: the open one is lost |
//! | `report.json` | the same |
//! | `manifest.json`, renamed when durable | a finished medium |
//! | the host's record | the same: an examination finds out (`resume.rs`) |
//!
//! A medium is full when its stated size is used up, or when its file system says so: then the open
//! segment is taken away and what it held is read again for the next medium. Where the file system
//! tells how much it takes, the last segment is as small as what is left.
//!
//! Guarantees: a segment never spans media; a medium with a manifest is whole and can be read
//! without any other; the first byte that is not yet on a finished medium is known at any instant.
//! Does not know: who brings the media, where the record is kept.

use std::sync::Arc;

use super::assemble::{ENTRY_ROOM_BYTES, RUN_ROOM_BYTES, room_of};
use super::encryption::Encryption;
use super::members::{
    BEGIN_NAME, KEY_NAME, MANIFEST_NAME, README, README_NAME, RECOVER, RECOVER_NAME, REPORT_NAME,
    UNFINISHED_NAME,
};
use super::report::report_of;
use super::resume::{Found, examine, unreadable_of};
use super::selection::normalised;
use super::source::Source;
use super::writer::{
    BundleReport, End, Leg, Making, OnBundleProgress, WriterOptions, check, is_full, push_run,
    tell_stored,
};
use crate::clock::{Instant, MonotonicClock};
use crate::device::Folder;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    BeginManifest, BundleKey, Done, Hash, Manifest, MediumEntry, Run, SegmentEntry, SegmentHeader,
    UuidText, padded, segment_name,
};
use crate::limits::{
    BUNDLE_MEDIA_MAX, MEDIUM_SLACK_BYTES_MAX, MEDIUM_SLACK_BYTES_MIN, MEDIUM_SLACK_PART,
};
use crate::units::Geometry;

/// What the small files of a medium take beside the manifests: the report, and rounding.
const MEMBERS_ROOM_BYTES: u64 = 16 << 10;

/// A place for a part of a bundle.
#[derive(Clone, Debug)]
pub struct Medium {
    pub folder: Arc<dyn Folder>,
    /// Bytes that all files on it may take together; `None`: as many as it takes.
    pub bytes_max: Option<u64>,
}

/// The media at hand, in order.
pub trait Media {
    /// The medium with that number; `None`: there is no further one at hand. What it was asked for
    /// before is finished and no file of it is open.
    fn next(&mut self, number: u32) -> Result<Option<Medium>>;

    /// Whether there is one that wants to be written on even if nothing is left for it.
    fn has_more(&self) -> bool;
}

/// Remembers how far a bundle has come, durably, where it outlives this process.
pub trait Record {
    fn keep(&mut self, done: &Done) -> Result<()>;
}

/// Nobody goes on with this bundle later.
#[derive(Clone, Copy, Debug)]
pub struct NoRecord;

impl Record for NoRecord {
    fn keep(&mut self, _: &Done) -> Result<()> {
        Ok(())
    }
}

/// What is fixed when a bundle is begun: the same bytes on all of its media.
#[derive(Clone, Debug)]
pub struct BegunBundle {
    pub manifest: BeginManifest,
    pub bytes: Vec<u8>,
    pub hash: Hash,
    pub selection: Vec<ByteRange>,
    pub encryption: Option<Encryption>,
    geometry: Geometry,
}

impl BegunBundle {
    /// A new bundle of a source.
    pub fn new(source: &dyn Source, options: &WriterOptions) -> Result<Self> {
        let identity = source.identity();
        let chosen = options.allocated_only || options.base.is_some();
        let selection = match &options.selection[..] {
            [] if chosen => Vec::new(),
            ranges => normalised(ranges, identity.geometry)?,
        };
        let mut manifest = BeginManifest::new(
            options.bundle,
            identity.volume,
            identity.geometry,
            identity.generation,
            identity.cut,
        );
        manifest.snapshot = source.snapshot().map(UuidText);
        manifest.compression = options.compression.to_string();
        manifest.created_unix_s = options.created_unix_s;
        manifest.software.clone_from(&options.software);
        manifest.selection = selection.iter().map(|range| Run::from(*range)).collect();
        manifest.allocated_only = options.allocated_only;
        if let Some(base) = &options.base {
            manifest.go_on_from(base.clone());
        }
        if let Some(Encryption { key, .. }) = &options.encryption {
            manifest.encrypt(key);
        }
        Self::from_bytes(manifest.encode(), options.encryption.clone())
    }

    /// A bundle that was begun before.
    pub fn from_bytes(bytes: Vec<u8>, encryption: Option<Encryption>) -> Result<Self> {
        let manifest = BeginManifest::parse(&bytes)?;
        manifest.expect_key(encryption.as_ref().map(|how| &how.key))?;
        let geometry = manifest.geometry()?;
        let selection = manifest.selection.iter().map(|run| ByteRange::from(*run)).collect();
        let hash = *blake3::hash(&bytes).as_bytes();
        Ok(Self { manifest, bytes, hash, selection, encryption, geometry })
    }

    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The members that are on every medium alike.
    pub(super) fn members(&self) -> Vec<(&'static str, &[u8])> {
        let mut members =
            vec![(README_NAME, README), (RECOVER_NAME, RECOVER), (BEGIN_NAME, &self.bytes[..])];
        let wrapped = self.encryption.as_ref().map(|how| (KEY_NAME, &how.wrapped_key[..]));
        members.extend(wrapped);
        members
    }

    pub(super) fn key(&self) -> Option<&BundleKey> {
        self.encryption.as_ref().map(|how| &how.key)
    }

    /// The header of a segment, its salt left out.
    #[must_use]
    pub fn header(&self, segment: u32) -> SegmentHeader {
        SegmentHeader {
            bundle: self.manifest.bundle.0,
            volume: self.manifest.volume.map_or(uuid::Uuid::nil(), |volume| volume.0),
            geometry: self.geometry,
            generation: self.manifest.generation,
            cut: self.manifest.cut,
            base_cut: self.manifest.base.as_ref().map(|base| base.cut),
            segment,
            begin_hash: self.hash,
            salt: None,
        }
    }

    /// What of the selection lies at or after a position.
    #[must_use]
    pub fn rest(&self, position: u64) -> Vec<ByteRange> {
        let rest = ByteRange::new(position, u64::MAX - position);
        self.selection.iter().filter_map(|range| range.intersect(rest)).collect()
    }
}

/// Makes a bundle on the media as they come. What it lacks when they have run out is in the report.
pub fn write(
    source: &dyn Source,
    media: &mut dyn Media,
    options: &WriterOptions,
    record: &mut dyn Record,
    progress: OnBundleProgress<'_>,
) -> Result<BundleReport> {
    check(options)?;
    let begun = BegunBundle::new(source, options)?;
    write_on(source, media, options, (&begun, Done::default()), record, progress)
}

/// Goes on with a bundle of which so much is done.
pub fn write_on(
    source: &dyn Source,
    media: &mut dyn Media,
    options: &WriterOptions,
    (begun, done): (&BegunBundle, Done),
    record: &mut dyn Record,
    progress: OnBundleProgress<'_>,
) -> Result<BundleReport> {
    let mut writing = Writing::new(source, options, begun, done, progress);
    writing.over(media, record)?;
    Ok(writing.report())
}

/// Makes a bundle in one empty folder.
pub(super) fn write_in(
    folder: &dyn Folder,
    source: &dyn Source,
    options: &WriterOptions,
    progress: OnBundleProgress<'_>,
) -> Result<BundleReport> {
    check(options)?;
    let begun = BegunBundle::new(source, options)?;
    let mut writing = Writing::new(source, options, &begun, Done::default(), progress);
    writing.begin(folder)?;
    writing.fill(folder, None, false, Vec::new())?;
    if writing.is_complete() {
        return Ok(writing.report());
    }
    let full = std::io::Error::from_raw_os_error(28);
    Err(Error::device("write", &full).at_path(folder.path()))
}

struct Writing<'a> {
    source: &'a dyn Source,
    options: &'a WriterOptions,
    begun: &'a BegunBundle,
    making: Making<'a>,
    /// As of the last finished medium.
    done: Done,
    /// What lies before it the source may have given up.
    told: u64,
    clock: MonotonicClock,
    began: Instant,
}

impl<'a> Writing<'a> {
    fn new(
        source: &'a dyn Source,
        options: &'a WriterOptions,
        begun: &'a BegunBundle,
        done: Done,
        progress: OnBundleProgress<'a>,
    ) -> Self {
        let clock = MonotonicClock::default();
        let total = begun.selection.iter().map(|range| range.length).sum();
        let mut making = Making::new(clock, total, progress);
        making.stored(done.stored_bytes);
        let began = clock.now();
        let told = done.position;
        Self { source, options, begun, making, done, told, clock, began }
    }

    fn is_complete(&self) -> bool {
        self.begun.rest(self.done.position).is_empty()
    }

    fn over(&mut self, media: &mut dyn Media, record: &mut dyn Record) -> Result<()> {
        while !self.is_complete() || (media.has_more() && !self.done.sealed) {
            let number = self.done.media + 1;
            if number > BUNDLE_MEDIA_MAX {
                return Err(Error::usage(format!(
                    "expected at most {BUNDLE_MEDIA_MAX} media of one bundle: take larger ones"
                )));
            }
            let Some(medium) = media.next(number)? else { return Ok(()) };
            let folder = &*medium.folder;
            let found = examine(folder, self.begun, &self.done)
                .map_err(|error| error.within(folder.path()))?;
            let finished = match found {
                Found::Earlier => continue,
                Found::Finished(manifest) => {
                    self.advance(&manifest);
                    *manifest
                }
                Found::Begun(held) => {
                    // Of all but the last of them it may have been told before a crash.
                    if let [.., first, _] = &held[..] {
                        self.told = start_of(first);
                    }
                    for entry in held.iter().filter(|entry| entry.unreadable_bytes > 0) {
                        for range in unreadable_of(folder, self.begun, entry)? {
                            push_run(&mut self.making.unreadable, range);
                        }
                    }
                    self.begin(folder).map_err(|error| explain(error, folder))?;
                    self.fill(folder, medium.bytes_max, media.has_more(), held)?
                }
            };
            record.keep(&self.done)?;
            finished.segments.iter().for_each(|segment| tell_stored(self.source, segment));
            self.told = self.done.position;
        }
        Ok(())
    }

    /// Writes what is on every medium alike, where it is not there yet.
    fn begin(&self, folder: &dyn Folder) -> Result<()> {
        let names = folder.names()?;
        for (name, bytes) in self.begun.members() {
            if names.iter().any(|held| held == name) {
                folder.remove(name)?;
            }
            write_member(folder, name, bytes)?;
        }
        folder.flush()
    }

    /// Stores what the medium takes after the segments that it holds, and finishes it; what is on
    /// it then.
    fn fill(
        &mut self,
        folder: &dyn Folder,
        bytes_max: Option<u64>,
        more: bool,
        mut segments: Vec<SegmentEntry>,
    ) -> Result<Manifest> {
        self.store(folder, bytes_max, &mut segments)?;
        loop {
            let position = end_of(&segments, self.done.position);
            let complete = self.begun.rest(position).is_empty();
            if segments.is_empty() && !complete {
                self.take_back(folder);
                return Err(too_small(folder));
            }
            let manifest = self.manifest(&segments, complete && !more);
            match self.finish(folder, &manifest) {
                Ok(()) => {
                    self.advance(&manifest);
                    return Ok(manifest);
                }
                Err(error) if is_full(&error) && self.may_take_back(segments.last()) => {
                    // Something else took the room that was left for it.
                    folder.remove(UNFINISHED_NAME)?;
                    folder.remove(REPORT_NAME)?;
                    let Some(last) = segments.pop() else { return Err(error) };
                    folder.remove(&last.name)?;
                    folder.flush()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn store(
        &mut self,
        folder: &dyn Folder,
        bytes_max: Option<u64>,
        segments: &mut Vec<SegmentEntry>,
    ) -> Result<()> {
        let mut less = None;
        loop {
            let position = end_of(segments, self.done.position);
            self.making.unreadable.retain(|range| range.offset < position);
            let selection = self.begun.rest(position);
            if selection.is_empty() {
                return Ok(());
            }
            let number = self.done.segment + segments.len() as u32;
            let room = self.room(folder, bytes_max, segments)?;
            let leg = Leg {
                selection,
                header: self.begun.header(number),
                room: [room, less].into_iter().flatten().min(),
            };
            let passed = self.making.pass(folder, self.source, self.options, leg)?;
            let told = passed.closed[..passed.told].last();
            self.told = told.map_or(self.told, end_of_one);
            segments.extend(passed.closed);
            match passed.end {
                End::Complete => {}
                End::NoRoom => return Ok(()),
                End::Failed(error) => return Err(error),
                End::Full { reached } => {
                    let open = self.done.segment + segments.len() as u32;
                    folder.remove(&segment_name(open))?;
                    folder.flush()?;
                    if less.is_some() {
                        return Ok(());
                    }
                    // Once more with what was there, less what the file system keeps for itself.
                    less = Some(reached.saturating_sub(reached / 32 + MEDIUM_SLACK_BYTES_MIN));
                }
            }
        }
    }

    /// Bytes that further segments of the medium and their entries may take.
    fn room(
        &self,
        folder: &dyn Folder,
        bytes_max: Option<u64>,
        segments: &[SegmentEntry],
    ) -> Result<Option<u64>> {
        let begin = padded(self.begun.bytes.len() as u64);
        let unreadable = RUN_ROOM_BYTES * self.making.unreadable.len() as u64;
        // The manifest repeats the begun one, indented.
        let manifest = 2 * begin + unreadable + MEMBERS_ROOM_BYTES;
        let by_size = bytes_max.map(|max| {
            let members = self.begun.members();
            let common: u64 = members.iter().map(|(_, bytes)| padded(bytes.len() as u64)).sum();
            let held: u64 = segments.iter().map(room_of).sum();
            max.saturating_sub(common + manifest + held)
        });
        let by_space = folder.free_bytes()?.map(|free| {
            let slack =
                (free / MEDIUM_SLACK_PART).clamp(MEDIUM_SLACK_BYTES_MIN, MEDIUM_SLACK_BYTES_MAX);
            let entries: u64 = segments
                .iter()
                .map(|entry| ENTRY_ROOM_BYTES + RUN_ROOM_BYTES * entry.coverage.len() as u64)
                .sum();
            free.saturating_sub(slack + manifest + entries)
        });
        Ok([by_size, by_space].into_iter().flatten().min())
    }

    fn manifest(&self, segments: &[SegmentEntry], last: bool) -> Manifest {
        let begin = self.begun.manifest.clone();
        let mut manifest = Manifest::new(begin, self.begun.hash, segments.to_vec());
        let number = self.done.media + 1;
        if number > 1 || !last {
            manifest.medium = Some(MediumEntry { number, last });
        }
        let end = end_of(segments, self.done.position);
        let here = self.making.unreadable.iter().filter(|range| range.offset < end);
        manifest.unreadable = here.map(|range| Run::from(*range)).collect();
        manifest
    }

    fn finish(&self, folder: &dyn Folder, manifest: &Manifest) -> Result<()> {
        for name in [REPORT_NAME, UNFINISHED_NAME] {
            folder.remove(name)?;
        }
        folder.flush()?;
        write_member(folder, REPORT_NAME, &report_of(manifest))?;
        write_member(folder, UNFINISHED_NAME, &manifest.encode(self.begun.key()))?;
        folder.rename(UNFINISHED_NAME, MANIFEST_NAME)?;
        folder.flush()
    }

    /// Whether what a segment holds can be read from the source once more.
    fn may_take_back(&self, segment: Option<&SegmentEntry>) -> bool {
        !self.source.gives_up() || segment.is_none_or(|one| start_of(one) >= self.told)
    }

    /// Takes a finished medium into account.
    fn advance(&mut self, manifest: &Manifest) {
        self.done.add(manifest);
        self.making.unreadable.clear();
        self.making.stored(self.done.stored_bytes);
    }

    /// Removes what was begun on a medium that turned out to be of no use; what cannot be removed
    /// stays.
    fn take_back(&self, folder: &dyn Folder) {
        for name in [REPORT_NAME, UNFINISHED_NAME] {
            let _removed = folder.remove(name);
        }
        for (name, _) in self.begun.members() {
            let _removed = folder.remove(name);
        }
    }

    fn report(self) -> BundleReport {
        let left = self.begun.rest(self.done.position);
        let Done { media, chunks, data_bytes, zero_bytes, .. } = self.done;
        BundleReport {
            bundle: self.begun.manifest.bundle.0,
            segments: self.done.segment.into(),
            chunks,
            bytes_selected: self.begun.selection.iter().map(|range| range.length).sum(),
            bytes_data: data_bytes,
            bytes_zero: zero_bytes,
            bytes_unreadable: self.done.unreadable_bytes,
            bytes_stored: self.done.stored_bytes,
            bytes_saved: data_bytes.saturating_sub(self.done.stored_bytes),
            chunks_compressed: self.making.chunks_compressed,
            chunks_untried: self.making.chunks_untried(),
            unreadable: self.done.unreadable.iter().map(|run| ByteRange::from(*run)).collect(),
            media,
            bytes_left: left.iter().map(|range| range.length).sum(),
            seconds: self.clock.now().since_ms(self.began) as f64 / 1000.0,
        }
    }
}

/// The first byte after what the segments speak of.
fn end_of(segments: &[SegmentEntry], position: u64) -> u64 {
    segments.last().map_or(position, end_of_one)
}

fn end_of_one(segment: &SegmentEntry) -> u64 {
    segment.coverage.last().map_or(0, |run| run.1)
}

fn start_of(segment: &SegmentEntry) -> u64 {
    segment.coverage.first().map_or(u64::MAX, |run| run.0)
}

fn write_member(folder: &dyn Folder, name: &str, bytes: &[u8]) -> Result<()> {
    let file = folder.create(name)?;
    file.write_at(0, bytes)?;
    file.flush()
}

fn explain(error: Error, folder: &dyn Folder) -> Error {
    if is_full(&error) { too_small(folder) } else { error }
}

fn too_small(folder: &dyn Folder) -> Error {
    Error::new(
        ErrorKind::Device,
        "expected a medium that takes at least one segment of the bundle, found no room for it \
         (some 4 MiB, more where the selection has many ranges): empty it, or take a larger one",
    )
    .with_errno(28)
    .at_path(folder.path())
}
