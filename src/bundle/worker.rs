//! One worker of a pump: its queue, its slots, and the jobs in them. The table is in `pump.rs`.
//!
//! Guarantees: a slot is used again only when nothing is under way in it and every claim of its job
//! has ended, also after an error.
//! Does not know: what is planned, what consumers do.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::Sender;

use super::pieces::{Content, Opener};
use super::plan::{Job, Part, Planner, SLOT_BYTES};
use super::pump::{Begun, Consumer, Event, Feed, Opened, Outcome};
use crate::device::{Access, Done, Place, Queue, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::limits::MERGE_READ_FAILURES_MAX;

/// What the workers of a feed have in common.
pub(super) struct Shared<'a, C> {
    /// Of the feed.
    number: usize,
    consumer: &'a C,
    planner: Mutex<Planner<'a>>,
    stop: AtomicBool,
    /// Reads in a row that failed.
    failures: AtomicU32,
}

impl<'a, C> Shared<'a, C> {
    pub(super) fn new(number: usize, feed: &Feed<'a, C>) -> Self {
        Self {
            number,
            consumer: feed.consumer,
            planner: Mutex::new(Planner::new(feed.source.pieces(), feed.image_bytes())),
            stop: AtomicBool::new(false),
            failures: AtomicU32::new(0),
        }
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl<C: Consumer> Shared<'_, C> {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn next_job(&self) -> Result<Option<Job>> {
        if self.is_stopped() {
            return Ok(None);
        }
        let mut planner = self.planner.lock().unwrap_or_else(PoisonError::into_inner);
        planner.next_job(&|range| self.consumer.wanted(range))
    }
}

/// Where the bytes of an opened part are, in its slot.
enum Form {
    Zero,
    Bytes(Range<usize>),
}

struct Writing<C> {
    parts: Range<usize>,
    claim: C,
    left: usize,
    result: Result<()>,
}

struct Running<C: Consumer> {
    job: Job,
    reads_left: usize,
    /// Parts whose read failed, and why.
    failed: Vec<(Range<usize>, Error)>,
    writing: Vec<Option<Writing<C::Claim>>>,
    events: Vec<Event<C::Note>>,
}

/// What a worker has to tell.
pub(super) enum News<N> {
    Events(Vec<Event<N>>),
    /// It works no more.
    Left(Result<()>),
}

/// See the module.
pub(super) struct Worker<'a, 'p, C: Consumer> {
    shared: &'a Shared<'p, C>,
    queue: Box<dyn Queue>,
    opener: Opener,
    news: Sender<(usize, News<C::Note>)>,
    running: Vec<Option<Running<C>>>,
    free: Vec<usize>,
}

const WRITE: u64 = 1 << 31;

fn tag(slot: usize, what: u64) -> u64 {
    (slot as u64) << 32 | what
}

impl<'a, 'p, C: Consumer> Worker<'a, 'p, C> {
    pub(super) fn new(
        shared: &'a Shared<'p, C>,
        queue: Box<dyn Queue>,
        slots: usize,
        opener: Opener,
        news: Sender<(usize, News<C::Note>)>,
    ) -> Self {
        let running = (0..slots).map(|_| None).collect();
        Self { shared, queue, opener, news, running, free: (0..slots).collect() }
    }

    /// Until the plan ends, the pump is stopped, or something fails that is no piece's damage.
    pub(super) fn run(mut self) -> Result<()> {
        let mut failed = None;
        let mut done = Vec::new();
        loop {
            if failed.is_none()
                && let Err(error) = self.take_up_jobs()
            {
                failed = Some(self.stop(error));
            }
            // A slot is taken while something is under way in it.
            if self.free.len() == self.running.len() {
                return failed.map_or(Ok(()), Err);
            }
            if let Err(error) = self.queue.wait(&mut done) {
                // Nothing more will be heard of what is under way.
                let error = self.stop(error);
                self.abandon(&error);
                return Err(failed.unwrap_or(error));
            }
            for one in done.drain(..) {
                if let Err(error) = self.hear(one) {
                    failed = Some(failed.unwrap_or(self.stop(error)));
                }
            }
        }
    }

    fn stop(&self, error: Error) -> Error {
        self.shared.stop();
        error
    }

    /// Ends every claim: whether its blocks were written is unknown, so they stay missing. But not
    /// while the kernel may still write there: what others wrote then could be overwritten (law 4).
    fn abandon(&mut self, error: &Error) {
        if !self.queue.drain() {
            return;
        }
        for running in self.running.iter_mut().filter_map(Option::take) {
            for writing in running.writing.into_iter().flatten() {
                let _told_by_the_caller =
                    self.shared.consumer.end(writing.claim, Err(error.clone()));
            }
        }
    }

