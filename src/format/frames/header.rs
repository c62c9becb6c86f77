//! The 32 bytes that begin every frame, and the table of all frames.
//!
//! Guarantees: a `Header` that was read has a known kind, version and flags, a payload length
//! within the limits of its kind, zeros in the fields that its kind does not use, the expected
//! place in the stream, and an intact checksum. So nothing is allocated for a length that a peer
//! made up (DRBD, July 2026: lengths from 0x80000001), and a damaged length is found at once and
//! not by waiting for bytes that never come.
//! Does not know: payloads, sessions, who is allowed to send what now (`link`).

use std::ops::RangeInclusive;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::changes::{REPLY_BYTES_MAX, REPLY_BYTES_MIN, REQUEST_BYTES};
use super::handshake::{Class, FEATURE_CHANGES, FEATURE_PACKED, VERSION};
use super::packing::PACKED_HEAD_BYTES;
use crate::error::{Error, Result};
use crate::limits::{LINK_CUT_RANGES_MAX, LINK_PAYLOAD_BYTES_MAX, LINK_TEXT_BYTES_MAX};

/// Bytes of the header of a frame.
pub const HEADER_BYTES: usize = 32;

/// On `Data`: the range holds zeros and the payload is only its length.
pub(super) const FLAG_ZERO: u8 = 0x01;
/// On `Write` and `Data`: the payload holds the blocks' bytes compressed (`packing.rs`).
pub(super) const FLAG_PACKED: u8 = 0x02;

/// A Hello or Welcome of a later version may be longer than ours; we read its versions and refuse.
const HANDSHAKE_BYTES_MAX: u32 = 4096;
const TEXT_PAYLOAD_MAX: u32 = 8 + LINK_TEXT_BYTES_MAX as u32;
const CHANGES: u32 = REQUEST_BYTES as u32;
const CHANGES_REPLY_MIN: u32 = REPLY_BYTES_MIN as u32;
const CHANGES_REPLY_MAX: u32 = REPLY_BYTES_MAX as u32;
/// At least one byte is compressed, and what does not shrink is not packed.
const PACKED_BYTES: RangeInclusive<u32> = PACKED_HEAD_BYTES as u32 + 1..=LINK_PAYLOAD_BYTES_MAX - 1;
const CUT_PAYLOAD_MAX: u32 = 24 + 255 + 16 * LINK_CUT_RANGES_MAX as u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum FrameKind {
    Hello = 0x01,
    Welcome = 0x02,
    Refuse = 0x03,
    Goodbye = 0x04,
    Ping = 0x05,
    Pong = 0x06,
    Write = 0x10,
    Zero = 0x11,
    Flush = 0x12,
    Cut = 0x13,
    Applied = 0x20,
    Flushed = 0x21,
    CutDone = 0x22,
    Failed = 0x23,
    Fetch = 0x30,
    Digest = 0x31,
    Changes = 0x32,
    Data = 0x40,
    FetchFailed = 0x41,
    DigestReply = 0x42,
    ChangesReply = 0x43,
}

/// Who sends frames of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Primary,
    Backup,
    Either,
}

/// When, and on which connections, frames of a kind travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Before the session is active, on every connection.
    Handshake,
    /// At any time, on every connection.
    Ending,
    /// While the session is active, on every connection.
    Heartbeat,
    /// While the session is active, on the mirror connection.
    Mirror,
    /// While the session is active, on demand and bulk connections.
    Reading,
    /// While the session is active, on bulk connections.
    Bulk,
}

impl Traffic {
    /// Whether a connection of the class carries it.
    #[must_use]
    pub fn travels_on(self, class: Class) -> bool {
        match self {
            Self::Handshake | Self::Ending | Self::Heartbeat => true,
            Self::Mirror => class == Class::Mirror,
            Self::Reading => class != Class::Mirror,
            Self::Bulk => class == Class::Bulk,
        }
    }
}

/// One row of the table of frames.
#[derive(Clone, Debug)]
pub struct Rule {
    pub kind: FrameKind,
    pub sender: Sender,
    pub traffic: Traffic,
    /// Whether the field `number` is used; otherwise it is zero.
    pub has_number: bool,
    /// Whether the field `offset` is used; otherwise it is zero.
    pub has_offset: bool,
    /// The flags that may be set.
    pub flags: u8,
    /// Bytes of payload.
    pub payload: RangeInclusive<u32>,
}

