//! Makes a bundle: reads ahead in one thread, encodes in others, assembles on the caller's, writes
//! in one more. What is here is one pass of that over the rest of the selection; `media.rs` says
//! where it goes, and how many passes it takes.
//!
//! | a pass ends | then |
//! |---|---|
//! | at the end of the selection | the bundle is complete |
//! | because the next chunk does not fit the room that was stated | the medium is full |
//! | because a write failed for want of space | the open segment is to be discarded |
//! | by any other error, or on request | the closed segments stay, to be gone on with |
//!
//! Guarantees: a segment counts as closed once it is durable; memory is bounded by `MEMORY_BYTES`
//! and the selection's runs, whatever the size of the volume; a source that cannot be read becomes
//! an unreadable chunk, never zeros, never an earlier chunk's bytes.
//! Does not know: the date (its caller states it), what the source is.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, Scope};

use crossbeam_channel::{Receiver, Sender, bounded};
use uuid::Uuid;

use super::assemble::{Assembler, Outlet, STAGING_BYTES};
use super::carrying::carry_out;
use super::encode::{Compression, Encoder, Part};
use super::encryption::Encryption;
use super::media::write_in;
use super::pace::{Pace, Stage};
use super::selection::{Stretches, normalised, zero_grain};
use super::source::{Identity, Source};
use crate::clock::{Instant, MonotonicClock};
use crate::device::{AlignedBuffer, FileFolder, Folder};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{BaseCut, ChunkKind, SegmentEntry, SegmentHeader};
use crate::limits::{
    BUNDLE_CHUNK_BYTES_MAX, BUNDLE_CHUNKS_AHEAD, BUNDLE_NAME_BYTES_MAX, BUNDLE_SEGMENT_BYTES_MAX,
    BUNDLE_SEGMENT_BYTES_MIN, BUNDLE_SEGMENTS_HELD_BACK, PROGRESS_INTERVAL_MS, REPORT_RUNS_MAX,
};

const CHUNK: usize = BUNDLE_CHUNK_BYTES_MAX as usize;
/// A slot holds a chunk and its compressed form: one huge page.
const SLOT_BYTES: usize = 2 * CHUNK;
/// One is filled while the other is written.
const STAGINGS: usize = 2;
/// Memory of one writer.
pub const MEMORY_BYTES: usize = BUNDLE_CHUNKS_AHEAD * SLOT_BYTES + STAGINGS * STAGING_BYTES;

/// How a bundle is made.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Whole blocks of the volume; empty: all of it, or nothing if that is what was left of a
    /// choice (`allocated_only`, `base`).
    pub selection: Vec<ByteRange>,
    /// The selection leaves holes of the source out.
    pub allocated_only: bool,
    /// The selection is what changed since then.
    pub base: Option<BaseCut>,
    pub compression: Compression,
    /// Its key is of the bundle named here.
    pub encryption: Option<Encryption>,
    pub bundle: Uuid,
    /// Seconds since 1970, 0 if unknown.
    pub created_unix_s: u64,
    /// What made it, for humans.
    pub software: String,
    pub segment_bytes_max: u64,
    /// Threads that hash and compress.
    pub threads: usize,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            selection: Vec::new(),
            allocated_only: false,
            base: None,
            compression: Compression::None,
            encryption: None,
            bundle: Uuid::new_v4(),
            created_unix_s: 0,
            software: format!("dualrestore {}", env!("CARGO_PKG_VERSION")),
            segment_bytes_max: BUNDLE_SEGMENT_BYTES_MAX,
            threads: super::pump::threads_default(),
        }
    }
}

/// How far a bundle has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BundleProgress {
    /// Bytes of the selection dealt with, and all of them.
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// Bytes stored for them.
    pub bytes_stored: u64,
}

/// Called on the thread that makes the bundle; says whether to go on.
pub type OnBundleProgress<'a> = &'a mut dyn FnMut(&BundleProgress) -> ControlFlow<()>;

