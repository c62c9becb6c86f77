//! Bundles: one of a plain image with a chunk of each kind, one that is bound to a volume, one that
//! is encrypted, one over two media, one that is incremental, and one as a tar.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use dualrestore::bundle::{
    Begun, Bundle, BundleWriter, Compression, Consumer, Crew, Encryption, Identity, ImageSource,
    Media, Medium, NoRecord, Opened, Outcome, PieceSource, Source, WriterOptions, run, write,
};
use dualrestore::device::{ByteSink, Folder, RamDevice, RamFolder, TarFolder};
use dualrestore::error::{Error, ErrorKind, Result};
use dualrestore::extent::ByteRange;
use dualrestore::format::bundle::{BaseCut, BundleKey, Run};
use dualrestore::units::BlockSize;

use crate::{golden, path_of};

const FILES: [&str; 3] = ["manifest.begin.json", "manifest.json", "seg-00000000.drs"];

/// Bytes that do not compress, the same every time.
fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// An image with a place that cannot be read, and perhaps of a volume.
#[derive(Debug)]
struct Imagined {
    image: ImageSource,
    unreadable: ByteRange,
    volume: Uuid,
    generation: u64,
    cut: u64,
}

impl Source for Imagined {
    fn identity(&self) -> Identity {
        let Self { volume, generation, cut, .. } = *self;
        Identity { volume, generation, cut, ..self.image.identity() }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if self.unreadable.intersect(ByteRange::new(offset, buffer.len() as u64)).is_some() {
            return Err(Error::new(ErrorKind::Device, "imagined"));
        }
        self.image.read_at(offset, buffer)
    }
}

fn image_of(bytes: Vec<u8>) -> ImageSource {
    ImageSource::new(Arc::new(RamDevice::from_bytes(bytes)), BlockSize::DEFAULT).expect("an image")
}

fn go_on() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn options(number: u128, more: WriterOptions) -> WriterOptions {
    WriterOptions {
        bundle: Uuid::from_u128(0x6011_d5b0_0000_4000_8000_0000_0000_0000 + number),
        created_unix_s: 1_700_000_000,
        software: "dualrestore, golden".into(),
        segment_bytes_max: 2 << 20,
        threads: 2,
        ..more
    }
}

fn written(source: &Imagined, number: u128, more: WriterOptions) -> RamFolder {
    let folder = RamFolder::new();
    BundleWriter::create_in(&folder, source, &options(number, more), &mut |_| go_on())
        .expect("made");
    folder
}

/// Two media of such a size that the second chunk of 64 KiB does not fit the first.
struct Two(Vec<RamFolder>);

impl Media for Two {
    fn next(&mut self, _: u32) -> Result<Option<Medium>> {
        self.0.push(RamFolder::new());
        let folder = Arc::new(self.0[self.0.len() - 1].clone());
        Ok(Some(Medium { folder, bytes_max: Some(192 << 10) }))
    }

    fn has_more(&self) -> bool {
        false
    }
}

/// A volume of three MiB and a sector, whose tail is written, at a cut.
fn volume(filled: &[(usize, usize)], cut: u64) -> (Imagined, Vec<u8>) {
    let mut bytes = vec![0; (3 << 20) + 512];
    for (seed, (start, length)) in (20..).zip(filled) {
        bytes[*start..start + length].copy_from_slice(&noise(*length, seed));
    }
    let volume = Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001);
    let (image, unreadable) = (image_of(bytes.clone()), ByteRange::default());
    (Imagined { image, unreadable, volume, generation: 6, cut }, bytes)
}

/// The golden bundle, which must be what is written today.
fn golden_bundle(directory: &str, folder: &RamFolder) -> Bundle {
    for name in FILES {
        golden(&format!("{directory}/{name}"), &folder.contents(name).expect("there"));
    }
    Bundle::open(&path_of(directory)).expect("whole")
}

/// Lays every verified piece over a ground of 0xee; what no piece gave stays that.
struct Collect(Mutex<Vec<u8>>);

impl Consumer for Collect {
    type Claim = ();
    type Note = ();

    fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
        vec![range]
    }

    fn begin(&self, range: ByteRange, opened: Opened<'_>) -> Result<Begun<(), ()>> {
        let mut ground = self.0.lock().expect("no thread panicked");
        let place = &mut ground[range.offset as usize..range.end() as usize];
        match opened {
            Opened::Zero => place.fill(0),
            Opened::Bytes(bytes) => place.copy_from_slice(bytes),
        }
        Ok(Begun::Done(()))
    }

    fn end(&self, (): (), result: Result<()>) -> Result<()> {
        result
    }
}

