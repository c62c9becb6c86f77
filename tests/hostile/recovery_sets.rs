//! `recover.py` of several directories at once beside what we make of the same ones: media of one
//! bundle in any order, some of them left out, damaged, or there twice; and incremental bundles
//! over the one that they go on from, which we merge newest first and it lays down oldest first.

#![expect(clippy::disallowed_methods, reason = "tests look at what recover.py wrote")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use uuid::Uuid;

use dualrestore::bundle::{
    BegunBundle, Identity, ImageSource, Media, Medium, NoRecord, Source, WriterOptions, write,
};
use dualrestore::device::{Folder, RamDevice, RamFolder};
use dualrestore::error::Result;
use dualrestore::extent::ByteRange;
use dualrestore::format::bundle::BaseCut;
use dualrestore::merge::run;
use dualrestore::units::BlockSize;

use crate::recovery::{
    Damage, PATH, Reading, cases, damage, damages, joined, read_by_us, recipes, recover, selected,
    told, write_out,
};
use crate::workshop::{
    BLOCK, Made, Recipe, go_on, merge_options, noise, open, options_of, source_of, target_of,
};

/// As many media of one size as it takes.
struct Pile(Vec<RamFolder>, u64);

impl Media for Pile {
    fn next(&mut self, _: u32) -> Result<Option<Medium>> {
        self.0.push(RamFolder::new());
        let folder: Arc<dyn Folder> = Arc::new(self.0[self.0.len() - 1].clone());
        Ok(Some(Medium { folder, bytes_max: Some(self.1) }))
    }

    /// One at least, also where nothing is to be stored.
    fn has_more(&self) -> bool {
        self.0.is_empty()
    }
}

fn media_of(source: &dyn Source, options: &WriterOptions, bytes_max: u64) -> Vec<RamFolder> {
    let begin = BegunBundle::new(source, options).expect("a bundle").bytes.len() as u64;
    let mut pile = Pile(Vec::new(), bytes_max + 3 * begin);
    write(source, &mut pile, options, &mut NoRecord, &mut go_on).expect("made");
    pile.0
}

/// Writes the media out, each in a directory of its own, in this order.
fn directories(place: &Path, media: &[RamFolder]) -> Vec<PathBuf> {
    let paths: Vec<_> = (0..media.len()).map(|at| place.join(format!("medium-{at}"))).collect();
    media.iter().zip(&paths).for_each(|(folder, path)| write_out(folder, path));
    paths
}

/// What of the runs lies in none of the others; both are joined.
fn without(runs: &[(u64, u64)], others: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let sectors = |runs: &[(u64, u64)]| -> Vec<u64> {
        runs.iter().flat_map(|(start, end)| (start / 512)..(end / 512)).collect()
    };
    let taken: std::collections::HashSet<u64> = sectors(others).into_iter().collect();
    let left = sectors(runs).into_iter().filter(|at| !taken.contains(at));
    joined(left.map(|at| (at * 512, at * 512 + 512)).collect())
}

fn coverage(folder: &RamFolder) -> Vec<(u64, u64)> {
    let bundle = open(folder).expect("whole");
    let segments = bundle.segments().iter();
    joined(segments.flat_map(|entry| entry.coverage.iter().map(|run| (run.0, run.1))).collect())
}

/// A medium as it was made, and as it was given: perhaps a copy of another, perhaps damaged.
struct Given {
    covered: Vec<(u64, u64)>,
    made: Made,
}

fn given(
    recipe: &Recipe,
    room: u64,
    picks: &[Index],
    harm: &[(Index, Index, Damage)],
) -> Vec<Given> {
    let media = media_of(&source_of(recipe), &options_of(recipe), room);
    let copy = |pick: &Index| {
        let folder = &media[pick.index(media.len())];
        let made = Made {
            folder: crate::workshop::copy_of(folder),
            image: recipe.image.clone(),
            selection: Vec::new(),
            unreadable: recipe.unreadable.clone(),
        };
        Given { covered: coverage(folder), made }
    };
    let all: Vec<Given> = picks.iter().map(copy).collect();
    for (medium, segment, kind) in harm {
        damage(&all[medium.index(all.len())].made, *segment, kind);
    }
    all
}

