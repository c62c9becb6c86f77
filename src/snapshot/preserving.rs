//! Old bytes kept before they are overwritten, and what happens when they cannot be.
//!
//! | the bytes of a touched block | then |
//! |---|---|
//! | no intact snapshot selected it, or one from the target on preserved it | nothing to do |
//! | else | kept in the target, the newest intact snapshot |
//! | the store is full, and a bundle holds others (`releasing.rs`) | those are given back, again |
//! | it is full or fails otherwise | the target breaks; the next intact one is the target |
//!
//! With a target breaks each older snapshot that now lacks a block it selected.
//!
//! | what is kept | how it becomes durable |
//! |---|---|
//! | short runs | their bytes in a record of the journal: one flush; the store follows later |
//! | long runs | in the store, flushed, then a record that says so |
//! | marks of change alone | a record |
//! | anything, where there is no journal | store, then the snapshot's map, then that of changes |
//!
//! Guarantees: when `prepare` has returned, the touched blocks are durably marked as changed, and
//! every snapshot that is still intact can be read as at its cut whatever happens to them (law 6,
//! R13); those that are not are broken durably. A full store never fails a write.
//! Does not know: the writes themselves.

use std::sync::Arc;

use super::chain::{Changing, SnapshotChain, joined};
use super::changes::CHANGED;
use super::journal::Lost;
use super::member::Snapshot;
use super::selection::Selection;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, subtract};
use crate::format::journal::{JournalKind, JournalRun};
use crate::limits::{JOURNAL_RUN_BYTES_MAX, STRETCH_BYTES};

const ENOSPC: i32 = 28;

/// Why a group could not be prepared.
enum Failure {
    /// The target did not take its old bytes.
    Target(Error),
    /// It is too much for one record of the journal, which is as good as before.
    TooMuch,
    /// Nothing may be overwritten.
    Stop(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Stop(error)
    }
}

/// What has to be done before a group is overwritten.
struct Group<'a> {
    /// Where old bytes go, and which.
    target: Option<(&'a Arc<Snapshot>, Vec<BlockRange>)>,
    /// Blocks to be marked as changed.
    fresh: Vec<BlockRange>,
}

impl SnapshotChain {
    /// To be called before the blocks of `touched` are overwritten. Fails only if they cannot be
    /// marked as changed, or a snapshot that lost its bytes not as broken: then nothing may be
    /// overwritten.
    pub fn prepare(&self, touched: &[BlockRange]) -> Result<()> {
        let mut held = self.lock();
        if let Some(error) = &held.uncertain {
            return Err(error.clone());
        }
        let touched = joined(touched);
        loop {
            let members = self.members();
            let target = members.iter().rposition(|member| member.is_intact());
            let target = target.map(|at| (at, unpreserved(&members, at, &touched)));
            let changed = held.changed.plane(CHANGED);
            let fresh = touched.runs().iter().flat_map(|run| changed.runs(*run, false)).collect();
            let target = target.filter(|(_, needed)| !needed.is_empty());
            let group =
                Group { target: target.clone().map(|(at, needed)| (&members[at], needed)), fresh };
            match self.keep(&mut held, &group) {
                Ok(()) => return Ok(()),
                Err(Failure::Stop(error)) => return Err(error),
                Err(Failure::TooMuch) => unreachable!("done without the journal"),
                Err(Failure::Target(error)) => {
                    let full = error.errno() == Some(ENOSPC);
                    // What a bundle holds makes room; where that fails the snapshot breaks.
                    if full && self.release_offered(&mut held).unwrap_or(false) {
                        continue;
                    }
                    let (at, needed) = target.expect("a target failed");
                    self.lose(&members[at], needed, &error)?;
                }
            }
        }
    }

    fn keep(&self, held: &mut Changing, group: &Group<'_>) -> std::result::Result<(), Failure> {
        if group.target.is_none() && group.fresh.is_empty() {
            return Ok(());
        }
        if held.journal.is_some() {
            match self.keep_in_journal(held, group) {
                Err(Failure::Stop(error)) if held.uncertain.is_none() => {
                    // The journal itself failed: without it things go on, only slower.
                    self.settle_all(held)?;
                    held.journal = None;
                    drop(error);
                }
                // Store and maps are flushed in the order of law 6, with what the journal holds.
                Err(Failure::TooMuch) => {}
                other => return other,
            }
        }
        if let Some((target, needed)) = &group.target {
            target.preserve(self.copier(), self.device(), needed).map_err(Failure::Target)?;
        }
        for run in &group.fresh {
            held.changed.fill(CHANGED, *run, true);
        }
        held.changed.commit_all().map_err(Failure::Stop)
    }

