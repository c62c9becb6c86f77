//! Is this device the one that the map speaks of?
//!
//! A block that is current and not unsent is the same on both sides (I8). So before the first push
//! to the backup some of these are compared: a disk that was replaced behind a map that survived
//! would otherwise be read as the truth, and its hot extents sent over the only good copy.
//!
//! | samples | says |
//! |---|---|
//! | of blocks that must agree: one differs | a device was replaced or changed: refuse |
//! | of blocks that must agree: all agree | it is the one |
//! | none such, but of blocks presumed unsent after a crash: nearly all differ | replaced: refuse |
//! | else | nothing; a crash leaves few of these different |
//!
//! Guarantees: blocks that were written meanwhile never count as different.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::driver::{Driver, Outbox};
use crate::device::AlignedBuffer;
use crate::error::{Error, Result};
use crate::extent::BlockRange;

/// Blocks compared, spread over the volume.
const SAMPLES: u64 = 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// Fewer samples of presumed blocks say nothing.
const PRESUMED_MIN: usize = 8;

impl Driver {
    /// Compares samples of what both sides should hold.
    pub(super) fn compare_samples(&self, outbox: &Arc<dyn Outbox>) -> Result<()> {
        let sure = |block: u64| self.map().current().get(block) && !self.map().unsent().get(block);
        let all = [self.map().geometry().all_blocks()];
        let (same, different) = self.compare(outbox, &spread(&all, sure), sure)?;
        if different > 0 {
            return Err(replaced(different, same + different));
        }
        if same > 0 {
            return Ok(());
        }
        let held = |block: u64| self.map().current().get(block);
        let presumed = self.presumed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (same, different) = self.compare(outbox, &spread(&presumed, held), held)?;
        if same + different >= PRESUMED_MIN && same * 10 < different {
            return Err(replaced(different, same + different));
        }
        Ok(())
    }

    /// Another backup has taken the place of the one before: it holds nothing yet.
    pub(super) fn expect_nothing_of_the_backup(&self) {
        self.presumed.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How many of these blocks are the same on both sides, and how many are not.
    fn compare(
        &self,
        outbox: &Arc<dyn Outbox>,
        samples: &[u64],
        still: impl Fn(u64) -> bool,
    ) -> Result<(usize, usize)> {
        let geometry = self.map().geometry();
        let bytes_of = |block: u64| geometry.bytes_of(BlockRange::one(block));
        let answers: Vec<_> =
            samples.iter().map(|block| self.ask_digest(outbox, bytes_of(*block))).collect();
        let (mut same, mut different) = (0, 0);
        for (block, answer) in samples.iter().zip(answers) {
            let theirs = answer(PATIENCE)?;
            let range = bytes_of(*block);
            let mut buffer = AlignedBuffer::zeroed(range.length as usize);
            self.device.read_at(range.offset, &mut buffer)?;
            if *blake3::hash(&buffer).as_bytes() == theirs {
                same += 1;
            } else if still(*block) {
                different += 1;
            }
        }
        Ok((same, different))
    }
}

fn replaced(different: usize, compared: usize) -> Error {
    Error::identity(format!(
        "expected the device and the backup to hold the same where the map says so, found \
         {different} of {compared} samples different: a device was replaced or changed behind its \
         map; declare it with `restore --lost all` (the backup is the truth) or `--lost none` \
         (this device is)"
    ))
}

/// The first block that `fits` in each of `SAMPLES` equal stretches of the runs, if it has one.
fn spread(runs: &[BlockRange], fits: impl Fn(u64) -> bool) -> Vec<u64> {
    /// Blocks looked at in one stretch: a sample is not worth a scan of the whole map.
    const LOOK: u64 = 4096;
    let total: u64 = runs.iter().map(|run| run.count()).sum();
    let step = total.div_ceil(SAMPLES).max(1);
    let mut samples = Vec::new();
    let mut before = 0u64;
    for run in runs {
        // The stretches that begin in this run.
        let first = before.div_ceil(step) * step;
        for at in (first..before + run.count()).step_by(step as usize) {
            let start = run.start + (at - before);
            let end = (start + step.min(LOOK)).min(run.end);
            samples.extend((start..end).find(|block| fits(*block)));
        }
        before += run.count();
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_over_the_runs_and_fit() {
        let runs = [BlockRange::new(10, 20), BlockRange::new(1_000, 1_246)];
        let samples = spread(&runs, |block| block % 2 == 1);
        assert!(samples.len() >= 60, "{samples:?}");
        assert!(samples.iter().all(|block| block % 2 == 1));
        assert!(samples.iter().all(|block| runs.iter().any(|run| run.contains(*block))));
        assert!(samples.is_sorted() && samples[0] < 20 && samples[samples.len() - 1] > 1_200);
        assert!(spread(&runs, |_| false).is_empty());
        assert_eq!(spread(&[BlockRange::one(7)], |_| true), [7]);
        assert!(spread(&[], |_| true).is_empty());
    }
}
