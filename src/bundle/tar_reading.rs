//! The state of going through a tar that comes: which member is read, what was seen.
//!
//! | state | next |
//! |---|---|
//! | between members | a member: taken whole, or a segment is begun |
//! | a segment is begun | its checks are made; needs the key of an encrypted bundle |
//! | in a segment | a batch, or its end |
//! | in a batch | chunks, one large or several small ones |
//!
//! Guarantees and memory: as `tar_stream.rs` says.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use uuid::Uuid;

use super::members::{BEGIN_NAME, KEY_NAME, MANIFEST_NAME, is_needed, segment_number};
use super::pieces::{Content, Piece};
use super::reader::gaps;
use super::segment_stream::{SeenSegment, SegmentStream};
use super::source::Identity;
use crate::device::{AlignedBuffer, ByteStream, FolderFile, Step, TarMember, TarWalker};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    BeginManifest, BundleKey, ChunkKind, Descriptor, Hash, Manifest, PAGE_BYTES, Place,
    SegmentHeader, padded,
};
use crate::limits::{
    BUNDLE_KEY_FILE_BYTES_MAX, BUNDLE_MANIFEST_BYTES_MAX, BUNDLE_SEGMENT_BYTES_MAX,
    BUNDLE_SELECTION_RUNS_MAX,
};

/// Small chunks that come one after the other are read together.
const GROUP_BYTES: usize = 1 << 20;
/// From this length on a chunk is read into memory of its own at once.
const LARGE_BYTES: usize = 128 << 10;

/// Whose bundle it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub bundle: Uuid,
    pub identity: Identity,
    /// Of an incremental bundle: the sequence number of the cut that it goes on from.
    pub base_cut: Option<u64>,
    pub begin_hash: Hash,
}

/// What is known when all pieces have been given.
#[derive(Debug, Default)]
pub(super) struct Ending {
    pub shortfall: Option<Error>,
    pub blemishes: Vec<String>,
    pub manifest: Option<Manifest>,
}
/// The stored form of a chunk that came, to be read like one on a disk.
#[derive(Debug)]
struct Came(AlignedBuffer);

impl FolderFile for Came {
    fn length(&self) -> Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = start.checked_add(buffer.len()).and_then(|end| self.0.get(start..end));
        buffer.copy_from_slice(part.ok_or_else(|| Error::usage("outside of the chunk"))?);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::usage("what came through a pipe cannot be written to"))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// The rest of a batch: its number, and descriptors whose pieces have not been given.
type Rest = (u32, std::iter::Peekable<std::iter::Enumerate<std::vec::IntoIter<Descriptor>>>);

/// A segment whose header has been read.
#[derive(Debug)]
struct Begun {
    header: SegmentHeader,
    hash: Hash,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Reading {
    walker: TarWalker,
    small: Vec<u8>,
    pub known: Option<Known>,
    /// The directory of the tar that the bundle lies in.
    folder: Option<String>,
    pub begin: Option<BeginManifest>,
    pub wrapped_key: Option<Vec<u8>>,
    pub key: Option<BundleKey>,
    pub manifest: Option<Manifest>,
    /// Its bytes, where it is to be checked with the key.
    sealed: Vec<u8>,
    begun: Option<Begun>,
    segment: Option<SegmentStream>,
    batch: Option<Rest>,
    seen: BTreeMap<u32, SeenSegment>,
    /// Runs held for damaged segments.
    runs_held: usize,
    cut_off: bool,
    blemishes: Vec<String>,
}

impl Reading {
    pub fn new(stream: Box<dyn ByteStream>) -> Self {
        Self {
            walker: TarWalker::new(stream),
            small: Vec::new(),
            known: None,
            folder: None,
            begin: None,
            wrapped_key: None,
            key: None,
            manifest: None,
            sealed: Vec::new(),
            begun: None,
            segment: None,
            batch: None,
            seen: BTreeMap::new(),
            runs_held: 0,
            cut_off: false,
            blemishes: Vec::new(),
        }
    }

    /// Whether the bundle is encrypted, as far as is known.
    pub fn is_encrypted(&self) -> bool {
        self.begin.as_ref().is_some_and(BeginManifest::is_encrypted)
            || self.begun.as_ref().is_some_and(|begun| begun.header.salt.is_some())
    }

