//! The backup volume when something fails, fills up, or comes from two sides at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use uuid::Uuid;

use super::{Action, Answer, BackupState, BackupVolume, MirrorOperation};
use crate::device::{
    AlignedBuffer, Capacity, CrashingDevice, CrashingDirectory, Device, Directory, Fault,
    FaultPlan, FaultyDevice, FileDevice, FileDirectory, OpenOptions, Operation, Payload, Power,
    RamDevice,
};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::frames::CutName;
use crate::limits::STRETCH_BYTES;
use crate::snapshot::{Condition, CutOrder};
use crate::units::{BlockSize, Geometry};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;
const SIZE: u64 = BLOCKS * BLOCK;
const FOREVER: Duration = Duration::from_secs(3600);

/// A device behind a plan that the directory's wrapper or a test holds.
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

struct Rig {
    disk: Arc<RamDevice>,
    /// Faults of the mirror device and of all preservation stores.
    mirror_plan: FaultPlan,
    store_plan: FaultPlan,
    home: Arc<CrashingDirectory>,
    backup: BackupVolume,
}

fn geometry() -> Geometry {
    Geometry::new(SIZE, BlockSize::DEFAULT).expect("valid")
}

fn order(id: u128, selection: &[(u64, u64)]) -> CutOrder {
    let selection =
        selection.iter().map(|(first, count)| ByteRange::new(first * BLOCK, count * BLOCK));
    CutOrder {
        snapshot: Uuid::from_u128(id),
        label: format!("cut {id}"),
        created_ms: 7,
        selection: selection.collect(),
    }
}

fn write(sequence: u64, first: u64, count: u64, value: u8) -> MirrorOperation {
    let data = Payload::copy_of(&vec![value; (count * BLOCK) as usize]);
    MirrorOperation::Write { sequence, offset: first * BLOCK, data }
}

fn rig(capacity: u64) -> Rig {
    let (mirror_plan, store_plan) = (FaultPlan::new(), FaultPlan::new());
    let stores = store_plan.clone();
    let home = CrashingDirectory::new(Power::steady()).with_capacity(Capacity::new(capacity));
    let home = Arc::new(home.with_wrapper(Arc::new(move |name, device| match name {
        "store" => Arc::new(FaultyDevice::new(Shared(device), stores.clone())),
        _ => device,
    })));
    let disk = Arc::new(RamDevice::from_bytes(vec![1; SIZE as usize]));
    let shared = Shared(Arc::clone(&disk) as Arc<dyn Device>);
    let mirror = Arc::new(FaultyDevice::new(shared, mirror_plan.clone()));
    let directory = Arc::clone(&home) as Arc<dyn Directory>;
    let backup =
        BackupVolume::create(directory, mirror, geometry(), Uuid::from_u128(1)).expect("created");
    backup.begin_session(1, 0).expect("begun");
    Rig { disk, mirror_plan, store_plan, home, backup }
}

impl Rig {
    fn apply(&self, batch: Vec<MirrorOperation>) -> Vec<Answer> {
        self.backup.apply(1, batch).expect("taken")
    }

    fn condition(&self, id: u128) -> Condition {
        let listed = self.backup.snapshots().list();
        let found = listed.into_iter().find(|status| status.cut.snapshot == Uuid::from_u128(id));
        found.expect("listed").condition
    }

    /// The value of each block of the snapshot.
    fn read(&self, id: u128, first: u64, count: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (count * BLOCK) as usize];
        self.backup.view(Uuid::from_u128(id))?.read_at(first * BLOCK, &mut bytes)?;
        Ok(bytes.chunks(BLOCK as usize).map(|block| block[0]).collect())
    }
}

fn applied(answers: &[Answer]) -> bool {
    matches!(answers, [Answer::Applied { .. }])
}

