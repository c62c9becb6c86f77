//! Images written out of bundles: raw and qcow2, in order and in any order, whole and not.

use std::io::Cursor;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::tests::{SIZE, go_on, image, options, source_of, with_changed};
use super::*;
use crate::device::{ByteSink, Device, RamDevice, RamFolder, Stop, TarFolder};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{ByteRange, ByteRuns};
use crate::format::bundle::BaseCut;
use crate::format::tar::encode_end;
use crate::units::{BlockSize, Geometry};

const CLUSTER: usize = 64 << 10;

#[derive(Clone, Debug, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl ByteSink for Sink {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.lock().expect("whole").extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Sink {
    fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().expect("whole"))
    }
}

fn made(bytes: Vec<u8>, options: &WriterOptions) -> RamFolder {
    let folder = RamFolder::new();
    BundleWriter::create_in(&folder, &source_of(bytes), options, &mut |_| go_on()).expect("made");
    folder
}

fn opened(folder: &RamFolder) -> Arc<Bundle> {
    Arc::new(Bundle::open_in(Arc::new(folder.clone())).expect("whole"))
}

fn set_of(folders: &[&RamFolder]) -> Result<MediaSet> {
    MediaSet::new(folders.iter().map(|folder| opened(folder)).collect())
}

fn extraction<'a>(
    source: &'a dyn PieceSource,
    coverage: &'a ByteRuns,
    stop: &'a Stop,
) -> Extraction<'a> {
    Extraction { source, coverage, partial: false, stop }
}

/// A raw image as a stream.
fn raw(set: &MediaSet, partial: bool) -> Result<(Vec<u8>, ExtractReport)> {
    let (sink, stop) = (Sink::default(), Stop::default());
    let how = Extraction { partial, ..extraction(set, set.coverage(), &stop) };
    let report = how.into_raw(Box::new(sink.clone()), &mut |_| go_on())?;
    Ok((sink.taken(), report))
}

/// A qcow2 image.
fn qcow2(set: &MediaSet, partial: bool) -> Result<(Vec<u8>, ExtractReport)> {
    let (sink, stop) = (Sink::default(), Stop::default());
    let how = Extraction { partial, ..extraction(set, set.coverage(), &stop) };
    let plan = how.plan_qcow2()?;
    let bytes = plan.file_bytes();
    let report = how.into_qcow2(plan, Box::new(sink.clone()), &mut |_| go_on())?;
    let image = sink.taken();
    assert_eq!((image.len() as u64, report.bytes_output), (bytes, bytes));
    Ok((image, report))
}

/// The disk of a qcow2 image, by the published format alone.
fn disk_of(image: &[u8]) -> Vec<u8> {
    let at = |place: usize| {
        let entry = image[place..place + 8].try_into().expect("8 bytes");
        (u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00) as usize
    };
    let size = u64::from_be_bytes(image[24..32].try_into().expect("8 bytes")) as usize;
    let mut disk = vec![0; size];
    for (number, cluster) in disk.chunks_mut(CLUSTER).enumerate() {
        let table = at(at(40) + number / 8192 * 8);
        if table == 0 {
            continue;
        }
        let place = at(table + number % 8192 * 8);
        if place != 0 {
            cluster.copy_from_slice(&image[place..place + cluster.len()]);
        }
    }
    disk
}

/// Onto a disk that holds 0xee everywhere.
fn onto(source: &dyn PieceSource, blank: bool, partial: bool) -> Result<(Vec<u8>, ExtractReport)> {
    let size = source.identity().geometry.size() as usize;
    let ram = Arc::new(RamDevice::from_bytes(vec![0xee; size + 4096]));
    let device: Arc<dyn Device> = Arc::clone(&ram) as _;
    let (coverage, stop) = (ByteRuns::default(), Stop::default());
    let how = Extraction { partial, ..extraction(source, &coverage, &stop) };
    let report = how.onto(&device, blank, &mut |_| go_on())?;
    let mut bytes = ram.contents();
    assert!(bytes[size..].iter().all(|byte| *byte == 0xee), "beyond the volume");
    bytes.truncate(size);
    Ok((bytes, report))
}

