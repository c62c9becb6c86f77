//! What a merge did, in all and by source.

use crate::error::Error;
use crate::extent::ByteRange;
use crate::limits::REPORT_RUNS_MAX;

/// How far a merge has come, all sources together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes of the sources dealt with (skipped ones counted), and all of them.
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub bytes_written: u64,
    pub chunks_damaged: u64,
    /// Sources gone through, or given up.
    pub sources_done: u64,
    pub sources: u64,
}

/// What a merge did.
#[derive(Clone, Debug, Default)]
pub struct MergeReport {
    /// Bytes written, those of zeros counted as well, and of these the zeros.
    pub bytes_written: u64,
    pub bytes_zeroed: u64,
    /// Bytes of the sources that the target did not want, for it had them.
    pub bytes_skipped: u64,
    /// Bytes that no bundle may supply after a crash (law 5): brought over the link, and left
    /// missing because it was down.
    pub bytes_fetched: u64,
    pub bytes_in_doubt: u64,
    /// Bytes left missing because the sources are too old for them.
    pub bytes_stale: u64,
    /// Bytes read from the media, descriptors not counted.
    pub bytes_read: u64,
    pub chunks_total: u64,
    /// Chunks that were wanted and damaged, and of these those that came another way: from another
    /// source, or brought by the target.
    pub chunks_damaged: u64,
    pub chunks_repaired: u64,
    /// Bytes of damaged chunks, the first `REPORT_RUNS_MAX` runs.
    pub damaged: Vec<ByteRange>,
    /// Why less came than a source holds: it was cut off, and what came was merged.
    pub shortfall: Option<String>,
    pub seconds: f64,
    /// What carried out the reads and writes.
    pub engine: String,
    /// How many sources were read at a time, at most.
    pub side_by_side: usize,
    /// By source, in the order in which they were given.
    pub sources: Vec<SourceReport>,
}

/// What a merge did with one of its sources. The fields are as in `MergeReport`.
#[derive(Clone, Debug, Default)]
pub struct SourceReport {
    /// Bytes of the source dealt with.
    pub bytes_done: u64,
    pub bytes_written: u64,
    pub bytes_zeroed: u64,
    pub bytes_fetched: u64,
    pub bytes_in_doubt: u64,
    pub bytes_read: u64,
    /// Bytes of chunks that were damaged: neither written nor skipped.
    pub bytes_damaged: u64,
    pub chunks_total: u64,
    pub chunks_damaged: u64,
    pub chunks_repaired: u64,
    pub damaged: Vec<ByteRange>,
    pub shortfall: Option<String>,
    /// Why it was given up; what of it was merged by then stays.
    pub error: Option<Error>,
    pub engine: &'static str,
}

impl SourceReport {
    pub(super) fn note_damage(&mut self, range: ByteRange) {
        self.chunks_damaged += 1;
        self.bytes_damaged += range.length;
        if self.damaged.len() < REPORT_RUNS_MAX {
            self.damaged.push(range);
        }
    }
}

impl MergeReport {
    /// Of all the sources together.
    pub(super) fn of(mut sources: Vec<SourceReport>, bytes_stale: u64) -> Self {
        let mut report = Self { bytes_stale, ..Self::default() };
        let mut engines: Vec<&str> = Vec::new();
        for one in &mut sources {
            report.bytes_written += one.bytes_written;
            report.bytes_zeroed += one.bytes_zeroed;
            report.bytes_fetched += one.bytes_fetched;
            report.bytes_in_doubt += one.bytes_in_doubt;
            report.bytes_read += one.bytes_read;
            let elsewhere = one.bytes_damaged + one.bytes_fetched + one.bytes_in_doubt;
            report.bytes_skipped += one.bytes_done.saturating_sub(one.bytes_written + elsewhere);
            report.chunks_total += one.chunks_total;
            report.chunks_damaged += one.chunks_damaged;
            report.chunks_repaired += one.chunks_repaired;
            join(&mut one.damaged);
            report.damaged.extend(&one.damaged);
            report.shortfall = report.shortfall.or_else(|| one.shortfall.clone());
            if !one.engine.is_empty() && !engines.contains(&one.engine) {
                engines.push(one.engine);
            }
        }
        report.bytes_skipped = report.bytes_skipped.saturating_sub(bytes_stale);
        join(&mut report.damaged);
        report.damaged.truncate(REPORT_RUNS_MAX);
        report.engine = engines.join(", ");
        report.sources = sources;
        report
    }
}

/// Sorts runs and joins those that touch.
fn join(runs: &mut Vec<ByteRange>) {
    runs.sort_unstable();
    runs.dedup_by(|next, last| {
        let touches = next.offset <= last.end();
        if touches {
            last.length = last.end().max(next.end()) - last.offset;
        }
        touches
    });
}