#[test]
fn a_failure_in_a_session_that_counts_on_names_the_first_operation_that_is_not_applied() {
    let first = 40;
    let failed = |answers: &[Answer]| match answers {
        [.., Answer::Failed { sequence, .. }] => *sequence,
        other => panic!("{other:?}"),
    };
    let rig = rig(1 << 30);
    rig.mirror_plan.add(Fault::once(Operation::Write, 5));
    assert_eq!(failed(&rig.apply(vec![write(first, 0, 1, 2), write(first + 1, 1, 1, 2)])), first);
    // The same when old bytes could not be kept, for these operations or for those after them.
    let batch = || vec![write(first, 0, 1, 2), write(first + 1, 1, 1, 2)];
    let broken = || Err(Error::integrity("a map is gone"));
    let mut state = BackupState::new(geometry(), 512);
    state.begin_session(1, 0).expect("begun");
    assert!(matches!(state.take(1, batch()).expect("taken"), Action::Prepare(_)));
    assert!(matches!(state.finished(broken(), Ok(())), Action::Rest));
    assert_eq!(failed(&state.take_answers()), first);
    let data = Payload::new(AlignedBuffer::zeroed(STRETCH_BYTES as usize));
    let long = MirrorOperation::Write { sequence: first, offset: 0, data };
    let big = Geometry::new(2 * STRETCH_BYTES, BlockSize::DEFAULT).expect("valid");
    let mut state = BackupState::new(big, 512);
    state.begin_session(1, 0).expect("begun");
    let batch = vec![long, write(first + 1, 1, 1, 2)];
    assert!(matches!(state.take(1, batch).expect("taken"), Action::Prepare(_)));
    assert!(matches!(state.finished(Ok(()), Ok(())), Action::Apply { .. }));
    assert!(matches!(state.finished(Ok(()), broken()), Action::Rest));
    assert_eq!(failed(&state.take_answers()), first + 1);
}

#[test]
fn law_11_a_flush_that_fails_when_a_session_begins_stops_the_backup() {
    let rig = rig(1 << 30);
    assert!(applied(&rig.apply(vec![write(1, 0, 1, 2)])));
    rig.mirror_plan.add(Fault::once(Operation::Flush, 5));
    rig.backup.begin_session(2, 0).expect_err("the flush failed");
    assert!(rig.backup.failure().is_some(), "what the next flush says is not to be believed");
    rig.backup.begin_session(3, 0).expect("it says what it has to say");
    let answers = rig.backup.apply(3, vec![write(1, 1, 1, 2)]).expect("taken");
    assert!(matches!(answers[..], [Answer::Failed { sequence: 1, .. }]), "{answers:?}");
}

#[test]
fn what_is_fetched_from_a_backup_that_stopped_survives_a_crash_of_it() {
    let plan = FaultPlan::new();
    let disk = Arc::new(CrashingDevice::from_bytes(&vec![1; SIZE as usize], Power::steady()));
    let mirror = FaultyDevice::new(Shared(Arc::clone(&disk) as _), plan.clone());
    let home = Arc::new(CrashingDirectory::new(Power::steady()));
    let id = Uuid::from_u128(1);
    let backup = BackupVolume::create(home, Arc::new(mirror), geometry(), id).expect("created");
    backup.begin_session(1, 0).expect("begun");
    // Half of the write is done when it fails.
    plan.add(Fault { done_before: BLOCK, ..Fault::once(Operation::Write, 5) });
    backup.apply(1, vec![write(1, 0, 2, 2)]).expect("taken");
    assert!(backup.failure().is_some());
    backup.begin_session(2, 0).expect("its blocks can still be fetched");
    let mut fetched = vec![0; 2 * BLOCK as usize];
    backup.read(2, 0, &mut fetched, 0, FOREVER).expect("read");
    assert_eq!((fetched[0], fetched[BLOCK as usize]), (2, 1));
    let after = disk.crash(&mut |_| 0, Power::steady());
    assert!(after.contents()[..fetched.len()] == fetched[..], "the primary has it as mirrored");
}

#[test]
fn trap_26_a_full_store_breaks_the_snapshot_and_never_the_writes() {
    // Room for the journal, the maps and some blocks, not for all.
    let rig = rig(56 * BLOCK);
    rig.backup.snapshot_now(&order(1, &[])).expect("cut");
    assert!(applied(&rig.apply(vec![write(1, 0, 4, 2)])));
    assert_eq!(rig.read(1, 0, 5).expect("intact"), [1; 5]);
    assert!(applied(&rig.apply(vec![write(2, 0, BLOCKS, 3)])), "the write goes on");
    let Condition::Broken(reason) = rig.condition(1) else { panic!("not broken") };
    assert!(reason.contains("full"), "{reason}");
    let refused = rig.read(1, 0, 1).expect_err("broken");
    assert_eq!(refused.kind(), ErrorKind::Integrity);
    assert!(rig.disk.contents().iter().all(|byte| *byte == 3));
    // Its space is back, and it stays broken after a restart.
    let (space, low) = rig.backup.snapshots().room().expect("told").expect("known");
    assert!(space.free > 20 * BLOCK && !low, "{space:?}");
    let directory = Arc::clone(&rig.home) as Arc<dyn Directory>;
    let again = BackupVolume::open(directory, rig.disk, geometry()).expect("opened");
    assert!(matches!(again.snapshots().list()[0].condition, Condition::Broken(_)));
}