fn is_whole(report: &ExtractReport, size: usize) {
    assert!(report.is_whole() && report.shortfall.is_none(), "{report:?}");
    assert_eq!(report.bytes_data + report.bytes_zero, size as u64);
    assert_eq!((report.chunks_damaged, report.damaged.len(), report.absent.len()), (0, 0, 0));
}

#[test]
fn every_form_gives_the_image_compressed_or_not() {
    for compression in [Compression::None, Compression::Zstd(3)] {
        let folder = made(image(), &WriterOptions { compression, ..options() });
        let set = set_of(&[&folder]).expect("one bundle");
        set.check_complete().expect("all of it");
        let (bytes, report) = raw(&set, false).expect("written");
        assert!(bytes == image(), "raw");
        is_whole(&report, SIZE);
        let (file, report) = qcow2(&set, false).expect("written");
        assert!(disk_of(&file) == image(), "qcow2");
        is_whole(&report, SIZE);
        assert!(file.len() < 4 << 20, "zeros have no clusters: {}", file.len());
        let (bytes, report) = onto(&set, false, false).expect("written");
        assert!(bytes == image(), "a device");
        is_whole(&report, SIZE);
    }
}

#[test]
fn qcow2_images_of_every_shape_read_as_their_volume() {
    let tail = 512;
    for size in [512, CLUSTER, CLUSTER + tail, 33 * CLUSTER - tail, 40 * CLUSTER] {
        let mut full = image()[..1 << 20].repeat(3);
        full.truncate(size);
        let mut scattered = vec![0; size];
        for at in (0..size).step_by(5 * 4096) {
            scattered[at] = 1;
        }
        let mut last = vec![0; size];
        last[size - 1] = 1;
        for bytes in [full, scattered, last, vec![0; size]] {
            let folder = made(bytes.clone(), &options());
            let set = set_of(&[&folder]).expect("one bundle");
            let (file, report) = qcow2(&set, false).expect("written");
            assert!(disk_of(&file) == bytes, "{size} bytes");
            assert!(file.len().is_multiple_of(CLUSTER));
            is_whole(&report, size);
        }
    }
}

#[test]
fn law_8_zeros_are_written_where_nobody_knows_of_zeros_and_passed_over_where_they_are() {
    let folder = made(image(), &options());
    let set = set_of(&[&folder]).expect("one bundle");
    let (bytes, report) = onto(&set, true, false).expect("written");
    let untouched = bytes.iter().filter(|byte| **byte == 0xee).count() as u64;
    assert!(untouched >= report.bytes_zero && report.bytes_zero > 2 << 20, "{report:?}");
    assert!(onto(&set, false, false).expect("written").0 == image());
}

#[test]
fn law_9_a_damaged_chunk_is_zeros_in_a_stream_and_nothing_on_a_device_and_is_reported() {
    let folder = made(image(), &options());
    let (whole, _) = qcow2(&set_of(&[&folder]).expect("one bundle"), false).expect("written");
    let bad = with_changed(&folder, "seg-00000000.drs", |bytes| bytes[40_000] ^= 1);
    let set = set_of(&[&bad]).expect("one bundle");
    let (bytes, report) = raw(&set, false).expect("written");
    let [damaged] = report.damaged[..] else { panic!("one chunk: {report:?}") };
    assert_eq!((report.chunks_damaged, report.bytes_damaged), (1, damaged.length));
    assert!(!report.is_whole() && report.bytes_absent == 0);
    let run = damaged.offset as usize..damaged.end() as usize;
    let mut expected = image();
    expected[run.clone()].fill(0);
    assert!(bytes == expected, "raw");
    let (file, report) = qcow2(&set, false).expect("written");
    assert_eq!(report.damaged, [damaged]);
    assert!(disk_of(&file) == expected, "qcow2");
    let differs: Vec<usize> = (0..file.len()).filter(|at| file[*at] != whole[*at]).collect();
    assert!(differs.len() <= damaged.length as usize, "its tables are as without the damage");
    let (bytes, report) = onto(&set, false, false).expect("written");
    expected[run].fill(0xee);
    assert!(bytes == expected && report.damaged == [damaged], "a device");
}

