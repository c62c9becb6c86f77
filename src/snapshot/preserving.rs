//! Old bytes kept before they are overwritten, and what happens when they cannot be.
//!
//! | the bytes of a touched block | then |
//! |---|---|
//! | no intact snapshot selected it, or one from the target on preserved it | nothing to do |
//! | else | into the target, the newest intact snapshot: bytes durable, then its map |
//! | that fails (store full, I/O error) | the target breaks; the next intact one is the target |
//!
//! With a target breaks each older snapshot that now lacks a block it selected.
//!
//! Guarantees: when `preserve` has returned, every snapshot that is still intact can be read as at
//! its cut whatever happens to the touched blocks (law 6, R13); those that are not are broken
//! durably. A full store never fails a write.
//! Does not know: the writes themselves.

use std::sync::Arc;

use super::chain::{CHANGED, SnapshotChain, joined};
use super::member::Snapshot;
use super::selection::Selection;
use crate::error::Result;
use crate::extent::{BlockRange, subtract};

impl SnapshotChain {
    /// Both that come before the blocks of `touched` are overwritten.
    pub fn prepare(&self, touched: &[BlockRange]) -> Result<()> {
        self.preserve(touched)?;
        self.mark_changed(touched)
    }

    /// To be called before the blocks of `touched` are overwritten. Fails only if a snapshot that
    /// lost its bytes cannot be marked so: then nothing may be overwritten.
    pub fn preserve(&self, touched: &[BlockRange]) -> Result<()> {
        let _held = self.lock();
        let members = self.members();
        let touched = joined(touched);
        while let Some(target) = members.iter().rposition(|member| member.is_intact()) {
            let needed = unpreserved(&members, target, &touched);
            if needed.is_empty() {
                return Ok(());
            }
            let kept = members[target].preserve(self.copier(), self.device(), &needed);
            let Err(error) = kept else {
                return Ok(());
            };
            members[target].break_off(&error.to_string())?;
            break_dependents(&members[..target], needed)?;
            self.reclaim(&members);
        }
        Ok(())
    }

    /// To be called before the blocks of `touched` are overwritten: their bits of the backup map
    /// are durable when it returns.
    pub fn mark_changed(&self, touched: &[BlockRange]) -> Result<()> {
        let held = self.lock();
        if let Some(error) = &held.uncertain {
            return Err(error.clone());
        }
        for run in touched {
            held.changed.fill(CHANGED, *run, true);
        }
        held.changed.commit_all()
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
    let mut wanted = Vec::new();
    for member in members[..=target].iter().filter(|member| member.is_intact()) {
        for run in touched.runs() {
            wanted.extend(member.record().selection.within(*run));
        }
    }
    let mut rest = joined(&wanted).runs().to_vec();
    for member in &members[target..] {
        rest = without_preserved(rest, member);
    }
    rest
}

/// The parts of `runs` that the snapshot has not preserved.
pub(super) fn without_preserved(runs: Vec<BlockRange>, member: &Snapshot) -> Vec<BlockRange> {
    let Some(bits) = member.preserved() else { return runs };
    runs.into_iter().flat_map(|run| subtract(run, bits.runs(run, true))).collect()
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