#[test]
fn an_error_of_the_newest_store_breaks_only_the_snapshots_that_need_the_block() {
    // At once, or when what the journal held is to become durable in the store.
    for operation in [Operation::Write, Operation::Flush] {
        break_the_newest(operation);
    }
}

fn break_the_newest(operation: Operation) {
    let rig = rig(1 << 30);
    rig.backup.snapshot_now(&order(1, &[(0, 8)])).expect("cut");
    rig.backup.snapshot_now(&order(2, &[(8, 8)])).expect("cut");
    rig.apply(vec![write(1, 0, 2, 2)]);
    rig.backup.snapshot_now(&order(3, &[])).expect("cut");
    rig.store_plan.add(Fault::once(operation, 5));
    assert!(applied(&rig.apply(vec![write(2, 8, 1, 3)])));
    let settled = rig.backup.snapshots().settle();
    settled.expect("a store that fails breaks snapshots, nothing else");
    assert_eq!(rig.condition(1), Condition::Intact, "it never selected block 8");
    assert!(matches!(rig.condition(2), Condition::Broken(_)), "it needed block 8");
    assert!(matches!(rig.condition(3), Condition::Broken(_)), "its store failed");
    // From now on the oldest preserves for itself, and what the others hold still serves it.
    assert!(applied(&rig.apply(vec![write(3, 0, 16, 4)])));
    assert_eq!(rig.read(1, 0, 8).expect("intact"), [1; 8]);
    for broken in [3, 2] {
        rig.backup.snapshots().delete(Uuid::from_u128(broken)).expect("deleted");
        assert_eq!(rig.read(1, 0, 8).expect("intact"), [1; 8]);
    }
}

#[test]
fn a_failed_write_or_flush_of_the_mirror_stops_everything_after_it() {
    for operation in [Operation::Write, Operation::Flush] {
        let rig = rig(1 << 30);
        rig.mirror_plan.add(Fault::once(operation, 5));
        let answers = rig.apply(vec![
            write(3, 0, 1, 2),
            MirrorOperation::Flush { sequence: 4 },
            write(5, 1, 1, 2),
        ]);
        let Some(Answer::Failed { sequence, error }) = answers.last() else {
            panic!("{answers:?}")
        };
        assert!(*sequence <= 4 && error.errno() == Some(5), "{answers:?}");
        assert_eq!(rig.disk.contents()[BLOCK as usize], 1, "nothing after it is applied");
        let later = rig.apply(vec![write(6, 2, 1, 2)]);
        let [Answer::Failed { sequence: 6, error }] = &later[..] else { panic!("{later:?}") };
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        assert!(rig.backup.snapshot_now(&order(1, &[])).is_err());
        let waiting = rig.backup.read(1, 0, &mut [0; 4096], 6, FOREVER);
        assert!(waiting.is_err(), "a fetch that waits for it is told");
        rig.backup.read(1, 0, &mut [0; 4096], 0, FOREVER).expect("other fetches go on");
    }
}

#[test]
fn nothing_is_overwritten_when_the_backup_map_cannot_be_written() {
    let plan = FaultPlan::new();
    let maps = plan.clone();
    let home = CrashingDirectory::new(Power::steady());
    let home = Arc::new(home.with_wrapper(Arc::new(move |_, device| {
        Arc::new(FaultyDevice::new(Shared(device), maps.clone()))
    })));
    let disk = Arc::new(RamDevice::new(SIZE));
    let mirror = Arc::clone(&disk) as Arc<dyn Device>;
    let backup =
        BackupVolume::create(home, mirror, geometry(), Uuid::from_u128(1)).expect("created");
    backup.begin_session(1, 0).expect("begun");
    plan.add(Fault::always(Operation::Write, 28));
    let answers = backup.apply(1, vec![write(1, 0, 1, 2)]).expect("taken");
    assert!(matches!(answers[..], [Answer::Failed { sequence: 1, .. }]), "{answers:?}");
    assert!(disk.contents().iter().all(|byte| *byte == 0));
}