#[test]
fn a_damaged_descriptor_page_costs_what_it_describes() {
    let folder = made(image(), &options());
    let bad = with_changed(&folder, "seg-00000001.drs", |bytes| bytes[4096 + 99] ^= 1);
    let set = set_of(&[&bad]).expect("one bundle");
    let mut expected = image();
    let (bytes, report) = raw(&set, false).expect("written");
    assert!(report.bytes_damaged > 0 && report.chunks_damaged > 0, "{report:?}");
    for run in &report.damaged {
        expected[run.offset as usize..run.end() as usize].fill(0);
    }
    assert!(bytes == expected, "raw");
    let (file, found) = qcow2(&set, false).expect("written");
    assert!(disk_of(&file) == expected, "qcow2");
    assert_eq!(found.damaged, report.damaged);
    let (_, found) = onto(&set, true, false).expect("written");
    assert_eq!(found.damaged, report.damaged);
}

fn large_image() -> Vec<u8> {
    image()[..1 << 20].repeat(10)
}

/// That over three media.
fn media() -> Vec<RamFolder> {
    struct Shelf(Vec<RamFolder>);
    impl Media for Shelf {
        fn next(&mut self, _: u32) -> Result<Option<Medium>> {
            let medium =
                |folder| Medium { folder: Arc::new(folder) as _, bytes_max: Some(5 << 20) };
            Ok(self.0.pop().map(medium))
        }
        fn has_more(&self) -> bool {
            !self.0.is_empty()
        }
    }
    let folders = vec![RamFolder::new(), RamFolder::new(), RamFolder::new()];
    let mut shelf = Shelf(folders.iter().rev().cloned().collect());
    let report =
        write(&source_of(large_image()), &mut shelf, &options(), &mut NoRecord, &mut |_| go_on());
    assert_eq!(report.expect("made").bytes_left, 0);
    folders
}

#[test]
fn several_media_in_any_order_and_twice_give_the_image() {
    let folders = media();
    let bytes = large_image();
    let mut order: Vec<&RamFolder> = folders.iter().rev().collect();
    order.push(&folders[0]);
    let set = set_of(&order).expect("one bundle");
    set.check_complete().expect("all of it");
    let (file, report) = qcow2(&set, false).expect("written");
    assert!(disk_of(&file) == bytes && raw(&set, false).expect("written").0 == bytes);
    is_whole(&report, bytes.len());
}

#[test]
fn a_medium_that_is_not_here_is_asked_for_and_what_it_holds_is_absent_not_zero() {
    let folders = media();
    let rest: Vec<&RamFolder> = folders.iter().skip(1).collect();
    let set = set_of(&rest).expect("one bundle");
    let asked = set.check_complete().expect_err("one is missing");
    assert_eq!(asked.kind(), ErrorKind::NextMedium);
    assert!(asked.to_string().contains("media 2, 3 of 3"), "{asked}");
    let (bytes, report) = raw(&set, true).expect("written");
    let [absent] = report.absent[..] else { panic!("one run: {report:?}") };
    assert_eq!((absent.offset, report.bytes_absent), (0, absent.length));
    assert_eq!((report.chunks_damaged, report.bytes_damaged), (0, 0), "absent is not damaged");
    let start = absent.length as usize;
    assert!(bytes[..start].iter().all(|byte| *byte == 0));
    assert!(bytes[start..] == large_image()[start..]);
    let (bytes, report) = onto(&set, false, true).expect("written");
    assert!(bytes[..start].iter().all(|byte| *byte == 0xee), "left as it was");
    assert_eq!(report.absent, [absent]);
    let (_, report) = qcow2(&set, true).expect("written");
    assert_eq!(report.absent, [absent]);
}

