//! Which cuts may fill a replica: a device that nobody serves, bound by its first bundle.
//!
//! A replica is to be the volume as at one cut, the newest that it holds. A block that it lacks may
//! come from any cut since which the block did not change up to the newest. So it keeps a span of
//! cuts, oldest to newest, and this is true of every missing block: it did not change within.
//!
//! | merged | the span | next may be |
//! |---|---|---|
//! | any bundle of cut `c`, as the first | `c` to `c` | bundles of cut `c`: its other media |
//! | an incremental one of the span, base `b`, whole | from `b` | also those of cuts from `b` on |
//! | the same, of which something is still missing | as it was | the same bundle again |
//! | a full one | as it was | |
//!
//! So a full bundle and incremental ones are merged newest first. The other way round the blocks of
//! the full bundle would be current already when the newer ones come: that is refused (exit
//! code 5).
//! A primary, live or not, takes any cut of its generation: what it lacks was not written since the
//! loss, so all cuts hold the same.
//!
//! Guarantees: a replica is never a mixture of two cuts, whatever is merged in whatever order.
//! Does not know: how sources are read.

use crate::bundle::Lineage;
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, subtract};
use crate::map::{LINK_ONLY, OverwriteMap};
use crate::units::{Cut, CutSpan, Geometry};

/// Refuses a cut that would make the replica a mixture.
pub fn check_span(name: &str, cut: Cut, span: CutSpan) -> Result<()> {
    if span.contains(cut) {
        return Ok(());
    }
    let CutSpan { oldest, newest } = span;
    let words = if cut > newest {
        format!(
            "expected a bundle of {newest} or before, found the {name} of {cut}, which is newer \
             than what the target already holds: blocks of two cuts would be mixed. Merge the \
             newest bundle first, then the one that it goes on from, and so on to the full one: \
             make a new map and begin with the newest"
        )
    } else {
        format!(
            "expected a bundle from {oldest} to {newest}, found the {name} of {cut}: blocks of two \
             cuts would be mixed. Merge first what lies between, the newest first: every medium \
             of each incremental bundle down to the one that goes on from {cut}, until nothing of \
             it is missing"
        )
    };
    Err(Error::identity(words))
}

/// The span once an incremental source has been merged whole.
#[must_use]
pub fn widened(span: CutSpan, lineage: &Lineage) -> CutSpan {
    if !span.contains(lineage.cut) {
        return span;
    }
    CutSpan { oldest: span.oldest.min(lineage.base), ..span }
}

/// Takes a merged incremental source into account, if nothing of it is missing.
pub(super) fn descend(map: &OverwriteMap, lineage: &Lineage) -> Result<()> {
    let Some(span) = map.file().span() else { return Ok(()) };
    let wider = widened(span, lineage);
    let geometry = map.geometry();
    if wider == span || !is_filled(map, geometry, &lineage.selection) {
        return Ok(());
    }
    if let Some(scope) = &lineage.scope {
        // Nobody looked whether these changed, so that no earlier cut may supply them.
        let inside = scope.iter().map(|range| geometry.touched(*range));
        for run in subtract(geometry.all_blocks(), inside.collect::<Vec<_>>()) {
            for missing in map.wanted(run) {
                map.file().fill(LINK_ONLY, missing, true);
            }
        }
        map.file().commit_all()?;
    }
    map.file().set_span(wider)
}

fn is_filled(map: &OverwriteMap, geometry: Geometry, selection: &[ByteRange]) -> bool {
    selection.iter().all(|range| {
        let blocks: BlockRange = geometry.touched(*range);
        map.wanted(blocks).is_empty() && map.in_doubt(blocks).is_empty()
    })
}
