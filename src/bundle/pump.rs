//! Brings sources through memory: read in the order of their media, many requests under way, each
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
//! | a feed | then |
//! |---|---|
//! | came to its end, or failed | the next one of its lane begins; those of other lanes go on |
//! | and the caller breaks off | no other begins, all that run end what is under way |
//!
//! Guarantees: the consumer gets bytes only after they were verified (law 9); what it began it
//! ends, however the pump ends; memory is bounded by the jobs of the feeds that run, whatever the
//! sources; the caller's thread hears of every byte of a source once, and may end it all.
//! Does not know: what the bytes are for, which sources share a disk.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::Scope;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};

use super::pieces::{Opener, PieceSource};
use super::plan::SLOT_BYTES;
use super::worker::{News, Shared, Worker};
use super::writer::spawn;
use crate::device::{Device, Engine};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::limits::{
    BUNDLE_THREADS_MAX, JOB_CACHED_BYTES, JOB_NEWS_MAX, JOB_THREADS, JOBS_UNDER_WAY,
    PROGRESS_INTERVAL_MS,
};

/// Memory of one source on its way: stretches on huge pages, one a worker.
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
        Self::suited(source.engine(), threads_default(), source.answers_at_once())
    }

    /// `None`: with the engine that suits.
    #[must_use]
    pub fn suited(engine: Option<Engine>, threads: usize, at_once: bool) -> Self {
        let engine = engine.unwrap_or_else(|| Engine::suited_to(at_once));
        Self { engine, threads, at_once }
    }

    /// Workers, jobs under way of each, and bytes of an image in a job, if `jobs` may be under way.
    fn sizes(self, jobs: usize) -> (usize, usize, usize) {
        let most = |threads: usize| threads.min(jobs).max(1);
        match self.engine {
            Engine::Ring => {
                let workers = most(self.threads);
                (workers, (jobs / workers).max(1), SLOT_BYTES)
            }
            // What is copied from memory to memory is still in the processor's cache then.
            Engine::Threads if self.at_once => (most(self.threads), 1, JOB_CACHED_BYTES),
            // A thread does one thing at a time: more of them than processors keep a disk busy.
            Engine::Threads => {
                (most(self.threads.clamp(JOB_THREADS, JOBS_UNDER_WAY)), 1, SLOT_BYTES)
            }
        }
    }
}

/// A source on its way to a consumer.
#[derive(Debug)]
pub struct Feed<'a, C> {
    pub source: &'a dyn PieceSource,
    pub consumer: &'a C,
    pub crew: Crew,
    /// Feeds of one lane are gone through one after the other, lanes side by side.
    pub lane: usize,
    /// Jobs under way at a time, each a slot of memory.
    pub jobs: usize,
}

impl<C> Feed<'_, C> {
    pub(super) fn image_bytes(&self) -> usize {
        self.crew.sizes(self.jobs).2
    }
}

/// What the caller's thread hears. A number is that of a feed.
#[derive(Debug)]
pub enum Word<N> {
    Happened(usize, Vec<Event<N>>),
    /// It was gone through, or it failed; those of other lanes go on.
    Ended(usize, Result<()>),
    /// Nothing has happened for a while.
    Silence,
}

