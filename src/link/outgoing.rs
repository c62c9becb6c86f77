//! Frames queued for the transport and formatted in batches.
//!
//! Guarantees: frames leave in the order they were queued, only heartbeats pass messages; at most
//! one Ping and one Pong wait, however many Pings arrived; the queue is bounded (a caller that
//! disregards `bytes` is stopped by an assertion).

use std::collections::VecDeque;

use super::{Frame, Message};
use crate::format::frames::HEADER_BYTES;
use crate::limits::{LINK_OUTGOING_BYTES_MAX, LINK_UNANSWERED_BYTES_MAX};

/// All answers that a peer may await at a time fit the queue.
const _: () = assert!(LINK_UNANSWERED_BYTES_MAX < LINK_OUTGOING_BYTES_MAX as u64);

#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Place in the stream of the frame that is formatted next, modulo 256.
    count: u8,
    ping: Option<u64>,
    pong: Option<u64>,
    queue: VecDeque<Frame>,
    /// Bytes of the frames in `queue`.
    bytes: usize,
}

impl Outgoing {
    /// Bytes of all frames that wait.
    pub fn bytes(&self) -> usize {
        let beats = usize::from(self.ping.is_some()) + usize::from(self.pong.is_some());
        self.bytes + beats * HEADER_BYTES
    }

    pub fn push(&mut self, frame: Frame) {
        self.bytes += frame.encoded_length();
        assert!(
            self.bytes <= LINK_OUTGOING_BYTES_MAX,
            "at most {LINK_OUTGOING_BYTES_MAX} bytes wait on a connection, now {}",
            self.bytes
        );
        self.queue.push_back(frame);
    }

    /// Whether a Ping waits.
    pub fn has_ping(&self) -> bool {
        self.ping.is_some()
    }

    /// Whether `take` with this `admit` would return something.
    pub fn is_ready(&self, admit: impl FnOnce(&Message) -> bool) -> bool {
        match self.queue.front() {
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

    /// Formats whole frames, up to `bytes_max` in all but at least one; `None` if none waits or
    /// `admit`, which sees each message as it leaves, holds the first one back.
    pub fn take(
        &mut self,
        bytes_max: usize,
        mut admit: impl FnMut(&Message) -> bool,
    ) -> Option<Vec<u8>> {
        let mut batch = Vec::with_capacity(bytes_max.min(self.bytes()));
        while let Some(frame) = self.next() {
            let length = frame.encoded_length();
            let fits = batch.is_empty() || length <= bytes_max.saturating_sub(batch.len());
            let admitted = fits
                && match &frame {
                    Frame::Message(message) => admit(message),
                    _ => true,
                };
            if !admitted {
                self.put_back(frame);
                break;
            }
            frame.encode(self.count, &mut batch);
            self.count = self.count.wrapping_add(1);
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// Heartbeats first, unless the handshake or the end is next.
    fn next(&mut self) -> Option<Frame> {
        if matches!(self.queue.front(), None | Some(Frame::Message(_))) {
            if let Some(sequence) = self.pong.take() {
                return Some(Frame::Pong { sequence });
            }
            if let Some(sequence) = self.ping.take() {
                return Some(Frame::Ping { sequence });
            }
        }
        let frame = self.queue.pop_front()?;
        self.bytes -= frame.encoded_length();
        Some(frame)
    }

    fn put_back(&mut self, frame: Frame) {
        match frame {
            Frame::Ping { sequence } => self.ping = Some(sequence),
            Frame::Pong { sequence } => self.pong = Some(sequence),
            frame => {
                self.bytes += frame.encoded_length();
                self.queue.push_front(frame);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Payload;
    use crate::extent::ByteRange;

    fn write(sequence: u64) -> Frame {
        let data = Payload::copy_of(&[7; 512]);
        Frame::Message(Message::Write { sequence, offset: 0, data })
    }

    #[test]
    fn a_batch_holds_whole_frames_up_to_its_limit_but_at_least_one() {
        let mut outgoing = Outgoing::default();
        (1..=5).for_each(|sequence| outgoing.push(write(sequence)));
        assert_eq!(outgoing.bytes(), 5 * 544);
        let lengths: Vec<usize> = [1, 544 * 2 + 543, 544, 1 << 20, 1 << 20]
            .iter()
            .map_while(|bytes_max| outgoing.take(*bytes_max, |_| true))
            .map(|batch| batch.len())
            .collect();
        assert_eq!(lengths, [544, 2 * 544, 544, 544]);
        assert_eq!(outgoing.bytes(), 0);
    }

    #[test]
    fn a_flood_of_pings_costs_one_answer_that_passes_the_messages() {
        let mut outgoing = Outgoing::default();
        outgoing.push(write(1));
        (0..1000).for_each(|sequence| outgoing.pong(sequence));
        assert_eq!(outgoing.bytes(), 544 + 32);
        let batch = outgoing.take(32, |_| true).expect("waiting");
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
        let batch = outgoing.take(1, |_| true).expect("waiting");
        assert_eq!(batch[0], 0x03);
    }

    #[test]
    fn a_message_that_is_held_back_keeps_its_place() {
        let mut outgoing = Outgoing::default();
        outgoing.push(write(1));
        let range = ByteRange::new(0, 512);
        outgoing.push(Frame::Message(Message::Zero { sequence: 2, range }));
        outgoing.pong(3);
        assert!(outgoing.is_ready(|_| false));
        let batch = outgoing.take(1 << 20, |_| false).expect("the Pong");
        assert_eq!((batch.len(), batch[0]), (32, 0x06));
        assert!(!outgoing.is_ready(|_| false) && outgoing.is_ready(|_| true));
        assert!(outgoing.take(1 << 20, |_| false).is_none());
        let batch = outgoing.take(1 << 20, |_| true).expect("both");
        assert_eq!((batch[0], batch[544]), (0x10, 0x11));
    }
}
