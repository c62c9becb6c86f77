//! Merges bundles and images into a target, live or not: the same code.
//!
//! | step | where | law |
//! |---|---|---|
//! | identities of all sources compared | `admission.rs`, before anything is read | 7 |
//! | what is not wanted passed over, the rest read and verified | the pump's workers | 9 |
//! | claimed and re-checked, written, marked | the target, the pump's queues, the target | 4 |
//! | blocks that no bundle may supply after a crash brought over the link | the target | 5 |
//! | made durable every `MERGE_COMMIT_BYTES` or `MERGE_COMMIT_MS` | the caller's thread | 2 |
//! | pieces that others held meanwhile gone through once more | | |
//! | damaged chunks that no other source had the blocks of brought over the link | the target | 9 |
//!
//! | a source | then |
//! |---|---|
//! | ends | the next one of its lane begins |
//! | fails (pulled out, connection lost) | the same; its error is in the report |
//! | fails, and is the only one | its error is that of the merge |
//!
//! Guarantees: memory is that of `JOBS_TOGETHER` jobs and of the seams, whatever the size and the
//! number of sources; what was filled is committed also when it is stopped or fails; a second run
//! writes nothing.
//! Does not know: whether the target is being served, which sources share a disk.

use std::ops::{ControlFlow, Range};

use super::admission::{admit, check};
use super::filler::{Filled, Filler};
use super::report::{MergeProgress, MergeReport, SourceReport};
use super::target::MergeTarget;
use crate::bundle::{Crew, Event, Feed, Outcome, PieceSource, Word, run_all as pump, stopped};
use crate::clock::{Instant, MonotonicClock};
use crate::device::Engine;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::{
    JOBS_TOGETHER, JOBS_UNDER_WAY, MERGE_COMMIT_BYTES, MERGE_COMMIT_MS, MERGE_LANES_MAX,
    PROGRESS_INTERVAL_MS, REPORT_RUNS_MAX,
};

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

/// A source on its way into a target.
#[derive(Clone, Copy)]
pub struct Strand<'a> {
    pub source: &'a dyn PieceSource,
    /// Of the same volume for all strands; what this source may supply of it.
    pub target: &'a dyn MergeTarget,
    /// Strands of one lane are merged one after the other (their media are one disk), lanes side
    /// by side.
    pub lane: usize,
}

/// Called on the thread that merges; says whether to go on.
pub type OnMergeProgress<'a> = &'a mut dyn FnMut(&MergeProgress) -> ControlFlow<()>;

/// Merges all of one source. See the module.
pub fn run(
    source: &dyn PieceSource,
    target: &dyn MergeTarget,
    options: &MergeOptions,
    progress: OnMergeProgress<'_>,
) -> Result<MergeReport> {
    let mut report = run_all(&[Strand { source, target, lane: 0 }], options, progress)?;
    match report.sources[0].error.take() {
        Some(error) => Err(error),
        None => Ok(report),
    }
}

/// Merges all of several sources. One that fails is no error here: the report has it.
pub fn run_all(
    strands: &[Strand<'_>],
    options: &MergeOptions,
    progress: OnMergeProgress<'_>,
) -> Result<MergeReport> {
    if options.threads == 0 {
        return Err(Error::usage("expected at least one thread to merge with"));
    }
    let stages = admit(strands)?;
    let clock = MonotonicClock::default();
    let began = clock.now();
    let state = MergeProgress {
        bytes_total: strands.iter().map(|strand| strand.source.bytes_total()).sum(),
        sources: strands.len() as u64,
        ..MergeProgress::default()
    };
    let mut merge = Merge {
        strands,
        options,
        progress,
        clock,
        told: None,
        committed: began,
        uncommitted: 0,
        state,
        accounts: vec![SourceReport::default(); strands.len()],
        damage: Vec::new(),
        side_by_side: 0,
    };
    let done = stages.into_iter().try_for_each(|stage| merge.stage(stage));
    // What was filled is kept, however it ended.
    let committed = strands[0].target.commit();
    done?;
    committed?;
    // All is done: a wish to stop comes too late.
    let _too_late = merge.tell();
    let bytes_stale = strands.iter().map(|strand| strand.target.bytes_stale()).max().unwrap_or(0);
    Ok(MergeReport {
        seconds: clock.now().since_ms(began) as f64 / 1000.0,
        side_by_side: merge.side_by_side,
        ..MergeReport::of(merge.accounts, bytes_stale)
    })
}

struct Merge<'a> {
    strands: &'a [Strand<'a>],
    options: &'a MergeOptions,
    progress: OnMergeProgress<'a>,
    clock: MonotonicClock,
    told: Option<Instant>,
    committed: Instant,
    uncommitted: u64,
    state: MergeProgress,
    accounts: Vec<SourceReport>,
    /// Damaged chunks whose blocks another source may have, the first `REPORT_RUNS_MAX`.
    damage: Vec<(usize, ByteRange)>,
    side_by_side: usize,
}