#[test]
fn a_session_begins_after_the_batch_in_progress_and_fences_the_older_one() {
    let rig = rig(1 << 30);
    let order_of_events = std::sync::Mutex::new(Vec::new());
    let note = |event| order_of_events.lock().expect("no panic").push(event);
    rig.mirror_plan.hold(Operation::Write);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(applied(&rig.apply(vec![write(1, 0, 1, 2)])));
            note("applied");
        });
        rig.mirror_plan.wait_until_held(1);
        scope.spawn(|| {
            rig.backup.begin_session(2, 10).expect("begun");
            // The batch's thread notes after its lock is free; what counts is on the disk.
            assert_eq!(rig.disk.contents()[0], 2);
            note("begun");
        });
        rig.mirror_plan.release(Operation::Write);
    });
    assert_eq!(order_of_events.into_inner().expect("no panic").len(), 2);
    let refused: Error = rig.backup.apply(1, vec![write(2, 0, 1, 9)]).expect_err("fenced");
    assert_eq!(refused.kind(), ErrorKind::Identity);
    assert!(rig.backup.begin_session(2, 0).is_err(), "not newer");
    let early = rig.backup.apply(2, vec![write(10, 0, 1, 9)]).expect_err("settled already");
    assert_eq!(early.kind(), ErrorKind::Link);
    assert!(applied(&rig.backup.apply(2, vec![write(11, 0, 1, 3)]).expect("taken")));
    let old = rig.backup.read(1, 0, &mut [0; 512], 0, FOREVER).expect_err("fenced");
    assert_eq!(old.kind(), ErrorKind::Identity);
}

#[test]
fn what_changed_since_a_cut_is_told_of_the_very_cut_only() {
    let rig = rig(u64::MAX);
    rig.apply(vec![write(1, 0, 2, 1)]);
    let cut = |id, sequence| MirrorOperation::Cut { sequence, order: order(id, &[]) };
    rig.apply(vec![cut(1, 2), write(3, 1, 1, 2), cut(2, 4), write(5, 3, 1, 3)]);
    let generation = rig.backup.identity().generation;
    let name =
        |id, generation, sequence| CutName { snapshot: Uuid::from_u128(id), generation, sequence };
    let changed = |name| -> Vec<u64> {
        let map = rig.backup.changed_since(&name).expect("remembered");
        (0..map.len()).filter(|block| map.get(*block)).collect()
    };
    assert_eq!(changed(name(1, generation, 2)), [1, 3]);
    assert_eq!(changed(name(2, generation, 4)), [3]);
    // A snapshot that was deleted leaves its cut.
    rig.backup.snapshots().delete(Uuid::from_u128(1)).expect("deleted");
    assert_eq!(changed(name(1, generation, 2)), [1, 3]);
    for stranger in [
        name(3, generation, 2),
        name(1, generation, 4),
        name(1, generation + 1, 2),
        name(2, generation, 2),
    ] {
        let refused = rig.backup.changed_since(&stranger).expect_err("another cut");
        assert_eq!(refused.kind(), ErrorKind::Identity);
    }
}

#[test]
fn a_fetch_waits_for_the_write_it_must_see_and_not_longer_than_told() {
    let rig = rig(1 << 30);
    rig.mirror_plan.hold(Operation::Write);
    std::thread::scope(|scope| {
        scope.spawn(|| rig.apply(vec![write(5, 0, 1, 2)]));
        rig.mirror_plan.wait_until_held(1);
        let late = rig.backup.read(1, 0, &mut [0; 512], 5, Duration::ZERO).expect_err("not yet");
        assert_eq!(late.kind(), ErrorKind::Timeout);
        let fetch = scope.spawn(|| {
            let mut bytes = [0; 512];
            rig.backup.read(1, 0, &mut bytes, 5, FOREVER).map(|()| bytes[0])
        });
        rig.mirror_plan.release(Operation::Write);
        assert_eq!(fetch.join().expect("no panic").expect("read"), 2);
    });
}

