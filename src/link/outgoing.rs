//! Frames queued for the transport and given to it in batches.
//!
//! Guarantees: frames leave in the order they were queued, only heartbeats pass messages; at most
//! one Ping and one Pong wait, however many Pings arrived; the queue is bounded (a caller that
//! disregards `bytes` is stopped by an assertion). A write that a later one, or zeros, cover whole
//! before it left does not leave, unless something stands between them that it must stand before:
//! a flush, a cut, a barrier.

use std::collections::{BTreeMap, VecDeque};

use super::{Frame, Message};
use crate::extent::ByteRange;
use crate::format::frames::HEADER_BYTES;
use crate::limits::{LINK_OUTGOING_BYTES_MAX, LINK_UNANSWERED_BYTES_MAX};

/// All answers that a peer may await at a time fit the queue.
const _: () = assert!(LINK_UNANSWERED_BYTES_MAX < LINK_OUTGOING_BYTES_MAX as u64);

#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Place in the stream of the frame that leaves next, modulo 256.
    count: u8,
    ping: Option<u64>,
    pong: Option<u64>,
    /// Absent: superseded.
    queue: VecDeque<Option<Frame>>,
    /// Number of the frame at the front.
    front: u64,
    /// Bytes of the frames in `queue`.
    bytes: usize,
    /// By offset, writes queued since the last barrier, which a later one may supersede.
    open: BTreeMap<u64, OpenWrite>,
}

#[derive(Clone, Copy, Debug)]
struct OpenWrite {
    end: u64,
    number: u64,
    sequence: u64,
}

/// Frames that leave together.
#[derive(Debug)]
pub(super) struct Batch {
    frames: Vec<Frame>,
    /// Place in the stream of the first.
    first: u8,
    /// Of all of them, unpacked.
    pub bytes: usize,
    /// Others wait for the link.
    pub leaves_more: bool,
    /// Both sides know how.
    pub may_pack: bool,
}

impl Batch {
    /// The frames, each with its place in the stream.
    pub fn frames(&self) -> impl Iterator<Item = (u8, &Frame)> {
        let places = (0..).map(|index: usize| self.first.wrapping_add(index as u8));
        places.zip(&self.frames)
    }

    /// Their bytes, not packed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.bytes);
        for (count, frame) in self.frames() {
            frame.encode(count, &mut out);
        }
        out
    }
}

impl Outgoing {
    /// Bytes of all frames that wait.
    pub fn bytes(&self) -> usize {
        let beats = usize::from(self.ping.is_some()) + usize::from(self.pong.is_some());
        self.bytes + beats * HEADER_BYTES
    }

    /// Returns the sequences of the writes that it supersedes, which do not leave.
    pub fn push(&mut self, frame: Frame) -> Vec<u64> {
        let superseded = match &frame {
            Frame::Message(message) => self.note(message),
            _ => Vec::new(),
        };
        self.bytes += frame.encoded_length();
        assert!(
            self.bytes <= LINK_OUTGOING_BYTES_MAX,
            "at most {LINK_OUTGOING_BYTES_MAX} bytes wait on a connection, now {}",
            self.bytes
        );
        self.queue.push_back(Some(frame));
        superseded
    }

    fn note(&mut self, message: &Message) -> Vec<u64> {
        match message {
            Message::Write { sequence, offset, data } => {
                let range = ByteRange::new(*offset, data.len() as u64);
                let superseded = self.supersede(range);
                let number = self.front + self.queue.len() as u64;
                let open = OpenWrite { end: range.end(), number, sequence: *sequence };
                self.open.insert(*offset, open);
                superseded
            }
            Message::Zero { range, .. } => self.supersede(*range),
            _ => {
                self.barrier();
                Vec::new()
            }
        }
    }

    /// What is queued from now on supersedes nothing that was queued before.
    pub fn barrier(&mut self) {
        self.open.clear();
    }

    fn supersede(&mut self, range: ByteRange) -> Vec<u64> {
        let inside = self.open.range(range.offset..range.end());
        let inside = inside.filter(|(_, write)| write.end <= range.end());
        let covered: Vec<(u64, OpenWrite)> = inside.map(|(at, write)| (*at, *write)).collect();
        let mut superseded = Vec::new();
        for (offset, write) in covered {
            self.open.remove(&offset);
            // One that has left is before the front.
            let index = write.number.checked_sub(self.front);
            if let Some(frame) = index.and_then(|index| self.queue[index as usize].take()) {
                self.bytes -= frame.encoded_length();
                superseded.push(write.sequence);
            }
        }
        superseded
    }

