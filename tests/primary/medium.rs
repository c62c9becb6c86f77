//! Media for the world: copies of what the backup held, of this generation or an earlier one.
//!
//! Guarantees: one of an earlier generation holds bytes that nobody may read wherever it is not
//! vouched for.
//! Does not know: which blocks are asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use dualrestore::bitmap::Bitmap;
use dualrestore::device::Payload;
use dualrestore::error::{Error, Result};
use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::units::Geometry;
use dualrestore::volume::content::Content;
use dualrestore::volume::primary::{MediumId, Supply};

use crate::world::World;
use dualrestore::sim::Chance;
use dualrestore::sim::stamp::{self, SECTOR};

/// What a medium of an earlier generation holds of blocks that were written since.
const STALE: u64 = 0x0bad_0bad_0bad_0bad;

/// The media that are attached, and the one of an earlier generation that may be.
#[derive(Debug)]
pub struct Shelf {
    media: BTreeMap<MediumId, Vec<u8>>,
    pub old: Vec<u8>,
    pub vouched: Arc<Bitmap>,
    /// How the next read of a medium fails.
    pub fault: Option<Error>,
    next: MediumId,
}

impl Shelf {
    pub fn new(there: &[u8], geometry: Geometry, seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 5);
        let mut old = there.to_vec();
        let vouched = Bitmap::new(geometry.blocks(), true);
        for block in 0..geometry.blocks() {
            if chance.one_in(2) {
                vouched.fill(BlockRange::one(block), false);
                let bytes = geometry.bytes_of(BlockRange::one(block));
                let span = bytes.offset as usize..bytes.end() as usize;
                old[span].chunks_exact_mut(SECTOR as usize).for_each(|at| stamp::fill(at, STALE));
            }
        }
        Self { media: BTreeMap::new(), old, vouched: Arc::new(vouched), fault: None, next: 0 }
    }

    pub fn clear(&mut self) {
        self.media.clear();
    }

    pub fn ids(&self) -> Vec<MediumId> {
        self.media.keys().copied().collect()
    }

    pub fn read(&mut self, medium: MediumId, range: ByteRange) -> Result<Content> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let gone = || Error::integrity("the medium was detached meanwhile");
        let held = self.media.get(&medium).ok_or_else(gone)?;
        let bytes = &held[range.offset as usize..range.end() as usize];
        Ok(if bytes.iter().all(|byte| *byte == 0) {
            Content::Zeros(range.length)
        } else {
            Content::Bytes(Payload::copy_of(bytes))
        })
    }
}

/// A read of a medium that fails in one of the ways there are.
pub fn fault(chance: &mut Chance) -> Error {
    const EIO: i32 = 5;
    const ENODEV: i32 = 19;
    let failed = |errno| Error::device("read", &std::io::Error::from_raw_os_error(errno));
    match chance.below(3) {
        0 => Error::integrity("a chunk is damaged"),
        1 => failed(EIO),
        _ => failed(ENODEV),
    }
}

impl World {
    /// A copy of the bundle, of these blocks only, is plugged in.
    pub fn attach(&mut self, coverage: Vec<BlockRange>) -> Option<MediumId> {
        let content = self.bundle.clone()?;
        Some(self.plug(content, Supply { coverage, needs_vouching: false }))
    }

    /// The medium of an earlier generation is plugged in; nobody vouches for it yet.
    pub fn attach_old(&mut self, coverage: Vec<BlockRange>) -> MediumId {
        let content = self.shelf.old.clone();
        self.plug(content, Supply { coverage, needs_vouching: true })
    }

    fn plug(&mut self, content: Vec<u8>, supply: Supply) -> MediumId {
        self.shelf.next += 1;
        let id = self.shelf.next;
        self.note(|| format!("attach {id}: {supply:?}"));
        self.shelf.media.insert(id, content);
        let mut actions = Vec::new();
        self.primary.attach(id, supply, &mut actions);
        self.take(actions);
        id
    }

    pub fn detach(&mut self, id: MediumId) {
        self.note(|| format!("detach {id}"));
        self.shelf.media.remove(&id);
        let mut actions = Vec::new();
        self.primary.detach(id, &mut actions);
        self.take(actions);
    }

    /// The backup says which blocks have not changed since the cut of the old medium.
    pub fn vouch(&mut self, id: MediumId) {
        self.note(|| format!("vouch for {id}"));
        let mut actions = Vec::new();
        self.primary.vouch(id, Arc::clone(&self.shelf.vouched), &mut actions);
        self.take(actions);
    }

    /// A medium is asked only for what it may supply, and that is what the backup holds.
    pub fn check_medium(&self, id: MediumId, range: ByteRange) {
        let held = &self.shelf.media[&id];
        let span = range.offset as usize..range.end() as usize;
        for run in self.geometry().touched(range).start..self.geometry().touched(range).end {
            let block = BlockRange::one(run);
            // What a write took over since the fetch was begun is not kept.
            if self.map.wanted(block).is_empty() {
                continue;
            }
            let bytes = self.geometry().bytes_of(block);
            let span = bytes.offset as usize..bytes.end() as usize;
            if self.beginning.options.backup {
                let there = self.backup.disk.visible();
                assert!(held[span.clone()] == there[span], "the medium is older in {block:?}");
            }
        }
        assert!(span.end <= held.len());
    }
}