/// What a bundle turned out to hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BundleReport {
    pub bundle: Uuid,
    pub segments: u64,
    pub chunks: u64,
    pub bytes_selected: u64,
    pub bytes_data: u64,
    pub bytes_zero: u64,
    pub bytes_unreadable: u64,
    /// What the data takes on the medium, padding and descriptors not counted.
    pub bytes_stored: u64,
    /// What compression saved of it.
    pub bytes_saved: u64,
    pub chunks_compressed: u64,
    /// Chunks that `auto` did not try, because the sink would have waited.
    pub chunks_untried: u64,
    /// Runs the source could not read, the first `REPORT_RUNS_MAX`.
    pub unreadable: Vec<ByteRange>,
    /// Media that are finished.
    pub media: u32,
    /// Bytes of the selection that wait for a further medium; 0: the bundle is complete.
    pub bytes_left: u64,
    pub seconds: f64,
}

/// See the module.
#[derive(Debug)]
pub struct BundleWriter;

impl BundleWriter {
    /// Makes a bundle in a new or empty directory; one that fails or is stopped leaves nothing.
    pub fn create(
        directory: &Path,
        source: &dyn Source,
        options: &WriterOptions,
        progress: OnBundleProgress<'_>,
    ) -> Result<BundleReport> {
        check(options)?;
        normalised(&options.selection, source.identity().geometry)?;
        let folder = FileFolder::create(directory)?;
        // Half a bundle that nobody remembers would only stand in the way of the next try.
        write_in(&folder, source, options, progress).inspect_err(|_| folder.discard())
    }

    /// Makes a bundle in an empty folder.
    pub fn create_in(
        folder: &dyn Folder,
        source: &dyn Source,
        options: &WriterOptions,
        progress: OnBundleProgress<'_>,
    ) -> Result<BundleReport> {
        write_in(folder, source, options, progress)
    }
}

pub(super) fn check(options: &WriterOptions) -> Result<()> {
    let allowed = BUNDLE_SEGMENT_BYTES_MIN..=BUNDLE_SEGMENT_BYTES_MAX;
    if !allowed.contains(&options.segment_bytes_max) {
        return Err(Error::usage(format!(
            "expected segments of {BUNDLE_SEGMENT_BYTES_MIN} to {BUNDLE_SEGMENT_BYTES_MAX} bytes, \
             found {}",
            options.segment_bytes_max
        )));
    }
    if options.software.len() > BUNDLE_NAME_BYTES_MAX {
        return Err(Error::usage(format!(
            "expected at most {BUNDLE_NAME_BYTES_MAX} bytes that name the software, found {}",
            options.software.len()
        )));
    }
    if options.threads == 0 {
        return Err(Error::usage("expected at least one thread to make a bundle"));
    }
    if options.encryption.as_ref().is_some_and(|how| how.key.bundle() != options.bundle) {
        return Err(Error::usage("expected a key made for this bundle, found another bundle's"));
    }
    Ok(())
}

/// A piece of the source on its way to an encoder. The slot holds its bytes.
struct Job<'a> {
    sequence: u64,
    range: ByteRange,
    /// `None`: zero for certain.
    slot: Option<&'a mut [u8]>,
    unreadable: Vec<ByteRange>,
}

/// The same piece encoded.
struct Encoded<'a> {
    sequence: u64,
    range: ByteRange,
    parts: Vec<Part>,
    slot: Option<&'a mut [u8]>,
}

/// How a pass ended.
#[derive(Debug)]
pub(super) enum End {
    /// The selection is stored.
    Complete,
    /// The room that was stated is used up.
    NoRoom,
    /// There was less room than stated: the segment that was open is to be discarded. `reached` of
    /// its bytes were written.
    Full {
        reached: u64,
    },
    Failed(Error),
}

/// What a pass did.
#[derive(Debug)]
pub(super) struct Passed {
    /// In order, durable.
    pub closed: Vec<SegmentEntry>,
    /// Of so many of them the source was told.
    pub told: usize,
    pub end: End,
}

/// Which segments the source was told of: those that are durable, the last ones left out.
struct Told<'a> {
    source: &'a dyn Source,
    durable: &'a AtomicUsize,
    segments: usize,
}

