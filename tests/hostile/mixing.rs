//! Segments lost, twice, moved, of another bundle; pages swapped between segments.

use dualrestore::device::Folder;
use dualrestore::error::ErrorKind;
use dualrestore::format::bundle::PAGE_BYTES;
use dualrestore::merge::run;

use crate::workshop::{
    Made, Recipe, Verdict, changed, check_target, copy_of, go_on, judge, judge_opened,
    merge_options, open, target_of,
};

fn segments(made: &Made) -> Vec<String> {
    let mut names = made.folder.names().expect("listed");
    names.retain(|name| name.starts_with("seg-"));
    names.sort();
    names
}

fn bytes_of(made: &Made, name: &str) -> Vec<u8> {
    made.folder.contents(name).expect("there")
}

/// A bundle of the same image, its other half from another bundle.
fn mixed(made: &Made, other: &Made, name: &str) -> Made {
    changed(made, name, |bytes| *bytes = bytes_of(other, name))
}

#[test]
fn a_segment_of_another_bundle_is_refused_even_of_the_same_image() {
    let made = Recipe::large(1, 5).make();
    let same = Recipe::large(2, 5).make();
    for name in segments(&made) {
        let verdict = judge(&mixed(&made, &same, &name), "of another bundle");
        assert_eq!(verdict, Verdict::Refused(ErrorKind::Identity));
    }
}

#[test]
fn segments_that_changed_places_or_stand_twice_never_give_a_wrong_byte() {
    let made = Recipe::large(1, 5).make();
    let names = segments(&made);
    assert!(names.len() > 2);
    for first in &names {
        for second in &names {
            let swapped = changed(&made, first, |bytes| *bytes = bytes_of(&made, second));
            swapped.folder.replace(second, bytes_of(&made, first));
            let verdict = judge(&swapped, &format!("{first} and {second} swapped"));
            assert_eq!(verdict.is_whole(&made), first == second);
            let twice = changed(&made, first, |bytes| *bytes = bytes_of(&made, second));
            let verdict = judge(&twice, &format!("{second} in the place of {first}"));
            assert_eq!(verdict.is_whole(&made), first == second);
        }
    }
    let spare = changed(&made, &names[0], |_| ());
    spare.folder.replace("seg-00000009.drs", bytes_of(&made, &names[0]));
    spare.folder.replace("Thumbs.db", vec![1; 100]);
    assert!(judge(&spare, "with files that do not belong").is_whole(&made));
}

#[test]
fn a_manifest_of_another_bundle_is_refused() {
    let made = Recipe::large(1, 5).make();
    let same = Recipe::large(2, 5).make();
    let verdict = judge(&mixed(&made, &same, "manifest.json"), "another manifest");
    assert!(matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
}

#[test]
fn pages_of_other_segments_and_bundles_are_noticed() {
    let made = Recipe::large(1, 5).make();
    let foreign = Recipe::large(2, 6).make();
    let bundle = open(&made.folder).expect("whole");
    let names = segments(&made);
    let pages = |bytes: &[u8]| [1, bytes.len() / PAGE_BYTES - 2, bytes.len() / PAGE_BYTES - 1];
    for name in &names {
        let whole = bytes_of(&made, name);
        let others = [bytes_of(&foreign, name), bytes_of(&made, &names[1])];
        for other in others.iter().filter(|other| **other != whole) {
            for (to, from) in pages(&whole).into_iter().zip(pages(other)) {
                let mut bytes = whole.clone();
                let page = &other[from * PAGE_BYTES..][..PAGE_BYTES];
                bytes[to * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
                made.folder.replace(name, bytes);
                judge_opened(&bundle, &made, &format!("page {from} as page {to} of {name}"));
            }
        }
        made.folder.replace(name, whole);
    }
}

#[test]
fn pages_of_one_segment_that_changed_places_never_give_a_wrong_byte() {
    let made = Recipe::large(1, 5).make();
    let bundle = open(&made.folder).expect("whole");
    let name = &segments(&made)[1];
    let whole = bytes_of(&made, name);
    let pages = whole.len() / PAGE_BYTES;
    for page in (1..pages).step_by(29) {
        for other in [1, 2, pages / 2, pages - 2, pages - 1] {
            let mut bytes = whole.clone();
            let (first, second) = (page.min(other), page.max(other));
            if first == second {
                continue;
            }
            let (head, tail) = bytes.split_at_mut(second * PAGE_BYTES);
            head[first * PAGE_BYTES..][..PAGE_BYTES].swap_with_slice(&mut tail[..PAGE_BYTES]);
            made.folder.replace(name, bytes);
            judge_opened(&bundle, &made, &format!("pages {first} and {second} swapped"));
        }
    }
}

#[test]
fn two_bundles_of_one_volume_merged_in_either_order_or_twice_fill_each_block_once() {
    let (made, again) = (Recipe::large(1, 5).make(), Recipe::large(2, 5).make());
    let parts = [&made, &again].map(|made| open(&copy_of(&made.folder)).expect("whole"));
    for order in [[0, 1, 0], [1, 0, 1]] {
        let (device, target) = target_of(made.image.len());
        let mut written = 0;
        for part in order {
            let merged = run(&parts[part], &target, &merge_options(), &mut go_on);
            let report = merged.expect("merged");
            written += report.bytes_written;
        }
        assert_eq!(written, made.image.len() as u64);
        check_target(&device, &target, &made.image, "in any order");
        assert_eq!(target.map().missing_bytes(), 0);
    }
}