fn flips() -> impl Strategy<Value = (Index, Index, Damage)> {
    let only_flips = |(_, kind): &(Index, Damage)| matches!(kind, Damage::Flip { .. });
    (any::<Index>(), damages().prop_filter("a flip", only_flips))
        .prop_map(|(medium, (segment, kind))| (medium, segment, kind))
}

proptest! {
    #![proptest_config(cases(8))]
    #[test]
    fn recover_py_of_several_media_finds_what_we_find_on_each(
        recipe in recipes(),
        room in (1300..4000u64).prop_map(|kib| kib << 10),
        picks in prop::collection::vec(any::<Index>(), 1..5),
        harm in prop::collection::vec(flips(), 0..3),
    ) {
        let all = given(&recipe, room, &picks, &harm);
        let place = tempfile::tempdir().expect("a place");
        let folders: Vec<_> = all.iter().map(|one| one.made.folder.clone()).collect();
        let paths = directories(place.path(), &folders);
        let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
        let out = place.path().join("out.img");
        let (code, said) = recover(&paths, &out, PATH);
        let chosen = match &recipe.selection[..] {
            [] => vec![(0, recipe.image.len() as u64)],
            _ => selected(&recipe).iter().map(|run| (run.offset, run.end())).collect(),
        };
        let covered = joined(all.iter().flat_map(|one| one.covered.clone()).collect());
        let absent = without(&chosen, &covered);
        prop_assert_eq!(joined(told(&said, "absent: bytes ")), absent.clone(), "{}", said);
        let lost = joined(told(&said, "damaged: bytes "));
        prop_assert_eq!(code, if lost.is_empty() && absent.is_empty() { 0 } else { 3 }, "{}", said);
        // Right bytes where nothing is lost or absent, zeros elsewhere.
        let there = without(&without(&chosen, &absent), &lost);
        let mut expected = vec![0; recipe.image.len()];
        for (start, end) in there {
            let span = start as usize..end as usize;
            expected[span.clone()].copy_from_slice(&recipe.image[span]);
        }
        prop_assert!(std::fs::read(&out).expect("an image") == expected, "{said}");
        let ours: Option<Vec<_>> = all.iter().map(|one| read_by_us(&one.made)).collect();
        if let Some(ours) = ours {
            let bad = joined(ours.iter().flat_map(|one| one.lost.clone()).collect());
            let whole = |(one, read): (&Given, &Reading)| without(&one.covered, &read.lost);
            let good = joined(all.iter().zip(&ours).flat_map(whole).collect());
            let ours = without(&bad, &good);
            // A hash that was hit is noticed by us alone: the package blake3 is not there.
            prop_assert!(without(&lost, &ours).is_empty(), "{:?} {:?}", ours, lost);
            prop_assert!(!harm.is_empty() || ours == lost, "{:?} {:?}", ours, lost);
        }
    }
}

/// The volume at a cut.
#[derive(Debug)]
struct Instant(ImageSource, u64);