impl Told<'_> {
    fn tell(&mut self, closed: &[SegmentEntry]) {
        let durable = self.durable.load(Ordering::Acquire);
        while self.segments + BUNDLE_SEGMENTS_HELD_BACK < durable {
            tell_stored(self.source, &closed[self.segments]);
            self.segments += 1;
        }
    }
}

/// Tells the source what a segment holds.
pub(super) fn tell_stored(source: &dyn Source, segment: &SegmentEntry) {
    for run in &segment.coverage {
        source.stored(ByteRange::from(*run));
    }
}

/// Where a pass begins, and how much it may store.
#[derive(Debug)]
pub(super) struct Leg {
    /// What is left of the selection.
    pub selection: Vec<ByteRange>,
    /// The header of the first segment.
    pub header: SegmentHeader,
    pub room: Option<u64>,
}

/// What lasts from pass to pass.
pub(super) struct Making<'p> {
    clock: MonotonicClock,
    told: Option<Instant>,
    progress: OnBundleProgress<'p>,
    state: BundleProgress,
    pub chunks_compressed: u64,
    /// Of the passes before this one.
    chunks_untried: u64,
    pace: Arc<Pace>,
    /// Runs the source could not read, those of a discarded segment counted as well.
    pub unreadable: Vec<ByteRange>,
}

impl<'p> Making<'p> {
    pub fn new(clock: MonotonicClock, bytes_total: u64, progress: OnBundleProgress<'p>) -> Self {
        let state = BundleProgress { bytes_total, ..BundleProgress::default() };
        let pace = Arc::new(Pace::new(1));
        Self {
            clock,
            told: None,
            progress,
            state,
            chunks_compressed: 0,
            chunks_untried: 0,
            pace,
            unreadable: Vec::new(),
        }
    }

    /// Chunks that `auto` did not try to compress.
    pub fn chunks_untried(&self) -> u64 {
        self.chunks_untried + self.pace.untried()
    }

