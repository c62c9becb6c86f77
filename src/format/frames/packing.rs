//! The bytes of blocks, compressed: the payload of a Write or Data with flag 0x02.
//!
//! Guarantees: the length that a peer states is checked before memory is taken for it, and exactly
//! that many bytes come out of one zstd frame, or it is an error.
//! Does not know: when packing pays (`link`).

use std::fmt;
use std::ops::Deref;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zstd::bulk::Decompressor;

use super::frame::Frame;
use super::header::{FLAG_PACKED, HEADER_BYTES, Header, Outline, seal};
use super::message::{Content, Message};
use crate::error::{Error, Result};
use crate::limits::LINK_PAYLOAD_BYTES_MAX;
use crate::units::SECTOR_BYTES;

/// Before the zstd frame in the payload.
pub const PACKED_HEAD_BYTES: usize = 8;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PackedLayout {
    /// Of the blocks.
    length: U32,
    zero: U32,
}

impl<P: Deref<Target = [u8]>> Frame<P> {
    /// The bytes of blocks that it carries, which may travel packed instead.
    #[must_use]
    pub fn blocks(&self) -> Option<&[u8]> {
        match self {
            Self::Message(
                Message::Write { data, .. } | Message::Data { content: Content::Bytes(data), .. },
            ) => Some(data),
            _ => None,
        }
    }

    /// As `encode`, with its blocks as this one zstd frame of them.
    pub fn encode_packed(&self, zstd: &[u8], count: u8, out: &mut Vec<u8>) {
        let plain = self.blocks().expect("it carries blocks");
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        encode(plain.len(), zstd, out);
        let outline = self.outline();
        let flags = outline.flags | FLAG_PACKED;
        seal(Outline { flags, ..outline }, count, &mut out[start..]);
    }

    /// The frame of a header that is packed, whose payload was checked and unpacked.
    pub fn decode_unpacked(header: &Header, data: P) -> Result<Self> {
        assert!(header.is_packed(), "{:?} is not packed", header.rule.kind);
        Message::decode_blocks(header, data).map(Self::Message)
    }
}

fn encode(plain_length: usize, zstd: &[u8], out: &mut Vec<u8>) {
    assert!(PACKED_HEAD_BYTES + zstd.len() < plain_length, "what does not shrink is not packed");
    let length = u32::try_from(plain_length).expect("payloads are limited");
    out.extend_from_slice(PackedLayout { length: length.into(), zero: 0.into() }.as_bytes());
    out.extend_from_slice(zstd);
}

/// Bytes of the blocks in a packed payload.
pub fn plain_length(payload: &[u8]) -> Result<usize> {
    let (layout, zstd) = PackedLayout::ref_from_prefix(payload)
        .map_err(|_| refused("a length and a zstd frame, found fewer bytes"))?;
    let length = layout.length.get();
    let whole = u64::from(length).is_multiple_of(SECTOR_BYTES) && length > 0;
    if !whole || length > LINK_PAYLOAD_BYTES_MAX || layout.zero.get() != 0 {
        return Err(refused(&format!(
            "a length of whole sectors up to {LINK_PAYLOAD_BYTES_MAX} and then 0, found {length} \
             and {}",
            layout.zero
        )));
    }
    let length = length as usize;
    if PACKED_HEAD_BYTES + zstd.len() >= length {
        return Err(refused(&format!(
            "fewer bytes than the {length} that they stand for, found {}",
            PACKED_HEAD_BYTES + zstd.len()
        )));
    }
    Ok(length)
}

fn refused(words: &str) -> Error {
    Error::format(format!("packed link frame: expected {words}"))
}