#[test]
fn what_the_bundle_does_not_include_is_refused_unless_a_part_is_wanted() {
    let selection = vec![ByteRange::new(4096, 1 << 20), ByteRange::new(4 << 20, 8192)];
    let folder = made(image(), &WriterOptions { selection, ..options() });
    let set = set_of(&[&folder]).expect("one bundle");
    assert_eq!(set.check_complete().expect_err("a part").kind(), ErrorKind::Usage);
    assert_eq!(onto(&set, false, false).expect_err("a part").kind(), ErrorKind::Usage);
    let (bytes, report) = raw(&set, true).expect("written");
    let gaps = set.coverage().gaps(ByteRange::new(0, SIZE as u64));
    assert_eq!((report.absent.len(), &report.absent), (3, &gaps));
    assert_eq!(report.bytes_absent, (SIZE - (1 << 20) - 8192) as u64);
    let mut expected = image();
    for gap in gaps {
        expected[gap.offset as usize..gap.end() as usize].fill(0);
    }
    assert!(bytes == expected);
    assert!(disk_of(&qcow2(&set, true).expect("written").0) == expected);
}

#[test]
fn an_incremental_bundle_is_no_image_and_the_way_to_one_is_told() {
    #[derive(Debug)]
    struct Bound(ImageSource);
    impl Source for Bound {
        fn identity(&self) -> Identity {
            Identity { volume: Uuid::from_u128(5), generation: 6, cut: 7, ..self.0.identity() }
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            self.0.read_at(offset, buffer)
        }
    }
    let folder = RamFolder::new();
    let how = WriterOptions {
        selection: vec![ByteRange::new(4096, 8192)],
        base: Some(BaseCut { generation: 6, cut: 3, scope: None }),
        ..options()
    };
    BundleWriter::create_in(&folder, &Bound(source_of(image())), &how, &mut |_| go_on())
        .expect("made");
    let set = set_of(&[&folder]).expect("one bundle");
    let refused = set.check_complete().expect_err("a part");
    assert_eq!(refused.kind(), ErrorKind::Usage);
    assert!(refused.to_string().contains("incremental"), "{refused}");
}

#[test]
fn media_of_two_bundles_are_refused() {
    let other = WriterOptions { bundle: Uuid::from_u128(0xb1), ..options() };
    let (one, other) = (made(image(), &options()), made(image(), &other));
    assert_eq!(set_of(&[&one, &other]).expect_err("two").kind(), ErrorKind::Identity);
    let begun_again = made(image(), &WriterOptions { created_unix_s: 7, ..options() });
    assert_eq!(set_of(&[&one, &begun_again]).expect_err("two").kind(), ErrorKind::Identity);
    let mut changed = image();
    changed[0] ^= 1;
    let differing = made(changed, &options());
    assert_eq!(set_of(&[&one, &differing]).expect_err("two").kind(), ErrorKind::Identity);
}

fn tar() -> Vec<u8> {
    let sink = Sink::default();
    let tar = TarFolder::new(Box::new(sink.clone()), Path::new("tar"), 7);
    BundleWriter::create_in(&tar, &source_of(image()), &options(), &mut |_| go_on()).expect("made");
    tar.finish().expect("ended");
    sink.taken()
}

fn stream_of(bytes: Vec<u8>, stop: &Stop) -> TarStream {
    TarStream::open(Box::new(Cursor::new(bytes)), "memory", stop.clone()).expect("a bundle")
}

#[test]
fn a_stream_is_extracted_as_it_comes_and_cannot_be_a_qcow2_image() {
    let stop = Stop::default();
    let stream = stream_of(tar(), &stop);
    let coverage = stream.selection().expect("told first");
    let sink = Sink::default();
    let how = extraction(&stream, &coverage, &stop);
    assert_eq!(how.plan_qcow2().expect_err("a stream").kind(), ErrorKind::Usage);
    let report = how.into_raw(Box::new(sink.clone()), &mut |_| go_on()).expect("written");
    assert!(sink.taken() == image());
    is_whole(&report, SIZE);
    let (bytes, report) = onto(&stream_of(tar(), &stop), false, false).expect("written");
    assert!(bytes == image());
    is_whole(&report, SIZE);
}

