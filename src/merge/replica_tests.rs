//! A replica made of a full bundle and incremental ones is one cut, or it is refused.

use std::ops::ControlFlow;
use std::sync::Arc;

use uuid::Uuid;

use super::*;
use crate::bundle::{Bundle, BundleWriter, Identity, ImageSource, Source, WriterOptions};
use crate::device::{Device, RamDevice, RamFolder};
use crate::error::{ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{BaseCut, Run};
use crate::map::{MapIdentity, OverwriteMap};
use crate::units::{BlockSize, Cut, CutSpan, Geometry};

const BLOCK: usize = 4096;
const BLOCKS: usize = 8;

/// The volume at a cut: block `b` holds `at[b]`.
#[derive(Debug)]
struct Instant(ImageSource, u64);

impl Source for Instant {
    fn identity(&self) -> Identity {
        Identity { volume: Uuid::from_u128(1), generation: 2, cut: self.1, ..self.0.identity() }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

/// Block 1 changed before cut 2, blocks 1 and 2 before cut 3.
const CUTS: [[u8; BLOCKS]; 4] = [
    [0; BLOCKS],
    [10, 11, 12, 13, 14, 15, 16, 17],
    [10, 21, 12, 13, 14, 15, 16, 17],
    [10, 31, 32, 13, 14, 15, 16, 17],
];

fn bytes_at(cut: usize) -> Vec<u8> {
    CUTS[cut].iter().flat_map(|value| [*value; BLOCK]).collect()
}

fn blocks(start: usize, end: usize) -> ByteRange {
    ByteRange::new((start * BLOCK) as u64, ((end - start) * BLOCK) as u64)
}

fn bundle(cut: usize, base: Option<BaseCut>, selection: &[ByteRange]) -> Bundle {
    let image = Arc::new(RamDevice::from_bytes(bytes_at(cut)));
    let source = Instant(ImageSource::new(image, BlockSize::DEFAULT).expect("sized"), cut as u64);
    let folder = RamFolder::new();
    let options = WriterOptions {
        selection: selection.to_vec(),
        base,
        threads: 1,
        ..WriterOptions::default()
    };
    BundleWriter::create_in(&folder, &source, &options, &mut |_| ControlFlow::Continue(()))
        .expect("made");
    Bundle::open_in(Arc::new(folder)).expect("whole")
}

fn full(cut: usize) -> Bundle {
    bundle(cut, None, &[])
}

fn since(cut: usize, base: usize, selection: &[ByteRange]) -> Bundle {
    let base = BaseCut { generation: 2, cut: base as u64, scope: None };
    bundle(cut, Some(base), selection)
}

/// From cut 2 to 3, and from 1 to 2.
fn incrementals() -> [Bundle; 2] {
    [since(3, 2, &[blocks(1, 3)]), since(2, 1, &[blocks(1, 2)])]
}

fn target() -> (Arc<RamDevice>, OfflineTarget) {
    let geometry = Geometry::new((BLOCK * BLOCKS) as u64, BlockSize::DEFAULT).expect("valid");
    let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
    let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
    let map = OverwriteMap::create(map, identity).expect("created");
    let device = Arc::new(RamDevice::from_bytes(vec![0xee; BLOCK * BLOCKS]));
    let dyn_device = Arc::clone(&device) as Arc<dyn Device>;
    (device, OfflineTarget::new(dyn_device, Arc::new(map)).expect("large enough"))
}

fn merge(bundle: &Bundle, target: &OfflineTarget) -> Result<MergeReport> {
    run(bundle, target, &MergeOptions::default(), &mut |_| ControlFlow::Continue(()))
}

#[test]
fn newest_first_gives_the_newest_cut() {
    let (device, target) = target();
    let [third, second] = incrementals();
    for bundle in [&third, &second, &full(1)] {
        merge(bundle, &target).expect("in order");
    }
    assert!(device.contents() == bytes_at(3));
    for again in [&second, &third, &full(2)] {
        assert_eq!(merge(again, &target).expect("nothing is missing").bytes_written, 0);
    }
}

#[test]
fn any_other_order_is_refused_before_the_first_byte_and_says_the_right_one() {
    let [third, second] = incrementals();
    let first = full(1);
    let orders: [&[&Bundle]; 4] =
        [&[&first, &second], &[&second, &third], &[&third, &first], &[&first, &third]];
    for order in orders {
        let (device, target) = target();
        merge(order[0], &target).expect("the first");
        let before = device.contents();
        let refused = merge(order[1], &target).expect_err("a mixture");
        assert_eq!(refused.kind(), ErrorKind::Identity);
        assert!(refused.to_string().contains("newest"), "{refused}");
        assert!(device.contents() == before);
        let (device, fresh) = self::target();
        let refused = together(order, &fresh).expect_err("known before the first byte");
        assert_eq!(refused.kind(), ErrorKind::Identity);
        assert!(device.contents().iter().all(|byte| *byte == 0xee));
        assert!(fresh.identity().volume.is_nil(), "and nothing is bound");
    }
}

/// Merged in one go, each on a disk of its own.
fn together(bundles: &[&Bundle], target: &OfflineTarget) -> Result<MergeReport> {
    let mut strands: Vec<Strand<'_>> = Vec::new();
    for (lane, source) in bundles.iter().enumerate() {
        strands.push(Strand { source: *source, target, lane });
    }
    run_all(&strands, &MergeOptions::default(), &mut |_| ControlFlow::Continue(()))
}

#[test]
fn cuts_that_are_merged_in_one_go_keep_their_order() {
    let (device, target) = target();
    let halves = [since(3, 2, &[blocks(1, 3)]), since(3, 2, &[blocks(1, 3)])];
    let [_, second] = incrementals();
    let all = [&halves[0], &halves[1], &second, &full(1)];
    let report = together(&all, &target).expect("newest first");
    assert!(report.sources.iter().all(|one| one.error.is_none()), "{report:?}");
    assert!(device.contents() == bytes_at(3));
    assert_eq!(target.map().missing_bytes(), 0);
    assert_eq!(report.side_by_side, 2, "the media of one cut");
}

#[test]
fn an_older_cut_is_refused_when_its_turn_comes_if_something_of_the_newer_one_is_missing() {
    let (device, target) = target();
    let [third, second] = incrementals();
    let folder = RamFolder::new();
    for name in ["manifest.json", "manifest.begin.json"] {
        folder.replace(name, contents_of(&third, name));
    }
    let mut bytes = contents_of(&third, "seg-00000000.drs");
    // In the payload, which follows header and descriptor page.
    bytes[2 * 4096 + 1] ^= 1;
    folder.replace("seg-00000000.drs", bytes);
    let damaged = Bundle::open_in(Arc::new(folder)).expect("damaged where it is not looked at");
    let report = together(&[&damaged, &second, &full(1)], &target).expect("the first is merged");
    assert_eq!(report.chunks_damaged, 1);
    for refused in &report.sources[1..] {
        let error = refused.error.as_ref().expect("a mixture");
        assert_eq!(error.kind(), ErrorKind::Identity);
        assert_eq!(refused.bytes_done, 0);
    }
    assert!(device.contents().iter().all(|byte| *byte == 0xee), "no block of an earlier cut");
}

fn contents_of(bundle: &Bundle, name: &str) -> Vec<u8> {
    let file = bundle.folder().open(name).expect("there");
    let mut bytes = vec![0; file.length().expect("known") as usize];
    file.read_at(0, &mut bytes).expect("read");
    bytes
}

#[test]
fn an_older_bundle_waits_until_nothing_of_the_newer_one_is_missing() {
    let (device, target) = target();
    // As if the medium with block 2 were not there yet.
    let part = since(3, 2, &[blocks(1, 2)]);
    let mut lineage = MergeSource::lineage(&part).expect("incremental");
    lineage.selection = vec![blocks(1, 3)];
    merge(&full_of_nothing(), &target).expect("binds");
    target.descend(&lineage).expect("looked at");
    let [third, second] = incrementals();
    assert!(merge(&second, &target).is_err(), "block 2 is missing");
    merge(&third, &target).expect("all of it");
    merge(&second, &target).expect("now");
    merge(&full(1), &target).expect("at last");
    assert!(device.contents() == bytes_at(3));
}

/// An incremental bundle in which nothing changed, of cut 3.
fn full_of_nothing() -> Bundle {
    since(3, 3, &[])
}

#[test]
fn a_narrowed_incremental_bundle_lets_earlier_cuts_supply_only_what_it_looked_at() {
    let (device, target) = target();
    let scope = Some(vec![Run::from(blocks(0, 2))]);
    let base = BaseCut { generation: 2, cut: 1, scope };
    merge(&bundle(3, Some(base), &[blocks(1, 2)]), &target).expect("first");
    let report = merge(&full(1), &target).expect("of the scope");
    assert_eq!((report.bytes_written, report.bytes_in_doubt), (BLOCK as u64, 6 * BLOCK as u64));
    let mut expected = vec![0xee; BLOCK * BLOCKS];
    expected[..2 * BLOCK].copy_from_slice(&bytes_at(3)[..2 * BLOCK]);
    assert!(device.contents() == expected);
}

#[test]
fn a_plain_image_is_refused_by_a_replica() {
    let (_, target) = target();
    merge(&full(1), &target).expect("bound");
    let image = Arc::new(RamDevice::from_bytes(bytes_at(3)));
    let image = ImagePieces::new(image).expect("sized");
    let refused =
        run(&image, &target, &MergeOptions::default(), &mut |_| ControlFlow::Continue(()));
    assert_eq!(refused.expect_err("of which cut?").kind(), ErrorKind::Identity);
}

#[test]
fn the_span_of_a_replica_survives_in_its_map() {
    let (_, target) = target();
    let [third, _] = incrementals();
    merge(&third, &target).expect("first");
    let cut = |sequence| Cut { generation: 2, sequence };
    assert_eq!(target.map().file().span(), Some(CutSpan { oldest: cut(2), newest: cut(3) }));
}
