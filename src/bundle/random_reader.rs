//! Reads any range of a bundle, verified: what an attached medium is read by.
//!
//! | step | kept in memory |
//! |---|---|
//! | segment by the fences of the manifest's coverage | all fences, 24 bytes each |
//! | batch by the index of the segment | indexes and descriptors, `MEDIUM_INDEX_BYTES` |
//! | chunk by the descriptors of the batch | |
//! | chunk read, verified and unpacked as one | chunks, `MEDIUM_CHUNK_BYTES` |
//!
//! Guarantees: bytes are given only after every check of their chunk (law 9); whatever the size of
//! the volume, memory is bounded by the manifest and those two limits; several readers of one
//! chunk read it once. No file stays open between two reads, so that a medium may be unmounted at
//! any time.
//! Does not know: whether a block may come from this bundle.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::pieces::{Content, Opener, Piece, read_together};
use super::reader::Bundle;
use super::segment_reader::{FoundBatch, SegmentReader};
use crate::device::{AlignedBuffer, FolderFile, Payload};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::bundle::IndexEntry;
use crate::limits::{BUNDLE_CHUNK_BYTES_MAX, MEDIUM_CHUNK_BYTES, MEDIUM_INDEX_BYTES};

/// See the module.
pub struct RandomReader {
    bundle: Arc<Bundle>,
    fences: Vec<Fence>,
    kept: Mutex<Kept>,
    /// Signalled when a chunk was loaded, or could not be.
    loaded: Condvar,
    openers: Mutex<Vec<Opener>>,
}

/// A run of the volume, and the segment that speaks of it.
#[derive(Clone, Copy, Debug)]
struct Fence {
    range: ByteRange,
    segment: usize,
}

/// Where a chunk begins in the volume; fences do not overlap, so that names it.
type ChunkKey = u64;

#[derive(Debug)]
struct Kept {
    indexes: Cache<usize, Arc<[IndexEntry]>>,
    batches: Cache<(usize, u64), Arc<FoundBatch>>,
    chunks: Cache<ChunkKey, Payload>,
    loading: HashSet<ChunkKey>,
}

/// The segment that is open during one read, and its file.
type OpenFile = Option<(usize, Arc<dyn FolderFile>)>;

/// What is looked for at an offset.
enum Found {
    Zeros(ByteRange),
    Chunk(Piece),
}

impl fmt::Debug for RandomReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RandomReader").field("bundle", &self.bundle).finish_non_exhaustive()
    }
}

impl RandomReader {
    /// Refuses a bundle whose segments speak of the same bytes: none of them is the one to ask.
    pub fn new(bundle: impl Into<Arc<Bundle>>) -> Result<Self> {
        let bundle = bundle.into();
        let mut fences: Vec<Fence> = (0..)
            .zip(bundle.segments())
            .flat_map(|(segment, entry)| {
                entry.coverage.iter().map(move |run| Fence { range: (*run).into(), segment })
            })
            .collect();
        fences.sort_unstable_by_key(|fence| fence.range.offset);
        if fences.windows(2).any(|pair| pair[0].range.end() > pair[1].range.offset) {
            return Err(Error::format(
                "expected segments that each speak of other bytes, found some that overlap: merge \
                 the bundle instead",
            )
            .at_path(bundle.folder().path()));
        }
        let kept = Kept {
            indexes: Cache::new(MEDIUM_INDEX_BYTES / 4),
            batches: Cache::new(MEDIUM_INDEX_BYTES / 4 * 3),
            chunks: Cache::new(MEDIUM_CHUNK_BYTES),
            loading: HashSet::new(),
        };
        Ok(Self {
            bundle,
            fences,
            kept: Mutex::new(kept),
            loaded: Condvar::new(),
            openers: Mutex::default(),
        })
    }

    #[must_use]
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    #[must_use]
    pub fn shared_bundle(&self) -> Arc<Bundle> {
        Arc::clone(&self.bundle)
    }

    /// What it speaks of, ascending, runs that touch joined.
    #[must_use]
    pub fn coverage(&self) -> Vec<ByteRange> {
        let mut runs: Vec<ByteRange> = Vec::new();
        for Fence { range, .. } in &self.fences {
            match runs.last_mut() {
                Some(last) if last.end() == range.offset => last.length += range.length,
                _ => runs.push(*range),
            }
        }
        runs
    }

