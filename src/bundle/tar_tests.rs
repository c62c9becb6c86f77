//! Bundles as tars: through what can be read once, in any order of members, cut off, damaged.

#![expect(clippy::disallowed_methods, reason = "tests write files")]

use std::io::Cursor;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::tests::{go_on, image, options, restored, source_of};
use super::*;
use crate::device::{ByteSink, ByteStream, Engine, Folder, Stop, TarFolder, TarIndex};
use crate::error::{ErrorKind, Result};
use crate::format::bundle::BundleKey;
use crate::format::tar::{encode_end, encode_member};

#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl ByteSink for Shared {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.lock().expect("whole").extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Gives a few bytes at a time, as a pipe may.
#[derive(Debug)]
struct Trickle(Cursor<Vec<u8>>, usize);

impl ByteStream for Trickle {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.1 = self.1 * 7 % 9973 + 1;
        let most = buffer.len().min(self.1);
        ByteStream::read(&mut self.0, &mut buffer[..most])
    }
}

fn tar_of(options: &WriterOptions) -> Vec<u8> {
    let sink = Shared::default();
    let tar = TarFolder::new(Box::new(sink.clone()), Path::new("tar"), 7);
    BundleWriter::create_in(&tar, &source_of(image()), options, &mut |_| go_on()).expect("made");
    tar.finish().expect("ended");
    std::mem::take(&mut *sink.0.lock().expect("whole"))
}

fn stream(bytes: Vec<u8>) -> Result<TarStream> {
    TarStream::open(Box::new(Trickle(Cursor::new(bytes), 1)), "memory", Stop::default())
}

fn crew() -> Crew {
    Crew { engine: Engine::Threads, threads: 2, at_once: true }
}

fn verified(bytes: Vec<u8>) -> Result<VerifyReport> {
    stream(bytes)?.verify(crew(), &mut |_| go_on())
}

/// Name, header and payload of each member.
fn members(tar: &[u8]) -> Vec<(String, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let place = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(place.path(), tar).expect("written");
    let mut walker = crate::device::TarWalker::new(Box::new(Cursor::new(tar.to_vec())));
    let mut found = Vec::new();
    let mut at = 0;
    while let crate::device::Step::Member(member) = walker.next_member().expect("whole") {
        let payload = member.position as usize..(member.position + member.bytes) as usize;
        let end = payload.end.next_multiple_of(512);
        found.push((member.name, at..payload.start, payload));
        at = end;
    }
    found
}

/// A plain tar of some of the members, in that order, in a directory.
fn again(tar: &[u8], order: &[usize]) -> Vec<u8> {
    let mut bytes = without_end(tar, order);
    let end = encode_end(bytes.len() as u64);
    bytes.extend_from_slice(&end);
    bytes
}

