//! Frames out of a stream that arrives in pieces of any size.
//!
//! Guarantees: the frames do not depend on how the stream was cut; a block's bytes are copied
//! once, into the aligned buffer they stay in; memory is allocated only after the header was found
//! sound and the caller permitted it.
//! Does not know: sessions; after an error it must not be used again.

use super::Frame;
use crate::device::{AlignedBuffer, Payload};
use crate::error::Result;
use crate::format::frames::{HEADER_BYTES, Header, Unpacker, plain_length};

#[derive(Debug)]
pub(super) struct FrameReader {
    /// Place in the stream of the frame that comes next, modulo 256.
    count: u8,
    head: [u8; HEADER_BYTES],
    head_length: usize,
    body: Option<Body>,
    unpacker: Unpacker,
}

#[derive(Debug)]
struct Body {
    header: Header,
    bytes: BodyBytes,
    length: usize,
}

#[derive(Debug)]
enum BodyBytes {
    Blocks(AlignedBuffer),
    Fields(Vec<u8>),
}

impl BodyBytes {
    fn for_header(header: &Header) -> Self {
        let length = usize::try_from(header.payload_length).expect("payloads are limited");
        if header.carries_blocks() {
            Self::Blocks(AlignedBuffer::zeroed(length))
        } else {
            Self::Fields(vec![0; length])
        }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Blocks(buffer) => buffer,
            Self::Fields(bytes) => bytes,
        }
    }
}

impl FrameReader {
    pub fn new() -> Self {
        let head = [0; HEADER_BYTES];
        Self { count: 0, head, head_length: 0, body: None, unpacker: Unpacker::default() }
    }

    /// Whether a frame has begun and not ended.
    pub fn is_inside_frame(&self) -> bool {
        self.head_length > 0
    }

    /// Takes bytes from the front of `bytes` until a frame is whole (`Some`) or none are left
    /// (`None`). `permit` sees each header before anything is allocated for its payload.
    pub fn next(
        &mut self,
        bytes: &mut &[u8],
        permit: impl FnOnce(&Header) -> Result<()>,
    ) -> Result<Option<Frame>> {
        if self.body.is_none() {
            self.head_length += take(bytes, &mut self.head[self.head_length..]);
            if self.head_length < HEADER_BYTES {
                return Ok(None);
            }
            let header = Header::decode(&self.head, self.count)?;
            permit(&header)?;
            let bytes = BodyBytes::for_header(&header);
            self.body = Some(Body { header, bytes, length: 0 });
        }
        let body = self.body.as_mut().expect("just made");
        let rest = &mut body.bytes.as_mut_slice()[body.length..];
        let wanted = rest.len();
        let taken = take(bytes, rest);
        body.length += taken;
        if taken < wanted {
            return Ok(None);
        }
        let Body { header, bytes, .. } = self.body.take().expect("it is whole");
        self.head_length = 0;
        self.count = self.count.wrapping_add(1);
        match bytes {
            BodyBytes::Blocks(buffer) => Frame::decode_blocks(&header, Payload::new(buffer)),
            BodyBytes::Fields(bytes) if header.is_packed() => self.unpack(&header, &bytes),
            BodyBytes::Fields(bytes) => Frame::decode(&header, &bytes),
        }
        .map(Some)
    }

    fn unpack(&mut self, header: &Header, payload: &[u8]) -> Result<Frame> {
        header.check_payload(payload)?;
        let mut plain = AlignedBuffer::zeroed(plain_length(payload)?);
        self.unpacker.unpack(payload, &mut plain)?;
        Frame::decode_unpacked(header, Payload::new(plain))
    }
}

/// Moves as many bytes as fit from the front of `source` to `target`.
fn take(source: &mut &[u8], target: &mut [u8]) -> usize {
    let length = source.len().min(target.len());
    let (front, rest) = source.split_at(length);
    target[..length].copy_from_slice(front);
    *source = rest;
    length
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    const GOLDEN: &[u8] = include_bytes!("../../tests/golden/link-v1.bin");

    fn read_in_pieces(stream: &[u8], piece_bytes: usize) -> Vec<Frame> {
        let mut reader = FrameReader::new();
        let mut frames = Vec::new();
        for mut piece in stream.chunks(piece_bytes) {
            while let Some(frame) = reader.next(&mut piece, |_| Ok(())).expect("golden") {
                frames.push(frame);
            }
            assert!(piece.is_empty(), "it stops only when all is taken");
        }
        assert!(!reader.is_inside_frame());
        frames
    }

    #[test]
    fn frames_do_not_depend_on_how_the_stream_is_cut() {
        let whole = read_in_pieces(GOLDEN, GOLDEN.len());
        assert_eq!(whole.len(), 20);
        for piece_bytes in [1, 2, 3, 5, 31, 32, 33, 64, 511, 4096] {
            assert_eq!(read_in_pieces(GOLDEN, piece_bytes), whole, "{piece_bytes}");
        }
        for cut in 0..=GOLDEN.len() {
            let mut reader = FrameReader::new();
            let mut frames = Vec::new();
            for mut piece in [&GOLDEN[..cut], &GOLDEN[cut..]] {
                while let Some(frame) = reader.next(&mut piece, |_| Ok(())).expect("golden") {
                    frames.push(frame);
                }
            }
            assert!(frames == whole, "cut at {cut}");
        }
    }

    #[test]
    fn blocks_land_in_aligned_memory() {
        let aligned = |frame: &Frame| match frame {
            Frame::Message(crate::link::Message::Write { data, .. }) => {
                Some(data.as_ptr().align_offset(4096) == 0)
            }
            _ => None,
        };
        let frames = read_in_pieces(GOLDEN, 100);
        assert_eq!(frames.iter().find_map(aligned), Some(true));
    }

    #[test]
    fn a_frame_that_is_not_permitted_allocates_nothing() {
        let mut reader = FrameReader::new();
        let mut bytes = GOLDEN;
        let refused = reader.next(&mut bytes, |_| Err(Error::link("no")));
        assert!(refused.is_err() && reader.body.is_none());
        assert_eq!(bytes.len(), GOLDEN.len() - HEADER_BYTES);
    }

    #[test]
    fn a_stream_whose_first_frame_is_missing_is_refused() {
        let mut reader = FrameReader::new();
        let first = HEADER_BYTES + 106;
        let refused = reader.next(&mut &GOLDEN[first..], |_| Ok(()));
        assert!(refused.expect_err("refused").to_string().contains("lost, repeated"));
    }
}
