//! Bytes on their way to a client: small ones gathered in one store, large buffers as they are.
//!
//! Guarantees: bytes leave in the order in which they were put in; a buffer of a completed read is
//! not copied. The store is kept and reused, `rest` gives it back.
//! Does not know: messages, limits (the session stops producing).

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::device::AlignedBuffer;

/// A buffer below this size is copied into the store: one long piece beats many short ones.
const COPY_BELOW: usize = 16 << 10;
/// What the store keeps when it is at rest.
const KEEP_BYTES: usize = 64 << 10;

#[derive(Debug)]
enum Piece {
    /// The next so many bytes of the store.
    Stored(usize),
    Buffer(AlignedBuffer),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are sent already, if it is a buffer.
    sent: usize,
    store: Vec<u8>,
    start: usize,
    end: usize,
    pending: usize,
}

impl Outgoing {
    /// Bytes not yet sent.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len()).copy_from_slice(bytes);
    }

    pub(super) fn push_buffer(&mut self, buffer: AlignedBuffer) {
        if buffer.len() < COPY_BELOW {
            return self.push(&buffer);
        }
        self.pending += buffer.len();
        self.pieces.push_back(Piece::Buffer(buffer));
    }

    /// Adds `count` bytes of undefined contents and lets the caller fill them.
    pub(super) fn reserve(&mut self, count: usize) -> &mut [u8] {
        if self.pending == 0 {
            (self.start, self.end) = (0, 0);
        }
        if self.end + count > self.store.len() && self.start > 0 {
            self.store.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end + count > self.store.len() {
            let grown = (self.end + count).max(self.store.len() + self.store.len() / 2);
            self.store.resize(grown.next_multiple_of(KEEP_BYTES), 0);
        }
        match self.pieces.back_mut() {
            Some(Piece::Stored(length)) => *length += count,
            _ if count > 0 => self.pieces.push_back(Piece::Stored(count)),
            _ => {}
        }
        self.pending += count;
        self.end += count;
        &mut self.store[self.end - count..self.end]
    }

    /// Takes back the last `count` bytes, which came from `reserve` or `push`.
    pub(super) fn take_back(&mut self, count: usize) {
        match self.pieces.back_mut() {
            Some(Piece::Stored(length)) if *length > count => *length -= count,
            Some(Piece::Stored(length)) if *length == count => drop(self.pieces.pop_back()),
            _ => assert_eq!(count, 0, "only bytes of the store are taken back"),
        }
        self.end -= count;
        self.pending -= count;
    }

    /// Up to `count` pieces for one vectored send.
    pub(super) fn slices(&self, count: usize) -> Vec<IoSlice<'_>> {
        let mut at = self.start;
        let mut sent = self.sent;
        let slice = |piece| match piece {
            &Piece::Stored(length) => {
                at += length;
                IoSlice::new(&self.store[at - length..at])
            }
            Piece::Buffer(buffer) => IoSlice::new(&buffer[std::mem::take(&mut sent)..]),
        };
        self.pieces.iter().take(count).map(slice).collect()
    }

    /// The first `count` bytes are with the kernel.
    pub(super) fn sent(&mut self, mut count: usize) {
        assert!(count <= self.pending, "{count} bytes sent of {}", self.pending);
        self.pending -= count;
        while count > 0 {
            let piece = self.pieces.front_mut().expect("pending bytes lie in a piece");
            let left = match piece {
                Piece::Stored(length) => *length,
                Piece::Buffer(buffer) => buffer.len() - self.sent,
            };
            let step = left.min(count);
            match piece {
                Piece::Stored(length) => {
                    *length -= step;
                    self.start += step;
                }
                Piece::Buffer(_) => self.sent += step,
            }
            if step == left {
                self.pieces.pop_front();
                self.sent = 0;
            }
            count -= step;
        }
    }

    /// Gives memory back that a burst needed, if nothing is waiting.
    pub(super) fn rest(&mut self) {
        if self.pending == 0 && self.store.len() > KEEP_BYTES {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn bytes_leave_in_the_order_they_were_put_in(
            steps in prop::collection::vec((0u8..4, 0usize..40_000), 1..60)
        ) {
            let mut outgoing = Outgoing::default();
            let (mut expected, mut seen) = (Vec::new(), Vec::new());
            let mut next = 0u8;
            for (kind, count) in steps {
                next = next.wrapping_add(41);
                let bytes = vec![next; count];
                match kind {
                    0 => outgoing.push(&bytes),
                    1 => outgoing.push_buffer(AlignedBuffer::from_slice(&bytes)),
                    2 => {
                        outgoing.reserve(count).fill(0xee);
                        outgoing.take_back(count);
                    }
                    _ => {
                        let gone = outgoing.pending().min(count);
                        let all: Vec<u8> =
                            outgoing.slices(usize::MAX).iter().flat_map(|s| s.to_vec()).collect();
                        prop_assert_eq!(all.len(), outgoing.pending());
                        seen.extend_from_slice(&all[..gone]);
                        outgoing.sent(gone);
                    }
                }
                if kind < 2 {
                    expected.extend_from_slice(&bytes);
                }
                prop_assert_eq!(seen.len() + outgoing.pending(), expected.len());
            }
            seen.extend(outgoing.slices(usize::MAX).iter().flat_map(|s| s.to_vec()));
            prop_assert_eq!(seen, expected);
        }
    }
}
