//! When the bytes of blocks travel compressed: while the link is slower than compressing.
//!
//! | the link | frames |
//! |---|---|
//! | takes everything at once | go as they are |
//! | is busy, at `LINK_PACK_BELOW` bytes a second or more | go as they are |
//! | is busy, slower | are packed if they shrink; after some that did not, some are not tried |
//!
//! Does not know: which frames there are to send, time beyond what it is told.

use std::fmt;

use zstd::bulk::Compressor;

use super::outgoing::Batch;
use crate::clock::Instant;
use crate::format::frames::PACKED_HEAD_BYTES;
use crate::limits::LINK_PACK_BELOW;

/// A busy link is measured over this long.
const MEASURE_MS: u64 = 100;
/// The fastest level: the link waits for nothing else.
const LEVEL: i32 = 1;
/// Frames that are not tried after one that did not shrink, doubled with each in a row.
const SKIP_MAX: u32 = 64;

/// See the module.
#[derive(Default)]
pub(super) struct Packer {
    pace: Pace,
    compressor: Option<Compressor<'static>>,
    packed: Vec<u8>,
    misses: u32,
    skip: u32,
}

/// How fast the link takes bytes while it is busy.
#[derive(Debug, Default)]
struct Pace {
    /// Since when, and bytes taken since; absent while it takes everything at once.
    busy: Option<(Instant, u64)>,
    bytes_per_second: Option<u64>,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl Pace {
    fn note(&mut self, bytes: usize, is_busy: bool, now: Instant) {
        self.busy = match self.busy {
            _ if !is_busy => None,
            None => Some((now, 0)),
            Some((since, taken)) => {
                let (taken, elapsed) = (taken + bytes as u64, now.since_ms(since));
                if elapsed < MEASURE_MS {
                    Some((since, taken))
                } else {
                    self.bytes_per_second = Some(taken * 1000 / elapsed);
                    Some((now, 0))
                }
            }
        };
    }

    fn is_slow(&self) -> bool {
        self.busy.is_some() && self.bytes_per_second.is_some_and(|rate| rate < LINK_PACK_BELOW)
    }
}

impl Packer {
    /// The bytes of the frames, packed where that pays.
    pub fn encode(&mut self, batch: &Batch, now: Instant) -> Vec<u8> {
        let packs = batch.may_pack && self.pace.is_slow();
        let mut out = Vec::with_capacity(batch.bytes);
        for (count, frame) in batch.frames() {
            match frame.blocks().filter(|_| packs) {
                Some(plain) if self.pack(plain) => {
                    frame.encode_packed(&self.packed, count, &mut out);
                }
                _ => frame.encode(count, &mut out),
            }
        }
        self.pace.note(out.len(), batch.leaves_more, now);
        out
    }

    /// Compresses into `packed`; `false` if it was not worth it, or was not tried.
    fn pack(&mut self, plain: &[u8]) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let room = plain.len() - plain.len() / 8;
        let Some(room) = room.checked_sub(PACKED_HEAD_BYTES) else { return false };
        if self.compressor.is_none() {
            // Without memory for it frames go as they are.
            self.compressor = Compressor::new(LEVEL).ok();
        }
        let Some(compressor) = &mut self.compressor else { return false };
        self.packed.resize(room, 0);
        // It fails where the room does not do.
        let Ok(length) = compressor.compress_to_buffer(plain, &mut self.packed[..]) else {
            self.skip = (1 << self.misses).min(SKIP_MAX);
            self.misses = (self.misses + 1).min(SKIP_MAX.ilog2());
            return false;
        };
        self.packed.truncate(length);
        self.misses = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::outgoing::Outgoing;
    use super::super::reader::FrameReader;
    use super::super::{Frame, Message};
    use super::*;
    use crate::device::Payload;

    const PIECE: usize = 64 << 10;

    fn write(sequence: u64, content: &[u8]) -> Frame {
        let data = Payload::copy_of(content);
        let offset = sequence * PIECE as u64;
        Frame::Message(Message::Write { sequence, offset, data })
    }

    fn text() -> Vec<u8> {
        b"It was a dark and stormy night. ".iter().copied().cycle().take(PIECE).collect()
    }

    fn noise(seed: u64) -> Vec<u8> {
        let mut noise = vec![0; PIECE];
        let mut stream = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
        stream.fill(&mut noise);
        noise
    }

    /// A sender whose link takes one of the frames in so many milliseconds, for some seconds.
    fn sent(frames: &[Frame], each_ms: u64, may_pack: bool) -> Vec<Vec<u8>> {
        let (mut outgoing, mut packer) = (Outgoing::default(), Packer::default());
        for frame in frames {
            outgoing.push(frame.clone());
        }
        let mut now = Instant(1_000);
        let mut batches = Vec::new();
        while let Some(mut batch) = outgoing.take(1, |_| true) {
            batch.may_pack = may_pack;
            batches.push(packer.encode(&batch, now));
            now = now.plus_ms(each_ms);
        }
        batches
    }

    fn frames(count: u64, content: impl Fn(u64) -> Vec<u8>) -> Vec<Frame> {
        (1..=count).map(|sequence| write(sequence, &content(sequence))).collect()
    }

    #[test]
    fn a_slow_link_gets_packed_frames_that_are_read_as_what_was_sent() {
        let frames = frames(40, |_| text());
        let batches = sent(&frames, 10, true);
        assert!(batches[..10].iter().all(|batch| batch.len() > PIECE), "it is not known yet");
        assert!(batches[20..39].iter().all(|batch| batch.len() < PIECE / 20));
        let mut reader = FrameReader::new();
        for (frame, batch) in frames.iter().zip(&batches) {
            let read = reader.next(&mut &batch[..], |_| Ok(())).expect("sound").expect("whole");
            assert_eq!(read, *frame);
        }
    }

    #[test]
    fn a_fast_link_and_one_that_takes_everything_get_frames_as_they_are() {
        let fast = sent(&frames(400, |_| text()), 1, true);
        assert!(fast.iter().all(|batch| batch.len() > PIECE), "64 MB/s");
        let mut packer = Packer::default();
        let mut outgoing = Outgoing::default();
        for sequence in 1..=40 {
            outgoing.push(write(sequence, &text()));
            let mut batch = outgoing.take(1, |_| true).expect("waiting");
            batch.may_pack = true;
            let now = Instant(10 * sequence);
            assert!(packer.encode(&batch, now).len() > PIECE, "nothing is left behind");
        }
    }

    #[test]
    fn a_peer_that_does_not_know_packing_gets_frames_as_they_are() {
        let batches = sent(&frames(40, |_| text()), 10, false);
        assert!(batches.iter().all(|batch| batch.len() > PIECE));
    }

    #[test]
    fn what_does_not_shrink_goes_as_it_is_and_is_tried_ever_more_seldom() {
        let mut packer = Packer::default();
        let mut tried = 0;
        for seed in 0..1_000 {
            let skipped = packer.skip > 0;
            assert!(!packer.pack(&noise(seed % 7)));
            tried += u32::from(!skipped);
        }
        assert!((10..30).contains(&tried), "{tried}");
        packer.skip = 0;
        assert!(packer.pack(&text()) && packer.pack(&text()));
    }
}
