//! What a client says, and what it makes of a server's answers.

use super::constants::*;
use super::handshake::{Fields, decode_string};

/// Bytes of what a server says first, of the header of an answer to an option, and of the body of
/// a reply that says zeros.
pub const GREETING_BYTES: usize = 18;
pub const OPTION_REPLY_BYTES: usize = 20;
pub const HOLE_BYTES: usize = 12;

/// The handshake flags of a server; `None`: it speaks something else.
#[must_use]
pub fn decode_greeting(bytes: &[u8; GREETING_BYTES]) -> Option<u16> {
    let mut fields = Fields(bytes);
    let magics = (fields.u64()?, fields.u64()?);
    let flags = fields.u16()?;
    (magics == (GREETING_MAGIC, OPTION_MAGIC)).then_some(flags)
}

/// An option of a client with its payload.
#[must_use]
pub fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&length_of(payload).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("what we say is short")
}

fn push_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&length_of(text.as_bytes()).to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// Payload of `OPT_GO`.
#[must_use]
pub fn export_query(name: &str, items: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_string(&mut bytes, name);
    let count = u16::try_from(items.len()).expect("there are few items");
    bytes.extend_from_slice(&count.to_be_bytes());
    items.iter().for_each(|item| bytes.extend_from_slice(&item.to_be_bytes()));
    bytes
}

/// Payload of `OPT_SET_META_CONTEXT` for one context.
#[must_use]
pub fn context_query(export: &str, context: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_string(&mut bytes, export);
    bytes.extend_from_slice(&1_u32.to_be_bytes());
    push_string(&mut bytes, context);
    bytes
}

/// The beginning of an answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub kind: u32,
    /// Bytes that follow, as the server claims; not yet checked against anything.
    pub length: u32,
}

impl OptionReply {
    /// `None`: the stream is not NBD, or out of step.
    #[must_use]
    pub fn decode(bytes: &[u8; OPTION_REPLY_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u64()?;
        let reply = Self { option: fields.u32()?, kind: fields.u32()?, length: fields.u32()? };
        (magic == OPTION_REPLY_MAGIC).then_some(reply)
    }
}

/// One piece of what a server tells about an export.
#[derive(Debug, PartialEq, Eq)]
pub enum Information<'a> {
    Export {
        size: u64,
        flags: u16,
    },
    Description(&'a str),
    BlockSize {
        minimum: u32,
        maximum: u32,
    },
    /// What we did not ask for.
    Other,
}

impl<'a> Information<'a> {
    /// `None`: its length is not what its type wants.
    #[must_use]
    pub fn decode(payload: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let found = match fields.u16()? {
            INFO_EXPORT => Self::Export { size: fields.u64()?, flags: fields.u16()? },
            INFO_BLOCK_SIZE => {
                let (minimum, _preferred) = (fields.u32()?, fields.u32()?);
                Self::BlockSize { minimum, maximum: fields.u32()? }
            }
            INFO_DESCRIPTION => return decode_string(fields.0).map(Self::Description),
            _ => return Some(Self::Other),
        };
        fields.0.is_empty().then_some(found)
    }
}

/// A context that a server has agreed to tell: the number of it, and its name.
#[must_use]
pub fn decode_context(payload: &[u8]) -> Option<(u32, &str)> {
    let mut fields = Fields(payload);
    let number = fields.u32()?;
    Some((number, decode_string(fields.0)?))
}

/// A request.
#[must_use]
pub fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The first 16 bytes of a reply: all of a simple one but its data, or a chunk without its length,
/// which follows in four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHead {
    Simple { cookie: u64, error: u32 },
    Chunk { cookie: u64, flags: u16, kind: u16 },
}

impl ReplyHead {
    /// `None`: the stream is not NBD, or out of step.
    #[must_use]
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => {
                let error = fields.u32()?;
                Some(Self::Simple { error, cookie: fields.u64()? })
            }
            STRUCTURED_REPLY_MAGIC => {
                let (flags, kind) = (fields.u16()?, fields.u16()?);
                Some(Self::Chunk { flags, kind, cookie: fields.u64()? })
            }
            _ => None,
        }
    }
}

/// Where a chunk of zeros lies: offset and length.
#[must_use]
pub fn decode_hole(bytes: &[u8; HOLE_BYTES]) -> (u64, u32) {
    let mut fields = Fields(bytes);
    (fields.u64().expect("long enough"), fields.u32().expect("long enough"))
}