    /// Whether a segment comes next.
    pub fn is_at_segment(&self) -> bool {
        self.begun.is_some()
    }

    /// Puts pieces into the queue, or comes nearer to it. `false` at the end.
    pub fn advance(&mut self, queue: &mut VecDeque<Piece>) -> Result<bool> {
        if let Some(mut rest) = self.batch.take() {
            if self.give_group(&mut rest, queue)? && rest.1.peek().is_some() {
                self.batch = Some(rest);
            }
            return Ok(true);
        }
        if let Some(Begun { header, hash }) = self.begun.take() {
            let checks = header.checks(hash, self.key.as_ref())?;
            self.segment = Some(SegmentStream::new(header.segment, header.geometry, hash, checks));
        }
        let Some(segment) = &mut self.segment else { return self.next_member() };
        if let Some(batch) = segment.next_batch(&mut self.walker)? {
            self.batch = Some((batch.batch, batch.descriptors.into_iter().enumerate().peekable()));
            return Ok(true);
        }
        let complete = self.walker.left() == 0 && !self.cut_off;
        self.close_segment(complete)?;
        Ok(true)
    }

    /// Reads the stored forms of the next chunks: one that is large, or several small ones. `false`
    /// if not all of them came.
    fn give_group(&mut self, rest: &mut Rest, queue: &mut VecDeque<Piece>) -> Result<bool> {
        let segment = self.segment.as_mut().expect("a batch is of a segment");
        let mut group = Vec::new();
        let mut bytes = 0;
        while let Some((number, next)) = rest.1.peek() {
            let length = padded(next.stored_bytes.into()) as usize;
            if bytes > 0 && (length >= LARGE_BYTES || bytes + length > GROUP_BYTES) {
                break;
            }
            group.push((bytes..bytes + length, *number, *next));
            bytes += length;
            rest.1.next();
            if length >= LARGE_BYTES {
                break;
            }
        }
        let mut large = None;
        let came = if bytes >= LARGE_BYTES && group.last().is_some_and(|(at, ..)| at.len() == bytes)
        {
            let mut memory = AlignedBuffer::zeroed(bytes);
            let came = segment.read_payload(&mut self.walker, &mut memory)?;
            large = Some(memory);
            came
        } else {
            self.small.resize(bytes, 0);
            segment.read_payload(&mut self.walker, &mut self.small)?
        };
        for (at, number, descriptor) in group {
            if at.end > came {
                break;
            }
            segment.found(descriptor.range);
            let content = match descriptor.kind {
                ChunkKind::Data | ChunkKind::Zstd => {
                    let bytes = large.take();
                    let bytes = bytes.unwrap_or_else(|| AlignedBuffer::from_slice(&self.small[at]));
                    let number = u32::try_from(number).expect("a batch has few");
                    Content::Stored {
                        file: Arc::new(Came(bytes)),
                        position: 0,
                        descriptor,
                        checks: Arc::clone(segment.checks()),
                        place: Place { batch: rest.0, descriptor: number },
                    }
                }
                ChunkKind::Zero => Content::Zero,
                ChunkKind::Unreadable => Content::Missing("its source could not be read"),
            };
            queue.push_back(Piece { range: descriptor.range, content });
        }
        self.cut_off |= came < bytes;
        Ok(came == bytes)
    }

    fn close_segment(&mut self, complete: bool) -> Result<()> {
        let Some(segment) = self.segment.take() else { return Ok(()) };
        let number = segment.number();
        let seen = segment.finish(complete);
        self.runs_held += seen.found.len();
        if self.runs_held > BUNDLE_SELECTION_RUNS_MAX {
            return Err(Error::integrity(
                "too much of the tar is damaged to keep account of it: copy it again",
            ));
        }
        if !self.seen.get(&number).is_some_and(|earlier| earlier.whole) {
            self.seen.insert(number, seen);
        }
        Ok(())
    }

