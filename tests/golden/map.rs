//! Map files of every role, as power loss leaves them: torn slots, several pages, a new life.

use std::sync::Arc;

use uuid::Uuid;

use dualrestore::bitmap::Bitmap;
use dualrestore::device::{Device, RamDevice};
use dualrestore::extent::BlockRange;
use dualrestore::map::{CURRENT, LINK_ONLY, MapFile, MapIdentity, MapRole, OverwriteMap, UNSENT};
use dualrestore::units::{BlockSize, Cut, CutSpan, Geometry};

use crate::golden;

/// Bits of a page.
const PAGE: u64 = 32_256;
const BLOCKS: u64 = 2 * PAGE + 1001;

fn identity() -> MapIdentity {
    // Three pages in each plane, the last block short.
    let geometry = Geometry::new((BLOCKS - 1) * 4096 + 512, BlockSize::DEFAULT).expect("valid");
    let volume = Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001);
    MapIdentity { volume, geometry, generation: 3 }
}

fn room(role: MapRole) -> Arc<RamDevice> {
    Arc::new(RamDevice::new(MapFile::bytes_needed(identity().geometry, role)))
}

fn run(start: u64, end: u64) -> BlockRange {
    BlockRange::new(start, end)
}

fn runs(bits: &Bitmap) -> Vec<(u64, u64)> {
    bits.runs(run(0, BLOCKS), true).map(|run| (run.start, run.end)).collect()
}

/// The position of a page slot, from the document.
fn slot_position(plane: u64, page: u64, slot: u64) -> u64 {
    8192 + ((plane * 3 + page) * 2 + slot) * 4096
}

/// One sector of the slot as power loss leaves it.
fn tear(device: &RamDevice, position: u64) {
    device.write_at(position + 1024, &[0xa5; 512]).expect("ram");
}

fn opened(bytes: Vec<u8>) -> Arc<RamDevice> {
    Arc::new(RamDevice::from_bytes(bytes))
}

fn overwrite_map() -> Vec<u8> {
    let device = room(MapRole::Overwrite);
    let map = OverwriteMap::create(Arc::clone(&device) as _, identity()).expect("created");
    let commit = || map.file().commit_all().expect("committed");
    map.mark_current(run(0, 5000));
    map.mark_current(run(PAGE - 256, PAGE + 744));
    commit();
    map.file().fill(UNSENT, run(10, 20), true);
    map.mark_current(run(BLOCKS - 1, BLOCKS));
    commit();
    map.demote(run(50, 60));
    commit();
    map.begin_generation_without(4, &[run(100, 200)]).expect("begun");
    map.mark_current(run(PAGE + 5000, PAGE + 6000));
    commit();
    // The last commit was torn, and one header slot rots.
    tear(&device, slot_position(0, 1, 1));
    tear(&device, 4096);
    device.contents()
}

#[test]
fn an_overwrite_map_of_version_1_is_written_and_read_as_it_was() {
    let bytes = golden("overwrite-map-v1.bin", &overwrite_map());
    let (map, damage) =
        MapFile::open_damaged(opened(bytes.clone()), MapRole::Overwrite).expect("opens");
    assert_eq!(map.identity(), MapIdentity { generation: 4, ..identity() });
    let current = [(0, 50), (60, 100), (200, 5000), (PAGE - 256, PAGE + 744), (BLOCKS - 1, BLOCKS)];
    assert_eq!(runs(map.plane(CURRENT)), current);
    assert_eq!(runs(map.plane(LINK_ONLY)), [(50, 60)]);
    assert_eq!(runs(map.plane(UNSENT)), [(10, 20)]);
    assert_eq!(damage.suspect, [(CURRENT, run(PAGE, 2 * PAGE))]);
    assert!(damage.lost.is_empty());
    let (map, recovery) = OverwriteMap::open(opened(bytes), None).expect("opens");
    assert_eq!((recovery.damaged_pages, recovery.link_only_blocks), (1, PAGE - 744));
    assert_eq!(runs(map.link_only()), [(50, 60), (PAGE + 744, 2 * PAGE)]);
}

