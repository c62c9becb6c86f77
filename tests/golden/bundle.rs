//! Bundles: one of a plain image with a chunk of each kind, one that is bound to a volume, one that
//! is encrypted.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use dualrestore::bundle::{
    Begun, Bundle, BundleWriter, Compression, Consumer, Crew, Encryption, Identity, ImageSource,
    Opened, Outcome, PieceSource, Source, WriterOptions, run,
};
use dualrestore::device::{RamDevice, RamFolder};
use dualrestore::error::{Error, ErrorKind, Result};
use dualrestore::extent::ByteRange;
use dualrestore::format::bundle::BundleKey;
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

fn written(source: &Imagined, number: u128, more: WriterOptions) -> RamFolder {
    let folder = RamFolder::new();
    let options = WriterOptions {
        bundle: Uuid::from_u128(0x6011_d5b0_0000_4000_8000_0000_0000_0000 + number),
        created_unix_s: 1_700_000_000,
        software: "dualrestore, golden".into(),
        segment_bytes_max: 2 << 20,
        threads: 2,
        ..more
    };
    BundleWriter::create_in(&folder, source, &options, &mut |_| go_on()).expect("made");
    folder
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
