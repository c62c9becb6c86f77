//! A map gets another identity: one new header, whatever the size.
//!
//! Guarantees: durable when it returns, whole or not at all (`header.rs`).
//! Does not know: why.

use uuid::Uuid;

use super::file::{MapFile, lock};
use crate::error::Result;
use crate::extent::BlockRange;
use crate::format::map::MapHeader;
use crate::units::CutSpan;

impl MapFile {
    /// Gives the map another identity and every bit of plane `p` the value `base[p]`, in one
    /// durable step that costs the same for any size. Nothing may change bits meanwhile.
    pub fn reset(&self, volume: Uuid, generation: u64, base: &[bool]) -> Result<()> {
        assert_eq!(base.len(), self.planes.len());
        let mut durable = lock(&self.durable);
        self.check_poisoned()?;
        let mut header = durable.headers.newest;
        header.identity.volume = volume;
        header.identity.generation = generation;
        // One above, since a failed commit may have left pages with the next sequence.
        header.void_through = durable.sequence + 1;
        for (to, from) in header.base.iter_mut().zip(base) {
            *to = *from;
        }
        self.write_header(&mut durable, header)?;
        durable.sequence = header.void_through;
        // The next commit of a page is its first: what its slots hold does not count.
        durable.slots.iter_mut().for_each(|pages| pages.fill(None));
        let mut waiting = lock(&self.waiting);
        for (plane, value) in base.iter().enumerate() {
            let bits = &self.planes[plane];
            bits.fill(BlockRange::new(0, bits.len()), *value);
            waiting.pages[plane].clear();
        }
        Ok(())
    }

    /// Gives the map another generation and keeps its bits. Durable when it returns.
    pub fn set_generation(&self, generation: u64) -> Result<()> {
        self.change_header(|header| header.identity.generation = generation)
    }

    /// Which cuts a replica holds; `None`: the map is of no replica.
    #[must_use]
    pub fn span(&self) -> Option<CutSpan> {
        lock(&self.durable).headers.newest.span
    }

    /// Says which cuts a replica holds. Durable when it returns.
    pub fn set_span(&self, span: CutSpan) -> Result<()> {
        self.change_header(|header| header.span = Some(span))
    }

    fn change_header(&self, change: impl FnOnce(&mut MapHeader)) -> Result<()> {
        let mut durable = lock(&self.durable);
        self.check_poisoned()?;
        let mut header = durable.headers.newest;
        change(&mut header);
        self.write_header(&mut durable, header)
    }
}