const NUMBER: u8 = 1;
const OFFSET: u8 = 2;

const fn row(
    kind: FrameKind,
    sender: Sender,
    traffic: Traffic,
    fields: u8,
    flags: u8,
    payload: RangeInclusive<u32>,
) -> Rule {
    let (has_number, has_offset) = (fields & NUMBER != 0, fields & OFFSET != 0);
    Rule { kind, sender, traffic, has_number, has_offset, flags, payload }
}

static RULES: [Rule; 21] = {
    use FrameKind as K;
    use Sender::{Backup, Either, Primary};
    use Traffic::{Bulk, Ending, Handshake, Heartbeat, Mirror, Reading};
    const BOTH: u8 = NUMBER | OFFSET;
    const DATA: u32 = LINK_PAYLOAD_BYTES_MAX;
    [
        row(K::Hello, Primary, Handshake, 0, 0, 16..=HANDSHAKE_BYTES_MAX),
        row(K::Welcome, Backup, Handshake, 0, 0, 16..=HANDSHAKE_BYTES_MAX),
        row(K::Refuse, Either, Ending, 0, 0, 8..=TEXT_PAYLOAD_MAX),
        row(K::Goodbye, Either, Ending, 0, 0, 8..=TEXT_PAYLOAD_MAX),
        row(K::Ping, Either, Heartbeat, NUMBER, 0, 0..=0),
        row(K::Pong, Either, Heartbeat, NUMBER, 0, 0..=0),
        row(K::Write, Primary, Mirror, BOTH, FLAG_PACKED, 512..=DATA),
        row(K::Zero, Primary, Mirror, BOTH, 0, 8..=8),
        row(K::Flush, Primary, Mirror, NUMBER, 0, 0..=0),
        row(K::Cut, Primary, Mirror, NUMBER, 0, 24..=CUT_PAYLOAD_MAX),
        row(K::Applied, Backup, Mirror, NUMBER, 0, 0..=0),
        row(K::Flushed, Backup, Mirror, NUMBER, 0, 0..=0),
        row(K::CutDone, Backup, Mirror, NUMBER, 0, 32..=32),
        row(K::Failed, Backup, Mirror, NUMBER, 0, 8..=TEXT_PAYLOAD_MAX),
        row(K::Fetch, Primary, Reading, BOTH, 0, 16..=16),
        row(K::Digest, Primary, Reading, BOTH, 0, 16..=16),
        row(K::Changes, Primary, Bulk, BOTH, 0, CHANGES..=CHANGES),
        row(K::Data, Backup, Reading, BOTH, FLAG_ZERO | FLAG_PACKED, 8..=DATA),
        row(K::FetchFailed, Backup, Reading, NUMBER, 0, 8..=TEXT_PAYLOAD_MAX),
        row(K::DigestReply, Backup, Reading, NUMBER, 0, 32..=32),
        row(K::ChangesReply, Backup, Bulk, BOTH, 0, CHANGES_REPLY_MIN..=CHANGES_REPLY_MAX),
    ]
};

impl FrameKind {
    #[must_use]
    pub fn rule(self) -> &'static Rule {
        RULES.iter().find(|rule| rule.kind == self).expect("the table holds every kind")
    }

    /// The features that must be in use on a connection that carries it, whatever its flags.
    #[must_use]
    pub fn features(self) -> u64 {
        match self {
            Self::Changes | Self::ChangesReply => FEATURE_CHANGES,
            _ => 0,
        }
    }
}

/// The layout on the wire.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Layout {
    kind: u8,
    flags: u8,
    version: u8,
    count: u8,
    payload_length: U32,
    number: U64,
    offset: U64,
    payload_crc: U32,
    header_crc: U32,
}

/// Bytes of the header before its own checksum.
const CHECKED_BYTES: usize = HEADER_BYTES - 4;

/// A header that was read and found sound.
#[derive(Clone, Debug)]
pub struct Header {
    pub rule: &'static Rule,
    pub flags: u8,
    pub payload_length: u32,
    /// Sequence of a mirrored operation, or tag of a read.
    pub number: u64,
    pub offset: u64,
    payload_crc: u32,
}

