//! What a manifest is written as, and what is refused.

use super::*;
use crate::error::ErrorKind;

fn manifest() -> Manifest {
    let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
    let (bundle, volume) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let mut begin = BeginManifest::new(bundle, volume, geometry, 3, 4);
    begin.selection = vec![Run(0, 4096), Run(8192, 1 << 20)];
    let segment = SegmentEntry {
        name: segment_name(0),
        number: 0,
        bytes: 16_384,
        header_hash: HexHash([1; 32]),
        root: HexHash([2; 32]),
        chunks: 1,
        data_bytes: (1 << 20) - 4096,
        zero_bytes: 0,
        unreadable_bytes: 0,
        stored_bytes: 4096,
        coverage: begin.selection.clone(),
        salt: None,
    };
    Manifest::new(begin, [7; 32], vec![segment])
}

#[test]
fn a_manifest_reads_back_and_is_plain_json() {
    let bytes = manifest().encode(None);
    assert_eq!(Manifest::parse(&bytes).expect("whole"), manifest());
    let json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
    assert_eq!(json["begin"]["selection"][1][0], 8192);
    let begin = manifest().begin;
    assert_eq!(BeginManifest::parse(&begin.encode()).expect("whole"), begin);
}

#[test]
fn every_flipped_bit_and_every_truncation_is_noticed() {
    let mut bytes = manifest().encode(None);
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::parse(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    for length in 0..bytes.len() {
        assert!(Manifest::parse(&bytes[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn the_segments_of_a_further_medium_are_numbered_on() {
    let mut further = manifest();
    further.medium = Some(MediumEntry { number: 2, last: true });
    further.segments[0].number = 7;
    further.segments[0].name = segment_name(7);
    assert_eq!(Manifest::parse(&further.encode(None)).expect("whole"), further);
    further.segments.clear();
    let empty = Manifest { root: HexHash(root_of(&[])), ..further.clone() };
    assert_eq!(Manifest::parse(&empty.encode(None)).expect("nothing was left for it"), empty);
    let text = String::from_utf8(manifest().encode(None)).expect("text");
    assert!(!text.contains("medium"), "the only medium does not say so");
}

fn refused(change: impl FnOnce(&mut Manifest)) -> Error {
    let mut changed = manifest();
    change(&mut changed);
    Manifest::parse(&changed.encode(None)).expect_err("refused")
}

#[test]
fn unknown_versions_features_and_impossible_values_are_refused() {
    let error = refused(|manifest| manifest.version = 2);
    assert!(error.to_string().contains("version 2"), "{error}");
    let error = refused(|manifest| manifest.begin.features.push("shining".into()));
    assert!(error.to_string().contains("shining"), "{error}");
    for error in [
        refused(|manifest| manifest.begin.block_size = 1000),
        refused(|manifest| manifest.begin.selection.swap(0, 1)),
        refused(|manifest| manifest.begin.selection[1].1 += 4096),
        refused(|manifest| manifest.segments[0].name = "../seg-00000000.drs".into()),
        refused(|manifest| manifest.segments[0].number = 1),
        refused(|manifest| manifest.segments[0].coverage[0] = Run(4096, 4096)),
        refused(|manifest| manifest.medium = Some(MediumEntry { number: 0, last: false })),
        refused(|manifest| manifest.segments[0].chunks = u64::MAX),
        refused(|manifest| manifest.segments[0].zero_bytes = u64::MAX),
        refused(|manifest| manifest.segments[0].data_bytes += 4096),
        refused(|manifest| manifest.begin.software = "x".repeat(256)),
        refused(|manifest| manifest.begin.features = vec![String::new(); 65]),
        refused(|manifest| {
            let again =
                SegmentEntry { name: segment_name(1), number: 1, ..manifest.segments[0].clone() };
            manifest.segments.push(again);
            manifest.root = HexHash(root_of(&manifest.segments));
        }),
    ] {
        assert_eq!(error.kind(), ErrorKind::Format, "{error}");
    }
    let text = String::from_utf8(manifest().encode(None)).expect("text");
    let body = text.split_once(CHECK_START).expect("checked").0.replace("\"cut\"", "\"cutt\"");
    let bytes = format!("{body}{CHECK_START}{}{CHECK_END}", check_of(body.as_bytes()));
    let error = Manifest::parse(bytes.as_bytes()).expect_err("an unknown field");
    assert!(error.to_string().contains("cutt"), "{error}");
}
