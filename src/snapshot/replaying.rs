//! What the journal says is put where it belongs, after a crash or a stop.
//!
//! | the journal | the snapshots |
//! |---|---|
//! | its records | are as they were when the last record had become durable |
//! | is gone, or lacks records | are broken: old bytes may be lost; every block counts as changed |
//!
//! Guarantees: when `replay` has returned, everything is durable outside of the journal.
//! Does not know: how records are found.

use std::sync::Arc;

use super::chain::SnapshotChain;
use super::changes::CHANGED;
use super::journal::{Journal, Replay, Replayed};
use crate::error::Result;
use crate::extent::BlockRange;
use crate::format::journal::JournalKind;

impl SnapshotChain {
    pub(super) fn replay(&self, replay: Replay) -> Result<()> {
        for replayed in &replay.records {
            self.replay_record(replayed)?;
        }
        for member in &*self.members() {
            if let Err(error) = member.settle() {
                self.lose(member, vec![self.geometry().all_blocks()], &error)?;
            }
        }
        let mut held = self.lock();
        if replay.damaged {
            held.changed.fill(CHANGED, self.geometry().all_blocks(), true);
        }
        held.changed.commit_all()?;
        self.settle_all(&mut held)?;
        if replay.damaged {
            for member in self.members().iter().filter(|member| member.is_intact()) {
                member.break_off("the journal that held its newest old bytes was lost")?;
            }
            let backup = held.catalogue.backup;
            held.journal = Some(Journal::create(&**self.directory(), backup, self.geometry())?);
        }
        Ok(())
    }

