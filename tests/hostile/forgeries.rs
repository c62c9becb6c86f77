//! Bundles with good checksums whose contents make no sense: refused or harmless, never a panic,
//! never a byte outside the volume.

use dualrestore::bundle::{Content, Opener, PieceSource};
use dualrestore::error::{ErrorKind, Result};
use dualrestore::format::bundle::PAGE_BYTES;
use dualrestore::merge::run;
use serde_json::{Value, json};

use crate::forge::{forged, manifest_of, sealed_json};
use crate::workshop::{
    Made, Recipe, copy_of, go_on, judge, merge_options, open, refused, target_of, thorough,
    verified,
};

/// Reads, verifies and merges a forged bundle; what is wrong with it, if it was refused.
#[track_caller]
fn survive(made: &Made, what: &str) -> Result<()> {
    let bundle = match open(&made.folder) {
        Ok(bundle) => bundle,
        Err(error) => {
            refused(&error, what);
            return Err(error);
        }
    };
    let size = bundle.identity().geometry.size();
    if size > 1 << 30 {
        // Going through it takes as long as the volume is large.
        assert!(bundle.bytes_total() <= size, "{what}");
        return Ok(());
    }
    let mut opener = Opener::new()?;
    let (mut stored, mut plain) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for piece in bundle.pieces() {
        let piece = piece?;
        assert!(piece.range.end() <= size, "{what}: {piece:?}");
        if matches!(piece.content, Content::Stored { .. }) {
            let stored = &mut stored[..piece.bytes_to_read()];
            let _whole_or_not =
                piece.read(stored).map(|()| piece.open(&mut opener, stored, &mut plain));
        }
    }
    // Both of these take a lot of memory, which takes time: now and then.
    if thorough() || crc32c::crc32c(what.as_bytes()).is_multiple_of(64) {
        verified(&bundle)?;
        let (_, target) = target_of(made.image.len());
        run(&bundle, &target, &merge_options(), &mut go_on)?;
    }
    Ok(())
}

/// What a length, an offset or a count may be made.
const EXTREMES: [u64; 8] = [0, 1, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];

/// Puts every extreme into every field of a page, with good checksums.
#[track_caller]
fn force(page: impl Fn(usize) -> usize, fields: std::ops::Range<usize>) {
    let made = Recipe::small().make();
    let pages = made.folder.contents("seg-00000000.drs").expect("there").len() / PAGE_BYTES;
    for at in fields.step_by(4) {
        for width in [2, 4, 8] {
            // What is cut off is another case of a smaller width.
            let fits =
                |extreme: &&u64| at % width == 0 && (width == 8 || **extreme >> (8 * width) == 0);
            for extreme in EXTREMES.iter().filter(fits) {
                let place = page(pages) * PAGE_BYTES + at;
                let change = |bytes: &mut Vec<u8>| {
                    bytes[place..place + width].copy_from_slice(&extreme.to_le_bytes()[..width]);
                };
                let what = format!("{width} bytes at {place} made {extreme}");
                let _refused_or_not = survive(&forged(&made, change, |_| {}), &what);
            }
        }
    }
}

#[test]
fn extreme_numbers_in_a_segment_header_do_no_harm() {
    force(|_| 0, 0..128);
}

#[test]
fn extreme_numbers_in_a_batch_do_no_harm() {
    force(|_| 1, 0..64 + 6 * 64);
}

#[test]
fn extreme_numbers_in_index_and_trailer_do_no_harm() {
    force(|pages| pages - 2, 0..64);
    force(|pages| pages - 1, 0..136);
}

/// The paths of all leaves of a JSON document.
fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, field)| leaves(field, &format!("{path}/{name}"), found));
        }
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                leaves(item, &format!("{path}/{at}"), found);
            }
        }
        _ => {}
    }
    found.push(path.to_owned());
}

#[test]
fn any_value_in_any_place_of_a_manifest_does_no_harm() {
    let made = Recipe::small().make();
    for name in ["manifest.json", "manifest.begin.json"] {
        let manifest = manifest_of(&made.folder, name);
        let mut paths = Vec::new();
        leaves(&manifest, "", &mut paths);
        let mut values: Vec<Value> = EXTREMES.map(Value::from).to_vec();
        values.extend([json!(-1), json!(0.5), json!(null), json!(true), json!([]), json!({})]);
        let names =
            ["", "..", "../../etc/passwd", "/dev/zero", "a\0b", "seg-00000000.drs/x", "\u{202e}"];
        values.extend(names.map(Value::from));
        for path in paths.iter().filter(|path| !path.is_empty()) {
            for value in &values {
                let mut changed = manifest.clone();
                *changed.pointer_mut(path).expect("a path of it") = value.clone();
                let folder = copy_of(&made.folder);
                folder.replace(name, sealed_json(&changed));
                let bad = Made { folder, ..made.clone() };
                let _refused_or_not = survive(&bad, &format!("{path} of {name} made {value}"));
            }
        }
    }
}