/// Goes through one source once. `listen` gets what has happened, and nothing now and then when
/// nothing did; breaking off leaves what was consumed consumed.
pub fn run<C: Consumer>(
    source: &dyn PieceSource,
    consumer: &C,
    crew: Crew,
    mut listen: impl FnMut(Vec<Event<C::Note>>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let feed = Feed { source, consumer, crew, lane: 0, jobs: JOBS_UNDER_WAY };
    let mut ended = Ok(());
    run_all(&[feed], |word| match word {
        Word::Happened(_, events) => listen(events),
        Word::Silence => listen(Vec::new()),
        Word::Ended(_, result) => {
            ended = result;
            Ok(ControlFlow::Continue(()))
        }
    })?;
    ended
}

/// Goes through all of them once. A feed that fails is told, and is no error here; an error is what
/// `listen` returned, or that it broke off.
pub fn run_all<C: Consumer>(
    feeds: &[Feed<'_, C>],
    mut listen: impl FnMut(Word<C::Note>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    for feed in feeds {
        feed.crew.engine.check()?;
    }
    let shared: Vec<_> =
        feeds.iter().enumerate().map(|(number, feed)| Shared::new(number, feed)).collect();
    let (news, heard) = bounded(JOB_NEWS_MAX);
    let wait = Duration::from_millis(PROGRESS_INTERVAL_MS);
    std::thread::scope(|scope| {
        // However this ends, the workers stop: the scope waits for them.
        let _stopping = StopOnDrop { feeds, shared: &shared };
        let mut lanes = Lanes::new(scope, feeds, &shared, news);
        lanes.begin();
        while lanes.are_running() {
            let word = match lanes.told.pop_front() {
                Some(word) => word,
                None => match heard.recv_timeout(wait).map(|news| lanes.hear(news)) {
                    Ok(Some(word)) => word,
                    Ok(None) => continue,
                    Err(_nothing) => Word::Silence,
                },
            };
            // What is under way ends first, and is heard of; then the first error is told.
            match listen(word) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => lanes.stop(stopped()),
                Err(error) => lanes.stop(error),
            }
        }
        lanes.stopped.map_or(Ok(()), Err)
    })
}

/// What a wish to stop ends as.
#[must_use]
pub fn stopped() -> Error {
    Error::new(ErrorKind::Interrupted, "stopped on request; may be resumed")
}

struct StopOnDrop<'a, 'p, C> {
    feeds: &'a [Feed<'p, C>],
    shared: &'a [Shared<'p, C>],
}

impl<C> Drop for StopOnDrop<'_, '_, C> {
    fn drop(&mut self) {
        self.shared.iter().for_each(Shared::stop);
        if std::thread::panicking() {
            // A worker may wait for bytes that never come.
            self.feeds.iter().for_each(|feed| feed.source.interrupt());
        }
    }
}

/// Which feeds run. Used by the caller's thread alone.
struct Lanes<'scope, 'env, 'p, C: Consumer> {
    scope: &'scope Scope<'scope, 'env>,
    feeds: &'env [Feed<'p, C>],
    shared: &'env [Shared<'p, C>],
    news: Sender<(usize, News<C::Note>)>,
    /// Feeds that have not begun.
    waiting: Vec<VecDeque<usize>>,
    /// Workers that each feed has, and why it failed.
    workers: Vec<usize>,
    failed: Vec<Option<Error>>,
    /// To be heard before anything else.
    told: VecDeque<Word<C::Note>>,
    /// Why no other begins.
    stopped: Option<Error>,
}

