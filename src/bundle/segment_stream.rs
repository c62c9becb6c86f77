//! Goes through the batches of one segment as it comes, from what can be read only once.
//!
//! | found at the next page | |
//! |---|---|
//! | whole descriptor pages of a batch | the batch, its payload comes next |
//! | the trailer | remembered |
//! | anything else | passed by: a damaged descriptor page costs its batch |
//!
//! Guarantees: as those of `segment_reader.rs`; memory is that of the descriptor pages of a batch.
//! Does not know: chunks' bytes.

use std::sync::Arc;

use crate::device::TarWalker;
use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::bundle::{
    Batch, Checks, Hash, PAGE_BYTES, Page, Trailer, parse_batch, parse_page_head,
};
use crate::units::Geometry;

/// See the module.
#[derive(Debug)]
pub struct SegmentStream {
    number: u32,
    geometry: Geometry,
    header_hash: Hash,
    checks: Arc<Checks>,
    /// Read ahead of what was used.
    window: Vec<u8>,
    root: blake3::Hasher,
    trailer: Option<Trailer>,
    /// Runs that have a descriptor.
    found: Vec<ByteRange>,
}

/// What a segment that has been gone through turned out to be.
#[derive(Debug)]
pub struct SeenSegment {
    pub header_hash: Hash,
    pub root: Hash,
    /// Runs that have a descriptor and whose bytes came; empty if the trailer says that all have.
    pub found: Vec<ByteRange>,
    /// Nothing was passed by, and the trailer is there.
    pub whole: bool,
}

impl SegmentStream {
    /// A segment whose header page has just been read.
    #[must_use]
    pub fn new(number: u32, geometry: Geometry, header_hash: Hash, checks: Checks) -> Self {
        Self {
            number,
            geometry,
            header_hash,
            checks: Arc::new(checks),
            window: Vec::new(),
            root: blake3::Hasher::new(),
            trailer: None,
            found: Vec::new(),
        }
    }

    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What its chunks are checked with.
    #[must_use]
    pub fn checks(&self) -> &Arc<Checks> {
        &self.checks
    }

    /// The next batch that is whole; `None` at the end of the segment, or where it is cut off.
    pub fn next_batch(&mut self, walker: &mut TarWalker) -> Result<Option<Batch>> {
        while self.look_ahead(walker, PAGE_BYTES)? {
            let page: &Page = self.window.first_chunk().expect("a page was read");
            if let Ok(head) = parse_page_head(page, &self.checks)
                && head.page == 0
            {
                let length = usize::from(head.pages) * PAGE_BYTES;
                if self.look_ahead(walker, length)?
                    && let Some(batch) = self.parse(length)
                {
                    self.window.drain(..length);
                    return Ok(Some(batch));
                }
            } else if let Ok(trailer) = Trailer::parse(page, &self.checks) {
                self.trailer = Some(trailer);
            }
            self.window.drain(..PAGE_BYTES);
        }
        Ok(None)
    }

    fn parse(&mut self, length: usize) -> Option<Batch> {
        let mut root = self.root.clone();
        let pages = &self.window[..length];
        let batch = parse_batch(pages, self.number, self.geometry, &self.checks, &mut root);
        if batch.is_ok() {
            self.root = root;
        }
        batch.ok()
    }

    /// Whether so many bytes are in the window now.
    fn look_ahead(&mut self, walker: &mut TarWalker, length: usize) -> Result<bool> {
        let held = self.window.len();
        if held < length {
            self.window.resize(length, 0);
            let read = walker.read(&mut self.window[held..])?;
            self.window.truncate(held + read);
        }
        Ok(self.window.len() >= length)
    }

    /// Bytes of a payload; how many came.
    pub fn read_payload(&mut self, walker: &mut TarWalker, place: &mut [u8]) -> Result<usize> {
        let held = self.window.len().min(place.len());
        place[..held].copy_from_slice(&self.window[..held]);
        self.window.drain(..held);
        Ok(held + walker.read(&mut place[held..])?)
    }

    /// A range that a descriptor speaks of, and whose bytes have come if it has any.
    pub fn found(&mut self, range: ByteRange) {
        match self.found.last_mut() {
            Some(last) if last.end() == range.offset => last.length += range.length,
            _ => self.found.push(range),
        }
    }

    /// The end of the segment. `complete`: all bytes of all batches came.
    #[must_use]
    pub fn finish(mut self, complete: bool) -> SeenSegment {
        let root = *self.root.finalize().as_bytes();
        let whole = complete && self.trailer.as_ref().is_some_and(|trailer| trailer.root == root);
        self.found.sort_unstable();
        let found = if whole { Vec::new() } else { self.found };
        SeenSegment { header_hash: self.header_hash, root, found, whole }
    }
}