    /// Fills the buffer with what the volume held from `offset` at the cut; `false` if all of it is
    /// zero, and then the buffer is left as it was.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        let wanted = ByteRange::new(offset, buffer.len() as u64);
        let mut at = offset;
        let mut data = false;
        let mut file = None;
        while at < wanted.end() {
            let found = self.find(at, &mut file)?;
            let (Found::Zeros(range) | Found::Chunk(Piece { range, .. })) = &found;
            let part = range.intersect(ByteRange::new(at, wanted.end() - at));
            let part = part.expect("what was found holds the offset");
            let place = (part.offset - offset) as usize..(part.end() - offset) as usize;
            match found {
                Found::Zeros(_) if !data => {}
                Found::Zeros(_) => buffer[place].fill(0),
                Found::Chunk(piece) => {
                    if !data {
                        buffer[..place.start].fill(0);
                        data = true;
                    }
                    let chunk = self.chunk(&piece)?;
                    let start = (part.offset - piece.range.offset) as usize;
                    buffer[place].copy_from_slice(&chunk[start..start + part.length as usize]);
                }
            }
            at = part.end();
        }
        Ok(data)
    }

    /// The same in memory of its own, or of the one chunk that has it all.
    pub fn read(&self, range: ByteRange) -> Result<Payload> {
        if range.is_empty() {
            return Ok(Payload::copy_of(&[]));
        }
        let mut file = None;
        let mut bytes = None;
        let mut at = range.offset;
        while at < range.end() {
            let (stretch, held) = self.stretch(ByteRange::new(at, range.end() - at), &mut file)?;
            let part = stretch.intersect(range).expect("what was found holds the offset");
            let start = (part.offset - stretch.offset) as usize;
            let held = held.map(|held| held.slice(start, part.length as usize));
            if let (Some(whole), true) = (&held, part == range) {
                return Ok(whole.clone());
            }
            let all = bytes.get_or_insert_with(|| AlignedBuffer::zeroed(range.length as usize));
            if let Some(held) = held {
                let place = (part.offset - range.offset) as usize;
                all[place..place + held.len()].copy_from_slice(&held);
            }
            at = part.end();
        }
        Ok(Payload::new(bytes.expect("the range is not empty")))
    }

    /// What there is where the range begins: zeros, a chunk, or as many that follow each other as
    /// are wanted and may be read together; and its bytes, `None` for zeros.
    fn stretch(
        &self,
        wanted: ByteRange,
        file: &mut OpenFile,
    ) -> Result<(ByteRange, Option<Payload>)> {
        let first = match self.find(wanted.offset, file)? {
            Found::Zeros(range) => return Ok((range, None)),
            Found::Chunk(piece) => piece,
        };
        let mut range = first.range;
        let mut group = vec![first];
        while range.end() < wanted.end() {
            let Ok(Found::Chunk(next)) = self.find(range.end(), file) else { break };
            let more = range.length + next.range.length;
            if !group[group.len() - 1].is_followed_by(&next) || more > BUNDLE_CHUNK_BYTES_MAX {
                break;
            }
            range.length = more;
            group.push(next);
        }
        if let [one] = &group[..] {
            return Ok((range, Some(self.chunk(one)?)));
        }
        let mut opener = self.take_opener()?;
        let read = read_together(&group, &mut opener);
        self.openers().push(opener);
        let (bytes, opened) = read?;
        opened.into_iter().collect::<Result<()>>()?;
        Ok((range, Some(bytes)))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, at: u64, opened: &mut OpenFile) -> Result<Found> {
        let after = self.fences.partition_point(|fence| fence.range.offset <= at);
        let fence = after.checked_sub(1).map(|last| self.fences[last]);
        let fence = fence.filter(|fence| at < fence.range.end()).ok_or_else(|| {
            Error::usage("expected a range that the bundle includes, found another").at_offset(at)
        })?;
        let index = self.index(fence.segment)?;
        for entry in index.iter().filter(|entry| holds(entry.span, at)) {
            let found = self.batch(fence.segment, entry.position)?;
            let held = found.batch.descriptors.iter().position(|held| holds(held.range, at));
            let Some(number) = held else { continue };
            let file = match opened.take() {
                Some((segment, file)) if segment == fence.segment => file,
                _ => self.bundle.folder().open(&self.bundle.segments()[fence.segment].name)?,
            };
            let piece = found.piece(number, &file);
            *opened = Some((fence.segment, file));
            return match piece.content {
                Content::Zero => Ok(Found::Zeros(piece.range)),
                Content::Missing(why) => Err(Error::integrity(why).at_offset(at)),
                _ => Ok(Found::Chunk(piece)),
            };
        }
        Err(Error::integrity("the page that describes it is damaged").at_offset(at))
    }

    fn segment(&self, segment: usize) -> Result<SegmentReader> {
        let entry = &self.bundle.segments()[segment];
        // Its pages are checked against the hash of its header: no other segment is taken for it.
        let file = self.bundle.folder().open(&entry.name)?;
        let checks = Arc::new(self.bundle.checks_of(entry)?);
        SegmentReader::open(file, entry.number, self.bundle.geometry(), checks)
    }

    fn index(&self, segment: usize) -> Result<Arc<[IndexEntry]>> {
        if let Some(index) = self.kept().indexes.get(&segment) {
            return Ok(index);
        }
        if self.bundle.is_signed() {
            let batches = self.vouched_batches(segment)?;
            let entries = batches.iter().map(|found| found.as_indexed().0).collect();
            return Ok(self.keep_index(segment, entries));
        }
        let reader = self.segment(segment)?;
        let entries = reader.entries().ok_or_else(|| {
            let name = &self.bundle.segments()[segment].name;
            Error::integrity("the index of the segment is damaged; a merge goes through it all")
                .at_path(&self.bundle.folder().path().join(name))
        })?;
        Ok(self.keep_index(segment, Arc::from(entries)))
    }

    fn keep_index(&self, segment: usize, entries: Arc<[IndexEntry]>) -> Arc<[IndexEntry]> {
        self.kept().indexes.put(segment, Arc::clone(&entries), size_of_val(&*entries));
        entries
    }

    /// All batches of a segment, which only together are what was signed; kept as far as there is
    /// room.
    fn vouched_batches(&self, segment: usize) -> Result<Vec<Arc<FoundBatch>>> {
        let entry = &self.bundle.segments()[segment];
        let mut reader = self.bundle.read_segment(entry)?;
        let batches: Vec<_> = std::iter::from_fn(|| reader.next_batch()).map(Arc::new).collect();
        if batches.is_empty() && entry.chunks > 0 {
            return Err(Error::integrity("it is not the segment that was signed, or damaged")
                .at_path(&self.bundle.folder().path().join(&entry.name)));
        }
        for found in &batches {
            self.keep_batch(segment, found);
        }
        Ok(batches)
    }

    fn keep_batch(&self, segment: usize, found: &Arc<FoundBatch>) {
        let bytes = size_of_val(&*found.batch.descriptors);
        let key = (segment, found.as_indexed().0.position);
        self.kept().batches.put(key, Arc::clone(found), bytes);
    }

    fn batch(&self, segment: usize, position: u64) -> Result<Arc<FoundBatch>> {
        if let Some(batch) = self.kept().batches.get(&(segment, position)) {
            return Ok(batch);
        }
        if self.bundle.is_signed() {
            let mut batches = self.vouched_batches(segment)?.into_iter();
            let found = batches.find(|found| found.as_indexed().0.position == position);
            return found.ok_or_else(|| Error::integrity("the segment changed meanwhile"));
        }
        let found = Arc::new(self.segment(segment)?.batch_at(position)?);
        self.keep_batch(segment, &found);
        Ok(found)
    }

    /// The verified bytes of a stored chunk; whoever else wants it meanwhile waits for it.
    fn chunk(&self, piece: &Piece) -> Result<Payload> {
        let key = piece.range.offset;
        let mut kept = self.kept();
        loop {
            if let Some(chunk) = kept.chunks.get(&key) {
                return Ok(chunk);
            }
            if kept.loading.insert(key) {
                break;
            }
            kept = self.loaded.wait(kept).unwrap_or_else(PoisonError::into_inner);
        }
        drop(kept);
        let result = self.load(piece);
        let mut kept = self.kept();
        kept.loading.remove(&key);
        if let Ok(chunk) = &result {
            kept.chunks.put(key, chunk.clone(), chunk.len());
        }
        drop(kept);
        self.loaded.notify_all();
        result
    }

    fn load(&self, piece: &Piece) -> Result<Payload> {
        let mut opener = self.take_opener()?;
        let bytes = piece.bytes(&mut opener);
        self.openers().push(opener);
        bytes
    }

    fn openers(&self) -> MutexGuard<'_, Vec<Opener>> {
        self.openers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_opener(&self) -> Result<Opener> {
        let kept = self.openers().pop();
        kept.map_or_else(Opener::new, Ok)
    }
}

