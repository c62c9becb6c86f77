//! Messages of the transmission phase: requests, simple replies, chunks of structured replies.
//!
//! | style | a request | a reply |
//! |---|---|---|
//! | simple | 28 bytes, 32-bit length | 16 bytes, then what was read |
//! | structured | the same | chunks of 20 bytes and a payload; what carries nothing stays simple |
//! | extended | 32 bytes, 64-bit length, a flag says that a payload follows | chunks of 32 bytes |

use super::constants::*;
use super::handshake::Fields;

/// What the two sides agreed on in the handshake; later ones can do all that earlier ones can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Style {
    #[default]
    Simple,
    Structured,
    Extended,
}

/// A request as the client sent it; nothing of it is checked yet but the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    /// Bytes of the volume that it concerns.
    pub length: u64,
    /// Bytes that follow it on the stream.
    pub payload: u64,
}

impl Request {
    /// Bytes of a request without its payload.
    #[must_use]
    pub fn header_bytes(style: Style) -> usize {
        if style == Style::Extended { EXTENDED_REQUEST_BYTES } else { REQUEST_BYTES }
    }

    /// `None` when the magic is wrong: the stream is out of step and cannot be continued.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        let (flags, command) = (fields.u16()?, fields.u16()?);
        let (cookie, offset) = (fields.u64()?, fields.u64()?);
        let length = u64::from(fields.u32()?);
        let payload = if command == CMD_WRITE { length } else { 0 };
        let request = Self { flags, command, cookie, offset, length, payload };
        (magic == REQUEST_MAGIC).then_some(request)
    }

    /// The same of an extended request. A write has its payload whatever its flags say: QEMU up to
    /// version 10 forgets the flag.
    #[must_use]
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        let (flags, command) = (fields.u16()?, fields.u16()?);
        let (cookie, offset, length) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let loaded = flags & CMD_FLAG_PAYLOAD_LEN != 0 || command == CMD_WRITE;
        let payload = if loaded { length } else { 0 };
        let request = Self { flags, command, cookie, offset, length, payload };
        (magic == EXTENDED_REQUEST_MAGIC).then_some(request)
    }
}

/// Payload of a block status that asks for some of the selected contexts only.
#[derive(Debug, PartialEq, Eq)]
pub struct StatusFilter {
    pub length: u64,
    pub contexts: Vec<u32>,
}

impl StatusFilter {
    const LENGTH_BYTES: usize = 8;
    const CONTEXT_BYTES: usize = 4;

    /// Bytes of the payload that names so many contexts.
    #[must_use]
    pub fn bytes(contexts: usize) -> usize {
        Self::LENGTH_BYTES + Self::CONTEXT_BYTES * contexts
    }

    /// `None` when the bytes are no length and a list of numbers.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let length = fields.u64()?;
        if !fields.0.len().is_multiple_of(Self::CONTEXT_BYTES) {
            return None;
        }
        let contexts = std::iter::from_fn(|| fields.u32()).collect();
        Some(Self { length, contexts })
    }
}

/// A whole simple reply, or its header when the data of a read follows.
#[must_use]
pub fn simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The header of one chunk; `length` bytes follow it.
#[must_use]
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let mut bytes = [0; CHUNK_HEADER_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The header of one extended chunk, with the offset of its request; `length` bytes follow it.
#[must_use]
pub fn extended_chunk_header(
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
) -> [u8; EXTENDED_CHUNK_HEADER_BYTES] {
    let mut bytes = [0; EXTENDED_CHUNK_HEADER_BYTES];
    bytes[..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_specification_says() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        bytes[5] = 1;
        bytes[7] = 6;
        bytes[8..16].copy_from_slice(b"cookie!!");
        bytes[22] = 0x10;
        bytes[26] = 0x20;
        let request = Request::decode(&bytes).expect("well formed");
        let cookie = u64::from_be_bytes(*b"cookie!!");
        let (command, offset, length) = (CMD_WRITE_ZEROES, 0x1000, 0x2000);
        let expected = Request { flags: 1, command, cookie, offset, length, payload: 0 };
        assert_eq!(request, expected);
        bytes[3] = 0;
        assert_eq!(Request::decode(&bytes), None);
    }

    #[test]
    fn an_extended_request_has_a_wide_length_and_says_whether_it_has_a_payload() {
        let mut bytes = [0; EXTENDED_REQUEST_BYTES];
        bytes[..4].copy_from_slice(&[0x21, 0xe4, 0x1c, 0x71]);
        bytes[7] = 4;
        bytes[8..16].copy_from_slice(b"cookie!!");
        bytes[22] = 0x10;
        bytes[26] = 0x20;
        let request = Request::decode_extended(&bytes).expect("well formed");
        let (offset, length) = (0x1000, 0x2000_0000_0000);
        assert_eq!((request.command, request.offset, request.length), (CMD_TRIM, offset, length));
        assert_eq!(request.payload, 0);
        bytes[5] = 0x20;
        assert_eq!(Request::decode_extended(&bytes).expect("well formed").payload, length);
        bytes[0] = 0x25;
        assert_eq!(Request::decode_extended(&bytes), None);
    }

    #[test]
    fn a_status_filter_is_a_length_and_whole_numbers() {
        let payload = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1];
        let filter = StatusFilter { length: 1 << 32, contexts: vec![3, 1] };
        assert_eq!(StatusFilter::decode(&payload), Some(filter));
        assert_eq!(StatusFilter::bytes(2), payload.len());
        for cut in (0..payload.len()).filter(|cut| ![8, 12].contains(cut)) {
            assert_eq!(StatusFilter::decode(&payload[..cut]), None, "{cut} bytes");
        }
    }
}
