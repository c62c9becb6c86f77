//! Lays what the pump opens under what is current: claims, writes, marks.
//!
//! Guarantees: a block is written only under a claim of the target (law 4).
//! Does not know: where pieces come from, who else fills.

use std::sync::{Mutex, PoisonError};

use super::seams::{Seams, cut};
use super::target::{Claim, MergeTarget};
use crate::bundle::{Begun, Consumer, Opened};
use crate::error::Result;
use crate::extent::{BlockRange, ByteRange};
use crate::limits::REPORT_RUNS_MAX;

/// What a piece did to the target.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filled {
    pub written: u64,
    pub zeroed: u64,
}

/// Of one source.
pub(super) struct Filler<'a> {
    target: &'a dyn MergeTarget,
    seams: Seams,
    /// What was wanted and held by others when its piece came by, the first `REPORT_RUNS_MAX`.
    left_over: Mutex<Vec<BlockRange>>,
}

impl<'a> Filler<'a> {
    pub(super) fn new(target: &'a dyn MergeTarget) -> Self {
        let seams = Seams::new(target.geometry());
        Self { target, seams, left_over: Mutex::default() }
    }

    /// Whether something is wanted still that others held when it came by. Asked once.
    pub(super) fn has_left_over(&self) -> bool {
        let mut left_over = self.left_over.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *left_over).into_iter().any(|run| !self.target.wanted(run).is_empty())
    }

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
pub(super) struct Filling {
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
