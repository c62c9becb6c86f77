//! Brings a source through memory: read in the order of its medium, many requests under way, each
//! piece verified and handed to a consumer, whose writes go out of the same memory. Merging and
//! verifying are this with different consumers.
//!
//! | a job is | until | then |
//! |---|---|---|
//! | planned | a slot of memory is free | its reads are submitted |
//! | reading | the last read ended | its parts are opened, the consumer begins with each |
//! | writing | the last write ended | the consumer ends each, the caller's thread hears of it |
//!
//! Several workers do this side by side, each with a queue of its own; the plan is shared.
//!
//! Guarantees: the consumer gets bytes only after they were verified (law 9); what it began it
//! ends, however the pump ends; memory is bounded by `MEMORY_BYTES`, whatever the source; the
//! caller's thread hears of every byte of the source once, and may end it all.
//! Does not know: what the bytes are for.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::pieces::{Opener, PieceSource};
use super::plan::{Planner, SLOT_BYTES};
use super::worker::{Shared, Worker};
use super::writer::spawn;
use crate::device::{Device, Engine};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::limits::{
    BUNDLE_THREADS_MAX, JOB_CACHED_BYTES, JOB_NEWS_MAX, JOB_THREADS, JOBS_UNDER_WAY,
    PROGRESS_INTERVAL_MS,
};

/// Memory of one pump: stretches on huge pages, one a worker.
pub const MEMORY_BYTES: usize = JOBS_UNDER_WAY * SLOT_BYTES;

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

/// What a consumer does with a piece.
#[derive(Debug)]
pub enum Begun<C, N> {
    /// All was done at once.
    Done(N),
    /// These runs of it (bytes of the volume) are to be written to the device; `end` follows.
    Writing { claim: C, device: Arc<dyn Device>, runs: Vec<ByteRange> },
}

/// Takes verified pieces, on several threads at a time.
pub trait Consumer: Sync {
    /// What it holds of a piece while it is being written.
    type Claim;
    /// What the caller's thread hears of a piece.
    type Note: Send;
    /// The runs of the range that are of use. What none of is of use is not even read.
    fn wanted(&self, range: ByteRange) -> Vec<ByteRange>;
    fn begin(&self, range: ByteRange, opened: Opened<'_>)
    -> Result<Begun<Self::Claim, Self::Note>>;
    /// All writes of a claim have ended.
    fn end(&self, claim: Self::Claim, result: Result<()>) -> Result<Self::Note>;
    /// In the place of `begin`, where the bytes of a piece could not be had.
    fn lost(&self, range: ByteRange) -> Result<()> {
        let _to_most_it_is_as_if_it_had_not_come = range;
        Ok(())
    }
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

/// A stretch of the source dealt with.
#[derive(Debug)]
pub struct Event<N> {
    pub range: ByteRange,
    pub chunks: u64,
    pub bytes_read: u64,
    pub outcome: Outcome<N>,
}

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crew {
    pub engine: Engine,
    /// Threads that hash, verify and unpack.
    pub threads: usize,
    /// Whether reads and writes usually return without waiting (`Device::answers_at_once`).
    pub at_once: bool,
}

impl Crew {
    /// For reading the source.
    #[must_use]
    pub fn of(source: &dyn PieceSource) -> Self {
        Self::suited(None, threads_default(), source.answers_at_once())
    }

    /// `None`: with the engine that suits.
    #[must_use]
    pub fn suited(engine: Option<Engine>, threads: usize, at_once: bool) -> Self {
        let engine = engine.unwrap_or_else(|| Engine::suited_to(at_once));
        Self { engine, threads, at_once }
    }

    /// Workers, jobs under way of each, and bytes of an image in a job.
    fn sizes(self) -> (usize, usize, usize) {
        match self.engine {
            Engine::Ring => (self.threads, (JOBS_UNDER_WAY / self.threads).max(1), SLOT_BYTES),
            // What is copied from memory to memory is still in the processor's cache then.
            Engine::Threads if self.at_once => (self.threads, 1, JOB_CACHED_BYTES),
            // A thread does one thing at a time: more of them than processors keep a disk busy.
            Engine::Threads => (self.threads.clamp(JOB_THREADS, JOBS_UNDER_WAY), 1, SLOT_BYTES),
        }
    }
}

/// Goes through the source once. `listen` gets what has happened, and nothing now and then when
/// nothing did; breaking off leaves what was consumed consumed.
pub fn run<C: Consumer>(
    source: &dyn PieceSource,
    consumer: &C,
    crew: Crew,
    mut listen: impl FnMut(Vec<Event<C::Note>>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    crew.engine.check()?;
    let (workers, slots, image_bytes) = crew.sizes();
    let openers = (0..workers).map(|_| Opener::new()).collect::<Result<Vec<_>>>()?;
    let (news, heard) = bounded(JOB_NEWS_MAX);
    let shared = Shared {
        consumer,
        planner: Mutex::new(Planner::new(source.pieces(), image_bytes)),
        stop: AtomicBool::new(false),
        failures: AtomicU32::new(0),
    };
    std::thread::scope(|scope| {
        // However this ends, the workers stop: the scope waits for them.
        let _stopping = StopOnDrop(&shared.stop);
        let _interrupting = InterruptOnPanic(source);
        for (number, opener) in openers.into_iter().enumerate() {
            let (shared, news) = (&shared, news.clone());
            spawn(scope, &format!("pump-{number}"), move || {
                let _interrupting = InterruptOnPanic(source);
                let worked = crew.engine.queue(slots * SLOT_BYTES).and_then(|queue| {
                    Worker::new(shared, queue, slots, opener, news.clone()).run()
                });
                if let Err(error) = worked {
                    // Nobody listens any more if the caller has broken off.
                    let _unheard = news.send(Err(error));
                }
            })?;
        }
        drop(news);
        let wait = Duration::from_millis(PROGRESS_INTERVAL_MS);
        let mut first = None;
        loop {
            let listened = match heard.recv_timeout(wait) {
                Ok(Ok(events)) => listen(events),
                Ok(Err(error)) => Err(error),
                Err(RecvTimeoutError::Timeout) => listen(Vec::new()),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            // What is under way ends first, and is heard of; then the first error is told.
            let ended = match listened {
                Ok(ControlFlow::Continue(())) => continue,
                Ok(ControlFlow::Break(())) => {
                    Error::new(ErrorKind::Interrupted, "stopped on request; may be resumed")
                }
                Err(error) => error,
            };
            shared.stop.store(true, std::sync::atomic::Ordering::Release);
            // A worker may wait for bytes that never come.
            source.interrupt();
            first.get_or_insert(ended);
        }
        first.map_or(Ok(()), Err)
    })
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Release);
    }
}

/// Others may wait for what a thread that has panicked was to do.
struct InterruptOnPanic<'a>(&'a dyn PieceSource);

impl Drop for InterruptOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.interrupt();
        }
    }
}
