//! Encrypted bundles: what goes in comes out with the key and only with it, and whoever has the
//! medium but not the key can change nothing unnoticed.

use std::ops::ControlFlow;
use std::sync::Arc;

use uuid::Uuid;

use super::tests::{
    CREW, SIZE, assert_nothing_wrong, go_on, image, options, restored, source_of, verified,
    with_changed,
};
use super::*;
use crate::device::{Folder, RamFolder};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bundle::{BundleKey, Manifest, PAGE_BYTES};

const SEGMENT: &str = "seg-00000001.drs";
const MANIFEST: &str = "manifest.json";

fn key_of(bundle: u128, byte: u8) -> BundleKey {
    BundleKey::new(Uuid::from_u128(bundle), [byte; 32])
}

fn key() -> BundleKey {
    key_of(0xb0, 1)
}

fn encryption(key: BundleKey) -> Option<Encryption> {
    Some(Encryption { key, wrapped_key: b"wrapped".to_vec(), salts: random_salt })
}

fn encrypted(more: WriterOptions) -> RamFolder {
    let folder = RamFolder::new();
    let options = WriterOptions { encryption: encryption(key()), ..more };
    BundleWriter::create_in(&folder, &source_of(image()), &options, &mut |_| go_on())
        .expect("made");
    folder
}

fn open_with(folder: &RamFolder, key: Option<&BundleKey>) -> Result<Bundle> {
    Bundle::open_in_with(Arc::new(folder.clone()), key)
}

fn opened(folder: &RamFolder) -> Bundle {
    open_with(folder, Some(&key())).expect("whole")
}

fn refusal(folder: &RamFolder) -> Error {
    open_with(folder, Some(&key())).expect_err("refused")
}

#[test]
fn what_goes_in_comes_out_with_the_key_compressed_or_not() {
    for compression in [Compression::None, Compression::Zstd(1)] {
        let folder = encrypted(WriterOptions { compression, ..options() });
        let bundle = opened(&folder);
        assert_eq!(restored(&bundle), (image(), 0));
        let found = verified(&bundle);
        assert!(found.is_whole(), "{found:?}");
        assert_eq!(found.bytes, SIZE as u64);
        assert_eq!(folder.contents("key.age").expect("there"), b"wrapped");
    }
}

#[test]
fn nothing_of_the_image_or_the_key_stands_on_the_medium() {
    let folder = encrypted(options());
    let (image, key) = (image(), key().text());
    for name in folder.names().expect("listed") {
        let bytes = folder.contents(&name).expect("there");
        for at in [0, 5 << 10, 4 << 20, SIZE - 512] {
            let there = memchr(&bytes, &image[at..at + 64]);
            assert!(!there, "{name} has bytes of the image");
        }
        assert!(!memchr(&bytes, b"quick brown fox"), "{name} has text of the image");
        assert!(!memchr(&bytes, &[1; 32]) && !memchr(&bytes, &key.as_bytes()[62..126]), "{name}");
    }
}

fn memchr(bytes: &[u8], sought: &[u8]) -> bool {
    bytes.windows(sought.len()).any(|window| window == sought)
}

#[test]
fn without_the_key_or_with_another_it_is_refused_at_once() {
    let folder = encrypted(options());
    for key in [None, Some(key_of(0xb0, 2)), Some(key_of(0xb1, 1))] {
        let error = open_with(&folder, key.as_ref()).expect_err("locked");
        assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    }
    let folder = RamFolder::new();
    BundleWriter::create_in(&folder, &source_of(image()), &options(), &mut |_| go_on())
        .expect("made");
    let error = refusal(&folder);
    assert!(error.kind() == ErrorKind::Locked && error.to_string().contains("exchanged"));
}

#[test]
fn a_key_of_another_bundle_makes_no_bundle() {
    let options = WriterOptions { encryption: encryption(key_of(0xb1, 1)), ..options() };
    let folder = RamFolder::new();
    let refused = BundleWriter::create_in(&folder, &source_of(image()), &options, &mut |_| go_on());
    assert_eq!(refused.expect_err("refused").kind(), ErrorKind::Usage);
    assert!(folder.names().expect("listed").is_empty());
}

