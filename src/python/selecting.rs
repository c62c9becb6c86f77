//! What Python wishes a bundle to hold, against what its source offers.

use std::sync::Arc;

use super::boundary::uuid;
use crate::bundle::{Source, Wish, WriterOptions, choose};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{BaseCut, Run};
use crate::snapshot::SnapshotView;

/// The wish in the words of Python.
#[derive(Debug)]
pub struct Words {
    pub ranges: Vec<ByteRange>,
    pub partitions: Vec<u32>,
    pub allocated: bool,
    /// UUID of the snapshot of a cut.
    pub since: Option<String>,
}

impl Words {
    fn is_silent(&self) -> bool {
        self.ranges.is_empty()
            && self.partitions.is_empty()
            && !self.allocated
            && self.since.is_none()
    }

    /// Sets what the options say of the selection. `proceed`: nothing said is what was said before.
    pub fn apply(
        &self,
        source: &dyn Source,
        snapshot: Option<&Arc<SnapshotView>>,
        proceed: bool,
        options: &mut WriterOptions,
    ) -> Result<()> {
        if proceed && self.is_silent() {
            return Ok(());
        }
        let geometry = source.identity().geometry;
        let offered: Vec<ByteRange> = match snapshot {
            None => vec![geometry.all_bytes()],
            Some(view) => {
                view.selection().runs().iter().map(|run| geometry.bytes_of(*run)).collect()
            }
        };
        let since = match (&self.since, snapshot) {
            (None, _) => None,
            (Some(cut), Some(view)) => Some(view.changed_since(uuid(cut)?)?),
            (Some(_), None) => {
                return Err(Error::usage(
                    "expected a snapshot (NAME@SNAPSHOT) to make an incremental bundle of, found \
                     an image: nothing remembers what changed in it",
                ));
            }
        };
        let wish = Wish {
            ranges: &self.ranges,
            partitions: &self.partitions,
            allocated: self.allocated,
            changed: since.as_ref().map(|(_, changed)| changed),
        };
        let chosen = choose(source, &offered, &wish)?;
        options.selection = chosen.selection;
        options.allocated_only = self.allocated;
        options.base = since.map(|(cut, _)| BaseCut {
            generation: cut.generation,
            cut: cut.sequence,
            scope: (chosen.scope != [geometry.all_bytes()])
                .then(|| chosen.scope.iter().map(|range| Run::from(*range)).collect()),
        });
        Ok(())
    }
}