impl Header {
    /// Reads the header of the frame that is number `count` (modulo 256) of its stream.
    pub fn decode(bytes: &[u8; HEADER_BYTES], count: u8) -> Result<Self> {
        let layout = Layout::ref_from_bytes(&bytes[..]).expect("the layout has 32 bytes");
        let computed = crc32c::crc32c(&bytes[..CHECKED_BYTES]);
        if computed != layout.header_crc.get() {
            return Err(Error::integrity(format!(
                "header of a link frame: expected checksum {computed:08x}, found {:08x}: the \
                 bytes were damaged on the way, or are no frame",
                layout.header_crc
            )));
        }
        if layout.version != VERSION {
            return Err(Error::format(format!(
                "link frame: expected version {VERSION}, found {}: update the older side",
                layout.version
            )));
        }
        let Some(rule) = RULES.iter().find(|rule| rule.kind as u8 == layout.kind) else {
            return Err(Error::format(format!(
                "link frame: expected a known kind, found {:#04x}",
                layout.kind
            )));
        };
        if layout.count != count {
            return Err(Error::link(format!(
                "link frame {:?}: expected frame {count} (modulo 256) of the stream, found {}: \
                 a frame was lost, repeated or reordered",
                rule.kind, layout.count
            )));
        }
        let header = Self {
            rule,
            flags: layout.flags,
            payload_length: layout.payload_length.get(),
            number: layout.number.get(),
            offset: layout.offset.get(),
            payload_crc: layout.payload_crc.get(),
        };
        header.check_fields()?;
        Ok(header)
    }

    fn check_fields(&self) -> Result<()> {
        let Rule { kind, flags, payload, .. } = self.rule;
        if self.flags & !flags != 0 {
            return Err(Error::format(format!(
                "link frame {kind:?}: expected no flags but {flags:#04x}, found {:#04x}",
                self.flags
            )));
        }
        if self.flags & FLAG_ZERO != 0 && self.is_packed() {
            return Err(Error::format(format!(
                "link frame {kind:?}: expected zeros or packed bytes, found both flags"
            )));
        }
        let payload = if self.is_packed() { &PACKED_BYTES } else { payload };
        if !payload.contains(&self.payload_length) {
            return Err(Error::format(format!(
                "link frame {kind:?}: expected a payload of {} to {} bytes, found {}",
                payload.start(),
                payload.end(),
                self.payload_length
            )));
        }
        for (name, value, used) in [
            ("number", self.number, self.rule.has_number),
            ("offset", self.offset, self.rule.has_offset),
        ] {
            if value != 0 && !used {
                return Err(Error::format(format!(
                    "link frame {kind:?}: expected 0 in the unused field `{name}`, found {value}"
                )));
            }
        }
        Ok(())
    }

    /// Whether the payload is a block's bytes, to be landed in an aligned buffer of its own.
    #[must_use]
    pub fn carries_blocks(&self) -> bool {
        match self.rule.kind {
            FrameKind::Write | FrameKind::Data => self.flags == 0,
            _ => false,
        }
    }

    /// Whether the payload is a block's bytes compressed, to be unpacked.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.flags & FLAG_PACKED != 0
    }

    /// The features that must be in use on a connection that carries it.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.rule.kind.features() | if self.is_packed() { FEATURE_PACKED } else { 0 }
    }

    /// Whether these are the bytes that were sent.
    pub fn check_payload(&self, payload: &[u8]) -> Result<()> {
        let computed = crc32c::crc32c(payload);
        if computed == self.payload_crc {
            return Ok(());
        }
        Err(Error::integrity(format!(
            "payload of link frame {:?}: expected checksum {:08x}, found {computed:08x}: the \
             bytes were damaged on the way",
            self.rule.kind, self.payload_crc
        )))
    }
}

/// What `seal` needs beside the payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outline {
    pub kind: FrameKind,
    pub flags: u8,
    pub number: u64,
    pub offset: u64,
}

