//! Chunks become batches, batches become segments.
//!
//! | state | a chunk arrives | it does not fit the batch | it does not fit the segment | end |
//! |---|---|---|---|---|
//! | no segment | header is ordered, then as below | | the medium is full | nothing |
//! | batch empty | it begins the batch | | segment is closed | segment is closed |
//! | batch begun | it joins, or extends a run of zeros | batch is ordered | | both |
//!
//! Guarantees: chunks are stored in the order they arrive; no segment is larger than allowed, nor
//! larger than what the medium has room for (so the last one on a medium closes early); what is
//! ordered is one write of aligned memory at an aligned position.
//! Does not know: files (another thread carries out the orders), how chunks were encoded.

use crossbeam_channel::{Receiver, Sender};

use super::encryption::{Encryption, seal_batch};
use crate::device::AlignedBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    Checks, ChunkKind, DESCRIPTORS_PER_PAGE, Descriptor, HexHash, IndexEntry, PAGE_BYTES, Run,
    SegmentEntry, SegmentHeader, Trailer, encode_batch, encode_index, index_bytes, padded,
    pages_for, segment_name,
};
use crate::limits::{BUNDLE_BATCH_BYTES_MAX, BUNDLE_BATCH_PAGES_MAX, BUNDLE_SEGMENTS_MAX};

const PAGE: u64 = PAGE_BYTES as u64;
/// Descriptor pages are laid directly before the payload, so that both are one write.
const PAYLOAD_AT: usize = BUNDLE_BATCH_PAGES_MAX as usize * PAGE_BYTES;
/// Bytes of the memory of one batch.
pub const STAGING_BYTES: usize = PAYLOAD_AT + BUNDLE_BATCH_BYTES_MAX as usize;
const DESCRIPTORS_MAX: usize = BUNDLE_BATCH_PAGES_MAX as usize * DESCRIPTORS_PER_PAGE;

/// Room that the manifest needs for one segment, and for each run of its coverage: JSON with the
/// longest numbers there are.
pub const ENTRY_ROOM_BYTES: u64 = 1024;
pub const RUN_ROOM_BYTES: u64 = 96;

/// What a segment takes of its medium, its part of the manifest counted.
pub fn room_of(entry: &SegmentEntry) -> u64 {
    padded(entry.bytes) + ENTRY_ROOM_BYTES + RUN_ROOM_BYTES * entry.coverage.len() as u64
}

/// What the thread that owns the files is to do, in this order.
#[derive(Debug)]
pub enum Order {
    /// Begin a file.
    Create(String),
    Write(u64, Vec<u8>),
    /// Write that part of the memory, then give it back.
    WriteBatch(u64, AlignedBuffer, std::ops::Range<usize>),
    /// The file is complete: make it durable.
    Close,
}

/// Where orders go, and where the memory of written batches comes back from.
#[derive(Debug)]
pub struct Outlet {
    pub orders: Sender<Order>,
    pub written: Receiver<AlignedBuffer>,
}

impl Outlet {
    fn order(&self, order: Order) -> Result<()> {
        self.orders.send(order).map_err(|_| stopped())
    }
}

/// The other thread has ended; its own error says why.
fn stopped() -> Error {
    Error::new(ErrorKind::Interrupted, "the files of the bundle are no longer written")
}

#[derive(Debug)]
struct OpenSegment {
    checks: Checks,
    position: u64,
    index: Vec<IndexEntry>,
    root: blake3::Hasher,
    entry: SegmentEntry,
}

/// See the module.
#[derive(Debug)]
pub struct Assembler {
    outlet: Outlet,
    identity: SegmentHeader,
    encryption: Option<Encryption>,
    segment_bytes_max: u64,
    /// What the medium takes beside the closed segments; `None`: nobody knows.
    room: Option<u64>,
    segment: Option<OpenSegment>,
    memory: AlignedBuffer,
    payload: usize,
    descriptors: Vec<Descriptor>,
    finished: Vec<SegmentEntry>,
}

impl Assembler {
    /// `identity` is the header of the first segment, its salt left out.
    pub fn new(
        outlet: Outlet,
        identity: SegmentHeader,
        encryption: Option<Encryption>,
        segment_bytes_max: u64,
        room: Option<u64>,
    ) -> Result<Self> {
        let memory = outlet.written.recv().map_err(|_| stopped())?;
        Ok(Self {
            outlet,
            identity,
            encryption,
            segment_bytes_max,
            room,
            segment: None,
            memory,
            payload: 0,
            descriptors: Vec::new(),
            finished: Vec::new(),
        })
    }

