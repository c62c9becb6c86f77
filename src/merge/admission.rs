//! Law 7: whose the sources are, before the first byte, and which of them may be merged side by
//! side.
//!
//! | target | sources of one stage |
//! |---|---|
//! | a replica, or to become one | those of one cut that follow each other: its media |
//! | a primary, live or not; a map of no volume | all |
//!
//! A stage begins when the one before has ended: only then is it known whether a replica takes the
//! next cut.
//!
//! Guarantees: none is merged where one may not be.
//! Does not know: how sources are read.

use std::ops::Range;

use super::lineage::{check_span, widened};
use super::pipeline::Strand;
use super::target::TargetIdentity;
use crate::bundle::Identity;
use crate::error::{Error, Result};
use crate::limits::MERGE_SOURCES_MAX;
use crate::units::{CutSpan, Geometry};

/// Checks them all, binds a target that is bound to no volume, and says what may go side by side.
pub(super) fn admit(strands: &[Strand<'_>]) -> Result<Vec<Range<usize>>> {
    check_all(strands)?;
    if let Some(Strand { source, target, .. }) = first_bound(strands)
        && target.identity().volume.is_nil()
    {
        let identity = source.identity();
        target.bind(identity.volume, identity.instant())?;
    }
    Ok(stages(strands))
}

/// Whether all of the sources may be merged, in this order.
pub fn check_all(strands: &[Strand<'_>]) -> Result<()> {
    if strands.is_empty() || strands.len() > MERGE_SOURCES_MAX {
        return Err(Error::usage(format!(
            "expected 1 to {MERGE_SOURCES_MAX} sources to merge, found {}: merge them in several \
             goes",
            strands.len()
        )));
    }
    // The target as it will be by then, where that differs from what it is.
    let mut becomes: Option<TargetIdentity> = None;
    for (number, Strand { source, target, .. }) in strands.iter().enumerate() {
        let (name, identity) = (source.name(), source.identity());
        let mut held = becomes.unwrap_or_else(|| target.identity());
        check_identity(&name, &identity, held, target.geometry())?;
        if identity.is_bound() && held.volume.is_nil() {
            check_unmixed(&name, &strands[..number])?;
            // As `bind` will have it.
            (held.volume, held.generation) = (identity.volume, identity.generation);
            let cut = identity.instant();
            held.span = held.takes_unbound.then_some(CutSpan { oldest: cut, newest: cut });
            becomes = Some(held);
        }
        // As it will be if nothing turns out to be damaged or to lie on a medium that is not here.
        let last_of_its_cut = strands[number + 1..]
            .iter()
            .all(|later| later.source.identity().instant() != identity.instant());
        if let (Some(span), Some(lineage), true) = (held.span, source.lineage(), last_of_its_cut) {
            becomes = Some(TargetIdentity { span: Some(widened(span, &lineage)), ..held });
        }
    }
    Ok(())
}

/// Once more, when the turn of the source has come.
pub(super) fn check(strand: &Strand<'_>) -> Result<()> {
    let Strand { source, target, .. } = strand;
    check_identity(&source.name(), &source.identity(), target.identity(), target.geometry())
}

fn first_bound<'s, 'a>(strands: &'s [Strand<'a>]) -> Option<&'s Strand<'a>> {
    strands.iter().find(|strand| strand.source.identity().is_bound())
}

fn stages(strands: &[Strand<'_>]) -> Vec<Range<usize>> {
    let is_replica = strands.iter().all(|strand| strand.target.identity().span.is_some());
    let instant = |number: usize| strands[number].source.identity().instant();
    let mut stages: Vec<Range<usize>> = Vec::new();
    for number in 0..strands.len() {
        match stages.last_mut() {
            Some(stage) if !is_replica || instant(stage.start) == instant(number) => {
                stage.end = number + 1;
            }
            _ => stages.push(number..number + 1),
        }
    }
    stages
}

/// What an image without a volume fills cannot belong to one afterwards.
fn check_unmixed(name: &str, before: &[Strand<'_>]) -> Result<()> {
    let Some(plain) = before.iter().find(|strand| !strand.source.identity().is_bound()) else {
        return Ok(());
    };
    Err(Error::identity(format!(
        "expected sources of one volume, found the {}, of which nobody knows the volume, before \
         the {name}: merge one of them",
        plain.source.name()
    )))
}

fn check_identity(
    name: &str,
    source: &Identity,
    target: TargetIdentity,
    geometry: Geometry,
) -> Result<()> {
    let TargetIdentity { volume, generation, span, takes_unbound } = target;
    let (size, expected) = (source.geometry.size(), geometry.size());
    if size != expected {
        return Err(Error::identity(format!(
            "expected a source of the target's {expected} bytes, found {size} in the {name}; merge \
             what is of this volume"
        )));
    }
    if !source.is_bound() && !takes_unbound {
        return Err(Error::identity(format!(
            "expected a bundle of volume {volume}, found the {name}, which names none: make one of \
             a snapshot, or stop the daemon and merge into the device with its map"
        )));
    }
    if let (false, Some(span)) = (source.is_bound(), span) {
        return Err(Error::identity(format!(
            "expected a bundle of volume {volume}, since the target was filled from one of {}, \
             found the {name}, of which nobody knows the cut: blocks of two cuts could be mixed",
            span.newest
        )));
    }
    if let (true, Some(span)) = (source.volume == volume, span) {
        return check_span(name, source.instant(), span);
    }
    if source.is_bound()
        && !volume.is_nil()
        && (source.volume, source.generation) != (volume, generation)
    {
        let advice = match source.volume == volume {
            true => "make a bundle of a snapshot taken since the loss",
            false => "merge the bundle of this volume",
        };
        return Err(Error::identity(format!(
            "expected volume {volume} of generation {generation}, found volume {} of generation \
             {} in the {name}; {advice}",
            source.volume, source.generation
        )));
    }
    Ok(())
}
