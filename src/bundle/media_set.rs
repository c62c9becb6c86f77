//! Several media of one bundle as one source: their segments in the order of the volume.
//!
//! Guarantees: all are of one bundle, begun together (law 7); a segment that is there twice is read
//! once; segments do not speak of the same bytes. What lies on a medium that is not here is told,
//! and is never zero (law 8).
//! Does not know: what is done with the pieces.

use std::sync::Arc;

use super::pieces::{Piece, PieceSource};
use super::reader::{Bundle, Pieces};
use super::source::{Identity, Lineage};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{ByteRange, ByteRuns};
use crate::format::bundle::SegmentEntry;
use crate::format::frames::CutName;

/// See the module.
#[derive(Debug)]
pub struct MediaSet {
    bundles: Vec<Arc<Bundle>>,
    /// Which bundle, and which of its segments, ascending.
    segments: Vec<(usize, usize)>,
    coverage: ByteRuns,
}

impl MediaSet {
    /// At least one medium.
    pub fn new(bundles: Vec<Arc<Bundle>>) -> Result<Self> {
        let first = bundles.first().ok_or_else(|| Error::usage("expected at least one medium"))?;
        for other in &bundles[1..] {
            check_same(first, other)?;
        }
        let mut segments: Vec<(usize, usize)> = (0..)
            .zip(&bundles)
            .flat_map(|(at, bundle)| (0..bundle.segments().len()).map(move |segment| (at, segment)))
            .collect();
        let entry = |(at, segment): &(usize, usize)| &bundles[*at].segments()[*segment];
        segments.sort_by_key(|one| entry(one).number);
        let mut differing = None;
        segments.dedup_by(|next, last| {
            let (next_entry, last_entry) = (entry(next), entry(last));
            let same = next_entry.number == last_entry.number;
            if same && next_entry != last_entry {
                differing = Some((next.0, next_entry.number));
            }
            same
        });
        if let Some((at, number)) = differing {
            return Err(Error::identity(format!(
                "expected copies of one segment {number}, found two that differ: extract from the \
                 one medium or the other"
            ))
            .at_path(bundles[at].folder().path()));
        }
        let coverage = coverage_of(segments.iter().map(entry), first)?;
        Ok(Self { bundles, segments, coverage })
    }

    fn first(&self) -> &Bundle {
        &self.bundles[0]
    }

    /// What these media speak of.
    #[must_use]
    pub fn coverage(&self) -> &ByteRuns {
        &self.coverage
    }

    /// Refuses what lacks a part of the volume: because another medium has it, or none.
    pub fn check_complete(&self) -> Result<()> {
        let bundle = self.first();
        let lacking =
            |range: ByteRange| self.coverage.gaps(range).iter().map(|gap| gap.length).sum();
        let elsewhere: u64 = bundle.selection().into_iter().map(lacking).sum();
        if elsewhere > 0 {
            return Err(Error::new(
                ErrorKind::NextMedium,
                format!(
                    "expected all media of bundle {}, found {}, which lack {elsewhere} bytes of \
                     what it includes: name the others too, or take what is here with --partial",
                    bundle.uuid(),
                    self.numbers()
                ),
            ));
        }
        let absent: u64 = lacking(bundle.geometry().all_bytes());
        check_whole(bundle.geometry().size(), absent, bundle.lineage().is_some())
    }

    /// Which media are here, in words.
    fn numbers(&self) -> String {
        let media = self.bundles.iter().filter_map(|bundle| bundle.manifest().medium);
        let mut numbers: Vec<u32> = media.clone().map(|medium| medium.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let text: Vec<String> = numbers.iter().map(u32::to_string).collect();
        let last = media.filter(|medium| medium.last).map(|medium| medium.number).next();
        match (numbers.len(), last) {
            (0, _) => "one that says of no others".into(),
            (1, None) => format!("medium {}, which is not the last", text.join(", ")),
            (_, None) => format!("media {}, none of them the last", text.join(", ")),
            (1, Some(last)) => format!("medium {} of {last}", text.join(", ")),
            (_, Some(last)) => format!("media {} of {last}", text.join(", ")),
        }
    }
}

/// Refuses a bundle that does not include all of the volume.
pub(super) fn check_whole(size: u64, absent: u64, incremental: bool) -> Result<()> {
    if absent == 0 {
        return Ok(());
    }
    let advice = match incremental {
        true => {
            "it is an incremental one: merge it, and then the one that it goes on from, into a \
             file with a map; or take what is here with --partial"
        }
        false => "take what is here with --partial",
    };
    Err(Error::usage(format!(
        "expected a bundle of the whole volume of {size} bytes, found one without {absent} of \
         them, and what is not included is not zero: {advice}"
    )))
}

fn check_same(one: &Bundle, other: &Bundle) -> Result<()> {
    let (path, other_path) = (one.folder().path().display(), other.folder().path());
    if one.uuid() != other.uuid() {
        return Err(Error::identity(format!(
            "expected media of one bundle, found bundle {} here and {} in {path}: extract each by \
             itself, or merge them into a file with a map",
            other.uuid(),
            one.uuid()
        ))
        .at_path(other_path));
    }
    if one.manifest().begin_hash != other.manifest().begin_hash {
        return Err(Error::identity(format!(
            "expected media that were begun together, found another manifest.begin.json here than \
             in {path}: bring the media of one making"
        ))
        .at_path(other_path));
    }
    Ok(())
}

fn coverage_of<'a>(
    entries: impl Iterator<Item = &'a SegmentEntry>,
    bundle: &Bundle,
) -> Result<ByteRuns> {
    let mut coverage = ByteRuns::default();
    let mut end = 0;
    for run in entries.flat_map(|entry| &entry.coverage) {
        let range = ByteRange::from(*run);
        if range.offset < end {
            return Err(Error::format(
                "expected segments whose numbers ascend with what they speak of, found some that \
                 overlap or go back: merge the bundle into a file with a map instead",
            )
            .at_path(bundle.folder().path()));
        }
        end = range.end();
        coverage.add(range);
    }
    Ok(coverage)
}

impl PieceSource for MediaSet {
    fn name(&self) -> String {
        self.first().name()
    }

    fn identity(&self) -> Identity {
        self.first().identity()
    }

    fn lineage(&self) -> Option<Lineage> {
        self.first().lineage()
    }

    fn cut_name(&self) -> Option<CutName> {
        self.first().cut_name()
    }

    fn bytes_total(&self) -> u64 {
        self.coverage.iter().map(|run| run.length).sum()
    }

    fn answers_at_once(&self) -> bool {
        self.bundles.iter().any(|bundle| bundle.answers_at_once())
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let segments = self.segments.iter();
        Box::new(Pieces::of(segments.map(|(at, segment)| (&*self.bundles[*at], *segment))))
    }
}
