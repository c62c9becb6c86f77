//! Goes through the batches of one segment file.
//!
//! | index | batches are found by |
//! |---|---|
//! | whole | its positions; a damaged descriptor page costs its batch |
//! | damaged or missing | scanning page by page for one that is whole |
//!
//! Guarantees: only batches whose descriptor pages are whole and of this very segment are given.
//! Does not know: chunks' bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use super::pieces::{Content, Piece};
use crate::device::FolderFile;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    Batch, Checks, ChunkKind, Hash, IndexEntry, PAGE_BYTES, Page, Place, SegmentHeader, Trailer,
    index_bytes, parse_batch, parse_index, parse_page_head,
};
use crate::units::Geometry;

const PAGE: u64 = PAGE_BYTES as u64;

/// See the module.
#[derive(Debug)]
pub struct SegmentReader {
    file: Arc<dyn FolderFile>,
    number: u32,
    geometry: Geometry,
    checks: Arc<Checks>,
    length: u64,
    found_by: FoundBy,
    root: blake3::Hasher,
    trailer: Option<Trailer>,
    /// Batches that were read ahead, because only all together are they vouched for.
    held: Option<VecDeque<FoundBatch>>,
    /// The first page that could not be read, rather than being damaged: why.
    unread: Option<Error>,
}

#[derive(Debug)]
enum FoundBy {
    Index(std::vec::IntoIter<IndexEntry>),
    Scan(u64),
}

/// A batch, and where its payload lies in the file.
#[derive(Debug)]
pub struct FoundBatch {
    pub batch: Batch,
    pub payload_position: u64,
    /// What its chunks are checked with.
    pub checks: Arc<Checks>,
}

impl FoundBatch {
    /// The chunk of one of its descriptors as a piece of that file.
    #[must_use]
    pub fn piece(&self, number: usize, file: &Arc<dyn FolderFile>) -> Piece {
        let descriptor = self.batch.descriptors[number];
        let content = match descriptor.kind {
            ChunkKind::Zero => Content::Zero,
            ChunkKind::Unreadable => Content::Missing("its source could not be read"),
            ChunkKind::Data | ChunkKind::Zstd => Content::Stored {
                file: Arc::clone(file),
                position: self.payload_position + u64::from(descriptor.payload_offset),
                descriptor,
                checks: Arc::clone(&self.checks),
                place: Place {
                    batch: self.batch.batch,
                    descriptor: u32::try_from(number).expect("a batch has few"),
                },
            },
        };
        Piece { range: descriptor.range, content }
    }

    /// All of them.
    pub fn pieces(&self, file: &Arc<dyn FolderFile>) -> impl Iterator<Item = Piece> {
        (0..self.batch.descriptors.len()).map(|number| self.piece(number, file))
    }
}

impl FoundBatch {
    /// As the index should have it, and where the batch ends.
    #[must_use]
    pub fn as_indexed(&self) -> (IndexEntry, u64) {
        let Self { batch, payload_position, .. } = self;
        let start = batch.descriptors.first().map_or(0, |first| first.range.offset);
        let end = batch.descriptors.last().map_or(start, |last| last.range.end());
        let entry = IndexEntry {
            span: ByteRange::new(start, end - start),
            position: payload_position - u64::from(batch.pages) * PAGE,
            pages: batch.pages,
            descriptors: u32::try_from(batch.descriptors.len()).expect("a batch has few"),
        };
        (entry, payload_position + u64::from(batch.payload_bytes))
    }
}

impl SegmentReader {
    /// A segment whose header has been read. Only a failing read is an error.
    pub fn open(
        file: Arc<dyn FolderFile>,
        number: u32,
        geometry: Geometry,
        checks: Arc<Checks>,
    ) -> Result<Self> {
        let length = file.length()? / PAGE * PAGE;
        let mut reader = Self {
            file,
            number,
            geometry,
            checks,
            length,
            found_by: FoundBy::Scan(PAGE),
            root: blake3::Hasher::new(),
            trailer: None,
            held: None,
            unread: None,
        };
        match reader.read_index() {
            Ok((trailer, index)) => {
                reader.found_by = FoundBy::Index(index.into_iter());
                reader.trailer = Some(trailer);
            }
            Err(error) => reader.note_unread(error),
        }
        Ok(reader)
    }