impl<'scope, 'env, 'p, C: Consumer> Lanes<'scope, 'env, 'p, C> {
    fn new(
        scope: &'scope Scope<'scope, 'env>,
        feeds: &'env [Feed<'p, C>],
        shared: &'env [Shared<'p, C>],
        news: Sender<(usize, News<C::Note>)>,
    ) -> Self {
        let lanes = feeds.iter().map(|feed| feed.lane + 1).max().unwrap_or(0);
        let mut waiting = vec![VecDeque::new(); lanes];
        for (number, feed) in feeds.iter().enumerate() {
            waiting[feed.lane].push_back(number);
        }
        Self {
            scope,
            feeds,
            shared,
            news,
            waiting,
            workers: vec![0; feeds.len()],
            failed: vec![None; feeds.len()],
            told: VecDeque::new(),
            stopped: None,
        }
    }

    fn begin(&mut self) {
        for lane in 0..self.waiting.len() {
            self.begin_next(lane);
        }
    }

    fn are_running(&self) -> bool {
        !self.told.is_empty() || self.workers.iter().any(|count| *count > 0)
    }

    /// Begins the next feed of the lane that can be begun.
    fn begin_next(&mut self, lane: usize) {
        while let Some(number) = self.waiting[lane].pop_front() {
            let (workers, slots, _) = self.feeds[number].crew.sizes(self.feeds[number].jobs);
            for worker in 0..workers {
                match self.spawn(number, worker, slots) {
                    Ok(()) => self.workers[number] += 1,
                    Err(error) => {
                        self.fail(number, error);
                        break;
                    }
                }
            }
            if self.workers[number] > 0 {
                return;
            }
            let ended = Word::Ended(number, self.failed[number].take().map_or(Ok(()), Err));
            self.told.push_back(ended);
        }
    }

    fn spawn(&self, number: usize, worker: usize, slots: usize) -> Result<()> {
        let (shared, engine) = (&self.shared[number], self.feeds[number].crew.engine);
        let news = self.news.clone();
        spawn(self.scope, &format!("pump-{number}-{worker}"), move || {
            let mut farewell = Farewell { number, news: news.clone(), result: None };
            let worked = Opener::new().and_then(|opener| {
                let queue = engine.queue(slots * SLOT_BYTES)?;
                Worker::new(shared, queue, slots, opener, news).run()
            });
            farewell.result = Some(worked);
        })?;
        Ok(())
    }

    fn hear(&mut self, (number, news): (usize, News<C::Note>)) -> Option<Word<C::Note>> {
        let result = match news {
            News::Events(events) => return Some(Word::Happened(number, events)),
            News::Left(result) => result,
        };
        self.workers[number] -= 1;
        if let Err(error) = result {
            self.fail(number, error);
        }
        if self.workers[number] > 0 || self.stopped.is_some() {
            return None;
        }
        self.begin_next(self.feeds[number].lane);
        Some(Word::Ended(number, self.failed[number].take().map_or(Ok(()), Err)))
    }

    /// The feed ends what is under way. Its first error is the one that is told.
    fn fail(&mut self, number: usize, error: Error) {
        self.failed[number].get_or_insert(error);
        self.shared[number].stop();
        // A worker may wait for bytes that never come.
        self.feeds[number].source.interrupt();
    }

    fn stop(&mut self, error: Error) {
        if self.stopped.is_some() {
            return;
        }
        // A feed that failed alone is why its source was interrupted.
        let cause = match &self.failed[..] {
            [Some(cause)] if error.kind() == ErrorKind::Interrupted => cause.clone(),
            _ => error,
        };
        self.stopped = Some(cause);
        self.waiting.iter_mut().for_each(VecDeque::clear);
        for (number, feed) in self.feeds.iter().enumerate() {
            self.shared[number].stop();
            if self.workers[number] > 0 {
                feed.source.interrupt();
            }
        }
    }
}

/// Tells of the end of a worker, also of one that panicked.
struct Farewell<N> {
    number: usize,
    news: Sender<(usize, News<N>)>,
    result: Option<Result<()>>,
}

