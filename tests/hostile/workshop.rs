//! Makes small bundles, copies them, damages them, and judges what is read out of them.
//!
//! Guarantees: `judge` and `judge_merge` fail unless every byte that came out is right, and every
//! byte that was selected came out or was reported lost.

#![expect(clippy::disallowed_methods, reason = "a variable asks for the long run")]

use std::ops::ControlFlow;
use std::sync::Arc;

use uuid::Uuid;

use dualrestore::bundle::{
    Bundle, BundleWriter, Compression, Content, Crew, Identity, ImageSource, Opener, PieceSource,
    Source, VerifyReport, WriterOptions,
};
use dualrestore::device::{Engine, Folder, RamDevice, RamFolder, is_zero};
use dualrestore::error::{Error, ErrorKind, Result};
use dualrestore::extent::ByteRange;
use dualrestore::map::{MapIdentity, OverwriteMap};
use dualrestore::merge::{MergeOptions, MergeReport, MergeTarget, OfflineTarget, run};
use dualrestore::units::{BlockSize, Geometry};

/// What a target holds before anything is laid on it.
pub const GROUND: u8 = 0xee;
pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// Whether to try every possibility rather than those that differ most: minutes instead of seconds.
pub fn thorough() -> bool {
    std::env::var_os("DUALRESTORE_THOROUGH").is_some()
}

/// Bytes that do not compress, the same every time.
pub fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// A source bound to a volume, with blocks that cannot be read.
#[derive(Debug)]
pub struct Volume {
    image: ImageSource,
    unreadable: Vec<ByteRange>,
    identity: Identity,
}

impl Source for Volume {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let asked = ByteRange::new(offset, buffer.len() as u64);
        if self.unreadable.iter().any(|bad| bad.intersect(asked).is_some()) {
            return Err(Error::new(ErrorKind::Device, "imagined"));
        }
        self.image.read_at(offset, buffer)
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.image.next_data(offset)
    }
}

/// A bundle and what it was made of.
#[derive(Clone, Debug)]
pub struct Made {
    pub folder: RamFolder,
    pub image: Vec<u8>,
    pub selection: Vec<ByteRange>,
    /// What the source could not read.
    pub unreadable: Vec<ByteRange>,
}

/// How a bundle is made.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub image: Vec<u8>,
    pub selection: Vec<ByteRange>,
    pub unreadable: Vec<ByteRange>,
    pub compression: Compression,
    pub bundle: u128,
}

pub fn source_of(recipe: &Recipe) -> Volume {
    let device = Arc::new(RamDevice::from_bytes(recipe.image.clone()));
    let image = ImageSource::new(device, BlockSize::DEFAULT).expect("an image");
    let identity =
        Identity { volume: Uuid::from_u128(7), generation: 3, cut: 9, ..image.identity() };
    Volume { image, unreadable: recipe.unreadable.clone(), identity }
}

pub fn options_of(recipe: &Recipe) -> WriterOptions {
    WriterOptions {
        selection: recipe.selection.clone(),
        compression: recipe.compression,
        bundle: Uuid::from_u128(recipe.bundle),
        segment_bytes_max: 2 << 20,
        threads: 1,
        software: "hostile".into(),
        ..WriterOptions::default()
    }
}

/// One thread that verifies, whatever the machine has.
pub fn merge_options() -> MergeOptions {
    MergeOptions { threads: 1, ..MergeOptions::default() }
}

pub fn verified(bundle: &Bundle) -> Result<VerifyReport> {
    bundle.verify(Crew { engine: Engine::Threads, threads: 1, at_once: true }, &mut go_on)
}

pub fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

impl Recipe {
    /// A chunk of each kind in one segment, and a short tail.
    pub fn small() -> Self {
        let mut image = vec![0; (192 << 10) + 512];
        image[..12_288].copy_from_slice(&noise(12_288, 1));
        image[128 << 10..][..48_000].copy_from_slice(&b"a line of text. ".repeat(3000));
        image[192 << 10..].copy_from_slice(&noise(512, 2));
        Self {
            image,
            selection: Vec::new(),
            unreadable: vec![ByteRange::new(4096, 4096)],
            compression: Compression::Zstd(1),
            bundle: 0xb0,
        }
    }

    /// Several segments.
    pub fn large(bundle: u128, seed: u8) -> Self {
        let mut image = noise((5 << 20) + 512, seed);
        image[1 << 20..][..300_000].fill(0);
        image[3 << 20..][..700_000].fill(b'x');
        let compression = Compression::None;
        Self { image, selection: Vec::new(), unreadable: Vec::new(), compression, bundle }
    }

    pub fn make(&self) -> Made {
        let folder = RamFolder::new();
        let source = source_of(self);
        BundleWriter::create_in(&folder, &source, &options_of(self), &mut go_on).expect("made");
        let mut selection = self.selection.clone();
        if selection.is_empty() {
            selection.push(ByteRange::new(0, self.image.len() as u64));
        }
        let (image, unreadable) = (self.image.clone(), self.unreadable.clone());
        Made { folder, image, selection, unreadable }
    }
}

/// Another folder with the same files.
pub fn copy_of(folder: &RamFolder) -> RamFolder {
    let copy = RamFolder::new();
    for name in folder.names().expect("listed") {
        copy.replace(&name, folder.contents(&name).expect("there"));
    }
    copy
}