#[test]
fn a_damaged_byte_in_any_page_is_noticed_and_never_comes_out() {
    let folder = encrypted(options());
    let pages = folder.contents(SEGMENT).expect("there").len() / PAGE_BYTES;
    for page in (0..pages).filter(|page| *page < 3 || page + 3 > pages || page % 41 == 0) {
        let at = page * PAGE_BYTES + page * 37 % PAGE_BYTES;
        let bad = with_changed(&folder, SEGMENT, |bytes| bytes[at] ^= 1 << (page % 8));
        let Ok(bundle) = open_with(&bad, Some(&key())) else { continue };
        assert!(!verified(&bundle).is_whole(), "byte {at}: not noticed");
        assert_nothing_wrong(&bundle, &format!("byte {at}"));
    }
}

/// Puts right CRC32C and length of what somebody without the key changed in a descriptor page.
fn reseal_crc(page: &mut [u8]) {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&page[..28]), &page[64..]);
    page[28..32].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_chunk_changed_together_with_all_its_unkeyed_checksums_stays_out() {
    let folder = encrypted(options());
    let bad = with_changed(&folder, SEGMENT, |bytes| {
        let payload = PAGE_BYTES * 2;
        bytes[payload] ^= 1;
        let page = &bytes[PAGE_BYTES..2 * PAGE_BYTES];
        let stored = u32::from_le_bytes(page[64 + 20..64 + 24].try_into().expect("4")) as usize;
        let crc = crc32c::crc32c(&bytes[payload..payload + stored]);
        let page = &mut bytes[PAGE_BYTES..2 * PAGE_BYTES];
        page[64 + 28..64 + 32].copy_from_slice(&crc.to_le_bytes());
        reseal_crc(page);
    });
    let bundle = opened(&bad);
    assert!(verified(&bundle).chunks_damaged > 0);
    assert_nothing_wrong(&bundle, "a chunk");
}

#[test]
fn two_chunks_exchanged_within_a_segment_stay_out() {
    let folder = encrypted(WriterOptions { segment_bytes_max: 8 << 20, ..options() });
    let segment = "seg-00000000.drs";
    let bad = with_changed(&folder, segment, |bytes| {
        // The first two stored chunks are each in 4096-byte pages of noise: exchange two pages.
        let (first, second) = (2 * PAGE_BYTES, 3 * PAGE_BYTES);
        for at in 0..PAGE_BYTES {
            bytes.swap(first + at, second + at);
        }
    });
    let bundle = opened(&bad);
    assert!(verified(&bundle).chunks_damaged > 0);
    assert_nothing_wrong(&bundle, "exchanged");
}

#[test]
fn segments_of_another_bundle_key_generation_or_number_are_refused_or_stay_out() {
    let folder = encrypted(options());
    let other_bundle = {
        let made = RamFolder::new();
        let bundle = Uuid::from_u128(0xb1);
        let options =
            WriterOptions { encryption: encryption(key_of(0xb1, 1)), bundle, ..options() };
        BundleWriter::create_in(&made, &source_of(image()), &options, &mut |_| go_on())
            .expect("made");
        made
    };
    let again = encrypted(options());
    for foreign in [&other_bundle, &again] {
        let bytes = foreign.contents(SEGMENT).expect("there");
        let swapped = with_changed(&folder, SEGMENT, |held| *held = bytes);
        assert!(matches!(refusal(&swapped).kind(), ErrorKind::Identity | ErrorKind::Integrity));
    }
    // Written twice with one key, yet nothing of one can stand in the other.
    let theirs = again.contents(SEGMENT).expect("there");
    let spliced = with_changed(&folder, SEGMENT, |held| {
        held[PAGE_BYTES..].copy_from_slice(&theirs[PAGE_BYTES..])
    });
    let bundle = opened(&spliced);
    let found = verified(&bundle);
    assert!(found.chunks_damaged > 0 && !found.blemishes.is_empty());
    assert_nothing_wrong(&bundle, "spliced");
}

