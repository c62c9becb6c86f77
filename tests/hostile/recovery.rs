//! `recover.py` beside the Rust reader: two programs that share no code read the same damaged
//! bundles, and must find the same bytes and the same losses; and the way of a user who has
//! nothing but the medium.

#![expect(clippy::disallowed_methods, reason = "tests write files and run recover.py")]

use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use dualrestore::bundle::{Compression, Content, Opener, PieceSource};
use dualrestore::device::{Folder, RamFolder};
use dualrestore::extent::ByteRange;

use crate::workshop::{BLOCK, Made, Recipe, noise, open, thorough};

/// What a reader made of a bundle: an image with zeros where it has nothing, and the bytes lost.
#[derive(Debug, PartialEq, Eq)]
pub struct Reading {
    pub image: Vec<u8>,
    pub lost: Vec<(u64, u64)>,
}

pub fn write_out(folder: &RamFolder, directory: &Path) {
    std::fs::create_dir(directory).expect("made");
    for name in folder.names().expect("listed") {
        let bytes = folder.contents(&name).expect("there");
        std::fs::write(directory.join(name), bytes).expect("written");
    }
}

/// Sorted, with neighbours joined.
pub fn joined(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    runs.dedup_by(|next, last| {
        let touches = next.0 <= last.1;
        last.1 = if touches { last.1.max(next.1) } else { last.1 };
        touches
    });
    runs
}

/// `None`: refused.
pub fn read_by_us(made: &Made) -> Option<Reading> {
    let bundle = open(&made.folder).ok()?;
    let mut opener = Opener::new().expect("a decompressor");
    let (mut stored, mut plain) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let (mut image, mut lost) = (vec![0; made.image.len()], Vec::new());
    for piece in bundle.pieces() {
        let piece = piece.expect("memory can be read");
        let span = piece.range.offset as usize..piece.range.end() as usize;
        let stored = &mut stored[..piece.bytes_to_read()];
        let bytes = match &piece.content {
            Content::Zero => continue,
            Content::Missing(_) => None,
            Content::Stored { .. } | Content::Plain(_) => {
                let read = piece.read(stored);
                read.and_then(|()| piece.open(&mut opener, stored, &mut plain)).ok()
            }
        };
        match bytes {
            Some(bytes) => image[span].copy_from_slice(bytes),
            None => lost.push((piece.range.offset, piece.range.end())),
        }
    }
    Some(Reading { image, lost: joined(lost) })
}

