//! Bundles over several media: what is on them together is the source, each is whole by itself,
//! and full ones cost nothing but the next.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::*;
use crate::device::{CrashingFolder, Folder, FolderFile, Power, RamDevice, RamFolder};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bundle::Done;
use crate::units::BlockSize;

const SIZE: usize = (20 << 20) + 4096 + 512;

/// A folder on a file system with so many bytes.
#[derive(Clone, Debug)]
struct Limited {
    folder: RamFolder,
    free: Arc<AtomicU64>,
    /// Whether it says how many are free.
    tells: bool,
}

#[derive(Debug)]
struct LimitedFile {
    file: Arc<dyn FolderFile>,
    free: Arc<AtomicU64>,
}

impl Limited {
    fn new(free: u64, tells: bool) -> Self {
        Self { folder: RamFolder::new(), free: Arc::new(AtomicU64::new(free)), tells }
    }
}

impl FolderFile for LimitedFile {
    fn length(&self) -> Result<u64> {
        self.file.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let grown = (offset + data.len() as u64).saturating_sub(self.file.length()?);
        let taken = self
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(grown));
        if taken.is_err() {
            return Err(Error::device("write", &std::io::Error::from_raw_os_error(28)));
        }
        self.file.write_at(offset, data)
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }
}

impl Folder for Limited {
    fn path(&self) -> &Path {
        Path::new("limited")
    }

    fn names(&self) -> Result<Vec<String>> {
        self.folder.names()
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let file = self.folder.create(name)?;
        Ok(Arc::new(LimitedFile { file, free: Arc::clone(&self.free) }))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        self.folder.open(name)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.folder.rename(from, to)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        if let Ok(bytes) = self.folder.contents(name) {
            self.free.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        self.folder.remove(name)
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(self.tells.then(|| self.free.load(Ordering::Relaxed)))
    }
}

struct Shelf(VecDeque<Medium>);

impl Shelf {
    fn of<'a>(folders: impl IntoIterator<Item = &'a dyn CloneFolder>, max: Option<u64>) -> Self {
        let medium = |folder: &dyn CloneFolder| Medium { folder: folder.shared(), bytes_max: max };
        Self(folders.into_iter().map(medium).collect())
    }
}

impl Media for Shelf {
    fn next(&mut self, _: u32) -> Result<Option<Medium>> {
        Ok(self.0.pop_front())
    }

    fn has_more(&self) -> bool {
        !self.0.is_empty()
    }
}

trait CloneFolder {
    fn shared(&self) -> Arc<dyn Folder>;
}

impl<F: Folder + Clone + 'static> CloneFolder for F {
    fn shared(&self) -> Arc<dyn Folder> {
        Arc::new(self.clone())
    }
}

/// Noise with a hole in it.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    blake3::Hasher::new().update(b"media").finalize_xof().fill(&mut bytes);
    bytes[5 << 20..7 << 20].fill(0);
    bytes
}

fn source() -> ImageSource {
    ImageSource::new(Arc::new(RamDevice::from_bytes(image())), BlockSize::DEFAULT).expect("sized")
}

fn options() -> WriterOptions {
    WriterOptions {
        bundle: Uuid::from_u128(0xb0),
        segment_bytes_max: 4 << 20,
        threads: 2,
        ..WriterOptions::default()
    }
}

fn go_on() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Remembers the latest.
#[derive(Default)]
struct Kept(Done);

impl Record for Kept {
    fn keep(&mut self, done: &Done) -> Result<()> {
        self.0 = done.clone();
        Ok(())
    }
}

fn made(shelf: &mut Shelf) -> Result<BundleReport> {
    write(&source(), shelf, &options(), &mut NoRecord, &mut |_| go_on())
}

/// Lays what a medium gives over the ground; nothing of it may be damaged.
fn lay(folder: Arc<dyn Folder>, ground: &mut [u8]) -> Bundle {
    let bundle = Bundle::open_in(folder).expect("whole");
    assert!(bundle.verify(super::tests::CREW, &mut |_| go_on()).expect("gone through").is_whole());
    let mut opener = Opener::new().expect("made");
    for piece in bundle.pieces() {
        let piece = piece.expect("there");
        let run = piece.range.offset as usize..piece.range.end() as usize;
        let mut stored = vec![0; piece.bytes_to_read()];
        piece.read(&mut stored).expect("read");
        match piece.content {
            Content::Zero => ground[run].fill(0),
            _ => {
                let mut plain = vec![0; run.len()];
                let bytes = piece.open(&mut opener, &mut stored, &mut plain).expect("whole");
                ground[run].copy_from_slice(bytes);
            }
        }
    }
    bundle
}

fn used(folder: &RamFolder) -> u64 {
    let names = folder.names().expect("listed");
    names.iter().map(|name| folder.contents(name).expect("there").len() as u64).sum()
}