#[test]
fn trap_25_a_reader_beside_a_writer_sees_only_the_cut() {
    let rig = rig(1 << 30);
    rig.backup.snapshot_now(&order(1, &[])).expect("cut");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut reads = 0;
                    while !done.load(Ordering::Acquire) || reads == 0 {
                        assert_eq!(rig.read(1, 0, BLOCKS).expect("intact"), [1; BLOCKS as usize]);
                        reads += 1;
                    }
                })
            })
            .collect();
        for round in 0..30 {
            let block = round * 7 % BLOCKS;
            rig.apply(vec![write(1 + round, block, (BLOCKS - block).min(5), 2)]);
            if round % 5 == 0 {
                rig.backup.snapshot_now(&order(100 + u128::from(round), &[])).expect("cut");
            }
            if round % 10 == 9 {
                let newest = Uuid::from_u128(u128::from(100 + round / 5 * 5));
                rig.backup.snapshots().delete(newest).expect("deleted");
            }
        }
        done.store(true, Ordering::Release);
        readers.into_iter().for_each(|reader| reader.join().expect("only the cut was seen"));
    });
}

type Hook = Box<dyn FnOnce() + Send>;

/// Runs a hook once, before the next read answers.
struct Hooked {
    inner: RamDevice,
    hook: std::sync::Mutex<Option<Hook>>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl Device for Hooked {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn sector_size(&self) -> u32 {
        self.inner.sector_size()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let hook = self.hook.lock().expect("no panic").take();
        if let Some(hook) = hook {
            hook();
        }
        self.inner.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.inner.write_at(offset, data)
    }
    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        self.inner.zero_at(offset, length)
    }
    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
}

#[test]
fn trap_25_an_overwrite_between_the_look_at_the_map_and_the_read_is_noticed() {
    let inner = RamDevice::from_bytes(vec![1; SIZE as usize]);
    let mirror = Arc::new(Hooked { inner, hook: std::sync::Mutex::default() });
    let home = Arc::new(CrashingDirectory::new(Power::steady()));
    let device = Arc::clone(&mirror) as Arc<dyn Device>;
    let backup = Arc::new(
        BackupVolume::create(home, device, geometry(), Uuid::from_u128(1)).expect("created"),
    );
    backup.begin_session(1, 0).expect("begun");
    backup.snapshot_now(&order(1, &[])).expect("cut");
    let writer = Arc::clone(&backup);
    let hook: Hook = Box::new(move || {
        assert!(applied(&writer.apply(1, vec![write(1, 2, 3, 2)]).expect("taken")));
        // A later cut does not lead the reader astray, nor its deletion.
        writer.snapshot_now(&order(2, &[])).expect("cut");
        assert!(applied(&writer.apply(1, vec![write(2, 0, 9, 3)]).expect("taken")));
        writer.snapshots().delete(Uuid::from_u128(2)).expect("deleted");
    });
    *mirror.hook.lock().expect("no panic") = Some(hook);
    let mut bytes = vec![0; SIZE as usize];
    let view = backup.view(Uuid::from_u128(1)).expect("kept");
    view.read_at(0, &mut bytes).expect("intact");
    assert!(bytes.iter().all(|byte| *byte == 1));
    assert_eq!(mirror.inner.contents()[0], 3, "the overwrite came before the read");
}

#[test]
fn released_blocks_are_refused_and_their_writes_preserve_nothing() {
    let rig = rig(1 << 30);
    rig.backup.snapshot_now(&order(1, &[])).expect("cut");
    rig.apply(vec![write(1, 0, 4, 2)]);
    let chain = rig.backup.snapshots();
    assert_eq!(chain.list()[0].preserved_bytes, 4 * BLOCK);
    // Two and a half blocks: only whole ones are given back.
    let range = ByteRange::new(0, 2 * BLOCK + 512);
    chain.release(Uuid::from_u128(1), range).expect("released");
    assert_eq!(chain.list()[0].preserved_bytes, 2 * BLOCK);
    assert!(rig.read(1, 1, 2).is_err(), "block 1 was given back");
    // Law 8: what nobody can read any more is not zero.
    let view = rig.backup.view(Uuid::from_u128(1)).expect("intact");
    for (at, end, data) in [(0, 2, true), (2, 3, true), (3, 4, true)] {
        let extent = view.extent_at(at * BLOCK, end * BLOCK).expect("told");
        assert_eq!((extent.range.end(), extent.data), (end * BLOCK, data), "block {at}");
    }
    assert_eq!(view.extent_at(0, SIZE).expect("told").range.end(), 2 * BLOCK);
    assert_eq!(rig.read(1, 2, 4).expect("kept"), [1; 4]);
    rig.backup.snapshot_now(&order(2, &[])).expect("cut");
    let refused = chain.release(Uuid::from_u128(2), range).expect_err("1 may need them");
    assert_eq!(refused.kind(), ErrorKind::Busy);
    rig.apply(vec![write(2, 0, 4, 3)]);
    assert_eq!(rig.read(2, 0, 4).expect("kept"), [2; 4]);
}

