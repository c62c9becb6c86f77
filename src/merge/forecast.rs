//! What a merge would do, told without reading a chunk or writing a byte.
//!
//! Guarantees: sources, target and map are left as they are; a block that several sources have is
//! counted for the first.
//! Does not know: whether chunks are whole; only a merge or a verification reads them.

use std::ops::ControlFlow;

use super::admission::check_all;
use super::pipeline::Strand;
use super::report::{MergeReport, SourceReport};
use crate::bitmap::Bitmap;
use crate::bundle::{Content, stopped};
use crate::clock::MonotonicClock;
use crate::error::Result;
use crate::extent::BlockRange;
use crate::limits::PROGRESS_INTERVAL_MS;

/// The report that a merge would end with if every chunk were whole and nobody wrote meanwhile.
/// `progress` hears how many bytes of the sources were looked at, and says whether to go on.
pub fn forecast(
    strands: &[Strand<'_>],
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<MergeReport> {
    check_all(strands)?;
    let clock = MonotonicClock::default();
    let began = clock.now();
    let mut told = began;
    let geometry = strands[0].target.geometry();
    let supplied = Bitmap::new(geometry.blocks(), false);
    let mut looked_at = 0;
    let mut accounts = Vec::new();
    for Strand { source, target, .. } in strands {
        let mut account = SourceReport::default();
        for piece in source.pieces() {
            let piece = piece?;
            let blocks = geometry.touched(piece.range);
            let within =
                |run| geometry.bytes_of(run).intersect(piece.range).map_or(0, |part| part.length);
            let wanted: Vec<BlockRange> = target
                .wanted(blocks)
                .into_iter()
                .flat_map(|run| supplied.runs(run, false))
                .collect();
            account.chunks_total += 1;
            account.bytes_done += piece.range.length;
            match piece.content {
                Content::Missing(_) => account.note_damage(piece.range),
                ref content => {
                    let bytes: u64 = wanted.iter().map(|run| within(*run)).sum();
                    account.bytes_written += bytes;
                    account.bytes_in_doubt +=
                        target.in_doubt(blocks).into_iter().map(within).sum::<u64>();
                    if matches!(content, Content::Zero) {
                        account.bytes_zeroed += bytes;
                    }
                }
            }
            looked_at += piece.range.length;
            if strands.len() > 1 && !matches!(piece.content, Content::Missing(_)) {
                // Blocks of which a piece holds only a part may come from two.
                let whole = geometry.covered(piece.range);
                for run in wanted.iter().filter_map(|run| run.intersect(whole)) {
                    supplied.fill(run, true);
                }
            }
            if clock.now().since_ms(told) >= PROGRESS_INTERVAL_MS {
                told = clock.now();
                if progress(looked_at).is_break() {
                    return Err(stopped());
                }
            }
        }
        accounts.push(account);
    }
    let seconds = clock.now().since_ms(began) as f64 / 1000.0;
    Ok(MergeReport { seconds, ..MergeReport::of(accounts, 0) })
}
