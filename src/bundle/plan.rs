//! Cuts a source into jobs: pieces of which something is wanted, as many as fit a slot of memory,
//! and the reads that bring their bytes.
//!
//! | piece | is given as |
//! |---|---|
//! | nothing of it is wanted | a passed run; it costs no read |
//! | of a plain image | its wanted runs, each read by itself |
//! | a chunk of a bundle | all of it, or it could not be verified |
//! | without bytes | a part without a read |
//!
//! Guarantees: reads of neighbouring bytes of one file are one read; pieces come in the order of
//! the source; what a job needs of its slot is at most `SLOT_BYTES`.
//! Does not know: who reads, where bytes go.

use std::ops::Range;

use super::pieces::{Content, Piece};
use crate::device::Place;
use crate::error::Result;
use crate::extent::ByteRange;
use crate::limits::{BUNDLE_CHUNK_BYTES_MAX, BUNDLE_ZERO_STEP_BYTES, JOB_PARTS_MAX};

/// Memory of one job: one huge page. It holds a chunk and what it unpacks to.
pub const SLOT_BYTES: usize = 2 * BUNDLE_CHUNK_BYTES_MAX as usize;

/// A piece on its way through a slot. Positions are those in the slot.
#[derive(Debug)]
pub struct Part {
    pub piece: Piece,
    /// Its stored form; empty if it has none.
    pub stored: Range<usize>,
    /// Room for what it unpacks to; empty if the stored form is that already.
    pub plain: Range<usize>,
}

/// Bytes to bring into the slot. They belong to some of the job's parts.
#[derive(Debug)]
pub struct Read {
    pub place: Place,
    pub offset: u64,
    pub memory: Range<usize>,
    pub parts: Range<usize>,
}

/// Runs of the source of which nothing is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    pub range: ByteRange,
    pub chunks: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Job {
    pub parts: Vec<Part>,
    pub reads: Vec<Read>,
    pub passed: Vec<Passed>,
    /// Bytes of the slot in use: stored forms from its start, plain ones from its end.
    front: usize,
    back: usize,
    passed_bytes: u64,
    /// The next piece does not fit any more.
    closed: bool,
}

impl Job {
    /// Where plain forms begin in the slot.
    #[must_use]
    pub fn boundary(&self) -> usize {
        SLOT_BYTES - self.back
    }

    fn is_full(&self) -> bool {
        let bare = self.parts.last().is_some_and(|part| {
            part.stored.is_empty() && part.piece.range.length >= BUNDLE_CHUNK_BYTES_MAX
        });
        self.closed
            || bare
            || self.parts.len() >= JOB_PARTS_MAX
            || self.passed_bytes >= BUNDLE_ZERO_STEP_BYTES
    }

    fn pass(&mut self, range: ByteRange, chunks: u64) {
        self.passed_bytes += range.length;
        match self.passed.last_mut() {
            Some(last) if last.range.end() == range.offset => {
                last.range.length += range.length;
                last.chunks += chunks;
            }
            _ => self.passed.push(Passed { range, chunks }),
        }
    }

    fn has_room(&self, stored: usize, plain: usize) -> bool {
        self.front + self.back + stored + plain <= SLOT_BYTES
    }

    fn add(&mut self, piece: Piece, read: Option<(Place, u64)>, plain: usize) {
        let stored = self.front..self.front + piece.bytes_to_read();
        let end = SLOT_BYTES - self.back;
        self.front = stored.end;
        self.back += plain;
        if let Some((place, offset)) = read {
            self.read(place, offset, stored.clone());
        }
        self.parts.push(Part { piece, stored, plain: end - plain..end });
    }

    fn read(&mut self, place: Place, offset: u64, memory: Range<usize>) {
        let part = self.parts.len();
        if let Some(last) = self.reads.last_mut() {
            let follows = last.memory.end == memory.start
                && last.offset + last.memory.len() as u64 == offset
                && last.parts.end == part
                && is_same(&last.place, &place);
            if follows {
                last.memory.end = memory.end;
                last.parts.end = part + 1;
                return;
            }
        }
        self.reads.push(Read { place, offset, memory, parts: part..part + 1 });
    }
}

fn is_same(one: &Place, other: &Place) -> bool {
    match (one, other) {
        (Place::Device(one), Place::Device(other)) => std::sync::Arc::ptr_eq(one, other),
        (Place::File(one), Place::File(other)) => std::sync::Arc::ptr_eq(one, other),
        _ => false,
    }
}