#[test]
fn the_same_segment_made_twice_repeats_no_salt_and_no_bytes() {
    let (one, two) = (encrypted(options()), encrypted(options()));
    let (one, two) = (one.contents(SEGMENT), two.contents(SEGMENT));
    let (one, two) = (one.expect("there"), two.expect("there"));
    assert_ne!(one[128..160], two[128..160]);
    assert_ne!(one[2 * PAGE_BYTES..3 * PAGE_BYTES], two[2 * PAGE_BYTES..3 * PAGE_BYTES]);
}

/// Changes the manifest and puts its unkeyed checksum right.
fn with_manifest(folder: &RamFolder, change: impl FnOnce(&mut Manifest)) -> RamFolder {
    with_changed(folder, MANIFEST, |bytes| {
        let mut manifest = Manifest::parse(bytes).expect("whole");
        change(&mut manifest);
        let forger = manifest.begin.is_encrypted().then(|| key_of(0xb0, 9));
        *bytes = manifest.encode(forger.as_ref());
    })
}

#[test]
fn a_manifest_changed_by_somebody_without_the_key_is_refused() {
    let folder = encrypted(options());
    let changes: [fn(&mut Manifest); 4] = [
        |_| {},
        |manifest| drop(manifest.segments.pop()),
        |manifest| manifest.begin.selection[0].1 = 4096,
        |manifest| manifest.begin.generation += 1,
    ];
    for change in changes {
        let error = refusal(&with_manifest(&folder, change));
        assert_eq!(error.kind(), ErrorKind::Integrity, "{error}");
    }
    let with_its_old_mac = with_changed(&folder, MANIFEST, |bytes| {
        let text = String::from_utf8(bytes.clone()).expect("text");
        let (text, _) = text.rsplit_once(",\n  \"check\"").expect("checked");
        let text = text.replace("\"generation\": 0", "\"generation\": 1");
        let (crc, hash) = (crc32c::crc32c(text.as_bytes()), blake3::hash(text.as_bytes()));
        *bytes = format!("{text},\n  \"check\": \"{crc:08x}-{hash}\"\n}}\n").into_bytes();
        assert!(Manifest::parse(bytes).is_ok());
    });
    assert_eq!(refusal(&with_its_old_mac).kind(), ErrorKind::Integrity);
}

#[test]
fn what_says_that_it_is_not_encrypted_is_not_opened_with_a_key() {
    let folder = encrypted(options());
    let downgraded = with_manifest(&folder, |manifest| {
        manifest.begin.features.clear();
        manifest.begin.encryption = None;
        manifest.mac = None;
        manifest.segments.iter_mut().for_each(|segment| segment.salt = None);
    });
    assert_eq!(refusal(&downgraded).kind(), ErrorKind::Locked);
    let error = open_with(&downgraded, None).expect_err("its segments say otherwise");
    assert_eq!(error.kind(), ErrorKind::Identity, "{error}");
    for (feature, encryption) in [(true, false), (false, true)] {
        let half = with_manifest(&folder, |manifest| {
            if !feature {
                manifest.begin.features.clear();
            }
            if !encryption {
                manifest.begin.encryption = None;
                manifest.mac = None;
            }
        });
        assert_eq!(refusal(&half).kind(), ErrorKind::Format);
    }
}

#[test]
fn a_bundle_that_is_only_looked_at_gives_no_chunks() {
    let place = tempfile::tempdir().expect("a place");
    let directory = place.path().join("bundle");
    let options = WriterOptions { encryption: encryption(key()), ..options() };
    BundleWriter::create(&directory, &source_of(image()), &options, &mut |_| go_on())
        .expect("made");
    let bundle = Bundle::look(&directory).expect("its manifest is readable");
    assert!(bundle.manifest().begin.is_encrypted());
    let first = bundle.pieces().next().expect("not the end");
    assert_eq!(first.expect_err("locked").kind(), ErrorKind::Locked);
    let verified = bundle.verify(CREW, &mut |_| ControlFlow::Continue(()));
    assert_eq!(verified.expect_err("locked").kind(), ErrorKind::Locked);
}