/// Unpacks; keeps the memory that it needs for that from one frame to the next.
#[derive(Default)]
pub struct Unpacker {
    decompressor: Option<Decompressor<'static>>,
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// Fills `plain`, which has the length that the payload states.
    pub fn unpack(&mut self, payload: &[u8], plain: &mut [u8]) -> Result<()> {
        let zstd = &payload[PACKED_HEAD_BYTES..];
        if zstd::zstd_safe::find_frame_compressed_size(zstd) != Ok(zstd.len()) {
            return Err(refused("one zstd frame and nothing else"));
        }
        let decompressor = match &mut self.decompressor {
            Some(held) => held,
            none => none.insert(
                Decompressor::new()
                    .map_err(|source| Error::device("prepare decompression", &source))?,
            ),
        };
        // The place is exactly as long as stated, so that no frame can ask for more memory.
        match decompressor.decompress_to_buffer(zstd, plain) {
            Ok(length) if length == plain.len() => Ok(()),
            _ => Err(refused(&format!("a zstd frame of {} bytes, found another", plain.len()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::FEATURE_PACKED;
    use super::*;

    const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/link-v1-packed.bin");

    type Bytes = Vec<u8>;

    /// The frames of the golden file; their zstd frames were made by hand.
    fn golden() -> Vec<Message<Bytes>> {
        let raw: Bytes = [vec![7; 4096], (0..=255).collect(), vec![0; 256]].concat();
        vec![
            Message::Write { sequence: 5, offset: 8192, data: vec![0xa5; 4096] },
            Message::Data { tag: 106, offset: 1 << 20, content: Content::Bytes(raw) },
        ]
    }

    fn read(bytes: &[u8], count: u8) -> Result<(Frame<Bytes>, Bytes)> {
        let (head, payload) =
            bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| Error::link("too short"))?;
        let header = Header::decode(head, count)?;
        if header.payload_length as usize > payload.len() {
            return Err(Error::link("too short"));
        }
        let payload = &payload[..header.payload_length as usize];
        header.check_payload(payload)?;
        if !header.is_packed() {
            return Err(Error::link("not packed"));
        }
        assert_eq!(header.features(), FEATURE_PACKED);
        let mut plain = vec![0; plain_length(payload)?];
        Unpacker::default().unpack(payload, &mut plain)?;
        Ok((Frame::decode_unpacked(&header, plain)?, payload[PACKED_HEAD_BYTES..].to_vec()))
    }

    #[test]
    fn the_golden_file_is_read_and_written_as_the_frames_it_was_made_of() {
        let (mut rest, mut written) = (GOLDEN, Vec::new());
        for (count, message) in (0..).zip(golden()) {
            let (frame, zstd) = read(rest, count).expect("golden");
            assert_eq!(frame, Frame::Message(message));
            let before = written.len();
            frame.encode_packed(&zstd, count, &mut written);
            rest = &rest[written.len() - before..];
        }
        assert!(rest.is_empty() && written == GOLDEN);
    }

    #[test]
    fn every_flipped_bit_of_a_packed_frame_is_noticed() {
        let mut bytes = GOLDEN.to_vec();
        let length = HEADER_BYTES + bytes[4] as usize;
        for bit in 0..length * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bytes, 0).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        read(&bytes, 0).expect("whole again");
    }

    #[test]
    fn a_payload_that_states_another_length_than_it_has_is_refused() {
        let payload = &GOLDEN[HEADER_BYTES..HEADER_BYTES + GOLDEN[4] as usize];
        let stating = |length: u32, zero: u32| {
            let mut payload = payload.to_vec();
            payload[..4].copy_from_slice(&length.to_le_bytes());
            payload[4..8].copy_from_slice(&zero.to_le_bytes());
            let length = plain_length(&payload)?;
            Unpacker::default().unpack(&payload, &mut vec![0; length])
        };
        stating(4096, 0).expect("as it is");
        for (length, zero) in [(0, 0), (513, 0), (2 << 20, 0), (u32::MAX, 0), (4096, 1)] {
            assert!(stating(length, zero).is_err(), "{length}, {zero}");
        }
        for length in [3584, 4608, 1 << 20] {
            let text = stating(length, 0).expect_err("refused").to_string();
            assert!(text.contains("found another"), "{text}");
        }
        assert!(plain_length(&payload[..7]).is_err());
        assert!(plain_length(&[&512_u32.to_le_bytes()[..], &[0; 508]].concat()).is_err());
    }

    #[test]
    fn anything_but_one_zstd_frame_is_refused() {
        let payload = GOLDEN[HEADER_BYTES..HEADER_BYTES + GOLDEN[4] as usize].to_vec();
        let twice = [payload.clone(), payload[8..].to_vec()].concat();
        let cut = payload[..payload.len() - 1].to_vec();
        let garbage = [&payload[..8], &[9; 40]].concat();
        for wrong in [twice, cut, garbage, payload[..8].to_vec()] {
            assert!(Unpacker::default().unpack(&wrong, &mut [0; 4096]).is_err());
        }
    }
}