fn holds(range: ByteRange, at: u64) -> bool {
    range.offset <= at && at < range.end()
}

/// What was used last, up to so many bytes; the longest unused goes first.
#[derive(Debug)]
struct Cache<K, V> {
    entries: HashMap<K, Entry<V>>,
    bytes: usize,
    bytes_max: usize,
    uses: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    bytes: usize,
    used: u64,
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    fn new(bytes_max: usize) -> Self {
        Self { entries: HashMap::new(), bytes: 0, bytes_max, uses: 0 }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        self.uses += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.uses;
        Some(entry.value.clone())
    }

    fn put(&mut self, key: K, value: V, bytes: usize) {
        // Its own place in the table counts as well, or empty ones would be without number.
        let bytes = bytes + size_of::<(K, Entry<V>)>();
        if bytes > self.bytes_max {
            return;
        }
        self.uses += 1;
        let entry = Entry { value, bytes, used: self.uses };
        let replaced = self.entries.insert(key, entry);
        self.bytes = self.bytes + bytes - replaced.map_or(0, |entry| entry.bytes);
        while self.bytes > self.bytes_max {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let oldest = *oldest.expect("what has bytes has entries").0;
            let gone = self.entries.remove(&oldest).expect("just seen");
            self.bytes -= gone.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{BundleWriter, Compression, ImageSource, WriterOptions};
    use crate::device::{Folder, RamDevice, RamFolder};
    use crate::error::ErrorKind;
    use crate::limits::BUNDLE_ZERO_GRAIN_BYTES;
    use crate::units::BlockSize;
    use std::ops::ControlFlow;

    const SIZE: usize = (9 << 20) + 512;

    /// Noise, with zeros from 2 to 5 MiB and in the last KiB.
    fn image() -> Vec<u8> {
        let mut state = 1u64;
        let mut bytes = vec![0; SIZE];
        for word in bytes.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&(state >> 8 & 0x00ff_00ff_00ff_00ff).to_le_bytes());
        }
        bytes[2 << 20..5 << 20].fill(0);
        bytes[SIZE - 1024..].fill(0);
        bytes
    }

