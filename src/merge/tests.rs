//! The room as a whole: what is missing comes from the source, what is current stays.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::*;
use crate::bundle::{
    Bundle, BundleWriter, Compression, Identity, ImageSource, Source, WriterOptions,
};
use crate::device::{Device, RamDevice, RamFolder};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::limits::BUNDLE_ZERO_GRAIN_BYTES;
use crate::map::{MapIdentity, OverwriteMap};
use crate::units::{BlockSize, Cut, Geometry};

pub(super) const SIZE: usize = (5 << 20) + 512;
pub(super) const GROUND: u8 = 0xee;

pub(super) fn image() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes[..2 << 20]);
    bytes[3 << 20..][..40_000].fill(b'a');
    bytes[SIZE - 512..].fill(b'z');
    bytes
}

pub(super) fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub(super) fn folder_of(source: &dyn Source, options: WriterOptions) -> RamFolder {
    let folder = RamFolder::new();
    let options = WriterOptions { segment_bytes_max: 2 << 20, threads: 2, ..options };
    BundleWriter::create_in(&folder, source, &options, &mut go_on).expect("made");
    folder
}

pub(super) fn source() -> ImageSource {
    let device = Arc::new(RamDevice::from_bytes(image()));
    ImageSource::new(device, BlockSize::DEFAULT).expect("an image")
}

pub(super) fn bundle_in(folder: &RamFolder) -> Bundle {
    Bundle::open_in(Arc::new(folder.clone())).expect("whole")
}

fn bundle() -> Bundle {
    let packed = WriterOptions { compression: Compression::Auto, ..WriterOptions::default() };
    bundle_in(&folder_of(&source(), packed))
}

pub(super) struct Place {
    pub(super) device: Arc<RamDevice>,
    pub(super) target: OfflineTarget,
}

pub(super) fn place_with(block_bytes: u32, volume: Uuid, generation: u64) -> Place {
    let block_size = BlockSize::new(block_bytes).expect("a power of two");
    let geometry = Geometry::new(SIZE as u64, block_size).expect("valid");
    let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
    let identity = MapIdentity { volume, geometry, generation };
    let map = OverwriteMap::create(map, identity).expect("created");
    let device = Arc::new(RamDevice::from_bytes(vec![GROUND; SIZE]));
    let target = OfflineTarget::new(Arc::clone(&device) as _, Arc::new(map)).expect("large enough");
    Place { device, target }
}

pub(super) fn place() -> Place {
    place_with(4096, Uuid::nil(), 0)
}

pub(super) fn options() -> MergeOptions {
    MergeOptions { threads: 2, engine: None }
}

fn merged(source: &dyn MergeSource, target: &dyn MergeTarget) -> MergeReport {
    run(source, target, &options(), &mut go_on).expect("merged")
}

#[test]
fn what_is_missing_is_filled_and_what_is_current_stays() {
    let sources: [Box<dyn MergeSource>; 2] = [
        Box::new(bundle()),
        Box::new(ImagePieces::new(Arc::new(RamDevice::from_bytes(image()))).expect("an image")),
    ];
    for source in &sources {
        let Place { device, target } = place();
        target.map().mark_current(BlockRange::new(1, 3));
        target.map().mark_current(BlockRange::new(700, 800));
        let report = merged(source.as_ref(), &target);
        let mut expected = image();
        expected[4096..3 * 4096].fill(GROUND);
        expected[700 * 4096..800 * 4096].fill(GROUND);
        assert!(device.contents() == expected, "{}", source.name());
        assert_eq!(report.bytes_written, SIZE as u64 - 102 * 4096);
        assert_eq!(report.bytes_skipped, 102 * 4096);
        assert!(report.bytes_zeroed > 2 << 20 && report.bytes_read > 0, "{report:?}");
        assert_eq!(target.map().missing_bytes(), 0);
        assert!(!target.map().file().has_uncommitted(), "all is durable at the end");
    }
}

#[test]
fn a_second_merge_reads_and_writes_nothing() {
    let Place { target, .. } = place();
    let bundle = bundle();
    merged(&bundle, &target);
    let again = merged(&bundle, &target);
    assert_eq!((again.bytes_written, again.bytes_read), (0, 0));
    assert_eq!(again.bytes_skipped, SIZE as u64);
}

