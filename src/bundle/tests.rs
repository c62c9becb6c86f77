//! The room as a whole: what goes into a bundle comes out of it, and damage is never taken for it.

#![expect(clippy::disallowed_methods, reason = "tests look at files and run recover.py")]

use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use uuid::Uuid;

use super::*;
use crate::device::{Device, Engine, FileFolder, Folder, RamDevice, RamFolder};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::PAGE_BYTES;
use crate::units::{BlockSize, Geometry};

pub(super) const SIZE: usize = (6 << 20) + 4096 + 512;

/// Bytes that do not compress, the same every time.
fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Noise, text, written zeros, a hole, and an odd tail.
pub(super) fn image() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    bytes[..1 << 20].copy_from_slice(&noise(1 << 20, 1));
    let text = b"the quick brown fox ".repeat(80_000);
    bytes[(1 << 20) + 8192..][..text.len()].copy_from_slice(&text);
    bytes[4 << 20..][..700_000].copy_from_slice(&noise(700_000, 2));
    bytes[SIZE - 512..].copy_from_slice(&noise(512, 3));
    bytes
}

pub(super) fn source_of(bytes: Vec<u8>) -> ImageSource {
    ImageSource::new(Arc::new(RamDevice::from_bytes(bytes)), BlockSize::DEFAULT).expect("an image")
}

pub(super) fn options() -> WriterOptions {
    WriterOptions {
        bundle: Uuid::from_u128(0xb0),
        segment_bytes_max: 2 << 20,
        threads: 2,
        ..WriterOptions::default()
    }
}

fn make(source: &dyn Source, options: &WriterOptions) -> (RamFolder, BundleReport) {
    let folder = RamFolder::new();
    let report = BundleWriter::create_in(&folder, source, options, &mut |_| go_on()).expect("made");
    (folder, report)
}

pub(super) fn go_on() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn open(folder: &RamFolder) -> Result<Bundle> {
    Bundle::open_in(Arc::new(folder.clone()))
}

pub(super) const CREW: Crew = Crew { engine: Engine::Threads, threads: 2, at_once: true };

/// Lays every verified piece over a ground of 0xee; what no piece gave stays that.
struct Collect(RamDevice);

impl Consumer for Collect {
    type Claim = ();
    type Note = ();

    fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
        vec![range]
    }

    fn begin(&self, range: ByteRange, opened: Opened<'_>) -> Result<Begun<(), ()>> {
        match opened {
            Opened::Zero => self.0.zero_at(range.offset, range.length),
            Opened::Bytes(bytes) => self.0.write_at(range.offset, bytes),
        }?;
        Ok(Begun::Done(()))
    }

    fn end(&self, (): (), result: Result<()>) -> Result<()> {
        result
    }
}

/// What the pieces of a source lay over that ground, and how many were damaged.
pub(super) fn restored(source: &dyn PieceSource) -> (Vec<u8>, usize) {
    let ground = vec![0xee; usize::try_from(source.identity().geometry.size()).expect("small")];
    let collect = Collect(RamDevice::from_bytes(ground));
    let mut damaged = 0;
    run(source, &collect, CREW, |events| {
        damaged += events.iter().filter(|one| matches!(one.outcome, Outcome::Damaged(_))).count();
        Ok(go_on())
    })
    .expect("gone through");
    (collect.0.contents(), damaged)
}

pub(super) fn verified(bundle: &Bundle) -> VerifyReport {
    bundle.verify(CREW, &mut |_| go_on()).expect("gone through")
}

#[test]
fn what_goes_in_comes_out_compressed_or_not() {
    for compression in [Compression::None, Compression::Auto, Compression::Zstd(5)] {
        let (folder, report) =
            make(&source_of(image()), &WriterOptions { compression, ..options() });
        assert_eq!(report.bytes_data + report.bytes_zero, SIZE as u64);
        assert!(report.bytes_zero > 2 << 20, "{report:?}");
        let raw = compression == Compression::None;
        assert_eq!((raw, raw), (report.bytes_stored == report.bytes_data, report.segments > 1));
        let bundle = open(&folder).expect("whole");
        assert_eq!(restored(&bundle), (image(), 0));
        let found = verified(&bundle);
        assert!(found.is_whole(), "{found:?}");
        assert_eq!((found.bytes, found.damaged), (SIZE as u64, vec![]));
    }
}