    fn keep_in_journal(
        &self,
        held: &mut Changing,
        group: &Group<'_>,
    ) -> std::result::Result<(), Failure> {
        let needed = group.target.as_ref().map_or(&[][..], |(_, needed)| needed);
        let bytes: u64 = needed.iter().map(|run| self.geometry().bytes_of(*run).length).sum();
        let marks = group.fresh.iter().flat_map(|run| {
            let from = needed.partition_point(|held| held.end <= run.start);
            subtract(*run, needed[from..].iter().copied())
        });
        let mut runs: Vec<JournalRun> =
            marks.map(|blocks| JournalRun { kind: JournalKind::Changed, blocks }).collect();
        let count = runs.len() + needed.len();
        let journal = held.journal.as_mut().expect("looked at");
        let short = bytes <= STRETCH_BYTES && bytes <= needed.len() as u64 * JOURNAL_RUN_BYTES_MAX;
        let payload = if short && journal.fits(count, bytes) { bytes } else { 0 };
        let runs_short = runs.iter().all(|run| u32::try_from(run.blocks.count()).is_ok());
        if !journal.fits(count, payload) || !runs_short {
            return Err(Failure::TooMuch);
        }
        let kind = if payload > 0 { JournalKind::Held } else { JournalKind::Stored };
        runs.extend(needed.iter().map(|blocks| JournalRun { kind, blocks: *blocks }));
        let (outcome, said) =
            journal.make_room(count, payload, &held.changed, self.copier().pool());
        if let Some(outcome) = outcome {
            outcome.changed?;
            for lost in outcome.lost {
                self.lose_all(lost)?;
            }
        }
        said?;
        let target = group.target.as_ref().map(|(target, _)| *target);
        if let Some(target) = target {
            // It may have failed just now, with what it preserved earlier.
            target.check_intact().map_err(Failure::Target)?;
            let journal = held.journal.as_ref().expect("looked at");
            let memory = (payload > 0).then(|| journal.buffer(count));
            target.store(self.copier(), self.device(), needed, memory).map_err(Failure::Target)?;
        }
        let (changed, journal) =
            (held.catalogue.changed, held.journal.as_mut().expect("looked at"));
        journal.append(target, changed, runs, payload)?;
        if let Some(target) = target {
            target.mark(needed);
        }
        for run in &group.fresh {
            held.changed.fill(CHANGED, *run, true);
        }
        Ok(())
    }

    /// Makes durable in stores and maps what only the journal says, so that a start has nothing to
    /// replay. Everything is durable without it.
    pub fn settle(&self) -> Result<()> {
        self.settle_all(&mut self.lock())
    }

    /// Makes durable elsewhere what only the journal says. To be done before a map or snapshot is
    /// replaced or removed, which nothing is once that has failed.
    pub(super) fn settle_all(&self, held: &mut Changing) -> Result<()> {
        if let Some(error) = &held.uncertain {
            return Err(error.clone());
        }
        let Some(journal) = &mut held.journal else { return Ok(()) };
        for outcome in journal.settle(&held.changed) {
            if let Err(error) = outcome.changed {
                held.uncertain = Some(error.clone());
                return Err(error);
            }
            for lost in outcome.lost {
                self.lose_all(lost)?;
            }
        }
        Ok(())
    }

    fn lose_all(&self, lost: Lost) -> Result<()> {
        self.lose(&lost.part.snapshot, lost.part.runs, &lost.error)
    }

    /// Breaks a snapshot that could not keep the blocks, and the older ones that need them.
    pub(super) fn lose(
        &self,
        snapshot: &Arc<Snapshot>,
        blocks: Vec<BlockRange>,
        error: &Error,
    ) -> Result<()> {
        let members = self.members();
        if snapshot.is_intact() {
            snapshot.break_off(&error.to_string())?;
        }
        let own = members.iter().position(|member| member.id() == snapshot.id());
        break_dependents(&members[..own.unwrap_or(0)], joined(&blocks).runs().to_vec())?;
        self.reclaim(&members);
        Ok(())
    }

    /// The space of broken snapshots goes back once no intact older one reads from it.
    fn reclaim(&self, members: &[Arc<Snapshot>]) {
        let needed_from = members.iter().position(|member| member.is_intact());
        for member in &members[..needed_from.unwrap_or(members.len())] {
            // Only space is lost if this fails.
            let _punched = member.punch(self.geometry().all_blocks());
        }
    }
}

/// The touched blocks that an intact snapshot up to `target` selected and that none from `target`
/// on has preserved.
fn unpreserved(members: &[Arc<Snapshot>], target: usize, touched: &Selection) -> Vec<BlockRange> {
    let mut rest = touched.runs().to_vec();
    for member in &members[target..] {
        rest = without_preserved(rest, member);
    }
    let mut wanted = Vec::new();
    for member in members[..=target].iter().filter(|member| member.is_intact()) {
        for run in &rest {
            wanted.extend(member.record().selection.within(*run));
        }
    }
    joined(&wanted).runs().to_vec()
}

/// The parts of `runs` that the snapshot has not preserved.
pub(super) fn without_preserved(runs: Vec<BlockRange>, member: &Snapshot) -> Vec<BlockRange> {
    let Some(bits) = member.preserved() else { return runs };
    runs.into_iter().flat_map(|run| bits.runs(run, false)).collect()
}

/// Breaks every snapshot that selected one of the `lost` blocks, or relied on it, newest first.
fn break_dependents(older: &[Arc<Snapshot>], mut lost: Vec<BlockRange>) -> Result<()> {
    for member in older.iter().rev() {
        lost = without_preserved(lost, member);
        let selection = &member.record().selection;
        let affected = lost.iter().any(|run| selection.within(*run).next().is_some());
        if affected && member.is_intact() {
            member.break_off("a newer snapshot could not keep blocks that it needs")?;
        }
    }
    Ok(())
}