    /// Goes to the next member that concerns us. `false` at the end of the tar.
    pub fn next_member(&mut self) -> Result<bool> {
        self.begun = None;
        let member = match self.walker.next_member()? {
            Step::Member(member) => member,
            Step::End => return Ok(false),
            Step::CutOff => {
                self.cut_off = true;
                return Ok(false);
            }
        };
        if !is_needed(&member.name) {
            return Ok(true);
        }
        if self.folder.get_or_insert_with(|| member.folder.clone()) != &member.folder {
            return Err(Error::format(
                "expected one bundle in the tar, found files of several directories: make a tar \
                 of each",
            ));
        }
        let taken = match member.name.as_str() {
            BEGIN_NAME => self.take_begin(&member),
            KEY_NAME => self.take_key(&member),
            MANIFEST_NAME => self.take_manifest(&member),
            name => {
                let number = segment_number(name).expect("the names that are needed");
                self.open_segment(&member, number)
            }
        };
        match taken {
            Err(error) if error.kind() == ErrorKind::Integrity => {
                self.blemishes.push(format!("{}: {error}", member.name));
                Ok(true)
            }
            other => other.map(|()| true),
        }
    }

    /// All of a small member; `None` where the tar is cut off.
    fn member_bytes(&mut self, member: &TarMember, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        if member.bytes > bytes_max {
            return Err(Error::format(format!(
                "expected at most {bytes_max} bytes in {}, found {}",
                member.name, member.bytes
            )));
        }
        // What the header states is believed only as far as bytes come.
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < member.bytes {
            let held = bytes.len();
            let more = (member.bytes - held as u64).min(1 << 20) as usize;
            bytes.resize(held + more, 0);
            let read = self.walker.read(&mut bytes[held..])?;
            if read < more {
                return Ok(None);
            }
        }
        Ok(Some(bytes))
    }

    fn take_begin(&mut self, member: &TarMember) -> Result<()> {
        let bytes = self.member_bytes(member, BUNDLE_MANIFEST_BYTES_MAX)?;
        let Some(bytes) = bytes else { return Ok(()) };
        let begin = BeginManifest::parse(&bytes)?;
        self.settle(known_of(&begin, *blake3::hash(&bytes).as_bytes())?)?;
        self.begin = Some(begin);
        Ok(())
    }

    fn take_manifest(&mut self, member: &TarMember) -> Result<()> {
        let bytes = self.member_bytes(member, BUNDLE_MANIFEST_BYTES_MAX)?;
        let Some(bytes) = bytes else { return Ok(()) };
        let manifest = Manifest::parse(&bytes)?;
        self.settle(known_of(&manifest.begin, manifest.begin_hash.0)?)?;
        if manifest.begin.is_encrypted() {
            self.sealed = bytes;
        }
        self.manifest = Some(manifest);
        Ok(())
    }

    fn take_key(&mut self, member: &TarMember) -> Result<()> {
        self.wrapped_key = self.member_bytes(member, BUNDLE_KEY_FILE_BYTES_MAX)?;
        Ok(())
    }

    /// Law 7: all members are of one bundle.
    fn settle(&mut self, found: Known) -> Result<()> {
        let held = *self.known.get_or_insert(found);
        if (held.bundle, held.identity) != (found.bundle, found.identity) {
            return Err(Error::identity(format!(
                "expected members of bundle {} only, found one of bundle {}, or of another cut: \
                 make a tar of each bundle",
                held.bundle, found.bundle
            )));
        }
        if held.begin_hash != found.begin_hash {
            return Err(Error::identity(
                "expected members that were begun together, found manifest.begin.json of another \
                 making: make the tar again from the medium",
            ));
        }
        Ok(())
    }

    fn open_segment(&mut self, member: &TarMember, number: u32) -> Result<()> {
        if member.bytes > BUNDLE_SEGMENT_BYTES_MAX {
            return Err(Error::format(format!(
                "expected a segment of at most 1 GiB, found {} bytes in {}",
                member.bytes, member.name
            )));
        }
        let mut page = [0; PAGE_BYTES];
        if self.walker.read(&mut page)? < PAGE_BYTES {
            return Ok(());
        }
        let begun = match SegmentHeader::parse(&page) {
            Ok((header, hash)) => {
                if header.segment != number {
                    return Err(Error::format(format!(
                        "expected segment {number} in {}, found segment {}",
                        member.name, header.segment
                    )));
                }
                self.settle(known_of_header(&header))?;
                Begun { header, hash }
            }
            Err(error) if error.kind() == ErrorKind::Identity => return Err(error),
            Err(error) => {
                let Some(known) = self.known.filter(|_| !self.is_encrypted()) else {
                    return Err(error);
                };
                // Its pages can still be told: they are bound to what the header must have been.
                self.blemishes.push(format!("{}: {error}", member.name));
                let header = known.header(number);
                Begun { hash: header.encode().1, header }
            }
        };
        self.begun = Some(begun);
        Ok(())
    }