    /// Takes the next chunk and the bytes to store for it; `false` if the medium has no room left
    /// for it.
    pub fn add(&mut self, mut descriptor: Descriptor, stored: &[u8]) -> Result<bool> {
        assert_eq!(stored.len(), descriptor.stored_bytes as usize, "a chunk and its bytes");
        if self.extends_last(&descriptor) {
            return Ok(true);
        }
        let length = padded(stored.len() as u64) as usize;
        loop {
            if self.segment.is_none() {
                if self.room.is_some_and(|room| room < bytes_of_smallest(length as u64)) {
                    return Ok(false);
                }
                self.open_segment()?;
            }
            if self.fits(length) {
                break;
            }
            if self.descriptors.is_empty() {
                self.close_segment()?;
            } else {
                self.close_batch()?;
            }
        }
        if descriptor.kind.is_stored() {
            descriptor.payload_offset = self.payload as u32;
            let place = &mut self.memory[PAYLOAD_AT + self.payload..][..length];
            let (bytes, padding) = place.split_at_mut(stored.len());
            bytes.copy_from_slice(stored);
            padding.fill(0);
        }
        self.payload += length;
        self.account(&descriptor, true);
        self.descriptors.push(descriptor);
        Ok(true)
    }

    /// Closes everything.
    pub fn finish(&mut self) -> Result<()> {
        if !self.descriptors.is_empty() {
            self.close_batch()?;
        }
        if self.segment.is_some() {
            self.close_segment()?;
        }
        Ok(())
    }

    /// The same, while it goes on.
    pub fn closed(&self) -> &[SegmentEntry] {
        &self.finished
    }

    /// The segments whose closing was ordered, in order.
    pub fn into_closed(self) -> Vec<SegmentEntry> {
        self.finished
    }

    /// A run of zeros, or of unreadable blocks, goes on in one descriptor however long it is.
    fn extends_last(&mut self, descriptor: &Descriptor) -> bool {
        let Some(last) = self.descriptors.last_mut() else { return false };
        let extends = !descriptor.kind.is_stored()
            && descriptor.kind == last.kind
            && last.range.end() == descriptor.range.offset;
        if extends {
            last.range.length += descriptor.range.length;
            self.account(descriptor, false);
        }
        extends
    }

    /// Whether a chunk fits the open segment, and that the medium.
    fn fits(&self, length: usize) -> bool {
        let segment = self.segment.as_ref().expect("opened by the caller");
        let descriptors = self.descriptors.len() + 1;
        let payload = (self.payload + length) as u64;
        let batches = segment.index.len() as u64 + 1;
        let after = segment.position
            + u64::from(pages_for(descriptors)) * PAGE
            + payload
            + index_bytes(batches)
            + PAGE;
        let runs = segment.entry.coverage.len() as u64 + 1;
        let fits = descriptors <= DESCRIPTORS_MAX
            && payload <= BUNDLE_BATCH_BYTES_MAX.into()
            && after <= self.segment_bytes_max
            && self
                .room
                .is_none_or(|room| after + ENTRY_ROOM_BYTES + RUN_ROOM_BYTES * runs <= room);
        assert!(fits || batches > 1 || descriptors > 1, "an empty segment takes any chunk");
        fits
    }

    fn account(&mut self, descriptor: &Descriptor, new: bool) {
        let entry = &mut self.segment.as_mut().expect("a chunk has a segment").entry;
        entry.chunks += u64::from(new);
        entry.stored_bytes += u64::from(descriptor.stored_bytes);
        *match descriptor.kind {
            ChunkKind::Data | ChunkKind::Zstd => &mut entry.data_bytes,
            ChunkKind::Zero => &mut entry.zero_bytes,
            ChunkKind::Unreadable => &mut entry.unreadable_bytes,
        } += descriptor.range.length;
        match entry.coverage.last_mut() {
            Some(last) if last.1 == descriptor.range.offset => last.1 = descriptor.range.end(),
            _ => entry.coverage.push(Run::from(descriptor.range)),
        }
    }