fn without_end(tar: &[u8], order: &[usize]) -> Vec<u8> {
    let all = members(tar);
    let mut bytes = Vec::new();
    for &index in order {
        let (name, _, payload) = &all[index];
        let name = format!("db.drb/{name}");
        let headers = encode_member(bytes.len() as u64, &name, payload.len() as u64, 1);
        bytes.extend_from_slice(&headers[headers.len() - 512..]);
        bytes.extend_from_slice(&tar[payload.clone()]);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes
}

fn is_laid_over_ground(found: &[u8]) {
    for (at, (found, expected)) in found.chunks(512).zip(image().chunks(512)).enumerate() {
        let ground = found.iter().all(|byte| *byte == 0xee);
        assert!(found == expected || ground, "neither the ground nor the image at {}", at * 512);
    }
}

#[test]
fn what_goes_into_a_tar_comes_out_of_the_stream_and_of_the_file() {
    for compression in [Compression::None, Compression::Zstd(3)] {
        let tar = tar_of(&WriterOptions { compression, ..options() });
        let source = stream(tar.clone()).expect("a bundle");
        assert_eq!(restored(&source), (image(), 0));
        assert!(source.shortfall().is_none() && source.blemishes().is_empty());
        assert_eq!(restored(&source).0, vec![0xee; image().len()], "it can be read only once");
        let report = verified(tar.clone());
        let report = report.expect("gone through");
        assert!(report.is_whole() && report.bytes == image().len() as u64, "{report:?}");
        let place = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(place.path(), &tar).expect("written");
        let bundle = Bundle::open(place.path()).expect("a bundle");
        assert_eq!(restored(&bundle), (image(), 0));
        assert!(bundle.verify(crew(), &mut |_| go_on()).expect("read").is_whole());
        assert_eq!(
            &stream(tar).expect("a bundle").read_manifest().expect("read"),
            bundle.manifest()
        );
    }
}

#[test]
fn an_encrypted_bundle_comes_out_of_a_stream_with_its_key_only() {
    let key = BundleKey::new(options().bundle, [1; 32]);
    let wrapped_key = b"wrapped".to_vec();
    let encryption = Some(Encryption { key: key.clone(), wrapped_key, salts: random_salt });
    let tar = tar_of(&WriterOptions { encryption, ..options() });
    let source = stream(tar.clone()).expect("a bundle");
    assert_eq!(source.wrapped_key().expect("it came").as_deref(), Some(&b"wrapped"[..]));
    let wrong = BundleKey::new(options().bundle, [2; 32]);
    assert_eq!(source.unlock(Some(&wrong)).expect_err("refused").kind(), ErrorKind::Locked);
    assert_eq!(source.unlock(None).expect_err("refused").kind(), ErrorKind::Locked);
    source.unlock(Some(&key)).expect("its key");
    assert_eq!(restored(&source), (image(), 0));
    assert!(source.shortfall().is_none() && source.blemishes().is_empty());
    let locked = stream(tar.clone()).expect("a bundle");
    let refused = locked.pieces().next().expect("one").expect_err("no key was given");
    assert_eq!(refused.kind(), ErrorKind::Locked);
    let mut bad = tar.clone();
    let segment = members(&tar).into_iter().find(|(name, ..)| name.ends_with(".drs"));
    bad[segment.expect("one").2.start + 70_000] ^= 1;
    let source = stream(bad).expect("a bundle");
    source.unlock(Some(&key)).expect("its key");
    let (found, damaged) = restored(&source);
    assert_eq!(damaged, 1);
    is_laid_over_ground(&found);
    let plain = stream(tar_of(&options())).expect("a bundle");
    assert!(plain.unlock(Some(&key)).is_err(), "it may have been exchanged");
}

#[test]
fn every_payload_of_a_tar_is_aligned() {
    let tar = tar_of(&options());
    let all = members(&tar);
    assert!(all.iter().all(|(_, _, payload)| payload.start.is_multiple_of(4096)));
    let names: Vec<&str> = all.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(&names[..3], ["README.txt", "recover.py", "manifest.begin.json"]);
    assert_eq!(names.last(), Some(&"manifest.json"));
}

#[test]
fn members_come_in_any_order() {
    let tar = tar_of(&options());
    let count = members(&tar).len();
    let forward: Vec<usize> = (0..count).collect();
    let mut backward = forward.clone();
    backward.reverse();
    let mut turned = forward.clone();
    turned.rotate_left(3);
    for order in [forward, backward, turned] {
        let source = stream(again(&tar, &order)).expect("a bundle");
        assert_eq!(restored(&source), (image(), 0), "{order:?}");
        assert!(source.shortfall().is_none(), "{order:?}");
    }
}

#[test]
fn a_tar_that_is_cut_off_gives_what_came_and_says_so() {
    let tar = tar_of(&options());
    let all = members(&tar);
    let whole = all.last().expect("the manifest").2.end;
    let identity = all[2].2.end;
    for length in (identity..whole).step_by(450_001).chain([whole - 1]) {
        let source = stream(tar[..length].to_vec()).expect("its identity came");
        let (found, damaged) = restored(&source);
        is_laid_over_ground(&found);
        assert_eq!(damaged, 0, "what did not come is not damaged");
        assert!(source.shortfall().is_some(), "{length} bytes");
    }
    let source = stream(tar[..whole].to_vec()).expect("a bundle");
    assert_eq!(restored(&source), (image(), 0));
    assert!(source.shortfall().is_none(), "only the padding did not come");
    assert!(stream(tar[..identity - 1].to_vec()).is_err(), "nobody knows whose it is");
}

#[test]
fn a_tar_that_is_cut_off_within_a_segment_says_so_also_where_the_manifest_came_first() {
    let tar = tar_of(&options());
    let all = members(&tar);
    let is_last = |index: &usize| all[*index].0.ends_with(".drs");
    let (last, first): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(is_last);
    let mut bytes = again(&tar, &[first, last].concat());
    bytes.truncate(bytes.len() - (64 << 10));
    let source = stream(bytes).expect("a bundle");
    let (found, damaged) = restored(&source);
    is_laid_over_ground(&found);
    assert!(damaged > 0);
    let shortfall = source.shortfall().expect("cut off").to_string();
    assert!(shortfall.contains("have not come whole"), "{shortfall}");
}

#[test]
fn a_damaged_page_costs_its_batch_and_nothing_else() {
    let tar = tar_of(&options());
    let all = members(&tar);
    let segments: Vec<_> = all.iter().filter(|(name, ..)| name.ends_with(".drs")).collect();
    assert!(segments.len() > 1);
    for (index, page) in [(0, 0), (0, 1), (1, 1), (1, 3)] {
        let mut bad = tar.clone();
        bad[segments[index].2.start + page * 4096 + 100] ^= 1;
        let source = stream(bad).expect("a bundle");
        let (found, damaged) = restored(&source);
        is_laid_over_ground(&found);
        // The header of a segment can be told from that of the bundle.
        assert_eq!(damaged > 0, page > 0, "segment {index}, page {page}");
        let bytes = found.iter().zip(image());
        let lost = bytes.filter(|(found, byte)| *byte != 0 && **found != *byte).count();
        assert!(lost <= 2 << 20, "{lost} bytes lost");
        assert!(source.shortfall().is_none());
        assert_eq!(page < 3, !source.blemishes().is_empty(), "segment {index}, page {page}");
    }
}

#[test]
fn a_segment_that_is_not_in_the_tar_is_missing_and_not_zero() {
    let tar = tar_of(&options());
    let all = members(&tar);
    let order: Vec<usize> =
        (0..all.len()).filter(|index| all[*index].0 != "seg-00000000.drs").collect();
    let source = stream(again(&tar, &order)).expect("a bundle");
    let (found, damaged) = restored(&source);
    assert!(damaged > 0 && found[0] == 0xee);
    is_laid_over_ground(&found);
}

#[test]
fn members_of_two_bundles_are_refused_before_any_of_the_second_is_given() {
    let tar = tar_of(&options());
    let other = tar_of(&WriterOptions { bundle: uuid::Uuid::from_u128(1), ..options() });
    let end = members(&tar).last().expect("members").2.end.next_multiple_of(512);
    let mixed = [&tar[..end], &other[..]].concat();
    let source = stream(mixed).expect("its identity came");
    let last = source.pieces().last().expect("pieces").expect_err("refused");
    assert_eq!(last.kind(), ErrorKind::Identity);
}

#[test]
fn hostile_tars_are_refused() {
    let tar = tar_of(&options());
    let with = |name: &str, bytes: u64| {
        let headers = encode_member(0, name, bytes, 1);
        [&headers[headers.len() - 512..], &tar[..]].concat()
    };
    let end = |bytes: Vec<u8>| stream(bytes).map(|source| restored(&source)).err();
    let kind = |bytes: Vec<u8>| end(bytes).map(|error| error.kind());
    assert_eq!(kind(with("../manifest.json", 0)), Some(ErrorKind::Format));
    assert_eq!(kind(with("/manifest.json", 0)), Some(ErrorKind::Format));
    assert_eq!(kind(with("manifest.json", 200 << 20)), Some(ErrorKind::Format));
    assert_eq!(kind(with("seg-00000000.drs", 2 << 30)), Some(ErrorKind::Format));
    assert_eq!(kind(with("other/notes.txt", 0)), None, "what is no member is passed by");
    let two = [without_end(&tar, &[2]), tar.clone()].concat();
    let refused = stream(two).expect("known").pieces().last().expect("one");
    assert_eq!(refused.expect_err("two directories").kind(), ErrorKind::Format);
}

/// A stream that waits for ever, unless it is stopped.
#[derive(Debug)]
struct Stalled(Cursor<Vec<u8>>, Stop);

impl ByteStream for Stalled {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match ByteStream::read(&mut self.0, buffer)? {
                0 => self.1.check()?,
                read => return Ok(read),
            }
        }
    }
}

#[test]
fn a_merge_of_a_stream_that_stalls_can_be_stopped() {
    let tar = tar_of(&options());
    let half = tar[..tar.len() / 2].to_vec();
    let stop = Stop::default();
    let stalled = Stalled(Cursor::new(half), stop.clone());
    let source = TarStream::open(Box::new(stalled), "memory", stop).expect("a bundle");
    let mut asked = 0;
    let stopped = source.verify(crew(), &mut |_| {
        asked += 1;
        if asked > 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Interrupted);
}

#[test]
fn an_archive_without_its_end_says_so() {
    let tar = tar_of(&options());
    let place = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(place.path(), &tar[..tar.len() / 2]).expect("written");
    let index = TarIndex::open(place.path(), |_| true).expect("readable");
    assert!(!index.is_whole() && index.names().expect("listed").len() > 2);
    assert_eq!(Bundle::open(place.path()).expect_err("no manifest").kind(), ErrorKind::Format);
}