#[test]
fn the_media_together_are_the_source_and_each_uses_nearly_all_of_its_size() {
    let max = 7 << 20;
    let media = [(); 3].map(|()| RamFolder::new());
    let report = made(&mut Shelf::of(media.iter().map(|one| one as _), Some(max))).expect("made");
    assert_eq!((report.media, report.bytes_left), (3, 0));
    assert_eq!(report.bytes_data + report.bytes_zero, SIZE as u64);
    let mut ground = vec![0xee; SIZE];
    for (number, folder) in [(3, &media[2]), (1, &media[0]), (2, &media[1])] {
        assert!(used(folder) <= max, "medium {number} has {} bytes", used(folder));
        assert!(number == 3 || used(folder) > max - (5 << 18), "{number}: {}", used(folder));
        let bundle = lay(folder.shared(), &mut ground);
        let medium = bundle.manifest().medium.expect("one of several");
        assert_eq!((medium.number, medium.last), (number, number == 3));
        let report = folder.contents("report.json").expect("there");
        let told: serde_json::Value = serde_json::from_slice(&report).expect("JSON");
        assert_eq!(told["medium"], number);
    }
    assert!(ground == image());
    let begin = |folder: &RamFolder| folder.contents("manifest.begin.json").expect("there");
    assert!(begin(&media[0]) == begin(&media[1]) && begin(&media[1]) == begin(&media[2]));
}

#[test]
fn a_medium_that_was_not_needed_says_so_and_is_the_last() {
    let media = [(); 3].map(|()| RamFolder::new());
    let report = made(&mut Shelf::of(media.iter().map(|one| one as _), None)).expect("made");
    assert_eq!((report.media, report.bytes_left), (3, 0));
    let mut ground = vec![0xee; SIZE];
    for (number, folder) in (1..).zip(&media) {
        let bundle = lay(folder.shared(), &mut ground);
        assert_eq!(bundle.manifest().medium.expect("one of several").last, number == 3);
        assert_eq!(bundle.segments().is_empty(), number > 1);
    }
    assert!(ground == image());
}

#[test]
fn a_file_system_that_is_full_ends_a_medium_whether_it_tells_its_room_or_not() {
    for tells in [true, false] {
        let media = [(); 4].map(|()| Limited::new(7 << 20, tells));
        let mut shelf = Shelf::of(media.iter().map(|one| one as _), None);
        let report = made(&mut shelf).expect("made");
        assert_eq!(report.bytes_left, 0);
        let mut ground = vec![0xee; SIZE];
        for folder in &media[..report.media as usize] {
            lay(folder.shared(), &mut ground);
        }
        assert!(ground == image(), "tells: {tells}");
        let left = media[0].free.load(Ordering::Relaxed);
        // What is not told is found out by a segment that does not fit.
        let most = if tells { 5 << 19 } else { options().segment_bytes_max };
        assert!(left < most, "{left} bytes are left on the first, tells: {tells}");
    }
}

#[test]
fn what_has_no_medium_yet_is_gone_on_with_on_another() {
    let (first, second) = (RamFolder::new(), RamFolder::new());
    let mut kept = Kept::default();
    let go = &mut |_: &BundleProgress| go_on();
    let mut shelf = Shelf::of([&first as _], Some(12 << 20));
    let report = write(&source(), &mut shelf, &options(), &mut kept, go).expect("made");
    assert_eq!((report.media, report.bytes_left > 0), (1, true));
    let begun =
        BegunBundle::from_bytes(first.contents("manifest.begin.json").expect("there"), None);
    let begun = begun.expect("whole");
    // The first one is passed over, wherever it is named.
    let mut shelf = Shelf::of([&first as _, &second as _], Some(12 << 20));
    let done = kept.0.clone();
    let report = write_on(&source(), &mut shelf, &options(), (&begun, done), &mut kept, go);
    let report = report.expect("made");
    assert_eq!((report.media, report.bytes_left), (2, 0));
    assert_eq!(report.bytes_data + report.bytes_zero, SIZE as u64, "of both media");
    let mut ground = vec![0xee; SIZE];
    lay(second.shared(), &mut ground);
    lay(first.shared(), &mut ground);
    assert!(ground == image());
}

#[test]
fn a_medium_too_small_for_a_segment_is_refused_in_words_and_left_as_it_was() {
    for folder in [Limited::new(80 << 10, true), Limited::new(80 << 10, false)] {
        let refused = made(&mut Shelf::of([&folder as _], None)).expect_err("too small");
        assert_eq!(refused.kind(), ErrorKind::Device);
        assert!(refused.to_string().contains("at least one segment"), "{refused}");
    }
    let folder = RamFolder::new();
    let refused = made(&mut Shelf::of([&folder as _], Some(80 << 10))).expect_err("too small");
    assert!(refused.to_string().contains("at least one segment"), "{refused}");
    assert!(folder.names().expect("listed").is_empty());
}