impl Source for Instant {
    fn identity(&self) -> Identity {
        Identity { volume: Uuid::from_u128(7), generation: 3, cut: self.1, ..self.0.identity() }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

/// What changed from one cut to the next: from which 65536th of the volume on, how many blocks, and
/// whether they became zeros.
type Change = (u16, usize, bool);

/// The media of a full bundle, and of incremental ones that go on from it, of each image.
fn lineage(images: &[(Vec<u8>, Vec<ByteRange>)], room: u64) -> Vec<Vec<RamFolder>> {
    let bundles = images.iter().zip(1u64..).map(|((image, changed), cut)| {
        let device = Arc::new(RamDevice::from_bytes(image.clone()));
        let image = ImageSource::new(device, BlockSize::DEFAULT).expect("sized");
        let base = (cut > 1).then(|| BaseCut { generation: 3, cut: cut - 1, scope: None });
        let options = WriterOptions {
            selection: changed.clone(),
            base,
            bundle: Uuid::from_u128(cut.into()),
            segment_bytes_max: 2 << 20,
            threads: 1,
            ..WriterOptions::default()
        };
        media_of(&Instant(image, cut), &options, room)
    });
    bundles.collect()
}

/// The first image, and each later one with what changed.
fn story(first: Vec<u8>, cuts: &[Vec<Change>]) -> Vec<(Vec<u8>, Vec<ByteRange>)> {
    let blocks = first.len().div_ceil(BLOCK);
    let mut images = vec![(first, Vec::new())];
    for (changes, seed) in cuts.iter().zip(50..) {
        let mut image = images[images.len() - 1].0.clone();
        let mut runs = Vec::new();
        for (at, count, zeros) in changes {
            let start = usize::from(*at) * blocks / 65_536 * BLOCK;
            let end = (start + count * BLOCK).min(image.len());
            let new = if *zeros { vec![0; end - start] } else { noise(end - start, seed) };
            image[start..end].copy_from_slice(&new);
            runs.push((start as u64, end as u64));
        }
        let runs = joined(runs).into_iter().map(|(start, end)| ByteRange::new(start, end - start));
        images.push((image, runs.collect()));
    }
    images
}

proptest! {
    #![proptest_config(cases(8))]
    #[test]
    fn recover_py_of_incremental_bundles_is_what_a_merge_newest_first_gives(
        recipe in recipes(),
        cuts in prop::collection::vec(
            prop::collection::vec((any::<u16>(), 1..300usize, any::<bool>()), 0..4), 1..4),
        room in (1300..4000u64).prop_map(|kib| kib << 10),
        turn in any::<Index>(),
    ) {
        let images = story(recipe.image, &cuts);
        let newest = &images[images.len() - 1].0;
        let bundles = lineage(&images, room);
        let (device, target) = target_of(newest.len());
        for folder in bundles.iter().rev().flatten() {
            run(&open(folder).expect("whole"), &target, &merge_options(), &mut go_on)
                .expect("newest first");
        }
        prop_assert!(device.contents() == *newest);
        let place = tempfile::tempdir().expect("a place");
        let mut media: Vec<RamFolder> = bundles.into_iter().flatten().collect();
        let turns = turn.index(media.len());
        media.rotate_left(turns);
        let paths = directories(place.path(), &media);
        let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
        let out = place.path().join("out.img");
        let (code, said) = recover(&paths, &out, PATH);
        prop_assert_eq!(code, 0, "{}", said);
        prop_assert!(std::fs::read(&out).expect("an image") == *newest, "{said}");
    }
}

#[test]
fn recover_py_refuses_bundles_that_do_not_go_on_from_each_other() {
    let place = tempfile::tempdir().expect("a place");
    let change = vec![(0, 3, false)];
    let images = story(noise(64 * BLOCK, 1), &[change.clone(), change]);
    let [first, second, third] = &lineage(&images, 4 << 20)[..] else { panic!("three bundles") };
    let foreign = Recipe::small().make().folder;
    let together: [(&str, [&RamFolder; 2]); 2] =
        [("gap", [&first[0], &third[0]]), ("foreign", [&foreign, &second[0]])];
    for (name, media) in together {
        let top = place.path().join(name);
        std::fs::create_dir(&top).expect("made");
        let paths = directories(&top, &media.map(Clone::clone));
        let out = top.join("out.img");
        let (code, said) = recover(&[&paths[0], &paths[1]], &out, PATH);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("restore each alone"), "{said}");
        assert!(!out.exists(), "nothing was begun");
    }
}