#[test]
fn a_stream_that_is_cut_off_fails_unless_a_part_is_wanted() {
    let mut bytes = tar();
    bytes.truncate(bytes.len() / 2);
    for partial in [false, true] {
        let stop = Stop::default();
        let stream = stream_of(bytes.clone(), &stop);
        let coverage = stream.selection().expect("told first");
        let sink = Sink::default();
        let how = Extraction { partial, ..extraction(&stream, &coverage, &stop) };
        let done = how.into_raw(Box::new(sink.clone()), &mut |_| go_on());
        let laid = onto(&stream_of(bytes.clone(), &stop), false, partial);
        if !partial {
            assert_eq!(done.expect_err("cut off").kind(), ErrorKind::Integrity);
            assert_eq!(laid.expect_err("cut off").kind(), ErrorKind::Integrity);
            continue;
        }
        let report = done.expect("a part");
        assert!(report.shortfall.is_some() && report.bytes_absent > 0, "{report:?}");
        assert_eq!(
            (report.bytes_absent, report.bytes_damaged),
            (laid.expect("").1.bytes_absent, 0)
        );
        let written = sink.taken();
        assert_eq!(written.len(), SIZE);
        let came = (SIZE as u64 - report.bytes_absent) as usize;
        assert!(written[..came] == image()[..came]);
    }
}

#[test]
fn a_stream_whose_end_does_not_come_is_no_whole_image_even_if_all_bytes_came() {
    let mut bytes = tar();
    let manifest = bytes.windows(13).rposition(|part| part == b"manifest.json").expect("named");
    bytes.truncate(manifest / 4096 * 4096);
    let at = bytes.len() as u64;
    bytes.extend(encode_end(at));
    let stop = Stop::default();
    let stream = stream_of(bytes.clone(), &stop);
    let coverage = stream.selection().expect("told first");
    let done = extraction(&stream, &coverage, &stop)
        .into_raw(Box::new(Sink::default()), &mut |_| go_on())
        .expect_err("no manifest");
    assert_eq!(done.kind(), ErrorKind::Integrity);
    assert!(onto(&stream_of(bytes, &stop), false, false).is_err());
}

/// Pieces of a device as they are said to be, and others when asked again.
#[derive(Debug)]
struct Pretended {
    device: Arc<dyn Device>,
    rounds: Mutex<Vec<Vec<ByteRange>>>,
}

impl Pretended {
    fn new(rounds: &[&[(u64, u64)]]) -> Self {
        let range = |(offset, length): &(u64, u64)| ByteRange::new(*offset, *length);
        let rounds = rounds.iter().rev().map(|runs| runs.iter().map(range).collect()).collect();
        let device = Arc::new(RamDevice::from_bytes(vec![7; 4 * CLUSTER]));
        Self { device, rounds: Mutex::new(rounds) }
    }
}

impl PieceSource for Pretended {
    fn name(&self) -> String {
        "pretended".into()
    }

    fn identity(&self) -> Identity {
        let geometry = Geometry::new(self.device.size(), BlockSize::DEFAULT).expect("valid");
        Identity { volume: Uuid::nil(), geometry, generation: 0, cut: 0 }
    }

    fn bytes_total(&self) -> u64 {
        self.device.size()
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let runs = self.rounds.lock().expect("whole").pop().expect("asked as often as said");
        let piece = |range| Piece { range, content: Content::Plain(Arc::clone(&self.device)) };
        Box::new(runs.into_iter().map(move |range| Ok(piece(range))))
    }
}

