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
//! Guarantees: blocks that were written meanwhile, or since the volume was opened, never count as
//! different.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use super::driver::{Driver, Outbox};
use crate::device::AlignedBuffer;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, subtract};

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
        let presumed = self.presumed().clone();
        let (same, different) = self.compare(outbox, &spread(&presumed, held), held)?;
        if same + different >= PRESUMED_MIN && same * 10 < different {
            return Err(replaced(different, same + different));
        }
        Ok(())
    }

    fn presumed(&self) -> MutexGuard<'_, Vec<BlockRange>> {
        self.presumed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another backup has taken the place of the one before and holds nothing yet, or the samples
    /// agreed and what was presumed is being sent.
    pub(super) fn expect_nothing_of_the_backup(&self) {
        self.presumed().clear();
    }

    /// These bytes are being written: whatever the backup holds there says nothing of the disk.
    pub(super) fn expect_nothing_of(&self, range: ByteRange) {
        let mut presumed = self.presumed();
        if !presumed.is_empty() {
            let written = self.map().geometry().touched(range);
            *presumed = presumed.iter().flat_map(|run| subtract(*run, [written])).collect();
        }
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
    use crossbeam_channel::{Sender, bounded};
    use uuid::Uuid;

    use super::super::event::OutgoingMessage;
    use super::super::state::Primary;
    use super::*;
    use crate::device::{Payload, RamDevice};
    use crate::error::ErrorKind;
    use crate::format::frames::CutName;
    use crate::map::{IntentLog, MapIdentity, OverwriteMap};
    use crate::units::{BlockSize, Geometry};
    use crate::volume::engine::Engine;
    use crate::volume::primary::{MirrorPolicy, Options};
    use crate::volume::service::Command;

    const BLOCKS: u64 = 16;

    /// A backup that hands on what it is asked, and says when it is sent something.
    struct Asked {
        asked: Sender<u64>,
        sent: Sender<()>,
    }

    impl Outbox for Asked {
        fn send(&self, _: OutgoingMessage) -> Vec<u64> {
            let _enough = self.sent.try_send(());
            Vec::new()
        }
        fn ask_digest(&self, tag: u64, _: ByteRange) {
            self.asked.send(tag).expect("the test listens");
        }
        fn ask_changes(&self, _: u64, _: ByteRange, _: CutName) -> bool {
            false
        }
        fn close(&self, _: &str) {}
    }

    /// A primary that was stopped uncleanly: all of it is current and presumed unsent.
    fn presuming() -> Arc<Driver> {
        let geometry = Geometry::new(BLOCKS << 12, BlockSize::DEFAULT).expect("valid");
        let volume = Uuid::from_u128(1);
        let identity = MapIdentity { volume, geometry, generation: 1 };
        let file = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
        let map = Arc::new(OverwriteMap::create_current(file, identity, true).expect("created"));
        let log = Arc::new(RamDevice::new(IntentLog::BYTES));
        let log = IntentLog::create(log, volume).expect("created");
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: true,
            strict: false,
            missing_deadline_ms: 1000,
        };
        let machine = Primary::new(Arc::clone(&map), options);
        let device = Arc::new(RamDevice::new(geometry.size()));
        let engine = Engine::new().expect("started");
        Driver::new(machine, device, map, log, vec![geometry.all_blocks()], engine)
    }

    /// Compares with a backup of which every block is another.
    fn compare_with_another(driver: &Arc<Driver>) -> Result<()> {
        let (sender, asked) = bounded(SAMPLES as usize);
        let outbox: Arc<dyn Outbox> = Arc::new(Asked { asked: sender, sent: bounded(1).0 });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                asked.iter().for_each(|tag| driver.digest_arrived(tag, Ok([7; 32])));
            });
            let compared = driver.compare_samples(&outbox);
            drop(outbox);
            compared
        })
    }

    fn write(driver: &Driver, blocks: u64) {
        let data = Payload::copy_of(&vec![9; (blocks << 12) as usize]);
        let command = Command::Write { offset: 0, data, force_unit_access: false };
        driver.wait_for(command).expect("written");
    }

    #[test]
    fn what_was_written_since_the_volume_was_opened_does_not_make_the_device_another_one() {
        let driver = presuming();
        let refused = compare_with_another(&driver).expect_err("all of them differ");
        assert_eq!(refused.kind(), ErrorKind::Identity);
        write(&driver, BLOCKS - PRESUMED_MIN as u64);
        compare_with_another(&driver).expect_err("those that nobody wrote differ");
        write(&driver, BLOCKS);
        compare_with_another(&driver).expect("nothing is known of what was written");
    }

    #[test]
    fn what_was_presumed_is_forgotten_once_the_samples_agreed() {
        let driver = presuming();
        let (sender, asked) = bounded(SAMPLES as usize);
        let (sent, pushed) = bounded(1);
        driver.link_up(Arc::new(Asked { asked: sender, sent }));
        let zeros = *blake3::hash(&[0; 4096]).as_bytes();
        for _ in 0..BLOCKS {
            let tag = asked.recv().expect("every block is compared");
            driver.digest_arrived(tag, Ok(zeros));
        }
        pushed.recv().expect("what is unsent is sent");
        compare_with_another(&driver).expect("it says nothing any more");
    }

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
