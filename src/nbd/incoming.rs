//! Bytes of a client that are not yet understood.
//!
//! Guarantees: memory is `limits::NBD_INCOMING_BYTES`, whatever arrives; `readable` is one slice.
//! Does not know: messages.

use crate::limits::NBD_INCOMING_BYTES;

/// See the module.
#[derive(Debug)]
pub(super) struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; NBD_INCOMING_BYTES], start: 0, end: 0 }
    }

    pub(super) fn readable(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "{count} of {}", self.end - self.start);
        self.start += count;
    }

    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Where the next bytes go, at most `count`; empty when nothing more fits.
    pub(super) fn space(&mut self, count: usize) -> &mut [u8] {
        if self.start == self.end {
            self.clear();
        } else if self.end == self.bytes.len() || self.start >= NBD_INCOMING_BYTES / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let end = self.bytes.len().min(self.end.saturating_add(count));
        &mut self.bytes[self.end..end]
    }

    /// `count` bytes were put into `space`.
    pub(super) fn received(&mut self, count: usize) {
        self.end += count;
        assert!(self.end <= self.bytes.len(), "more was received than there was space");
    }
}
