//! Signed bundles: given that the manifest is genuine, whatever else was changed on the medium is
//! found, and none of it comes out.

use std::sync::Arc;

use super::tests::{
    CREW, SIZE, assert_nothing_wrong, go_on, image, options, restored, source_of, with_changed,
};
use super::*;
use crate::device::{Folder, RamFolder};
use crate::error::{ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::PAGE_BYTES;

const SEGMENT: &str = "seg-00000001.drs";

fn made(bytes: Vec<u8>) -> RamFolder {
    let folder = RamFolder::new();
    BundleWriter::create_in(&folder, &source_of(bytes), &options(), &mut |_| go_on())
        .expect("made");
    folder
}

/// As after its signature was checked, the medium being `now` when it is opened.
fn signed(genuine: &RamFolder, now: &RamFolder) -> Result<Bundle> {
    let manifest = genuine.contents("manifest.json").expect("there");
    let trust = Trust { key: None, manifest: Some(Trust::hash_of(&manifest)) };
    Bundle::open_in_trusting(Arc::new(now.clone()), trust)
}

#[test]
fn a_signed_bundle_gives_all_its_bytes() {
    let folder = made(image());
    let bundle = signed(&folder, &folder).expect("genuine");
    assert_eq!(restored(&bundle), (image(), 0));
    assert!(bundle.verify(CREW, &mut |_| go_on()).expect("gone through").is_whole());
}

#[test]
fn another_manifest_than_the_signed_one_is_refused() {
    let (folder, other) = (made(image()), made(vec![1; SIZE]));
    assert_eq!(signed(&folder, &other).expect_err("another").kind(), ErrorKind::Integrity);
}

#[test]
fn a_forged_segment_with_every_checksum_right_is_believed_by_nobody_who_asks_for_a_signature() {
    let folder = made(image());
    let mut changed = image();
    changed[4 << 20] ^= 1;
    let forged = made(changed);
    for name in folder.names().expect("listed").iter().filter(|name| name.starts_with("seg-")) {
        let theirs = forged.contents(name).expect("as many segments");
        let same = theirs == folder.contents(name).expect("there");
        let medium = with_changed(&folder, name, |held| *held = theirs);
        let bundle = signed(&folder, &medium).expect("its manifest is genuine");
        let found = bundle.verify(CREW, &mut |_| go_on()).expect("gone through");
        assert_eq!(found.is_whole(), same, "{name}");
        assert_nothing_wrong(&bundle, name);
    }
}

#[test]
fn every_changed_byte_of_a_segment_is_found() {
    let folder = made(image());
    let length = folder.contents(SEGMENT).expect("there").len();
    let pages = length / PAGE_BYTES;
    let ends = [0, 1, 2, pages - 3, pages - 2, pages - 1];
    let places = ends.into_iter().chain((3..pages - 3).step_by(61));
    for at in places.flat_map(|page| [0, 77, 4095].map(|at| page * PAGE_BYTES + at)) {
        let medium = with_changed(&folder, SEGMENT, |held| held[at] ^= 0x20);
        let Ok(bundle) = signed(&folder, &medium) else { continue };
        let found = bundle.verify(CREW, &mut |_| go_on()).expect("gone through");
        assert!(!found.is_whole(), "byte {at} was changed and nobody noticed");
        assert_nothing_wrong(&bundle, &format!("byte {at}"));
    }
}

#[test]
fn what_is_read_at_random_of_a_signed_bundle_was_signed() {
    let folder = made(image());
    let mut changed = image();
    changed[(2 << 20) + 5] ^= 1;
    let theirs = made(changed).contents(SEGMENT).expect("as many segments");
    let medium = with_changed(&folder, SEGMENT, |held| *held = theirs);
    let genuine =
        RandomReader::new(signed(&folder, &folder).expect("genuine")).expect("no overlap");
    let forged = RandomReader::new(signed(&folder, &medium).expect("genuine")).expect("no overlap");
    let mut refused = 0;
    for offset in (0..SIZE as u64).step_by(64 << 10) {
        let range = ByteRange::new(offset, (64 << 10).min(SIZE as u64 - offset));
        let expected = &image()[offset as usize..range.end() as usize];
        assert!(&genuine.read(range).expect("genuine")[..] == expected);
        match forged.read(range) {
            Ok(bytes) => assert!(&bytes[..] == expected, "at {offset}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Integrity);
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "the forged segment holds something");
    // One that was exchanged after it was looked at.
    let swapped =
        RandomReader::new(signed(&folder, &folder).expect("genuine")).expect("no overlap");
    swapped.read(ByteRange::new(0, 512)).expect("genuine");
    for name in folder.names().expect("listed").iter().filter(|name| name.starts_with("seg-")) {
        folder.replace(name, medium.contents(name).expect("there"));
    }
    for offset in (0..SIZE as u64).step_by(64 << 10) {
        let range = ByteRange::new(offset, 512);
        if let Ok(bytes) = swapped.read(range) {
            assert!(bytes[..] == image()[offset as usize..][..512], "at {offset}");
        }
    }
}