    /// One pass, as the module says.
    pub fn pass(
        &mut self,
        folder: &dyn Folder,
        source: &dyn Source,
        options: &WriterOptions,
        leg: Leg,
    ) -> Result<Passed> {
        let Leg { selection, header, room } = leg;
        let left: u64 = selection.iter().map(|range| range.length).sum();
        self.state.bytes_done = self.state.bytes_total - left;
        let grain = zero_grain(header.geometry);
        let mut memory = AlignedBuffer::zeroed(BUNDLE_CHUNKS_AHEAD * SLOT_BYTES);
        self.chunks_untried += self.pace.untried();
        self.pace = Arc::new(Pace::new(options.threads));
        let (clock, pace) = (self.clock, &*Arc::clone(&self.pace));
        let (teller, durable) = (source, AtomicUsize::new(0));
        let encoders = (0..options.threads)
            .map(|_| Encoder::new(options.compression, grain, &self.pace))
            .collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let (free, slots) = bounded(BUNDLE_CHUNKS_AHEAD);
            for slot in memory.chunks_exact_mut(SLOT_BYTES) {
                free.send(slot).expect("as many slots as places");
            }
            let (jobs_in, jobs) = bounded(BUNDLE_CHUNKS_AHEAD);
            let source = Timed { source, clock, pace };
            spawn(scope, "bundle-read", move || read_ahead(&source, selection, &slots, &jobs_in))?;
            let (encoded_in, encoded) = bounded(BUNDLE_CHUNKS_AHEAD);
            for encoder in encoders {
                let (jobs, encoded_in) = (jobs.clone(), encoded_in.clone());
                spawn(scope, "bundle-encode", move || encode(encoder, &jobs, &encoded_in))?;
            }
            drop((jobs, encoded_in));
            let (orders, orders_out) = bounded(STAGINGS);
            let (written_in, written) = bounded(STAGINGS);
            for _ in 0..STAGINGS {
                let staging = AlignedBuffer::zeroed(STAGING_BYTES);
                written_in.send(staging).expect("as many as places");
            }
            let durable = &durable;
            let files = spawn(scope, "bundle-write", move || {
                carry_out(folder, &orders_out, &written_in, (clock, pace), durable)
            })?;
            let outlet = Outlet { orders, written };
            let encryption = options.encryption.clone();
            let limit = options.segment_bytes_max;
            let mut assembler = Assembler::new(outlet, header, encryption, limit, room)?;
            let mut told = Told { source: teller, durable, segments: 0 };
            let assembled = self.assemble(&mut assembler, &encoded, &free, &mut told);
            drop((encoded, free));
            let told = told.segments;
            let mut closed = assembler.into_closed();
            let written = files.join().expect("the writing thread does not panic");
            closed.truncate(written.closed);
            let end = match (written.result, assembled) {
                (Err(error), _) if is_full(&error) => End::Full { reached: written.reached },
                (Err(error), _) | (Ok(()), Err(error)) => End::Failed(error),
                (Ok(()), Ok(end)) => end,
            };
            Ok(Passed { closed, told, end })
        })
    }

    fn assemble<'a>(
        &mut self,
        assembler: &mut Assembler,
        encoded: &Receiver<Result<Encoded<'a>>>,
        free: &Sender<&'a mut [u8]>,
        told: &mut Told<'_>,
    ) -> Result<End> {
        let mut early = BTreeMap::new();
        let mut next = 0;
        self.tell()?;
        for piece in encoded {
            let piece = piece?;
            early.insert(piece.sequence, piece);
            while let Some(piece) = early.remove(&next) {
                if !self.store(assembler, &piece)? {
                    assembler.finish()?;
                    return Ok(End::NoRoom);
                }
                if let Some(slot) = piece.slot {
                    // The reader may have come to its end; then nobody needs the slot.
                    let _unneeded = free.send(slot);
                }
                next += 1;
                if self.is_due() {
                    self.tell()?;
                }
                told.tell(assembler.closed());
            }
        }
        assert!(early.is_empty() && self.state.bytes_done == self.state.bytes_total, "all stored");
        assembler.finish()?;
        self.tell()?;
        Ok(End::Complete)
    }

    /// `false` if the medium has no room for all of it.
    fn store(&mut self, assembler: &mut Assembler, piece: &Encoded<'_>) -> Result<bool> {
        for part in &piece.parts {
            let length = part.descriptor.stored_bytes as usize;
            let bytes = match (part.descriptor.kind, &piece.slot) {
                (ChunkKind::Data, Some(slot)) => &slot[part.at..][..length],
                (ChunkKind::Zstd, Some(slot)) => &slot[CHUNK + part.at..][..length],
                _ => &[],
            };
            if !assembler.add(part.descriptor, bytes)? {
                return Ok(false);
            }
            self.state.bytes_stored += length as u64;
            self.chunks_compressed += u64::from(part.descriptor.kind == ChunkKind::Zstd);
            if part.descriptor.kind == ChunkKind::Unreadable {
                push_run(&mut self.unreadable, part.descriptor.range);
            }
        }
        self.state.bytes_done += piece.range.length;
        Ok(true)
    }

    /// What was stored so far, for the progress of the passes to come.
    pub fn stored(&mut self, bytes: u64) {
        self.state.bytes_stored = bytes;
    }

    fn is_due(&self) -> bool {
        let now = self.clock.now();
        self.told.is_none_or(|told| now.since_ms(told) >= PROGRESS_INTERVAL_MS)
    }

    fn tell(&mut self) -> Result<()> {
        self.told = Some(self.clock.now());
        match (self.progress)(&self.state) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(interrupted()),
        }
    }
}

/// Whether an error says that there is no space left.
pub(super) fn is_full(error: &Error) -> bool {
    const ENOSPC: i32 = 28;
    const EDQUOT: i32 = 122;
    error.kind() == ErrorKind::Device && matches!(error.errno(), Some(ENOSPC | EDQUOT))
}

fn interrupted() -> Error {
    Error::new(
        ErrorKind::Interrupted,
        "stopped on request; the bundle is unfinished, ask again with --continue to go on with it",
    )
}