/// Writes the header into the first bytes of `frame`, whose payload is already in place.
pub(super) fn seal(outline: Outline, count: u8, frame: &mut [u8]) {
    let (head, payload) = frame.split_at_mut(HEADER_BYTES);
    let rule = outline.kind.rule();
    let payload_length = u32::try_from(payload.len()).expect("payloads are limited");
    let limits = if outline.flags & FLAG_PACKED != 0 { &PACKED_BYTES } else { &rule.payload };
    assert!(limits.contains(&payload_length), "{:?}: {payload_length} bytes", rule.kind);
    assert!(rule.has_number || outline.number == 0, "{:?} has no number", rule.kind);
    assert!(rule.has_offset || outline.offset == 0, "{:?} has no offset", rule.kind);
    let mut layout = Layout {
        kind: outline.kind as u8,
        flags: outline.flags,
        version: VERSION,
        count,
        payload_length: payload_length.into(),
        number: outline.number.into(),
        offset: outline.offset.into(),
        payload_crc: crc32c::crc32c(payload).into(),
        header_crc: 0.into(),
    };
    layout.header_crc = crc32c::crc32c(&layout.as_bytes()[..CHECKED_BYTES]).into();
    head.copy_from_slice(layout.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(change: impl FnOnce(&mut Layout)) -> Result<Header> {
        let mut layout = Layout {
            kind: FrameKind::Write as u8,
            flags: 0,
            version: VERSION,
            count: 7,
            payload_length: 4096.into(),
            number: 1.into(),
            offset: 4096.into(),
            payload_crc: 0.into(),
            header_crc: 0.into(),
        };
        change(&mut layout);
        layout.header_crc = crc32c::crc32c(&layout.as_bytes()[..CHECKED_BYTES]).into();
        let bytes = layout.as_bytes().try_into().expect("32 bytes");
        Header::decode(&bytes, 7)
    }

    fn words(change: impl FnOnce(&mut Layout)) -> String {
        header(change).expect_err("refused").to_string()
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = header(|_| ()).expect("sound");
        assert_eq!(header.rule.kind, FrameKind::Write);
        assert_eq!((header.number, header.offset, header.payload_length), (1, 4096, 4096));
        assert!(header.carries_blocks());
    }

    #[test]
    fn lengths_with_the_sign_bit_set_are_refused_before_anything_is_allocated() {
        for length in [0x8000_0000, 0x8000_0001, 0xffff_ff00, 0xffff_ffff] {
            for rule in &RULES {
                let text = words(|layout| {
                    layout.kind = rule.kind as u8;
                    layout.payload_length = length.into();
                });
                assert!(text.contains("bytes, found"), "{text}");
            }
        }
    }

    #[test]
    fn a_length_shorter_than_the_kind_needs_is_refused() {
        for rule in RULES.iter().filter(|rule| *rule.payload.start() > 0) {
            let text = words(|layout| {
                layout.kind = rule.kind as u8;
                layout.payload_length = (rule.payload.start() - 1).into();
            });
            assert!(text.contains("expected a payload of"), "{text}");
        }
    }

    #[test]
    fn unknown_kinds_flags_and_versions_are_refused_by_name() {
        assert!(words(|layout| layout.kind = 0x7f).contains("known kind, found 0x7f"));
        assert!(words(|layout| layout.flags = 0x80).contains("found 0x80"));
        assert!(words(|layout| layout.version = 2).contains("version 1, found 2"));
    }

    #[test]
    fn a_lost_or_repeated_frame_is_noticed() {
        assert!(words(|layout| layout.count = 8).contains("lost, repeated or reordered"));
    }

    #[test]
    fn fields_that_a_kind_does_not_use_are_zero() {
        let text = words(|layout| {
            layout.kind = FrameKind::Flush as u8;
            layout.payload_length = 0.into();
        });
        assert!(text.contains("unused field `offset`"), "{text}");
    }

    #[test]
    fn the_table_names_each_kind_once_and_no_limit_exceeds_a_payload() {
        for rule in &RULES {
            assert_eq!(RULES.iter().filter(|other| other.kind == rule.kind).count(), 1);
            assert!(*rule.payload.end() <= LINK_PAYLOAD_BYTES_MAX, "{:?}", rule.kind);
            assert!(rule.payload.start() <= rule.payload.end());
        }
    }
}
