//! Snapshots removed, in any order.
//!
//! | step of a deletion | a crash after it leaves |
//! |---|---|
//! | it is leaving: nobody reads it, no write preserves into it | a deletion to be finished |
//! | what only it preserved moves to the newest intact older one, step by step | the same |
//! | its space is given back, the catalogue drops it | files nobody names, removed at a start |
//! | its files are removed | |
//!
//! A snapshot that is leaving still serves the older ones that rely on it.
//!
//! Guarantees: older snapshots read the same before, during and after. The cut itself stays known,
//! so that a bundle made from it can be vouched for. Mirrored writes go on between steps.
//! Does not know: why.

use std::sync::Arc;

use uuid::Uuid;

use super::chain::{Changing, SnapshotChain, unknown};
use super::member::{Condition, Snapshot};
use super::preserving::without_preserved;
use crate::error::Result;
use crate::extent::BlockRange;
use crate::limits::MOVE_STEP_BYTES;

impl SnapshotChain {
    /// Deletes a snapshot; durable when it returns.
    pub fn delete(&self, snapshot: Uuid) -> Result<()> {
        {
            let mut held = self.lock();
            self.settle_all(&mut held)?;
            let members = self.members();
            let leaving = members.iter().find(|member| member.id() == snapshot);
            leaving.ok_or_else(|| unknown(snapshot))?.leave()?;
        }
        let mut from = 0;
        loop {
            let mut held = self.lock();
            let members = self.members();
            let index = members.iter().position(|member| member.id() == snapshot);
            let index = index.ok_or_else(|| unknown(snapshot))?;
            match self.move_step(&members, index, from)? {
                Some(next) => from = next,
                // From the start once more: a deletion beside this one may have changed the heir.
                None if from > 0 => from = 0,
                None => return self.finish_deletion(&mut held, &members, index),
            }
        }
    }

    /// Goes on with deletions that a crash, or an error, has interrupted.
    pub fn finish_deletions(&self) -> Result<()> {
        for member in &*self.members() {
            if member.condition() == Condition::Leaving {
                self.delete(member.id())?;
            }
        }
        Ok(())
    }

    /// Moves some blocks at or after `from` that only the leaving snapshot preserved to its heir;
    /// returns where to go on, `None` if there were none.
    fn move_step(&self, members: &[Arc<Snapshot>], index: usize, from: u64) -> Result<Option<u64>> {
        let Some(heir) = members[..index].iter().rposition(|member| member.is_intact()) else {
            return Ok(None);
        };
        let leaving = &members[index];
        let (Some(bits), Some(storage)) = (leaving.preserved(), leaving.storage()) else {
            return Ok(None);
        };
        let mut room = (MOVE_STEP_BYTES >> self.geometry().block_size().shift()).max(1);
        let mut moved: Vec<BlockRange> = Vec::new();
        'runs: for run in bits.runs(BlockRange::new(from, self.geometry().blocks()), true) {
            let mut rest = vec![run];
            for member in &members[heir..index] {
                rest = without_preserved(rest, member);
            }
            for piece in rest {
                let end = piece.end.min(piece.start + room);
                moved.push(BlockRange::new(piece.start, end));
                room -= end - piece.start;
                if room == 0 {
                    break 'runs;
                }
            }
        }
        let Some(last) = moved.last() else { return Ok(None) };
        let next = last.end;
        members[heir].preserve(self.copier(), &storage.store, &moved)?;
        for run in &moved {
            // They are durable with the heir; readers who came here look again.
            let _punched = leaving.punch(*run);
        }
        Ok(Some(next))
    }

    fn finish_deletion(
        &self,
        held: &mut Changing,
        members: &[Arc<Snapshot>],
        index: usize,
    ) -> Result<()> {
        let leaving = &members[index];
        // Makes room for the catalogue where the disk is full; nobody reads it any more.
        let _punched = leaving.punch(self.geometry().all_blocks());
        let mut new = held.catalogue.clone();
        for cut in new.cuts.iter_mut().filter(|cut| cut.snapshot == leaving.id()) {
            cut.kept = false;
        }
        self.write_catalogue(held, new)?;
        let mut rest = members.to_vec();
        rest.remove(index);
        self.set_members(rest);
        self.remove_snapshot_files(leaving.id())
    }
}
