//! Requests and answers of an open session.
//!
//! Guarantees: a message that was read has ranges that are not empty, counted in whole sectors,
//! ending at most at the largest volume; selections ascend and do not overlap.
//! Does not know: the size of this volume, which answers are awaited (`link`), where blocks' bytes
//! live: `P` is whatever holds them, e.g. `device::Payload`.

use std::ops::Deref;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::changes::{ChangedBlocks, CutName, REQUEST_BYTES, decode_request, encode_request};
use super::header::{FLAG_ZERO, FrameKind, Header, Outline};
use super::text;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::limits::{
    LINK_CUT_RANGES_MAX, LINK_DIGEST_BYTES_MAX, LINK_PAYLOAD_BYTES_MAX, VOLUME_BYTES_MAX,
};
use crate::units::SECTOR_BYTES;

/// What travels while a session is active.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<P> {
    // Mirror, from the primary; sequences ascend.
    Write {
        sequence: u64,
        offset: u64,
        data: P,
    },
    /// The range reads as zeros afterwards.
    Zero {
        sequence: u64,
        range: ByteRange,
    },
    /// Everything up to here durable.
    Flush {
        sequence: u64,
    },
    /// The instant of a snapshot: after every operation before it, before every one after it
    /// (trap 23). An empty selection means the whole volume.
    Cut {
        sequence: u64,
        snapshot: Uuid,
        selection: Vec<ByteRange>,
        label: String,
    },
    // Mirror, from the backup.
    /// Every Write and Zero up to `sequence` has been carried out, or answered by `Failed`.
    Applied {
        sequence: u64,
    },
    /// Every Flush up to this one has been carried out, and what it covers was applied.
    Flushed {
        sequence: u64,
    },
    CutDone {
        sequence: u64,
        snapshot: Uuid,
        generation: u64,
        cut_sequence: u64,
    },
    /// The operation was not carried out. Stands before any Applied or Flushed that covers it.
    Failed {
        sequence: u64,
        failure: Failure,
    },
    // Demand and bulk, from the primary.
    /// The bytes as they are once every mirrored operation up to `after_sequence` of the same
    /// session is applied (0: as they are).
    Fetch {
        tag: u64,
        range: ByteRange,
        after_sequence: u64,
    },
    /// The BLAKE3 of the same.
    Digest {
        tag: u64,
        range: ByteRange,
        after_sequence: u64,
    },
    /// Bulk: which blocks of the range changed since that cut, up to now.
    Changes {
        tag: u64,
        range: ByteRange,
        cut: CutName,
    },
    // Demand and bulk, from the backup.
    Data {
        tag: u64,
        offset: u64,
        content: Content<P>,
    },
    /// Instead of `Data`, `DigestReply` or `ChangesReply`.
    FetchFailed {
        tag: u64,
        failure: Failure,
    },
    DigestReply {
        tag: u64,
        digest: [u8; 32],
    },
    /// Bulk: of the first blocks of the range that was asked for, from `offset`.
    ChangesReply {
        tag: u64,
        offset: u64,
        changed: ChangedBlocks,
    },
}

/// What a fetched range holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Content<P> {
    Bytes(P),
    /// So many zeros; not sent.
    Zero(u64),
}

impl<P: Deref<Target = [u8]>> Content<P> {
    /// Bytes of the range.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zero(length) => *length,
        }
    }
}

/// An error as it crosses the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: ErrorKind,
    pub errno: Option<i32>,
    pub text: String,
}

const FAILURE_CODES: [(u16, ErrorKind); 10] = [
    (1, ErrorKind::Usage),
    (2, ErrorKind::Format),
    (3, ErrorKind::Integrity),
    (4, ErrorKind::Identity),
    (5, ErrorKind::Device),
    (6, ErrorKind::Link),
    (7, ErrorKind::Busy),
    (8, ErrorKind::Poisoned),
    (9, ErrorKind::Timeout),
    (10, ErrorKind::Interrupted),
];