/// Number and words of a chunk that says an error.
#[must_use]
pub fn decode_error(body: &[u8]) -> Option<(u32, String)> {
    let mut fields = Fields(body);
    let number = fields.u32()?;
    let length = usize::from(fields.u16()?);
    let words = fields.0.get(..length)?;
    Some((number, String::from_utf8_lossy(words).into_owned()))
}

/// The context of a chunk of block status, and its runs: length and flags.
#[must_use]
pub fn decode_status(body: &[u8]) -> Option<(u32, Vec<(u32, u32)>)> {
    let mut fields = Fields(body);
    let context = fields.u32()?;
    // The body bounds what is collected here.
    let mut runs = Vec::new();
    while !fields.0.is_empty() {
        runs.push((fields.u32()?, fields.u32()?));
    }
    (!runs.is_empty()).then_some((context, runs))
}

#[cfg(test)]
mod tests {
    use super::super::{
        ExportQuery, MetaQuery, OptionHeader, Request, chunk_header, greeting, option_reply,
        simple_reply,
    };
    use super::*;

    #[test]
    fn what_a_client_says_is_what_a_server_hears() {
        let said = option(OPT_GO, &export_query("db", &[INFO_DESCRIPTION, INFO_BLOCK_SIZE]));
        let (head, payload) = said.split_first_chunk().expect("a header");
        let heard = OptionHeader::decode(head).expect("an option");
        assert_eq!((heard.option, heard.length as usize), (OPT_GO, payload.len()));
        let query = ExportQuery::decode(payload).expect("well formed");
        assert_eq!((query.name, query.description, query.block_size), ("db", true, true));
        let said = context_query("db", "base:allocation");
        let query = MetaQuery::decode(&said).expect("well formed");
        assert_eq!((query.export, query.queries), ("db", vec!["base:allocation"]));
        let heard = Request::decode(&request(CMD_READ, 7, 1 << 40, 4096)).expect("a request");
        let expected = Request {
            flags: 0,
            command: CMD_READ,
            cookie: 7,
            offset: 1 << 40,
            length: 4096,
            payload: 0,
        };
        assert_eq!(heard, expected);
    }

    #[test]
    fn what_a_server_says_is_what_a_client_hears() {
        assert_eq!(decode_greeting(&greeting()), Some(FIXED_NEWSTYLE | NO_ZEROES));
        let expected = OptionReply { option: OPT_GO, kind: REP_INFO, length: 9 };
        assert_eq!(OptionReply::decode(&option_reply(OPT_GO, REP_INFO, 9)), Some(expected));
        let expected = ReplyHead::Simple { cookie: 3, error: EIO };
        assert_eq!(ReplyHead::decode(&simple_reply(3, EIO)), Some(expected));
        let chunk = chunk_header(REPLY_FLAG_DONE, REPLY_NONE, 9, 77);
        let (head, length) = chunk.split_first_chunk().expect("long enough");
        let expected = ReplyHead::Chunk { cookie: 9, flags: REPLY_FLAG_DONE, kind: REPLY_NONE };
        assert_eq!(ReplyHead::decode(head), Some(expected));
        assert_eq!(length, 77_u32.to_be_bytes());
    }

    #[test]
    fn other_magics_and_lengths_that_do_not_fit_are_refused() {
        assert_eq!(decode_greeting(&[0; GREETING_BYTES]), None);
        assert_eq!(OptionReply::decode(&[1; OPTION_REPLY_BYTES]), None);
        assert_eq!(ReplyHead::decode(&[2; SIMPLE_REPLY_BYTES]), None);
        let export = [&INFO_EXPORT.to_be_bytes()[..], &[0; 10]].concat();
        assert!(Information::decode(&export).is_some());
        for length in (0..export.len()).filter(|length| *length != 0) {
            assert_eq!(Information::decode(&export[..length]), None, "{length}");
        }
        assert_eq!(Information::decode(&[&export[..], &[0]].concat()), None);
        assert_eq!(Information::decode(&[0, 2, 0xff]), None, "no UTF-8");
        assert_eq!(decode_status(&[0; 4]), None, "no run");
        assert_eq!(decode_status(&[0; 11]), None, "part of a run");
        assert_eq!(decode_status(&[0; 12]), Some((0, vec![(0, 0)])));
        assert_eq!(decode_error(&[0, 0, 0, 5, 0, 2, b'a']), None, "words cut off");
        assert_eq!(decode_error(&[0, 0, 0, 5, 0, 1, b'a', 9]), Some((5, "a".into())));
    }
}
