//! Merges a bundle or an image into a target, live or not: the same code.
//!
//! | step | where | law |
//! |---|---|---|
//! | identity compared | here, before anything is read | 7 |
//! | what is not wanted passed over, the rest read and verified | the pump's workers | 9 |
//! | claimed and re-checked, written, marked | the target, the pump's queues, the target | 4 |
//! | blocks that no bundle may supply after a crash brought over the link | the target | 5 |
//! | made durable every `MERGE_COMMIT_BYTES` or `MERGE_COMMIT_MS` | the caller's thread | 2 |
//! | pieces that others held meanwhile gone through once more | | |
//!
//! Guarantees: memory is that of the pump (`bundle/pump.rs`) and of the seams, whatever the size;
//! what was filled is committed also when it is stopped or fails; a second run writes nothing.
//! Does not know: whether the target is being served.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use super::lineage::{check_span, widened};
use super::seams::{Seams, cut};
use super::target::{Claim, MergeTarget, TargetIdentity};
use crate::bundle::{
    Begun, Consumer, Crew, Event, Identity, Opened, Outcome, PieceSource, run as pump,
};
use crate::clock::{Instant, MonotonicClock};
use crate::device::Engine;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::limits::{MERGE_COMMIT_BYTES, MERGE_COMMIT_MS, PROGRESS_INTERVAL_MS, REPORT_RUNS_MAX};
use crate::units::{CutSpan, Geometry};

/// How a merge is done.
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions {
    /// Threads that verify and unpack.
    pub threads: usize,
    /// `None`: the one that suits the source and the target.
    pub engine: Option<Engine>,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self { threads: crate::bundle::threads_default(), engine: None }
    }
}

/// How far a merge has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes of the source dealt with (skipped ones counted), and all of them.
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub bytes_written: u64,
    pub chunks_damaged: u64,
}

/// Called on the thread that merges; says whether to go on.
pub type OnMergeProgress<'a> = &'a mut dyn FnMut(&MergeProgress) -> ControlFlow<()>;

/// What a merge did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeReport {
    /// Bytes written, those of zeros counted as well, and of these the zeros.
    pub bytes_written: u64,
    pub bytes_zeroed: u64,
    /// Bytes of the source that the target did not want, for it had them.
    pub bytes_skipped: u64,
    /// Bytes that no bundle may supply after a crash (law 5): brought over the link, and left
    /// missing because it was down.
    pub bytes_fetched: u64,
    pub bytes_in_doubt: u64,
    /// Bytes left missing because the source is too old for them.
    pub bytes_stale: u64,
    /// Bytes read from the medium, descriptors not counted.
    pub bytes_read: u64,
    pub chunks_total: u64,
    /// Chunks that were wanted and damaged, and of these those that the target brings another way.
    pub chunks_damaged: u64,
    pub chunks_repaired: u64,
    /// Bytes of damaged chunks, the first `REPORT_RUNS_MAX` runs.
    pub damaged: Vec<ByteRange>,
    /// Why less came than the source holds: it was cut off, and what came was merged.
    pub shortfall: Option<String>,
    pub seconds: f64,
    /// What carried out the reads and writes.
    pub engine: &'static str,
}

