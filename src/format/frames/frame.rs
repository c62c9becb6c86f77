//! A whole frame to and from bytes.
//!
//! Guarantees: what `encode` writes, `decode` reads back equal; what `decode` accepts, `encode`
//! writes back byte for byte. Any other bytes are an error, never a panic.

use std::ops::Deref;

use super::handshake::{Hello, Refusal, RefusalCode, Welcome};
use super::header::{FrameKind, HEADER_BYTES, Header, Outline, seal};
use super::message::{Message, decode_words, encode_words, words_length};
use super::text;
use crate::error::{Error, Result};

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GoodbyeReason {
    /// Nothing is wrong and nothing is left to do.
    Finished,
    /// A newer session took the place of this one.
    Superseded,
    /// The process is stopping.
    Stopping,
    /// The peer broke the protocol; the text says how.
    Protocol,
    /// Something of ours failed; the text says what.
    Fault,
    /// A reason of a later version.
    Other(u16),
}

const GOODBYE_REASONS: [(u16, GoodbyeReason); 5] = [
    (1, GoodbyeReason::Finished),
    (2, GoodbyeReason::Superseded),
    (3, GoodbyeReason::Stopping),
    (4, GoodbyeReason::Protocol),
    (5, GoodbyeReason::Fault),
];

impl GoodbyeReason {
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Other(number) => number,
            _ => GOODBYE_REASONS
                .iter()
                .find(|(_, reason)| *reason == self)
                .map(|(number, _)| *number)
                .expect("the table holds every reason"),
        }
    }

    #[must_use]
    pub fn from_number(number: u16) -> Self {
        GOODBYE_REASONS
            .iter()
            .find(|(known, _)| *known == number)
            .map_or(Self::Other(number), |(_, reason)| *reason)
    }
}

/// The last words on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goodbye {
    pub reason: GoodbyeReason,
    pub text: String,
}

impl Goodbye {
    #[must_use]
    pub fn new(reason: GoodbyeReason, words: &str) -> Self {
        Self { reason, text: text::clean(words) }
    }
}

/// Everything that travels on a link.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame<P> {
    Hello(Hello),
    Welcome(Welcome),
    Refuse(Refusal),
    Goodbye(Goodbye),
    Ping { sequence: u64 },
    Pong { sequence: u64 },
    Message(Message<P>),
}

impl<P: Deref<Target = [u8]>> Frame<P> {
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        self.outline().kind
    }

    /// Bytes of the frame, header included.
    #[must_use]
    pub fn encoded_length(&self) -> usize {
        let payload = match self {
            Self::Hello(hello) => hello.payload_length(),
            Self::Welcome(_) => Welcome::payload_length(),
            Self::Refuse(refusal) => words_length(&refusal.text),
            Self::Goodbye(goodbye) => words_length(&goodbye.text),
            Self::Ping { .. } | Self::Pong { .. } => 0,
            Self::Message(message) => message.payload_length(),
        };
        HEADER_BYTES + payload
    }

    /// Appends the frame as number `count` (modulo 256) of its stream.
    pub fn encode(&self, count: u8, out: &mut Vec<u8>) {
        let start = out.len();
        let length = self.encoded_length();
        out.reserve(length);
        out.extend_from_slice(&[0; HEADER_BYTES]);
        match self {
            Self::Hello(hello) => hello.encode(out),
            Self::Welcome(welcome) => welcome.encode(out),
            Self::Refuse(Refusal { code, text }) => encode_words(code.number(), 0, text, out),
            Self::Goodbye(Goodbye { reason, text }) => encode_words(reason.number(), 0, text, out),
            Self::Ping { .. } | Self::Pong { .. } => (),
            Self::Message(message) => message.encode(out),
        }
        assert_eq!(out.len() - start, length, "{:?} is as long as it says", self.kind());
        seal(self.outline(), count, &mut out[start..]);
    }

    /// The frame of a header that carries blocks, and their bytes.
    pub fn decode_blocks(header: &Header, data: P) -> Result<Self> {
        assert!(header.carries_blocks(), "{:?} carries no blocks", header.rule.kind);
        header.check_payload(&data)?;
        Message::decode_blocks(header, data).map(Self::Message)
    }

    /// The frame of any other header, and its payload.
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Self> {
        assert!(!header.carries_blocks(), "{:?} carries blocks", header.rule.kind);
        header.check_payload(payload)?;
        if let Some(message) = Message::decode(header, payload)? {
            return Ok(Self::Message(message));
        }
        Ok(match header.rule.kind {
            FrameKind::Hello => Self::Hello(Hello::decode(payload)?),
            FrameKind::Welcome => Self::Welcome(Welcome::decode(payload)?),
            FrameKind::Refuse => {
                let (code, text) = decode_ending(payload)?;
                Self::Refuse(Refusal { code: RefusalCode::from_number(code), text })
            }
            FrameKind::Goodbye => {
                let (reason, text) = decode_ending(payload)?;
                Self::Goodbye(Goodbye { reason: GoodbyeReason::from_number(reason), text })
            }
            FrameKind::Ping => Self::Ping { sequence: header.number },
            FrameKind::Pong => Self::Pong { sequence: header.number },
            kind => unreachable!("{kind:?} is a message"),
        })
    }

    fn outline(&self) -> Outline {
        let (kind, number) = match self {
            Self::Hello(_) => (FrameKind::Hello, 0),
            Self::Welcome(_) => (FrameKind::Welcome, 0),
            Self::Refuse(_) => (FrameKind::Refuse, 0),
            Self::Goodbye(_) => (FrameKind::Goodbye, 0),
            Self::Ping { sequence } => (FrameKind::Ping, *sequence),
            Self::Pong { sequence } => (FrameKind::Pong, *sequence),
            Self::Message(message) => return message.outline(),
        };
        Outline { kind, flags: 0, number, offset: 0 }
    }
}

fn decode_ending(payload: &[u8]) -> Result<(u16, String)> {
    let (code, errno, text) = decode_words(payload)?;
    if errno != 0 {
        return Err(Error::format(format!("link farewell: expected no errno, found {errno}")));
    }
    Ok((code, text))
}