    fn take_up_jobs(&mut self) -> Result<()> {
        while !self.free.is_empty() {
            let Some(job) = self.shared.next_job()? else { return Ok(()) };
            let slot = self.free.pop().expect("checked above");
            let at = slot * SLOT_BYTES;
            for (number, read) in job.reads.iter().enumerate() {
                self.queue.submit(Request {
                    place: read.place.clone(),
                    access: Access::Read,
                    offset: read.offset,
                    memory: at + read.memory.start..at + read.memory.end,
                    tag: tag(slot, number as u64),
                });
            }
            let reads_left = job.reads.len();
            self.running[slot] = Some(Running {
                job,
                reads_left,
                failed: Vec::new(),
                writing: Vec::new(),
                events: Vec::new(),
            });
            if reads_left == 0 {
                self.open_job(slot)?;
            }
        }
        Ok(())
    }

    fn hear(&mut self, done: Done) -> Result<()> {
        let slot = usize::try_from(done.tag >> 32).expect("as submitted");
        let number = usize::try_from(done.tag & (WRITE - 1)).expect("as submitted");
        if done.tag & WRITE != 0 {
            return self.written(slot, number, done.result);
        }
        let running = self.running[slot].as_mut().expect("a slot is kept while it is read into");
        running.reads_left -= 1;
        if let Err(error) = done.result {
            running.failed.push((running.job.reads[number].parts.clone(), error));
        }
        if running.reads_left == 0 { self.open_job(slot) } else { Ok(()) }
    }

    /// All that can be read was read: opens every part, then begins with each.
    fn open_job(&mut self, slot: usize) -> Result<()> {
        if self.shared.is_stopped() {
            self.running[slot] = None;
            self.free.push(slot);
            return Ok(());
        }
        let mut running = self.running[slot].take().expect("asked for a slot with a job");
        let at = slot * SLOT_BYTES;
        let memory = self.queue.memory(at..at + SLOT_BYTES);
        let (stored, plain) = memory.split_at_mut(running.job.boundary());
        let forms: Result<Vec<_>> = (0..running.job.parts.len())
            .map(|number| {
                let part = &running.job.parts[number];
                let bytes = &mut stored[part.stored.clone()];
                let mut read = Ok(());
                if !bytes.is_empty() {
                    read = settle_read(number, part, &running.failed, bytes);
                    self.shared.count(&read)?;
                }
                Ok(read.and_then(|()| open_part(&mut self.opener, part, bytes, plain)))
            })
            .collect();
        let mut begun = Ok(());
        match forms {
            Err(error) => begun = Err(error),
            Ok(forms) => {
                for (parts, form) in joined(&running.job.parts, forms) {
                    begun = self.begin(slot, &mut running, parts, form);
                    if begun.is_err() {
                        break;
                    }
                }
            }
        }
        let ended = running.writing.is_empty();
        self.running[slot] = Some(running);
        if ended {
            self.finish(slot);
        }
        begun
    }

    fn begin(
        &mut self,
        slot: usize,
        running: &mut Running<C>,
        parts: Range<usize>,
        form: Result<Form>,
    ) -> Result<()> {
        let these = &running.job.parts[parts.clone()];
        let range = range_of(these);
        let at = slot * SLOT_BYTES;
        let begun = match form {
            Err(error) => {
                self.shared.consumer.lost(range)?;
                running.events.push(event_of(these, Outcome::Damaged(error)));
                return Ok(());
            }
            Ok(Form::Zero) => (self.shared.consumer.begin(range, Opened::Zero)?, at),
            Ok(Form::Bytes(place)) => {
                let start = at + place.start;
                let bytes = self.queue.memory(start..at + place.end);
                (self.shared.consumer.begin(range, Opened::Bytes(bytes))?, start)
            }
        };
        match begun {
            (Begun::Done(note), _) => {
                running.events.push(event_of(these, Outcome::Consumed(note)));
            }
            (Begun::Writing { claim, device, runs }, start) => {
                assert!(!runs.is_empty(), "a claim to be written has runs");
                let writing = Writing { parts, claim, left: runs.len(), result: Ok(()) };
                for run in runs {
                    let from = start + (run.offset - range.offset) as usize;
                    self.queue.submit(Request {
                        place: Place::Device(device.clone()),
                        access: Access::Write,
                        offset: run.offset,
                        memory: from..from + run.length as usize,
                        tag: tag(slot, WRITE | running.writing.len() as u64),
                    });
                }
                running.writing.push(Some(writing));
            }
        }
        Ok(())
    }

