//! What a map file holds after commits, resets and torn pages.

use uuid::Uuid;

use super::*;
use crate::device::{CrashingDevice, Fault, FaultPlan, FaultyDevice, Operation, Power, RamDevice};
use crate::units::BlockSize;

fn geometry() -> Geometry {
    Geometry::new(1 << 30, BlockSize::DEFAULT).expect("valid")
}

fn identity() -> MapIdentity {
    MapIdentity { volume: Uuid::from_u128(1), geometry: geometry(), generation: 1 }
}

fn create(device: &Arc<RamDevice>) -> MapFile {
    MapFile::create(Arc::clone(device) as _, identity(), MapRole::Overwrite).expect("created")
}

fn ram() -> Arc<RamDevice> {
    Arc::new(RamDevice::new(MapFile::bytes_needed(geometry(), MapRole::Overwrite)))
}

fn opened(device: Arc<RamDevice>) -> (MapFile, Damage) {
    MapFile::open_damaged(device, MapRole::Overwrite).expect("opens")
}

#[test]
fn committed_bits_are_there_after_reopening_and_others_are_not() {
    let device = ram();
    let map = create(&device);
    let blocks = geometry().blocks();
    map.fill(0, BlockRange::new(5, blocks - 5), true);
    map.fill(2, BlockRange::new(100, 101), true);
    map.commit_all().expect("committed");
    map.fill(0, BlockRange::new(0, 5), true);
    let reopened = MapFile::open(device, MapRole::Overwrite).expect("opens");
    assert_eq!(reopened.plane(0).count_all(), blocks - 10);
    assert_eq!(reopened.plane(1).count_all(), 0);
    assert!(reopened.plane(2).get(100));
}

#[test]
fn bits_set_after_the_capture_are_not_in_that_commit() {
    let device = ram();
    let map = create(&device);
    map.fill(0, BlockRange::one(1), true);
    let capture = map.capture(100);
    map.fill(0, BlockRange::one(2), true);
    map.commit(&capture).expect("committed");
    let reopened = MapFile::open(device, MapRole::Overwrite).expect("opens");
    assert!(reopened.plane(0).get(1) && !reopened.plane(0).get(2));
    assert!(map.has_uncommitted());
}

#[test]
fn what_a_map_shows_when_it_is_opened_survives_a_loss_of_power_after_that() {
    let bytes = MapFile::bytes_needed(geometry(), MapRole::Overwrite);
    let plan = FaultPlan::new();
    let disk = CrashingDevice::new(bytes, Power::steady());
    let disk = Arc::new(FaultyDevice::new(disk, plan.clone()));
    let map = MapFile::create(Arc::clone(&disk) as _, identity(), MapRole::Overwrite);
    let map = map.expect("created");
    map.fill(0, BlockRange::one(7), true);
    plan.add(Fault::once(Operation::Flush, 28));
    map.commit_all().expect_err("written, but not flushed");
    drop(map);
    let map = MapFile::open(Arc::clone(&disk) as _, MapRole::Overwrite).expect("opens");
    assert!(map.plane(0).get(7) && !map.has_uncommitted(), "it was written");
    let after = Arc::new(disk.inner().crash(&mut |_| 0, Power::steady()));
    let map = MapFile::open(after, MapRole::Overwrite).expect("opens");
    assert!(map.plane(0).get(7), "nobody would write it again");
}

#[test]
fn a_torn_page_leaves_the_older_one_and_is_reported() {
    let device = ram();
    let map = create(&device);
    map.fill(0, BlockRange::one(1), true);
    map.commit_all().expect("committed");
    map.fill(0, BlockRange::one(2), true);
    map.commit_all().expect("committed");
    device.write_at(map.position(0, 0, 1) + 512, &[0xff; 512]).expect("ram");
    let (reopened, damage) = opened(device);
    assert!(reopened.plane(0).get(1) && !reopened.plane(0).get(2));
    assert_eq!(damage.suspect.len(), 1);
    assert!(damage.lost.is_empty());
}

#[test]
fn a_page_with_no_valid_slot_is_lost_and_refused_unless_asked() {
    let device = ram();
    let map = create(&device);
    map.fill(0, BlockRange::one(1), true);
    map.commit_all().expect("committed");
    device.write_at(map.position(0, 0, 0), &[1; 512]).expect("ram");
    device.write_at(map.position(0, 0, 1), &[1; 512]).expect("ram");
    let error = MapFile::open(Arc::clone(&device) as _, MapRole::Overwrite).expect_err("lost");
    assert_eq!(error.kind(), ErrorKind::Integrity);
    let (_, damage) = opened(device);
    assert_eq!(damage.lost.len(), 1);
}

#[test]
fn a_first_commit_torn_in_either_slot_leaves_the_page_before_or_after_it() {
    for (torn, kept) in [(1, 0), (0, 1)] {
        let device = ram();
        let map = create(&device);
        map.fill(0, BlockRange::one(5000), true);
        map.commit_all().expect("committed");
        if torn == 1 {
            // Slot 0 is written only once slot 1 is durable.
            device.write_at(map.position(0, 0, 0), &[0; SLOT_BYTES]).expect("ram");
        }
        device.write_at(map.position(0, 0, torn) + 512, &[7; 512]).expect("ram");
        let (reopened, damage) = opened(device);
        assert!(damage.lost.is_empty(), "{damage:?}");
        assert_eq!(reopened.plane(0).count_all(), kept);
    }
}

#[test]
fn a_reset_voids_every_page_and_survives() {
    let device = ram();
    let map = create(&device);
    map.fill(0, BlockRange::new(0, 1000), true);
    map.commit_all().expect("committed");
    map.reset(Uuid::from_u128(1), 2, &[false, false, true]).expect("reset");
    map.fill(0, BlockRange::one(7), true);
    map.commit_all().expect("committed");
    let reopened = MapFile::open(device, MapRole::Overwrite).expect("opens");
    assert_eq!(reopened.identity().generation, 2);
    assert_eq!(reopened.plane(0).count_all(), 1);
    assert_eq!(reopened.plane(2).count_all(), geometry().blocks());
}

#[test]
fn a_map_of_another_role_is_refused() {
    let device = ram();
    drop(create(&device));
    let error = MapFile::open(device, MapRole::Changed).expect_err("another role");
    assert_eq!(error.kind(), ErrorKind::Identity);
}

#[test]
fn the_first_commit_of_a_page_after_a_reset_may_be_torn_in_either_slot() {
    for torn in [1, 0] {
        let device = ram();
        let map = create(&device);
        map.fill(0, BlockRange::one(1), true);
        map.commit_all().expect("committed");
        map.reset(Uuid::from_u128(1), 2, &[true, false, true]).expect("reset");
        let before = device.contents()[map.position(0, 0, 0) as usize..][..SLOT_BYTES].to_vec();
        map.fill(0, BlockRange::one(7), false);
        map.commit_all().expect("committed");
        if torn == 1 {
            device.write_at(map.position(0, 0, 0), &before).expect("ram");
        }
        device.write_at(map.position(0, 0, torn) + 512, &[7; 512]).expect("ram");
        let (reopened, damage) = opened(device);
        assert!(damage.lost.is_empty(), "{damage:?}");
        assert_eq!(reopened.plane(0).get(7), torn == 1);
    }
}