#[test]
fn only_what_is_selected_comes_out_and_the_rest_is_not_zero() {
    let selection =
        vec![ByteRange::new((6 << 20) + 4096, 512), ByteRange::new(4096, (4 << 20) + 4096)];
    let (folder, report) = make(&source_of(image()), &WriterOptions { selection, ..options() });
    assert_eq!(report.bytes_selected, (4 << 20) + 4096 + 512);
    let bundle = open(&folder).expect("whole");
    let mut expected = vec![0xee; SIZE];
    for ByteRange { offset, length } in bundle.selection() {
        let run = offset as usize..(offset + length) as usize;
        expected[run.clone()].copy_from_slice(&image()[run]);
    }
    assert_eq!(restored(&bundle), (expected, 0));
}

/// A source some of whose blocks cannot be read.
#[derive(Debug)]
struct Failing(ImageSource, ByteRange, ErrorKind);

impl Source for Failing {
    fn identity(&self) -> Identity {
        self.0.identity()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if self.1.intersect(ByteRange::new(offset, buffer.len() as u64)).is_some() {
            return Err(Error::new(self.2, "injected"));
        }
        self.0.read_at(offset, buffer)
    }
}

#[test]
fn what_the_source_cannot_read_is_said_to_be_missing() {
    let bad = ByteRange::new(40_960, 8192);
    let source = Failing(source_of(image()), bad, ErrorKind::Device);
    let (folder, report) = make(&source, &options());
    assert_eq!((report.unreadable, report.bytes_unreadable), (vec![bad], 8192));
    let bundle = open(&folder).expect("whole");
    let (bytes, damaged) = restored(&bundle);
    assert_eq!(damaged, 1);
    let mut expected = image();
    expected[40_960..49_152].fill(0xee);
    assert!(bytes == expected, "only the unreadable blocks are left out");
    assert_eq!(verified(&bundle).damaged, [bad]);
}

#[test]
fn a_source_that_breaks_ends_the_bundle() {
    let source = Failing(source_of(image()), ByteRange::new(4 << 20, 512), ErrorKind::Integrity);
    let folder = RamFolder::new();
    let error = BundleWriter::create_in(&folder, &source, &options(), &mut |_| go_on());
    assert_eq!(error.expect_err("broken").kind(), ErrorKind::Integrity);
    let error = open(&folder).expect_err("unfinished");
    assert!(error.to_string().contains("unfinished"), "{error}");
}

#[test]
fn a_bundle_that_was_stopped_is_named_unfinished() {
    let folder = RamFolder::new();
    let stopped = BundleWriter::create_in(&folder, &source_of(image()), &options(), &mut |seen| {
        assert_eq!(seen.bytes_total, SIZE as u64);
        ControlFlow::Break(())
    });
    assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Interrupted);
    let error = open(&folder).expect_err("unfinished");
    assert_eq!(error.kind(), ErrorKind::Format);
    assert!(error.to_string().contains("unfinished"), "{error}");
}

#[test]
fn a_folder_with_files_is_refused_and_left_alone() {
    let place = tempfile::tempdir().expect("a place");
    std::fs::write(place.path().join("mine"), "x").expect("written");
    let source = source_of(image());
    let refused = BundleWriter::create(place.path(), &source, &options(), &mut |_| go_on());
    assert_eq!(refused.expect_err("not empty").kind(), ErrorKind::Usage);
    assert_eq!(std::fs::read_dir(place.path()).expect("listed").count(), 1);
}

#[test]
fn a_bundle_that_fails_or_is_stopped_leaves_nothing_behind() {
    let place = tempfile::tempdir().expect("a place");
    let directory = place.path().join("bundle");
    let broken = Failing(source_of(image()), ByteRange::new(4 << 20, 512), ErrorKind::Integrity);
    let failed = BundleWriter::create(&directory, &broken, &options(), &mut |_| go_on());
    assert_eq!(failed.expect_err("broken").kind(), ErrorKind::Integrity);
    let stop = &mut |_: &BundleProgress| ControlFlow::Break(());
    let stopped = BundleWriter::create(&directory, &source_of(image()), &options(), stop);
    assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Interrupted);
    assert!(!directory.exists());
}

