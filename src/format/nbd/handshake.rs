//! Messages before transmission: the greeting, options and the answers to them.

use super::constants::*;
use crate::limits;

/// What opens a connection: both magics and our handshake flags.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    bytes
}

/// An option without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    /// Bytes of payload that follow, as the client claims; not yet checked against anything.
    pub length: u32,
}

impl OptionHeader {
    /// `None` when the magic is wrong: the stream is not NBD, or out of step.
    #[must_use]
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u64()?;
        let (option, length) = (fields.u32()?, fields.u32()?);
        (magic == OPTION_MAGIC).then_some(Self { option, length })
    }
}

/// The header of an answer to `option`; `length` bytes follow it.
#[must_use]
pub fn option_reply(option: u32, kind: u32, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes[8..12].copy_from_slice(&option.to_be_bytes());
    bytes[12..16].copy_from_slice(&kind.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Size and transmission flags: the whole answer to `OPT_EXPORT_NAME` (before its zeroes) and,
/// after a type of two bytes, the body of `INFO_EXPORT`.
#[must_use]
pub fn export_name_reply(size: u64, flags: u16) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&size.to_be_bytes());
    bytes[8..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// Payload of `OPT_INFO` and `OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub struct ExportQuery<'a> {
    pub name: &'a str,
    pub block_size: bool,
    pub canonical_name: bool,
    pub description: bool,
}

impl<'a> ExportQuery<'a> {
    /// `None` when lengths do not add up to the payload or the name is not a string of the
    /// protocol. Items that are not known are passed over.
    #[must_use]
    pub fn decode(payload: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let name = fields.string()?;
        let count = usize::from(fields.u16()?);
        if fields.0.len() != count * 2 {
            return None;
        }
        let mut query = Self { name, block_size: false, canonical_name: false, description: false };
        while let Some(item) = fields.u16() {
            match item {
                INFO_BLOCK_SIZE => query.block_size = true,
                INFO_NAME => query.canonical_name = true,
                INFO_DESCRIPTION => query.description = true,
                _ => {}
            }
        }
        Some(query)
    }
}

/// Payload of `OPT_LIST_META_CONTEXT` and `OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub struct MetaQuery<'a> {
    pub export: &'a str,
    pub queries: Vec<&'a str>,
}

impl<'a> MetaQuery<'a> {
    /// `None` when lengths do not add up to the payload or a string is none of the protocol.
    #[must_use]
    pub fn decode(payload: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let export = fields.string()?;
        let count = fields.u32()?;
        // Each query takes four bytes at least, so the payload bounds what is collected here.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.string()?);
        }
        fields.0.is_empty().then_some(Self { export, queries })
    }
}

/// A string of the protocol: UTF-8 without NUL, at most 4096 bytes.
#[must_use]
pub fn decode_string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > limits::NBD_NAME_BYTES_MAX as usize || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// Big-endian numbers taken from the front of a message.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        decode_string(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name_length: u32, name: &[u8], items: &[u16]) -> Vec<u8> {
        let mut payload = name_length.to_be_bytes().to_vec();
        payload.extend_from_slice(name);
        payload.extend_from_slice(&(items.len() as u16).to_be_bytes());
        items.iter().for_each(|item| payload.extend_from_slice(&item.to_be_bytes()));
        payload
    }

    #[test]
    fn an_export_query_names_the_export_and_what_is_asked() {
        let payload = query(2, b"db", &[INFO_BLOCK_SIZE, 77, INFO_NAME]);
        let decoded = ExportQuery::decode(&payload).expect("well formed");
        assert_eq!((decoded.name, decoded.block_size, decoded.description), ("db", true, false));
        assert!(decoded.canonical_name);
    }

    #[test]
    fn a_length_that_does_not_add_up_is_refused() {
        for length in [0, 1, 3, 4096, u32::MAX - 1, u32::MAX] {
            assert_eq!(ExportQuery::decode(&query(length, b"db", &[0])), None, "{length}");
        }
        let whole = query(2, b"db", &[0, 3]);
        for cut in 0..whole.len() {
            assert_eq!(ExportQuery::decode(&whole[..cut]), None, "cut at {cut}");
        }
        assert_eq!(MetaQuery::decode(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), None);
        assert_eq!(MetaQuery::decode(&[0, 0, 0, 0, 0, 0, 0, 0, 9]), None);
    }

    #[test]
    fn a_name_is_utf8_without_nul_and_not_longer_than_a_string_may_be() {
        assert_eq!(ExportQuery::decode(&query(2, b"a\0", &[])), None);
        assert_eq!(ExportQuery::decode(&query(2, b"\xff\xfe", &[])), None);
        let long = [b'a'; 4097];
        assert!(ExportQuery::decode(&query(4096, &long[..4096], &[])).is_some());
        assert_eq!(ExportQuery::decode(&query(4097, &long, &[])), None);
    }
}