/// One strand of a pass.
struct Member<'a> {
    number: usize,
    filler: Filler<'a>,
}

impl<'a> Merge<'a> {
    /// Strands that may go side by side, from the first byte to what follows from all of them.
    fn stage(&mut self, stage: Range<usize>) -> Result<()> {
        let mut members: Vec<Member<'a>> = Vec::new();
        for number in stage.clone() {
            match check(&self.strands[number]) {
                Ok(()) => {
                    let filler = Filler::new(self.strands[number].target);
                    members.push(Member { number, filler });
                }
                Err(error) => self.end(number, Err(error), true),
            }
        }
        self.pass(&members, true)?;
        members.retain(|member| self.is_to_be_repeated(member));
        self.pass(&members, false)?;
        self.settle_damage()?;
        self.descend(stage)
    }

    fn descend(&mut self, stage: Range<usize>) -> Result<()> {
        let strands = &self.strands[stage];
        let lineages = strands.iter().filter_map(|strand| strand.source.lineage());
        let lineages: Vec<_> = lineages.collect();
        if !lineages.is_empty() {
            // Durable first: an earlier cut must not supply what is not known to be current.
            self.commit()?;
        }
        lineages.iter().try_for_each(|lineage| strands[0].target.descend(lineage))
    }

    /// Whether something is wanted still that others held when it came by.
    fn is_to_be_repeated(&mut self, member: &Member<'_>) -> bool {
        let source = self.strands[member.number].source;
        let account = &mut self.accounts[member.number];
        account.shortfall = source.shortfall().map(|error| error.to_string());
        let left_over = account.error.is_none() && member.filler.has_left_over();
        if left_over && !source.is_repeatable() {
            account.shortfall.get_or_insert_with(|| {
                "some blocks were in use when they came by, and cannot come again: run it again"
                    .into()
            });
        }
        left_over && source.is_repeatable()
    }

