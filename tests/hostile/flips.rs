//! Bits flipped one by one, and every file cut off at every page.

use dualrestore::device::Folder;
use dualrestore::format::bundle::PAGE_BYTES;

use crate::workshop::{
    Made, Recipe, Verdict, changed, judge, judge_merge, judge_opened, open, thorough, verified,
};

const SEGMENT: &str = "seg-00000000.drs";
const MANIFESTS: [&str; 2] = ["manifest.json", "manifest.begin.json"];

fn bytes_of(made: &Made, name: &str) -> Vec<u8> {
    made.folder.contents(name).expect("there")
}

/// Flips bits of a page of the segment of an open bundle, one by one: all of them in the bytes that
/// mean something (the first `used`, and the checks), some of the others, all if thorough. Whether
/// all, or none, of them cost data.
#[track_caller]
fn flip_page(made: &Made, page: usize, used: usize, costs: bool) {
    let bundle = open(&made.folder).expect("whole");
    let mut bytes = bytes_of(made, SEGMENT);
    let fields = (0..used).chain(PAGE_BYTES - 40..PAGE_BYTES);
    let others = (0..PAGE_BYTES).step_by(3).map(|at| at * 8 + at % 8);
    let bits = fields.flat_map(|at| at * 8..at * 8 + 8).chain(others);
    let bits: Vec<usize> = if thorough() { (0..PAGE_BYTES * 8).collect() } else { bits.collect() };
    for bit in bits.into_iter().map(|bit| page * PAGE_BYTES * 8 + bit) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        made.folder.replace(SEGMENT, bytes.clone());
        let verdict = judge_opened(&bundle, made, &format!("bit {bit} of the segment"));
        assert_eq!(verdict.is_whole(made), !costs, "bit {bit} of the segment");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    made.folder.replace(SEGMENT, bytes);
}

/// Descriptor page, index and trailer; the payload lies between the first two.
fn pages_of(made: &Made) -> [usize; 3] {
    let pages = bytes_of(made, SEGMENT).len() / PAGE_BYTES;
    [1, pages - 2, pages - 1]
}

#[test]
fn the_bundle_that_is_damaged_has_a_chunk_of_each_kind() {
    let made = Recipe::small().make();
    assert!(judge(&made, "whole").is_whole(&made));
    let report = judge_merge(&made, "whole").expect("merged");
    assert!(report.bytes_zeroed > 0 && report.chunks_damaged == 1, "{report:?}");
    let page = &bytes_of(&made, SEGMENT)[PAGE_BYTES..2 * PAGE_BYTES];
    let kinds = [1, 2, 3, 4].map(|kind| page[64..].chunks(64).any(|one| one[16] == kind));
    assert_eq!(kinds, [true; 4]);
}

#[test]
fn each_flipped_bit_of_a_descriptor_page_costs_its_batch() {
    let made = Recipe::small().make();
    flip_page(&made, pages_of(&made)[0], 400, true);
}

#[test]
fn no_flipped_bit_of_index_or_trailer_costs_anything() {
    let made = Recipe::small().make();
    let [_, index, trailer] = pages_of(&made);
    flip_page(&made, index, 32, false);
    flip_page(&made, trailer, 136, false);
}

#[test]
fn each_flipped_bit_of_a_short_payload_page_costs_its_chunk() {
    let made = Recipe::small().make();
    // The last payload page holds the 512 bytes of the tail, and padding.
    let page = pages_of(&made)[1] - 1;
    flip_page(&made, page, 16, true);
}

/// One bit of each byte, another from byte to byte; the parsers' own tests flip all of them.
#[track_caller]
fn flip_bytes(made: &Made, name: &str, bytes: std::ops::Range<usize>) -> Vec<Verdict> {
    let flipped = |at: usize| {
        let bad = changed(made, name, |bytes| bytes[at] ^= 1 << (at % 8));
        judge(&bad, &format!("byte {at} of {name}"))
    };
    bytes.map(flipped).collect()
}

#[test]
fn a_flipped_bit_of_a_segment_header_or_a_manifest_never_gives_a_wrong_byte() {
    let made = Recipe::small().make();
    for verdict in flip_bytes(&made, SEGMENT, 0..PAGE_BYTES) {
        assert!(verdict.is_whole(&made), "the manifest knows whose segment it is: {verdict:?}");
    }
    for verdict in flip_bytes(&made, MANIFESTS[0], 0..bytes_of(&made, MANIFESTS[0]).len()) {
        assert!(matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
    }
    // The other manifest repeats what the first says; verification mentions it.
    for verdict in flip_bytes(&made, MANIFESTS[1], 0..bytes_of(&made, MANIFESTS[1]).len()) {
        assert!(verdict.is_whole(&made), "{verdict:?}");
    }
}

#[test]
fn a_flipped_bit_of_any_page_is_never_merged_and_never_unnoticed() {
    let made = Recipe::small().make();
    let length = bytes_of(&made, SEGMENT).len();
    for at in (PAGE_BYTES..length).step_by(1021) {
        let bad = changed(&made, SEGMENT, |bytes| bytes[at] ^= 1 << (at % 8));
        judge_merge(&bad, &format!("byte {at}"));
        let found = verified(&open(&bad.folder).expect("opens")).expect("gone through");
        let noticed = found.chunks_damaged > 1 || !found.blemishes.is_empty();
        assert!(noticed, "byte {at}: {found:?}");
    }
}

#[test]
fn a_file_cut_off_at_any_page_or_left_out_never_gives_a_wrong_byte() {
    for made in [Recipe::small().make(), Recipe::large(1, 5).make()] {
        for name in made.folder.names().expect("listed") {
            let length = bytes_of(&made, &name).len();
            let pages = (0..length).step_by(PAGE_BYTES);
            // After the first of every megabyte pages are alike: payload.
            let chosen = |at: &usize| at % (1 << 20) < 5 * PAGE_BYTES || at + (1 << 16) > length;
            for at in pages.filter(chosen).chain([length - 1, length.saturating_sub(511)]) {
                let bad = changed(&made, &name, |bytes| bytes.truncate(at));
                let verdict = judge(&bad, &format!("{name} cut off at {at}"));
                let needed = name.starts_with("seg-") || name == "manifest.json";
                assert_eq!(verdict.is_whole(&made), !needed, "{name} cut off at {at}");
            }
            let longer = changed(&made, &name, |bytes| bytes.extend([0; PAGE_BYTES]));
            judge(&longer, &format!("{name}, made longer"));
            let without = changed(&made, &name, |_| ());
            without.folder.remove(&name).expect("removed");
            judge(&without, &format!("without {name}"));
        }
    }
}

#[test]
fn a_segment_that_shrinks_while_it_is_read_loses_blocks_and_gives_none_wrong() {
    let made = Recipe::large(1, 5).make();
    let bundle = open(&made.folder).expect("whole");
    let name = "seg-00000001.drs";
    let whole = bytes_of(&made, name);
    for at in (0..whole.len()).step_by(37 * PAGE_BYTES + 512) {
        made.folder.replace(name, whole[..at].to_vec());
        let verdict = judge_opened(&bundle, &made, &format!("shrunk to {at}"));
        let only_index = at + 2 * PAGE_BYTES >= whole.len();
        assert_eq!(verdict.is_whole(&made), only_index, "shrunk to {at}");
    }
}
