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
        assert!(!header.is_packed(), "{:?} is packed", header.rule.kind);
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

    pub(super) fn outline(&self) -> Outline {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::super::handshake::{BootId, Class, Role};
    use super::super::message::{Content, Failure};
    use super::*;
    use crate::error::ErrorKind;
    use crate::extent::ByteRange;
    use crate::limits::LINK_PAYLOAD_BYTES_MAX;
    use crate::units::{BlockSize, Geometry};

    const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/link-v1.bin");

    type Bytes = Vec<u8>;

    fn read(bytes: &[u8], count: u8) -> Result<Frame<Bytes>> {
        let (head, payload) =
            bytes.split_first_chunk().ok_or_else(|| Error::link("shorter than a header"))?;
        let header = Header::decode(head, count)?;
        if payload.len() != header.payload_length as usize {
            return Err(Error::link("another length"));
        }
        if header.carries_blocks() {
            Frame::decode_blocks(&header, payload.to_vec())
        } else {
            Frame::decode(&header, payload)
        }
    }

    fn written(frame: &Frame<Bytes>, count: u8) -> Bytes {
        let mut bytes = Vec::new();
        frame.encode(count, &mut bytes);
        bytes
    }

    fn uuid(first: u8) -> Uuid {
        Uuid::from_bytes(std::array::from_fn(|index| first + index as u8))
    }

    fn golden_control() -> Vec<Frame<Bytes>> {
        let geometry = Geometry::new(10 << 30, BlockSize::DEFAULT).expect("valid");
        let boot_id = |first| BootId(uuid(first).into_bytes());
        vec![
            Frame::Hello(Hello {
                class: Class::Demand,
                role: Role::Primary,
                name: "db".to_owned(),
                volume: uuid(0x10),
                geometry,
                generation: 3,
                session_epoch: 7,
                boot_id: boot_id(0x20),
                peer_boot_id: boot_id(0x30),
                features_offered: 0,
                features_required: 0,
            }),
            Frame::Welcome(Welcome {
                volume: uuid(0x10),
                geometry,
                generation: 3,
                session_epoch: 7,
                applied_sequence: 0,
                boot_id: boot_id(0x30),
                backup: uuid(0x50),
                features: 0,
            }),
            Frame::Refuse(Refusal::new(RefusalCode::StaleGeneration, "stale generation")),
            Frame::Goodbye(Goodbye::new(GoodbyeReason::Stopping, "stopping")),
            Frame::Ping { sequence: 41 },
            Frame::Pong { sequence: 41 },
        ]
    }

    fn golden_messages() -> Vec<Message<Bytes>> {
        let block: Bytes = (0..4096).map(|index| (index % 251) as u8).collect();
        let failure = |kind, errno, text: &str| Failure { kind, errno, text: text.to_owned() };
        vec![
            Message::Write { sequence: 1, offset: 8192, data: block.clone() },
            Message::Zero { sequence: 2, range: ByteRange::new(1 << 20, 8 << 30) },
            Message::Flush { sequence: 3 },
            Message::Cut {
                sequence: 4,
                snapshot: uuid(0x40),
                selection: vec![ByteRange::new(0, 4096), ByteRange::new(1 << 20, 512)],
                label: "nächtlich".to_owned(),
            },
            Message::Applied { sequence: 2 },
            Message::Flushed { sequence: 3 },
            Message::CutDone {
                sequence: 4,
                snapshot: uuid(0x40),
                generation: 3,
                cut_sequence: 12345,
            },
            Message::Failed {
                sequence: 1,
                failure: failure(ErrorKind::Device, Some(28), "no space left"),
            },
            Message::Fetch { tag: 100, range: ByteRange::new(4096, 131_072), after_sequence: 2 },
            Message::Digest { tag: 101, range: ByteRange::new(0, 16 << 20), after_sequence: 0 },
            Message::Data { tag: 100, offset: 4096, content: Content::Bytes(block[..512].into()) },
            Message::Data { tag: 102, offset: 8192, content: Content::Zero(65536) },
            Message::FetchFailed {
                tag: 103,
                failure: failure(ErrorKind::Integrity, None, "damaged"),
            },
            Message::DigestReply { tag: 101, digest: std::array::from_fn(|at| 0x60 + at as u8) },
        ]
    }

    fn golden_frames() -> Vec<Frame<Bytes>> {
        let mut frames = golden_control();
        frames.extend(golden_messages().into_iter().map(Frame::Message));
        frames
    }

    #[test]
    fn every_frame_of_version_1_is_written_as_the_golden_file_has_it() {
        let mut stream = Vec::new();
        for (count, frame) in (0..).zip(golden_frames()) {
            frame.encode(count, &mut stream);
        }
        assert_eq!(stream, GOLDEN);
    }

    #[test]
    fn the_golden_file_is_read_as_the_frames_it_was_made_of() {
        let mut rest = GOLDEN;
        for (count, frame) in (0..).zip(golden_frames()) {
            let (bytes, after) = rest.split_at(frame.encoded_length());
            assert_eq!(read(bytes, count).expect("golden"), frame);
            rest = after;
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn every_flipped_bit_of_every_frame_is_noticed() {
        for frame in golden_frames() {
            let mut bytes = written(&frame, 9);
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(read(&bytes, 9).is_err(), "{:?}, bit {bit}", frame.kind());
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            assert_eq!(read(&bytes, 9).expect("whole again"), frame);
        }
    }

    #[test]
    fn the_golden_file_holds_every_kind_of_frame() {
        let mut kinds: Vec<u8> = golden_frames().iter().map(|frame| frame.kind() as u8).collect();
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), 19);
    }

    /// The frame with its payload changed and its checksums made right again: what a hostile peer
    /// sends, not a damaged wire.
    fn forged(frame: &Frame<Bytes>, change: impl FnOnce(&mut Bytes)) -> String {
        let bytes = written(frame, 0);
        let mut payload = bytes[HEADER_BYTES..].to_vec();
        change(&mut payload);
        let mut bytes = bytes[..HEADER_BYTES].to_vec();
        bytes[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes[24..28].copy_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes.extend(payload);
        read(&bytes, 0).expect_err("refused").to_string()
    }

    fn of_kind(kind: FrameKind) -> Frame<Bytes> {
        golden_frames().into_iter().find(|frame| frame.kind() == kind).expect("all are there")
    }

    #[test]
    fn a_hello_of_another_protocol_version_or_nonsense_is_refused_with_words() {
        let hello = of_kind(FrameKind::Hello);
        for (at, byte, words) in [
            (0, b'X', "magic DRLK, found XRLK"),
            (4, 2, "range of versions, found 2 to 1"),
            (24, 9, "class 1 (mirror), 2 (demand) or 3 (bulk), found 9"),
            (25, 0, "role 1 (primary) or 2 (backup), found 0"),
            (26, 3, "volume name of 3 bytes, found 2"),
            (28, 1, "block size that is a power of two"),
            (32, 1, "size that is a multiple of 512"),
            (16, 1, "required features to be among those offered"),
            (24, 1, "no session in the Hello of a mirror connection"),
            (104, 0, "control character"),
        ] {
            let text = forged(&hello, |payload| payload[at] = byte);
            assert!(text.contains(words), "{text}");
        }
        let text = forged(&hello, |payload| payload[4..8].copy_from_slice(&[2, 0, 3, 0]));
        assert!(text.contains("expected version 1, found 2 to 3"), "{text}");
        let text = forged(&hello, |payload| payload.truncate(104));
        assert!(text.contains("volume name of 2 bytes, found 0"), "{text}");
        let text = forged(&hello, |payload| payload.truncate(103));
        assert!(text.contains("expected 104 bytes, found 103"), "{text}");
        let text = forged(&hello, |payload| payload[72..88].fill(0));
        assert!(text.contains("boot id"), "{text}");
        let text = forged(&hello, |payload| payload[56..72].fill(0));
        assert!(text.contains("UUID"), "{text}");
        let text = forged(&hello, |payload| payload[48..56].fill(0));
        assert!(text.contains("session of the mirror connection"), "{text}");
    }

    #[test]
    fn a_welcome_that_is_not_of_a_backup_or_has_no_identity_is_refused() {
        let welcome = of_kind(FrameKind::Welcome);
        for (at, byte, words) in [
            (4, 2, "version 1, found 2"),
            (6, 1, "expected a backup, found a primary"),
            (7, 1, "reserved bytes"),
            (20, 1, "reserved bytes"),
        ] {
            let text = forged(&welcome, |payload| payload[at] = byte);
            assert!(text.contains(words), "{text}");
        }
        for uuid in [56..72, 72..88, 88..104] {
            let text = forged(&welcome, |payload| payload[uuid].fill(0));
            assert!(text.contains("expected the UUIDs"), "{text}");
        }
    }

    #[test]
    fn selections_that_are_unsorted_overlapping_too_many_or_out_of_range_are_refused() {
        let cut = of_kind(FrameKind::Cut);
        let word = |at: usize, value: u64| {
            move |payload: &mut Bytes| payload[at..at + 8].copy_from_slice(&value.to_le_bytes())
        };
        assert!(forged(&cut, word(40, 0)).contains("ascending"), "sorted");
        assert!(forged(&cut, word(40, 3584)).contains("do not overlap"), "disjoint");
        assert!(forged(&cut, word(48, 0)).contains("expected 1 to"), "not empty");
        assert!(forged(&cut, word(40, u64::MAX - 511)).contains("within a volume"), "in range");
        assert!(forged(&cut, word(24, 1)).contains("whole sectors"), "sectors");
        let text = forged(&cut, |payload| payload[16..20].fill(0xff));
        assert!(text.contains("at most 4096 ranges, found 4294967295"), "{text}");
        let text = forged(&cut, |payload| payload[16] = 3);
        assert!(text.contains("as long as its fields say"), "{text}");
        let text = forged(&cut, |payload| payload[20] = 9);
        assert!(text.contains("as long as its fields say"), "{text}");
    }

    #[test]
    fn ranges_and_failures_outside_their_limits_are_refused() {
        let fetch = of_kind(FrameKind::Fetch);
        for length in [0_u32, 513, LINK_PAYLOAD_BYTES_MAX + 512, u32::MAX] {
            let text =
                forged(&fetch, |payload| payload[..4].copy_from_slice(&length.to_le_bytes()));
            assert!(text.contains("bytes in whole sectors"), "{text}");
        }
        assert!(forged(&fetch, |payload| payload[4] = 1).contains("reserved"));
        let zero = of_kind(FrameKind::Zero);
        assert!(forged(&zero, |payload| payload.fill(0xff)).contains("whole sectors"));
        let write = of_kind(FrameKind::Write);
        assert!(forged(&write, |payload| payload.truncate(700)).contains("whole sectors"));
        let failed = of_kind(FrameKind::Failed);
        assert!(forged(&failed, |payload| payload[0] = 99).contains("found 99"));
        assert!(forged(&failed, |payload| payload[7] = 0x80).contains("errno below 2^31"));
        assert!(forged(&failed, |payload| payload[9] = 0xff).contains("UTF-8"));
    }

    #[test]
    fn an_error_keeps_its_kind_and_errno_across_the_link() {
        let error = Error::device("write", &std::io::Error::from_raw_os_error(28));
        let there = Failure::from_error(&error).to_error();
        assert_eq!((there.kind(), there.errno()), (ErrorKind::Device, Some(28)));
        assert!(there.to_string().starts_with("backup: write: "), "{there}");
    }

    fn range(length_max: u64) -> impl Strategy<Value = ByteRange> {
        (0..1_u64 << 50, 1..=length_max / 512)
            .prop_map(|(sector, sectors)| ByteRange::new(sector * 512, sectors * 512))
    }

    fn blocks() -> impl Strategy<Value = Bytes> {
        (1..=256_usize, any::<u8>()).prop_map(|(sectors, seed)| {
            (0..sectors * 512).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect()
        })
    }

    fn failure() -> impl Strategy<Value = Failure> {
        let kind = prop_oneof![Just(ErrorKind::Device), Just(ErrorKind::Poisoned)];
        (kind, prop::option::of(1..i32::MAX), "[ -~äß]{0,80}")
            .prop_map(|(kind, errno, text)| Failure { kind, errno, text })
    }

    fn selection() -> impl Strategy<Value = Vec<ByteRange>> {
        prop::collection::vec((0..1_u64 << 30, 1..1_u64 << 30), 0..20).prop_map(|steps| {
            let mut end = 0;
            let place = |(gap, sectors): (u64, u64)| {
                let range = ByteRange::new(end + gap * 512, sectors * 512);
                end = range.end();
                range
            };
            steps.into_iter().map(place).collect()
        })
    }

    fn message() -> impl Strategy<Value = Message<Bytes>> {
        let id = any::<u64>;
        let payload = u64::from(LINK_PAYLOAD_BYTES_MAX);
        prop_oneof![
            (id(), 0..1_u64 << 50, blocks()).prop_map(|(sequence, sector, data)| {
                Message::Write { sequence, offset: sector * 512, data }
            }),
            (id(), range(1 << 60)).prop_map(|(sequence, range)| Message::Zero { sequence, range }),
            id().prop_map(|sequence| Message::Flush { sequence }),
            (id(), 1..u128::MAX, selection(), "[ -~ä]{0,120}").prop_map(
                |(sequence, snapshot, selection, label)| Message::Cut {
                    sequence,
                    snapshot: Uuid::from_u128(snapshot),
                    selection,
                    label,
                }
            ),
            id().prop_map(|sequence| Message::Applied { sequence }),
            id().prop_map(|sequence| Message::Flushed { sequence }),
            (id(), any::<u128>(), id(), id()).prop_map(
                |(sequence, snapshot, generation, cut_sequence)| Message::CutDone {
                    sequence,
                    snapshot: Uuid::from_u128(snapshot),
                    generation,
                    cut_sequence,
                }
            ),
            (id(), failure()).prop_map(|(sequence, failure)| Message::Failed { sequence, failure }),
            (id(), range(payload), id()).prop_map(|(tag, range, after_sequence)| {
                Message::Fetch { tag, range, after_sequence }
            }),
            (id(), range(16 << 20), id()).prop_map(|(tag, range, after_sequence)| {
                Message::Digest { tag, range, after_sequence }
            }),
            (id(), 0..1_u64 << 50, blocks()).prop_map(|(tag, sector, bytes)| {
                Message::Data { tag, offset: sector * 512, content: Content::Bytes(bytes) }
            }),
            (id(), range(payload)).prop_map(|(tag, range)| Message::Data {
                tag,
                offset: range.offset,
                content: Content::Zero(range.length),
            }),
            (id(), failure()).prop_map(|(tag, failure)| Message::FetchFailed { tag, failure }),
            (id(), any::<[u8; 32]>())
                .prop_map(|(tag, digest)| Message::DigestReply { tag, digest }),
        ]
    }

    proptest! {
        #[test]
        fn any_message_is_read_as_it_was_written(message in message(), count in any::<u8>()) {
            prop_assert!(message.check().is_ok());
            let frame = Frame::Message(message);
            let bytes = written(&frame, count);
            prop_assert_eq!(bytes.len(), frame.encoded_length());
            prop_assert_eq!(read(&bytes, count).expect("just written"), frame);
        }

        #[test]
        fn any_handshake_is_read_as_it_was_written(
            name in "[ -~ä]{1,100}",
            sectors in 1..1_u64 << 50,
            shift in 9..=20_u32,
            numbers in any::<[u64; 4]>(),
            ids in any::<[u128; 3]>(),
            code in any::<u16>(),
        ) {
            let block_size = BlockSize::new(1 << shift).expect("a power of two");
            let geometry = Geometry::new(sectors * 512, block_size).expect("whole sectors");
            let boot_id = BootId((ids[0] | 1).to_le_bytes());
            let volume = Uuid::from_u128(ids[1] | 1);
            let [generation, session_epoch, applied_sequence, features] = numbers;
            let session_epoch = session_epoch | 1;
            let hello = Frame::Hello(Hello {
                class: Class::Bulk, role: Role::Backup, name, volume, geometry, generation,
                session_epoch, boot_id, peer_boot_id: BootId((ids[2] | 1).to_le_bytes()),
                features_offered: features, features_required: features & generation,
            });
            let welcome = Frame::Welcome(Welcome {
                volume, geometry, generation, session_epoch, applied_sequence, boot_id, features,
                backup: Uuid::from_u128(ids[2] | 1),
            });
            let refusal = Frame::Refuse(Refusal::new(RefusalCode::from_number(code), "no"));
            let goodbye = Frame::Goodbye(Goodbye::new(GoodbyeReason::from_number(code), "bye"));
            for frame in [hello, welcome, refusal, goodbye] {
                prop_assert_eq!(read(&written(&frame, 0), 0).expect("just written"), frame);
            }
        }

        #[test]
        fn accepted_payloads_are_written_back_byte_for_byte(
            at in 0..20_usize,
            payload in prop::collection::vec(any::<u8>(), 0..160),
        ) {
            // Sound headers over any payload: what a hostile peer can reach the parsers with.
            let frame = &golden_frames()[at];
            let mut bytes = written(frame, 0)[..HEADER_BYTES].to_vec();
            bytes[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            bytes[24..28].copy_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..28]);
            bytes[28..].copy_from_slice(&crc.to_le_bytes());
            bytes.extend(payload);
            if let Ok(accepted) = read(&bytes, 0) {
                prop_assert_eq!(written(&accepted, 0), bytes);
            }
        }
    }
}
