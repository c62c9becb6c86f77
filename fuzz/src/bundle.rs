//! Segments and manifests of bundles.

use std::sync::Arc;

use dualrestore::bundle::{Opener, SegmentReader, read_header};
use dualrestore::device::{Folder, RamFolder};
use dualrestore::format::bundle::{BeginManifest, BundleKey, Checks, Manifest, PAGE_BYTES};
use dualrestore::units::{BlockSize, Geometry};
use uuid::Uuid;

use crate::seals::{reseal_segment, sealed_text};
use crate::{both_modes, modes};

const NAME: &str = "seg-00000000.drs";

/// Reads a segment as a merge does: header, batches, chunks.
pub fn bundle_segment(bytes: &[u8]) {
    let Some((reseal, rest)) = modes(bytes) else { return };
    let mut bytes = rest.to_vec();
    if reseal {
        bytes.resize(rest.len().next_multiple_of(PAGE_BYTES).max(2 * PAGE_BYTES), 0);
        reseal_segment(&mut bytes);
    }
    let folder = RamFolder::new();
    folder.replace(NAME, bytes);
    let file = folder.open(NAME).expect("there");
    let fallback = Geometry::new(8 << 20, BlockSize::DEFAULT).expect("valid");
    let key = BundleKey::new(Uuid::nil(), [7; 32]);
    let (geometry, checks, number) = match read_header(file.as_ref()) {
        Ok((header, hash)) => {
            let key = header.salt.is_some().then_some(&key);
            let checks = header.checks(hash, key).expect("a key for an encrypted one");
            (header.geometry, checks, header.segment)
        }
        Err(_) => (fallback, Checks::plain([0; 32]), 0),
    };
    let mut reader = SegmentReader::open(Arc::clone(&file), number, geometry, Arc::new(checks))
        .expect("memory is read");
    let mut opener = Opener::new().expect("a decompressor");
    let (mut stored, mut plain) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while let Some(found) = reader.next_batch() {
        for piece in found.pieces(&file) {
            assert!(geometry.contains(piece.range), "{piece:?}");
            let stored = &mut stored[..piece.bytes_to_read()];
            if !stored.is_empty() && piece.read(stored).is_ok() {
                let _whole_or_not = piece.open(&mut opener, stored, &mut plain);
            }
        }
    }
}

/// Parses both manifests.
pub fn bundle_manifest(bytes: &[u8]) {
    let Some((reseal, rest)) = modes(bytes) else { return };
    let sealed = if reseal { sealed_text(rest) } else { rest.to_vec() };
    if let Ok(manifest) = Manifest::parse(&sealed) {
        if manifest.begin.is_encrypted() {
            let key = BundleKey::new(manifest.begin.bundle.0, [7; 32]);
            let _of_another = manifest.check_mac(&sealed, &key);
        } else {
            let again = Manifest::parse(&manifest.encode(None));
            assert_eq!(again.expect("what was read can be written"), manifest);
        }
    }
    if let Ok(begin) = BeginManifest::parse(&sealed) {
        let again = BeginManifest::parse(&begin.encode()).expect("what was read can be written");
        assert_eq!(again, begin);
    }
}

pub(crate) fn segment_seeds() -> Vec<Vec<u8>> {
    both_modes(&[
        include_bytes!("../../tests/golden/bundle-v1/seg-00000000.drs").to_vec(),
        include_bytes!("../../tests/golden/bundle-v1-bound/seg-00000000.drs").to_vec(),
    ])
}

pub(crate) fn manifest_seeds() -> Vec<Vec<u8>> {
    let texts = [
        include_str!("../../tests/golden/bundle-v1/manifest.json"),
        include_str!("../../tests/golden/bundle-v1/manifest.begin.json"),
        include_str!("../../tests/golden/bundle-v1-bound/manifest.json"),
    ];
    // Sealed ones come without their check, which is made anew.
    let body =
        |text: &str| text.rsplit_once(",\n  \"check\"").map_or("", |parts| parts.0).to_owned();
    let sealed = texts.iter().map(|text| format!("\x01{}", body(text)).into_bytes());
    sealed.chain(texts.iter().map(|text| format!("\0{text}").into_bytes())).collect()
}