    /// Whether a Ping waits.
    pub fn has_ping(&self) -> bool {
        self.ping.is_some()
    }

    /// Whether `take` with this `admit` would return something.
    pub fn is_ready(&self, admit: impl FnOnce(&Message) -> bool) -> bool {
        match self.queue.iter().flatten().next() {
            Some(Frame::Message(message)) => {
                self.ping.is_some() || self.pong.is_some() || admit(message)
            }
            Some(_) => true,
            None => self.ping.is_some() || self.pong.is_some(),
        }
    }

    pub fn ping(&mut self, sequence: u64) {
        self.ping = Some(sequence);
    }

    pub fn pong(&mut self, sequence: u64) {
        self.pong = Some(sequence);
    }

    /// Forgets everything that waits.
    pub fn discard(&mut self) {
        *self = Self { count: self.count, ..Self::default() };
    }

    /// Takes whole frames, up to `bytes_max` in all but at least one; `None` if none waits or
    /// `admit`, which sees each message as it leaves, holds the first one back.
    pub fn take(
        &mut self,
        bytes_max: usize,
        mut admit: impl FnMut(&Message) -> bool,
    ) -> Option<Batch> {
        let mut batch = Batch {
            frames: Vec::new(),
            first: self.count,
            bytes: 0,
            leaves_more: false,
            may_pack: false,
        };
        while let Some(frame) = self.next() {
            let length = frame.encoded_length();
            let fits = batch.frames.is_empty() || length <= bytes_max.saturating_sub(batch.bytes);
            let admitted = fits
                && match &frame {
                    Frame::Message(message) => admit(message),
                    _ => true,
                };
            if !admitted {
                self.put_back(frame);
                break;
            }
            batch.bytes += length;
            batch.frames.push(frame);
            self.count = self.count.wrapping_add(1);
        }
        batch.leaves_more = self.bytes > 0;
        (!batch.frames.is_empty()).then_some(batch)
    }

    /// Heartbeats first, unless the handshake or the end is next.
    fn next(&mut self) -> Option<Frame> {
        while let Some(None) = self.queue.front() {
            self.queue.pop_front();
            self.front += 1;
        }
        if matches!(self.queue.front(), None | Some(Some(Frame::Message(_)))) {
            if let Some(sequence) = self.pong.take() {
                return Some(Frame::Pong { sequence });
            }
            if let Some(sequence) = self.ping.take() {
                return Some(Frame::Ping { sequence });
            }
        }
        let frame = self.queue.pop_front()??;
        self.front += 1;
        self.bytes -= frame.encoded_length();
        Some(frame)
    }

