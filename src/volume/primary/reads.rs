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

/// So much is brought at a time for a request that only wants blocks to be here: it may be of the
/// whole volume.
const CACHE_SEGMENT_BYTES: u64 = 32 << 20;

#[derive(Debug)]
pub(super) struct Read {
    range: ByteRange,
    /// Bytes behind the range that are to be brought after it.
    rest: u64,
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
        let length = if cache { range.length.min(CACHE_SEGMENT_BYTES) } else { range.length };
        Self {
            range: ByteRange::new(range.offset, length),
            rest: range.length - length,
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
        if read.cache && read.rest > 0 {
            // What was brought is written before more is: memory must not depend on the request.
            if self.claims_wait(id, self.geometry.touched(read.range)) {
                self.operations.insert(id, Operation::Read(read));
                return;
            }
            let deadline = self.now.plus_ms(self.options.missing_deadline_ms);
            let next = Read::new(ByteRange::new(read.range.end(), read.rest), true, deadline);
            self.operations.insert(id, Operation::Read(next));
            self.ready.push_back(id);
            return;
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::event::{Event, MirrorPolicy, Options, OutgoingMessage};
    use super::*;
    use crate::device::RamDevice;
    use crate::map::{MapIdentity, OverwriteMap};
    use crate::units::{BlockSize, Geometry};
    use crate::volume::service::Command;

    /// Answers what is fetched until nothing is any more; how many blocks were claimed at most.
    fn fetch_all(machine: &mut Primary, mut actions: Vec<Action>) -> u64 {
        let mut most = 0;
        loop {
            let claims = machine.claims.on(machine.geometry.all_blocks());
            most = most.max(claims.map(|(run, _, _)| run.count()).sum());
            let events: Vec<Event> = std::mem::take(&mut actions)
                .into_iter()
                .filter_map(|action| match action {
                    Action::Send(OutgoingMessage::Fetch { tag, range, .. }) => {
                        Some(Event::Fetched { tag, result: Ok(Content::Zeros(range.length)) })
                    }
                    Action::WriteLocal { token, .. } => {
                        Some(Event::WriteDone { token, result: Ok(()) })
                    }
                    _ => None,
                })
                .collect();
            if events.is_empty() {
                return most;
            }
            for event in events {
                machine.apply(event, Instant::default(), &mut actions);
            }
        }
    }

    #[test]
    fn a_request_to_bring_a_whole_volume_claims_a_segment_of_it_at_a_time() {
        let geometry = Geometry::new(200 << 20, BlockSize::DEFAULT).expect("valid");
        let identity = MapIdentity { volume: uuid::Uuid::nil(), geometry, generation: 1 };
        let device = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
        let map = Arc::new(OverwriteMap::create(device, identity).expect("created"));
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: true,
            strict: false,
            missing_deadline_ms: 1000,
        };
        let mut machine = Primary::new(Arc::clone(&map), options);
        let mut actions = Vec::new();
        machine.apply(Event::LinkUp, Instant::default(), &mut actions);
        let command = Command::Cache { range: ByteRange::new(0, 200 << 20) };
        machine.apply(Event::Request { id: 1, command }, Instant::default(), &mut actions);
        let most = fetch_all(&mut machine, actions);
        assert_eq!(most, CACHE_SEGMENT_BYTES / 4096);
        assert_eq!(map.missing_bytes(), 0, "all of it was brought");
        assert!(machine.operations.is_empty(), "and answered");
    }
}