type Pieces<'a> = Box<dyn Iterator<Item = Result<Piece>> + Send + 'a>;

/// See the module.
pub struct Planner<'a> {
    pieces: Pieces<'a>,
    /// Of a piece that was begun: what is left of it.
    rest: Option<Piece>,
    /// Bytes of an image in one job.
    image_bytes: usize,
}

impl<'a> Planner<'a> {
    /// Jobs of an image bring so many bytes at most, a power of two.
    pub fn new(pieces: Pieces<'a>, image_bytes: usize) -> Self {
        Self { pieces, rest: None, image_bytes: image_bytes.min(SLOT_BYTES) }
    }

    /// The next job; `None` at the end. `wanted` gives the runs of a range that are of use.
    pub fn next_job(
        &mut self,
        wanted: &dyn Fn(ByteRange) -> Vec<ByteRange>,
    ) -> Result<Option<Job>> {
        let mut job = Job::default();
        while !job.is_full() {
            let piece = match self.rest.take() {
                Some(piece) => piece,
                None => match self.pieces.next() {
                    Some(piece) => piece?,
                    None => break,
                },
            };
            self.rest = take_up(&mut job, piece, self.image_bytes, wanted);
        }
        let empty = job.parts.is_empty() && job.passed.is_empty();
        Ok((!empty).then_some(job))
    }
}

/// Takes as much of the piece as fits; what does not is given back.
fn take_up(
    job: &mut Job,
    piece: Piece,
    image_bytes: usize,
    wanted: &dyn Fn(ByteRange) -> Vec<ByteRange>,
) -> Option<Piece> {
    let (now, rest) = step(piece, image_bytes as u64);
    let left = match &now.content {
        Content::Plain(_) => take_up_plain(job, now, image_bytes, wanted),
        _ if wanted(now.range).is_empty() => {
            job.pass(now.range, 1);
            None
        }
        Content::Zero | Content::Missing(_) => {
            job.add(now, None, 0);
            None
        }
        Content::Stored { file, position, .. } => {
            let plain = if now.unpacks() { padded_length(now.range) } else { 0 };
            if job.has_room(now.bytes_to_read(), plain) {
                let read = (Place::File(std::sync::Arc::clone(file)), *position);
                job.add(now, Some(read), plain);
                None
            } else {
                job.closed = true;
                Some(now)
            }
        }
    };
    match (left, rest) {
        // What is left of the step goes on to the end of the piece.
        (Some(left), Some(rest)) => {
            let range = ByteRange::new(left.range.offset, rest.range.end() - left.range.offset);
            Some(Piece { range, content: left.content })
        }
        (left, rest) => left.or(rest),
    }
}

fn padded_length(range: ByteRange) -> usize {
    usize::try_from(range.length.next_multiple_of(4096)).expect("a piece with bytes is small")
}

/// The wanted runs of a piece of an image.
fn take_up_plain(
    job: &mut Job,
    piece: Piece,
    image_bytes: usize,
    wanted: &dyn Fn(ByteRange) -> Vec<ByteRange>,
) -> Option<Piece> {
    let Content::Plain(device) = &piece.content else { unreachable!("asked for images only") };
    let mut at = piece.range.offset;
    for run in wanted(piece.range) {
        let length = usize::try_from(run.length).expect("a piece with bytes is small");
        let full = job.front + length > image_bytes || job.parts.len() >= JOB_PARTS_MAX;
        if full || !job.has_room(length.next_multiple_of(4096), 0) {
            if at < run.offset {
                job.pass(ByteRange::new(at, run.offset - at), 0);
            }
            job.closed = true;
            let range = ByteRange::new(run.offset, piece.range.end() - run.offset);
            return Some(Piece { range, content: piece.content });
        }
        if at < run.offset {
            job.pass(ByteRange::new(at, run.offset - at), 0);
        }
        let read = (Place::Device(std::sync::Arc::clone(device)), run.offset);
        job.add(Piece { range: run, content: piece.content.clone() }, Some(read), 0);
        job.front = job.front.next_multiple_of(4096);
        at = run.end();
    }
    if at < piece.range.end() {
        // A piece of which nothing is wanted counts as a chunk; of others each run does.
        let chunks = u64::from(at == piece.range.offset);
        job.pass(ByteRange::new(at, piece.range.end() - at), chunks);
    }
    None
}

