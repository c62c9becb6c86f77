//! Claims: the exclusive right to make blocks current, and who waits for it (R6).
//!
//! | claim | held by | may be taken over by a write |
//! |---|---|---|
//! | Fetch | a fetch on the wire | yes: the answer is then not kept |
//! | Fill | a fetched block being written | no, it is short |
//! | Write | a guest write under way locally | no |
//! | Merge | a bundle's block being written | no |
//! | Push | an unsent block being read to be sent | no |

use std::collections::HashMap;

use crate::extent::{BlockRange, ExtentMap};

pub type ClaimId = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    Fetch,
    Fill,
    Write,
    Merge,
    Push,
}

#[derive(Debug)]
struct Holder {
    kind: ClaimKind,
    waiters: Vec<u64>,
}

#[derive(Debug, Default)]
pub struct Claims {
    runs: ExtentMap<ClaimId>,
    holders: HashMap<ClaimId, Holder>,
    next: ClaimId,
}

impl Claims {
    /// Claims blocks that nobody holds, or that only fetches hold (which lose them).
    pub fn take(&mut self, blocks: &[BlockRange], kind: ClaimKind) -> ClaimId {
        self.next += 1;
        let id = self.next;
        for run in blocks {
            let free = self.runs.overlapping(*run).all(|(_, held)| self.may_take_over(held));
            assert!(free, "claims are exclusive: {run:?} is held");
            self.runs.insert(*run, id);
        }
        self.holders.insert(id, Holder { kind, waiters: Vec::new() });
        id
    }

    fn may_take_over(&self, id: ClaimId) -> bool {
        self.holders[&id].kind == ClaimKind::Fetch
    }

    pub fn set_kind(&mut self, id: ClaimId, kind: ClaimKind) {
        self.holders.get_mut(&id).expect("the claim is held").kind = kind;
    }

    /// Gives the claim up; returns who waited for it.
    pub fn release(&mut self, id: ClaimId, within: BlockRange) -> Vec<u64> {
        self.runs.remove_if(within, |held| held == id);
        let holder = self.holders.remove(&id).expect("a claim is released once");
        holder.waiters
    }

    /// The claims on these blocks, ascending, clipped.
    pub fn on(&self, blocks: BlockRange) -> impl Iterator<Item = (BlockRange, ClaimId, ClaimKind)> {
        self.runs.overlapping(blocks).map(|(run, id)| (run, id, self.holders[&id].kind))
    }

    /// The parts of `within` that this claim still holds.
    pub fn held_by(&self, id: ClaimId, within: BlockRange) -> Vec<BlockRange> {
        self.runs.overlapping(within).filter(|(_, held)| *held == id).map(|(run, _)| run).collect()
    }

    /// `request` is told when the claim is released.
    pub fn wait(&mut self, id: ClaimId, request: u64) {
        let holder = self.holders.get_mut(&id).expect("the claim is held");
        if !holder.waiters.contains(&request) {
            holder.waiters.push(request);
        }
    }

    /// Those who wait for the claim, which goes on.
    pub fn waiters(&self, id: ClaimId) -> &[u64] {
        &self.holders[&id].waiters
    }

    /// Blocks claimed by anything but fetches on the wire.
    pub fn busy(&self, blocks: BlockRange) -> bool {
        self.on(blocks).any(|(_, _, kind)| kind != ClaimKind::Fetch)
    }
}
