//! Preserved ranges given back once a bundle holds them durably.
//!
//! | said of a range | its blocks are given back |
//! |---|---|
//! | released | at once |
//! | offered | when the store is full, some at a time, before a snapshot breaks for want of room |
//!
//! Blocks that were given back take no place in the store, are preserved no more, and can never be
//! read from this snapshot again. What is offered is forgotten when the process ends.
//!
//! Guarantees: a block is given back only while no older snapshot may need it; a crash leaves it
//! given back or as it was.
//! Does not know: bundles.

use std::sync::Arc;

use uuid::Uuid;

use super::chain::{Changing, SnapshotChain, unknown};
use super::member::Snapshot;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::RELEASE_STEP_BYTES;

impl SnapshotChain {
    /// Gives back the blocks that lie whole in `range`. Only while no older snapshot is there.
    pub fn release(&self, snapshot: Uuid, range: ByteRange) -> Result<()> {
        let mut held = self.lock();
        self.settle_all(&mut held)?;
        let member = self.releasable(snapshot)?;
        if !self.geometry().contains(range) {
            return Err(Error::usage("the range to give back is not inside the volume"));
        }
        let blocks = self.geometry().covered(range);
        if blocks.is_empty() { Ok(()) } else { member.release(&[blocks]) }
    }

    /// The same, but only once there is no room for more, instead of breaking the snapshot.
    pub fn offer(&self, snapshot: Uuid, range: ByteRange) -> Result<()> {
        let members = self.members();
        let member = members.iter().find(|member| member.id() == snapshot);
        member.ok_or_else(|| unknown(snapshot))?.offer(self.geometry().covered(range));
        Ok(())
    }

    /// An error that says why blocks of the snapshot cannot be given back now, if they cannot.
    pub fn check_releasable(&self, snapshot: Uuid) -> Result<()> {
        self.releasable(snapshot).map(drop)
    }

    fn releasable(&self, snapshot: Uuid) -> Result<Arc<Snapshot>> {
        let members = self.members();
        let index = members.iter().position(|member| member.id() == snapshot);
        let index = index.ok_or_else(|| unknown(snapshot))?;
        members[index].check_intact()?;
        if members[..index].iter().any(|member| member.is_intact()) {
            return Err(Error::busy(
                "blocks of a snapshot can be given back only while no older one is there: \
                 delete the older ones first",
            ));
        }
        Ok(Arc::clone(&members[index]))
    }

    /// Makes room of what was offered; whether anything was.
    pub(super) fn release_offered(&self, held: &mut Changing) -> Result<bool> {
        let members = self.members();
        let Some(oldest) = members.iter().find(|member| member.is_intact()) else {
            return Ok(false);
        };
        let step = (RELEASE_STEP_BYTES >> self.geometry().block_size().shift()).max(1);
        let runs = oldest.take_offered(step);
        if runs.is_empty() {
            return Ok(false);
        }
        self.settle_all(held)?;
        oldest.release(&runs).map(|()| true)
    }
}