/// Long runs are dealt with step by step, except chunks of a bundle.
fn step(piece: Piece, image_bytes: u64) -> (Piece, Option<Piece>) {
    let Piece { range, content } = piece;
    let step = match content {
        Content::Stored { .. } => return (Piece { range, content }, None),
        Content::Plain(_) => image_bytes,
        Content::Zero | Content::Missing(_) => BUNDLE_ZERO_STEP_BYTES,
    };
    let next = (range.offset / step + 1).saturating_mul(step);
    if next >= range.end() {
        return (Piece { range, content }, None);
    }
    let now = ByteRange::new(range.offset, next - range.offset);
    let rest = ByteRange::new(next, range.end() - next);
    (Piece { range: now, content: content.clone() }, Some(Piece { range: rest, content }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::{Device, RamDevice};

    const MIB: u64 = 1 << 20;

    fn image_pieces(device: &Arc<dyn Device>, count: u64) -> Vec<Result<Piece>> {
        let piece = |at: u64| Piece {
            range: ByteRange::new(at * MIB, MIB),
            content: Content::Plain(Arc::clone(device)),
        };
        (0..count).map(|at| Ok(piece(at))).collect()
    }

    fn jobs(pieces: Vec<Result<Piece>>, wanted: &dyn Fn(ByteRange) -> Vec<ByteRange>) -> Vec<Job> {
        let mut planner = Planner::new(Box::new(pieces.into_iter()), SLOT_BYTES);
        std::iter::from_fn(|| planner.next_job(wanted).expect("no piece is an error")).collect()
    }

    #[test]
    fn neighbouring_pieces_of_an_image_are_one_read() {
        let device: Arc<dyn Device> = Arc::new(RamDevice::new(8 * MIB));
        let jobs = jobs(image_pieces(&device, 8), &|range| vec![range]);
        assert_eq!(jobs.len(), 4);
        for (at, job) in jobs.iter().enumerate() {
            assert_eq!((job.parts.len(), job.reads.len()), (2, 1));
            assert_eq!(job.reads[0].offset, at as u64 * 2 * MIB);
            assert_eq!(job.reads[0].memory, 0..SLOT_BYTES);
            assert_eq!(job.reads[0].parts, 0..2);
        }
    }

    #[test]
    fn of_an_image_only_wanted_runs_are_read_and_the_rest_is_passed_once() {
        let device: Arc<dyn Device> = Arc::new(RamDevice::new(4 * MIB));
        let every_fourth = |range: ByteRange| -> Vec<ByteRange> {
            let runs = (range.offset / 65_536..range.end() / 65_536).filter(|run| run % 4 == 3);
            runs.map(|run| ByteRange::new(run * 65_536, 65_536)).collect()
        };
        let jobs = jobs(image_pieces(&device, 4), &every_fourth);
        let read: usize = jobs.iter().flat_map(|job| &job.reads).map(|one| one.memory.len()).sum();
        let passed: u64 = jobs.iter().flat_map(|job| &job.passed).map(|one| one.range.length).sum();
        let chunks: u64 = jobs.iter().flat_map(|job| &job.passed).map(|one| one.chunks).sum();
        assert_eq!((read as u64, passed, chunks), (MIB, 3 * MIB, 0));
        assert!(jobs.iter().flat_map(|job| &job.reads).all(|one| one.offset / 65_536 % 4 == 3));
    }

    #[test]
    fn nothing_wanted_is_passed_in_long_steps_without_a_read() {
        let device: Arc<dyn Device> = Arc::new(RamDevice::new(MIB));
        let jobs = jobs(image_pieces(&device, 256), &|_| Vec::new());
        assert_eq!(jobs.len(), 4);
        assert!(jobs.iter().all(|job| job.parts.is_empty() && job.passed.len() == 1));
        assert_eq!(jobs[0].passed[0], Passed { range: ByteRange::new(0, 64 * MIB), chunks: 64 });
    }

    #[test]
    fn a_long_run_of_zeros_is_several_jobs() {
        let piece = Piece { range: ByteRange::new(512, 200 * MIB), content: Content::Zero };
        let jobs = jobs(vec![Ok(piece)], &|range| vec![range]);
        let lengths: Vec<u64> = jobs.iter().map(|job| job.parts[0].piece.range.length).collect();
        assert_eq!(lengths, [64 * MIB - 512, 64 * MIB, 64 * MIB, 8 * MIB + 512]);
    }
}
