//! A snapshot as the source of a bundle, and what becomes of its old bytes once they are stored.

use std::sync::Arc;

use uuid::Uuid;

use super::source::{Identity, Source};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::RELEASE_STEP_BYTES;
use crate::snapshot::SnapshotView;

impl Source for SnapshotView {
    fn identity(&self) -> Identity {
        let cut = self.cut();
        Identity {
            volume: self.volume(),
            geometry: self.geometry(),
            generation: cut.generation,
            cut: cut.sequence,
        }
    }

    fn snapshot(&self) -> Option<Uuid> {
        Some(self.cut().snapshot)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        Self::read_at(self, offset, buffer)
    }

    /// What is not selected is never asked for, and cannot be looked at.
    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let geometry = self.geometry();
        let runs = self.selection().runs();
        let next = runs.partition_point(|run| geometry.bytes_of(*run).end() <= offset);
        for run in &runs[next..] {
            let bytes = geometry.bytes_of(*run);
            let mut at = bytes.offset.max(offset);
            while at < bytes.end() {
                let extent = self.extent_at(at, bytes.end())?;
                if extent.data {
                    return Ok(Some(extent.range));
                }
                at = extent.range.end();
            }
        }
        Ok(None)
    }
}

/// When a snapshot gives back what a bundle of it holds durably.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Release {
    Never,
    /// When it would break otherwise, because its store is full.
    #[default]
    WhenFull,
    Always,
}

impl Release {
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "never" => Ok(Self::Never),
            "auto" => Ok(Self::WhenFull),
            "always" => Ok(Self::Always),
            other => Err(Error::usage(format!("expected auto, always or never, found {other:?}"))),
        }
    }
}

/// A snapshot that gives back what a bundle of it holds.
#[derive(Debug)]
pub struct ReleasingSnapshot {
    view: Arc<SnapshotView>,
    when: Release,
}

impl ReleasingSnapshot {
    /// Refused where everything is to be given back and an older snapshot may need it.
    pub fn new(view: Arc<SnapshotView>, when: Release) -> Result<Self> {
        if when == Release::Always {
            view.check_releasable()?;
        }
        Ok(Self { view, when })
    }
}

/// So that mirrored writes go on between two steps.
fn in_steps(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    (range.offset..range.end()).step_by(RELEASE_STEP_BYTES as usize).map(move |at| {
        let end = range.end().min(at + RELEASE_STEP_BYTES);
        ByteRange::new(at, end - at)
    })
}

impl Source for ReleasingSnapshot {
    fn identity(&self) -> Identity {
        self.view.identity()
    }

    fn snapshot(&self) -> Option<Uuid> {
        self.view.snapshot()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.view.read_at(offset, buffer)
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.view.next_data(offset)
    }

    fn stored(&self, range: ByteRange) {
        // What cannot be given back is kept: the bundle has it, and goes on.
        let _kept = match self.when {
            Release::Never => Ok(()),
            Release::WhenFull => self.view.offer(range),
            Release::Always => in_steps(range).try_for_each(|step| self.view.release(step)),
        };
    }

    fn gives_up(&self) -> bool {
        self.when != Release::Never
    }
}