fn with_manifest(made: &Made, change: impl FnOnce(&mut Value)) -> Made {
    forged(made, |_| {}, change)
}

#[test]
fn a_manifest_whose_sums_would_overflow_is_refused() {
    let made = Recipe::large(1, 5).make();
    type Change = Box<dyn Fn(&mut Value)>;
    let size: u64 = (1 << 63) - 512;
    let field = |name: &'static str| -> Change {
        Box::new(move |manifest| {
            for segment in manifest["segments"].as_array_mut().expect("a list") {
                segment[name] = u64::MAX.into();
            }
        })
    };
    let whole_volume: Change = Box::new(move |manifest| {
        manifest["begin"]["size"] = size.into();
        for segment in manifest["segments"].as_array_mut().expect("a list") {
            segment["coverage"] = json!([[0, size]]);
        }
    });
    let same: Change = Box::new(|manifest| {
        let coverage = manifest["segments"][0]["coverage"].clone();
        manifest["segments"][1]["coverage"] = coverage;
    });
    let counts = ["chunks", "data_bytes", "zero_bytes", "unreadable_bytes", "stored_bytes"];
    for change in counts.map(field).into_iter().chain([whole_volume, same]) {
        let bad = with_manifest(&made, change);
        let error = survive(&bad, "impossible sums").expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Format, "{error}");
    }
}

#[test]
fn names_that_lead_out_of_the_directory_are_refused() {
    let made = Recipe::small().make();
    let names = ["../seg-00000000.drs", "/seg-00000000.drs", "seg-00000000.drs\0", "", ".", ".."];
    for name in names {
        let bad = with_manifest(&made, |manifest| manifest["segments"][0]["name"] = name.into());
        let error = survive(&bad, name).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Format, "{error}");
    }
}

#[test]
fn a_chunk_that_unpacks_to_more_than_it_says_is_lost() {
    let made = Recipe::small().make();
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).expect("compressed");
    let skip = [&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], &bomb[..]].concat();
    for stored in [bomb, skip] {
        let bad = with_stored(&made, &stored);
        let verdict = judge(&bad, "a bomb");
        assert!(!verdict.is_whole(&made), "{verdict:?}");
    }
}

#[test]
fn a_chunk_of_two_frames_is_lost_as_recover_py_has_it() {
    let made = Recipe::small().make();
    let text = &made.image[128 << 10..192 << 10];
    let halves = [&text[..1000], &text[1000..]];
    let frames = halves.map(|half| zstd::bulk::compress(half, 3).expect("compressed")).concat();
    let whole = zstd::bulk::compress(text, 3).expect("compressed");
    assert!(judge(&with_stored(&made, &whole), "one frame").is_whole(&made));
    assert!(!judge(&with_stored(&made, &frames), "two frames").is_whole(&made));
}

/// The compressed chunk of the small bundle with other stored bytes, all checksums good.
fn with_stored(made: &Made, stored: &[u8]) -> Made {
    assert!(stored.len() <= PAGE_BYTES);
    let change = |bytes: &mut Vec<u8>| {
        let slots = (1..64).map(|slot| PAGE_BYTES + slot * 64);
        let slot = slots.into_iter().rfind(|slot| bytes[slot + 16] == 2).expect("a zstd chunk");
        let field = |at: usize| {
            let four = bytes[slot + at..slot + at + 4].try_into().expect("four bytes");
            u32::from_le_bytes(four) as usize
        };
        assert!(field(20) <= PAGE_BYTES, "one page");
        let place = (2 + field(24)) * PAGE_BYTES;
        bytes[slot + 20..slot + 24].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        bytes[slot + 28..slot + 32].copy_from_slice(&crc32c::crc32c(stored).to_le_bytes());
        bytes[place..place + PAGE_BYTES].fill(0);
        bytes[place..place + stored.len()].copy_from_slice(stored);
    };
    forged(made, change, |_| {})
}
