//! What changed between two cuts: what an incremental bundle holds.
//!
//! Guarantees: every block whose bytes at the later cut may differ from those at the earlier one is
//! in the answer, also where a map was damaged (`chain.rs`); a cut that is not remembered is
//! refused, never taken for another.
//! Does not know: bundles.

use std::fmt::Write;

use uuid::Uuid;

use super::catalogue::CutRecord;
use super::chain::SnapshotChain;
use crate::bitmap::Bitmap;
use crate::error::{Error, Result};

/// Cuts that a refusal lists, the latest of all.
const LISTED_MAX: usize = 16;

impl SnapshotChain {
    /// The cut `base`, and the blocks that changed since then up to the cut `snapshot`. The
    /// snapshots of both may have been deleted.
    pub fn changed_between(&self, base: Uuid, snapshot: Uuid) -> Result<(CutRecord, Bitmap)> {
        let cuts = self.cuts();
        let place = |id: Uuid| cuts.iter().position(|cut| cut.snapshot == id);
        let known = || listed(&cuts);
        let from = place(base).ok_or_else(|| {
            Error::usage(format!(
                "expected a cut that this backup remembers, found {base}: {}; or make a full \
                 bundle, without --since",
                known()
            ))
            .with_errno(2)
        })?;
        let to = place(snapshot).ok_or_else(|| super::chain::unknown(snapshot))?;
        if from > to {
            return Err(Error::usage(format!(
                "expected a cut before snapshot {snapshot}, found {base}, which is later: {}",
                known()
            )));
        }
        let total = Bitmap::new(self.geometry().blocks(), false);
        for cut in &cuts[from + 1..=to] {
            let changed = self.changed_before(cut.snapshot)?;
            for run in changed.runs(self.geometry().all_blocks(), true) {
                total.fill(run, true);
            }
        }
        Ok((cuts[from].clone(), total))
    }
}

fn listed(cuts: &[CutRecord]) -> String {
    if cuts.is_empty() {
        return "it remembers none".into();
    }
    let mut text = String::from("it remembers ");
    for (at, cut) in cuts.iter().rev().take(LISTED_MAX).enumerate() {
        let comma = if at > 0 { ", " } else { "" };
        let label = if cut.label.is_empty() { String::new() } else { format!(" {:?}", cut.label) };
        write!(text, "{comma}{}{label}", cut.snapshot).expect("text takes text");
    }
    if cuts.len() > LISTED_MAX {
        write!(text, " and {} earlier ones", cuts.len() - LISTED_MAX).expect("text takes text");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::{CrashingDirectory, Device, Power, RamDevice};
    use crate::error::ErrorKind;
    use crate::extent::BlockRange;
    use crate::snapshot::CutOrder;
    use crate::units::{BlockSize, Geometry};

    fn chain() -> SnapshotChain {
        let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
        let directory = Arc::new(CrashingDirectory::new(Power::steady()));
        let device: Arc<dyn Device> = Arc::new(RamDevice::new(1 << 20));
        SnapshotChain::create(directory, device, geometry, Uuid::from_u128(9)).expect("created")
    }

    fn cut(chain: &SnapshotChain, id: u128) -> Uuid {
        let snapshot = Uuid::from_u128(id);
        let label = format!("cut {id}");
        let order = CutOrder { snapshot, label, created_ms: 0, selection: Vec::new() };
        chain.cut(&order, id as u64).expect("cut");
        snapshot
    }

    fn change(chain: &SnapshotChain, block: u64) {
        let blocks = BlockRange::one(block);
        chain.prepare(&[blocks]).expect("prepared");
    }

    #[test]
    fn the_changes_between_two_cuts_are_those_of_all_intervals_between() {
        let chain = chain();
        let first = cut(&chain, 1);
        change(&chain, 3);
        let second = cut(&chain, 2);
        change(&chain, 5);
        let third = cut(&chain, 3);
        change(&chain, 7);
        chain.delete(first).expect("deleted");
        let blocks = |from, to| {
            let (base, changed) = chain.changed_between(from, to).expect("known");
            assert_eq!(base.snapshot, from);
            changed.runs(BlockRange::new(0, 256), true).map(|run| run.start).collect::<Vec<_>>()
        };
        assert_eq!(blocks(first, third), [3, 5]);
        assert_eq!(blocks(first, second), [3]);
        assert_eq!(blocks(second, third), [5]);
        assert!(blocks(third, third).is_empty());
    }

    #[test]
    fn unknown_and_later_cuts_are_refused_with_those_that_are_known() {
        let chain = chain();
        let first = cut(&chain, 1);
        let second = cut(&chain, 2);
        let refused = chain.changed_between(Uuid::from_u128(77), second).expect_err("unknown");
        assert_eq!(refused.kind(), ErrorKind::Usage);
        let text = refused.to_string();
        assert!(text.contains(&first.to_string()) && text.contains("cut 2"), "{text}");
        assert!(chain.changed_between(second, first).is_err());
    }
}
