//! A bundle as a tar that comes through a pipe: gone through once, in the order in which it comes.
//!
//! | member | |
//! |---|---|
//! | `manifest.begin.json`, the manifest, or the first segment's header | whose bundle it is |
//! | a segment | its batches, each chunk handed on as soon as it is there |
//! | the manifest | kept: at the end it says what should have come |
//! | any other | passed by |
//!
//! Guarantees: the identity is known before the first piece is given, and no piece of another
//! bundle follows; members may come in any order; what did not come, or came damaged, is given as
//! missing once the manifest has told of it (law 8). Memory is that of the chunks that a pump
//! holds, a group of them, the manifest, and the runs of damaged segments.
//! Does not know: targets.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::members::{BEGIN_NAME, MANIFEST_NAME, is_needed, segment_number};
use super::pieces::{Content, Piece, PieceSource};
use super::reader::gaps;
use super::segment_stream::{SeenSegment, SegmentStream};
use super::source::Identity;
use crate::device::{AlignedBuffer, ByteStream, FolderFile, Step, Stop, TarMember, TarWalker};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    BeginManifest, ChunkKind, Descriptor, Hash, Manifest, PAGE_BYTES, SegmentHeader, padded,
};
use crate::limits::{
    BUNDLE_MANIFEST_BYTES_MAX, BUNDLE_SEGMENT_BYTES_MAX, BUNDLE_SELECTION_RUNS_MAX,
};

/// Small chunks that come one after the other are read together.
const GROUP_BYTES: usize = 1 << 20;
/// From this length on a chunk is read into memory of its own at once.
const LARGE_BYTES: usize = 128 << 10;

/// See the module.
#[derive(Debug)]
pub struct TarStream {
    name: String,
    stop: Stop,
    known: Known,
    selection_bytes: u64,
    /// Taken when the pieces are asked for.
    reading: Mutex<Option<Reading>>,
    ending: Mutex<Ending>,
}

/// Whose bundle it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    bundle: Uuid,
    identity: Identity,
    begin_hash: Hash,
}

/// What is known when all pieces have been given.
#[derive(Debug, Default)]
struct Ending {
    shortfall: Option<Error>,
    blemishes: Vec<String>,
    manifest: Option<Manifest>,
}

