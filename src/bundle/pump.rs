//! Reads a source ahead in the order of its medium, verifies on several threads, and hands each
//! piece to a consumer there. Merging and verifying are this with different consumers.
//!
//! Guarantees: the consumer gets bytes only after they were verified (law 9); memory is bounded by
//! `MEMORY_BYTES_PER_THREAD` and `MEMORY_BYTES`, whatever the source; the caller's thread hears of
//! every piece once, and may end it all.
//! Does not know: what the bytes are for.

use std::ops::ControlFlow;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::pieces::{Content, Opener, Piece, PieceSource};
use super::writer::spawn;
use crate::device::AlignedBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::limits::{
    BUNDLE_CHUNK_BYTES_MAX, BUNDLE_CHUNKS_AHEAD, BUNDLE_THREADS_MAX, BUNDLE_ZERO_STEP_BYTES,
    MERGE_READ_FAILURES_MAX, PROGRESS_INTERVAL_MS,
};

const CHUNK: usize = BUNDLE_CHUNK_BYTES_MAX as usize;
/// Memory of the read-ahead: one stretch on huge pages, lent out chunk by chunk.
pub const MEMORY_BYTES: usize = BUNDLE_CHUNKS_AHEAD * CHUNK;
/// Memory of each verifying thread, for unpacked chunks.
pub const MEMORY_BYTES_PER_THREAD: usize = CHUNK;

/// Threads that hash, verify and unpack, if the caller does not say.
#[must_use]
pub fn threads_default() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).min(BUNDLE_THREADS_MAX)
}

/// What a piece turned out to be.
#[derive(Clone, Copy, Debug)]
pub enum Opened<'b> {
    Zero,
    /// Verified bytes of the whole piece.
    Bytes(&'b [u8]),
}

/// Takes verified pieces, on several threads at a time.
pub trait Consumer: Sync {
    /// What the caller's thread hears of a piece.
    type Note: Send;
    /// Whether anything of the range is of use; if not, it is not even read.
    fn wants(&self, range: ByteRange) -> bool;
    fn consume(&self, range: ByteRange, opened: Opened<'_>) -> Result<Self::Note>;
}

/// What became of a piece.
#[derive(Debug)]
pub enum Outcome<N> {
    /// Nothing of it was of use.
    Unwanted,
    Consumed(N),
    /// Its bytes could not be had; the error says why.
    Damaged(Error),
}

/// One piece dealt with.
#[derive(Debug)]
pub struct Event<N> {
    pub range: ByteRange,
    pub bytes_read: u64,
    pub outcome: Outcome<N>,
}

struct Job<'a> {
    piece: Piece,
    /// Holds the stored form, of a piece that has one.
    slot: Option<&'a mut [u8]>,
    /// Why there is none.
    failed: Option<Error>,
}