fn voided_map() -> Vec<u8> {
    let device = room(MapRole::Overwrite);
    let map =
        OverwriteMap::create_current(Arc::clone(&device) as _, identity(), true).expect("created");
    map.file().fill(UNSENT, run(0, 300), false);
    map.file().commit_all().expect("committed");
    map.begin_generation(9, false, false).expect("begun");
    map.mark_current(run(7, 8));
    map.file().commit_all().expect("committed");
    device.contents()
}

#[test]
fn a_new_generation_of_version_1_voids_the_pages_of_the_one_before() {
    let bytes = golden("overwrite-map-v1-voided.bin", &voided_map());
    let (map, recovery) = OverwriteMap::open(opened(bytes), None).expect("opens");
    assert_eq!(recovery, dualrestore::map::Recovery::default());
    assert_eq!(map.identity().generation, 9);
    assert_eq!(runs(map.current()), [(7, 8)]);
    assert_eq!((runs(map.link_only()), runs(map.unsent())), (vec![], vec![]));
}

const SPAN: CutSpan = CutSpan {
    oldest: Cut { generation: 3, sequence: 17 },
    newest: Cut { generation: 3, sequence: 20 },
};

fn replica_map() -> Vec<u8> {
    let device = room(MapRole::Overwrite);
    let unbound = MapIdentity { volume: Uuid::nil(), generation: 0, ..identity() };
    let map = OverwriteMap::create(Arc::clone(&device) as _, unbound).expect("created");
    map.bind(identity().volume, SPAN.newest).expect("nothing is current");
    map.mark_current(run(40, 45));
    map.file().commit_all().expect("committed");
    map.file().set_span(SPAN).expect("an incremental bundle was merged whole");
    device.contents()
}

#[test]
fn the_map_of_a_replica_of_version_1_is_written_and_read_as_it_was() {
    let bytes = golden("overwrite-map-v1-replica.bin", &replica_map());
    let map = MapFile::open(opened(bytes), MapRole::Overwrite).expect("opens");
    assert_eq!(map.identity(), identity());
    assert_eq!(map.span(), Some(SPAN));
    assert_eq!(runs(map.plane(CURRENT)), [(40, 45)]);
}

fn changed_map() -> Vec<u8> {
    let device = room(MapRole::Changed);
    let map = MapFile::create(Arc::clone(&device) as _, identity(), MapRole::Changed);
    let map = map.expect("created");
    for blocks in [run(0, 1), run(4000, 4064), run(PAGE, 2 * PAGE), run(1, 2)] {
        map.fill(0, blocks, true);
        map.commit_all().expect("committed");
    }
    device.contents()
}

#[test]
fn a_changed_map_of_version_1_is_written_and_read_as_it_was() {
    let bytes = golden("changed-map-v1.bin", &changed_map());
    let map = MapFile::open(opened(bytes), MapRole::Changed).expect("opens");
    assert_eq!(map.identity(), identity());
    assert_eq!(runs(map.plane(0)), [(0, 2), (4000, 4064), (PAGE, 2 * PAGE)]);
}

fn preserved_map() -> Vec<u8> {
    let device = room(MapRole::Preserved);
    let map = MapFile::create(Arc::clone(&device) as _, identity(), MapRole::Preserved);
    let map = map.expect("created");
    map.fill(0, run(30, 90), true);
    map.commit_all().expect("committed");
    map.fill(1, run(30, 60), true);
    map.commit_all().expect("committed");
    map.fill(0, run(2 * PAGE + 5, 2 * PAGE + 6), true);
    map.commit_all().expect("committed");
    // Torn within the first commit of its page: slot 1 comes first.
    tear(&device, slot_position(0, 2, 1));
    device.write_at(slot_position(0, 2, 0), &[0; 4096]).expect("ram");
    device.contents()
}

#[test]
fn a_preserved_map_of_version_1_is_written_and_read_as_it_was() {
    let bytes = golden("preserved-map-v1.bin", &preserved_map());
    let (map, damage) = MapFile::open_damaged(opened(bytes), MapRole::Preserved).expect("opens");
    assert_eq!(map.identity(), identity());
    assert_eq!(runs(map.plane(0)), [(30, 90)]);
    assert_eq!(runs(map.plane(1)), [(30, 60)]);
    assert!(damage.suspect.is_empty() && damage.lost.is_empty(), "{damage:?}");
}