/// The exit code and all that was said, of the media in that order.
pub fn recover(media: &[&Path], out: &Path, environment: &[(&str, &str)]) -> (i32, String) {
    let mut command = Command::new("/usr/bin/env");
    command.arg("-i").args(environment.iter().map(|(name, value)| format!("{name}={value}")));
    command.arg("/usr/bin/python3").arg("-I").arg(media[0].join("recover.py"));
    let done = command.args(media).arg(out).output().expect("python3 runs");
    let said = [done.stdout, done.stderr].concat();
    (done.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

pub const PATH: &[(&str, &str)] = &[("PATH", "/usr/bin:/bin")];

/// The runs in the lines that begin so.
pub fn told(said: &str, beginning: &str) -> Vec<(u64, u64)> {
    let run = |line: &str| {
        let (start, rest) = line.split_once(" to ")?;
        let (end, _) = rest.split_once(": ")?;
        Some((start.parse().ok()?, end.parse().ok()?))
    };
    let lines = said.lines().filter_map(|line| line.strip_prefix(beginning));
    lines.map(|line| run(line).expect("two numbers")).collect()
}

fn read_by_python(made: &Made) -> Option<Reading> {
    let place = tempfile::tempdir().expect("a place");
    let (directory, out) = (place.path().join("bundle"), place.path().join("out.img"));
    write_out(&made.folder, &directory);
    let (code, said) = recover(&[&directory], &out, PATH);
    if code == 1 {
        assert!(said.contains("recover.py: "), "refused with words: {said}");
        return None;
    }
    let lost = told(&said, "damaged: bytes ");
    assert_eq!(code, if lost.is_empty() { 0 } else { 3 }, "{said}");
    let image = std::fs::read(&out).expect("an image");
    Some(Reading { image, lost: joined(lost) })
}

/// Right bytes where nothing is lost, zeros elsewhere.
fn assert_honest(reading: &Reading, made: &Made, who: &str) {
    let mut expected = vec![0; made.image.len()];
    for ByteRange { offset, length } in &made.selection {
        let span = *offset as usize..(offset + length) as usize;
        expected[span.clone()].copy_from_slice(&made.image[span]);
    }
    for (start, end) in &reading.lost {
        expected[*start as usize..*end as usize].fill(0);
    }
    assert!(reading.image == expected, "{who} gave a byte that is wrong");
}

/// A stretch of an image.
#[derive(Clone, Debug)]
enum Stretch {
    Zeros(usize),
    Noise(usize, u8),
    Text(usize),
}

#[derive(Clone, Debug)]
pub enum Damage {
    Flip { place: prop::sample::Index, bit: u8 },
    Wipe { place: prop::sample::Index, pages: usize },
    Cut { place: prop::sample::Index },
    SwapPages(prop::sample::Index, prop::sample::Index),
    Remove,
}

pub fn recipes() -> impl Strategy<Value = Recipe> {
    let blocks = 1..300usize;
    let stretch = prop_oneof![
        blocks.clone().prop_map(Stretch::Zeros),
        (blocks.clone(), any::<u8>()).prop_map(|(count, seed)| Stretch::Noise(count, seed)),
        blocks.prop_map(Stretch::Text),
    ];
    let compression =
        prop::sample::select(vec![Compression::None, Compression::Zstd(1), Compression::Zstd(19)]);
    let runs = prop::collection::vec((any::<prop::sample::Index>(), 1..200u64), 0..4);
    let parts = (prop::collection::vec(stretch, 1..9), 0..8usize, runs, compression);
    (parts, any::<Option<prop::sample::Index>>()).prop_map(
        |((stretches, tail, runs, compression), unreadable)| {
            let mut image = Vec::new();
            for stretch in stretches {
                match stretch {
                    Stretch::Zeros(count) => image.resize(image.len() + count * BLOCK, 0),
                    Stretch::Noise(count, seed) => image.extend(noise(count * BLOCK, seed)),
                    Stretch::Text(count) => image.extend(b"some words. ".repeat(count * 341)),
                }
                image.resize(image.len().next_multiple_of(BLOCK), 7);
            }
            image.resize(image.len() + tail * 512, b't');
            let blocks = image.len().div_ceil(BLOCK);
            let run = |start: usize, count: u64| {
                let offset = (start * BLOCK) as u64;
                ByteRange::new(offset, (count * BLOCK as u64).min(image.len() as u64 - offset))
            };
            let selection = runs.iter().map(|(at, count)| run(at.index(blocks), *count)).collect();
            let unreadable = unreadable.map(|at| run(at.index(blocks), 1)).into_iter().collect();
            Recipe { selection, unreadable, compression, image, bundle: 0xd1 }
        },
    )
}

pub fn damages() -> impl Strategy<Value = (prop::sample::Index, Damage)> {
    let index = any::<prop::sample::Index>;
    let damage = prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(place, bit)| Damage::Flip { place, bit }),
        2 => (index(), 1..40usize).prop_map(|(place, pages)| Damage::Wipe { place, pages }),
        1 => index().prop_map(|place| Damage::Cut { place }),
        2 => (index(), index()).prop_map(|(one, other)| Damage::SwapPages(one, other)),
        1 => Just(Damage::Remove),
    ];
    (index(), damage)
}

pub fn damage(made: &Made, which: prop::sample::Index, damage: &Damage) {
    let mut names = made.folder.names().expect("listed");
    names.retain(|name| name.starts_with("seg-"));
    if names.is_empty() {
        return;
    }
    let name = &names[which.index(names.len())];
    let mut bytes = made.folder.contents(name).expect("there");
    let pages = bytes.len() / BLOCK;
    if pages == 0 && !matches!(damage, Damage::Remove) {
        return;
    }
    match damage {
        Damage::Flip { place, bit } => {
            let at = place.index(bytes.len());
            bytes[at] ^= 1 << (bit % 8);
        }
        Damage::Wipe { place, pages: count } => {
            let start = place.index(pages);
            bytes[start * BLOCK..(start + count).min(pages) * BLOCK].fill(0);
        }
        Damage::Cut { place } => bytes.truncate(place.index(bytes.len())),
        Damage::SwapPages(one, other) => {
            let (low, high) = (one.index(pages), other.index(pages));
            let (low, high) = (low.min(high), low.max(high));
            if low < high {
                let (head, tail) = bytes.split_at_mut(high * BLOCK);
                head[low * BLOCK..][..BLOCK].swap_with_slice(&mut tail[..BLOCK]);
            }
        }
        Damage::Remove => {
            made.folder.remove(name).expect("removed");
            return;
        }
    }
    made.folder.replace(name, bytes);
}

/// What a selection of runs that overlap amounts to.
pub fn selected(recipe: &Recipe) -> Vec<ByteRange> {
    let runs = recipe.selection.iter().map(|range| (range.offset, range.end())).collect();
    joined(runs).into_iter().map(|(start, end)| ByteRange::new(start, end - start)).collect()
}