/// Adds a run to an ascending list of at most `REPORT_RUNS_MAX`.
pub(crate) fn push_run(runs: &mut Vec<ByteRange>, range: ByteRange) {
    let room = runs.len() < REPORT_RUNS_MAX;
    match runs.last_mut() {
        Some(last) if last.end() == range.offset => last.length += range.length,
        _ if room => runs.push(range),
        _ => {}
    }
}

/// A named thread of a scope.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<std::thread::ScopedJoinHandle<'scope, T>> {
    Builder::new()
        .name(name.into())
        .spawn_scoped(scope, work)
        .map_err(|source| Error::device("start thread", &source))
}

/// A source whose reads tell the pace.
#[derive(Debug)]
struct Timed<'a> {
    source: &'a dyn Source,
    clock: MonotonicClock,
    pace: &'a Pace,
}

impl Source for Timed<'_> {
    fn identity(&self) -> Identity {
        self.source.identity()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let began = self.clock.now_ns();
        self.source.read_at(offset, buffer)?;
        self.pace.note(Stage::Source, buffer.len() as u64, self.clock.now_ns() - began);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.source.next_data(offset)
    }
}

/// Reads the selection piece by piece until it ends, fails, or nobody listens any more.
fn read_ahead<'a>(
    source: &dyn Source,
    selection: Vec<ByteRange>,
    slots: &Receiver<&'a mut [u8]>,
    jobs: &Sender<Result<Job<'a>>>,
) {
    for (sequence, stretch) in (0..).zip(Stretches::new(source, selection)) {
        let job = stretch.and_then(|stretch| {
            let mut job =
                Job { sequence, range: stretch.range, slot: None, unreadable: Vec::new() };
            if !stretch.zero {
                let slot = slots.recv().map_err(|_| interrupted())?;
                let plain = &mut slot[..stretch.range.length as usize];
                job.unreadable = read_piece(source, stretch.range.offset, plain)?;
                job.slot = Some(slot);
            }
            Ok(job)
        });
        let failed = job.is_err();
        if jobs.send(job).is_err() || failed {
            return;
        }
    }
}

/// Reads a piece; where that fails, block by block. The runs that could not be read.
fn read_piece(source: &dyn Source, offset: u64, plain: &mut [u8]) -> Result<Vec<ByteRange>> {
    let Err(error) = source.read_at(offset, plain) else { return Ok(Vec::new()) };
    if error.kind() != ErrorKind::Device {
        return Err(error);
    }
    let step = source.identity().geometry.block_size().bytes().max(4096);
    let mut unreadable = Vec::new();
    let mut at = 0;
    while at < plain.len() {
        let position = offset + at as u64;
        let to = ((position + 1).next_multiple_of(step) - offset).min(plain.len() as u64) as usize;
        match source.read_at(position, &mut plain[at..to]) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Device => {
                let range = ByteRange::new(position, (to - at) as u64);
                match unreadable.last_mut() {
                    Some(ByteRange { offset, length }) if *offset + *length == position => {
                        *length += range.length;
                    }
                    _ => unreadable.push(range),
                }
            }
            Err(error) => return Err(error),
        }
        at = to;
    }
    Ok(unreadable)
}

fn encode<'a>(
    mut encoder: Encoder,
    jobs: &Receiver<Result<Job<'a>>>,
    encoded: &Sender<Result<Encoded<'a>>>,
) {
    for job in jobs {
        let piece = job.map(|Job { sequence, range, mut slot, unreadable }| {
            let parts = match &mut slot {
                None => vec![Part::nothing(ChunkKind::Zero, range)],
                Some(slot) => {
                    let (plain, stored) = slot.split_at_mut(CHUNK);
                    let length = range.length as usize;
                    let stored = &mut stored[..length];
                    encoder.encode(range.offset, &plain[..length], &unreadable, stored)
                }
            };
            Encoded { sequence, range, parts, slot }
        });
        if encoded.send(piece).is_err() {
            return;
        }
    }
}