/// Merges all of the source. See the module.
pub fn run(
    source: &dyn PieceSource,
    target: &dyn MergeTarget,
    options: &MergeOptions,
    progress: OnMergeProgress<'_>,
) -> Result<MergeReport> {
    if options.threads == 0 {
        return Err(Error::usage("expected at least one thread to merge with"));
    }
    settle_identity(&source.name(), &source.identity(), target)?;
    let clock = MonotonicClock::default();
    let began = clock.now();
    let mut merge = Merge {
        target,
        progress,
        clock,
        told: None,
        committed: began,
        uncommitted: 0,
        state: MergeProgress { bytes_total: source.bytes_total(), ..MergeProgress::default() },
        report: MergeReport::default(),
    };
    let at_once = source.answers_at_once() || target.device().answers_at_once();
    let crew = Crew::suited(options.engine, options.threads, at_once);
    merge.report.engine = crew.engine.name();
    let done = merge.passes(source, crew);
    // What was filled is kept, however it ended.
    let committed = target.commit();
    done?;
    committed?;
    if let Some(lineage) = source.lineage() {
        target.descend(&lineage)?;
    }
    // All is done: a wish to stop comes too late.
    let _too_late = merge.tell();
    let mut report = merge.report;
    report.bytes_stale = target.bytes_stale();
    let not_skipped = report.bytes_written + report.bytes_stale;
    report.bytes_skipped = report.bytes_skipped.saturating_sub(not_skipped);
    join(&mut report.damaged);
    report.seconds = clock.now().since_ms(began) as f64 / 1000.0;
    Ok(report)
}

/// Law 7: whose it is, before the first byte. A target that is bound to no volume is from now on.
fn settle_identity(name: &str, source: &Identity, target: &dyn MergeTarget) -> Result<()> {
    let held = target.identity();
    check_identity(name, source, held, target.geometry())?;
    if source.is_bound() && held.volume.is_nil() {
        return target.bind(source.volume, source.instant());
    }
    Ok(())
}

/// Whether all of the sources may be merged, so that none is where one of them may not.
pub fn check_all(sources: &[&dyn PieceSource], target: &dyn MergeTarget) -> Result<()> {
    let mut held = target.identity();
    for source in sources {
        let identity = source.identity();
        check_identity(&source.name(), &identity, held, target.geometry())?;
        if identity.is_bound() && held.volume.is_nil() {
            // As `bind` will have it.
            (held.volume, held.generation) = (identity.volume, identity.generation);
            let cut = identity.instant();
            held.span = held.takes_unbound.then_some(CutSpan { oldest: cut, newest: cut });
        }
        // As it will be if nothing turns out to be damaged or to lie on a medium that is not here.
        held.span = match (held.span, source.lineage()) {
            (Some(span), Some(lineage)) => Some(widened(span, &lineage)),
            (span, _) => span,
        };
    }
    Ok(())
}

fn check_identity(
    name: &str,
    source: &Identity,
    target: TargetIdentity,
    geometry: Geometry,
) -> Result<()> {
    let TargetIdentity { volume, generation, span, takes_unbound } = target;
    let (size, expected) = (source.geometry.size(), geometry.size());
    if size != expected {
        return Err(Error::identity(format!(
            "expected a source of the target's {expected} bytes, found {size} in the {name}; merge \
             what is of this volume"
        )));
    }
    if !source.is_bound() && !takes_unbound {
        return Err(Error::identity(format!(
            "expected a bundle of volume {volume}, found the {name}, which names none: make one of \
             a snapshot, or stop the daemon and merge into the device with its map"
        )));
    }
    if let (false, Some(span)) = (source.is_bound(), span) {
        return Err(Error::identity(format!(
            "expected a bundle of volume {volume}, since the target was filled from one of {}, \
             found the {name}, of which nobody knows the cut: blocks of two cuts could be mixed",
            span.newest
        )));
    }
    if let (true, Some(span)) = (source.volume == volume, span) {
        return check_span(name, source.instant(), span);
    }
    if source.is_bound()
        && !volume.is_nil()
        && (source.volume, source.generation) != (volume, generation)
    {
        let advice = match source.volume == volume {
            true => "make a bundle of a snapshot taken since the loss",
            false => "merge the bundle of this volume",
        };
        return Err(Error::identity(format!(
            "expected volume {volume} of generation {generation}, found volume {} of generation \
             {} in the {name}; {advice}",
            source.volume, source.generation
        )));
    }
    Ok(())
}

/// What a piece did to the target.
#[derive(Clone, Copy, Debug, Default)]
struct Filled {
    written: u64,
    zeroed: u64,
}