    fn written(&mut self, slot: usize, number: usize, result: Result<()>) -> Result<()> {
        let running = self.running[slot].as_mut().expect("a slot is kept while it is written");
        let place = &mut running.writing[number];
        let writing = place.as_mut().expect("a claim is kept while it is written");
        writing.left -= 1;
        if writing.result.is_ok() {
            writing.result = result;
        }
        if writing.left > 0 {
            return Ok(());
        }
        let ended = place.take().expect("seen above");
        let note = self.shared.consumer.end(ended.claim, ended.result);
        let all_ended = running.writing.iter().all(Option::is_none);
        let told = note.map(|note| {
            let parts = &running.job.parts[ended.parts];
            running.events.push(event_of(parts, Outcome::Consumed(note)));
        });
        if all_ended {
            self.finish(slot);
        }
        told
    }

    /// The caller's thread hears of the job; its slot is free.
    fn finish(&mut self, slot: usize) {
        let mut running = self.running[slot].take().expect("asked for a slot with a job");
        let passed = running.job.passed.iter().map(|passed| Event {
            range: passed.range,
            chunks: passed.chunks,
            bytes_read: 0,
            outcome: Outcome::Unwanted,
        });
        running.events.extend(passed);
        // Nobody listens any more only if the caller has panicked.
        let _heard = self.news.send((self.shared.number, News::Events(running.events)));
        self.free.push(slot);
    }
}

impl<C> Shared<'_, C> {
    /// Of a medium that is gone every read fails: then that is the error, not damage of a piece. So
    /// is a connection that was lost.
    fn count(&self, read: &Result<()>) -> Result<()> {
        let Err(error) = read else {
            self.failures.store(0, Ordering::Release);
            return Ok(());
        };
        let lost = matches!(error.kind(), ErrorKind::Link | ErrorKind::Interrupted);
        let gone = lost || error.says_gone();
        if gone || self.failures.fetch_add(1, Ordering::AcqRel) + 1 >= MERGE_READ_FAILURES_MAX {
            return Err(error.clone());
        }
        Ok(())
    }
}

/// Whether the bytes of a part are there. One failed read of several parts says little of each: it
/// is read by itself then.
fn settle_read(
    number: usize,
    part: &Part,
    failed: &[(Range<usize>, Error)],
    bytes: &mut [u8],
) -> Result<()> {
    match failed.iter().find(|(parts, _)| parts.contains(&number)) {
        None => Ok(()),
        Some((parts, error)) if parts.len() == 1 => Err(error.clone()),
        Some(_) => part.piece.read(bytes),
    }
}

/// Verifies and unpacks. `plain` is the end of the slot, in which unpacked forms lie.
fn open_part(opener: &mut Opener, part: &Part, bytes: &mut [u8], plain: &mut [u8]) -> Result<Form> {
    match &part.piece.content {
        Content::Missing(why) => Err(Error::integrity(*why).at_offset(part.piece.range.offset)),
        Content::Zero => Ok(Form::Zero),
        Content::Stored { .. } | Content::Plain(_) => {
            let boundary = SLOT_BYTES - plain.len();
            let place = part.plain.start - boundary..part.plain.end - boundary;
            part.piece.open(opener, bytes, &mut plain[place])?;
            let start = if part.plain.is_empty() { part.stored.start } else { part.plain.start };
            Ok(Form::Bytes(start..start + part.piece.range.length as usize))
        }
    }
}

/// Parts whose bytes follow each other, in the volume as in memory, are consumed as one.
fn joined(parts: &[Part], forms: Vec<Result<Form>>) -> Vec<(Range<usize>, Result<Form>)> {
    let mut all: Vec<(Range<usize>, Result<Form>)> = Vec::new();
    for (number, form) in forms.into_iter().enumerate() {
        if let (Some((before, Ok(Form::Bytes(place)))), Ok(Form::Bytes(next))) =
            (all.last_mut(), &form)
            && place.end == next.start
            && parts[before.end - 1].piece.range.end() == parts[number].piece.range.offset
        {
            (before.end, place.end) = (number + 1, next.end);
            continue;
        }
        all.push((number..number + 1, form));
    }
    all
}

/// Of parts that follow each other.
fn range_of(parts: &[Part]) -> ByteRange {
    let (first, last) = (&parts[0].piece.range, &parts[parts.len() - 1].piece.range);
    ByteRange::new(first.offset, last.end() - first.offset)
}