#[test]
fn impossible_options_are_refused_before_anything_is_made() {
    let place = tempfile::tempdir().expect("a place");
    let bad = [
        WriterOptions { segment_bytes_max: 4096, ..options() },
        WriterOptions { threads: 0, ..options() },
        WriterOptions { selection: vec![ByteRange::new(0, 512)], ..options() },
    ];
    for options in bad {
        let path = place.path().join("new");
        let refused = BundleWriter::create(&path, &source_of(image()), &options, &mut |_| go_on());
        assert_eq!(refused.expect_err("refused").kind(), ErrorKind::Usage);
        assert!(!path.exists());
    }
}

const SEGMENT: &str = "seg-00000001.drs";

pub(super) fn with_changed(
    folder: &RamFolder,
    name: &str,
    change: impl FnOnce(&mut Vec<u8>),
) -> RamFolder {
    let copy = RamFolder::new();
    for held in folder.names().expect("listed") {
        copy.replace(&held, folder.contents(&held).expect("there"));
    }
    let mut bytes = copy.contents(name).expect("there");
    change(&mut bytes);
    copy.replace(name, bytes);
    copy
}

/// Every byte that came out is right or was left out.
pub(super) fn assert_nothing_wrong(bundle: &Bundle, what: &str) {
    let (bytes, damaged) = restored(bundle);
    let wrong = bytes.iter().zip(image()).any(|(got, right)| *got != right && *got != 0xee);
    assert!(!wrong, "{what}: wrong bytes came out");
    let missing = bytes.iter().zip(image()).any(|(got, right)| *got != right);
    assert!(!missing || damaged > 0, "{what}: bytes are missing and nothing is said of it");
}

#[test]
fn a_segment_cut_off_anywhere_is_refused() {
    let (folder, _) = make(&source_of(image()), &options());
    let length = folder.contents(SEGMENT).expect("there").len();
    for at in (0..length).step_by(PAGE_BYTES) {
        let cut = with_changed(&folder, SEGMENT, |bytes| bytes.truncate(at));
        assert_eq!(open(&cut).expect_err("cut off").kind(), ErrorKind::Integrity, "{at}");
    }
    let longer = with_changed(&folder, SEGMENT, |bytes| bytes.push(0));
    assert!(open(&longer).is_err());
}

#[test]
fn a_damaged_byte_in_any_page_of_a_segment_is_noticed_and_never_comes_out() {
    let (folder, _) = make(&source_of(image()), &options());
    let length = folder.contents(SEGMENT).expect("there").len();
    let pages = length / PAGE_BYTES;
    for page in (0..pages).filter(|page| *page < 3 || page + 3 > pages || page % 37 == 0) {
        // Another place in each page: heads, descriptors, hashes, padding and payload.
        let at = page * PAGE_BYTES + page * 37 % PAGE_BYTES;
        let bad = with_changed(&folder, SEGMENT, |bytes| bytes[at] ^= 1 << (page % 8));
        let Ok(bundle) = open(&bad) else { continue };
        let found = verified(&bundle);
        assert!(!found.is_whole(), "byte {at}: not noticed");
        assert_nothing_wrong(&bundle, &format!("byte {at}"));
    }
}

#[test]
fn every_bit_of_a_descriptor_is_noticed_and_costs_only_its_batch() {
    let (folder, _) = make(&source_of(image()), &options());
    for bit in (0..128 * 8).step_by(29) {
        let bad = with_changed(&folder, SEGMENT, |bytes| {
            bytes[PAGE_BYTES + bit / 8] ^= 1 << (bit % 8);
        });
        let bundle = open(&bad).expect("segments are there");
        let found = verified(&bundle);
        assert!(found.chunks_damaged > 0 && found.chunks > 0, "bit {bit}: {found:?}");
    }
}

#[test]
fn without_its_index_a_segment_is_scanned() {
    let (folder, _) = make(&source_of(image()), &options());
    for back in [1, 2] {
        let bad = with_changed(&folder, SEGMENT, |bytes| {
            let at = bytes.len() - back * PAGE_BYTES;
            bytes[at] ^= 1;
        });
        let bundle = open(&bad).expect("segments are there");
        assert_eq!(restored(&bundle), (image(), 0));
        assert_eq!(verified(&bundle).blemishes.len(), 1);
    }
}