impl<N> Drop for Farewell<N> {
    fn drop(&mut self) {
        let panicked = || Err(Error::busy("a worker ended by a fault of the program"));
        let result = self.result.take().unwrap_or_else(panicked);
        // Nobody listens any more only if the caller has panicked.
        let _heard = self.news.send((self.number, News::Left(result)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::pieces::{Content, Piece};
    use super::super::source::Identity;
    use super::*;
    use crate::device::RamDevice;
    use crate::units::{BlockSize, Geometry};

    const STEP: u64 = 1 << 20;

    /// So many pieces; the last may be an error.
    #[derive(Debug)]
    struct Listed {
        device: Arc<dyn Device>,
        count: u64,
        fails: bool,
    }

    impl Listed {
        fn new(count: u64, fails: bool) -> Self {
            Self { device: Arc::new(RamDevice::new(count.max(1) * STEP)), count, fails }
        }
    }

    impl PieceSource for Listed {
        fn name(&self) -> String {
            "list".into()
        }

        fn identity(&self) -> Identity {
            let geometry = Geometry::new(self.device.size(), BlockSize::DEFAULT).expect("valid");
            Identity { volume: uuid::Uuid::nil(), geometry, generation: 0, cut: 0 }
        }

        fn bytes_total(&self) -> u64 {
            self.count * STEP
        }

        fn answers_at_once(&self) -> bool {
            true
        }

        fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
            let piece = |at| Piece {
                range: ByteRange::new(at * STEP, STEP),
                content: Content::Plain(Arc::clone(&self.device)),
            };
            let end = self.fails.then(|| Err(Error::integrity("the medium was pulled out")));
            Box::new((0..self.count).map(move |at| Ok(piece(at))).chain(end))
        }
    }

    #[derive(Debug, Default)]
    struct Seen(Mutex<u64>);

    impl Consumer for Seen {
        type Claim = ();
        type Note = ();

        fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
            vec![range]
        }

        fn begin(&self, range: ByteRange, _: Opened<'_>) -> Result<Begun<(), ()>> {
            *self.0.lock().expect("no panics") += range.length;
            Ok(Begun::Done(()))
        }

        fn end(&self, (): (), result: Result<()>) -> Result<()> {
            result
        }
    }

    fn feed<'a>(source: &'a Listed, consumer: &'a Seen, lane: usize) -> Feed<'a, Seen> {
        let crew = Crew { engine: Engine::Threads, threads: 1, at_once: true };
        Feed { source, consumer, crew, lane, jobs: 4 }
    }

    /// What was heard: which feeds ended, in which order and how, and bytes of each.
    fn heard(feeds: &[Feed<'_, Seen>]) -> (Vec<(usize, bool)>, Vec<u64>) {
        let (mut ended, mut bytes) = (Vec::new(), vec![0; feeds.len()]);
        run_all(feeds, |word| {
            match word {
                Word::Happened(number, events) => {
                    assert!(ended.iter().all(|(done, _)| *done != number), "after its end");
                    bytes[number] += events.iter().map(|event| event.range.length).sum::<u64>();
                }
                Word::Ended(number, result) => ended.push((number, result.is_ok())),
                Word::Silence => {}
            }
            Ok(ControlFlow::Continue(()))
        })
        .expect("gone through");
        (ended, bytes)
    }

    #[test]
    fn every_byte_of_every_feed_is_heard_of_once_and_a_lane_keeps_its_order() {
        let sources = [Listed::new(3, false), Listed::new(0, false), Listed::new(5, false)];
        let consumer = Seen::default();
        let lanes = [1, 0, 1];
        let feeds: Vec<_> =
            sources.iter().zip(lanes).map(|(one, lane)| feed(one, &consumer, lane)).collect();
        let (ended, bytes) = heard(&feeds);
        assert_eq!(bytes, [3 * STEP, 0, 5 * STEP]);
        let place = |number| ended.iter().position(|(one, _)| *one == number).expect("ended");
        assert!(place(0) < place(2), "one after the other");
        assert!(ended.len() == 3 && ended.iter().all(|(_, well)| *well), "{ended:?}");
    }

    #[test]
    fn a_feed_that_fails_is_told_and_the_others_go_on_to_their_end() {
        let sources = [Listed::new(1, true), Listed::new(4, false), Listed::new(9, false)];
        let consumer = Seen::default();
        let lanes = [0, 0, 1];
        let feeds: Vec<_> =
            sources.iter().zip(lanes).map(|(one, lane)| feed(one, &consumer, lane)).collect();
        let (mut ended, bytes) = heard(&feeds);
        ended.sort_unstable();
        assert_eq!(ended, [(0, false), (1, true), (2, true)]);
        assert_eq!(bytes[1..], [4 * STEP, 9 * STEP]);
    }

    #[test]
    fn breaking_off_ends_all_of_them_and_begins_no_other() {
        let sources = [Listed::new(64, false), Listed::new(64, false), Listed::new(64, false)];
        let consumer = Seen::default();
        let lanes = [0, 1, 1];
        let feeds: Vec<_> =
            sources.iter().zip(lanes).map(|(one, lane)| feed(one, &consumer, lane)).collect();
        let mut third = false;
        let broken = run_all(&feeds, |word| {
            third |= matches!(word, Word::Happened(2, _) | Word::Ended(..));
            Ok(ControlFlow::Break(()))
        });
        assert_eq!(broken.expect_err("stopped").kind(), ErrorKind::Interrupted);
        assert!(!third, "the next of a lane does not begin, and no end is told");
        assert!(*consumer.0.lock().expect("no panics") < 128 * STEP);
    }

    #[test]
    fn feeds_share_the_jobs_that_they_are_given() {
        for engine in [Engine::Ring, Engine::Threads] {
            for (at_once, jobs) in [(true, 1), (false, 1), (true, 4), (false, 4), (false, 16)] {
                let (workers, slots, _) = Crew { engine, threads: 3, at_once }.sizes(jobs);
                assert!((1..=jobs).contains(&(workers * slots)), "{engine:?} {at_once} {jobs}");
            }
        }
    }
}