    fn put_back(&mut self, frame: Frame) {
        match frame {
            Frame::Ping { sequence } => self.ping = Some(sequence),
            Frame::Pong { sequence } => self.pong = Some(sequence),
            frame => {
                self.bytes += frame.encoded_length();
                self.front -= 1;
                self.queue.push_front(Some(frame));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Payload;

    fn write_at(sequence: u64, offset: u64, length: usize) -> Frame {
        let data = Payload::copy_of(&vec![7; length]);
        Frame::Message(Message::Write { sequence, offset, data })
    }

    fn write(sequence: u64) -> Frame {
        write_at(sequence, sequence * 4096, 512)
    }

    fn zero(sequence: u64, offset: u64, length: u64) -> Frame {
        Frame::Message(Message::Zero { sequence, range: ByteRange::new(offset, length) })
    }

    fn sequences(outgoing: &mut Outgoing) -> Vec<u64> {
        let Some(batch) = outgoing.take(1 << 30, |_| true) else { return Vec::new() };
        let sequence = |frame: &Frame| match frame {
            Frame::Message(
                Message::Write { sequence, .. }
                | Message::Zero { sequence, .. }
                | Message::Flush { sequence },
            ) => *sequence,
            other => panic!("{other:?}"),
        };
        batch.frames().map(|(_, frame)| sequence(frame)).collect()
    }

    #[test]
    fn a_write_that_is_covered_whole_before_it_left_does_not_leave() {
        let mut outgoing = Outgoing::default();
        assert!(outgoing.push(write_at(1, 4096, 4096)).is_empty());
        assert!(outgoing.push(write_at(2, 8192, 4096)).is_empty());
        assert!(outgoing.push(write_at(3, 4608, 512)).is_empty(), "only a part is covered");
        assert_eq!(outgoing.push(write_at(4, 4096, 4096)), [1, 3]);
        assert_eq!(outgoing.push(write_at(5, 4096, 8192)), [4, 2]);
        assert_eq!(outgoing.bytes(), 8192 + 32);
        assert_eq!(outgoing.push(zero(6, 0, 1 << 20)), [5]);
        assert!(outgoing.push(write_at(7, 4096, 512)).is_empty(), "zeros stay");
        assert_eq!(sequences(&mut outgoing), [6, 7]);
        assert_eq!(outgoing.bytes(), 0);
        assert!(outgoing.push(write_at(8, 4096, 512)).is_empty(), "what has left stays");
        assert_eq!(sequences(&mut outgoing), [8]);
    }

    #[test]
    fn nothing_is_superseded_across_a_flush_a_cut_or_a_barrier() {
        let cut = Message::Cut {
            sequence: 2,
            snapshot: uuid::Uuid::from_u128(1),
            selection: Vec::new(),
            label: String::new(),
        };
        for marker in [Some(Message::Flush { sequence: 2 }), Some(cut), None] {
            let mut outgoing = Outgoing::default();
            outgoing.push(write_at(1, 4096, 512));
            match marker {
                Some(message) => assert!(outgoing.push(Frame::Message(message)).is_empty()),
                None => outgoing.barrier(),
            }
            assert!(outgoing.push(write_at(3, 4096, 512)).is_empty());
            assert_eq!(outgoing.push(write_at(4, 4096, 512)), [3]);
        }
    }

    #[test]
    fn a_write_that_was_held_back_may_still_be_superseded_or_not_but_leaves_once() {
        let mut outgoing = Outgoing::default();
        outgoing.push(write_at(1, 4096, 512));
        outgoing.push(write_at(2, 8192, 512));
        assert!(outgoing.take(1 << 20, |_| false).is_none());
        assert_eq!(outgoing.push(write_at(3, 4096, 512)), [1]);
        assert_eq!(outgoing.push(write_at(4, 8192, 512)), [2]);
        assert_eq!(sequences(&mut outgoing), [3, 4]);
    }

    #[test]
    fn a_batch_holds_whole_frames_up_to_its_limit_but_at_least_one() {
        let mut outgoing = Outgoing::default();
        for sequence in 1..=5 {
            outgoing.push(write(sequence));
        }
        assert_eq!(outgoing.bytes(), 5 * 544);
        let lengths: Vec<(usize, bool)> = [1, 544 * 2 + 543, 544, 1 << 20, 1 << 20]
            .iter()
            .map_while(|bytes_max| outgoing.take(*bytes_max, |_| true))
            .map(|batch| (batch.encode().len(), batch.leaves_more))
            .collect();
        assert_eq!(lengths, [(544, true), (2 * 544, true), (544, true), (544, false)]);
        assert_eq!(outgoing.bytes(), 0);
    }

    #[test]
    fn a_flood_of_pings_costs_one_answer_that_passes_the_messages() {
        let mut outgoing = Outgoing::default();
        outgoing.push(write(1));
        (0..1000).for_each(|sequence| outgoing.pong(sequence));
        assert_eq!(outgoing.bytes(), 544 + 32);
        let batch = outgoing.take(32, |_| true).expect("waiting").encode();
        assert_eq!((batch.len(), batch[0]), (32, 0x06));
    }

    #[test]
    fn a_heartbeat_does_not_pass_the_handshake() {
        let mut outgoing = Outgoing::default();
        let refusal = crate::format::frames::Refusal {
            code: crate::format::frames::RefusalCode::NotReady,
            text: String::new(),
        };
        outgoing.push(Frame::Refuse(refusal));
        outgoing.ping(1);
        let batch = outgoing.take(1, |_| true).expect("waiting").encode();
        assert_eq!(batch[0], 0x03);
    }

    #[test]
    fn a_message_that_is_held_back_keeps_its_place() {
        let mut outgoing = Outgoing::default();
        outgoing.push(write(1));
        outgoing.push(zero(2, 0, 512));
        outgoing.pong(3);
        assert!(outgoing.is_ready(|_| false));
        let batch = outgoing.take(1 << 20, |_| false).expect("the Pong").encode();
        assert_eq!((batch.len(), batch[0]), (32, 0x06));
        assert!(!outgoing.is_ready(|_| false) && outgoing.is_ready(|_| true));
        assert!(outgoing.take(1 << 20, |_| false).is_none());
        let batch = outgoing.take(1 << 20, |_| true).expect("both").encode();
        assert_eq!((batch[0], batch[544]), (0x10, 0x11));
    }
}