impl Failure {
    #[must_use]
    pub fn from_error(error: &Error) -> Self {
        let errno = error.errno().filter(|errno| *errno > 0);
        Self { kind: error.kind(), errno, text: text::clean(&error.to_string()) }
    }

    /// The error as the primary meets it; the words say that it happened at the backup.
    #[must_use]
    pub fn to_error(&self) -> Error {
        let error = Error::new(self.kind, format!("backup: {}", self.text));
        match self.errno {
            Some(errno) => error.with_errno(errno),
            None => error,
        }
    }
}

/// Begins the payload of Refuse, Goodbye, Failed and FetchFailed; text follows.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WordsLayout {
    code: U16,
    zero: U16,
    errno: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ReadLayout {
    length: U32,
    zero: U32,
    after_sequence: U64,
}

/// Begins the payload of a Cut; the ranges and the label follow.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CutLayout {
    snapshot: [u8; 16],
    ranges: U32,
    label_length: U16,
    zero: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RangeLayout {
    offset: U64,
    length: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CutDoneLayout {
    snapshot: [u8; 16],
    generation: U64,
    cut_sequence: U64,
}

impl<P: Deref<Target = [u8]>> Message<P> {
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Write { .. } => FrameKind::Write,
            Self::Zero { .. } => FrameKind::Zero,
            Self::Flush { .. } => FrameKind::Flush,
            Self::Cut { .. } => FrameKind::Cut,
            Self::Applied { .. } => FrameKind::Applied,
            Self::Flushed { .. } => FrameKind::Flushed,
            Self::CutDone { .. } => FrameKind::CutDone,
            Self::Failed { .. } => FrameKind::Failed,
            Self::Fetch { .. } => FrameKind::Fetch,
            Self::Digest { .. } => FrameKind::Digest,
            Self::Data { .. } => FrameKind::Data,
            Self::FetchFailed { .. } => FrameKind::FetchFailed,
            Self::DigestReply { .. } => FrameKind::DigestReply,
            Self::Changes { .. } => FrameKind::Changes,
            Self::ChangesReply { .. } => FrameKind::ChangesReply,
        }
    }

    /// The bytes of the volume that it names, where it names one range.
    #[must_use]
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            Self::Write { offset, data, .. } => Some(ByteRange::new(*offset, data.len() as u64)),
            Self::Zero { range, .. }
            | Self::Fetch { range, .. }
            | Self::Digest { range, .. }
            | Self::Changes { range, .. } => Some(*range),
            Self::Data { offset, content, .. } => Some(ByteRange::new(*offset, content.length())),
            _ => None,
        }
    }

    pub(super) fn payload_length(&self) -> usize {
        match self {
            Self::Write { data, .. } => data.len(),
            Self::Data { content: Content::Bytes(bytes), .. } => bytes.len(),
            Self::Zero { .. } | Self::Data { content: Content::Zero(_), .. } => 8,
            Self::Flush { .. } | Self::Applied { .. } | Self::Flushed { .. } => 0,
            Self::Cut { selection, label, .. } => 24 + 16 * selection.len() + label.len(),
            Self::CutDone { .. } | Self::DigestReply { .. } => 32,
            Self::Failed { failure, .. } | Self::FetchFailed { failure, .. } => {
                words_length(&failure.text)
            }
            Self::Fetch { .. } | Self::Digest { .. } => 16,
            Self::Changes { .. } => REQUEST_BYTES,
            Self::ChangesReply { changed, .. } => changed.payload_length(),
        }
    }

    pub(super) fn outline(&self) -> Outline {
        let number = match self {
            Self::Write { sequence, .. }
            | Self::Zero { sequence, .. }
            | Self::Flush { sequence }
            | Self::Cut { sequence, .. }
            | Self::Applied { sequence }
            | Self::Flushed { sequence }
            | Self::CutDone { sequence, .. }
            | Self::Failed { sequence, .. } => *sequence,
            Self::Fetch { tag, .. }
            | Self::Digest { tag, .. }
            | Self::Data { tag, .. }
            | Self::FetchFailed { tag, .. }
            | Self::DigestReply { tag, .. }
            | Self::Changes { tag, .. }
            | Self::ChangesReply { tag, .. } => *tag,
        };
        let zero = matches!(self, Self::Data { content: Content::Zero(_), .. });
        let flags = if zero { FLAG_ZERO } else { 0 };
        let offset = match self {
            Self::ChangesReply { offset, .. } => *offset,
            _ => self.range().map_or(0, |range| range.offset),
        };
        Outline { kind: self.kind(), flags, number, offset }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Write { data, .. } => out.extend_from_slice(data),
            Self::Data { content: Content::Bytes(bytes), .. } => out.extend_from_slice(bytes),
            Self::Zero { range: ByteRange { length, .. }, .. }
            | Self::Data { content: Content::Zero(length), .. } => {
                out.extend_from_slice(&length.to_le_bytes());
            }
            Self::Flush { .. } | Self::Applied { .. } | Self::Flushed { .. } => (),
            Self::Cut { snapshot, selection, label, .. } => {
                encode_cut(*snapshot, selection, label, out);
            }
            Self::CutDone { snapshot, generation, cut_sequence, .. } => {
                let layout = CutDoneLayout {
                    snapshot: snapshot.into_bytes(),
                    generation: (*generation).into(),
                    cut_sequence: (*cut_sequence).into(),
                };
                out.extend_from_slice(layout.as_bytes());
            }
            Self::Failed { failure, .. } | Self::FetchFailed { failure, .. } => {
                let code = FAILURE_CODES.iter().find(|(_, kind)| *kind == failure.kind);
                let (code, _) = code.expect("the table holds every kind of error");
                let errno = failure.errno.map_or(0, i32::unsigned_abs);
                encode_words(*code, errno, &failure.text, out);
            }
            Self::Fetch { range, after_sequence, .. }
            | Self::Digest { range, after_sequence, .. } => {
                let length = u32::try_from(range.length).expect("reads are limited");
                let (length, after_sequence) = (length.into(), (*after_sequence).into());
                let layout = ReadLayout { length, zero: 0.into(), after_sequence };
                out.extend_from_slice(layout.as_bytes());
            }
            Self::DigestReply { digest, .. } => out.extend_from_slice(digest),
            Self::Changes { range, cut, .. } => encode_request(range.length, cut, out),
            Self::ChangesReply { changed, .. } => changed.encode(out),
        }
    }

    /// Reads the payload of a frame that carries blocks.
    pub(super) fn decode_blocks(header: &Header, data: P) -> Result<Self> {
        let (number, offset) = (header.number, header.offset);
        let message = match header.rule.kind {
            FrameKind::Write => Self::Write { sequence: number, offset, data },
            _ => Self::Data { tag: number, offset, content: Content::Bytes(data) },
        };
        message.check()?;
        Ok(message)
    }

    /// Reads the payload of any other frame of an open session; `None` if its kind is none.
    pub(super) fn decode(header: &Header, payload: &[u8]) -> Result<Option<Self>> {
        let number = header.number;
        let message = match header.rule.kind {
            FrameKind::Zero => {
                let length = read_length(payload)?;
                Self::Zero { sequence: number, range: ByteRange::new(header.offset, length) }
            }
            FrameKind::Flush => Self::Flush { sequence: number },
            FrameKind::Cut => decode_cut(number, payload)?,
            FrameKind::Applied => Self::Applied { sequence: number },
            FrameKind::Flushed => Self::Flushed { sequence: number },
            FrameKind::CutDone => {
                let layout =
                    CutDoneLayout::ref_from_bytes(payload).map_err(|_| short("CutDone"))?;
                Self::CutDone {
                    sequence: number,
                    snapshot: Uuid::from_bytes(layout.snapshot),
                    generation: layout.generation.get(),
                    cut_sequence: layout.cut_sequence.get(),
                }
            }
            FrameKind::Failed => {
                Self::Failed { sequence: number, failure: decode_failure(payload)? }
            }
            FrameKind::FetchFailed => {
                Self::FetchFailed { tag: number, failure: decode_failure(payload)? }
            }
            FrameKind::Fetch | FrameKind::Digest => {
                let layout = ReadLayout::ref_from_bytes(payload).map_err(|_| short("Fetch"))?;
                expect_zero(layout.zero.get(), "Fetch")?;
                let range = ByteRange::new(header.offset, layout.length.get().into());
                let (tag, after_sequence) = (number, layout.after_sequence.get());
                match header.rule.kind {
                    FrameKind::Fetch => Self::Fetch { tag, range, after_sequence },
                    _ => Self::Digest { tag, range, after_sequence },
                }
            }
            FrameKind::Data => {
                let content = Content::Zero(read_length(payload)?);
                Self::Data { tag: number, offset: header.offset, content }
            }
            FrameKind::DigestReply => {
                let digest = payload.try_into().map_err(|_| short("DigestReply"))?;
                Self::DigestReply { tag: number, digest }
            }
            FrameKind::Changes => {
                let (length, cut) = decode_request(payload)?;
                let range = ByteRange::new(header.offset, length);
                Self::Changes { tag: number, range, cut }
            }
            FrameKind::ChangesReply => {
                let changed = ChangedBlocks::decode(payload)?;
                Self::ChangesReply { tag: number, offset: header.offset, changed }
            }
            _ => return Ok(None),
        };
        message.check()?;
        Ok(Some(message))
    }

    /// Whether ranges are whole sectors, not empty, and within the limits of their kind. What is
    /// sent is checked as well as what is received.
    pub fn check(&self) -> Result<()> {
        if let Some(range) = self.range() {
            let length_max = match self {
                Self::Zero { .. } | Self::Changes { .. } => VOLUME_BYTES_MAX,
                Self::Digest { .. } => LINK_DIGEST_BYTES_MAX.into(),
                _ => LINK_PAYLOAD_BYTES_MAX.into(),
            };
            check_range(range, length_max, self.kind())?;
        }
        match self {
            Self::Cut { snapshot, selection, label, .. } => {
                check_selection(selection)?;
                if snapshot.is_nil() || !text::is_name(label) {
                    return Err(Error::format(
                        "link Cut: expected the snapshot's UUID and a label of at most 255 bytes \
                         without control characters",
                    ));
                }
                Ok(())
            }
            Self::ChangesReply { changed, .. } => changed.check(),
            Self::Failed { failure, .. } | Self::FetchFailed { failure, .. } => {
                let is_sound =
                    text::is_text(&failure.text) && failure.errno.is_none_or(|errno| errno > 0);
                is_sound.then_some(()).ok_or_else(|| {
                    Error::format("link failure: expected clean text and an errno above 0")
                })
            }
            _ => Ok(()),
        }
    }
}