/// Fills what the pump opens.
struct Filler<'a> {
    target: &'a dyn MergeTarget,
    seams: Seams,
    /// What was wanted and held by others when its piece came by, the first `REPORT_RUNS_MAX`.
    left_over: Mutex<Vec<BlockRange>>,
}

impl Filler<'_> {
    fn note_left_over(&self, blocks: BlockRange) {
        if !self.target.wanted(blocks).is_empty() {
            let mut left_over = self.left_over.lock().unwrap_or_else(PoisonError::into_inner);
            if left_over.len() < REPORT_RUNS_MAX {
                left_over.push(blocks);
            }
        }
    }

    fn fill(&self, blocks: BlockRange, bytes: Option<&[u8]>) -> Result<Filled> {
        let written = self.target.fill(blocks, bytes)?;
        self.note_left_over(blocks);
        Ok(Filled { written, zeroed: if bytes.is_none() { written } else { 0 } })
    }

    /// Parts of blocks, which their neighbours make whole.
    fn fill_edges(
        &self,
        range: ByteRange,
        edges: [Option<ByteRange>; 2],
        bytes: Option<&[u8]>,
    ) -> Result<Filled> {
        let mut filled = Filled::default();
        for edge in edges.into_iter().flatten() {
            let start = (edge.offset - range.offset) as usize;
            let part = bytes.map(|bytes| &bytes[start..][..edge.length as usize]);
            if let Some((block, bytes)) = self.seams.add(edge, part) {
                filled.written += self.fill(block, Some(&bytes))?.written;
            }
        }
        Ok(filled)
    }
}

/// A claim that is being written, the blocks of its piece, and what was filled beside it.
struct Filling {
    claim: Claim,
    blocks: BlockRange,
    bytes: u64,
    edges: Filled,
}

impl Consumer for Filler<'_> {
    type Claim = Filling;
    type Note = Filled;

    fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
        let geometry = self.target.geometry();
        let runs = self.target.wanted(geometry.touched(range)).into_iter();
        runs.filter_map(|run| geometry.bytes_of(run).intersect(range)).collect()
    }

    fn begin(&self, range: ByteRange, opened: Opened<'_>) -> Result<Begun<Filling, Filled>> {
        let geometry = self.target.geometry();
        let cut = cut(range, geometry);
        let bytes = match opened {
            Opened::Zero => None,
            Opened::Bytes(bytes) => Some(bytes),
        };
        let edges = self.fill_edges(range, cut.edges, bytes)?;
        if cut.blocks.is_empty() {
            return Ok(Begun::Done(edges));
        }
        if bytes.is_none() {
            let Filled { written, zeroed } = self.fill(cut.blocks, None)?;
            return Ok(Begun::Done(Filled { written: written + edges.written, zeroed }));
        }
        let claim = self.target.claim(cut.blocks)?;
        if claim.runs.is_empty() {
            self.note_left_over(cut.blocks);
            return Ok(Begun::Done(edges));
        }
        let runs: Vec<_> = claim.runs.iter().map(|run| geometry.bytes_of(*run)).collect();
        let bytes = runs.iter().map(|run| run.length).sum();
        let filling = Filling { claim, blocks: cut.blocks, bytes, edges };
        Ok(Begun::Writing { claim: filling, device: self.target.device(), runs })
    }

    fn end(&self, filling: Filling, result: Result<()>) -> Result<Filled> {
        self.target.settle(filling.claim, &result);
        result?;
        self.note_left_over(filling.blocks);
        let Filled { written, zeroed } = filling.edges;
        Ok(Filled { written: written + filling.bytes, zeroed })
    }
}

struct Merge<'a> {
    target: &'a dyn MergeTarget,
    progress: OnMergeProgress<'a>,
    clock: MonotonicClock,
    told: Option<Instant>,
    committed: Instant,
    uncommitted: u64,
    state: MergeProgress,
    report: MergeReport,
}