/// Each starts Python once.
pub fn cases(quick: u32) -> ProptestConfig {
    ProptestConfig {
        cases: if thorough() { 2000 } else { quick },
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(24))]
    #[test]
    fn recover_py_and_we_find_the_same_bytes_and_the_same_losses(
        recipe in recipes(),
        harm in prop::collection::vec(damages(), 0..4),
    ) {
        let mut made = recipe.make();
        if !recipe.selection.is_empty() {
            made.selection = selected(&recipe);
        }
        for (which, kind) in &harm {
            damage(&made, *which, kind);
            if matches!(kind, Damage::Remove) {
                break;
            }
        }
        let theirs = read_by_python(&made).expect("the manifest is whole");
        assert_honest(&theirs, &made, "recover.py");
        // A segment that is missing or cut off we do not even begin with.
        if let Some(ours) = read_by_us(&made) {
            assert_honest(&ours, &made, "the reader");
            // The package blake3 is not there: a hash that was hit is noticed by us alone. And it
            // goes through all pages where we go by the index: one that was moved it may find.
            let hashes = harm.iter().any(|(_, kind)| {
                matches!(kind, Damage::Flip { .. } | Damage::SwapPages(..))
            });
            let within = |run: &(u64, u64)| {
                ours.lost.iter().any(|held| held.0 <= run.0 && run.1 <= held.1)
            };
            prop_assert!(theirs.lost.iter().all(within), "{:?} {:?}", ours.lost, theirs.lost);
            prop_assert!(hashes || ours.lost == theirs.lost, "{:?} {:?}", ours.lost, theirs.lost);
        } else {
            prop_assert!(!theirs.lost.is_empty() || !harm.is_empty());
        }
    }
}

/// Does what README.txt says, in the directory that it lies in, with nothing else.
fn follow_the_readme(directory: &Path, out: &Path, path: &str) -> (i32, String) {
    let text = std::fs::read_to_string(directory.join("README.txt")).expect("a README.txt");
    let without_us = text.split_once("Without it").expect("a way without us").1;
    let line = without_us.lines().find(|line| line.contains("OUT.img")).expect("a command");
    let mut words = line.split_whitespace();
    let (program, rest) = (words.next().expect("a program"), words);
    let rest = rest.take_while(|word| *word != "writes").map(|word| match word {
        "DIRECTORY" => ".".to_owned(),
        "OUT.img" => out.display().to_string(),
        word => word.to_owned(),
    });
    assert_eq!(program, "python3");
    let mut command = Command::new("/usr/bin/python3");
    // -S: without any package that happens to be installed here.
    command.arg("-S").args(rest).current_dir(directory).env_clear().env("PATH", path);
    let done = command.output().expect("python3 runs");
    let said = [done.stdout, done.stderr].concat();
    (done.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn a_user_with_the_medium_alone_restores_the_image_by_its_readme() {
    let place = tempfile::tempdir().expect("a place");
    let nothing = place.path().join("empty");
    std::fs::create_dir(&nothing).expect("made");
    let nothing = nothing.to_str().expect("plain").to_owned();
    for (name, compression) in [("plain", Compression::None), ("packed", Compression::Zstd(3))] {
        let recipe = Recipe { compression, unreadable: Vec::new(), ..Recipe::small() };
        let (directory, out) = (place.path().join(name), place.path().join(format!("{name}.img")));
        write_out(&recipe.make().folder, &directory);
        let (code, said) = follow_the_readme(&directory, &out, &nothing);
        if compression == Compression::None {
            assert_eq!(code, 0, "{said}");
            assert!(said.contains("CRC32C"), "it says what was checked: {said}");
        } else {
            assert_eq!(code, 1, "{said}");
            assert!(said.contains("zstandard") && said.contains("program zstd"), "{said}");
            std::fs::remove_file(&out).expect("what was begun");
            let (code, said) = follow_the_readme(&directory, &out, "/usr/bin:/bin");
            assert_eq!(code, 0, "{said}");
        }
        assert!(std::fs::read(&out).expect("an image") == recipe.image, "{name}");
    }
}

#[test]
fn recover_py_takes_no_pipe_link_or_device_for_a_member() {
    let place = tempfile::tempdir().expect("a place");
    let made = Recipe::small().make();
    for (number, name) in ["manifest.json", "seg-00000000.drs"].into_iter().enumerate() {
        for kind in ["pipe", "link"] {
            let directory = place.path().join(format!("{number}-{kind}"));
            write_out(&made.folder, &directory);
            let member = directory.join(name);
            std::fs::remove_file(&member).expect("removed");
            if kind == "pipe" {
                let mode = rustix::fs::Mode::from(0o600);
                let fifo = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(rustix::fs::CWD, &member, fifo, mode, 0).expect("made");
            } else {
                std::os::unix::fs::symlink("/dev/zero", &member).expect("made");
            }
            let out = place.path().join(format!("{number}-{kind}.img"));
            let (code, said) = recover(&[&directory], &out, PATH);
            assert!(code == 1 || code == 3, "{name} a {kind}: {code}: {said}");
            assert!(said.contains("plain file"), "{name} a {kind}: {said}");
        }
    }
}
