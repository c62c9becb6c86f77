//! The life of a read.
//!
//! | its blocks are | it |
//! |---|---|
//! | all current | is read here |
//! | missing, nobody brings them | fetches them |
//! | missing, somebody brings or writes them | waits for that, then looks again |
//! | delivered by a fetch | are laid over what is read here |
//!
//! A read here that fails is healed from the backup, if that is sure to have the same (trap 36).

use super::event::{Action, FetchClass};
use super::requests::{Operation, Pending};
use super::state::Primary;
use crate::clock::Instant;
use crate::device::AlignedBuffer;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, ExtentMap, subtract};
use crate::volume::content::Content;

#[derive(Debug)]
pub(super) struct Read {
    range: ByteRange,
    /// Only bring the blocks, return nothing.
    cache: bool,
    pieces: Vec<(ByteRange, Content)>,
    delivered: ExtentMap<bool>,
    reading: bool,
    healed: bool,
    deadline: Instant,
}

impl Read {
    pub(super) fn new(range: ByteRange, cache: bool, deadline: Instant) -> Self {
        Self {
            range,
            cache,
            pieces: Vec::new(),
            delivered: ExtentMap::new(),
            reading: false,
            healed: false,
            deadline,
        }
    }

    pub(super) fn expired(&self, now: Instant) -> bool {
        !self.reading && now >= self.deadline
    }

    /// Whether its part here is under way, so that it ends by itself.
    pub(super) fn is_reading(&self) -> bool {
        self.reading
    }

    fn lay_over(&self, buffer: &mut AlignedBuffer) {
        for (part, content) in &self.pieces {
            let start = (part.offset - self.range.offset) as usize;
            content.copy_to(&mut buffer[start..start + part.length as usize]);
        }
    }
}

impl Primary {
    pub(super) fn advance_read(&mut self, id: u64, mut read: Read, actions: &mut Vec<Action>) {
        if read.reading {
            self.operations.insert(id, Operation::Read(read));
            return;
        }
        let blocks = self.geometry.touched(read.range);
        let missing: Vec<BlockRange> = self
            .map
            .current()
            .runs(blocks, false)
            .flat_map(|run| subtract(run, read.delivered.overlapping(run).map(|(held, _)| held)))
            .collect();
        if missing.is_empty() {
            self.read_rest(id, read, actions);
        } else if self.now >= read.deadline {
            let error = self.too_late(missing[0]);
            self.complete(id, Err(error), actions);
        } else {
            for run in missing {
                self.bring(id, run, FetchClass::Demand);
            }
            read.reading = false;
            self.operations.insert(id, Operation::Read(read));
        }
    }

    /// Everything is here or was delivered: read what is here, lay the rest over it.
    fn read_rest(&mut self, id: u64, mut read: Read, actions: &mut Vec<Action>) {
        if read.cache {
            self.complete(id, Ok(None), actions);
            return;
        }
        let blocks = self.geometry.touched(read.range);
        let parts: Vec<ByteRange> =
            subtract(blocks, read.delivered.overlapping(blocks).map(|(run, _)| run))
                .into_iter()
                .filter_map(|run| self.geometry.bytes_of(run).intersect(read.range))
                .collect();
        if parts.is_empty() {
            let mut buffer = AlignedBuffer::zeroed(read.range.length as usize);
            read.lay_over(&mut buffer);
            self.complete(id, Ok(Some(buffer)), actions);
            return;
        }
        read.reading = true;
        let token = self.token(Pending::Read { id });
        actions.push(Action::ReadLocal { token, range: read.range, parts });
        self.operations.insert(id, Operation::Read(read));
    }

    /// A fetch brought these blocks: the readers that wait for them take their part.
    pub(super) fn deliver(&mut self, id: u64, blocks: BlockRange, content: &Content) {
        let from = self.geometry.bytes_of(blocks);
        if let Some(Operation::Read(read)) = self.operations.get_mut(&id)
            && !read.reading
            && let Some(part) = from.intersect(read.range)
        {
            if !read.cache {
                let piece = content.slice(part.offset - from.offset, part.length);
                read.pieces.push((part, piece));
            }
            read.delivered.insert(blocks, true);
            self.ready.push_back(id);
        }
    }

    /// The part of a read that is here was read, or could not be.
    pub(super) fn local_part_read(
        &mut self,
        id: u64,
        result: Result<AlignedBuffer>,
        actions: &mut Vec<Action>,
    ) {
        let Some(Operation::Read(read)) = self.operations.remove(&id) else {
            unreachable!("a read stays until its local part is done")
        };
        match result {
            Ok(mut buffer) => {
                read.lay_over(&mut buffer);
                self.complete(id, Ok(Some(buffer)), actions);
            }
            Err(error) => self.heal(id, read, error, actions),
        }
    }

    /// A read of current blocks failed: the backup has them too, unless they are unsent (trap 36).
    fn heal(&mut self, id: u64, mut read: Read, error: Error, actions: &mut Vec<Action>) {
        let blocks = self.geometry.touched(read.range);
        let current: Vec<_> = self.map.current().runs(blocks, true).collect();
        let possible = self.mirror.up
            && !read.healed
            && !self.map.unsent().any_set(blocks)
            && !self.claims.busy(blocks);
        if !possible {
            self.complete(id, Err(error), actions);
            return;
        }
        for run in current {
            self.touch(run);
            self.map.demote(run);
        }
        read.healed = true;
        read.reading = false;
        self.operations.insert(id, Operation::Read(read));
        self.ready.push_back(id);
    }
}
