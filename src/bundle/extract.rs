//! Writes out the volume that a bundle holds as an image.
//!
//! | form | to | pieces | what is missing |
//! |---|---|---|---|
//! | raw | a device or file | as they come, many writes under way | is left as it was |
//! | raw | a stream | in order, all bytes | zeros |
//! | qcow2 | a stream | gone through for what they are, then in order | zeros, or no cluster |
//!
//! Guarantees: only verified bytes are written (law 9); a run that is known to be zero is passed
//! over only where zeros are known to be (law 8); what is damaged or not included is reported;
//! memory is that of the pump, of the runs that are missing and of the map of clusters.
//! Does not know: where bundles come from, what becomes of a file that failed.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::extract_clusters::ClusterMap;
use super::extract_order::Accounted;
use super::extract_stream::InTurn;
use super::media_set::check_whole;
use super::pieces::PieceSource;
use super::pump::{Begun, Consumer, Crew, Event, Opened, Outcome, run, threads_default};
use super::writer::push_run;
use crate::clock::{Instant, MonotonicClock};
use crate::device::{ByteSink, Device, Engine, Stop};
use crate::error::{Error, Result};
use crate::extent::{ByteRange, ByteRuns};
use crate::limits::{BUNDLE_SELECTION_RUNS_MAX, PROGRESS_INTERVAL_MS, REPORT_RUNS_MAX};

/// See the module.
#[derive(Debug)]
pub struct Extraction<'a> {
    pub source: &'a dyn PieceSource,
    /// What the source should have.
    pub coverage: &'a ByteRuns,
    /// Whether an image is wanted even if the source turns out not to have all of the volume.
    pub partial: bool,
    pub stop: &'a Stop,
}

/// How far an extraction has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtractProgress {
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub chunks_damaged: u64,
}

/// What an extraction did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExtractReport {
    /// Bytes of the volume.
    pub size: u64,
    /// Of these: with contents, zero, damaged or never read by the maker, not in the bundle.
    pub bytes_data: u64,
    pub bytes_zero: u64,
    pub bytes_damaged: u64,
    pub bytes_absent: u64,
    /// Chunks, zero runs counted as well, and those of them that are damaged.
    pub chunks_total: u64,
    pub chunks_damaged: u64,
    /// The first `REPORT_RUNS_MAX` runs of each.
    pub damaged: Vec<ByteRange>,
    pub absent: Vec<ByteRange>,
    /// Bytes of a stream; of a device or file those of the volume.
    pub bytes_output: u64,
    /// Why less came than the bundle holds: it was cut off.
    pub shortfall: Option<String>,
    pub seconds: f64,
}

impl ExtractReport {
    /// Whether the image is all of the volume, and its source said so to the end.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.bytes_damaged == 0 && self.bytes_absent == 0 && self.shortfall.is_none()
    }
}

/// Called on the thread that extracts; says whether to go on.
pub type OnExtractProgress<'a> = &'a mut dyn FnMut(&ExtractProgress) -> ControlFlow<()>;

/// What became of a piece.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Laid {
    pub data: u64,
    pub zero: u64,
    /// Bytes that the image has no place for: the medium changed since it was gone through.
    pub misplaced: u64,
}

impl Extraction<'_> {
    /// Lays the volume onto a device that is at least as large. `blank`: it reads as zeros.
    pub fn onto(
        &self,
        device: &Arc<dyn Device>,
        blank: bool,
        progress: OnExtractProgress<'_>,
    ) -> Result<ExtractReport> {
        let geometry = self.source.identity().geometry;
        let (size, sector) = (geometry.size(), device.sector_size());
        if device.size() < size {
            return Err(Error::usage(format!(
                "expected room for the {size} bytes of the volume, found a place of {} bytes: name \
                 a larger one",
                device.size()
            )));
        }
        if !geometry.is_whole_sectors(sector) {
            return Err(Error::usage(format!(
                "expected a place whose sectors make up the blocks of {} bytes of the bundle, \
                 found sectors of {sector}: extract into a file",
                geometry.block_size().bytes()
            )));
        }
        let consumer = Laying { device: Arc::clone(device), blank };
        let at_once = self.source.answers_at_once() || device.answers_at_once();
        let crew = Crew::suited(None, threads_default(), at_once);
        let pieces = self.accounted(false);
        let mut tally = Tally::new(&pieces, progress);
        let mut seen = ByteRuns::default();
        run(&pieces, &consumer, crew, |events| {
            for event in &events {
                seen.add(event.range);
            }
            // Twice what a selection may have: jobs of several threads end in any order.
            if seen.len() > 2 * BUNDLE_SELECTION_RUNS_MAX {
                return Err(Error::format("the bundle is in too many separate runs"));
            }
            self.stop.check()?;
            Ok(tally.hear(events))
        })?;
        device.flush()?;
        for gap in seen.gaps(geometry.all_bytes()) {
            pieces.absent().add(gap);
        }
        tally.report.bytes_output = size;
        tally.finish(self)
    }

    /// Writes all bytes of the volume one after the other.
    pub fn into_raw(
        &self,
        sink: Box<dyn ByteSink>,
        progress: OnExtractProgress<'_>,
    ) -> Result<ExtractReport> {
        let row = self.accounted(true);
        self.stream(&row, None, sink, progress)
    }

    /// Goes through the source for what a qcow2 image of it is like: how large it will be is known
    /// before anything is written.
    pub fn plan_qcow2(&self) -> Result<Qcow2Plan> {
        if !self.source.is_repeatable() {
            return Err(Error::usage(
                "expected a bundle that can be gone through twice (a directory, a tar in a file), \
                 as a qcow2 image begins with where everything lies; found a stream, or a tar that \
                 was cut off: save it first, or extract a raw image",
            ));
        }
        let row = self.accounted(true);
        Ok(Qcow2Plan(ClusterMap::of(&row, self.stop)?))
    }

    /// Writes a qcow2 image as a stream.
    pub fn into_qcow2(
        &self,
        plan: Qcow2Plan,
        sink: Box<dyn ByteSink>,
        progress: OnExtractProgress<'_>,
    ) -> Result<ExtractReport> {
        let row = self.accounted(true);
        self.stream(&row, Some(plan.0), sink, progress)
    }

    fn accounted(&self, in_row: bool) -> Accounted<'_> {
        let how = (self.partial, in_row);
        Accounted::new(self.source, self.coverage, how, self.stop.clone())
    }

    fn stream(
        &self,
        pieces: &Accounted<'_>,
        clusters: Option<ClusterMap>,
        sink: Box<dyn ByteSink>,
        progress: OnExtractProgress<'_>,
    ) -> Result<ExtractReport> {
        let size = pieces.bytes_total();
        let row = InTurn::begin(clusters, sink, self.stop.clone())?;
        // Each thread of this engine has one job at a time, as the row needs it.
        let engine = Some(Engine::Threads);
        let crew = Crew::suited(engine, threads_default(), pieces.answers_at_once());
        let mut tally = Tally::new(pieces, progress);
        run(pieces, &row, crew, |events| {
            self.stop.check()?;
            Ok(tally.hear(events))
        })?;
        tally.report.bytes_output = row.end(size)?;
        tally.finish(self)
    }
}

