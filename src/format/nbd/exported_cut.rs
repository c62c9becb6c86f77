//! Whose bytes an export of a snapshot holds, as text in its description: drawn in `docs/nbd.md`.
//!
//! Guarantees: a text that does not begin as one of these is none; one that does, and is not
//! understood to its end, is refused (law 12). The text fits a description.

use std::fmt::Write;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::NBD_DESCRIPTION_BYTES_MAX;

const BEGINNING: &str = "dualrestore-cut ";
const VERSION: &str = "1";
const UNSTATED: &str = "unstated";
const ALL: &str = "all";

/// What of the volume a snapshot includes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Included {
    All,
    /// Ascending, disjoint, not empty.
    Ranges(Vec<ByteRange>),
    /// Too many ranges for a description.
    Unstated,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportedCut {
    pub volume: Uuid,
    pub generation: u64,
    pub sequence: u64,
    pub snapshot: Uuid,
    pub block_bytes: u32,
    pub included: Included,
}

impl ExportedCut {
    /// The description.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { volume, generation, sequence, snapshot, block_bytes, included } = self;
        let head = format!(
            "{BEGINNING}{VERSION} volume={volume} generation={generation} sequence={sequence} \
             snapshot={snapshot} block={block_bytes} included="
        );
        let mut text = head.clone();
        match included {
            Included::All => text.push_str(ALL),
            Included::Unstated => text.push_str(UNSTATED),
            Included::Ranges(ranges) => {
                for (number, range) in ranges.iter().enumerate() {
                    let comma = if number > 0 { "," } else { "" };
                    let written = write!(text, "{comma}{}-{}", range.offset, range.end());
                    written.expect("text takes text");
                }
            }
        }
        if text.len() > NBD_DESCRIPTION_BYTES_MAX {
            text = head + UNSTATED;
        }
        text
    }

    /// What a description says; `None`: it is something else.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let Some(rest) = text.strip_prefix(BEGINNING) else { return Ok(None) };
        match Self::fields(rest) {
            Some(cut) => Ok(Some(cut)),
            None => Err(Error::format(format!(
                "expected an export that says in words of version {VERSION} whose snapshot it is, \
                 found {text:?}: it is of another version of dualrestore, or damaged"
            ))),
        }
    }

    fn fields(rest: &str) -> Option<Self> {
        let mut words = rest.split(' ');
        if words.next()? != VERSION {
            return None;
        }
        let mut field = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
        let cut = Self {
            volume: uuid(field("volume")?)?,
            generation: number(field("generation")?)?,
            sequence: number(field("sequence")?)?,
            snapshot: uuid(field("snapshot")?)?,
            block_bytes: u32::try_from(number(field("block")?)?).ok()?,
            included: included(field("included")?)?,
        };
        (words.next().is_none() && !cut.volume.is_nil()).then_some(cut)
    }
}

/// A UUID in its usual form only.
fn uuid(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok().filter(|uuid| uuid.to_string() == text)
}

/// Decimal digits only, without needless zeros.
fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number: &u64| number.to_string() == text)
}

fn included(text: &str) -> Option<Included> {
    match text {
        ALL => return Some(Included::All),
        UNSTATED => return Some(Included::Unstated),
        _ => {}
    }
    let mut ranges: Vec<ByteRange> = Vec::new();
    for word in text.split(',') {
        let (start, end) = word.split_once('-')?;
        let (start, end) = (number(start)?, number(end)?);
        let after = ranges.last().map_or(0, |last| last.end());
        if start < after || end <= start {
            return None;
        }
        ranges.push(ByteRange::new(start, end - start));
    }
    Some(Included::Ranges(ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(included: Included) -> ExportedCut {
        ExportedCut {
            volume: Uuid::from_u128(7),
            generation: 3,
            sequence: 18_446_744_073_709_551_615,
            snapshot: Uuid::from_u128(9),
            block_bytes: 4096,
            included,
        }
    }

    #[test]
    fn a_cut_reads_back_from_its_text() {
        let ranges = vec![ByteRange::new(0, 4096), ByteRange::new(8192, 512)];
        for included in [Included::All, Included::Unstated, Included::Ranges(ranges)] {
            let cut = cut(included);
            assert_eq!(ExportedCut::parse(&cut.text()).expect("ours"), Some(cut));
        }
    }

    #[test]
    fn more_ranges_than_a_description_takes_are_not_stated() {
        let ranges = (0..99).map(|at| ByteRange::new(at * 8192, 4096)).collect();
        let text = cut(Included::Ranges(ranges)).text();
        assert!(text.len() <= NBD_DESCRIPTION_BYTES_MAX);
        let read = ExportedCut::parse(&text).expect("ours").expect("ours");
        assert_eq!(read.included, Included::Unstated);
    }

    #[test]
    fn another_description_is_none_and_a_version_or_field_that_is_not_known_is_refused() {
        for other in ["", "the ledger", "dualrestore", "dualrestore-cut"] {
            assert_eq!(ExportedCut::parse(other).expect("something else"), None);
        }
        let text = cut(Included::All).text();
        for (from, to) in [
            ("cut 1", "cut 2"),
            ("block=4096", "block=04096"),
            ("block=4096", "block=-4096"),
            ("block=4096 ", ""),
            ("block=4096", "block=4096 colour=red"),
            ("generation=3", "generation="),
            ("included=all", "included=5-4"),
            ("included=all", "included=0-1,0-1"),
            ("included=all", "included="),
            ("included=all", "included=all "),
            ("volume=0000", "volume={0000"),
            ("00000007", "00000000"),
        ] {
            let changed = text.replace(from, to);
            assert_ne!(changed, text);
            let refused = ExportedCut::parse(&changed).expect_err(&changed);
            assert!(refused.to_string().contains("version 1"), "{refused}");
        }
    }
}