fn check_range(range: ByteRange, length_max: u64, kind: FrameKind) -> Result<()> {
    let whole = range.offset.is_multiple_of(SECTOR_BYTES) && range.length.is_multiple_of(512);
    let end = range.offset.checked_add(range.length);
    let inside = end.is_some_and(|end| end <= VOLUME_BYTES_MAX);
    if whole && inside && (1..=length_max).contains(&range.length) {
        return Ok(());
    }
    Err(Error::format(format!(
        "link {kind:?}: expected 1 to {length_max} bytes in whole sectors of 512 within a volume, \
         found {} bytes at {}",
        range.length, range.offset
    )))
}

fn check_selection(selection: &[ByteRange]) -> Result<()> {
    if selection.len() > LINK_CUT_RANGES_MAX {
        return Err(Error::format(format!(
            "link Cut: expected at most {LINK_CUT_RANGES_MAX} ranges, found {}: join near ones",
            selection.len()
        )));
    }
    let mut end = 0;
    for range in selection {
        check_range(*range, VOLUME_BYTES_MAX, FrameKind::Cut)?;
        if range.offset < end {
            return Err(Error::format(format!(
                "link Cut: expected ascending ranges that do not overlap, found {} after {end}",
                range.offset
            )));
        }
        end = range.end();
    }
    Ok(())
}

