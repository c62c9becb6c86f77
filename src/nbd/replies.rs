//! How each answer is laid out, in the style that was agreed on.
//!
//! | answer | simple | structured | extended |
//! |---|---|---|---|
//! | success without contents | simple reply | simple reply | chunk `NONE` |
//! | what was read | simple reply, bytes | chunk `OFFSET_DATA` | the same |
//! | nothing was to be read | simple reply | chunk `NONE` | the same |
//! | status of a context | | chunk `BLOCK_STATUS` | chunk `BLOCK_STATUS_EXT` |
//! | refusal | simple reply with the error | chunk `ERROR` with words | the same |
//!
//! Guarantees: every answer is one chunk that ends its request, but for a status, which is one for
//! each context.
//! Does not know: what is asked, what may be asked.

use super::outgoing::Outgoing;
use crate::format::nbd as protocol;
use crate::format::nbd::Style;

/// An error of the protocol and words for a person.
pub(super) type Refusal = (u32, &'static str);

/// The request that an answer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addressee {
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replies(pub(super) Style);

impl Replies {
    /// The header of a chunk; returns its length.
    fn chunk(
        self,
        to: Addressee,
        done: bool,
        kind: u16,
        length: usize,
        out: &mut Outgoing,
    ) -> usize {
        let flags = if done { protocol::REPLY_FLAG_DONE } else { 0 };
        if self.0 == Style::Extended {
            let (cookie, offset, length) = (to.cookie, to.offset, length as u64);
            out.push(&protocol::extended_chunk_header(flags, kind, cookie, offset, length));
            return protocol::EXTENDED_CHUNK_HEADER_BYTES;
        }
        let length = u32::try_from(length).expect("a payload is far below 4 GiB");
        out.push(&protocol::chunk_header(flags, kind, to.cookie, length));
        protocol::CHUNK_HEADER_BYTES
    }

    pub(super) fn succeed(self, to: Addressee, out: &mut Outgoing) {
        match self.0 {
            Style::Extended => self.read_nothing(to, out),
            Style::Simple | Style::Structured => out.push(&protocol::simple_reply(to.cookie, 0)),
        }
    }

    pub(super) fn read_nothing(self, to: Addressee, out: &mut Outgoing) {
        match self.0 {
            Style::Simple => out.push(&protocol::simple_reply(to.cookie, 0)),
            Style::Structured | Style::Extended => {
                self.chunk(to, true, protocol::REPLY_NONE, 0, out);
            }
        }
    }

    pub(super) fn refuse(self, to: Addressee, (error, words): Refusal, out: &mut Outgoing) {
        if self.0 == Style::Simple {
            return out.push(&protocol::simple_reply(to.cookie, error));
        }
        self.chunk(to, true, protocol::REPLY_ERROR, 6 + words.len(), out);
        out.push(&error.to_be_bytes());
        out.push(&(words.len() as u16).to_be_bytes());
        out.push(words.as_bytes());
    }

    /// What goes before `length` bytes that were read; returns its own length.
    pub(super) fn read_header(self, to: Addressee, length: usize, out: &mut Outgoing) -> usize {
        if self.0 == Style::Simple {
            out.push(&protocol::simple_reply(to.cookie, 0));
            return protocol::SIMPLE_REPLY_BYTES;
        }
        let header = self.chunk(to, true, protocol::REPLY_OFFSET_DATA, 8 + length, out);
        out.push(&to.offset.to_be_bytes());
        header + 8
    }

    /// The runs of one context, each a length and its flags; `done` with the last context.
    pub(super) fn status(
        self,
        to: Addressee,
        done: bool,
        context: u32,
        runs: &[(u64, u32)],
        out: &mut Outgoing,
    ) {
        if self.0 == Style::Extended {
            let kind = protocol::REPLY_BLOCK_STATUS_EXT;
            self.chunk(to, done, kind, 8 + 16 * runs.len(), out);
            out.push(&context.to_be_bytes());
            out.push(&(runs.len() as u32).to_be_bytes());
            for (length, flags) in runs {
                out.push(&length.to_be_bytes());
                out.push(&u64::from(*flags).to_be_bytes());
            }
            return;
        }
        self.chunk(to, done, protocol::REPLY_BLOCK_STATUS, 4 + 8 * runs.len(), out);
        out.push(&context.to_be_bytes());
        for (length, flags) in runs {
            let length = u32::try_from(*length).expect("as long as the request at most");
            out.push(&length.to_be_bytes());
            out.push(&flags.to_be_bytes());
        }
    }
}