    fn read_index(&self) -> Result<(Trailer, Vec<IndexEntry>)> {
        let at = self.length.checked_sub(PAGE).ok_or_else(|| Error::format("an empty segment"))?;
        let trailer = Trailer::parse(&self.page(at)?, &self.checks)?;
        if trailer.file_bytes() != self.length || trailer.segment != self.number {
            return Err(Error::format("the trailer is of another segment"));
        }
        let length = index_bytes(trailer.batches.into());
        let mut index = vec![0; usize::try_from(length).expect("an index is small")];
        self.file.read_at(trailer.index_position, &mut index)?;
        let entries = parse_index(&index, &trailer)?;
        Ok((trailer, entries))
    }

    /// The trailer, if it and the index are whole.
    #[must_use]
    pub fn trailer(&self) -> Option<&Trailer> {
        self.trailer.as_ref()
    }

    /// Where its batches lie, if the index is whole; before the first `next_batch`.
    #[must_use]
    pub fn entries(&self) -> Option<&[IndexEntry]> {
        match &self.found_by {
            FoundBy::Index(entries) => Some(entries.as_slice()),
            FoundBy::Scan(_) => None,
        }
    }

    /// The batch that begins at this position.
    pub fn batch_at(&mut self, at: u64) -> Result<FoundBatch> {
        let batch = self.read_batch(at)?;
        let payload_position = at + u64::from(batch.pages) * PAGE;
        Ok(FoundBatch { batch, payload_position, checks: Arc::clone(&self.checks) })
    }

    /// The file, to read payloads from.
    #[must_use]
    pub fn file(&self) -> &Arc<dyn FolderFile> {
        &self.file
    }

    /// BLAKE3 of the hashes of all descriptor pages read so far.
    #[must_use]
    pub fn root(&self) -> Hash {
        *self.root.finalize().as_bytes()
    }

    fn page(&self, at: u64) -> Result<Page> {
        let mut page = [0; PAGE_BYTES];
        self.file.read_at(at, &mut page)?;
        Ok(page)
    }

    /// Gives batches only if all of them together have that root: it may be that of a manifest
    /// that is believed, when nothing on the medium is. Holds the descriptors of the segment.
    #[must_use]
    pub fn held_to(mut self, root: Hash) -> Self {
        let batches: VecDeque<_> = std::iter::from_fn(|| self.next_batch()).collect();
        self.held = Some(if self.root() == root { batches } else { VecDeque::new() });
        self
    }

    /// The next batch that is whole.
    pub fn next_batch(&mut self) -> Option<FoundBatch> {
        if let Some(held) = &mut self.held {
            return held.pop_front();
        }
        loop {
            let at = match &mut self.found_by {
                FoundBy::Index(entries) => entries.next()?.position,
                FoundBy::Scan(at) => {
                    let here = *at;
                    *at += PAGE;
                    here
                }
            };
            if at >= self.length {
                return None;
            }
            let batch = match self.read_batch(at) {
                Ok(batch) => batch,
                Err(error) => {
                    let gone = error.says_gone();
                    self.note_unread(error);
                    if gone { return None } else { continue }
                }
            };
            let payload_position = at + u64::from(batch.pages) * PAGE;
            let end = payload_position + u64::from(batch.payload_bytes);
            if let FoundBy::Scan(next) = &mut self.found_by {
                *next = end;
            }
            let checks = Arc::clone(&self.checks);
            return Some(FoundBatch { batch, payload_position, checks });
        }
    }

    /// An error if its medium seems to be gone: not even its first page can be read any more. What
    /// was not found may then be whole.
    pub fn check_presence(&self) -> Result<()> {
        let Some(unread) = &self.unread else { return Ok(()) };
        match self.page(0) {
            Err(error) if error.kind() == ErrorKind::Device => Err(unread.clone()),
            _ => Ok(()),
        }
    }

    fn note_unread(&mut self, error: Error) {
        if error.kind() == ErrorKind::Device {
            self.unread.get_or_insert(error);
        }
    }

    fn read_batch(&mut self, at: u64) -> Result<Batch> {
        let first = self.page(at)?;
        let head = parse_page_head(&first, &self.checks)?;
        if head.page != 0 {
            return Err(Error::format("a batch begins with its first page"));
        }
        let mut pages = vec![0; usize::from(head.pages) * PAGE_BYTES];
        self.file.read_at(at, &mut pages)?;
        let mut root = self.root.clone();
        let batch = parse_batch(&pages, self.number, self.geometry, &self.checks, &mut root)?;
        self.root = root;
        Ok(batch)
    }
}

/// Reads and checks the header page of a segment file.
pub fn read_header(file: &dyn FolderFile) -> Result<(SegmentHeader, Hash)> {
    let mut page = [0; PAGE_BYTES];
    file.read_at(0, &mut page)?;
    SegmentHeader::parse(&page)
}