fn event_of<N>(parts: &[Part], outcome: Outcome<N>) -> Event<N> {
    let bytes_read = parts.iter().map(|part| part.stored.len() as u64).sum();
    Event { range: range_of(parts), chunks: parts.len() as u64, bytes_read, outcome }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crossbeam_channel::bounded;

    use super::super::pieces::Piece;
    use super::*;
    use crate::device::{AlignedBuffer, Device, RamDevice};

    /// Reads are done at once; with a write under way it fails.
    struct Failing {
        memory: AlignedBuffer,
        done: Vec<Done>,
        writes: usize,
        drains: bool,
    }

    impl Queue for Failing {
        fn submit(&mut self, request: Request) {
            match request.access {
                Access::Read => self.done.push(Done { tag: request.tag, result: Ok(()) }),
                Access::Write => self.writes += 1,
            }
        }

        fn wait(&mut self, done: &mut Vec<Done>) -> Result<()> {
            if self.writes > 0 {
                return Err(Error::busy("the queue failed"));
            }
            done.append(&mut self.done);
            Ok(())
        }

        fn drain(&mut self) -> bool {
            self.drains
        }

        fn under_way(&self) -> usize {
            self.done.len() + self.writes
        }

        fn memory(&mut self, range: Range<usize>) -> &mut [u8] {
            &mut self.memory[range]
        }
    }

    /// Writes everything, and counts the claims that ended well and that did not.
    struct Claiming {
        device: Arc<dyn Device>,
        ended: [AtomicU32; 2],
    }

    impl Consumer for Claiming {
        type Claim = ();
        type Note = ();

        fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
            vec![range]
        }

        fn begin(&self, range: ByteRange, _: Opened<'_>) -> Result<Begun<(), ()>> {
            let device = Arc::clone(&self.device);
            Ok(Begun::Writing { claim: (), device, runs: vec![range] })
        }

        fn end(&self, (): (), result: Result<()>) -> Result<()> {
            self.ended[usize::from(result.is_err())].fetch_add(1, Ordering::Relaxed);
            result
        }
    }

    /// Claims ended well and badly when the queue fails under a write.
    fn ended(drains: bool) -> [u32; 2] {
        let device: Arc<dyn Device> = Arc::new(RamDevice::new(4096));
        let range = ByteRange::new(0, 4096);
        let piece = Piece { range, content: Content::Plain(Arc::clone(&device)) };
        let consumer = Claiming { device, ended: Default::default() };
        let shared = Shared {
            number: 0,
            consumer: &consumer,
            planner: Mutex::new(Planner::new(Box::new([Ok(piece)].into_iter()), SLOT_BYTES)),
            stop: AtomicBool::new(false),
            failures: AtomicU32::new(0),
        };
        let memory = AlignedBuffer::zeroed(SLOT_BYTES);
        let queue = Failing { memory, done: Vec::new(), writes: 0, drains };
        let (news, _heard) = bounded(8);
        let opener = Opener::new().expect("made");
        let worker = Worker::new(&shared, Box::new(queue), 1, opener, news);
        worker.run().expect_err("the queue failed");
        consumer.ended.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    #[test]
    fn law_4_a_claim_is_given_back_only_when_its_write_is_known_to_have_ended() {
        assert_eq!(ended(true), [0, 1], "as not written");
        assert_eq!(ended(false), [0, 0], "the kernel may still write there");
    }

    #[test]
    fn parts_are_joined_only_where_both_their_bytes_and_their_places_follow_each_other() {
        let device: Arc<dyn Device> = Arc::new(RamDevice::new(1 << 20));
        let part = |offset: u64, at: usize| Part {
            piece: Piece {
                range: ByteRange::new(offset, 4096),
                content: Content::Plain(Arc::clone(&device)),
            },
            stored: at..at + 4096,
            plain: 0..0,
        };
        let parts = [part(0, 0), part(4096, 4096), part(12_288, 8192), part(16_384, 16_384)];
        let forms = parts.iter().map(|part| Ok(Form::Bytes(part.stored.clone())));
        let runs: Vec<_> = joined(&parts, forms.collect()).into_iter().map(|one| one.0).collect();
        assert_eq!(runs, [0..2, 2..3, 3..4]);
        let damaged = |number: usize| match number {
            1 => Err(Error::integrity("damaged")),
            _ => Ok(Form::Bytes(parts[number].stored.clone())),
        };
        let runs = joined(&parts[..2], (0..2).map(damaged).collect());
        assert_eq!(runs.len(), 2, "what is damaged is told of by itself");
    }
}