impl Merge<'_> {
    fn passes(&mut self, source: &dyn PieceSource, crew: Crew) -> Result<()> {
        let seams = Seams::new(self.target.geometry());
        let filler = Filler { target: self.target, seams, left_over: Mutex::default() };
        pump(source, &filler, crew, |events| self.hear(events, true))?;
        self.report.shortfall = source.shortfall().map(|error| error.to_string());
        let held =
            std::mem::take(&mut *filler.left_over.lock().unwrap_or_else(PoisonError::into_inner));
        let left_over = held.into_iter().any(|run| !self.target.wanted(run).is_empty());
        if left_over && source.is_repeatable() {
            pump(source, &filler, crew, |events| self.hear(events, false))?;
        } else if left_over {
            self.report.shortfall.get_or_insert_with(|| {
                "some blocks were in use when they came by, and cannot come again: run it again"
                    .into()
            });
        }
        Ok(())
    }

    /// `first`: of the first pass, in which every piece is counted; the second only adds to it.
    fn hear(&mut self, events: Vec<Event<Filled>>, first: bool) -> Result<ControlFlow<()>> {
        for Event { range, chunks, bytes_read, outcome } in events {
            let report = &mut self.report;
            report.bytes_read += bytes_read;
            if first {
                report.chunks_total += chunks;
                report.bytes_skipped += range.length;
                self.state.bytes_done += range.length;
            }
            let damaged = matches!(outcome, Outcome::Damaged(_));
            match outcome {
                Outcome::Unwanted => {}
                Outcome::Consumed(Filled { written, zeroed }) => {
                    report.bytes_written += written;
                    report.bytes_zeroed += zeroed;
                    self.state.bytes_written += written;
                    self.uncommitted += written;
                }
                Outcome::Damaged(_) if first => self.damaged(range),
                Outcome::Damaged(_) => {}
            }
            if first && !damaged {
                self.bring_what_is_in_doubt(range);
            }
        }
        self.commit_if_due()?;
        let now = self.clock.now();
        if self.told.is_none_or(|told| now.since_ms(told) >= PROGRESS_INTERVAL_MS) {
            return Ok(self.tell());
        }
        Ok(ControlFlow::Continue(()))
    }

    fn damaged(&mut self, range: ByteRange) {
        let report = &mut self.report;
        report.chunks_damaged += 1;
        self.state.chunks_damaged += 1;
        // Neither written nor skipped.
        report.bytes_skipped -= range.length;
        if report.damaged.len() < REPORT_RUNS_MAX {
            report.damaged.push(range);
        }
        if self.target.repair(self.target.geometry().touched(range)) {
            report.chunks_repaired += 1;
        }
    }

    fn bring_what_is_in_doubt(&mut self, range: ByteRange) {
        let geometry = self.target.geometry();
        for run in self.target.in_doubt(geometry.touched(range)) {
            // A piece that ends within a block shares it with its neighbour: counted there.
            let bytes = geometry.bytes_of(run).intersect(range).map_or(0, |part| part.length);
            self.report.bytes_skipped = self.report.bytes_skipped.saturating_sub(bytes);
            if self.target.repair(run) {
                self.report.bytes_fetched += bytes;
            } else {
                self.report.bytes_in_doubt += bytes;
            }
        }
    }

    fn commit_if_due(&mut self) -> Result<()> {
        let now = self.clock.now();
        let due = self.uncommitted >= MERGE_COMMIT_BYTES
            || (self.uncommitted > 0 && now.since_ms(self.committed) >= MERGE_COMMIT_MS);
        if due {
            self.target.commit()?;
            self.uncommitted = 0;
            self.committed = self.clock.now();
        }
        Ok(())
    }

    fn tell(&mut self) -> ControlFlow<()> {
        self.told = Some(self.clock.now());
        (self.progress)(&self.state)
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