#[test]
fn of_a_chunk_stored_as_it_is_little_more_is_read_than_is_wanted() {
    let Place { target, .. } = place();
    let all = target.geometry().all_blocks();
    target.map().mark_current(BlockRange::new(0, 100));
    target.map().mark_current(BlockRange::new(101, all.end));
    let report = merged(&bundle(), &target);
    assert_eq!((report.bytes_written, report.bytes_read), (4096, BUNDLE_ZERO_GRAIN_BYTES));
}

#[test]
fn a_bundle_never_supplies_link_only_blocks() {
    let Place { device, target } = place();
    target.map().demote(BlockRange::new(5, 6));
    let report = merged(&bundle(), &target);
    assert_eq!((report.bytes_fetched, report.bytes_in_doubt), (0, 4096));
    assert_eq!((report.bytes_written, report.bytes_skipped), (SIZE as u64 - 4096, 0));
    assert!(device.contents()[5 * 4096..6 * 4096].iter().all(|byte| *byte == GROUND));
    assert_eq!(target.map().missing_bytes(), 4096);
}

#[test]
fn a_damaged_chunk_stays_missing_and_is_reported() {
    let folder = folder_of(&source(), WriterOptions::default());
    let name = "seg-00000000.drs";
    let mut bytes = folder.contents(name).expect("there");
    bytes[900_000] ^= 1;
    folder.replace(name, bytes);
    let Place { device, target } = place();
    let report = merged(&bundle_in(&folder), &target);
    assert_eq!((report.chunks_damaged, report.chunks_repaired), (1, 0));
    let [hit] = report.damaged[..] else { panic!("one chunk, found {:?}", report.damaged) };
    assert_eq!(hit.length, BUNDLE_ZERO_GRAIN_BYTES);
    assert_eq!((report.bytes_written, report.bytes_skipped), (SIZE as u64 - hit.length, 0));
    let mut expected = image();
    expected[hit.offset as usize..hit.end() as usize].fill(GROUND);
    assert!(device.contents() == expected, "nothing unverified is written");
    assert_eq!(target.map().missing_bytes(), hit.length);
    let good = merged(&bundle(), &target);
    assert_eq!(good.bytes_written, hit.length);
    assert!(device.contents() == image(), "a whole bundle supplies the rest");
}

#[test]
fn a_stopped_merge_keeps_what_it_did_and_goes_on() {
    let Place { device, target } = place();
    let bundle = bundle();
    let mut calls = 0;
    let stopped = run(&bundle, &target, &options(), &mut |_| {
        calls += 1;
        ControlFlow::Break(())
    });
    assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Interrupted);
    assert_eq!(calls, 1);
    assert!(!target.map().file().has_uncommitted(), "what was filled is durable");
    let missing = target.map().missing_bytes();
    assert_eq!(merged(&bundle, &target).bytes_written, missing);
    assert!(device.contents() == image());
}

#[test]
fn blocks_of_another_size_are_put_together() {
    let runs = [(0, 12_288), (12_288, 2 << 20), ((2 << 20) + 4096, SIZE as u64)];
    let selection: Vec<_> =
        runs.iter().map(|&(start, end)| ByteRange::new(start, end - start)).collect();
    let options = WriterOptions { selection, ..WriterOptions::default() };
    let bundle = bundle_in(&folder_of(&source(), options));
    for block_bytes in [512, 8192, 1 << 20] {
        let Place { device, target } = place_with(block_bytes, Uuid::nil(), 0);
        merged(&bundle, &target);
        let geometry = target.geometry();
        let hole = geometry.bytes_of(geometry.touched(ByteRange::new(2 << 20, 4096)));
        let mut expected = image();
        expected[hole.offset as usize..hole.end() as usize].fill(GROUND);
        assert!(device.contents() == expected, "blocks of {block_bytes}");
        assert_eq!(target.map().missing_bytes(), hole.length);
    }
}

#[derive(Debug)]
pub(super) struct Bound(pub(super) ImageSource, pub(super) u128, pub(super) u64);