fn encode_cut(snapshot: Uuid, selection: &[ByteRange], label: &str, out: &mut Vec<u8>) {
    let layout = CutLayout {
        snapshot: snapshot.into_bytes(),
        ranges: u32::try_from(selection.len()).expect("selections are limited").into(),
        label_length: u16::try_from(label.len()).expect("labels are limited").into(),
        zero: 0.into(),
    };
    out.extend_from_slice(layout.as_bytes());
    for range in selection {
        let layout = RangeLayout { offset: range.offset.into(), length: range.length.into() };
        out.extend_from_slice(layout.as_bytes());
    }
    out.extend_from_slice(label.as_bytes());
}

fn decode_cut<P>(sequence: u64, payload: &[u8]) -> Result<Message<P>> {
    let (layout, rest) = CutLayout::ref_from_prefix(payload).map_err(|_| short("Cut"))?;
    expect_zero(layout.zero.get().into(), "Cut")?;
    let ranges = usize::try_from(layout.ranges.get()).unwrap_or(usize::MAX);
    if ranges > LINK_CUT_RANGES_MAX {
        return Err(Error::format(format!(
            "link Cut: expected at most {LINK_CUT_RANGES_MAX} ranges, found {ranges}"
        )));
    }
    let (ranges, label) =
        <[RangeLayout]>::ref_from_prefix_with_elems(rest, ranges).map_err(|_| short("Cut"))?;
    if label.len() != usize::from(layout.label_length.get()) {
        return Err(short("Cut"));
    }
    Ok(Message::Cut {
        sequence,
        snapshot: Uuid::from_bytes(layout.snapshot),
        selection: ranges
            .iter()
            .map(|range| ByteRange::new(range.offset.get(), range.length.get()))
            .collect(),
        label: text::read_name(label, true, "link Cut, label")?,
    })
}