#[test]
fn what_a_medium_has_only_when_it_is_read_again_has_no_place_and_is_reported() {
    let cluster = CLUSTER as u64;
    let source = Pretended::new(&[&[(0, cluster)], &[(0, cluster), (2 * cluster, 4096)]]);
    let (coverage, sink, stop) = (ByteRuns::default(), Sink::default(), Stop::default());
    let how = Extraction { partial: true, ..extraction(&source, &coverage, &stop) };
    let plan = how.plan_qcow2().expect("planned");
    let report = how.into_qcow2(plan, Box::new(sink.clone()), &mut |_| go_on()).expect("written");
    assert_eq!(report.damaged, [ByteRange::new(2 * cluster, 4096)]);
    assert_eq!((report.bytes_data, report.bytes_damaged), (cluster, 4096));
    let disk = disk_of(&sink.taken());
    assert!(disk[..CLUSTER].iter().all(|byte| *byte == 7));
    assert!(disk[CLUSTER..].iter().all(|byte| *byte == 0));
}

#[test]
fn pieces_that_go_back_cannot_be_a_stream_and_end_it() {
    for rounds in [[(0, 8192), (4096, 8192)], [(8192, 4096), (0, 4096)]] {
        let (coverage, stop) = (ByteRuns::default(), Stop::default());
        let source = Pretended::new(&[&rounds]);
        let how = Extraction { partial: true, ..extraction(&source, &coverage, &stop) };
        let refused = how.into_raw(Box::new(Sink::default()), &mut |_| go_on());
        assert_eq!(refused.expect_err("goes back").kind(), ErrorKind::Format);
    }
}

/// Fails after some bytes, and says when it was written to after that.
#[derive(Debug)]
struct Full(usize, Arc<AtomicBool>);

impl ByteSink for Full {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.0 < bytes.len() {
            self.1.fetch_or(self.0 == 0, Ordering::Relaxed);
            self.0 = 0;
            return Err(Error::device("write", &std::io::Error::from_raw_os_error(28)));
        }
        self.0 -= bytes.len();
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_fails_ends_all_threads_with_its_error_and_is_not_written_to_again() {
    let folder = made(image()[..1 << 20].repeat(6), &options());
    let set = set_of(&[&folder]).expect("one bundle");
    for room in [1, 100_000, 1_500_000, 5_000_000] {
        let (stop, again) = (Stop::default(), Arc::new(AtomicBool::new(false)));
        let sink = Box::new(Full(room, Arc::clone(&again)));
        let how = extraction(&set, set.coverage(), &stop);
        let full = how.into_raw(sink, &mut |_| go_on()).expect_err("full");
        assert_eq!(full.errno(), Some(28), "{full}");
        assert!(!again.load(Ordering::Relaxed));
    }
}

#[test]
fn an_extraction_that_is_stopped_ends() {
    let folder = made(image(), &options());
    let stopping = Stop::default();
    let set = set_of(&[&folder]).expect("one bundle");
    stopping.now();
    let how = extraction(&set, set.coverage(), &stopping);
    assert_eq!(how.plan_qcow2().expect_err("stopped").kind(), ErrorKind::Interrupted);
    let ended = how.into_raw(Box::new(Sink::default()), &mut |_| go_on());
    assert_eq!(ended.expect_err("stopped").kind(), ErrorKind::Interrupted);
    let device: Arc<dyn Device> = Arc::new(RamDevice::new(SIZE as u64));
    let ended = how.onto(&device, true, &mut |_| go_on());
    assert_eq!(ended.expect_err("stopped").kind(), ErrorKind::Interrupted);
}

#[test]
fn a_place_that_is_too_small_is_refused_untouched() {
    let folder = made(image(), &options());
    let set = set_of(&[&folder]).expect("one bundle");
    let ram = Arc::new(RamDevice::from_bytes(vec![7; SIZE - 512]));
    let device: Arc<dyn Device> = Arc::clone(&ram) as _;
    let stop = Stop::default();
    let how = extraction(&set, set.coverage(), &stop);
    assert_eq!(
        how.onto(&device, false, &mut |_| go_on()).expect_err("small").kind(),
        ErrorKind::Usage
    );
    assert!(ram.contents().iter().all(|byte| *byte == 7));
}
