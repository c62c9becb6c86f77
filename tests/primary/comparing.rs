//! Comparisons of ranges while everything else goes on.
//!
//! Does not know: when they are made.

use dualrestore::extent::BlockRange;
use dualrestore::volume::primary::WatchId;

use crate::world::World;

/// A comparison under way: what both sides held when it began.
#[derive(Debug)]
pub struct Watch {
    id: WatchId,
    blocks: BlockRange,
    sides: [Vec<u8>; 2],
}

impl World {
    pub fn is_watching(&self) -> bool {
        self.watch.is_some()
    }

    pub fn begin_watch(&mut self, blocks: BlockRange) {
        if let Some(id) = self.primary.begin_watch(blocks) {
            self.note(|| format!("watch {blocks:?}"));
            let sides = self.both_sides(blocks);
            self.watch = Some(Watch { id, blocks, sides });
        }
    }

    /// Whenever in between either side was read, they agree, if nothing touched the blocks.
    pub fn end_watch(&mut self) {
        let Some(watch) = self.watch.take() else { return };
        let untouched = self.primary.end_watch(watch.id);
        self.note(|| format!("watch ends, untouched: {untouched}"));
        if untouched {
            let [here, there] = self.both_sides(watch.blocks);
            let first = &watch.sides[0];
            let agree = [&watch.sides[1], &here, &there].iter().all(|side| *side == first);
            assert!(agree, "the comparison of {:?} cries wolf", watch.blocks);
        }
    }

    fn both_sides(&self, blocks: BlockRange) -> [Vec<u8>; 2] {
        let bytes = self.geometry().bytes_of(blocks);
        let span = bytes.offset as usize..bytes.end() as usize;
        [&*self.volume, &self.backup.disk].map(|disk| disk.visible()[span.clone()].to_vec())
    }
}