fn restored(bundle: &Bundle) -> Vec<u8> {
    let ground = vec![0xee; bundle.identity().geometry.size() as usize];
    let collect = Collect(Mutex::new(ground));
    run(bundle, &collect, Crew::of(bundle), |_| Ok(go_on())).expect("gone through");
    collect.0.into_inner().expect("no thread panicked")
}

#[test]
fn a_bundle_of_version_1_opens_and_is_still_what_is_written() {
    let mut bytes = vec![0; (1 << 20) + 512];
    bytes[..8192].copy_from_slice(&noise(8192, 7));
    bytes[65_536..131_072].copy_from_slice(&b"dualrestore bundle golden file. ".repeat(2048));
    bytes[1 << 20..].copy_from_slice(&noise(512, 8));
    let source = Imagined {
        image: image_of(bytes.clone()),
        unreadable: ByteRange::new(4096, 4096),
        volume: Uuid::nil(),
        generation: 0,
        cut: 0,
    };
    let options = WriterOptions { compression: Compression::Zstd(1), ..WriterOptions::default() };
    let bundle = golden_bundle("bundle-v1", &written(&source, 1, options));
    let found = bundle.verify(Crew::of(&bundle), &mut |_| go_on()).expect("gone through");
    assert_eq!((found.chunks_damaged, found.blemishes), (1, vec![]));
    assert_eq!(found.damaged, [ByteRange::new(4096, 4096)]);
    bytes[4096..8192].fill(0xee);
    assert!(restored(&bundle) == bytes);
}

#[test]
fn a_bundle_of_version_1_of_a_part_of_a_volume_is_still_what_is_written() {
    let mut bytes = vec![0; 128 << 10];
    bytes[4096..12_288].copy_from_slice(&noise(8192, 9));
    let source = Imagined {
        image: image_of(bytes.clone()),
        unreadable: ByteRange::default(),
        volume: Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001),
        generation: 6,
        cut: 1234,
    };
    let selection = vec![ByteRange::new(0, 8192), ByteRange::new(64 << 10, 64 << 10)];
    let options = WriterOptions { selection: selection.clone(), ..WriterOptions::default() };
    let bundle = golden_bundle("bundle-v1-bound", &written(&source, 2, options));
    assert_eq!(bundle.identity(), source.identity());
    assert_eq!(bundle.selection(), selection);
    bytes[8192..64 << 10].fill(0xee);
    assert!(restored(&bundle) == bytes);
    let mut damaged = 0;
    let collect = Collect(Mutex::new(vec![0; 128 << 10]));
    run(&bundle, &collect, Crew::of(&bundle), |events| {
        damaged += events.iter().filter(|one| matches!(one.outcome, Outcome::Damaged(_))).count();
        Ok(go_on())
    })
    .expect("gone through");
    assert_eq!(damaged, 0);
}

#[test]
fn an_encrypted_bundle_of_version_1_opens_with_its_key_and_is_still_what_is_written() {
    let mut bytes = vec![0; (128 << 10) + 512];
    bytes[..8192].copy_from_slice(&noise(8192, 10));
    bytes[65_536..98_304].copy_from_slice(&b"dualrestore bundle golden file. ".repeat(1024));
    bytes[128 << 10..].copy_from_slice(&noise(512, 11));
    let source = Imagined {
        image: image_of(bytes.clone()),
        unreadable: ByteRange::default(),
        volume: Uuid::from_u128(0x6011_d3a9_0000_4000_8000_0000_0000_0001),
        generation: 6,
        cut: 1234,
    };
    let directory = "bundle-v1-encrypted";
    let key =
        BundleKey::new(Uuid::from_u128(0x6011_d5b0_0000_4000_8000_0000_0000_0003), [0x42; 32]);
    // What age makes is different each time, so this one was made once.
    let wrapped_key = std::fs::read(path_of(directory).join("key.age")).expect("there");
    let salts = || Ok([0x5a; 32]);
    let encryption = Some(Encryption { key: key.clone(), wrapped_key, salts });
    let options =
        WriterOptions { encryption, compression: Compression::Zstd(1), ..WriterOptions::default() };
    let folder = written(&source, 3, options);
    for name in FILES {
        golden(&format!("{directory}/{name}"), &folder.contents(name).expect("there"));
    }
    let error = Bundle::open(&path_of(directory)).expect_err("no key");
    assert_eq!(error.kind(), ErrorKind::Locked);
    let bundle = Bundle::open_with(&path_of(directory), Some(&key)).expect("whole");
    let found = bundle.verify(Crew::of(&bundle), &mut |_| go_on()).expect("gone through");
    assert!(found.is_whole(), "{found:?}");
    assert_eq!(bundle.identity(), source.identity());
    assert!(restored(&bundle) == bytes);
}

