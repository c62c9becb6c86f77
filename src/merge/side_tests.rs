//! Several sources at once: one fails, one is damaged, all have the same; nothing is lost.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::tests::{
    Bound, GROUND, Place, SIZE, bundle_in, folder_of, go_on, image, options, place, place_with,
    shared, source,
};
use super::*;
use crate::bundle::{Bundle, WriterOptions};
use crate::device::{Fault, FaultPlan, FaultyFolder, Operation, RamDevice, RamFolder};
use crate::error::{ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// A medium that holds these MiB of the volume.
fn medium(start: u64, end: u64) -> RamFolder {
    let end = (end * MIB).min(SIZE as u64);
    let range = ByteRange::new(start * MIB, end - start * MIB);
    let options = WriterOptions { selection: vec![range], ..WriterOptions::default() };
    folder_of(&Bound(source(), 1, 2), options)
}

/// Three media of the volume, of which the second and third share a MiB.
fn media() -> [RamFolder; 3] {
    [medium(0, 2), medium(2, 4), medium(3, 6)]
}

fn open(folders: &[RamFolder]) -> Vec<Bundle> {
    folders.iter().map(bundle_in).collect()
}

/// Each on a disk of its own.
fn strands<'a>(bundles: &'a [Bundle], target: &'a dyn MergeTarget) -> Vec<Strand<'a>> {
    bundles.iter().enumerate().map(|(lane, source)| Strand { source, target, lane }).collect()
}

fn together(bundles: &[Bundle], target: &dyn MergeTarget) -> Result<MergeReport> {
    run_all(&strands(bundles, target), &options(), &mut go_on)
}

/// Flips a bit of the first chunk of a medium.
fn damage(folder: &RamFolder) {
    let name = "seg-00000000.drs";
    let mut bytes = folder.contents(name).expect("there");
    bytes[3 * 4096] ^= 1;
    folder.replace(name, bytes);
}

#[test]
fn media_merged_at_once_fill_everything_and_are_accounted_for_one_by_one() {
    let Place { device, target } = place();
    target.map().mark_current(BlockRange::new(0, 0));
    let bundles = open(&media());
    let mut last = MergeProgress::default();
    let report = run_all(&strands(&bundles, &target), &options(), &mut |state| {
        last = *state;
        ControlFlow::Continue(())
    })
    .expect("merged");
    assert!(device.contents() == image());
    assert_eq!(target.map().missing_bytes(), 0);
    assert!(!target.map().file().has_uncommitted(), "all is durable at the end");
    let covered = SIZE as u64 + MIB;
    assert_eq!((report.bytes_written, report.bytes_skipped), (SIZE as u64, MIB));
    assert_eq!((last.bytes_done, last.bytes_total), (covered, covered));
    assert_eq!((last.sources_done, last.sources), (3, 3));
    let done: Vec<u64> = report.sources.iter().map(|one| one.bytes_done).collect();
    assert_eq!(done, [2 * MIB, 2 * MIB, SIZE as u64 - 3 * MIB]);
    let written: u64 = report.sources.iter().map(|one| one.bytes_written).sum();
    assert_eq!((written, report.side_by_side), (report.bytes_written, 3));
    let again = together(&bundles, &target).expect("merged");
    assert_eq!((again.bytes_written, again.bytes_read), (0, 0));
}

#[test]
fn the_same_bundle_on_many_disks_fills_each_block_once() {
    let Place { device, target } = place();
    let bundles: Vec<Bundle> = (0..9).map(|_| bundle_in(&medium(0, 6))).collect();
    let report = together(&bundles, &target).expect("merged");
    assert!(device.contents() == image());
    assert_eq!((report.bytes_written, report.bytes_skipped), (SIZE as u64, 8 * SIZE as u64));
    assert_eq!(target.map().missing_bytes(), 0);
    assert_eq!(report.side_by_side, crate::limits::MERGE_LANES_MAX);
}

#[test]
fn a_chunk_damaged_on_one_medium_and_sound_on_another_counts_as_repaired_without_the_link() {
    for lanes in [[0, 1], [0, 0]] {
        let (device, target) = shared();
        let bad = medium(0, 6);
        damage(&bad);
        let bundles = open(&[bad, medium(0, 6)]);
        let strands: Vec<_> = bundles
            .iter()
            .zip(lanes)
            .map(|(source, lane)| Strand { source, target: &target as _, lane })
            .collect();
        let report = run_all(&strands, &options(), &mut go_on).expect("merged");
        assert!(device.contents() == image());
        // Not even noticed, if the other medium was quicker.
        assert_eq!(report.chunks_damaged, report.chunks_repaired, "{report:?}");
        assert!(lanes == [0, 1] || report.sources[0].chunks_damaged == 1, "{report:?}");
        assert_eq!(report.sources[1].chunks_damaged, 0);
        assert_eq!(report.bytes_written, SIZE as u64);
        assert!(target.repaired.lock().expect("not poisoned").is_empty(), "the link is spared");
    }
}

#[test]
fn a_chunk_damaged_on_every_medium_that_has_it_is_asked_of_the_target_at_the_end() {
    let folders = [medium(0, 2), medium(0, 2), medium(2, 6)];
    folders[..2].iter().for_each(damage);
    let Place { target, .. } = place();
    let report = together(&open(&folders), &target).expect("merged");
    assert_eq!((report.chunks_damaged, report.chunks_repaired), (2, 0));
    let [damaged] = report.damaged[..] else { panic!("one chunk: {report:?}") };
    assert!(damaged.offset == 0 && damaged.length <= MIB, "{damaged:?}");
    assert_eq!(target.map().missing_bytes(), damaged.length);
    let (_, target) = shared();
    let report = together(&open(&folders), &target).expect("merged");
    assert_eq!((report.chunks_damaged, report.chunks_repaired), (2, 2));
    let asked = target.repaired.lock().expect("not poisoned").clone();
    assert_eq!(asked, [target.geometry().touched(damaged); 2]);
}

#[test]
fn a_medium_that_is_pulled_out_is_reported_and_the_others_are_merged_to_their_end() {
    let Place { device, target } = place();
    let plan = FaultPlan::new();
    let [first, second, third] = media();
    let gone = FaultyFolder::new(Arc::new(second), plan.clone());
    let bundles = [
        bundle_in(&first),
        Bundle::open_in(Arc::new(gone)).expect("there for now"),
        bundle_in(&third),
    ];
    const ENODEV: i32 = 19;
    plan.add(Fault::always(Operation::Read, ENODEV));
    let report = together(&bundles, &target).expect("the others are merged");
    let errors: Vec<_> = report.sources.iter().map(|one| one.error.is_some()).collect();
    assert_eq!(errors, [false, true, false]);
    assert_eq!(report.sources[1].error.as_ref().expect("said").errno(), Some(ENODEV));
    assert!(!target.map().file().has_uncommitted(), "what was filled is durable");
    let mut expected = image();
    expected[2 << 20..3 << 20].fill(GROUND);
    assert!(device.contents() == expected);
    plan.clear();
    let again = together(&bundles, &target).expect("merged");
    assert_eq!((again.bytes_written, target.map().missing_bytes()), (MIB, 0));
    assert!(device.contents() == image());
}

#[test]
fn of_one_source_its_error_is_that_of_the_merge() {
    let Place { target, .. } = place();
    let plan = FaultPlan::new();
    let gone = FaultyFolder::new(Arc::new(medium(0, 6)), plan.clone());
    let bundle = Bundle::open_in(Arc::new(gone)).expect("there for now");
    plan.add(Fault::always(Operation::Read, 5));
    let failed = run(&bundle, &target, &options(), &mut go_on).expect_err("gone");
    assert_eq!(failed.errno(), Some(5));
}

#[test]
fn of_several_at_once_none_is_read_where_one_may_not_be_merged() {
    let foreign = bundle_in(&folder_of(&Bound(source(), 3, 2), WriterOptions::default()));
    let sources = [bundle_in(&medium(0, 6)), foreign];
    let plain = ImagePieces::new(Arc::new(RamDevice::from_bytes(image()))).expect("an image");
    for (first, second) in [(&sources[0], &sources[1]), (&sources[1], &sources[0])] {
        let Place { device, target } = place();
        let strand = |source| Strand { source, target: &target as &dyn MergeTarget, lane: 0 };
        let mixtures: [&[Strand<'_>]; 3] = [
            &[strand(first), strand(second)],
            &[strand(first), strand(&plain)],
            &[strand(&plain), strand(first)],
        ];
        for mixture in mixtures {
            let refused = run_all(mixture, &options(), &mut go_on).expect_err("not of one volume");
            assert_eq!(refused.kind(), ErrorKind::Identity);
        }
        assert!(device.contents().iter().all(|byte| *byte == GROUND));
        assert!(target.identity().volume.is_nil(), "nothing is bound");
    }
}

#[test]
fn a_primary_takes_images_and_bundles_of_its_volume_at_once() {
    let Place { device, target } = place_with(4096, Uuid::from_u128(1), 2);
    let bundle = bundle_in(&medium(0, 3));
    let plain = ImagePieces::new(Arc::new(RamDevice::from_bytes(image()))).expect("an image");
    let strand = |source, lane| Strand { source, target: &target as &dyn MergeTarget, lane };
    let both = [strand(&bundle, 0), strand(&plain, 1)];
    let report = run_all(&both, &options(), &mut go_on).expect("merged");
    assert!(device.contents() == image());
    assert_eq!(report.side_by_side, 2);
}

#[test]
fn a_wish_to_stop_ends_all_of_them_and_keeps_what_they_did() {
    let Place { device, target } = place();
    let bundles = open(&media());
    let stopped = run_all(&strands(&bundles, &target), &options(), &mut |_| ControlFlow::Break(()));
    assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Interrupted);
    assert!(!target.map().file().has_uncommitted(), "what was filled is durable");
    let missing = target.map().missing_bytes();
    assert_eq!(together(&bundles, &target).expect("goes on").bytes_written, missing);
    assert!(device.contents() == image());
}

#[test]
fn a_forecast_counts_what_several_sources_have_once() {
    let Place { device, target } = place();
    target.map().mark_current(BlockRange::new(1, 3));
    let bundles = open(&media());
    let told = forecast(&strands(&bundles, &target), &mut |_| ControlFlow::Continue(()));
    let told = told.expect("told");
    assert!(device.contents().iter().all(|byte| *byte == GROUND));
    let Place { target, .. } = place_with(4096, Uuid::from_u128(1), 2);
    target.map().mark_current(BlockRange::new(1, 3));
    let done = together(&bundles, &target).expect("merged");
    assert_eq!(told.bytes_written, SIZE as u64 - 8192);
    for (told, done) in [
        (told.bytes_written, done.bytes_written),
        (told.bytes_zeroed, done.bytes_zeroed),
        (told.bytes_skipped, done.bytes_skipped),
    ] {
        assert_eq!(told, done);
    }
}
