//! What a merge would do, told without reading a chunk or writing a byte.
//!
//! Guarantees: source, target and map are left as they are.
//! Does not know: whether chunks are whole; only a merge or a verification reads them.

use std::ops::ControlFlow;

use super::pipeline::{MergeReport, check_all};
use super::target::MergeTarget;
use crate::bundle::{Content, PieceSource};
use crate::clock::MonotonicClock;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{PROGRESS_INTERVAL_MS, REPORT_RUNS_MAX};

/// The report that a merge would end with if every chunk were whole and nobody wrote meanwhile.
/// `progress` hears how many bytes of the source were looked at, and says whether to go on.
pub fn forecast(
    source: &dyn PieceSource,
    target: &dyn MergeTarget,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<MergeReport> {
    check_all(&[source], target)?;
    let clock = MonotonicClock::default();
    let began = clock.now();
    let mut told = began;
    let geometry = target.geometry();
    let mut report = MergeReport::default();
    let mut looked_at = 0;
    for piece in source.pieces() {
        let piece = piece?;
        let blocks = geometry.touched(piece.range);
        let within = |run| geometry.bytes_of(run).intersect(piece.range).map_or(0, |at| at.length);
        let wanted: u64 = target.wanted(blocks).into_iter().map(within).sum();
        let in_doubt: u64 = target.in_doubt(blocks).into_iter().map(within).sum();
        report.chunks_total += 1;
        match piece.content {
            Content::Missing(_) => {
                report.chunks_damaged += 1;
                if report.damaged.len() < REPORT_RUNS_MAX {
                    report.damaged.push(piece.range);
                }
            }
            ref content => {
                report.bytes_written += wanted;
                report.bytes_in_doubt += in_doubt;
                report.bytes_skipped += piece.range.length - wanted - in_doubt;
                if matches!(content, Content::Zero) {
                    report.bytes_zeroed += wanted;
                }
            }
        }
        looked_at += piece.range.length;
        if clock.now().since_ms(told) >= PROGRESS_INTERVAL_MS {
            told = clock.now();
            if progress(looked_at).is_break() {
                return Err(Error::new(ErrorKind::Interrupted, "stopped on request"));
            }
        }
    }
    report.seconds = clock.now().since_ms(began) as f64 / 1000.0;
    Ok(report)
}