#[test]
fn a_partial_selection_is_all_that_is_kept_and_all_that_can_be_read() {
    let rig = rig(1 << 30);
    rig.backup.snapshot_now(&order(1, &[(2, 2), (10, 1)])).expect("cut");
    rig.apply(vec![write(1, 0, BLOCKS, 2)]);
    assert_eq!(rig.backup.snapshots().list()[0].preserved_bytes, 3 * BLOCK);
    assert_eq!(rig.read(1, 2, 2).expect("selected"), [1; 2]);
    assert_eq!(rig.read(1, 3, 2).expect_err("4 is not").kind(), ErrorKind::Usage);
}

#[test]
fn another_volume_or_an_older_generation_is_refused() {
    let rig = rig(1 << 30);
    let (own, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
    rig.apply(vec![write(1, 3, 1, 2)]);
    rig.backup.adopt(own, 4).expect("adopted");
    assert!(rig.backup.snapshots().changed().get(3), "what had changed is still known");
    assert_eq!(rig.backup.adopt(other, 9).expect_err("foreign").kind(), ErrorKind::Identity);
    assert_eq!(rig.backup.adopt(own, 3).expect_err("older").kind(), ErrorKind::Identity);
    rig.backup.adopt(own, 5).expect("newer");
    let directory = Arc::clone(&rig.home) as Arc<dyn Directory>;
    let again = BackupVolume::open(directory, rig.disk, geometry()).expect("opened");
    assert_eq!((again.identity().volume, again.identity().generation), (own, 5));
    assert!(again.snapshots().changed().get(3));
}

#[test]
fn on_real_files_a_backup_reopens_with_its_snapshots() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let open_disk = || {
        let options = OpenOptions { create_size: Some(SIZE), ..OpenOptions::default() };
        let disk = FileDevice::open(home.path().join("mirror"), options).expect("opened");
        Arc::new(disk) as Arc<dyn Device>
    };
    let directory = || {
        let opened = FileDirectory::open(home.path().join("state"), true).expect("opened");
        Arc::new(opened) as Arc<dyn Directory>
    };
    let backup = BackupVolume::create(directory(), open_disk(), geometry(), Uuid::from_u128(1))
        .expect("created");
    backup.begin_session(1, 0).expect("begun");
    backup.apply(1, vec![write(1, 0, 9, 5)]).expect("taken");
    let image = backup.digest(geometry().all_bytes()).expect("digested");
    backup.snapshot_now(&order(1, &[])).expect("cut");
    backup.apply(1, vec![write(2, 4, 9, 6)]).expect("taken");
    assert_ne!(backup.digest(geometry().all_bytes()).expect("digested"), image);
    drop(backup);
    let backup = BackupVolume::open(directory(), open_disk(), geometry()).expect("opened");
    let mut bytes = vec![0; SIZE as usize];
    let view = backup.view(Uuid::from_u128(1)).expect("kept");
    view.read_at(0, &mut bytes).expect("read");
    assert_eq!(*blake3::hash(&bytes).as_bytes(), image);
    let hole = view.extent_at(20 * BLOCK, SIZE).expect("told");
    assert!(!hole.data && hole.range.end() == SIZE, "{hole:?}");
    backup.snapshots().delete(Uuid::from_u128(1)).expect("deleted");
    drop((backup, view));
    let left = directory().directory("snapshots").expect("opened").names().expect("listed");
    assert_eq!(left, Vec::<String>::new());
}