    fn open_segment(&mut self) -> Result<()> {
        let closed = u32::try_from(self.finished.len()).unwrap_or(u32::MAX);
        let number = self.identity.segment.saturating_add(closed);
        if number >= BUNDLE_SEGMENTS_MAX {
            return Err(Error::usage(format!(
                "expected at most {BUNDLE_SEGMENTS_MAX} segments; allow larger ones"
            )));
        }
        let salt = self.encryption.as_ref().map(|encryption| (encryption.salts)()).transpose()?;
        let header = SegmentHeader { segment: number, salt, ..self.identity };
        let (page, header_hash) = header.encode();
        let key = self.encryption.as_ref().map(|encryption| &encryption.key);
        let checks = header.checks(header_hash, key)?;
        let name = segment_name(number);
        self.outlet.order(Order::Create(name.clone()))?;
        self.outlet.order(Order::Write(0, page.to_vec()))?;
        let entry = SegmentEntry {
            name,
            number,
            bytes: 0,
            header_hash: HexHash(header_hash),
            root: HexHash::default(),
            chunks: 0,
            data_bytes: 0,
            zero_bytes: 0,
            unreadable_bytes: 0,
            stored_bytes: 0,
            coverage: Vec::new(),
            salt: salt.map(HexHash),
        };
        let root = blake3::Hasher::new();
        self.segment = Some(OpenSegment { checks, position: PAGE, index: Vec::new(), root, entry });
        Ok(())
    }

    fn close_batch(&mut self) -> Result<()> {
        let segment = self.segment.as_mut().expect("a batch has a segment");
        let pages = pages_for(self.descriptors.len());
        let start = PAYLOAD_AT - usize::from(pages) * PAGE_BYTES;
        let end = PAYLOAD_AT + self.payload;
        let batch = u32::try_from(segment.index.len()).expect("a segment is at most 1 GiB");
        let payload = &mut self.memory[PAYLOAD_AT..end];
        seal_batch(&segment.checks, batch, &mut self.descriptors, payload);
        encode_batch(
            (segment.entry.number, batch),
            &self.descriptors,
            &segment.checks,
            &mut self.memory[start..PAYLOAD_AT],
            &mut segment.root,
        );
        let first = self.descriptors.first().expect("a batch has a chunk").range.offset;
        let last = self.descriptors.last().expect("a batch has a chunk").range.end();
        segment.index.push(IndexEntry {
            span: ByteRange::new(first, last - first),
            position: segment.position,
            pages,
            descriptors: self.descriptors.len() as u32,
        });
        let position = segment.position;
        segment.position += (end - start) as u64;
        let fresh = self.outlet.written.recv().map_err(|_| stopped())?;
        let full = std::mem::replace(&mut self.memory, fresh);
        self.outlet.order(Order::WriteBatch(position, full, start..end))?;
        self.descriptors.clear();
        self.payload = 0;
        Ok(())
    }

    fn close_segment(&mut self) -> Result<()> {
        let OpenSegment { checks, position, index, root, mut entry } =
            self.segment.take().expect("a segment is open");
        let mut tail = encode_index(&index);
        entry.root = HexHash(*root.finalize().as_bytes());
        let trailer = Trailer {
            segment: entry.number,
            batches: index.len() as u32,
            index_position: position,
            chunks: entry.chunks,
            data_bytes: entry.data_bytes,
            zero_bytes: entry.zero_bytes,
            unreadable_bytes: entry.unreadable_bytes,
            stored_bytes: entry.stored_bytes,
            index_crc32c: crc32c::crc32c(&tail),
            index_hash: *blake3::hash(&tail).as_bytes(),
            root: entry.root.0,
        };
        entry.bytes = trailer.file_bytes();
        tail.extend_from_slice(&trailer.encode(&checks));
        self.outlet.order(Order::Write(position, tail))?;
        self.outlet.order(Order::Close)?;
        self.room = self.room.map(|room| room.saturating_sub(room_of(&entry)));
        self.finished.push(entry);
        Ok(())
    }
}

/// What a segment of one chunk takes: header, descriptors, chunk, index, trailer, manifest.
const fn bytes_of_smallest(length: u64) -> u64 {
    3 * PAGE + length + index_bytes(1) + ENTRY_ROOM_BYTES + RUN_ROOM_BYTES
}
