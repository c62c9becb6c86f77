//! A source of which account is kept: what is missing because it is damaged is told from what is
//! absent (law 8). Its pieces come as they are, or as one row without gaps, from the first byte of
//! the volume to its last: what is written as a stream.
//!
//! | of the source | is given as | in a row also |
//! |---|---|---|
//! | a piece | itself | an error if it goes back |
//! | a missing piece | itself | nothing if it goes back: it was filled |
//! | the same, because a stream was cut off | the same, noted as absent; or an error | |
//! | nothing, where it should have something | | a missing piece |
//! | nothing, where it includes nothing | | a missing piece, noted as absent |
//!
//! Guarantees: every byte of the volume is in exactly one piece of a row, in order.
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
pub(super) struct Accounted<'a> {
    source: &'a dyn PieceSource,
    /// What the source should have.
    coverage: &'a ByteRuns,
    /// Whether a stream that was cut off is gone on with to the end of the volume.
    partial: bool,
    /// Whether the pieces are to be a row.
    in_row: bool,
    stop: Stop,
    /// Noted so far.
    absent: Mutex<ByteRuns>,
}

impl<'a> Accounted<'a> {
    /// `stop` is tripped when the pieces are interrupted.
    pub(super) fn new(
        source: &'a dyn PieceSource,
        coverage: &'a ByteRuns,
        (partial, in_row): (bool, bool),
        stop: Stop,
    ) -> Self {
        Self { source, coverage, partial, in_row, stop, absent: Mutex::default() }
    }

    pub(super) fn absent(&self) -> MutexGuard<'_, ByteRuns> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is missing now was cut off; an error unless a part will do.
    fn is_cut_off(&self) -> Result<bool> {
        match self.source.shortfall() {
            None => Ok(false),
            Some(_) if self.partial => Ok(true),
            Some(shortfall) => Err(shortfall),
        }
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

impl PieceSource for Accounted<'_> {
    fn name(&self) -> String {
        self.source.name()
    }

    fn identity(&self) -> Identity {
        self.source.identity()
    }

    fn bytes_total(&self) -> u64 {
        if self.in_row { self.identity().geometry.size() } else { self.source.bytes_total() }
    }

    fn answers_at_once(&self) -> bool {
        self.source.answers_at_once()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        Box::new(Row {
            source: self,
            pieces: self.source.pieces(),
            size: self.identity().geometry.size(),
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
    source: &'a Accounted<'a>,
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
        let missing = matches!(piece.content, Content::Missing(_));
        if self.source.in_row && piece.range.offset < self.at {
            if !missing {
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
        let cut_off = missing && self.source.is_cut_off()?;
        if self.source.in_row && piece.range.offset > self.at {
            let gap = ByteRange::new(self.at, piece.range.offset - self.at);
            self.source.fill(gap, cut_off, &mut self.queue);
        }
        if cut_off {
            self.source.fill(piece.range, true, &mut self.queue);
        } else {
            self.queue.push_back(piece);
        }
        self.at = end;
        Ok(())
    }

    /// What comes after the last piece of the source.
    fn end(&mut self) -> Result<()> {
        let rest = ByteRange::new(self.at, self.size - self.at);
        let cut_off = self.source.is_cut_off()?;
        self.source.fill(rest, cut_off, &mut self.queue);
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
                None if self.source.in_row && self.at < self.size => self.end(),
                None => return None,
            };
            if let Err(error) = taken {
                return Some(Err(error));
            }
        }
    }
}