/// A copy of the bundle with one file changed.
pub fn changed(made: &Made, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Made {
    let folder = copy_of(&made.folder);
    let mut bytes = folder.contents(name).expect("there");
    change(&mut bytes);
    folder.replace(name, bytes);
    Made { folder, ..made.clone() }
}

pub fn open(folder: &RamFolder) -> Result<Bundle> {
    Bundle::open_in(Arc::new(folder.clone()))
}

/// What reading a bundle gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Refused as damaged, of another bundle, or unknown.
    Refused(ErrorKind),
    /// Gone through; so many bytes came out, so many were reported lost.
    Read { given: u64, lost: u64 },
}

impl Verdict {
    /// Whether everything came out that the source could read.
    pub fn is_whole(self, made: &Made) -> bool {
        let selected: u64 = made.selection.iter().map(|range| range.length).sum();
        let unreadable: u64 = made.unreadable.iter().map(|range| range.length).sum();
        self == Self::Read { given: selected - unreadable, lost: unreadable }
    }
}

/// What each sector of the volume turned out to be.
const NOT_SEEN: u8 = 0;
const GIVEN: u8 = 1;
const LOST: u8 = 2;

/// Opens and reads all of a damaged bundle as a merge would, and fails if one byte of it is wrong.
#[track_caller]
pub fn judge(made: &Made, what: &str) -> Verdict {
    match open(&made.folder) {
        Ok(bundle) => judge_opened(&bundle, made, what),
        Err(error) => refused(&error, what),
    }
}

/// The same of a bundle that was damaged after it had been opened.
#[track_caller]
pub fn judge_opened(bundle: &Bundle, made: &Made, what: &str) -> Verdict {
    let mut seen = vec![NOT_SEEN; made.image.len() / SECTOR];
    let mut opener = Opener::new().expect("a decompressor");
    let longest = made.image.len().min(1 << 20).next_multiple_of(BLOCK);
    let (mut stored, mut plain) = (vec![0; longest], vec![0; longest]);
    for piece in bundle.pieces() {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => return refused(&error, what),
        };
        let span = piece.range.offset as usize..piece.range.end() as usize;
        let right = &made.image[span.clone()];
        let outcome = match &piece.content {
            Content::Zero => {
                assert!(is_zero(right), "{what}: zeros at {span:?}");
                GIVEN
            }
            Content::Missing(_) => LOST,
            Content::Stored { .. } | Content::Plain(_) => {
                let stored = &mut stored[..piece.bytes_to_read()];
                let read = piece.read(stored);
                match read.and_then(|()| piece.open(&mut opener, stored, &mut plain)) {
                    Ok(bytes) => {
                        assert!(bytes == right, "{what}: wrong bytes at {span:?}");
                        GIVEN
                    }
                    Err(_) => LOST,
                }
            }
        };
        seen[span.start / SECTOR..span.end / SECTOR].fill(outcome);
    }
    let count =
        |wanted: u8| (seen.iter().filter(|state| **state == wanted).count() * SECTOR) as u64;
    let (given, lost) = (count(GIVEN), count(LOST));
    let selected: u64 = made.selection.iter().map(|range| range.length).sum();
    assert_eq!(given + lost, selected, "{what}: bytes were passed over in silence");
    Verdict::Read { given, lost }
}

#[track_caller]
pub fn refused(error: &Error, what: &str) -> Verdict {
    let kind = error.kind();
    let known = matches!(kind, ErrorKind::Integrity | ErrorKind::Format | ErrorKind::Identity);
    assert!(known || error.errno() == Some(2), "{what}: {error}");
    Verdict::Refused(kind)
}

/// A target in memory with a map of which nothing is current.
pub fn target_of(size: usize) -> (Arc<RamDevice>, OfflineTarget) {
    let geometry = Geometry::new(size as u64, BlockSize::DEFAULT).expect("valid");
    let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
    let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
    let map = Arc::new(OverwriteMap::create(map, identity).expect("created"));
    let device = Arc::new(RamDevice::from_bytes(vec![GROUND; size]));
    let target = OfflineTarget::new(Arc::clone(&device) as _, map).expect("large enough");
    (device, target)
}

/// Fails unless what the map calls current is right and nothing else was written.
#[track_caller]
pub fn check_target(device: &RamDevice, target: &OfflineTarget, image: &[u8], what: &str) {
    let bytes = device.contents();
    let geometry = target.geometry();
    for block in 0..geometry.blocks() {
        let run = dualrestore::extent::BlockRange::one(block);
        let span = geometry.bytes_of(run);
        let span = span.offset as usize..span.end() as usize;
        let current = target.wanted(run).is_empty();
        let right = if current {
            bytes[span.clone()] == image[span]
        } else {
            bytes[span].iter().all(|byte| *byte == GROUND)
        };
        assert!(right, "{what}: block {block} (current: {current}) is wrong");
    }
}

/// Merges a damaged bundle into a target in memory, and fails if one byte there is wrong.
#[track_caller]
pub fn judge_merge(made: &Made, what: &str) -> Option<MergeReport> {
    let (device, target) = target_of(made.image.len());
    let merged =
        open(&made.folder).and_then(|bundle| run(&bundle, &target, &merge_options(), &mut go_on));
    check_target(&device, &target, &made.image, what);
    match merged {
        Err(error) => {
            refused(&error, what);
            None
        }
        Ok(report) => {
            let selected: u64 = made.selection.iter().map(|range| range.length).sum();
            let damaged: u64 = report.damaged.iter().map(|range| range.length).sum();
            assert_eq!(report.bytes_written + damaged, selected, "{what}: {report:?}");
            Some(report)
        }
    }
}
