//! The backup volume against plain copies: random operations, and a crash at every event.

use std::sync::Arc;

use proptest::prelude::*;
use uuid::Uuid;

use super::{Answer, BackupVolume, MirrorOperation};
use crate::device::{CrashingDevice, CrashingDirectory, Device, Directory, Payload, Power};
use crate::extent::ByteRange;
use crate::snapshot::{Condition, CutOrder, SnapshotStatus};
use crate::units::{BlockSize, Geometry, SECTOR_BYTES};

/// Eight blocks of 1 KiB and a tail of one sector.
const SECTORS: u64 = 17;
const SIZE: usize = (SECTORS * SECTOR_BYTES) as usize;
const BLOCKS: usize = 9;

#[derive(Clone, Debug)]
enum Step {
    /// Operations that arrive together.
    Batch(Vec<Change>),
    /// A cut in the stream, after a write in the same batch and before another.
    Cut(Change, Change),
    Delete(usize),
    /// Blocks of the oldest snapshot are given back.
    Release {
        block: u64,
        count: u64,
    },
    Reopen,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Write { sector: u64, count: u64, value: u8 },
    Zero { sector: u64, count: u64 },
    Flush,
}

#[derive(Clone, Debug)]
struct Image {
    snapshot: Uuid,
    bytes: Vec<u8>,
    /// Blocks that are given back.
    released: [Released; BLOCKS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Released {
    No,
    /// It was begun when the power went out.
    Perhaps,
    Yes,
}

impl Image {
    fn new(snapshot: Uuid, bytes: Vec<u8>) -> Self {
        Self { snapshot, bytes, released: [Released::No; BLOCKS] }
    }

    /// Every block reads as at the cut, or is refused because it was given back.
    fn check(&self, backup: &BackupVolume) {
        let view = backup.view(self.snapshot).expect("intact");
        for (block, expected) in self.bytes.chunks(1024).enumerate() {
            let mut bytes = vec![0xee; expected.len()];
            let read = view.read_at(block as u64 * 1024, &mut bytes);
            match (read, self.released[block]) {
                (Ok(()), Released::No | Released::Perhaps) => {
                    assert!(bytes == expected, "block {block} of {} moved", self.snapshot);
                }
                (Err(error), Released::Yes | Released::Perhaps) => {
                    assert!(error.to_string().contains("given back"), "{error}");
                }
                (read, released) => {
                    panic!("block {block} of {}: {read:?}, {released:?}", self.snapshot);
                }
            }
        }
    }
}

/// What must be there, in plain copies.
#[derive(Clone, Debug)]
struct Model {
    now: Vec<u8>,
    /// For every sector what it may hold after a crash.
    possible: Vec<Vec<u8>>,
    snapshots: Vec<Image>,
    /// Images of all cuts ever made.
    cuts: Vec<Image>,
    /// A snapshot whose deletion was begun.
    leaving: Option<Uuid>,
    /// The image of a cut that was begun, until it is known to be done.
    coming: Option<Image>,
}

struct Rig {
    home: Arc<CrashingDirectory>,
    disk: Arc<CrashingDevice>,
    backup: BackupVolume,
    /// Whether the power was still there when the session began.
    begun: bool,
    model: Model,
    sequence: u64,
    cuts: u128,
}

fn geometry() -> Geometry {
    Geometry::new(SIZE as u64, BlockSize::new(1024).expect("valid")).expect("valid")
}

fn open(
    home: &Arc<CrashingDirectory>,
    disk: &Arc<CrashingDevice>,
) -> crate::error::Result<BackupVolume> {
    let (home, disk) = (Arc::clone(home) as Arc<dyn Directory>, Arc::clone(disk));
    BackupVolume::open(home, disk as Arc<dyn Device>, geometry())
}

impl Rig {
    /// The power goes out at this event, counted from when its session begins.
    fn new(power: &Arc<Power>, event: u64) -> Self {
        let steady = Power::steady();
        let home = Arc::new(CrashingDirectory::new(Arc::clone(&steady)));
        let mut bytes = vec![0; SIZE];
        (0..).zip(&mut bytes).for_each(|(at, byte): (usize, _)| *byte = (at / 512 + 200) as u8);
        let disk = Arc::new(CrashingDevice::from_bytes(&bytes, Arc::clone(&steady)));
        let (new_home, new_disk) = (Arc::clone(&home), Arc::clone(&disk));
        drop(
            BackupVolume::create(new_home, new_disk, geometry(), Uuid::from_u128(1))
                .expect("created"),
        );
        // Onto the supply under test.
        let home = Arc::new(home.crash(&mut |versions| versions, power));
        let disk = Arc::new(disk.crash(&mut |versions| versions, Arc::clone(power)));
        let backup = open(&home, &disk).expect("opened");
        power.fail_after(event);
        let begun = backup.begin_session(1, 0).is_ok();
        let possible = bytes.chunks(512).map(|sector| vec![sector[0]]).collect();
        let model = Model {
            now: bytes,
            possible,
            snapshots: Vec::new(),
            cuts: Vec::new(),
            leaving: None,
            coming: None,
        };
        Self { home, disk, backup, begun, model, sequence: 0, cuts: 0 }
    }

    fn operation(&mut self, change: Change) -> MirrorOperation {
        self.sequence += 1;
        let sequence = self.sequence;
        match change {
            Change::Write { sector, count, value } => {
                let data = Payload::copy_of(&vec![value; (count * 512) as usize]);
                MirrorOperation::Write { sequence, offset: sector * 512, data }
            }
            Change::Zero { sector, count } => {
                let range = ByteRange::new(sector * 512, count * 512);
                MirrorOperation::Zero { sequence, range }
            }
            Change::Flush => MirrorOperation::Flush { sequence },
        }
    }

    /// What may be on the disk once the change has begun, and what is there when it is done.
    fn expect(&mut self, change: Change) {
        let (sector, count, value) = match change {
            Change::Write { sector, count, value } => (sector, count, value),
            Change::Zero { sector, count } => (sector, count, 0),
            Change::Flush => return,
        };
        let range = (sector * 512) as usize..((sector + count) * 512) as usize;
        self.model.now[range].fill(value);
        for held in &mut self.model.possible[sector as usize..(sector + count) as usize] {
            held.push(value);
        }
    }

    fn settle(&mut self) {
        for (held, sector) in self.model.possible.iter_mut().zip(self.model.now.chunks(512)) {
            *held = vec![sector[0]];
        }
    }

    /// Whether everything was answered as done.
    fn apply(&mut self, batch: Vec<MirrorOperation>) -> bool {
        let answers = self.backup.apply(1, batch).expect("well-formed");
        for answer in &answers {
            if matches!(answer, Answer::Flushed { .. }) {
                // A flush is the last of its batch here.
                self.settle();
            }
        }
        !answers.iter().any(|a| matches!(a, Answer::Failed { .. } | Answer::CutFailed { .. }))
    }

    fn run(&mut self, step: &Step) -> bool {
        if !self.begun {
            return false;
        }
        match step {
            Step::Batch(changes) => {
                let mut changes = changes.clone();
                changes.sort_by_key(|change| matches!(change, Change::Flush));
                let batch = changes.iter().map(|change| self.operation(*change)).collect();
                changes.iter().for_each(|change| self.expect(*change));
                self.apply(batch)
            }
            Step::Cut(before, after) => self.cut(*before, *after),
            Step::Delete(index) => {
                let count = self.model.snapshots.len();
                let Some(index) = index.checked_rem(count) else { return true };
                let snapshot = self.model.snapshots[index].snapshot;
                self.model.leaving = Some(snapshot);
                if self.backup.snapshots().delete(snapshot).is_err() {
                    return false;
                }
                self.model.snapshots.remove(index);
                self.model.leaving = None;
                true
            }
            Step::Release { block, count } => {
                let Some(oldest) = self.model.snapshots.first() else { return true };
                let snapshot = oldest.snapshot;
                self.mark_released(snapshot, *block, *count, Released::Perhaps);
                let length = (count * 1024).min(SIZE as u64 - block * 1024);
                let range = ByteRange::new(block * 1024, length);
                let done = self.backup.snapshots().release(snapshot, range).is_ok();
                if done {
                    self.mark_released(snapshot, *block, *count, Released::Yes);
                }
                done
            }
            Step::Reopen => match open(&self.home, &self.disk) {
                Ok(backup) => {
                    self.backup = backup;
                    self.backup.begin_session(1, self.sequence).is_ok()
                }
                Err(_) => false,
            },
        }
    }

    fn mark_released(&mut self, snapshot: Uuid, block: u64, count: u64, how: Released) {
        let all = self.model.snapshots.iter_mut().chain(&mut self.model.cuts);
        for image in all.filter(|image| image.snapshot == snapshot) {
            let blocks = image.released[block as usize..].iter_mut().take(count as usize);
            blocks.filter(|held| **held != Released::Yes).for_each(|held| *held = how);
        }
    }

    fn cut(&mut self, before: Change, after: Change) -> bool {
        if self.model.snapshots.len() == crate::limits::SNAPSHOTS_MAX {
            return true;
        }
        self.cuts += 1;
        let snapshot = Uuid::from_u128(self.cuts);
        let first = self.operation(before);
        self.sequence += 1;
        let order = CutOrder { snapshot, label: String::new(), created_ms: 0, selection: vec![] };
        let marker = MirrorOperation::Cut { sequence: self.sequence, order };
        self.expect(before);
        let image = Image::new(snapshot, self.model.now.clone());
        self.model.coming = Some(image.clone());
        let second = self.operation(after);
        self.expect(after);
        if !self.apply(vec![first, marker, second]) {
            return false;
        }
        self.model.coming = None;
        self.model.snapshots.push(image.clone());
        self.model.cuts.push(image);
        true
    }

    fn check_mirror(&self) {
        assert_eq!(self.disk.contents(), self.model.now);
    }
}

/// Every snapshot equals its image and the backup map has every block that differs.
fn check_snapshots(backup: &BackupVolume, disk: &CrashingDevice, images: &[Image]) {
    let now = disk.contents();
    for status in backup.snapshots().list() {
        if status.condition != Condition::Intact {
            continue;
        }
        let id = status.cut.snapshot;
        let image = images.iter().find(|image| image.snapshot == id).expect("it was cut");
        image.check(backup);
    }
    for cut in backup.snapshots().cuts() {
        let image = images.iter().find(|image| image.snapshot == cut.snapshot).expect("cut");
        let changed = backup.snapshots().changed_since(cut.snapshot).expect("known");
        for (block, (was, is)) in (0..).zip(image.bytes.chunks(1024).zip(now.chunks(1024))) {
            assert!(was == is || changed.get(block), "a change of block {block} is forgotten");
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    let place = (0..SECTORS, 1..6u64).prop_map(|(at, count)| (at, count.min(SECTORS - at)));
    prop_oneof![
        6 => (place.clone(), 1..150u8).prop_map(|((sector, count), value)| Change::Write {
            sector, count, value
        }),
        1 => place.prop_map(|(sector, count)| Change::Zero { sector, count }),
        1 => Just(Change::Flush),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let overwriting = || change().prop_filter("no flush", |c| !matches!(c, Change::Flush));
    prop_oneof![
        5 => prop::collection::vec(change(), 1..5).prop_map(Step::Batch),
        2 => (overwriting(), overwriting()).prop_map(|(a, b)| Step::Cut(a, b)),
        1 => any::<prop::sample::Index>().prop_map(|index| Step::Delete(index.index(100))),
        1 => (0..BLOCKS as u64, 1..5u64).prop_map(|(block, count)| Step::Release { block, count }),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn every_view_equals_a_plain_copy_whatever_is_written_and_deleted(
        steps in prop::collection::vec(step(), 1..30)
    ) {
        let mut rig = Rig::new(&Power::steady(), u64::MAX);
        for step in &steps {
            prop_assert!(rig.run(step), "{:?}", step);
            rig.check_mirror();
            let images = rig.model.cuts.clone();
            check_snapshots(&rig.backup, &rig.disk, &images);
            let listed = rig.backup.snapshots().list();
            prop_assert_eq!(listed.len(), rig.model.snapshots.len());
            prop_assert!(listed.iter().all(|s| s.condition == Condition::Intact));
        }
    }

    #[test]
    fn a_crash_at_a_random_event_of_a_random_run_moves_no_snapshot(
        steps in prop::collection::vec(step(), 1..16),
        place in any::<prop::sample::Index>(),
        last_takes_effect: bool,
        seed: u64,
    ) {
        let events = events_of(&steps);
        let at = place.index(events.max(1) as usize) as u64;
        crash_and_check(&steps, at, last_takes_effect, seed);
    }
}

fn events_of(steps: &[Step]) -> u64 {
    let power = Power::steady();
    let mut rig = Rig::new(&power, u64::MAX);
    for step in steps {
        assert!(rig.run(step), "{step:?}");
    }
    power.events()
}

/// A small generator; each crash is reproducible from its seed.
fn chooser(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |versions| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // The seed also says how much survives: nothing, everything, or a mixture.
        match seed % 4 {
            0 => 0,
            1 => versions,
            _ => (state >> 11) as usize % (versions + 1),
        }
    }
}

/// A deletion that was begun is remembered, and comes to its end.
fn finish_deletions(backup: &BackupVolume, begun: Option<Uuid>) {
    for status in backup.snapshots().list() {
        let broken = matches!(status.condition, Condition::Broken(_));
        assert!(!broken || begun != Some(status.cut.snapshot), "forgotten");
    }
    backup.snapshots().finish_deletions().expect("finished");
    let leaving = |status: &SnapshotStatus| status.condition == Condition::Leaving;
    assert!(!backup.snapshots().list().iter().any(leaving), "unfinished");
}

fn crash_and_check(steps: &[Step], event: u64, last_takes_effect: bool, seed: u64) {
    let power = Power::failing_at(u64::MAX, last_takes_effect);
    let mut rig = Rig::new(&power, event);
    for step in steps {
        if !rig.run(step) {
            break;
        }
    }
    let mut choose = chooser(seed);
    let mut images = rig.model.cuts.clone();
    images.extend(rig.model.coming.clone());
    // The recovery itself is interrupted too, at one event after another, until it comes through.
    let (mut home, mut disk) = (rig.home, rig.disk);
    let mut nested = seed % 3;
    let backup = loop {
        let supply = match nested {
            0 => Power::steady(),
            other => Power::failing_at(other - 1, seed.is_multiple_of(2)),
        };
        home = Arc::new(home.crash(&mut choose, &supply));
        disk = Arc::new(disk.crash(&mut choose, supply));
        match open(&home, &disk) {
            Ok(backup) if nested == 0 => break backup,
            _ => nested = nested.saturating_sub(1),
        }
    };
    for (sector, (found, possible)) in
        disk.contents().chunks(512).zip(&rig.model.possible).enumerate()
    {
        assert!(possible.contains(&found[0]), "sector {sector} holds {found:?}");
    }
    for image in rig.model.snapshots.iter().filter(|i| Some(i.snapshot) != rig.model.leaving) {
        let listed = backup.snapshots().list();
        let status = listed.iter().find(|status| status.cut.snapshot == image.snapshot);
        let condition = status.map(|status| &status.condition);
        assert_eq!(condition, Some(&Condition::Intact), "a finished snapshot survives");
    }
    check_snapshots(&backup, &disk, &images);
    finish_deletions(&backup, rig.model.leaving);
    check_snapshots(&backup, &disk, &images);
    let maps = home.names().expect("listed").into_iter().filter(|name| name.ends_with(".map"));
    assert_eq!(maps.count(), backup.snapshots().cuts().len() + 1, "nothing is left behind");
    // Life goes on: another cut, everything is overwritten, and the broken ones can be deleted.
    backup.begin_session(2, 0).expect("begun");
    let order = CutOrder {
        snapshot: Uuid::from_u128(1 << 100),
        label: "after the crash".to_owned(),
        created_ms: 0,
        selection: Vec::new(),
    };
    backup.snapshot_now(&order).expect("cut");
    images.push(Image::new(order.snapshot, disk.contents()));
    let data = Payload::copy_of(&[251; SIZE]);
    let all = MirrorOperation::Write { sequence: 1, offset: 0, data };
    let answers = backup.apply(2, vec![all]).expect("taken");
    assert!(matches!(answers[..], [Answer::Applied { through: 1 }]), "{answers:?}");
    check_snapshots(&backup, &disk, &images);
    for status in backup.snapshots().list() {
        if status.condition != Condition::Intact {
            backup.snapshots().delete(status.cut.snapshot).expect("deleted");
        }
    }
    check_snapshots(&backup, &disk, &images);
}

#[test]
fn a_crash_at_every_event_leaves_the_old_state_or_the_new_one() {
    let write = |sector, count, value| Change::Write { sector, count, value };
    let steps = [
        Step::Batch(vec![write(0, 4, 1), write(3, 2, 2)]),
        Step::Cut(write(6, 1, 3), write(0, 1, 4)),
        Step::Batch(vec![write(15, 2, 5), Change::Flush]),
        Step::Cut(write(2, 2, 6), write(6, 3, 7)),
        Step::Batch(vec![Change::Zero { sector: 0, count: 6 }, write(9, 1, 8)]),
        Step::Cut(write(12, 1, 9), write(16, 1, 10)),
        Step::Batch(vec![write(0, 17, 11)]),
        Step::Delete(1),
        Step::Release { block: 1, count: 3 },
        Step::Batch(vec![write(1, 9, 13)]),
        Step::Reopen,
        Step::Batch(vec![write(5, 5, 12), Change::Flush]),
        Step::Delete(1),
    ];
    let events = events_of(&steps);
    assert!(events > 100, "{events} events");
    for event in 0..events {
        for seed in 0..4 {
            crash_and_check(&steps, event, seed % 2 == 1, seed + event * 4);
        }
    }
}