/// Which clusters a qcow2 image will have.
#[derive(Debug)]
pub struct Qcow2Plan(ClusterMap);

impl Qcow2Plan {
    /// Bytes of the image.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.0.file_bytes()
    }
}

/// Lays pieces onto a device.
struct Laying {
    device: Arc<dyn Device>,
    blank: bool,
}

impl Consumer for Laying {
    type Claim = u64;
    type Note = Laid;

    fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
        vec![range]
    }

    fn begin(&self, range: ByteRange, opened: Opened<'_>) -> Result<Begun<u64, Laid>> {
        if let Opened::Bytes(_) = opened {
            let device = Arc::clone(&self.device);
            return Ok(Begun::Writing { claim: range.length, device, runs: vec![range] });
        }
        if !self.blank {
            self.device.zero_at(range.offset, range.length)?;
        }
        Ok(Begun::Done(Laid { zero: range.length, ..Laid::default() }))
    }

    fn end(&self, data: u64, result: Result<()>) -> Result<Laid> {
        result.map(|()| Laid { data, ..Laid::default() })
    }
}

/// Counts what has happened, and tells of it.
struct Tally<'a> {
    pieces: &'a Accounted<'a>,
    progress: OnExtractProgress<'a>,
    clock: MonotonicClock,
    began: Instant,
    told: Instant,
    state: ExtractProgress,
    report: ExtractReport,
}

impl<'a> Tally<'a> {
    fn new(pieces: &'a Accounted<'_>, progress: OnExtractProgress<'a>) -> Self {
        let clock = MonotonicClock::default();
        let began = clock.now();
        let bytes_total = pieces.bytes_total();
        let state = ExtractProgress { bytes_total, ..ExtractProgress::default() };
        let size = pieces.identity().geometry.size();
        let report = ExtractReport { size, ..ExtractReport::default() };
        Self { pieces, progress, clock, began, told: began, state, report }
    }

    fn hear(&mut self, events: Vec<Event<Laid>>) -> ControlFlow<()> {
        for Event { range, chunks, outcome, .. } in events {
            self.state.bytes_done += range.length;
            match outcome {
                Outcome::Damaged(_) if self.pieces.absent().gaps(range).is_empty() => continue,
                Outcome::Damaged(_) => self.damaged(range, range.length),
                Outcome::Unwanted => {}
                Outcome::Consumed(Laid { data, zero, misplaced }) => {
                    self.report.bytes_data += data;
                    self.report.bytes_zero += zero;
                    if misplaced > 0 {
                        self.damaged(range, misplaced);
                    }
                }
            }
            self.report.chunks_total += chunks;
        }
        let now = self.clock.now();
        if now.since_ms(self.told) < PROGRESS_INTERVAL_MS {
            return ControlFlow::Continue(());
        }
        self.told = now;
        (self.progress)(&self.state)
    }

    fn damaged(&mut self, range: ByteRange, bytes: u64) {
        self.report.chunks_damaged += 1;
        self.report.bytes_damaged += bytes;
        self.state.chunks_damaged += 1;
        push_run(&mut self.report.damaged, range);
    }

    fn finish(self, extraction: &Extraction<'_>) -> Result<ExtractReport> {
        let shortfall = extraction.source.shortfall();
        let absent: Vec<ByteRange> = self.pieces.absent().iter().collect();
        let bytes_absent = absent.iter().map(|run| run.length).sum();
        let mut report = self.report;
        if !extraction.partial {
            shortfall.clone().map_or(Ok(()), Err)?;
            check_whole(report.size, bytes_absent, extraction.source.lineage().is_some())?;
        }
        // All is done: a wish to stop comes too late.
        let _too_late = (self.progress)(&self.state);
        report.bytes_absent = bytes_absent;
        report.absent = absent;
        report.absent.truncate(REPORT_RUNS_MAX);
        report.damaged.sort_unstable();
        report.shortfall = shortfall.map(|error| error.to_string());
        report.seconds = self.clock.now().since_ms(self.began) as f64 / 1000.0;
        Ok(report)
    }
}
