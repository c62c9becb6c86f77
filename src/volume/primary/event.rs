//! What may happen to a primary, and what it wants done about it.

use uuid::Uuid;

use super::media::MediumId;
use crate::device::AlignedBuffer;
use crate::error::Result;
use crate::extent::ByteRange;
use crate::map::Capture;
use crate::volume::content::Content;
use crate::volume::service::{Command, Outcome};

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorPolicy {
    /// After the local write; flush and FUA wait for the backup's durable acknowledgement.
    Flush,
    /// Every write waits for the backup to have applied it.
    Write,
    /// Flush waits for this side only; while the link is up the backup lags by so much at the most.
    Async(LagBound),
}

/// How far the backup may lag: what it has not made durable of the writes of this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LagBound {
    /// Of writes; one that exceeds it alone goes when there is no lag.
    pub bytes: u64,
    /// From the oldest of them to the next.
    pub ms: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub policy: MirrorPolicy,
    /// Whether there is a backup at all.
    pub backup: bool,
    /// Each flush commits the map too: survives the loss of the backup in the same instant.
    pub strict: bool,
    /// How long a request waits for a missing block before it fails.
    pub missing_deadline_ms: u64,
}

/// Which connection a fetch travels on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchClass {
    Demand,
    Bulk,
}

#[derive(Debug)]
pub enum Event {
    /// A request of an application; `id` is new.
    Request {
        id: u64,
        command: Command,
    },
    /// A cut in the mirror stream; answered by `Action::CutDone`.
    Cut {
        id: u64,
        snapshot: Uuid,
        label: String,
        selection: Vec<ByteRange>,
        timeout_ms: u64,
    },
    ReadDone {
        token: u64,
        result: Result<AlignedBuffer>,
    },
    WriteDone {
        token: u64,
        result: Result<()>,
    },
    DeviceFlushed {
        result: Result<()>,
    },
    Committed {
        epoch: u64,
        result: Result<()>,
    },
    IntentRecorded {
        result: Result<()>,
    },
    LinkUp,
    LinkDown,
    /// A fetch came back: its content, or why not.
    Fetched {
        tag: u64,
        result: Result<Content>,
    },
    /// An attached medium answered `Action::ReadMedium`, or could not.
    MediumRead {
        medium: MediumId,
        token: u64,
        result: Result<Content>,
    },
    /// The backup has applied everything up to this sequence.
    Applied {
        sequence: u64,
    },
    /// The backup has made everything up to this sequence durable.
    Flushed {
        sequence: u64,
    },
    /// The backup answered `OutgoingMessage::Digest`, or could not.
    DigestTold {
        tag: u64,
        result: Result<[u8; 32]>,
    },
    /// Answers `Action::DigestLocal`.
    DigestDone {
        token: u64,
        result: Result<[u8; 32]>,
    },
    CutAnswered {
        sequence: u64,
        result: Result<(u64, u64)>,
    },
    /// Make the map durable; answered like a request.
    CommitMap {
        id: u64,
    },
    MergeWritten {
        claim: u64,
        result: Result<()>,
    },
    /// Fetch what is missing in the background, or stop doing so.
    Hydrate {
        enabled: bool,
    },
    Tick,
}

#[derive(Clone, Debug, PartialEq)]
pub enum OutgoingMessage {
    Write {
        sequence: u64,
        offset: u64,
        content: Content,
    },
    Flush {
        sequence: u64,
    },
    /// A flush of a guest that the backup is not told of: no write before it may be left out in
    /// favour of one after it.
    Barrier,
    Cut {
        sequence: u64,
        snapshot: Uuid,
        label: String,
        selection: Vec<ByteRange>,
    },
    Fetch {
        tag: u64,
        class: FetchClass,
        range: ByteRange,
        after_sequence: u64,
    },
    /// Answered by `Event::DigestTold`; tags are told from those of fetches.
    Digest {
        tag: u64,
        range: ByteRange,
        after_sequence: u64,
    },
}

impl OutgoingMessage {
    /// Its place in the mirror stream; 0 if it has none.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        match self {
            Self::Write { sequence, .. }
            | Self::Flush { sequence }
            | Self::Cut { sequence, .. } => *sequence,
            Self::Barrier | Self::Fetch { .. } | Self::Digest { .. } => 0,
        }
    }
}

/// To be done outside the machine; device actions are answered by the event of the same token.
#[derive(Debug)]
pub enum Action {
    /// Read these parts into a buffer for `range`; answered by `ReadDone`.
    ReadLocal {
        token: u64,
        range: ByteRange,
        parts: Vec<ByteRange>,
    },
    /// Answered by `MediumRead`, if ever: a medium may stall.
    ReadMedium {
        medium: MediumId,
        token: u64,
        range: ByteRange,
    },
    WriteLocal {
        token: u64,
        offset: u64,
        content: Content,
    },
    /// Answered by `DeviceFlushed`; at most one is under way.
    FlushLocal,
    /// The BLAKE3 of the range; answered by `DigestDone`.
    DigestLocal {
        token: u64,
        range: ByteRange,
    },
    /// Flush the device, then commit the capture (R1); answered by `Committed`; one at a time.
    Commit {
        epoch: u64,
        capture: Capture,
    },
    /// Make exactly these hot extents durable; answered by `IntentRecorded`; one at a time.
    RecordIntent {
        extents: Vec<u32>,
    },
    Send(OutgoingMessage),
    Complete {
        id: u64,
        outcome: Outcome,
    },
    /// Generation is the backup's affair; here are cut sequence and generation as it says.
    CutDone {
        id: u64,
        result: Result<(u64, u64)>,
    },
}