    pub fn nothing(&self) -> Error {
        if self.cut_off {
            return Error::format("the tar ends before it says whose bundle it holds");
        }
        Error::format("expected a bundle in the tar, found none of its files")
    }

    /// What should have come and did not, as missing pieces.
    pub fn end(mut self, queue: &mut VecDeque<Piece>) -> Result<Ending> {
        self.close_segment(false)?;
        let mut ending = Ending { blemishes: self.blemishes, ..Ending::default() };
        if self.walker.damaged() > 0 {
            ending
                .blemishes
                .push(format!("{} headers of the tar are damaged", self.walker.damaged()));
        }
        let Some(manifest) = self.manifest else {
            ending.shortfall = Some(Error::integrity(if self.cut_off {
                "the tar was cut off: manifest.json has not come. What came whole is kept; run \
                 this again with the whole tar"
            } else {
                "the tar has no manifest.json that can be read: the bundle is unfinished or \
                 damaged. What came whole is kept; run this again with a whole one"
            }));
            return Ok(ending);
        };
        manifest.begin.expect_key(self.key.as_ref())?;
        if let Some(key) = &self.key {
            manifest.check_mac(&self.sealed, key)?;
        }
        let (mut absent, mut broken) = (0, 0);
        for entry in &manifest.segments {
            let coverage = entry.coverage.iter().map(|run| ByteRange::from(*run));
            let (why, missing) = match self.seen.get(&entry.number) {
                None => {
                    absent += 1;
                    ("its segment is not in the tar", coverage.collect())
                }
                Some(seen) if seen.whole && seen.root == entry.root.0 => continue,
                Some(seen)
                    if seen.header_hash != entry.header_hash.0
                        && (seen.whole || !seen.found.is_empty()) =>
                {
                    return Err(Error::integrity(format!(
                        "{}: it is not the segment that the manifest vouches for",
                        entry.name
                    )));
                }
                Some(seen) => {
                    broken += 1;
                    ending.blemishes.push(format!("{}: it is damaged", entry.name));
                    ("the page that describes it is damaged", gaps(coverage, &seen.found))
                }
            };
            let content = Content::Missing(why);
            queue
                .extend(missing.into_iter().map(|range| Piece { range, content: content.clone() }));
        }
        if absent + broken > 0 && self.cut_off {
            ending.shortfall = Some(Error::integrity(format!(
                "the tar was cut off: {} of {} segments have not come whole. What came whole is \
                 kept; run this again with the whole tar",
                absent + broken,
                manifest.segments.len()
            )));
        } else if absent > 0 {
            ending.blemishes.push(format!("{absent} segments are not in the tar"));
        }
        ending.manifest = Some(manifest);
        Ok(ending)
    }
}

impl Known {
    fn header(&self, segment: u32) -> SegmentHeader {
        let Identity { volume, geometry, generation, cut } = self.identity;
        SegmentHeader {
            bundle: self.bundle,
            volume,
            geometry,
            generation,
            cut,
            base_cut: self.base_cut,
            segment,
            begin_hash: self.begin_hash,
            salt: None,
        }
    }
}

fn known_of(begin: &BeginManifest, begin_hash: Hash) -> Result<Known> {
    let identity = Identity {
        volume: begin.volume.map_or(Uuid::nil(), |volume| volume.0),
        geometry: begin.geometry()?,
        generation: begin.generation,
        cut: begin.cut,
    };
    let base_cut = begin.base.as_ref().map(|base| base.cut);
    Ok(Known { bundle: begin.bundle.0, identity, base_cut, begin_hash })
}

fn known_of_header(header: &SegmentHeader) -> Known {
    let &SegmentHeader { bundle, volume, geometry, generation, cut, base_cut, begin_hash, .. } =
        header;
    Known { bundle, identity: Identity { volume, geometry, generation, cut }, base_cut, begin_hash }
}
