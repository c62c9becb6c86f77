//! A bundle on its way into the live volume, one step at a time, so that everything else can happen
//! in between: read and verified, claimed, written, settled.
//!
//! Guarantees: what is claimed is what the oracle allows there (laws 4 and 5).
//! Does not know: the pipeline, which does the same on threads.

use std::sync::Arc;

use super::rare::RareState;
use super::shelf::Carried;
use super::stamp::{self, SECTOR};
use super::world::World;
use crate::device::AlignedBuffer;
use crate::error::{ErrorKind, Result};
use crate::extent::BlockRange;
use crate::merge::{Claim, MergeTarget, Strand, check_all};
use crate::volume::primary::LiveTarget;

struct Held {
    claim: Claim,
    /// Of these blocks, the content.
    blocks: BlockRange,
    bytes: AlignedBuffer,
    written: Option<Result<()>>,
}

/// See the module.
pub struct Merging {
    target: Arc<LiveTarget>,
    from: Carried,
    /// Blocks that have not come by yet.
    left: Vec<BlockRange>,
    held: Vec<Held>,
    is_old: bool,
}

impl Merging {
    pub fn has_claims(&self) -> bool {
        !self.held.is_empty()
    }
}

impl World {
    pub fn begin_merge(&mut self) {
        let Some(running) = self.primary.running.clone() else { return };
        if self.merging.is_some() || self.shelf.is_empty() {
            return;
        }
        let Some(driver) = running.volume.live() else { return };
        let at = self.chance.index(self.shelf.len());
        let from = self.shelf[at].clone();
        let found = from.source().identity();
        let is_old = found.generation < driver.map().identity().generation;
        let target = LiveTarget::for_sources(&running.volume, &[from.source()]);
        self.look();
        let target = match target {
            Ok(mut targets) => targets.remove(0),
            Err(error) => {
                self.note(|| format!("the bundle is refused: {error}"));
                if is_old {
                    self.rare.note(RareState::OldBundleRefused);
                }
                return;
            }
        };
        // What was looked at meanwhile may have ended the process.
        let same = self.primary.driver().is_some_and(|now| Arc::ptr_eq(&now, &driver));
        let strand = Strand { source: from.source(), target: &*target, lane: 0 };
        let checked = check_all(&[strand]);
        if !same || checked.is_err() {
            return;
        }
        self.note(|| format!("a merge begins, old: {is_old}"));
        let mut left = Vec::new();
        let mut start = 0;
        let blocks = self.setting.geometry.blocks();
        while start < blocks {
            // Where blocks are many, most of them come by together.
            let most = if blocks > 64 { blocks } else { 4 };
            let end = (start + 1 + self.chance.below(most)).min(blocks);
            left.push(BlockRange::new(start, end));
            start = end;
        }
        self.merging = Some(Merging { target, from, left, held: Vec::new(), is_old });
    }

    /// The next step of the merge, whichever of those that are possible.
    pub fn go_on_merging(&mut self) {
        let Some(mut merging) = self.merging.take() else { return };
        const HELD_MAX: usize = 3;
        let advances = self.chance.below(HELD_MAX as u64) < merging.held.len() as u64;
        let kept = match advances || merging.left.is_empty() {
            true if !merging.held.is_empty() => {
                let at = self.chance.index(merging.held.len());
                self.advance(&mut merging, at);
                true
            }
            _ => self.claim_next(&mut merging),
        };
        if kept && !(merging.left.is_empty() && merging.held.is_empty()) {
            self.merging = Some(merging);
        } else {
            self.note(|| "the merge ends".to_owned());
            self.finish_claims(merging);
        }
        self.look();
    }

    /// What is claimed is written and settled; no more is.
    pub fn end_merge(&mut self) {
        if let Some(merging) = self.merging.take() {
            self.finish_claims(merging);
        }
        self.look();
    }

    fn finish_claims(&mut self, mut merging: Merging) {
        while !merging.held.is_empty() {
            self.advance(&mut merging, 0);
        }
    }

    /// Writes what is claimed, or settles what is written.
    fn advance(&mut self, merging: &mut Merging, at: usize) {
        let geometry = self.setting.geometry;
        let held = &mut merging.held[at];
        if held.written.is_none() {
            let from = geometry.bytes_of(held.blocks).offset;
            let device = merging.target.device();
            let written = held.claim.runs.iter().try_for_each(|run| {
                let bytes = geometry.bytes_of(*run);
                let start = (bytes.offset - from) as usize;
                device.write_at(bytes.offset, &held.bytes[start..start + bytes.length as usize])
            });
            held.written = Some(written);
            return;
        }
        let Held { claim, written, .. } = merging.held.swap_remove(at);
        self.note(|| format!("merged {:?}: {written:?}", claim.runs));
        merging.target.settle(claim, &written.expect("just seen"));
    }

    /// Reads the next blocks and claims what of them is wanted; `false` if the merge has ended.
    fn claim_next(&mut self, merging: &mut Merging) -> bool {
        let Some(blocks) = merging.left.pop() else { return true };
        let whole = self.setting.geometry.bytes_of(blocks);
        let mut bytes = AlignedBuffer::zeroed(whole.length as usize);
        match merging.from.read(whole, &mut bytes) {
            Ok(_) => {}
            Err(error) if merging.from.damaged && error.kind() != ErrorKind::Usage => {
                self.rare.note(RareState::DamagedChunkRefused);
                return true;
            }
            Err(error) => panic!("a sound bundle cannot be read: {error}"),
        }
        if !merging.target.in_doubt(blocks).is_empty() {
            self.rare.note(RareState::MergeSkippedLinkOnly);
        }
        let Ok(claim) = merging.target.claim(blocks) else { return false };
        self.note(|| format!("the merge claims {:?}", claim.runs));
        for run in &claim.runs {
            self.check_claimed(*run, whole.offset, &bytes);
        }
        if claim.runs.is_empty() {
            return true;
        }
        if merging.is_old {
            self.rare.note(RareState::OldBundleVouched);
        }
        merging.held.push(Held { claim, blocks, bytes, written: None });
        true
    }

    fn check_claimed(&self, run: BlockRange, from: u64, bytes: &[u8]) {
        let range = self.setting.geometry.bytes_of(run);
        for at in stamp::sectors(range) {
            if self.setting.window.binary_search(&at).is_ok() {
                let start = (at * SECTOR - from) as usize;
                let value = stamp::value(&bytes[start..start + SECTOR as usize]);
                self.oracle.check_settled(at, value);
            }
        }
    }
}
