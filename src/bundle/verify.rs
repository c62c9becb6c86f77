//! Checks everything that a bundle holds, down to the hash of every chunk.
//!
//! Does not know: what to do about damage.

use std::ops::ControlFlow;

use super::pieces::PieceSource;
use super::pump::{Begun, Consumer, Crew, Event, Opened, Outcome, run};
use super::reader::Bundle;
use super::tar_stream::TarStream;
use super::writer::push_run;
use crate::clock::MonotonicClock;
use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::bundle::{IndexEntry, PAGE_BYTES, SegmentEntry, Trailer, encode_index};
use crate::limits::PROGRESS_INTERVAL_MS;

/// How far a verification has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyProgress {
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub chunks_damaged: u64,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VerifyReport {
    /// Chunks that are whole, zero runs counted as well, and the bytes of the volume they give.
    pub chunks: u64,
    pub bytes: u64,
    /// Chunks that are not, those that their source could not read counted as well.
    pub chunks_damaged: u64,
    /// Their bytes of the volume, the first `REPORT_RUNS_MAX` runs.
    pub damaged: Vec<ByteRange>,
    /// Damage that costs no chunk: a lost index, a changed begin manifest.
    pub blemishes: Vec<String>,
    pub seconds: f64,
}

impl VerifyReport {
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.chunks_damaged == 0 && self.blemishes.is_empty()
    }
}

/// Called on the thread that verifies; says whether to go on.
pub type OnVerifyProgress<'a> = &'a mut dyn FnMut(&VerifyProgress) -> ControlFlow<()>;

struct Count;

impl Consumer for Count {
    type Claim = ();
    type Note = ();

    fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
        vec![range]
    }

    fn begin(&self, _: ByteRange, _: Opened<'_>) -> Result<Begun<(), ()>> {
        Ok(Begun::Done(()))
    }

    fn end(&self, (): (), result: Result<()>) -> Result<()> {
        result
    }
}

impl Bundle {
    /// Reads and checks everything. Damage is reported, not an error.
    pub fn verify(&self, crew: Crew, progress: OnVerifyProgress<'_>) -> Result<VerifyReport> {
        let clock = MonotonicClock::default();
        let began = clock.now();
        let mut report = VerifyReport::default();
        for segment in self.segments() {
            self.check_pages(segment, &mut report.blemishes)?;
        }
        if let Err(error) = self.check_begin() {
            report.blemishes.push(format!("manifest.begin.json: {error}"));
        }
        verify_pieces(self, crew, &mut report, progress)?;
        report.seconds = clock.now().since_ms(began) as f64 / 1000.0;
        Ok(report)
    }

    /// Index, trailer and descriptor pages of a segment against the manifest.
    fn check_pages(&self, entry: &SegmentEntry, blemishes: &mut Vec<String>) -> Result<()> {
        let mut reader = self.read_segment(entry)?;
        if let Err(error) = self.check_header(entry) {
            blemishes.push(format!("{}: its header: {error}", entry.name));
        }
        let Some(trailer) = reader.trailer().copied() else {
            blemishes.push(format!("{}: its index or trailer is damaged", entry.name));
            return Ok(());
        };
        let batches = std::iter::from_fn(|| reader.next_batch()).map(|found| found.as_indexed());
        let (index, end) = packed(batches);
        let whole = reader.root() == entry.root.0
            && agrees(&trailer, entry)
            && (end, blake3::hash(&index))
                == (Some(trailer.index_position), trailer.index_hash.into());
        if !whole {
            blemishes.push(format!("{}: it is not as the manifest states", entry.name));
        }
        Ok(())
    }
}

impl TarStream {
    /// Reads and checks everything that comes. Damage, and what does not come, is reported.
    pub fn verify(&self, crew: Crew, progress: OnVerifyProgress<'_>) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        let clock = MonotonicClock::default();
        let began = clock.now();
        verify_pieces(self, crew, &mut report, progress)?;
        report.blemishes = self.blemishes();
        report.blemishes.extend(self.shortfall().map(|error| error.to_string()));
        report.seconds = clock.now().since_ms(began) as f64 / 1000.0;
        Ok(report)
    }
}

fn verify_pieces(
    source: &dyn PieceSource,
    crew: Crew,
    report: &mut VerifyReport,
    progress: OnVerifyProgress<'_>,
) -> Result<()> {
    let clock = MonotonicClock::default();
    let mut told = None;
    let mut state =
        VerifyProgress { bytes_total: source.bytes_total(), ..VerifyProgress::default() };
    run(source, &Count, crew, |events| {
        for Event { range, chunks, outcome, .. } in events {
            state.bytes_done += range.length;
            match outcome {
                Outcome::Damaged(_) => {
                    report.chunks_damaged += 1;
                    state.chunks_damaged += 1;
                    push_run(&mut report.damaged, range);
                }
                Outcome::Consumed(()) | Outcome::Unwanted => {
                    report.chunks += chunks;
                    report.bytes += range.length;
                }
            }
        }
        let now = clock.now();
        if told.is_none_or(|told| now.since_ms(told) >= PROGRESS_INTERVAL_MS) {
            told = Some(now);
            return Ok(progress(&state));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    // All is done: a wish to stop comes too late.
    let _too_late = progress(&state);
    report.damaged.sort_unstable();
    Ok(())
}

/// The index that batches should have, and where it begins if they follow each other from the
/// header on.
fn packed(batches: impl Iterator<Item = (IndexEntry, u64)>) -> (Vec<u8>, Option<u64>) {
    let (mut entries, mut at) = (Vec::new(), Some(PAGE_BYTES as u64));
    for (entry, end) in batches {
        at = at.filter(|at| *at == entry.position).map(|_| end);
        entries.push(entry);
    }
    (encode_index(&entries), at)
}

fn agrees(trailer: &Trailer, entry: &SegmentEntry) -> bool {
    (trailer.root, trailer.chunks, trailer.stored_bytes)
        == (entry.root.0, entry.chunks, entry.stored_bytes)
        && (trailer.data_bytes, trailer.zero_bytes, trailer.unreadable_bytes)
            == (entry.data_bytes, entry.zero_bytes, entry.unreadable_bytes)
}