    /// `first`: every piece is counted; another pass only adds to it.
    fn pass(&mut self, members: &[Member<'_>], first: bool) -> Result<()> {
        let mut lanes: Vec<usize> = Vec::new();
        for member in members {
            let lane = self.strands[member.number].lane;
            if !lanes.contains(&lane) {
                lanes.push(lane);
            }
        }
        let count = lanes.len().clamp(1, MERGE_LANES_MAX);
        self.side_by_side = self.side_by_side.max(lanes.len().min(count));
        let mut feeds = Vec::new();
        for Member { number, filler } in members {
            let Strand { source, target, lane } = self.strands[*number];
            let place = lanes.iter().position(|known| *known == lane).expect("collected above");
            let jobs = (JOBS_TOGETHER / count).min(JOBS_UNDER_WAY);
            let threads = (self.options.threads / count).max(1);
            let crew = self.crew(source, target, threads);
            self.accounts[*number].engine = crew.engine.name();
            feeds.push(Feed { source, consumer: filler, crew, lane: place % count, jobs });
        }
        pump(&feeds, |word| {
            match word {
                Word::Happened(at, events) => self.hear(members[at].number, events, first),
                Word::Ended(at, ended) => self.end(members[at].number, ended, first),
                Word::Silence => {}
            }
            self.commit_if_due()?;
            Ok(self.tell_if_due())
        })
    }

    fn crew(&self, source: &dyn PieceSource, target: &dyn MergeTarget, threads: usize) -> Crew {
        if let Some(needed) = source.engine() {
            // As many threads as jobs, for each waits for the source as long as its job does.
            let engine = self.options.engine.unwrap_or(needed);
            return Crew { engine, threads: JOBS_UNDER_WAY, at_once: false };
        }
        let at_once = source.answers_at_once() || target.device().answers_at_once();
        Crew::suited(self.options.engine, threads, at_once)
    }

    fn end(&mut self, number: usize, result: Result<()>, first: bool) {
        self.state.sources_done += u64::from(first);
        self.accounts[number].error = result.err();
    }

    fn hear(&mut self, number: usize, events: Vec<Event<Filled>>, first: bool) {
        for Event { range, chunks, bytes_read, outcome } in events {
            let account = &mut self.accounts[number];
            account.bytes_read += bytes_read;
            if first {
                account.chunks_total += chunks;
                account.bytes_done += range.length;
                self.state.bytes_done += range.length;
            }
            let damaged = matches!(outcome, Outcome::Damaged(_));
            match outcome {
                Outcome::Unwanted => {}
                Outcome::Consumed(Filled { written, zeroed }) => {
                    account.bytes_written += written;
                    account.bytes_zeroed += zeroed;
                    self.state.bytes_written += written;
                    self.uncommitted += written;
                }
                Outcome::Damaged(_) if first => self.damaged(number, range),
                Outcome::Damaged(_) => {}
            }
            if first && !damaged {
                self.bring_what_is_in_doubt(number, range);
            }
        }
    }

    fn damaged(&mut self, number: usize, range: ByteRange) {
        self.accounts[number].note_damage(range);
        self.state.chunks_damaged += 1;
        // Another source may have it; where there is none, or too much is damaged, the link is
        // asked at once.
        if self.strands.len() > 1 && self.damage.len() < REPORT_RUNS_MAX {
            self.damage.push((number, range));
        } else if self.repair(number, range) {
            self.accounts[number].chunks_repaired += 1;
        }
    }

    fn repair(&self, number: usize, range: ByteRange) -> bool {
        let target = self.strands[number].target;
        target.repair(target.geometry().touched(range))
    }

    /// What was damaged and has come from another source meanwhile, or comes over the link now, is
    /// repaired.
    fn settle_damage(&mut self) -> Result<()> {
        for (number, range) in std::mem::take(&mut self.damage) {
            let target = self.strands[number].target;
            let blocks = target.geometry().touched(range);
            let came = target.wanted(blocks).is_empty() && target.in_doubt(blocks).is_empty();
            if came || target.repair(blocks) {
                self.accounts[number].chunks_repaired += 1;
            }
            self.commit_if_due()?;
            if self.tell_if_due().is_break() {
                return Err(stopped());
            }
        }
        Ok(())
    }

    fn bring_what_is_in_doubt(&mut self, number: usize, range: ByteRange) {
        let target = self.strands[number].target;
        let geometry = target.geometry();
        for run in target.in_doubt(geometry.touched(range)) {
            // A piece that ends within a block shares it with its neighbour: counted there.
            let bytes = geometry.bytes_of(run).intersect(range).map_or(0, |part| part.length);
            let brought = target.repair(run);
            let account = &mut self.accounts[number];
            let count =
                if brought { &mut account.bytes_fetched } else { &mut account.bytes_in_doubt };
            *count += bytes;
        }
    }

    fn commit_if_due(&mut self) -> Result<()> {
        let now = self.clock.now();
        let due = self.uncommitted >= MERGE_COMMIT_BYTES
            || (self.uncommitted > 0 && now.since_ms(self.committed) >= MERGE_COMMIT_MS);
        if due { self.commit() } else { Ok(()) }
    }

    fn commit(&mut self) -> Result<()> {
        self.strands[0].target.commit()?;
        self.uncommitted = 0;
        self.committed = self.clock.now();
        Ok(())
    }

    fn tell_if_due(&mut self) -> ControlFlow<()> {
        let now = self.clock.now();
        if self.told.is_none_or(|told| now.since_ms(told) >= PROGRESS_INTERVAL_MS) {
            return self.tell();
        }
        ControlFlow::Continue(())
    }

    fn tell(&mut self) -> ControlFlow<()> {
        self.told = Some(self.clock.now());
        (self.progress)(&self.state)
    }
}