#[test]
fn a_segment_of_another_bundle_or_place_is_refused() {
    let (folder, _) = make(&source_of(image()), &options());
    let other = WriterOptions { bundle: Uuid::from_u128(0xb1), ..options() };
    let (foreign, _) = make(&source_of(image()), &other);
    let swapped = with_changed(&folder, SEGMENT, |bytes| {
        *bytes = foreign.contents(SEGMENT).expect("there");
    });
    assert_eq!(open(&swapped).expect_err("foreign").kind(), ErrorKind::Identity);
    let first = folder.contents("seg-00000000.drs").expect("there");
    let second = folder.contents(SEGMENT).expect("there");
    if first.len() == second.len() {
        let moved = with_changed(&folder, SEGMENT, |bytes| *bytes = first);
        assert_eq!(open(&moved).expect_err("moved").kind(), ErrorKind::Identity);
    }
    folder.remove(SEGMENT);
    let error = open(&folder).expect_err("lost");
    assert!(error.to_string().contains(SEGMENT), "{error}");
}

#[test]
fn a_changed_manifest_is_refused() {
    let (folder, _) = make(&source_of(image()), &options());
    let length = folder.contents("manifest.json").expect("there").len();
    for at in (0..length).step_by(23) {
        let bad = with_changed(&folder, "manifest.json", |bytes| bytes[at] ^= 0x01);
        assert!(open(&bad).is_err(), "byte {at}");
        let cut = with_changed(&folder, "manifest.json", |bytes| bytes.truncate(at));
        assert!(open(&cut).is_err(), "{at} bytes");
    }
    let bad = with_changed(&folder, "manifest.begin.json", |bytes| bytes[9] ^= 1);
    assert_eq!(verified(&open(&bad).expect("whole")).blemishes.len(), 1);
}

fn recover(bundle: &Path, out: Option<&Path>) -> (i32, String) {
    let mut command = Command::new("python3");
    command.arg("-I").arg(bundle.join("recover.py")).arg(bundle);
    command.args(out);
    let done = command.output().expect("python3 runs");
    let said = [done.stdout, done.stderr].concat();
    (done.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn recover_py_restores_the_same_bytes_without_us() {
    let place = tempfile::tempdir().expect("a place");
    for (name, compression) in [("plain", Compression::None), ("packed", Compression::Auto)] {
        let directory = place.path().join(name);
        let options = WriterOptions { compression, ..options() };
        BundleWriter::create(&directory, &source_of(image()), &options, &mut |_| go_on())
            .expect("made");
        let out = place.path().join(format!("{name}.img"));
        let (code, said) = recover(&directory, Some(&out));
        assert_eq!(code, 0, "{said}");
        assert!(std::fs::read(&out).expect("read") == image(), "{name} differs");
        let (code, said) = recover(&directory, Some(&out));
        assert_ne!(code, 0, "an existing file is not overwritten: {said}");
    }
}

#[test]
fn recover_py_finds_the_damage_that_we_find() {
    let place = tempfile::tempdir().expect("a place");
    let (folder, _) = make(&source_of(image()), &options());
    let length = folder.contents(SEGMENT).expect("there").len();
    let payload = length / 2;
    let places = [PAGE_BYTES + 70, payload, payload + 4097];
    for (number, at) in places.into_iter().enumerate() {
        let bad = with_changed(&folder, SEGMENT, |bytes| bytes[at] ^= 4);
        let found = verified(&open(&bad).expect("segments are there"));
        let directory = place.path().join(number.to_string());
        let held = FileFolder::create(&directory).expect("made");
        for name in bad.names().expect("listed") {
            let file = held.create(&name).expect("new");
            file.write_at(0, &bad.contents(&name).expect("there")).expect("written");
        }
        let (code, said) = recover(&directory, None);
        assert_eq!(code, 3, "{said}");
        let first = found.damaged.first().expect("damaged").offset;
        assert!(said.contains(&format!("damaged: bytes {first} to")), "byte {at}: {said}");
    }
}

#[test]
fn a_source_bound_to_a_volume_gives_a_bound_bundle() {
    #[derive(Debug)]
    struct Bound(ImageSource);
    impl Source for Bound {
        fn identity(&self) -> Identity {
            Identity { volume: Uuid::from_u128(5), generation: 6, cut: 7, ..self.0.identity() }
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            self.0.read_at(offset, buffer)
        }
    }
    let (folder, _) = make(&Bound(source_of(image())), &options());
    let identity = open(&folder).expect("whole").identity();
    let geometry = Geometry::new(SIZE as u64, BlockSize::DEFAULT).expect("valid");
    let expected = Identity { volume: Uuid::from_u128(5), geometry, generation: 6, cut: 7 };
    assert_eq!(identity, expected);
}