    fn folder(compression: Compression, selection: &[(u64, u64)]) -> RamFolder {
        let source = Arc::new(RamDevice::from_bytes(image()));
        let source = ImageSource::new(source, BlockSize::DEFAULT).expect("an image");
        let folder = RamFolder::new();
        let options = WriterOptions {
            segment_bytes_max: 2 << 20,
            threads: 1,
            compression,
            selection: selection.iter().map(|run| ByteRange::new(run.0, run.1)).collect(),
            ..WriterOptions::default()
        };
        BundleWriter::create_in(&folder, &source, &options, &mut |_| ControlFlow::Continue(()))
            .expect("made");
        folder
    }

    fn reader(folder: &RamFolder) -> RandomReader {
        let bundle = Bundle::open_in(Arc::new(folder.clone())).expect("whole");
        RandomReader::new(bundle).expect("no overlap")
    }

    fn read(reader: &RandomReader, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0xaa; length];
        let data = reader.read_at(offset, &mut buffer)?;
        Ok(if data { buffer } else { vec![0; length] })
    }

    #[test]
    fn every_range_reads_as_the_image_whatever_its_chunks() {
        let image = image();
        for compression in [Compression::None, Compression::parse("zstd:1").expect("known")] {
            let reader = reader(&folder(compression, &[]));
            for (offset, length) in [
                (0, 4096),
                (0, SIZE),
                (SIZE - 512, 512),
                ((2 << 20) - 4096, 3 << 20),
                ((1 << 20) - 512, 1024),
                ((5 << 20) - 4096, 8192),
                (3 << 20, 4096),
            ] {
                let found = read(&reader, offset as u64, length).expect("whole");
                assert!(found == image[offset..offset + length], "{length} bytes at {offset}");
            }
            let mut buffer = [7; 4096];
            assert!(!reader.read_at(3 << 20, &mut buffer).expect("zeros"));
            assert_eq!(buffer, [7; 4096], "zeros are told, not written");
        }
    }

    #[test]
    fn a_range_within_one_chunk_is_the_chunks_own_memory() {
        let reader = reader(&folder(Compression::None, &[]));
        let whole = reader.read(ByteRange::new(0, 64 << 10)).expect("whole");
        let part = reader.read(ByteRange::new(512, 4096)).expect("whole");
        assert_eq!(part.as_ptr(), whole[512..].as_ptr());
        for (offset, length) in [(0, SIZE), (SIZE - 512, 512), ((1 << 20) - 512, 1024), (7, 0)] {
            let bytes = reader.read(ByteRange::new(offset as u64, length as u64)).expect("whole");
            assert!(bytes[..] == image()[offset..offset + length], "{length} bytes at {offset}");
        }
    }

    #[test]
    fn what_is_not_included_is_refused_and_never_zero() {
        let reader = reader(&folder(Compression::None, &[(4096, 8192), (1 << 20, 4096)]));
        assert_eq!(reader.coverage(), [ByteRange::new(4096, 8192), ByteRange::new(1 << 20, 4096)]);
        read(&reader, 4096, 8192).expect("included");
        for (offset, length) in [(0, 4096), (8192, 8192), ((1 << 20) + 4096, 512)] {
            read(&reader, offset, length).map(|_| ()).expect_err("not included");
        }
    }

    #[test]
    fn a_damaged_chunk_is_refused_and_its_neighbours_are_not() {
        let folder = folder(Compression::None, &[]);
        let name = "seg-00000000.drs";
        let mut bytes = folder.contents(name).expect("there");
        bytes[900_000] ^= 1;
        folder.replace(name, bytes);
        let reader = reader(&folder);
        let page = |at: u64| read(&reader, at, 4096);
        let damaged: Vec<u64> =
            (0..1 << 20).step_by(4096).filter(|at| page(*at).is_err()).collect();
        let grain = BUNDLE_ZERO_GRAIN_BYTES;
        let hit = damaged[0] / grain * grain;
        assert_eq!(damaged, (hit..hit + grain).step_by(4096).collect::<Vec<_>>());
        assert_eq!(page(hit).map(|_| ()).expect_err("damaged").kind(), ErrorKind::Integrity);
        let next = hit + grain;
        assert!(page(next).expect("whole") == image()[next as usize..][..4096]);
    }

    #[test]
    fn a_damaged_index_or_page_costs_its_own_and_a_lost_segment_is_a_failure_of_the_medium() {
        let image = image();
        let folder = folder(Compression::None, &[]);
        let whole_reader = reader(&folder);
        let last = "seg-00000000.drs";
        let whole = folder.contents(last).expect("there");
        for at in [4096 + 100, whole.len() - 4096 - 10] {
            let reader = reader(&folder);
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            folder.replace(last, bytes);
            let found = read(&reader, 0, 4096).map(|_| ()).expect_err("damaged");
            folder.replace(last, whole.clone());
            assert_eq!(found.kind(), ErrorKind::Integrity, "byte {at}: {found}");
        }
        let far = read(&whole_reader, 6 << 20, 4096).expect("another");
        assert!(far == image[6 << 20..][..4096]);
        folder.remove(last).expect("removed");
        let found = read(&whole_reader, 0, 4096).map(|_| ()).expect_err("gone");
        assert_eq!((found.kind(), found.errno()), (ErrorKind::Device, Some(2)));
    }

    #[test]
    fn a_chunk_that_was_read_once_is_read_from_memory_and_memory_is_bounded() {
        let folder = folder(Compression::None, &[]);
        let reader = reader(&folder);
        read(&reader, 0, SIZE).expect("whole");
        for name in folder.names().expect("listed") {
            if name.ends_with(".drs") {
                let bytes = folder.contents(&name).expect("there");
                folder.replace(&name, vec![0; bytes.len()]);
            }
        }
        assert!(read(&reader, 6 << 20, 4096).expect("kept") == image()[6 << 20..][..4096]);
        let mut cache = Cache::new(1000);
        for key in 0..100u64 {
            cache.put(key, key, 200);
            assert!(cache.bytes <= 1000);
            cache.get(&0);
        }
        assert!(cache.get(&0).is_some() && cache.get(&1).is_none() && cache.get(&99).is_some());
    }
}