/// Goes through the source once. `listen` gets every event, and `None` when nothing happened for a
/// while; breaking off leaves what was consumed consumed.
pub fn run<C: Consumer>(
    source: &dyn PieceSource,
    consumer: &C,
    threads: usize,
    mut listen: impl FnMut(Option<Event<C::Note>>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let openers = (0..threads).map(|_| Opener::new()).collect::<Result<Vec<_>>>()?;
    let mut stored = AlignedBuffer::zeroed(MEMORY_BYTES);
    let mut unpacked = AlignedBuffer::zeroed(threads * MEMORY_BYTES_PER_THREAD);
    std::thread::scope(|scope| {
        let (free, slots) = bounded(BUNDLE_CHUNKS_AHEAD);
        for slot in stored.chunks_exact_mut(CHUNK) {
            free.send(slot).expect("as many slots as places");
        }
        let (jobs_in, jobs) = bounded(BUNDLE_CHUNKS_AHEAD);
        let (events_in, events) = bounded(BUNDLE_CHUNKS_AHEAD);
        let told = events_in.clone();
        spawn(scope, "chunks-read", move || {
            if let Err(error) = read_ahead(source, consumer, &slots, &jobs_in, &told) {
                // Nobody listens any more if the caller has broken off.
                let _unheard = told.send(Err(error));
            }
        })?;
        for (opener, plain) in openers.into_iter().zip(unpacked.chunks_exact_mut(CHUNK)) {
            let (jobs, events_in, free) = (jobs.clone(), events_in.clone(), free.clone());
            spawn(scope, "chunks-verify", move || {
                open_all(consumer, opener, plain, &jobs, &events_in, &free);
            })?;
        }
        drop((jobs, events_in, free));
        // The reading thread may wait for bytes that never come.
        hear_all(&events, &mut listen).inspect_err(|_| source.interrupt())
    })
}

fn hear_all<N>(
    events: &Receiver<Result<Event<N>>>,
    listen: &mut dyn FnMut(Option<Event<N>>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    loop {
        let heard = match events.recv_timeout(Duration::from_millis(PROGRESS_INTERVAL_MS)) {
            Ok(event) => listen(Some(event?))?,
            Err(RecvTimeoutError::Timeout) => listen(None)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        if heard.is_break() {
            return Err(Error::new(ErrorKind::Interrupted, "stopped on request; may be resumed"));
        }
    }
}

type Events<N> = Sender<Result<Event<N>>>;

/// The channel was closed by its other end: the caller broke off.
fn broken_off<T>(_: T) -> Error {
    Error::new(ErrorKind::Interrupted, "nobody listens any more")
}

fn read_ahead<'a, C: Consumer>(
    source: &dyn PieceSource,
    consumer: &C,
    slots: &Receiver<&'a mut [u8]>,
    jobs: &Sender<Job<'a>>,
    events: &Events<C::Note>,
) -> Result<()> {
    let mut failures = 0;
    for piece in source.pieces() {
        for piece in steps(piece?) {
            if !consumer.wants(piece.range) {
                let range = piece.range;
                let event = Event { range, bytes_read: 0, outcome: Outcome::Unwanted };
                events.send(Ok(event)).map_err(broken_off)?;
                continue;
            }
            let mut job = Job { piece, slot: None, failed: None };
            let length = job.piece.bytes_to_read();
            if length > 0 {
                let slot = slots.recv().map_err(broken_off)?;
                match job.piece.read(&mut slot[..length]) {
                    Ok(()) => failures = 0,
                    Err(error) => {
                        failures += 1;
                        if failures >= MERGE_READ_FAILURES_MAX {
                            return Err(error);
                        }
                        job.failed = Some(error);
                    }
                }
                job.slot = Some(slot);
            }
            jobs.send(job).map_err(broken_off)?;
        }
    }
    Ok(())
}

/// Long runs without bytes are dealt with step by step.
fn steps(piece: Piece) -> impl Iterator<Item = Piece> {
    let Piece { range, content } = piece;
    let bytes = !matches!(content, Content::Zero | Content::Missing(_));
    let step = if bytes { u64::MAX } else { BUNDLE_ZERO_STEP_BYTES };
    let mut at = range.offset;
    std::iter::from_fn(move || {
        if at >= range.end() {
            return None;
        }
        let end = (at / step + 1).saturating_mul(step).min(range.end());
        let part = ByteRange::new(at, end - at);
        at = end;
        Some(Piece { range: part, content: content.clone() })
    })
}

fn open_all<'a, C: Consumer>(
    consumer: &C,
    mut opener: Opener,
    plain: &mut [u8],
    jobs: &Receiver<Job<'a>>,
    events: &Events<C::Note>,
    free: &Sender<&'a mut [u8]>,
) {
    for Job { piece, slot, failed } in jobs {
        let event = open_one(consumer, &mut opener, plain, (&piece, slot.as_deref(), failed));
        if let Some(slot) = slot {
            // The reader may have ended meanwhile; then nobody needs the slot.
            let _unneeded = free.send(slot);
        }
        if events.send(event).is_err() {
            return;
        }
    }
}

fn open_one<C: Consumer>(
    consumer: &C,
    opener: &mut Opener,
    plain: &mut [u8],
    (piece, slot, failed): (&Piece, Option<&[u8]>, Option<Error>),
) -> Result<Event<C::Note>> {
    let range = piece.range;
    let length = piece.bytes_to_read();
    let opened = match (&piece.content, slot, failed) {
        (Content::Missing(why), ..) => Err(Error::integrity(*why).at_offset(range.offset)),
        (_, _, Some(error)) => Err(error),
        (Content::Zero, ..) => Ok(Opened::Zero),
        (_, slot, None) => {
            let stored = slot.map_or(&[][..], |slot| &slot[..length]);
            piece.open(opener, stored, plain).map(Opened::Bytes)
        }
    };
    let outcome = match opened {
        Ok(opened) => Outcome::Consumed(consumer.consume(range, opened)?),
        Err(error) => Outcome::Damaged(error),
    };
    Ok(Event { range, bytes_read: piece.bytes_stored() as u64, outcome })
}