    fn replay_record(&self, replayed: &Replayed) -> Result<()> {
        let Replayed { record, payload } = replayed;
        let members = self.members();
        let target = members.iter().find(|member| member.id() == record.snapshot);
        let held = self.lock();
        // A later cut was made only after the record was settled.
        if record.changed == held.catalogue.changed {
            for run in &record.runs {
                held.changed.fill(CHANGED, run.blocks, true);
            }
        }
        drop(held);
        let Some(target) = target else { return Ok(()) };
        let mut lost: Vec<BlockRange> = Vec::new();
        let mut failure = None;
        let mut at = 0;
        for run in &record.runs {
            let length = self.geometry().bytes_of(run.blocks).length as usize;
            let restored = match run.kind {
                JournalKind::Changed => continue,
                JournalKind::Stored => target.restore(run.blocks, None),
                JournalKind::Held => {
                    at += length;
                    target.restore(run.blocks, Some(&payload[at - length..at]))
                }
            };
            if let Err(error) = restored {
                lost.push(run.blocks);
                failure = Some(error);
            }
        }
        failure.map_or(Ok(()), |error| self.lose(&Arc::clone(target), lost, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{
        CrashingDirectory, Device, Directory, Fault, FaultPlan, FaultyDevice, Operation, Power,
        RamDevice, Strikes,
    };
    use crate::format::journal::JOURNAL_RUNS_MAX;
    use crate::snapshot::CutOrder;
    use crate::units::{BlockSize, Geometry};
    use uuid::Uuid;

    /// A file behind a plan.
    #[derive(Debug)]
    struct Shared(Arc<dyn Device>);

    impl Device for Shared {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn sector_size(&self) -> u32 {
            self.0.sector_size()
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            self.0.read_at(offset, buffer)
        }
        fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
            self.0.write_at(offset, data)
        }
        fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
            self.0.zero_at(offset, length)
        }
        fn flush(&self) -> Result<()> {
            self.0.flush()
        }
    }

    const BLOCK: u64 = 1024;
    const BLOCKS: u64 = 64;

    struct Rig {
        home: Arc<CrashingDirectory>,
        disk: Arc<RamDevice>,
        geometry: Geometry,
    }

    fn snapshot() -> Uuid {
        Uuid::from_u128(7)
    }

    impl Rig {
        /// A chain with a snapshot of a volume full of ones.
        fn new() -> (Self, SnapshotChain) {
            Self::with_maps(&FaultPlan::new())
        }

        /// With this plan for the maps of changes.
        fn with_maps(plan: &FaultPlan) -> (Self, SnapshotChain) {
            let plan = plan.clone();
            let geometry = Geometry::new(BLOCKS * BLOCK, BlockSize::new(1024).expect("valid"));
            let home = CrashingDirectory::new(Power::steady()).with_wrapper(Arc::new(
                move |name, file| match name.starts_with("changed-") {
                    true => Arc::new(FaultyDevice::new(Shared(file), plan.clone())),
                    false => file,
                },
            ));
            let home = Arc::new(home);
            let disk = Arc::new(RamDevice::from_bytes(vec![1; (BLOCKS * BLOCK) as usize]));
            let rig = Self { home, disk, geometry: geometry.expect("valid") };
            let chain =
                SnapshotChain::create(rig.directory(), rig.device(), rig.geometry, Uuid::nil())
                    .expect("created");
            let order = CutOrder {
                snapshot: snapshot(),
                label: String::new(),
                created_ms: 0,
                selection: Vec::new(),
            };
            chain.cut(&order, 1).expect("cut");
            (rig, chain)
        }

        fn directory(&self) -> Arc<dyn Directory> {
            Arc::clone(&self.home) as _
        }

        fn device(&self) -> Arc<dyn Device> {
            Arc::clone(&self.disk) as _
        }

        /// Overwrites blocks as the backup does.
        fn write(&self, chain: &SnapshotChain, first: u64, count: u64) {
            chain.prepare(&[BlockRange::new(first, first + count)]).expect("prepared");
            let bytes = vec![2; (count * BLOCK) as usize];
            self.disk.write_at(first * BLOCK, &bytes).expect("ram");
        }

        /// What a start after a power failure finds that took all that was not flushed.
        fn crash(&mut self) -> Arc<SnapshotChain> {
            self.home = Arc::new(self.home.crash(&mut |_| 0, &Power::steady()));
            let opened = SnapshotChain::open(self.directory(), self.device(), self.geometry);
            Arc::new(opened.expect("opened"))
        }

        fn is_whole(&self, chain: &Arc<SnapshotChain>) -> Result<bool> {
            let mut bytes = vec![0; (BLOCKS * BLOCK) as usize];
            chain.view(snapshot())?.read_at(0, &mut bytes)?;
            Ok(bytes.iter().all(|byte| *byte == 1))
        }
    }

    #[test]
    fn what_only_the_journal_held_is_there_after_a_crash() {
        let (mut rig, chain) = Rig::new();
        // Many records, so that both halves were full more than once.
        for first in 0..BLOCKS - 1 {
            rig.write(&chain, first, 1 + first % 2);
        }
        let chain = rig.crash();
        assert!(rig.is_whole(&chain).expect("intact"));
        assert_eq!(chain.changed().count_all(), BLOCKS - 1);
        // And once more, now with nothing to replay but what is durable anyway.
        let chain = rig.crash();
        assert!(rig.is_whole(&chain).expect("intact"));
    }

    #[test]
    fn law_7_a_change_is_known_after_its_map_failed_when_the_journal_was_settled() {
        // At the first commit of the map or a later one, and whatever is asked after it failed.
        for (skipped, cut_again) in [(0, false), (0, true), (4, false), (4, true)] {
            let plan = FaultPlan::new();
            let (mut rig, chain) = Rig::with_maps(&plan);
            plan.add(Fault::once(Operation::Write, 5).striking(Strikes::After(skipped)));
            let mut written = 0;
            while chain.prepare(&[BlockRange::one(written)]).is_ok() {
                rig.disk.write_at(written * BLOCK, &[2; BLOCK as usize]).expect("ram");
                written += 1;
                assert!(written < BLOCKS, "the fault strikes");
            }
            let order = |id| CutOrder {
                snapshot: Uuid::from_u128(id),
                label: String::new(),
                created_ms: 0,
                selection: Vec::new(),
            };
            for id in (10..13).filter(|_| cut_again) {
                chain.cut(&order(id), 9).expect_err("nothing is replaced that forgot changes");
            }
            drop(chain);
            let chain = rig.crash();
            let changed = chain.changed_since(snapshot()).expect("known");
            let all = BlockRange::new(0, written);
            assert_eq!(changed.count_set(all), written, "after {skipped}, {cut_again}");
            assert!(rig.is_whole(&chain).expect("intact"));
        }
    }

    /// The journal with bytes overwritten, as rot would.
    fn rot(rig: &Rig, at: u64) {
        let file = rig.home.open("journal").expect("there");
        file.write_at(at, &[0xa5; 512]).expect("written");
        file.flush().expect("flushed");
    }

    #[test]
    fn a_torn_last_record_changes_nothing_and_a_lost_earlier_one_breaks_the_snapshots() {
        for (lost, whole) in [(1, true), (0, false)] {
            let (mut rig, chain) = Rig::new();
            rig.write(&chain, 5, 1);
            let image = rig.disk.contents();
            chain.prepare(&[BlockRange::new(9, 10)]).expect("prepared");
            drop(chain);
            assert_eq!(rig.disk.contents(), image, "the second was not overwritten yet");
            // A page of header and one of payload each.
            rot(&rig, lost * 8192 + 4096);
            let chain = rig.crash();
            match whole {
                true => assert!(rig.is_whole(&chain).expect("intact")),
                false => {
                    let error = rig.is_whole(&chain).expect_err("broken");
                    assert!(error.to_string().contains("journal"), "{error}");
                    assert_eq!(chain.changed().count_all(), BLOCKS, "all may have changed");
                }
            }
        }
    }

    #[test]
    fn a_journal_that_is_missing_breaks_the_snapshots_and_the_next_cut_has_a_new_one() {
        let (mut rig, chain) = Rig::new();
        rig.write(&chain, 5, 1);
        drop(chain);
        rig.home.remove("journal").expect("removed");
        let chain = rig.crash();
        assert!(rig.is_whole(&chain).is_err(), "broken");
        let order = CutOrder {
            snapshot: Uuid::from_u128(8),
            label: String::new(),
            created_ms: 0,
            selection: Vec::new(),
        };
        chain.cut(&order, 2).expect("cut");
        rig.write(&chain, 6, 1);
        let chain = rig.crash();
        let mut bytes = vec![0; BLOCK as usize];
        chain.view(Uuid::from_u128(8)).expect("kept").read_at(6 * BLOCK, &mut bytes).expect("read");
        assert!(bytes.iter().all(|byte| *byte == 1));
    }

    #[test]
    fn what_was_settled_needs_no_journal() {
        let (mut rig, chain) = Rig::new();
        for first in 0..20 {
            rig.write(&chain, first, 2);
        }
        chain.settle().expect("settled");
        drop(chain);
        let file = rig.home.open("journal").expect("there");
        file.zero_at(0, file.size()).expect("zeroed");
        file.flush().expect("flushed");
        let chain = rig.crash();
        assert!(rig.is_whole(&chain).expect("intact"));
    }

    #[test]
    fn a_group_of_more_runs_than_a_record_lists_goes_past_the_journal_and_leaves_it_in_use() {
        let geometry = Geometry::new(20 << 20, BlockSize::new(512).expect("valid")).expect("valid");
        let disk = Arc::new(RamDevice::from_bytes(vec![1; 20 << 20]));
        let home = Arc::new(CrashingDirectory::new(Power::steady()));
        let chain = SnapshotChain::create(
            Arc::clone(&home) as _,
            Arc::clone(&disk) as _,
            geometry,
            Uuid::nil(),
        );
        let chain = chain.expect("created");
        let (label, selection) = (String::new(), Vec::new());
        let order = CutOrder { snapshot: snapshot(), label, created_ms: 0, selection };
        chain.cut(&order, 1).expect("cut");
        chain.prepare(&[BlockRange::one(1)]).expect("prepared");
        let many: Vec<_> =
            (0..JOURNAL_RUNS_MAX as u64 + 1).map(|at| BlockRange::one(at * 2)).collect();
        chain.prepare(&many).expect("prepared");
        assert!(chain.lock().journal.is_some(), "it did not fail");
        disk.write_at(0, &vec![2; 20 << 20]).expect("ram");
        drop(chain);
        let home = Arc::new(home.crash(&mut |_| 0, &Power::steady()));
        let chain = SnapshotChain::open(home, disk, geometry).expect("opened");
        let mut bytes = vec![0; 512];
        let view = Arc::new(chain).view(snapshot()).expect("intact");
        for block in many.iter().map(|run| run.start).step_by(1001).chain([0, 1]) {
            view.read_at(block * 512, &mut bytes).expect("read");
            assert!(bytes.iter().all(|byte| *byte == 1), "block {block}");
        }
    }
}
