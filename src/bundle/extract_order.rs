//! A source as one row of pieces without gaps, from the first byte of the volume to its last: what
//! is written as a stream.
//!
//! | of the source | is given as |
//! |---|---|
//! | a piece that follows | itself |
//! | nothing, where it should have something | a missing piece |
//! | nothing, where it includes nothing | a missing piece, and noted as absent |
//! | a piece that goes back | an error, or nothing where it is a missing one: it was filled |
//!
//! Guarantees: every byte of the volume is in exactly one piece, in order; absent is told from
//! damaged (law 8).
//! Does not know: what stands in the place of what is missing.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::pieces::{Content, Piece, PieceSource};
use super::source::Identity;
use crate::device::Stop;
use crate::error::{Error, Result};
use crate::extent::{ByteRange, ByteRuns};

const DAMAGED: &str = "nothing that describes it came";
const ABSENT: &str = "the bundle does not include it";

/// See the module.
#[derive(Debug)]
pub(super) struct Ordered<'a> {
    source: &'a dyn PieceSource,
    /// What the source should have.
    coverage: &'a ByteRuns,
    /// Whether a stream that was cut off is gone on with to the end of the volume.
    partial: bool,
    stop: Stop,
    /// Noted so far.
    absent: Mutex<ByteRuns>,
}

impl<'a> Ordered<'a> {
    /// `stop` is tripped when the pieces are interrupted.
    pub(super) fn new(
        source: &'a dyn PieceSource,
        coverage: &'a ByteRuns,
        partial: bool,
        stop: Stop,
    ) -> Self {
        Self { source, coverage, partial, stop, absent: Mutex::default() }
    }

    pub(super) fn absent(&self) -> MutexGuard<'_, ByteRuns> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Missing pieces for a gap.
    fn fill(&self, gap: ByteRange, cut_off: bool, queue: &mut VecDeque<Piece>) {
        let absent = if cut_off { vec![gap] } else { self.coverage.gaps(gap) };
        let mut at = gap.offset;
        let mut missing = |start: u64, end: u64, why: &'static str| {
            if start < end {
                let range = ByteRange::new(start, end - start);
                queue.push_back(Piece { range, content: Content::Missing(why) });
            }
        };
        for run in absent {
            self.absent().add(run);
            missing(at, run.offset, DAMAGED);
            missing(run.offset, run.end(), ABSENT);
            at = run.end();
        }
        missing(at, gap.end(), DAMAGED);
    }
}

impl PieceSource for Ordered<'_> {
    fn name(&self) -> String {
        self.source.name()
    }

    fn identity(&self) -> Identity {
        self.source.identity()
    }

    fn bytes_total(&self) -> u64 {
        self.identity().geometry.size()
    }

    fn answers_at_once(&self) -> bool {
        self.source.answers_at_once()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        Box::new(Row {
            source: self,
            pieces: self.source.pieces(),
            size: self.bytes_total(),
            at: 0,
            queue: VecDeque::new(),
        })
    }

    fn is_repeatable(&self) -> bool {
        self.source.is_repeatable()
    }

    fn shortfall(&self) -> Option<Error> {
        self.source.shortfall()
    }

    fn interrupt(&self) {
        self.stop.now();
        self.source.interrupt();
    }
}

struct Row<'a> {
    source: &'a Ordered<'a>,
    pieces: Box<dyn Iterator<Item = Result<Piece>> + Send + 'a>,
    size: u64,
    /// The first byte that is in no piece so far.
    at: u64,
    queue: VecDeque<Piece>,
}

impl Row<'_> {
    /// Takes the next piece of the source into the queue, if it is of use.
    fn take(&mut self, mut piece: Piece) -> Result<()> {
        let end = piece.range.end();
        if piece.range.offset < self.at {
            if !matches!(piece.content, Content::Missing(_)) {
                return Err(Error::format(
                    "expected pieces of the volume in ascending order, found one that goes back: \
                     extract a raw image into a file or onto a disk",
                )
                .at_offset(piece.range.offset));
            }
            if end <= self.at {
                return Ok(());
            }
            piece.range = ByteRange::new(self.at, end - self.at);
        }
        if piece.range.offset > self.at {
            let gap = ByteRange::new(self.at, piece.range.offset - self.at);
            self.source.fill(gap, false, &mut self.queue);
        }
        self.queue.push_back(piece);
        self.at = end;
        Ok(())
    }

    /// What comes after the last piece of the source.
    fn end(&mut self) -> Result<()> {
        let shortfall = self.source.shortfall();
        if let Some(shortfall) = shortfall.as_ref().filter(|_| !self.source.partial) {
            return Err(shortfall.clone());
        }
        let rest = ByteRange::new(self.at, self.size - self.at);
        self.source.fill(rest, shortfall.is_some(), &mut self.queue);
        self.at = self.size;
        Ok(())
    }
}

impl Iterator for Row<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                return Some(Ok(piece));
            }
            // Asked to its end, a stream says what it turned out to be.
            let taken = match self.pieces.next() {
                Some(piece) => piece.and_then(|piece| self.take(piece)),
                None if self.at < self.size => self.end(),
                None => return None,
            };
            if let Err(error) = taken {
                return Some(Err(error));
            }
        }
    }
}