#[test]
fn a_foreign_medium_is_refused_and_left_alone() {
    let folder = RamFolder::new();
    folder.replace("mine.txt", b"x".to_vec());
    let refused = made(&mut Shelf::of([&folder as _], None)).expect_err("not empty");
    assert_eq!(refused.kind(), ErrorKind::Usage);
    assert_eq!(folder.names().expect("listed"), ["mine.txt"]);
}

/// A source that fits three segments of the smallest size.
fn small() -> (Vec<u8>, ImageSource) {
    let mut bytes = image();
    bytes.truncate((2 << 20) + 512);
    let device = Arc::new(RamDevice::from_bytes(bytes.clone()));
    (bytes, ImageSource::new(device, BlockSize::DEFAULT).expect("sized"))
}

#[test]
fn a_power_failure_at_any_event_costs_at_most_the_open_segment() {
    let (bytes, source) = small();
    let options = WriterOptions { segment_bytes_max: 2 << 20, ..options() };
    let begun = BegunBundle::new(&source, &options).expect("valid");
    let begin = || (&begun, Done::default());
    let go = &mut |_: &BundleProgress| go_on();
    let mut events = 0;
    for event in 0.. {
        let power = Power::failing_at(event, event % 2 == 0);
        let folder = CrashingFolder::new(Arc::clone(&power));
        let mut shelf = Shelf::of([&folder as _], None);
        if write_on(&source, &mut shelf, &options, begin(), &mut NoRecord, go).is_ok() {
            break;
        }
        events += 1;
        // As after kill -9, as after a power failure, and between.
        for keeps in [usize::MAX, event as usize / 2 % 2] {
            let after = folder.crash(&mut |most| keeps.min(most), &Power::steady());
            let closed_before = closed(&folder, &begun);
            if let Ok(found) = Bundle::open_in(after.shared()) {
                let whole = found
                    .verify(super::tests::CREW, &mut |_| go_on())
                    .expect("gone through")
                    .is_whole();
                assert!(whole, "event {event}, {keeps}: a manifest on a medium that is not whole");
            }
            let mut shelf = Shelf::of([&after as _], None);
            let mut told = Vec::new();
            let mut first = |seen: &BundleProgress| {
                told.push(seen.bytes_done);
                go_on()
            };
            let end = write_on(&source, &mut shelf, &options, begin(), &mut NoRecord, &mut first);
            assert_eq!(end.expect("gone on with").bytes_left, 0, "event {event}, {keeps}");
            if keeps == usize::MAX {
                // A segment of the smallest size holds one whole chunk.
                let kept = (closed_before as u64) << 20;
                assert!(
                    told.first().is_none_or(|first| *first >= kept),
                    "event {event}: {closed_before} were closed"
                );
            }
            let mut ground = vec![0xee; bytes.len()];
            lay(after.shared(), &mut ground);
            assert!(ground == bytes, "event {event}, {keeps}");
        }
    }
    assert!(events > 20, "{events} events");
}

/// How many segments have a trailer.
fn closed(folder: &CrashingFolder, begun: &BegunBundle) -> usize {
    let copy = folder.crash(&mut |most| most, &Power::steady());
    match super::resume::examine(&copy, begun, &Done::default()) {
        Ok(super::resume::Found::Begun(held)) => held.len(),
        _ => 0,
    }
}

#[test]
fn a_file_system_that_fills_up_at_any_step_never_leaves_a_medium_that_is_not_whole() {
    let (bytes, source) = small();
    let options = WriterOptions { segment_bytes_max: 2 << 20, ..options() };
    let whole = {
        let folder = RamFolder::new();
        let mut shelf = Shelf::of([&folder as _], None);
        write(&source, &mut shelf, &options, &mut NoRecord, &mut |_| go_on()).expect("made");
        used(&folder)
    };
    let step = whole / 9;
    for free in (1..11).map(|steps| steps * step).chain([whole - 1, whole - 700, whole - 5000]) {
        let first = Limited::new(free, false);
        let rest = RamFolder::new();
        let mut shelf = Shelf::of([&first as _, &rest as _], None);
        let made = write(&source, &mut shelf, &options, &mut NoRecord, &mut |_| go_on());
        let Ok(report) = made else {
            assert!(first.names().expect("listed").is_empty(), "{free} bytes: something is left");
            continue;
        };
        assert_eq!((report.media, report.bytes_left), (2, 0), "{free} bytes");
        let mut ground = vec![0xee; bytes.len()];
        lay(first.shared(), &mut ground);
        lay(rest.shared(), &mut ground);
        assert!(ground == bytes, "{free} bytes");
    }
}
