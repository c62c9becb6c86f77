//! One piece of the source becomes chunks: zeros told apart, bytes hashed and compressed.
//!
//! Guarantees: the parts of a piece ascend and cover it; a part's hash is over its own bytes, its
//! CRC32C over the stored ones.
//! Does not know: segments, where anything is stored.

use std::fmt;
use std::sync::Arc;

use super::pace::{Pace, Stage};
use crate::clock::MonotonicClock;
use crate::device::is_zero;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{ChunkKind, Descriptor, padded};

/// How chunks are compressed, each by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    #[default]
    None,
    /// The fastest level, where it helps and nobody waits for it.
    Auto,
    /// That level, where it helps.
    Zstd(i32),
}

const LEVEL_DEFAULT: i32 = 3;

impl Compression {
    /// `none`, `auto`, `zstd` or `zstd:LEVEL` with a level from 1 to 22.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = || {
            Error::usage(format!(
                "expected none, auto, zstd or zstd:1 to zstd:22 as compression, found {text:?}"
            ))
        };
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "auto" => Ok(Self::Auto),
            None if text == "zstd" => Ok(Self::Zstd(LEVEL_DEFAULT)),
            Some(("zstd", level)) => {
                let level: i32 = level.parse().map_err(|_| refused())?;
                if (1..=22).contains(&level) { Ok(Self::Zstd(level)) } else { Err(refused()) }
            }
            _ => Err(refused()),
        }
    }

    fn level(self) -> Option<i32> {
        match self {
            Self::None => None,
            Self::Auto => Some(1),
            Self::Zstd(level) => Some(level),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Auto => f.write_str("auto"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A part of an encoded piece. `payload_offset` of the descriptor is not yet known; the stored
/// bytes lie at `at` in the plain half or, compressed, in the stored half of the slot.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub descriptor: Descriptor,
    pub at: usize,
}

impl Part {
    /// A part of which nothing is stored.
    #[must_use]
    pub fn nothing(kind: ChunkKind, range: ByteRange) -> Self {
        let descriptor = Descriptor {
            range,
            kind,
            stored_bytes: 0,
            crc32c: 0,
            hash: [0; 32],
            payload_offset: 0,
        };
        Self { descriptor, at: 0 }
    }

    fn stored(kind: ChunkKind, range: ByteRange, plain: &[u8], stored: &[u8], at: usize) -> Self {
        let descriptor = Descriptor {
            range,
            kind,
            stored_bytes: u32::try_from(stored.len()).expect("a chunk is at most 1 MiB"),
            crc32c: crc32c::crc32c(stored),
            hash: *blake3::hash(plain).as_bytes(),
            payload_offset: 0,
        };
        Self { descriptor, at }
    }
}

/// A chunk of which no such sample shrinks is not tried as a whole.
const SAMPLE_BYTES: usize = 8 << 10;
const SAMPLES: usize = 4;

/// Encodes pieces; one per thread, for it keeps the compressor's memory.
pub struct Encoder {
    compressor: Option<zstd::bulk::Compressor<'static>>,
    /// Says what is tried; `None`: everything.
    pace: Option<Arc<Pace>>,
    clock: MonotonicClock,
    grain: usize,
}

impl Encoder {
    pub fn new(compression: Compression, grain: u64, pace: &Arc<Pace>) -> Result<Self> {
        let compressor = compression
            .level()
            .map(zstd::bulk::Compressor::new)
            .transpose()
            .map_err(|source| Error::device("prepare compression", &source))?;
        Ok(Self {
            compressor,
            pace: (compression == Compression::Auto).then(|| Arc::clone(pace)),
            clock: MonotonicClock::default(),
            grain: usize::try_from(grain).expect("at most 1 MiB"),
        })
    }

    /// The parts of a piece that begins at `offset` and whose bytes are `plain`; `unreadable` are
    /// runs of it (ascending, of the volume) that could not be read. `stored` is as long as
    /// `plain`.
    pub fn encode(
        &mut self,
        offset: u64,
        plain: &[u8],
        unreadable: &[ByteRange],
        stored: &mut [u8],
    ) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut at = offset;
        for &gap in unreadable {
            self.encode_readable(offset, at..gap.offset, plain, stored, &mut parts);
            parts.push(Part::nothing(ChunkKind::Unreadable, gap));
            at = gap.end();
        }
        self.encode_readable(offset, at..offset + plain.len() as u64, plain, stored, &mut parts);
        parts
    }

    fn encode_readable(
        &mut self,
        offset: u64,
        run: std::ops::Range<u64>,
        plain: &[u8],
        stored: &mut [u8],
        parts: &mut Vec<Part>,
    ) {
        let end = (run.end - offset) as usize;
        let mut at = (run.start - offset) as usize;
        while at < end {
            let zero = is_zero(&plain[at..self.next_grain(offset, at).min(end)]);
            let mut to = at;
            while to < end {
                let next = self.next_grain(offset, to).min(end);
                if is_zero(&plain[to..next]) != zero {
                    break;
                }
                to = next;
            }
            let range = ByteRange::new(offset + at as u64, (to - at) as u64);
            if zero {
                parts.push(Part::nothing(ChunkKind::Zero, range));
            } else {
                self.encode_bytes(range, &plain[at..to], &mut stored[at..to], at, parts);
            }
            at = to;
        }
    }

    /// The next multiple of the grain of the volume, as a position in the piece.
    fn next_grain(&self, offset: u64, at: usize) -> usize {
        let grain = self.grain as u64;
        ((offset + at as u64 + 1).next_multiple_of(grain) - offset) as usize
    }

    /// One chunk if it is compressed. What is stored as it is becomes a chunk a grain, so that of a
    /// scattered map little more is read and verified than is wanted.
    fn encode_bytes(
        &mut self,
        range: ByteRange,
        plain: &[u8],
        stored: &mut [u8],
        at: usize,
        parts: &mut Vec<Part>,
    ) {
        let began = self.clock.now_ns();
        let tried = self.pace.as_ref().is_none_or(|pace| pace.tries_next());
        let smaller = if tried { self.compress(plain, stored) } else { None };
        if let Some(length) = smaller {
            parts.push(Part::stored(ChunkKind::Zstd, range, plain, &stored[..length], at));
        } else {
            let mut from = 0;
            while from < plain.len() {
                let to = self.next_grain(range.offset, from).min(plain.len());
                let bytes = &plain[from..to];
                let range = ByteRange::new(range.offset + from as u64, bytes.len() as u64);
                parts.push(Part::stored(ChunkKind::Data, range, bytes, bytes, at + from));
                from = to;
            }
        }
        if let Some(pace) = self.pace.as_ref().filter(|_| tried) {
            pace.note(Stage::Codec, plain.len() as u64, self.clock.now_ns() - began);
        }
    }

    /// The compressed length, if that saves at least a sixteenth of the pages.
    fn compress(&mut self, plain: &[u8], stored: &mut [u8]) -> Option<usize> {
        let room = padded(plain.len() as u64) / 16 * 15;
        let room = usize::try_from(room / 4096 * 4096).expect("at most 1 MiB");
        let compressor = self.compressor.as_mut()?;
        let place = stored.get_mut(..room)?;
        if self.pace.is_some() && plain.len() >= 4 * SAMPLES * SAMPLE_BYTES {
            let mut samples = plain.chunks_exact(plain.len() / SAMPLES);
            let room = SAMPLE_BYTES / 16 * 15;
            let shrinks = |part: &[u8]| {
                let sample = &part[..SAMPLE_BYTES];
                compressor.compress_to_buffer(sample, &mut place[..room]).is_ok()
            };
            samples.any(shrinks).then_some(())?;
        }
        // No room left is the usual case of bytes that do not shrink, not a failure.
        let length = compressor.compress_to_buffer(plain, place).ok()?;
        (length > 0).then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAIN: u64 = 64 << 10;

    fn encoder(compression: Compression) -> Encoder {
        Encoder::new(compression, GRAIN, &Arc::new(Pace::new(1))).expect("made")
    }

    fn shapes(parts: &[Part]) -> Vec<(ChunkKind, u64, u64)> {
        parts
            .iter()
            .map(|part| {
                (part.descriptor.kind, part.descriptor.range.offset, part.descriptor.range.length)
            })
            .collect()
    }

    #[test]
    fn zeros_inside_a_piece_are_told_apart_by_the_grain_of_the_volume() {
        let mut plain = vec![0; 4 * GRAIN as usize];
        plain[5] = 1;
        plain[3 * GRAIN as usize] = 1;
        let mut stored = vec![0; plain.len()];
        let mut encoder = encoder(Compression::None);
        let parts = encoder.encode(GRAIN / 2, &plain, &[], &mut stored);
        assert_eq!(
            shapes(&parts),
            [
                (ChunkKind::Data, GRAIN / 2, GRAIN / 2),
                (ChunkKind::Zero, GRAIN, 2 * GRAIN),
                (ChunkKind::Data, 3 * GRAIN, GRAIN),
                (ChunkKind::Zero, 4 * GRAIN, GRAIN / 2),
            ]
        );
    }

    #[test]
    fn what_is_stored_as_it_is_becomes_a_chunk_a_grain_each_with_its_own_checks() {
        let plain: Vec<u8> = (0..3 * GRAIN as usize).map(|at| (at / 4096) as u8 | 1).collect();
        let parts =
            encoder(Compression::None).encode(GRAIN / 2, &plain, &[], &mut vec![0; plain.len()]);
        assert_eq!(
            shapes(&parts),
            [
                (ChunkKind::Data, GRAIN / 2, GRAIN / 2),
                (ChunkKind::Data, GRAIN, GRAIN),
                (ChunkKind::Data, 2 * GRAIN, GRAIN),
                (ChunkKind::Data, 3 * GRAIN, GRAIN / 2),
            ]
        );
        for Part { descriptor, at } in parts {
            let bytes = &plain[at..at + descriptor.range.length as usize];
            assert_eq!(descriptor.hash, *blake3::hash(bytes).as_bytes());
            assert_eq!(descriptor.crc32c, crc32c::crc32c(bytes));
        }
    }

    #[test]
    fn unreadable_runs_are_neither_zero_nor_bytes() {
        let plain = vec![1; 3 * 4096];
        let mut encoder = encoder(Compression::None);
        let gap = ByteRange::new(8192, 4096);
        let parts = encoder.encode(4096, &plain, &[gap], &mut vec![0; plain.len()]);
        assert_eq!(
            shapes(&parts),
            [
                (ChunkKind::Data, 4096, 4096),
                (ChunkKind::Unreadable, 8192, 4096),
                (ChunkKind::Data, 12_288, 4096),
            ]
        );
    }

    #[test]
    fn bytes_are_compressed_only_where_that_saves_pages() {
        let mut encoder = encoder(Compression::Zstd(1));
        let text = b"all the same ".repeat(10_000);
        let mut stored = vec![0; text.len()];
        let part = encoder.encode(0, &text, &[], &mut stored)[0];
        assert_eq!(part.descriptor.kind, ChunkKind::Zstd);
        let length = part.descriptor.stored_bytes as usize;
        assert_eq!(zstd::bulk::decompress(&stored[..length], text.len()).expect("whole"), text);
        let mut noise = vec![0; 1 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let part = encoder.encode(0, &noise, &[], &mut vec![0; 1 << 20])[0];
        assert_eq!(part.descriptor.kind, ChunkKind::Data);
        let part = encoder.encode(0, &text[..4096], &[], &mut vec![0; 4096])[0];
        assert_eq!(part.descriptor.kind, ChunkKind::Data, "one page cannot become fewer");
    }

    #[test]
    fn auto_compresses_for_a_slow_sink_and_leaves_a_fast_one_alone() {
        let text = b"all the same ".repeat(10_000);
        for (sink_ns, kind) in [(1_000_000_000, ChunkKind::Zstd), (1000, ChunkKind::Data)] {
            let pace = Arc::new(Pace::new(1));
            pace.note(Stage::Codec, 10 << 20, 10_000_000);
            pace.note(Stage::Sink, 10 << 20, sink_ns);
            let mut encoder = Encoder::new(Compression::Auto, GRAIN, &pace).expect("made");
            assert!(pace.tries_next(), "the first is always tried");
            let part = encoder.encode(0, &text, &[], &mut vec![0; text.len()])[0];
            assert_eq!(part.descriptor.kind, kind);
            assert_eq!(pace.untried(), u64::from(kind == ChunkKind::Data));
        }
    }

    #[test]
    fn auto_tries_no_chunk_of_which_no_sample_shrinks() {
        let mut bytes = b"all the same ".repeat(80_000);
        let (length, mut noise) = (bytes.len(), blake3::Hasher::new().finalize_xof());
        for part in bytes.chunks_exact_mut(length / SAMPLES).skip(1) {
            noise.fill(&mut part[..SAMPLE_BYTES]);
        }
        let mut stored = vec![0; bytes.len()];
        let part = encoder(Compression::Auto).encode(0, &bytes, &[], &mut stored)[0];
        assert_eq!(part.descriptor.kind, ChunkKind::Zstd, "one sample shrinks");
        noise.fill(&mut bytes[..SAMPLE_BYTES]);
        let part = encoder(Compression::Auto).encode(0, &bytes, &[], &mut stored)[0];
        assert_eq!(part.descriptor.kind, ChunkKind::Data);
        let part = encoder(Compression::Zstd(1)).encode(0, &bytes, &[], &mut stored)[0];
        assert_eq!(part.descriptor.kind, ChunkKind::Zstd);
    }

    #[test]
    fn compression_is_named_as_it_is_parsed() {
        for text in ["none", "auto", "zstd:1", "zstd:22"] {
            assert_eq!(Compression::parse(text).expect("known").to_string(), text);
        }
        assert_eq!(Compression::parse("zstd").expect("known"), Compression::Zstd(3));
        for text in ["", "gzip", "zstd:0", "zstd:23", "zstd:x", "none:1"] {
            assert!(Compression::parse(text).is_err(), "{text}");
        }
    }
}