impl Source for Bound {
    fn identity(&self) -> Identity {
        Identity { volume: Uuid::from_u128(self.1), generation: self.2, ..self.0.identity() }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

#[test]
fn a_bundle_of_another_volume_generation_or_size_is_refused_untouched() {
    for (volume, generation) in [(1, 3), (2, 2)] {
        let bundle =
            bundle_in(&folder_of(&Bound(source(), volume, generation), WriterOptions::default()));
        let Place { device, target } = place_with(4096, Uuid::from_u128(1), 2);
        let refused = run(&bundle, &target, &options(), &mut go_on).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Identity);
        assert!(refused.to_string().contains(&Uuid::from_u128(volume).to_string()), "{refused}");
        assert!(device.contents().iter().all(|byte| *byte == GROUND));
    }
    let other = ImagePieces::new(Arc::new(RamDevice::new(SIZE as u64 + 512))).expect("an image");
    let refused = run(&other, &place().target, &options(), &mut go_on).expect_err("refused");
    assert_eq!(refused.kind(), ErrorKind::Identity);
    let right = bundle_in(&folder_of(&Bound(source(), 1, 2), WriterOptions::default()));
    let Place { device, target } = place_with(4096, Uuid::from_u128(1), 2);
    merged(&right, &target);
    assert!(device.contents() == image());
}

#[test]
fn the_first_bound_bundle_binds_an_unbound_target_and_a_foreign_one_is_refused_then() {
    let bundle = |volume, generation| {
        bundle_in(&folder_of(&Bound(source(), volume, generation), WriterOptions::default()))
    };
    let Place { device, target } = place();
    merged(&bundle(1, 2), &target);
    let identity = target.map().identity();
    assert_eq!((identity.volume, identity.generation), (Uuid::from_u128(1), 2));
    assert!(device.contents() == image());
    for foreign in [bundle(1, 1), bundle(3, 2)] {
        let refused = run(&foreign, &target, &options(), &mut go_on).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Identity);
    }
    assert_eq!(merged(&bundle(1, 2), &target).bytes_written, 0);
}

#[test]
fn of_several_sources_none_is_merged_where_one_may_not_be() {
    let bundle =
        |volume| bundle_in(&folder_of(&Bound(source(), volume, 2), WriterOptions::default()));
    let (first, second, foreign) = (bundle(1), bundle(1), bundle(3));
    let Place { target, .. } = place();
    let strand = |source| Strand { source, target: &target, lane: 0 };
    check_all(&[strand(&first), strand(&second)]).expect("of one volume");
    let refused = check_all(&[strand(&first), strand(&foreign)]).expect_err("of two");
    assert_eq!(refused.kind(), ErrorKind::Identity);
    assert!(target.identity().volume.is_nil(), "nothing is bound by a check");
}

#[test]
fn an_unbound_target_in_which_something_is_current_refuses_a_bound_bundle() {
    let bound = bundle_in(&folder_of(&Bound(source(), 1, 2), WriterOptions::default()));
    let Place { device, target } = place();
    target.map().mark_current(BlockRange::one(5));
    let refused = run(&bound, &target, &options(), &mut go_on).expect_err("refused");
    assert_eq!(refused.kind(), ErrorKind::Identity);
    assert!(refused.to_string().contains("map create --volume"), "{refused}");
    assert!(device.contents().iter().all(|byte| *byte == GROUND));
}

/// A target that someone else works on: the first fill of each call is refused some blocks.
pub(super) struct Shared {
    inner: OfflineTarget,
    held: Mutex<Option<BlockRange>>,
    fails: bool,
    commits: AtomicU64,
    takes_unbound: bool,
    pub(super) repaired: Mutex<Vec<BlockRange>>,
}

pub(super) fn shared() -> (Arc<RamDevice>, Shared) {
    let Place { device, target: inner } = place();
    let commits = AtomicU64::new(0);
    let held = Mutex::new(None);
    let repaired = Mutex::default();
    (device, Shared { inner, held, fails: false, commits, takes_unbound: true, repaired })
}

impl MergeTarget for Shared {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn identity(&self) -> TargetIdentity {
        TargetIdentity { takes_unbound: self.takes_unbound, ..self.inner.identity() }
    }

    fn bind(&self, volume: Uuid, cut: Cut) -> Result<()> {
        self.inner.bind(volume, cut)
    }

    fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.inner.wanted(blocks)
    }

    fn in_doubt(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.inner.in_doubt(blocks)
    }

    fn device(&self) -> Arc<dyn Device> {
        self.inner.device()
    }

    fn claim(&self, blocks: BlockRange) -> Result<Claim> {
        if self.fails && blocks.contains(300) {
            return Err(Error::new(ErrorKind::Device, "injected"));
        }
        let mut held = self.held.lock().expect("not poisoned");
        if held.is_some_and(|held| held.intersect(blocks).is_some()) {
            *held = None;
            return Ok(Claim::nothing());
        }
        self.inner.claim(blocks)
    }

    fn settle(&self, claim: Claim, result: &Result<()>) {
        self.inner.settle(claim, result);
    }

    fn commit(&self) -> Result<()> {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.inner.commit()
    }

    fn repair(&self, blocks: BlockRange) -> bool {
        self.repaired.lock().expect("not poisoned").push(blocks);
        true
    }
}

#[test]
fn blocks_held_by_others_are_filled_in_a_second_pass() {
    let (device, target) = shared();
    *target.held.lock().expect("not poisoned") = Some(BlockRange::one(100));
    let report = merged(&bundle(), &target);
    assert_eq!((report.bytes_written, report.bytes_skipped), (SIZE as u64, 0));
    assert!(device.contents() == image());
}

#[test]
fn what_no_bundle_may_supply_after_a_crash_is_brought_by_the_target() {
    let (_, target) = shared();
    target.inner.map().demote(BlockRange::new(5, 8));
    target.inner.map().mark_current(BlockRange::one(6));
    let report = merged(&bundle(), &target);
    let repaired = target.repaired.lock().expect("not poisoned").clone();
    assert_eq!(repaired, [BlockRange::one(5), BlockRange::one(7)]);
    assert_eq!((report.bytes_fetched, report.bytes_in_doubt), (8192, 0));
    assert_eq!((report.bytes_written, report.bytes_skipped), (SIZE as u64 - 3 * 4096, 4096));
}

#[test]
fn a_failing_target_ends_the_merge_and_keeps_what_was_filled() {
    let (_, target) = shared();
    let target = Shared { fails: true, ..target };
    let failed = run(&bundle(), &target, &options(), &mut go_on).expect_err("failed");
    assert_eq!(failed.kind(), ErrorKind::Device);
    assert_eq!(target.commits.load(Ordering::Relaxed), 1);
    assert!(!target.inner.map().file().has_uncommitted());
}

#[test]
fn an_unbound_bundle_is_refused_by_a_target_that_is_served() {
    let (_, target) = shared();
    let target = Shared { takes_unbound: false, ..target };
    let refused = run(&bundle(), &target, &options(), &mut go_on).expect_err("refused");
    assert_eq!(refused.kind(), ErrorKind::Identity);
}

#[test]
fn damaged_chunks_that_the_target_brings_another_way_count_as_repaired() {
    let folder = folder_of(&source(), WriterOptions::default());
    let mut bytes = folder.contents("seg-00000000.drs").expect("there");
    bytes[900_000] ^= 1;
    folder.replace("seg-00000000.drs", bytes);
    let report = merged(&bundle_in(&folder), &shared().1);
    assert_eq!((report.chunks_damaged, report.chunks_repaired), (1, 1));
}

#[derive(Debug)]
struct FlushFails(RamDevice);

impl Device for FlushFails {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn sector_size(&self) -> u32 {
        512
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
        Err(Error::new(ErrorKind::Device, "injected"))
    }
}

#[test]
fn after_a_failed_flush_nothing_more_is_committed() {
    let geometry = Geometry::new(SIZE as u64, BlockSize::DEFAULT).expect("valid");
    let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
    let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
    let map = OverwriteMap::create(map, identity).expect("created");
    let device = Arc::new(FlushFails(RamDevice::new(SIZE as u64)));
    let target = OfflineTarget::new(device, Arc::new(map)).expect("large enough");
    target.fill(BlockRange::new(0, 1), None).expect("filled");
    assert_eq!(target.commit().expect_err("not durable").kind(), ErrorKind::Device);
    target.fill(BlockRange::new(2, 5), None).expect("filled");
    assert_eq!(target.commit().expect_err("stopped").kind(), ErrorKind::Poisoned);
}