impl TarStream {
    /// Reads on until it is known whose bundle it is. `stop` is the stream's own.
    pub fn open(stream: Box<dyn ByteStream>, name: &str, stop: Stop) -> Result<Self> {
        let mut reading = Reading {
            walker: TarWalker::new(stream),
            small: Vec::new(),
            known: None,
            folder: None,
            begin: None,
            manifest: None,
            segment: None,
            batch: None,
            seen: BTreeMap::new(),
            runs_held: 0,
            cut_off: false,
            blemishes: Vec::new(),
        };
        while reading.known.is_none() {
            if !reading.next_member()? {
                return Err(reading.nothing());
            }
        }
        let known = reading.known.expect("just seen");
        let runs = reading.begin.as_ref().map(|begin| &begin.selection);
        let selection_bytes = runs.map_or(known.identity.geometry.size(), |runs| {
            runs.iter().map(|run| run.1 - run.0).sum()
        });
        Ok(Self {
            name: name.to_owned(),
            stop,
            known,
            selection_bytes,
            reading: Mutex::new(Some(reading)),
            ending: Mutex::default(),
        })
    }

    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.known.bundle
    }

    /// Damage that cost no chunk, once all pieces have been given.
    #[must_use]
    pub fn blemishes(&self) -> Vec<String> {
        self.ending().blemishes.clone()
    }

    /// The manifest, once all pieces have been given and if it came.
    #[must_use]
    pub fn manifest(&self) -> Option<Manifest> {
        self.ending().manifest.clone()
    }

    /// Goes through all of it for the manifest alone.
    pub fn read_manifest(&self) -> Result<Manifest> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut reading =
            reading.ok_or_else(|| Error::usage("the tar was gone through already"))?;
        while reading.manifest.is_none() && reading.next_member()? {
            reading.segment = None;
        }
        let absent =
            || Error::format("the tar has no manifest.json: it was cut off, or unfinished");
        reading.manifest.ok_or_else(absent)
    }

    fn ending(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PieceSource for TarStream {
    fn name(&self) -> String {
        format!("bundle in the tar from {}", self.name)
    }

    fn identity(&self) -> Identity {
        self.known.identity
    }

    fn bytes_total(&self) -> u64 {
        self.selection_bytes
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::new(Pieces { source: self, reading, queue: VecDeque::new() })
    }

    fn answers_at_once(&self) -> bool {
        // So that of the workers only the one that plans waits for the stream.
        true
    }

    fn is_repeatable(&self) -> bool {
        false
    }

    fn shortfall(&self) -> Option<Error> {
        self.ending().shortfall.clone()
    }

    fn interrupt(&self) {
        self.stop.now();
    }
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

struct Pieces<'a> {
    source: &'a TarStream,
    /// `None`: at the end.
    reading: Option<Reading>,
    queue: VecDeque<Piece>,
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                return Some(Ok(piece));
            }
            match self.reading.as_mut()?.advance(&mut self.queue) {
                Ok(true) => {}
                Ok(false) => {
                    let reading = self.reading.take().expect("just used");
                    match reading.end(&mut self.queue) {
                        Ok(ending) => *self.source.ending() = ending,
                        Err(error) => return Some(Err(error)),
                    }
                }
                Err(error) => {
                    self.reading = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// The rest of a batch: descriptors whose pieces have not been given.
type Rest = std::iter::Peekable<std::vec::IntoIter<Descriptor>>;

/// The state of going through a tar.
#[derive(Debug)]
struct Reading {
    walker: TarWalker,
    /// Small chunks on their way.
    small: Vec<u8>,
    known: Option<Known>,
    /// The directory of the tar that the bundle lies in.
    folder: Option<String>,
    begin: Option<BeginManifest>,
    manifest: Option<Manifest>,
    segment: Option<SegmentStream>,
    batch: Option<Rest>,
    seen: BTreeMap<u32, SeenSegment>,
    /// Runs held for damaged segments.
    runs_held: usize,
    cut_off: bool,
    blemishes: Vec<String>,
}

impl Reading {
    /// Puts pieces into the queue, or comes nearer to it. `false` at the end.
    fn advance(&mut self, queue: &mut VecDeque<Piece>) -> Result<bool> {
        if let Some(mut rest) = self.batch.take() {
            if self.give_group(&mut rest, queue)? && rest.peek().is_some() {
                self.batch = Some(rest);
            }
            return Ok(true);
        }
        let Some(segment) = &mut self.segment else { return self.next_member() };
        if let Some(batch) = segment.next_batch(&mut self.walker)? {
            self.batch = Some(batch.descriptors.into_iter().peekable());
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
        while let Some(next) = rest.peek() {
            let length = padded(next.stored_bytes.into()) as usize;
            if bytes > 0 && (length >= LARGE_BYTES || bytes + length > GROUP_BYTES) {
                break;
            }
            group.push((bytes..bytes + length, *next));
            bytes += length;
            rest.next();
            if length >= LARGE_BYTES {
                break;
            }
        }
        let mut large = None;
        let came = if bytes >= LARGE_BYTES && group.last().is_some_and(|(at, _)| at.len() == bytes)
        {
            let mut memory = AlignedBuffer::zeroed(bytes);
            let came = segment.read_payload(&mut self.walker, &mut memory)?;
            large = Some(memory);
            came
        } else {
            self.small.resize(bytes, 0);
            segment.read_payload(&mut self.walker, &mut self.small)?
        };
        for (at, descriptor) in group {
            if at.end > came {
                break;
            }
            segment.found(descriptor.range);
            let content = match descriptor.kind {
                ChunkKind::Data | ChunkKind::Zstd => {
                    let bytes = large.take();
                    let bytes = bytes.unwrap_or_else(|| AlignedBuffer::from_slice(&self.small[at]));
                    Content::Stored { file: Arc::new(Came(bytes)), position: 0, descriptor }
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
    fn next_member(&mut self) -> Result<bool> {
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
    fn member_bytes(&mut self, member: &TarMember) -> Result<Option<Vec<u8>>> {
        if member.bytes > BUNDLE_MANIFEST_BYTES_MAX {
            return Err(Error::format(format!(
                "expected a manifest of at most {BUNDLE_MANIFEST_BYTES_MAX} bytes, found {}",
                member.bytes
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
        let Some(bytes) = self.member_bytes(member)? else { return Ok(()) };
        let begin = BeginManifest::parse(&bytes)?;
        self.settle(known_of(&begin, *blake3::hash(&bytes).as_bytes())?)?;
        self.begin = Some(begin);
        Ok(())
    }

    fn take_manifest(&mut self, member: &TarMember) -> Result<()> {
        let Some(bytes) = self.member_bytes(member)? else { return Ok(()) };
        let manifest = Manifest::parse(&bytes)?;
        self.settle(known_of(&manifest.begin, manifest.begin_hash.0)?)?;
        self.manifest = Some(manifest);
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
        let (geometry, header_hash) = match (SegmentHeader::parse(&page), self.known) {
            (Ok((header, hash)), _) => {
                if header.segment != number {
                    return Err(Error::format(format!(
                        "expected segment {number} in {}, found segment {}",
                        member.name, header.segment
                    )));
                }
                self.settle(known_of_header(&header))?;
                (header.geometry, hash)
            }
            // Its pages can still be told: they are bound to what the header must have been.
            (Err(error), Some(known)) if error.kind() != ErrorKind::Identity => {
                self.blemishes.push(format!("{}: {error}", member.name));
                (known.identity.geometry, known.header(number).encode().1)
            }
            (Err(error), _) => return Err(error),
        };
        self.segment = Some(SegmentStream::new(number, geometry, header_hash));
        Ok(())
    }

    fn nothing(&self) -> Error {
        if self.cut_off {
            return Error::format("the tar ends before it says whose bundle it holds");
        }
        Error::format("expected a bundle in the tar, found none of its files")
    }

    /// What should have come and did not, as missing pieces.
    fn end(mut self, queue: &mut VecDeque<Piece>) -> Result<Ending> {
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
        let mut absent = 0;
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
                    ending.blemishes.push(format!("{}: it is damaged", entry.name));
                    ("the page that describes it is damaged", gaps(coverage, &seen.found))
                }
            };
            let content = Content::Missing(why);
            queue
                .extend(missing.into_iter().map(|range| Piece { range, content: content.clone() }));
        }
        if absent > 0 && self.cut_off {
            ending.shortfall = Some(Error::integrity(format!(
                "the tar was cut off: {absent} of {} segments have not come. What came whole is \
                 kept; run this again with the whole tar",
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
        let (bundle, begin_hash) = (self.bundle, self.begin_hash);
        SegmentHeader { bundle, volume, geometry, generation, cut, segment, begin_hash }
    }
}

fn known_of(begin: &BeginManifest, begin_hash: Hash) -> Result<Known> {
    let identity = Identity {
        volume: begin.volume.map_or(Uuid::nil(), |volume| volume.0),
        geometry: begin.geometry()?,
        generation: begin.generation,
        cut: begin.cut,
    };
    Ok(Known { bundle: begin.bundle.0, identity, begin_hash })
}

fn known_of_header(header: &SegmentHeader) -> Known {
    let &SegmentHeader { volume, geometry, generation, cut, .. } = header;
    let identity = Identity { volume, geometry, generation, cut };
    Known { bundle: header.bundle, identity, begin_hash: header.begin_hash }
}