fn decode_failure(payload: &[u8]) -> Result<Failure> {
    let (code, errno, text) = decode_words(payload)?;
    let Some((_, kind)) = FAILURE_CODES.iter().find(|(known, _)| *known == code) else {
        return Err(Error::format(format!(
            "link failure: expected a code from 1 to {}, found {code}",
            FAILURE_CODES.len()
        )));
    };
    let errno = i32::try_from(errno).map_err(|_| {
        Error::format(format!("link failure: expected an errno below 2^31, found {errno}"))
    })?;
    Ok(Failure { kind: *kind, errno: (errno != 0).then_some(errno), text })
}

pub(super) fn words_length(text: &str) -> usize {
    size_of::<WordsLayout>() + text.len()
}

pub(super) fn encode_words(code: u16, errno: u32, text: &str, out: &mut Vec<u8>) {
    assert!(text::is_text(text), "words are cleaned when they are made");
    let layout = WordsLayout { code: code.into(), zero: 0.into(), errno: errno.into() };
    out.extend_from_slice(layout.as_bytes());
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn decode_words(payload: &[u8]) -> Result<(u16, u32, String)> {
    let (layout, words) = WordsLayout::ref_from_prefix(payload).map_err(|_| short("words"))?;
    expect_zero(layout.zero.get().into(), "words")?;
    Ok((layout.code.get(), layout.errno.get(), text::read(words, "link words")?))
}

fn read_length(payload: &[u8]) -> Result<u64> {
    payload.try_into().map(u64::from_le_bytes).map_err(|_| short("length of a range of zeros"))
}

fn expect_zero(found: u32, what: &str) -> Result<()> {
    if found == 0 {
        return Ok(());
    }
    Err(Error::format(format!("link {what}: expected zeros in the reserved bytes, found {found}")))
}

fn short(what: &str) -> Error {
    Error::format(format!("link {what}: expected a payload as long as its fields say"))
}