#[test]
fn a_bundle_of_version_1_over_two_media_is_still_what_is_written() {
    let (source, bytes) = volume(&[(0, 64 << 10), (2 << 20, 64 << 10), (3 << 20, 512)], 1234);
    let mut media = Two(Vec::new());
    let options = options(4, WriterOptions::default());
    let report = write(&source, &mut media, &options, &mut NoRecord, &mut |_| go_on());
    assert_eq!(report.expect("made").media, 2);
    let mut ground = vec![0xee; bytes.len()];
    for (number, folder) in (1..).zip(&media.0) {
        let directory = format!("bundle-v1-media/{number}");
        let segment = format!("seg-{:08}.drs", number - 1);
        for name in ["manifest.begin.json", "manifest.json", &segment] {
            golden(&format!("{directory}/{name}"), &folder.contents(name).expect("there"));
        }
        let bundle = Bundle::open(&path_of(&directory)).expect("whole");
        let medium = bundle.manifest().medium.expect("one of several");
        assert_eq!((medium.number, medium.last), (number, number == 2));
        let here = restored(&bundle);
        for run in bundle.segments().iter().flat_map(|segment| &segment.coverage) {
            let span = run.0 as usize..run.1 as usize;
            ground[span.clone()].copy_from_slice(&here[span]);
        }
    }
    assert!(ground == bytes);
}

#[test]
fn an_incremental_bundle_of_version_1_is_still_what_is_written() {
    let (source, bytes) = volume(&[(8192, 8192), (3 << 20, 512)], 1300);
    let scope = [Run(0, 1 << 20), Run(2 << 20, (3 << 20) + 512)];
    let base = BaseCut { generation: 6, cut: 1234, scope: Some(scope.to_vec()) };
    let selection = vec![
        ByteRange::new(8192, 8192),
        ByteRange::new(64 << 10, 64 << 10),
        ByteRange::new(3 << 20, 512),
    ];
    let more = WriterOptions {
        base: Some(base.clone()),
        selection: selection.clone(),
        ..WriterOptions::default()
    };
    let bundle = golden_bundle("bundle-v1-incremental", &written(&source, 5, more));
    assert_eq!(bundle.manifest().begin.base, Some(base));
    let lineage = bundle.lineage().expect("incremental");
    assert_eq!((lineage.cut.sequence, lineage.base.sequence), (1300, 1234));
    assert_eq!(lineage.selection, selection);
    let mut expected = vec![0xee; bytes.len()];
    for run in selection {
        let span = run.offset as usize..run.end() as usize;
        expected[span.clone()].copy_from_slice(&bytes[span]);
    }
    assert!(restored(&bundle) == expected);
}

/// What was sent.
#[derive(Clone, Debug, Default)]
struct Sent(Arc<Mutex<Vec<u8>>>);

impl ByteSink for Sent {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn the_tar_form_of_version_1_opens_and_is_still_what_is_written() {
    // README.txt and recover.py, which go first, may get better words; the rest is frozen.
    let sent = Sent::default();
    let tar = TarFolder::new(Box::new(sent.clone()), Path::new("tar"), 1_700_000_000);
    for name in ["manifest.begin.json", "seg-00000000.drs", "manifest.json"] {
        let bytes = std::fs::read(path_of("bundle-v1-bound").join(name)).expect("there");
        let member = tar.create(name).expect("new");
        member.write_at(0, &bytes).expect("held");
        member.flush().expect("sent with the next");
    }
    tar.finish().expect("ended");
    golden("bundle-v1-bound.tar", &sent.0.lock().expect("whole"));
    let from_tar = Bundle::open(&path_of("bundle-v1-bound.tar")).expect("whole");
    let from_directory = Bundle::open(&path_of("bundle-v1-bound")).expect("whole");
    assert!(restored(&from_tar) == restored(&from_directory));
}
